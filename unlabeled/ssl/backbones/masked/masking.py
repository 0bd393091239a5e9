"""Masks over a grid of cells: how many stay visible, which, and in what pattern.

A mask says *visible* (True) everywhere in this package; files and papers that say otherwise are converted at the edge.
Every image of a batch keeps the same number K of cells, so that shapes are static.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unlabeled.ssl.core.errors import ConfigError

Method = Literal["mae", "convmae", "fcmae", "simmim", "spark"]
"""Methods that count their visible cells in different ways; see `count_keep`."""
Rounding = Literal["exact", "official"]
Pattern = Literal["random", "block", "grid"]

_SLACK = 1e-9
"""What a product of a count and a decimal ratio may be off by in double precision."""
_RECTANGLES = 32
"""Rectangles drawn for a block-wise mask; those past the ratio only decide the order of what is left."""


class Masking(NamedTuple):
    """Which of L = gh * gw cells each image keeps."""

    ids_keep: Tensor
    """Raster indices of the kept cells, int64 (B, K), in ascending order of noise."""
    ids_masked: Tensor
    """Raster indices of the others, int64 (B, L - K), in ascending order of noise."""
    ids_restore: Tensor
    """Rank of each raster position, int64 (B, L): gathering ``cat(kept, masked)`` with it gives raster order."""
    visible: Tensor
    """Bool (B, gh, gw)."""

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw)."""
        return self.visible.shape[1], self.visible.shape[2]

    def restore(self, tokens: Tensor) -> Tensor:
        """(B, L, D) with the kept tokens first and the masked ones after them → raster order."""
        return tokens.gather(1, self.ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))

    def enlarged(self, cell: tuple[int, int]) -> Tensor:
        """`visible` with each cell repeated to `cell` = (rows, columns) places: bool (B, gh * rows, gw * columns)."""
        return self.visible.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)


def count_keep(cells: int, ratio: float, method: Method = "mae", rounding: Rounding = "exact") -> int:
    """Cells that stay visible when the part `ratio` of them is masked, as `method` counts them.

    mae, convmae, fcmae: the integer part of L (1 - r). simmim: all but the next integer from L r. spark: L (1 - r)
    rounded, halves to even. ``exact`` rounds the decimal product; ``official`` rounds the product in double precision
    as the authors' code does (MAE: 19 of 100 at 0.8, since that product is slightly under 20).
    """
    slack = _SLACK if rounding == "exact" else 0.0
    if method == "simmim":
        return cells - math.ceil(cells * ratio - slack)
    if method == "spark":
        product = cells * (1 - ratio)
        return round(round(product, 9) if rounding == "exact" else product)
    return int(cells * (1 - ratio) + slack)


def random_masking(noise: Tensor, keep: int, grid: tuple[int, int]) -> Masking:
    """Keeps the `keep` cells with the smallest `noise` (B, L) of each image, each image by itself.

    Source: MAE (arXiv 2111.06377), appendix A.1: random sampling without replacement, by a shuffle.
    """
    ids_shuffle = noise.argsort(dim=1)
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, ranks)  # the inverse, without a second sort
    visible = (ids_restore < keep).view(-1, *grid)
    return Masking(ids_shuffle[:, :keep], ids_shuffle[:, keep:], ids_restore, visible)


def masking_of(visible: Tensor) -> Masking:
    """The masking of a given map, bool (B, gh, gw); kept and masked cells stand in raster order.

    Raises ConfigError when images keep different numbers of cells, or all or none.
    """
    counts = visible.flatten(1).sum(1)
    keep, cells = int(counts[0]), visible[0].numel()
    if not bool((counts == keep).all()) or not 0 < keep <= cells:
        raise ConfigError(
            f"visible: images keep {sorted(set(counts.tolist()))} of {cells} cells; give each the same number above 0"
        )
    positions = torch.arange(cells, device=visible.device)
    # noise that puts visible cells first, and leaves both kinds in raster order
    return random_masking(positions + cells * ~visible.flatten(1), keep, (visible.shape[1], visible.shape[2]))


def mask_noise(pattern: Pattern, batch: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Noise (B, L) whose smallest values make a mask of `pattern` under `random_masking`, for any number of kept cells.

    random: uniform. grid: one phase of each 2x2 group after another, so that a quarter is a regular grid (MAE,
    arXiv 2111.06377, figure 6). block: cells are masked rectangle by rectangle, of aspect 0.3 to 3.3 (BEiT, arXiv
    2106.08254, algorithm 1). Drawn from torch's global generator of `device`.
    """
    if pattern == "random":
        return torch.rand(batch, grid[0] * grid[1], device=device)
    return _grid_noise(batch, grid, device) if pattern == "grid" else _block_noise(batch, grid, device)


def _grid_noise(batch: int, grid: tuple[int, int], device: torch.device | None) -> Tensor:
    rows, columns = _coordinates(grid, device)
    first = torch.rand(batch, 4, device=device).argsort(dim=1)  # (B, 4): the place of each phase in the order
    phase = first[:, (rows % 2) * 2 + columns % 2].flatten(1)  # (B, L)
    return (phase + torch.rand(phase.shape, device=device)) / 4


def _block_noise(batch: int, grid: tuple[int, int], device: torch.device | None) -> Tensor:
    rows, columns = _coordinates(grid, device)
    area, shape, top, left = torch.rand(4, batch, _RECTANGLES, 1, 1, device=device)
    area = grid[0] * grid[1] * (0.08 + 0.22 * area)
    aspect = (math.log(0.3) * (1 - 2 * shape)).exp()
    height = (area * aspect).sqrt().round().clamp(1, grid[0])
    width = (area / aspect).sqrt().round().clamp(1, grid[1])
    top = (top * (grid[0] - height + 1)).floor()
    left = (left * (grid[1] - width + 1)).floor()
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    order = torch.arange(_RECTANGLES, 0, -1, device=device).view(1, -1, 1, 1)  # an earlier rectangle weighs more
    weight: Tensor = (inside * order).amax(1).flatten(1)  # (B, L), 0 outside of all
    return (weight + torch.rand(weight.shape, device=device)) / (_RECTANGLES + 1)


def _coordinates(grid: tuple[int, int], device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Row (gh, 1) and column (1, gw) of each cell."""
    return torch.arange(grid[0], device=device)[:, None], torch.arange(grid[1], device=device)[None]
