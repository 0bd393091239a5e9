"""PixPro: each cell of one view, smoothed over similar cells, agrees with the nearby cells of the other view.

Xie, Lin, Zhang, Cao, Lin, Hu, "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
Representation Learning", CVPR 2021, arXiv 2011.10043; code of the authors: github.com/zdaxie/PixPro.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.checkpoint import load_mapped
from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.dense_contrast.pixel_pairs import PixelMLP, PixelPairs, PixelPairsConfig, overlap_logs
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig

logger = logging.getLogger(__name__)

_EPS = 1e-6
"""Added to the number of pairs of an image, and to similarities before a power below 1 (infinitely steep at 0)."""
_WRAPPED = "module."
"""Prefix of every name in the authors' files, which were saved from DDP."""


class PixProConfig(PixelPairsConfig):
    """Settings of PixPro; the defaults are those of the paper and the released recipe."""

    gamma: float = Field(2.0, gt=0)
    """Sharpness of the smoothing: similarities between cells are raised to this power."""
    transform_layers: Literal[0, 1, 2] = 1
    """Layers of the transform that is applied to cells before they are averaged; 0: none. [layers]"""
    instance_weight: float = Field(0.0, ge=0)
    """Weight of an additional BYOL loss on whole images; 0: no such branch. The paper's results with it use 1."""


