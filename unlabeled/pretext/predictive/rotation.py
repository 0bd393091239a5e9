"""Rotation prediction (RotNet): which of four rotations was applied to the image?

Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018,
arXiv 1803.07728; code of the authors: github.com/gidariss/FeatureLearningRotNet.

Every image is in the batch in all its rotations. They are made on the device, after crop and flip, from one image per
loader sample; a rotation by a right angle only permutes pixels, so nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from unlabeled.pretext.common.drawing import RIGHT, WRONG, enlarged, framed, tiled
from unlabeled.pretext.common.views import Fraction
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, NamedParameter, Paper, PretextTask, Recipe, StepOutput, TaskConfig

Ratio = Annotated[float, Field(gt=0)]

_SMALL = 64
"""Largest image side, in pixels, for which `crop: auto` follows the CIFAR recipe."""
_SHOWN = 8
"""Number of images that `visualize` shows."""
_FRAME = 8
"""Width of the frame around each of them, in pixels."""
_COUNTER = "num_batches_tracked"
"""Batch norm's counter, which did not exist yet when the authors' files were written."""


class RotationConfig(TaskConfig):
    """Settings of rotation prediction; the defaults are those of the released code."""

    angles: Literal[2, 4] = 4
    """Rotations of each image: 4 (0, 90, 180, 270 degrees), or 2 (0, 180), which also suits images that are not square.
    [rotations]"""
    crop: Literal["auto", "pad", "resized"] = "auto"
    """pad: pad the image by `pad` pixels, then crop (the CIFAR recipe). resized: crop a random region and resize it
    (the ImageNet recipe). auto: pad for images of up to 64 pixels."""
    pad: int = Field(4, ge=0)
    """For crop=pad: zeros on each side before the crop. [pixels]"""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """For crop=resized: smallest and largest fraction of the image area. [fraction]"""
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    """For crop=resized: narrowest and widest aspect ratio (width / height)."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    decay_all: bool = True
    """Apply weight decay to every parameter, as published; false: not to norms and biases."""


