"""Images of OBoW for people: which places of an image got which words, beside what the student saw."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.pretext.common.drawing import tiled
from unlabeled.pretext.obow.vocabulary import Distances

_TILE = 96
"""Smallest side of a tile in pixels."""
_GOLDEN = 0.618034
"""Steps of this around the circle of hues keep any few words apart."""
_OPACITY = 0.65


def nearest_words(maps: Tensor, words: Tensor, memory: int) -> Tensor:
    """Maps (B, C, h, w) and words (K, C) → number of the nearest word, (B, h, w)."""
    parts = Distances(maps.flatten(2).transpose(1, 2), words, memory)
    return torch.cat([part.argmin(-1) for part in parts]).view(len(maps), *maps.shape[-2:])


def word_colors(words: Tensor) -> Tensor:
    """Numbers (B, h, w) → one color a word, uint8 (B, 3, h, w)."""
    found, inverse = torch.unique(words.cpu(), return_inverse=True)
    hues = [colorsys.hsv_to_rgb(word * _GOLDEN % 1, 0.55 + 0.45 * (word % 2), 1.0) for word in found.tolist()]
    return (torch.tensor(hues) * 255).to(torch.uint8)[inverse].movedim(-1, 1)


def painted(images: Tensor, colors: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 images (B, 3, H, W) under half-transparent cells, uint8 (B, 3, h, w): the inner ones of `grid`."""
    height, width = images.shape[-2:]
    border = (grid[0] - colors.shape[-2]) // 2, (grid[1] - colors.shape[-1]) // 2
    whole = F.pad(colors.float(), (border[1], border[1], border[0], border[0]))
    shown = F.pad(torch.ones_like(colors[:, :1], dtype=torch.float32), (border[1], border[1], border[0], border[0]))
    color, opacity = (F.interpolate(x, (height, width), mode="nearest") for x in (whole, _OPACITY * shown))
    return (images * (1 - opacity) + color * opacity).round().to(torch.uint8)


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns (B, n, 3, h, w) of any sizes → one uint8 image (3, H, W), a row for each of the B."""
    height, width = columns[0].shape[-2:]
    enlarge = max(1, -(-_TILE // min(height, width)))
    tile = (height * enlarge, width * enlarge)
    tiles = [F.interpolate(one.flatten(0, 1), tile, mode="nearest").view(*one.shape[:3], *tile) for one in columns]
    rows = torch.cat(tiles, 1)
    return tiled(rows.flatten(0, 1), rows.shape[1])
