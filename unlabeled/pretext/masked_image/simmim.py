"""SimMIM: masked cells become a learned token, the whole backbone runs, and one layer predicts the raw pixels.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022, arXiv
2111.09886; code of the authors: github.com/microsoft/SimMIM. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from unlabeled.pretext.common.checkpoint import load_mapped
from unlabeled.pretext.common.views import Fraction
from unlabeled.pretext.masked_image.masked_image import MaskedImageConfig, MaskedImageTask
from unlabeled.pretext.masked_image.simmim_names import reference_names, to_own_layout
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.level_map import LevelMap
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.stem import find_stem, substituted
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import Batch, NamedParameter, Paper, Recipe, StepOutput, TaskConfig

logger = logging.getLogger(__name__)

_UNIT = 32
"""Side of a cell of the mask in the paper, in pixels (section 4.1.1)."""
_SMALLEST = 4
"""Side of the smallest cell that is chosen automatically, in pixels."""
_CELLS = 4
"""Smallest number of cells along each side of the image for an automatically chosen cell."""
_EPS = 1e-5
"""Added to the number of masked pixels in the loss."""
_NOT_DECAYED = frozenset({"mask_token", "cls_token", "pos_embed", "absolute_pos_embed"})


class SimMIMConfig(MaskedImageConfig):
    """Settings of SimMIM; the defaults are the paper's (section 4.1.1)."""

    mask_ratio: float = Field(0.6, gt=0, lt=1)
    """Fraction of the cells that is masked. [fraction]"""
    mask_unit: int | None = Field(None, ge=1)
    """Side of one cell of the mask, a multiple of the network's patch size; null: 32 if that leaves 4 cells along each
    side, else the largest size that does, down to 4. [pixels]"""
    crop_scale: tuple[Fraction, Fraction] = (0.67, 1.0)
    """Smallest and largest fraction of the image area that a crop covers. [fraction]"""