class PixelPropagation(nn.Module):
    """Replaces each cell by the sum of all cells of its image, weighted by similarity (section 3.2)."""

    def __init__(self, dim: int, layers: Literal[0, 1, 2], gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        transforms: list[Callable[[], nn.Module]] = [
            nn.Identity,
            lambda: nn.Conv2d(dim, dim, 1),
            lambda: PixelMLP(dim, dim, dim),
        ]
        self.value_transform = transforms[layers]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, gh, gw) → (B, C, gh, gw), in at least float32."""
        values = self.value_transform(x)
        # the weights of a cell do not sum to 1; the loss only depends on the direction of the sum
        with torch.autocast(x.device.type, enabled=False):
            values = F.normalize(widened(values).flatten(2), dim=1)
            return torch.einsum("bij,bcj->bci", self.weights(x), values).reshape(x.shape)

    def weights(self, x: Tensor) -> Tensor:
        """(B, C, gh, gw) → (B, L, L): max(cosine, 0) ** gamma of each pair of cells, including a cell with itself."""
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(widened(x).flatten(2), dim=1)
            similarity = torch.einsum("bci,bcj->bij", unit, unit).clamp(min=0)
            return (similarity + _EPS if self.gamma < 1 else similarity).pow(self.gamma)


class PixPro(PixelPairs):
    """Makes each smoothed cell of one view agree with the nearby cells of another view.

    Submodules: `backbone`, `projector`, `propagation`; with `instance_weight` also `instance_projector` and
    `predictor`; `teacher` holds momentum copies of the backbone and the projectors."""

    Config: ClassVar[type[TaskConfig]] = PixProConfig
    paper = Paper(
        "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning",
        2021,
        "https://arxiv.org/abs/2011.10043",
    )
    good_for = "dense features for detection and segmentation, with convolutional networks above all"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "larspixpro",
            "lr": 1.0,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "momentum": 0.9,
            "weight_decay": 1e-5,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 5, "start_factor": 0.01, "min_lr": 1e-6},
        "engine": {"channels_last": True},
        "batch_size": 1024,
        "epochs": 100,
    }
    """PixPro (Xie et al., CVPR 2021, arXiv 2011.10043): the published recipe of 100 epochs (ResNet-50, 224 pixels).
    Its results with a loss on whole images as well: task.instance_weight=1"""
    config: PixProConfig

    def __init__(self, config: PixProConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.propagation = PixelPropagation(config.feature_dim, config.transform_layers, config.gamma)
        if config.instance_weight:
            self.instance_projector = PixelMLP(self.feature_map.channels, config.hidden_dim, config.feature_dim)
            self.predictor = PixelMLP(config.feature_dim, config.hidden_dim, config.feature_dim)
            self.follow("instance_projector")

    def forward(self, batch: Batch) -> StepOutput:
        """``views`` uint8 (B, 2, 3, h, w), ``boxes`` (B, 2, 4) → loss of nearby cells, in [-4, 4], plus the weighted
        loss of whole images, in the same range."""
        # student and teacher encode both views; lists have one tensor per view
        images = self.images_of(batch)  # (B, 3, h, w) each
        maps, projections = self.student_maps(images)  # (B, channels, gh, gw) and (B, C, gh, gw) each
        key_maps, keys = self.teacher_maps(images)
        # smooth the student's projections, then compare nearby cells
        positive = self.positive_pairs(batch["boxes"], tuple(keys[0].shape))  # bool (B, L, L)
        predictions = self.each_view(self.propagation, projections)
        forth = consistency(predictions[0], keys[1], positive)
        back = consistency(predictions[1], keys[0], positive.transpose(1, 2))  # rows are cells of the second view now
        loss = -2 * forth.mean() - 2 * back.mean()
        logs = {"loss_pixel": loss.detach(), **overlap_logs(positive)}
        # optionally, compare whole images as BYOL does
        if self.config.instance_weight:
            instance = agreement(self.instance_predictions(maps), self.instance_keys(key_maps))
            logs["loss_instance"] = instance.detach()
            loss = loss + self.config.instance_weight * instance
        return StepOutput(loss, logs, projections[0].detach().mean((2, 3)))

    def instance_predictions(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The student's feature maps of both views → predictions (B, C) of length 1 for each."""
        return _pooled(self.each_view(self.predictor, self.each_view(self.instance_projector, maps)))

    @torch.no_grad()
    def instance_keys(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's feature maps of both views → keys (B, C) of length 1 for each."""
        return _pooled(self.each_view(self.teacher["instance_projector"], maps))

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads a pretraining checkpoint of the authors, ``{"model": ...}`` or its tensors.

        If the file has no teacher (names with ``_k``), the teacher becomes a copy of the loaded student. Returns
        (missing, unexpected) names as in the file. Raises CheckpointError if a shape differs or no tensor fits.
        """
        model = cast(Mapping[str, Tensor], state.get("model", state))
        tensors = {name.removeprefix(_WRAPPED): tensor for name, tensor in model.items()}
        missing, unexpected = load_mapped(self, tensors, reference_names(self))
        momentum = [name for name in missing if name.split(".")[0].endswith("_k")]
        if momentum and not any(name.split(".")[0].endswith("_k") for name in tensors):
            for name, copy in self.teacher.items():
                copy.load_state_dict(getattr(self, name).state_dict())
            missing = [name for name in missing if name not in momentum]
            logger.info("pixpro: the file has no teacher, which starts as a copy of the student")
        return missing, unexpected


def consistency(predictions: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """Mean cosine (B,) over the `positive` pairs (bool, B, L1, L2) of maps (B, C, gh, gw) of two views.

    0 for an image without pairs. In at least float32. Source: section 3.2, and the authors' code for the 1e-6.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        first, second = (F.normalize(widened(maps).flatten(2), dim=1) for maps in (predictions, keys))
        cosines = torch.einsum("bcl,bcm->blm", first, second)
        return (cosines * positive).sum((1, 2)) / (positive.sum((1, 2), dtype=cosines.dtype) + _EPS)


def agreement(predictions: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """-2 times the mean cosine of each view's predictions (B, C) and the other's keys (B, C), summed over views."""
    forth, back = predictions[0] * keys[1], predictions[1] * keys[0]
    return -2 * forth.sum(1).mean() - 2 * back.sum(1).mean()


def reference_names(task: PixPro) -> dict[str, str]:
    """The authors' name (without ``module.``) → our name."""
    prefixes = {
        "backbone.model": "encoder",
        "projector": "projector",
        "propagation.value_transform": "value_transform",
        "instance_projector": "projector_instance",
        "predictor": "predictor",
        "teacher.backbone.model": "encoder_k",
        "teacher.projector": "projector_k",
        "teacher.instance_projector": "projector_instance_k",
    }
    names = {}
    for own in task.state_dict():
        prefix = next(prefix for prefix in prefixes if own.startswith(f"{prefix}."))
        names[f"{prefixes[prefix]}{own.removeprefix(prefix)}"] = own
    return names


def _pooled(maps: Sequence[Tensor]) -> list[Tensor]:
    """For each view, (B, C, gh, gw) → mean over positions, normalized to length 1, (B, C), in at least float32."""
    return [F.normalize(widened(one).mean((2, 3)), dim=1) for one in maps]
