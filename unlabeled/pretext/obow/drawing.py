"""Images for OBoW's `visualize`: the visual word at each position of an image, next to the student's views."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.pretext.common.drawing import tiled
from unlabeled.pretext.obow.vocabulary import Distances

_TILE = 96
"""Smallest side of a tile, in pixels."""
_GOLDEN = 0.618034
"""Golden ratio: steps of this size around the hue circle give any few words distinct colors."""
_OPACITY = 0.65
"""Opacity of the colors drawn over an image."""


def nearest_words(maps: Tensor, words: Tensor, memory: int) -> Tensor:
    """Maps (B, C, h, w) and words (K, C) → index of the nearest word at each position, (B, h, w)."""
    chunks = Distances(maps.flatten(2).transpose(1, 2), words, memory)
    return torch.cat([distances.argmin(-1) for distances in chunks]).view(len(maps), *maps.shape[-2:])


def word_colors(words: Tensor) -> Tensor:
    """Indices of words (B, h, w) → one color per word, uint8 (B, 3, h, w)."""
    found, inverse = torch.unique(words.cpu(), return_inverse=True)
    hues = [colorsys.hsv_to_rgb(word * _GOLDEN % 1, 0.55 + 0.45 * (word % 2), 1.0) for word in found.tolist()]
    return (torch.tensor(hues) * 255).to(torch.uint8)[inverse].movedim(-1, 1)


def painted(images: Tensor, colors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Draws semi-transparent `colors`, uint8 (B, 3, h, w), over uint8 images (B, 3, H, W).

    `colors` belong to the inner positions of the feature map's `grid`; its border stays transparent.
    """
    height, width = images.shape[-2:]
    border = (grid[0] - colors.shape[-2]) // 2, (grid[1] - colors.shape[-1]) // 2
    padded = F.pad(colors.float(), (border[1], border[1], border[0], border[0]))
    inside = F.pad(torch.ones_like(colors[:, :1], dtype=torch.float32), (border[1], border[1], border[0], border[0]))
    color, opacity = (F.interpolate(x, (height, width), mode="nearest") for x in (padded, _OPACITY * inside))
    return (images * (1 - opacity) + color * opacity).round().to(torch.uint8)


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns (B, n, 3, h, w) of any sizes → one uint8 image (3, H, W) with B rows."""
    height, width = columns[0].shape[-2:]
    enlarge = max(1, -(-_TILE // min(height, width)))  # rounded up
    tile = (height * enlarge, width * enlarge)
    tiles = [F.interpolate(one.flatten(0, 1), tile, mode="nearest").view(*one.shape[:3], *tile) for one in columns]
    rows = torch.cat(tiles, 1)
    return tiled(rows.flatten(0, 1), rows.shape[1])
