"""OBoW's views: the full image for the teacher; crops, and patches of one large crop, for the student.

Sizes are those of the paper's recipe for 224 pixels, scaled to the backbone's input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from unlabeled.pretext.common.views import ColorConfig, Colors, Fraction, RandomCrop
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import probed
from unlabeled.ssl.config.schema import Size
from unlabeled.ssl.core.errors import ConfigError, first_line
from unlabeled.ssl.task import TaskConfig

_INPUT, _CROP, _PATCH, _BASE, _SHIFT = 224, 160, 96, 256, 24
"""Sizes in the paper, in pixels: teacher, image crops, patches, the crop that patches are cut from, their shift."""
_GRID = 3
"""Patches along each side of that crop."""


class _StudentViewConfig(TaskConfig):
    size: Size | None = None
    """Side of a view, one number or [height, width]; null: a fixed fraction of the network's input (160/224 for crops,
    96/224 for patches). [pixels]"""
    scale: tuple[Fraction, Fraction]
    """Smallest and largest fraction of the image area that a crop covers. [fraction]"""

    @model_validator(mode="after")
    def _ordered(self) -> _StudentViewConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} begins above its end; give [smallest, largest]")
        return self


class ImageCropsConfig(_StudentViewConfig):
    """Crops of the image. Without a `size`: 160/224 of the network's input, in multiples of its last stride."""

    number: int = Field(2, ge=0)
    """Crops of each image; the vanilla form has 1. [crops]"""
    scale: tuple[Fraction, Fraction] = (0.08, 0.6)
    colors: ColorConfig = ColorConfig(saturation=0.4, blur=0.5)
    """Color augmentation of the crops."""


class PatchesConfig(_StudentViewConfig):
    """Overlapping windows, three by three, of one larger crop whose colors they share. Without a `size`: 96/224 of the
    network's input, in multiples of its last stride."""

    number: int = Field(5, ge=0, le=_GRID**2)
    """Patches of each image, drawn from a grid of 3x3; the vanilla form has 0. [patches]"""
    scale: tuple[Fraction, Fraction] = (0.6, 1.0)
    base: Size | None = None
    """Side of the larger crop that patches are cut from; null: 256/224 of the network's input. [pixels]"""
    shift: int | None = Field(None, ge=0)
    """Largest random shift of a patch along each axis; null: 24/224 of the shorter side of the input. [pixels]"""
    colors: ColorConfig = ColorConfig(saturation=0.4)
    """Color augmentation of the patches."""


class Sizes(NamedTuple):
    """Sizes (height, width) of all views, in pixels."""

    teacher: tuple[int, int]
    crops: tuple[int, int]
    patches: tuple[int, int]
    base: tuple[int, int]
    """Size of the crop that patches are cut from."""
    shift: int
    """Largest shift of a patch."""
    refused: str | None
    """The backbone's error message if it refuses small views, so that the student's are as large as the teacher's."""


def sizes_of(crops: ImageCropsConfig, patches: PatchesConfig, backbone: Backbone) -> Sizes:
    """The sizes of all views for `backbone`; if it takes images of one size only, all views have that size.

    Raises ConfigError for a requested size that the backbone cannot take, and for patches that do not fit.
    """
    teacher = backbone.input_size
    crop, refused_crop = _fitting(crops, _CROP, backbone, "task.image_crops.size")
    patch, refused_patch = _fitting(patches, _PATCH, backbone, "task.patches.size")
    height, width = (max(round(side * _BASE / _INPUT), least) for side, least in zip(teacher, patch, strict=True))
    base = (height, width) if patches.base is None else _pair(patches.base)
    room = min(base[0] - patch[0], base[1] - patch[1])
    shift = min(round(min(teacher) * _SHIFT / _INPUT), max(room, 0)) if patches.shift is None else patches.shift
    if patches.number and room < shift:
        raise ConfigError(
            f"task.patches.base: patches of {patch[0]}x{patch[1]}, shifted by up to {shift}, do not fit into "
            f"{base[0]}x{base[1]} pixels; enlarge it, or lower task.patches.size or task.patches.shift"
        )
    return Sizes(teacher, crop, patch, base, shift, refused_crop or refused_patch)


