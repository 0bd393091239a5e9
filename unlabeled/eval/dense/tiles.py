"""Composes images for the report: tiles in rows, class masks and heat maps as colors.

Shapes: (h, w) pixels of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from torchvision.utils import make_grid

_GAP = 2
"""Pixels between tiles."""
_SMALLEST = 96
"""Tiles whose shorter side is smaller are enlarged, since details would not be visible. [pixels]"""


def tiled(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Arranges rows of images uint8 (3, h, w) of one size on white: uint8 (3, H, W). Small images are enlarged."""
    tiles = torch.stack([tile.cpu() for row in rows for tile in row])
    factor = max(1, -(-_SMALLEST // min(tiles.shape[2:])))
    # whole repetitions keep pixels and mask borders sharp
    tiles = tiles.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid: Tensor = make_grid(tiles, nrow=len(rows[0]), padding=_GAP, pad_value=255)
    return grid


def class_colors(mask: Tensor, image: Tensor, ignore: int = 255) -> Tensor:
    """Class mask (h, w) as colors over the grayscale image uint8 (3, h, w); background is dark, `ignore` white."""
    table = _palette()
    # 255 is reserved for `ignore`, so classes wrap around before it
    colors = table[torch.where(mask == ignore, 255, mask.long() % 255)].permute(2, 0, 1).float()
    gray = image.float().mean(dim=0, keepdim=True)
    return (0.7 * colors + 0.3 * gray).round().to(torch.uint8)


@functools.cache
def _palette() -> Tensor:
    """uint8 (256, 3): 0 black, 255 white, and twenty repeating colors in between."""
    cycle = np.rint(np.array([colormaps["tab20"](number)[:3] for number in range(20)]) * 255)
    rows = cycle[np.arange(-1, 255) % 20].astype(np.uint8)
    rows[0], rows[255] = 0, 255
    return torch.from_numpy(rows)


def heat(values: Tensor, image: Tensor) -> Tensor:
    """Heat map of values (gh, gw), clamped to 0..1, over the grayscale image uint8 (3, h, w)."""
    table = torch.from_numpy(np.rint(colormaps["inferno"](np.arange(256))[:, :3] * 255))
    colors = table[(values.cpu().float().clamp(0, 1) * 255).round().long()].permute(2, 0, 1)
    gray = image.cpu().float().mean(dim=0, keepdim=True)
    return (0.7 * enlarged(colors.float(), tuple(image.shape[1:])) + 0.3 * gray).clamp(0, 255).round().to(torch.uint8)


def enlarged(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """(3, gh, gw) → (3, h, w), each position a block of one color."""
    found: Tensor = tv.resize(image, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return found


def stretched(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`values` scaled linearly to 0..1 by their minimum and maximum over `dims`; 0 if these are equal."""
    low, high = values.amin(dim=dims, keepdim=True), values.amax(dim=dims, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-12), 0.0)