class SimMIM(MaskedImageTask):
    """Predicts the raw pixels of masked cells with one linear layer on top of the whole backbone.

    Submodules: `backbone` and `decoder` (one 1x1 convolution).

    If the backbone turns each patch into one token (see `unlabeled.ssl.backbones.stem`), `mask_token` (1, 1, D)
    replaces the tokens of masked cells, after the patch embedding and its norm and before positions and class token.
    For any other backbone, masked cells of the image are filled with one learned color, `mask_token` (1, 3, 1, 1).
    `mask_entry` says which ("token" or "pixel"), and the log reports it once.

    The backbone keeps timm's initial values, which differ slightly from the authors' (normal matrices with deviation
    0.02, deeper blocks of the ViT scaled down).
    """

    Config: ClassVar[type[TaskConfig]] = SimMIMConfig
    paper = Paper("SimMIM: A Simple Framework for Masked Image Modeling", 2022, "https://arxiv.org/abs/2111.09886")
    good_for = "Swin and nearly any other backbone that you will fine-tune, where MAE does not apply"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "adamw",
            "lr": 2e-4,
            "lr_scaling": "linear",
            "lr_batch": 512,
            "betas": [0.9, 0.999],
            "weight_decay": 0.05,
        },
        "schedule": {
            "name": "cosine",
            "warmup_epochs": 10,
            "start_factor": 0.005,
            "min_factor": 0.05,
            "warmup_in_cosine": True,
            "lag": 1,
        },
        "engine": {"clip": 5.0},
    }
    """SimMIM (Xie et al., CVPR 2022, arXiv 2111.09886): the published recipe of 100 epochs (Swin-B, 192 pixels,
    batch 2048). That of 800 epochs: lr 1.0e-4; schedule {name: multistep, start_factor: 0.005, milestones: [700],
    lag: 1}."""
    requires: ClassVar[frozenset[str]] = frozenset({"dense_map"})
    method: ClassVar[Method] = "simmim"
    interpolation: ClassVar[v2.InterpolationMode] = v2.InterpolationMode.BILINEAR
    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without feature maps, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        self.stem = find_stem(backbone.model, backbone.input_size)
        self.mask_entry: Literal["token", "pixel"] = "pixel" if self.stem is None else "token"
        patch = (1, 1) if self.stem is None else self.stem.patch
        unit = _mask_unit(config.mask_unit, backbone, patch)
        self.cell = (unit, unit)
        self.keep(self.grid_of(backbone.input_size))  # raises for a ratio that masks all cells or none
        channels, self.stride = backbone.stages[-1]
        self.last_map = LevelMap(backbone, -1, task="SimMIM")
        shape = (1, 3, 1, 1) if self.stem is None else (1, 1, self.stem.dim)
        self.mask_token = nn.Parameter(torch.empty(shape))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Conv2d(channels, 3 * self.stride**2, kernel_size=1)
        self.train_only(self.last_map.reached(backbone))  # freezes the head and everything else after the last map
        entry = "as one color in the image" if self.stem is None else f"as one token after {self.stem.name}"
        logger.info("simmim: masked cells of %d pixels enter %s %s", unit, backbone.name, entry)

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean absolute error on the masked pixels of ``batch["image"]``.

        Logs ``explained``: 1 minus the error relative to that of predicting the mean color. A uint8 image (B, 3, H, W)
        is normalized; a float image is expected to be normalized already. `noise` (B, L) or `visible` (bool, B, gh, gw,
        for the cells of the mask) determines the masks; if both are None, they are drawn.
        """
        # choose which cells to mask
        images = self.images_of(batch)  # (B, 3, H, W)
        masking = self.mask(images, noise, visible)  # a cell is one patch or several
        # run the whole backbone, then predict all pixels
        features = self.encode(images, masking)  # (B, C, H', W')
        predicted = self.decode(features, (images.shape[-2], images.shape[-1]))  # (B, 3, H, W)
        # compare on the masked pixels
        masked = self.masked_pixels(masking)  # bool (B, 1, H, W)
        loss = masked_l1(predicted, images, masked)
        blank = masked_l1(torch.zeros_like(predicted), images, masked).detach()  # 0 is the mean color
        return StepOutput(loss, {"explained": 1 - loss.detach() / (blank + 1e-6)})

    def encode(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, 3, H, W) and its mask → last feature map (B, C, H', W'), after the backbone's final norm."""
        if self.stem is None:
            images = torch.where(self.masked_pixels(masking), self.mask_token.to(images.dtype), images)
            return self.last_map(self.backbone, images)
        # a cell of the mask covers several patches: (B, gh, gw) cells -> patches of the stem
        patches = (self.cell[0] // self.stem.patch[0], self.cell[1] // self.stem.patch[1])
        with substituted(self.backbone.model, self.stem, masking.enlarged(patches), self.mask_token):
            return self.last_map(self.backbone, images)

    def decode(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Last feature map (B, C, H', W') → predicted images (B, 3, H, W) of `size` (H, W), normalized."""
        height, width = size
        grid = (math.ceil(height / self.stride), math.ceil(width / self.stride))
        if features.shape[-2:] != grid:  # backbones without padding lose positions at the border
            features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
        # each position predicts the stride x stride pixels under it
        images = F.pixel_shuffle(self.decoder(features), self.stride)
        return images[..., :height, :width]  # crop what extends past the image if the stride does not divide its size

    def masked_pixels(self, masking: Masking) -> Tensor:
        """Bool (B, 1, H, W), True at masked pixels."""
        return ~masking.enlarged(self.cell)[:, None]

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        """See the base class. Predictions of visible cells are returned too, although they are not trained."""
        predicted = self.decode(self.encode(images, masking), (images.shape[-2], images.shape[-1]))
        return predicted.to(torch.promote_types(predicted.dtype, images.dtype))

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """As in the base class, but without weight decay for class and mask tokens and absolute positions."""
        # as the authors' Swin is trained in effect: they also exclude tables of relative positions, but a slip in their
        # code decays these (and the mask token of their ViT)
        for named in super().parameter_groups():
            undecayed = named.name.rpartition(".")[2] in _NOT_DECAYED
            yield named._replace(decay=False) if undecayed else named

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads ``simmim_pretrain__*`` files of the authors' Swin or ViT: encoder, mask token and prediction layer.

        Takes the dictionary of tensors or the file's ``{"model": ...}``. Swin needs timm's SwinTransformer; the ViT
        needs timm's Beit, or a plain VisionTransformer if the file has absolute positions. Position tables of another
        window or grid are resampled, and a shared table is copied into each block that has its own. Returns
        (missing, unexpected) names as in the file.

        Raises CheckpointError if a shape differs or no tensor fits; nothing is changed in that case.
        """
        tensors = cast(Mapping[str, Tensor], state.get("model", state))
        return load_mapped(self, to_own_layout(tensors, self.backbone.model), reference_names(self))


def masked_l1(predicted: Tensor, images: Tensor, masked: Tensor) -> Tensor:
    """Mean of |images - predicted| (B, C, H, W) over channels and the pixels where `masked` (bool, B, 1, H, W) is True.

    Computed in at least float32. Source: section 3.4 of the paper and microsoft/SimMIM, which adds 1e-5 to the count of
    pixels.
    """
    dtype = torch.promote_types(torch.result_type(images, predicted), torch.float32)  # also under autocast
    error = (images.to(dtype) - predicted.to(dtype)).abs()  # (B, C, H, W)
    return (error * masked).sum() / (masked.sum(dtype=error.dtype) + _EPS) / images.shape[1]


def _mask_unit(requested: int | None, backbone: Backbone, patch: tuple[int, int]) -> int:
    """Side of a cell in pixels: `requested`, or chosen as `SimMIMConfig.mask_unit` describes.

    Raises ConfigError if no cell fits, or the requested one does not.
    """
    # a cell is a whole number of patches, and the image a whole number of cells
    size, step = backbone.input_size, math.lcm(*patch)
    fitting = [unit for unit in range(step, min(size) + 1, step) if not size[0] % unit and not size[1] % unit]
    fitting = [unit for unit in fitting if size != (unit, unit)]  # a single cell cannot be masked
    known = f"{backbone.name} of {size[0]}x{size[1]} pixels and patches of {patch[0]}x{patch[1]}"
    if not fitting:
        raise ConfigError(f"backbone.size: no cells of a mask fit {known}; give a larger multiple of {step}")
    if requested is None:
        good = [unit for unit in fitting if _SMALLEST <= unit <= min(_UNIT, min(size) // _CELLS)]
        if not good:
            near = min(fitting, key=lambda unit: abs(unit - min(size) / _CELLS))
            raise ConfigError(
                f"task.mask_unit: none of {_SMALLEST} to {_UNIT} pixels leaves {_CELLS} cells along each side for "
                f"{known}; set task.mask_unit={near} to do without, or change backbone.size"
            )
        return good[-1]
    if requested not in fitting:
        choices = ", ".join(str(unit) for unit in fitting)
        raise ConfigError(f"task.mask_unit: {requested} does not fit {known}; choose one of {choices}")
    return requested
