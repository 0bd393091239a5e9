"""Helpers for the images that a task's `visualize` returns: enlarge tiles, frame them, lay them out in rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import make_grid

from unlabeled.ssl.backbones.backbone import Backbone

Color = tuple[int, int, int]

RIGHT: Color = (40, 170, 70)
"""Green, for correct predictions."""
WRONG: Color = (210, 50, 50)
"""Red, for wrong predictions."""
_SHOWN_PIXELS = 96
"""Tiles smaller than this are enlarged to about this size."""


def enlargement(size: Sequence[int]) -> int:
    """Integer factor that brings the shorter side of a tile of `size` (h, w) to about 96 pixels; at least 1."""
    return max(1, _SHOWN_PIXELS // min(size))


def enlarged(tiles: Tensor, factor: int | None = None) -> Tensor:
    """(..., h, w) → (..., h * factor, w * factor) by repeating pixels; None: the factor from `enlargement`."""
    factor = enlargement(tiles.shape[-2:]) if factor is None else factor
    return tiles.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def framed(tile: Tensor, width: int, color: Color) -> Tensor:
    """uint8 (3, h, w) → uint8 (3, h + 2 * width, w + 2 * width), with a frame of `color` around the tile."""
    height, length = (side + 2 * width for side in tile.shape[1:])
    frame = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, length)
    frame[:, width:-width, width:-width] = tile
    return frame


def tiled(tiles: Tensor | Sequence[Tensor], columns: int, *, gap: int = 2, background: int = 255) -> Tensor:
    """Tiles (N, 3, h, w), row by row → one image (3, H, W), with `gap` pixels of the gray `background` around each."""
    stacked = tiles if isinstance(tiles, Tensor) else torch.stack(list(tiles))
    # `nrow` of torchvision is the number of tiles in a row, hence of columns
    sheet: Tensor = make_grid(stacked, nrow=columns, padding=gap, pad_value=background)
    return sheet


def displayed(images: Tensor, backbone: Backbone) -> Tensor:
    """Normalized (B, C, H, W) → uint8 (B, C, H, W): the inverse of ``backbone.normalize``, clipped to 0..255."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
