"""Views of one image: random crops with their position, and the color augmentation of contrastive methods.

The *box* of a view is (x1, y1, x2, y2), float32: the positions of its left, upper, right and lower edge in the unit
square of the original image. A mirrored view has x1 > x2. All tasks describe the geometry of a view this way.
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

Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class View(NamedTuple):
    """A crop, uint8 (3, h, w), and its box (4,) in the unit square of the original image."""

    image: Tensor
    box: Tensor


class RandomCrop:
    """A random crop, resized to `size` and mirrored with probability `flip`.

    The area is uniform in `scale` and the aspect ratio log-uniform in `ratio`. If ten draws do not fit into the image,
    the largest centered crop is taken (the rule of torchvision's RandomResizedCrop).
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
        # the transform itself does not report the crop that it took: draw its parameters, then crop here
        drawn = self._crop.make_params([original])
        top, left, height, width = (int(drawn[name]) for name in ("top", "left", "height", "width"))
        image = F.resized_crop(original, top, left, height, width, list(self.size), self.interpolation, antialias=True)
        box = crop_box(top, left, height, width, original.shape[-2:])
        if torch.rand(()) < self.flip:
            image, box = F.horizontal_flip(image), box[[2, 1, 0, 3]]  # swap x1 and x2
        return View(image, box)


def crop_box(top: int, left: int, height: int, width: int, size: tuple[int, ...]) -> Tensor:
    """Box (4,) of a crop, given in pixels, of an image of `size` (H, W); each axis is scaled to [0, 1]."""
    # edges are the centers of the outermost pixels, as in PixPro's code, hence W - 1 and H - 1
    rows, columns = (max(length - 1, 1) for length in size)
    return torch.tensor([left / columns, top / rows, (left + width - 1) / columns, (top + height - 1) / rows])


def cell_centers(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) → centers (x, y) of the cells of `grid` over each view, (..., gh * gw, 2), in raster order."""
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
    jitter: Probability = 0.8
    """Probability that brightness, contrast, saturation and hue change."""
    gray: Probability = 0.2
    """Probability that the image loses its color."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur. [pixels]"""
    solarize: Probability = 0.0
    """Probability that all values of 128 and above are inverted."""


class Colors:
    """Random color augmentation of one image. Order: jitter, gray, blur, solarize; positions never change."""

    def __init__(self, config: ColorConfig) -> None:
        jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        kernel = 2 * math.ceil(3 * config.sigma[1]) + 1  # odd, and 3 standard deviations to either side
        self.transform = v2.Compose(
            [
                v2.RandomApply([jitter], config.jitter),
                v2.RandomGrayscale(config.gray),
                v2.RandomApply([v2.GaussianBlur(kernel, config.sigma)], config.blur),
                v2.RandomSolarize(128, config.solarize),
            ]
        )

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) → uint8 (3, H, W)."""
        augmented: Tensor = self.transform(image)
        return augmented
