"""Images that show which cells of two views form positive pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretext.common.drawing import enlarged, tiled

_TINT = 0.5
"""Opacity of a cell's color over the image."""
_DARK = 0.3
"""Relative brightness of cells without a partner."""


def matched_cells(views: Tensor, distances: Tensor, grid: tuple[int, int], threshold: float) -> Tensor:
    """uint8 views (B, 2, 3, h, w) and distances of their cells (B, L, L) → uint8 (3, H, W), one row per image.

    The color of a cell in the first view depends on its position: redder to the right, greener to the bottom. A cell of
    the second view has the color of the nearest cell of the first, if that is closer than `threshold`. Cells without a
    partner are darkened.
    """
    near = distances < threshold
    colors = _palette(grid, distances.device)  # (L, 3)
    partners = distances.argmin(1)  # (B, L): of each cell of the second view
    tints = torch.stack([colors.expand(len(views), -1, -1), colors[partners]], dim=1)  # (B, 2, L, 3)
    matched = torch.stack([near.any(2), near.any(1)], dim=1)  # (B, 2, L)
    tiles = enlarged(views.flatten(0, 1)).float() / 255
    size = (tiles.shape[-2], tiles.shape[-1])
    tint = _over_pixels(tints.flatten(0, 1).transpose(1, 2), grid, size)
    shown = _over_pixels(matched.flatten(0, 1).unsqueeze(1).float(), grid, size)
    tiles = torch.where(shown > 0, tiles * (1 - _TINT) + tint * _TINT, tiles * _DARK)
    return tiled((tiles * 255).round().to(torch.uint8), 2)


def _palette(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Colors (L, 3), different for every cell of the grid."""
    down, across = (torch.linspace(0, 1, length, device=device) for length in grid)
    red, green = across.expand(grid), down.unsqueeze(1).expand(grid)
    return torch.stack([red, green, 1 - red], dim=-1).flatten(0, 1)


def _over_pixels(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Values of cells (N, C, L) → (N, C, *size), constant within each cell."""
    return F.interpolate(values.reshape(*values.shape[:2], *grid), size=size, mode="nearest-exact")