class RotationViews:
    """Random crop and flip of one image; `Rotation.forward` rotates it later, on the device."""

    def __init__(self, config: RotationConfig, size: tuple[int, int]) -> None:
        crop: list[v2.Transform]
        if config.crop == "pad" or (config.crop == "auto" and max(size) <= _SMALL):
            crop = [v2.Resize(max(size), antialias=True), v2.RandomCrop(size, padding=config.pad)]
        else:
            crop = [v2.RandomResizedCrop(size, scale=config.scale, ratio=config.ratio, antialias=True)]
        self.transform = v2.Compose([*crop, v2.RandomHorizontalFlip(config.flip)])

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) of any size → ``image``, uint8 (3, h, w)."""
        return {"image": self.transform(image)}


def rotations(images: Tensor, angles: int) -> Tensor:
    """(B, C, H, W) → (B * angles, C, H, W), image by image, counterclockwise: 0, 90, 180, 270, or 0 and 180 degrees.

    Raises ConfigError for four angles if images are not square.
    """
    _check_square(images.shape[-2], images.shape[-1], angles)
    quarters = range(0, 4, 4 // angles)
    return torch.stack([torch.rot90(images, quarter, (2, 3)) for quarter in quarters], dim=1).flatten(0, 1)


def _check_square(height: int, width: int, angles: int) -> None:
    if angles == 4 and height != width:
        remedy = "set task.angles=2 or a square backbone.size"
        raise ConfigError(f"task.angles: 4 rotations need square images, these are {height}x{width}; {remedy}")


class Rotation(PretextTask):
    """Predicts by how many right angles an image was rotated.

    One linear layer classifies the pooled features."""

    Config: ClassVar[type[TaskConfig]] = RotationConfig
    paper = Paper(
        "Unsupervised Representation Learning by Predicting Image Rotations",
        2018,
        "https://arxiv.org/abs/1803.07728",
    )
    good_for = "a quick first baseline on any backbone, for images that have an upright orientation"
    recipe: ClassVar[Recipe] = {
        "optim": {"name": "sgd", "lr": 0.1, "lr_scaling": "none", "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "multistep", "warmup_epochs": 0, "milestones": [60, 120, 160], "gamma": 0.2},
        "batch_size": 128,
        "epochs": 200,
    }
    """Rotation prediction (Gidaris et al., ICLR 2018, arXiv 1803.07728): the authors' CIFAR-10 recipe. Each image
    is seen in four rotations; batch_size counts images, and the learning rate is not scaled by four."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled"})
    captions: ClassVar[Mapping[str, str]] = {
        "rotations": "green frame: rotation predicted correctly, red: not; white bar: the side predicted to be the top"
    }
    config: RotationConfig

    def __init__(self, config: RotationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        _check_square(*backbone.input_size, config.angles)
        self.train_only(backbone.reached_by_pooled())
        self.head = nn.Linear(backbone.embed_dim, config.angles)

    @classmethod
    def views(cls, config: RotationConfig, backbone: Backbone) -> Views:
        return RotationViews(config, backbone.input_size)

    def size_step(self) -> tuple[int, int]:
        """See the base class. With four angles, both sides have the same step, so that images stay square."""
        height, width = self.backbone.size_step()
        both = math.lcm(height, width)
        return (both, both) if self.config.angles == 4 else (height, width)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → scores of each rotated image (B * angles, angles), in the order of `rotations`."""
        rotated = rotations(self.backbone.normalize(images), self.config.angles)
        scores: Tensor = self.head(self.backbone.pooled(rotated))
        return scores

    def forward(self, batch: Batch) -> StepOutput:
        """``image`` uint8 (B, 3, H, W) → mean cross-entropy over all B * angles rotated images."""
        # rotate each image by all angles, then classify
        logits = self.logits(batch["image"]).float()  # (B * angles, angles); the loss is computed in float32
        # the labels follow from the order of `rotations`
        labels = self._labels(len(batch["image"]), logits.device)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return StepOutput(F.cross_entropy(logits, labels), {"accuracy": accuracy})

    def _labels(self, images: int, device: torch.device) -> Tensor:
        return torch.arange(self.config.angles, device=device).repeat(images)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """As in the base class, but with weight decay on all parameters if `decay_all` is set."""
        for group in super().parameter_groups():
            yield group._replace(decay=group.decay or self.config.decay_all)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``rotations``: one row per image (the first 8) with all its rotations.

        A frame is green if the prediction is correct, else red. The white bar is on the side that was predicted to be
        the top of the upright image.
        """
        images = batch["image"][:_SHOWN]
        with modes_kept(self):
            predicted = self.eval().logits(images).argmax(1)
        right = predicted == self._labels(len(images), predicted.device)
        turned = enlarged(rotations(images, self.config.angles).cpu())
        quarters = (predicted * (4 // self.config.angles)).tolist()
        tiles = [_marked(*one) for one in zip(turned, quarters, right.tolist(), strict=True)]
        return {"rotations": tiled(tiles, self.config.angles, background=0)}

    def load_reference(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Loads a network-in-network checkpoint of the authors: ``{epoch, network}``, or its ``network`` alone."""
        tensors: Mapping[str, Tensor] = state.get("network", state)
        names = _reference_names(self)
        ours = self.state_dict()
        renamed = {name: tensors[reference] for name, reference in names.items() if reference in tensors}
        if not renamed:
            raise CheckpointError(
                "rotation: the checkpoint has no tensor of RotNet's network-in-network that belongs to "
                f"{self.backbone.name}; set backbone.name=nin_cifar"
            )
        for name, tensor in renamed.items():
            if tensor.shape != ours[name].shape:
                raise CheckpointError(
                    f"rotation: {names[name]} has shape {list(tensor.shape)}, {name} needs {list(ours[name].shape)}; "
                    "check task.angles and backbone.kwargs"
                )
        self.load_state_dict(renamed, strict=False)
        missing = [name for name in ours if name not in renamed and not name.endswith(_COUNTER)]
        used = set(names.values())
        return missing, [name for name in tensors if name not in used]


def _reference_names(task: Rotation) -> dict[str, str]:
    """Our name → the authors' name (in their NetworkInNetwork's `_feature_blocks`); empty for other backbones."""
    layers = {"conv": "Conv", "bn": "BatchNorm"}
    names = {}
    for name in task.state_dict():
        match name.split("."):
            case ["backbone", "model", "blocks", block, unit, layer, kind] if layer in layers and kind != _COUNTER:
                reference = f"Block{int(block) + 1}_ConvB{unit.removeprefix('conv')}"
                names[name] = f"_feature_blocks.{block}.{reference}.layers.{layers[layer]}.{kind}"
    for kind in ("weight", "bias") if names else ():  # the classifier is the block after the last one
        names[f"head.{kind}"] = f"_feature_blocks.{task.backbone.depth}.Classifier.{kind}"
    return names


def _marked(image: Tensor, quarter: int, right: bool) -> Tensor:
    """Adds a frame, green if `right` else red, with a bar on the side of the predicted top; uint8 (3, H, W)."""
    # undo the predicted rotation, draw the bar at the top, rotate back
    upright = framed(torch.rot90(image, -quarter, (1, 2)), _FRAME, RIGHT if right else WRONG)
    side = upright.shape[2] // 4
    upright[:, _FRAME // 4 : 3 * _FRAME // 4, side:-side] = 255
    return torch.rot90(upright, quarter, (1, 2))
