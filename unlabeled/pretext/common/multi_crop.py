"""Multi-crop views: two large crops of an image and several small ones (SwAV, arXiv 2006.09882, section 3.4).

Sizes and colors are those of DINO (Caron et al., arXiv 2104.14294; code of the authors:
github.com/facebookresearch/dino). Loaders return crops image by image: (B, crops, 3, h, w).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from unlabeled.pretext.common.drawing import enlarged, tiled
from unlabeled.pretext.common.views import ColorConfig, Colors, Fraction, RandomCrop
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import probe_shapes
from unlabeled.ssl.config.schema import Size
from unlabeled.ssl.core.errors import ConfigError, first_line
from unlabeled.ssl.task import TaskConfig

GLOBALS = 2
"""Number of large crops of each image."""
_LOCAL_FRACTION = 96 / 224
"""Side of a small crop relative to that of a large one, as published."""
_SHOWN = 4
"""Number of images that a sheet shows."""
_ANY_SIZE = "dynamic_img_size"
"""Argument of timm's transformers that lets them take images of any size."""


class MultiCropConfig(TaskConfig):
    """Settings of large and small crops; the defaults are those of DINO's released code."""

    locals: int = Field(8, ge=0)
    """Small crops of each image, in addition to the two large ones. [crops]"""
    local_size: Size | None = None
    """Side of the small crops, one number or [height, width]; null: 96/224 of backbone.size, rounded to the backbone's
    stride. The large crops have backbone.size. [pixels]"""
    global_scale: tuple[Fraction, Fraction] = (0.4, 1.0)
    """Smallest and largest fraction of the image area that a large crop covers. [fraction]"""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.4)
    """Smallest and largest fraction of the image area that a small crop covers. [fraction]"""
    first_colors: ColorConfig = ColorConfig(blur=1.0)
    """Color augmentation of the first large crop."""
    second_colors: ColorConfig = ColorConfig(blur=0.1, solarize=0.2)
    """Color augmentation of the second large crop."""
    local_colors: ColorConfig = ColorConfig(blur=0.5)
    """Color augmentation of the small crops."""

    @model_validator(mode="after")
    def _ordered(self) -> MultiCropConfig:
        for name, (least, most) in (("global_scale", self.global_scale), ("local_scale", self.local_scale)):
            if least > most:
                raise ValueError(f"{name} {[least, most]} begins above its end; give [smallest, largest]")
        return self


class MultiCropViews:
    """uint8 image (3, H, W) of any size → ``globals`` uint8 (2, 3, h, w) and, if n > 0, ``locals`` (n, 3, h', w')."""

    def __init__(self, config: MultiCropConfig, size: tuple[int, int], local: tuple[int, int]) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        self.locals = config.locals
        self.large = RandomCrop(size, scale=config.global_scale, interpolation=bicubic)
        self.small = RandomCrop(local, scale=config.local_scale, interpolation=bicubic)
        self.large_colors = [Colors(config.first_colors), Colors(config.second_colors)]
        self.small_colors = Colors(config.local_colors)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        views = {"globals": torch.stack([colors(self.large(image).image) for colors in self.large_colors])}
        if self.locals:
            small = [self.small_colors(self.small(image).image) for _ in range(self.locals)]
            views["locals"] = torch.stack(small)
        return views


def local_size(config: MultiCropConfig, backbone: Backbone) -> tuple[int, int]:
    """Size (height, width) of the small crops, in pixels."""
    requested = config.local_size
    if requested is not None:
        return (requested, requested) if isinstance(requested, int) else requested
    # whole multiples of the stride, which most backbones need; backbones without feature maps report none
    step = backbone.stages[-1].stride if backbone.stages else 1
    height, width = (max(1, round(_LOCAL_FRACTION * pixels / step)) * step for pixels in backbone.input_size)
    return height, width


def require_crops(config: MultiCropConfig, backbone: Backbone) -> None:
    """Raises ConfigError if `backbone` cannot take the small crops, or if crops are too small for their blur."""
    large, small = backbone.input_size, local_size(config, backbone)
    _require_blur("backbone.size", large, [config.first_colors, config.second_colors])
    if not config.locals:
        return
    _require_blur("task.local_size", small, [config.local_colors])
    if small == large:
        return
    # no model says which sizes it takes, so run one small crop through it
    try:
        shape = probe_shapes(backbone.model, small).pooled
        wrong_width = f"it gives {shape[0]} features and not {backbone.embed_dim}"
        reason = None if shape[0] == backbone.embed_dim else wrong_width
    except Exception as error:  # a model's forward may raise anything for a size that it cannot take
        reason = first_line(error)
    if reason is not None:
        known = _ANY_SIZE in inspect.signature(type(backbone.model).__init__).parameters
        remedies = [f"backbone.kwargs.{_ANY_SIZE}=true"] * known + [f"task.local_size={list(large)}", "task.locals=0"]
        raise ConfigError(
            f"task.local_size: {backbone.name} of {large[0]}x{large[1]} pixels cannot take small crops of "
            f"{small[0]}x{small[1]} ({reason.rstrip('.')}); set {' or '.join(remedies)}"
        )


def _require_blur(field: str, size: tuple[int, int], colors: list[ColorConfig]) -> None:
    """Raises ConfigError if crops of `size` are too small for the blur of `colors`."""
    # the blur's kernel extends 3 standard deviations; torchvision pads by reflection, which needs more pixels than that
    reach = max((math.ceil(3 * one.sigma[1]) for one in colors if one.blur > 0), default=0)
    if min(size) <= reach:
        raise ConfigError(
            f"{field}: crops of {size[0]}x{size[1]} are too small for a blur that reaches {reach} pixels; "
            "give larger ones, or a smaller sigma or blur=0 in the colors of the task"
        )


def crop_sheet(kinds: Iterable[Tensor]) -> Tensor:
    """Several kinds of crops, uint8 (B, V, 3, h, w) each → one uint8 image (3, H, W).

    Each of the first 4 images has a row with all its crops, drawn at the same scale.
    """
    rows = list(zip(*(kind[:_SHOWN].cpu() for kind in kinds), strict=True))
    crops = [crop for row in rows for kind in row for crop in kind]
    height, width = (max(crop.shape[axis] for crop in crops) for axis in (1, 2))

    # tiles of a grid have one size: pad smaller crops with white, do not enlarge them
    def centered(crop: Tensor) -> Tensor:
        above, left = (height - crop.shape[1]) // 2, (width - crop.shape[2]) // 2
        return F.pad(crop, (left, width - crop.shape[2] - left, above, height - crop.shape[1] - above), value=255)

    return tiled(enlarged(torch.stack([centered(crop) for crop in crops])), columns=len(crops) // len(rows))