def _fitting(
    view: ImageCropsConfig | PatchesConfig, pixels: int, backbone: Backbone, field: str
) -> tuple[tuple[int, int], str | None]:
    """The size of one kind of view, and the backbone's error message if it has to be the full input size."""
    full, stride = backbone.input_size, backbone.stages[-1].stride
    if view.size is None:  # in proportion to the paper's, in multiples of the stride
        height, width = (max(round(side * pixels / _INPUT / stride), 1) * stride for side in full)
        size = (min(height, full[0]), min(width, full[1]))
    else:
        size = _pair(view.size)
    reason = _refusal(backbone, size) if view.number and size != full else None
    if reason is None:
        return size, None
    if view.size is None:
        return full, reason
    raise ConfigError(
        f"{field}: {backbone.name} cannot take images of {size[0]}x{size[1]} ({reason}); set it to "
        f"{list(full)}, or backbone.kwargs.dynamic_img_size=true if the model supports it"
    )


def _refusal(backbone: Backbone, size: tuple[int, int]) -> str | None:
    """The backbone's error message for images of `size`; None if it takes them."""

    @torch.no_grad()
    def run(model: Any, x: Tensor) -> None:
        model.forward_head(model.forward_features(x), pre_logits=True)

    try:
        probed(backbone.model, size, run)
    except Exception as error:  # a model's forward may raise anything; its message is passed on
        return first_line(error, 120)
    return None


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class OBoWViews:
    """uint8 image → ``image`` (3, H, W), ``crops`` (n, 3, h, w) and ``patches`` (m, 3, h', w'), all uint8."""

    def __init__(self, crops: ImageCropsConfig, patches: PatchesConfig, sizes: Sizes, center: float) -> None:
        """`center`: fraction of each side of the image that the teacher sees."""
        self.sizes = sizes
        self.center = center
        self.crops, self.patches = crops.number, patches.number
        self._crop = RandomCrop(sizes.crops, scale=crops.scale)
        self._crop_colors = Colors(crops.colors)
        self._base = RandomCrop(sizes.base, scale=patches.scale)
        self._base_colors = Colors(patches.colors)

    def __call__(self, original: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) of any size → the views; kinds with a `number` of 0 are left out."""
        views = {"image": self._teacher_view(original)}
        if self.crops:
            crops = [self._crop_colors(self._crop(original).image) for _ in range(self.crops)]
            views["crops"] = torch.stack(crops)
        if self.patches:
            views["patches"] = self._cut(self._base_colors(self._base(original).image))
        return views

    def _teacher_view(self, original: Tensor) -> Tensor:
        """The center of the image, randomly mirrored, without color augmentation."""
        target = self.sizes.teacher
        # resize so that the center crop covers `center` of the image, as 224 of 256 pixels in the paper
        enlarge = max(to / (self.center * side) for to, side in zip(target, original.shape[-2:], strict=True))
        size = [max(to, round(side * enlarge)) for to, side in zip(target, original.shape[-2:], strict=True)]
        image: Tensor = F.center_crop(F.resize(original, size, antialias=True), list(target))
        return F.horizontal_flip(image) if torch.rand(()) < 0.5 else image

    def _cut(self, base: Tensor) -> Tensor:
        """uint8 (3, H, W) → m of the nine patches of a 3 x 3 grid, each shifted independently, (m, 3, h, w)."""
        height, width = self.sizes.patches
        # steps between patches, which overlap, such that a shifted patch still fits
        down, across = (
            (side - patch - self.sizes.shift) // (_GRID - 1)
            for side, patch in zip(base.shape[-2:], (height, width), strict=True)
        )
        patches = []
        for position in torch.randperm(_GRID**2)[: self.patches].tolist():
            shift = torch.randint(0, self.sizes.shift + 1, (2,)).tolist()
            top, left = position // _GRID * down + shift[0], position % _GRID * across + shift[1]
            patches.append(base[:, top : top + height, left : left + width])
        return torch.stack(patches)
