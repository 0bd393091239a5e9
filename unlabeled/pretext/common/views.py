"""Views of one image: random crops that know where they were taken, and the colors of contrastive methods.

A view's *box* is (x1, y1, x2, y2), float32: where its left, upper, right and lower edge lie in the unit square of the
original image. A mirrored view has x1 > x2. That is the one description of geometry that all tasks share.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from unlabeled.ssl.task import TaskConfig

Part = Annotated[float, Field(gt=0, le=1)]
Chance = Annotated[float, Field(ge=0, le=1)]


class View(NamedTuple):
    """A crop, uint8 (3, h, w), and its box (4,) in the unit square of the original."""

    image: Tensor
    box: Tensor


class RandomCrop:
    """Random part of an image, resized to a fixed size, mirrored at times.

    Area U(scale), aspect log-uniform in `ratio`; after ten draws that do not fit, the largest centered crop (the rule
    of torchvision's RandomResizedCrop).
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale: tuple[float, float],
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
    ) -> None:
        self.size = size
        self.flip = flip
        self.interpolation = interpolation
        self._crop = v2.RandomResizedCrop(size, scale=scale, ratio=ratio)

    def __call__(self, original: Tensor) -> View:
        """uint8 (3, H, W) of any size → a view of `size`."""
        part = self._crop.make_params([original])
        top, left, height, width = (int(part[name]) for name in ("top", "left", "height", "width"))
        image = F.resized_crop(original, top, left, height, width, list(self.size), self.interpolation, antialias=True)
        box = crop_box(top, left, height, width, original.shape[-2:])
        if torch.rand(()) < self.flip:
            image, box = F.horizontal_flip(image), box[[2, 1, 0, 3]]
        return View(image, box)


def crop_box(top: int, left: int, height: int, width: int, size: tuple[int, ...]) -> Tensor:
    """Box (4,) of a crop in pixels of an image of `size` (H, W), each axis in units of its own extent.

    Edges lie at the centers of the outermost pixels, as in PixPro's code: (left / (W - 1), ...).
    """
    rows, columns = (max(length - 1, 1) for length in size)
    return torch.tensor([left / columns, top / rows, (left + width - 1) / columns, (top + height - 1) / rows])


def cell_centers(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) → centers (..., gh * gw, 2) of the cells of a grid over each view, as (x, y), in raster order."""
    rows, columns = grid
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)  # (..., 1) each
    across = (torch.arange(columns, device=boxes.device, dtype=boxes.dtype) + 0.5) / columns
    down = (torch.arange(rows, device=boxes.device, dtype=boxes.dtype) + 0.5) / rows
    x = (x1 + across * (x2 - x1)).unsqueeze(-2).expand(*boxes.shape[:-1], rows, columns)
    y = (y1 + down * (y2 - y1)).unsqueeze(-1).expand(*boxes.shape[:-1], rows, columns)
    return torch.stack([x, y], -1).flatten(-3, -2)


class ColorConfig(TaskConfig):
    """Color augmentation of one view; the defaults are BYOL's (arXiv 2006.07733, appendix B), without blur."""

    brightness: float = Field(0.4, ge=0)
    """Largest relative change of brightness. [fraction]"""
    contrast: float = Field(0.4, ge=0)
    """Largest relative change of contrast. [fraction]"""
    saturation: float = Field(0.2, ge=0)
    """Largest relative change of saturation. [fraction]"""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest shift of hue; 0.5 reaches the opposite color. [turns]"""
    jitter: Chance = 0.8
    """Probability that brightness, contrast, saturation and hue change."""
    gray: Chance = 0.2
    """Probability that the image loses its color."""
    blur: Chance = 0.0
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur. [pixels]"""
    solarize: Chance = 0.0
    """Probability that all values of 128 and above are inverted."""


class Colors:
    """Changes colors and sharpness, never places. Order: jitter, gray, blur, solarize."""

    def __init__(self, config: ColorConfig) -> None:
        jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        kernel = 2 * math.ceil(3 * config.sigma[1]) + 1
        self.transform = v2.Compose(
            [
                v2.RandomApply([jitter], config.jitter),
                v2.RandomGrayscale(config.gray),
                v2.RandomApply([v2.GaussianBlur(kernel, config.sigma)], config.blur),
                v2.RandomSolarize(128, config.solarize),
            ]
        )

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) → the same shape and type."""
        changed: Tensor = self.transform(image)
        return changed
