"""Places of visible cells, and moving their features between a dense map and rows.

A mask is drawn over a coarse grid of cells; a feature map has ``factor`` = (fh, fw) places in each cell. Its *rows* are
the visible places only, (B, R, C) with R = K * fh * fw: cell by cell in the order of ``ids_keep``, raster order inside
a cell. So a layer that acts inside a cell finds its inputs side by side, and a convolution with stride = kernel is a
matrix product on reshaped rows.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from unlabeled.ssl.backbones.masked.masking import Masking

Factor = tuple[int, int]


class Cells:
    """Index tensors of one masking, built once a step for each resolution. Travels with the features, never apart."""

    def __init__(self, masking: Masking, dense: Container[Factor] | None = frozenset()) -> None:
        """`dense`: resolutions at which maps are stored whole, with zeros at masked places; None: all."""
        self.masking = masking
        self._dense = dense
        self.batch, self.keep = masking.ids_keep.shape
        self.grid = masking.grid
        self._index: dict[Factor, Tensor] = {}
        self._active: dict[Factor, Tensor] = {}

    @property
    def full(self) -> bool:
        """Whether every cell is visible."""
        return self.keep == self.grid[0] * self.grid[1]

    def gathers(self, factor: Factor) -> bool:
        """Whether maps with `factor` places a cell are stored as rows of their visible places."""
        return self._dense is not None and factor not in self._dense

    def size(self, factor: Factor) -> tuple[int, int]:
        """(H, W) of a map with `factor` places a cell."""
        return self.grid[0] * factor[0], self.grid[1] * factor[1]

    def index(self, factor: Factor) -> Tensor:
        """Where each row stands in the flattened (B * H * W) places of a map, int64 (B * R)."""
        if factor not in self._index:
            ids, (fh, fw), (height, width) = self.masking.ids_keep, factor, self.size(factor)
            device = ids.device
            top = (ids // self.grid[1] * fh)[..., None] + torch.arange(fh, device=device)  # (B, K, fh)
            left = (ids % self.grid[1] * fw)[..., None] + torch.arange(fw, device=device)  # (B, K, fw)
            image = torch.arange(self.batch, device=device).view(-1, 1, 1, 1) * (height * width)
            self._index[factor] = (image + top[..., None] * width + left[:, :, None]).flatten()
        return self._index[factor]

    def active(self, factor: Factor) -> Tensor:
        """Bool (B, 1, H, W): True at visible places."""
        if factor not in self._active:
            self._active[factor] = self.masking.enlarged(factor)[:, None]
        return self._active[factor]


def gather_tokens(dense: Tensor, cells: Cells, factor: Factor) -> Tensor:
    """Features of the visible places, (B, C, H, W) → (B, R, C). Cheap for maps in channels_last memory."""
    positions = dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1])
    tokens: Tensor = _Take.apply(positions, cells.index(factor))
    return tokens.view(cells.batch, -1, dense.shape[1])


def scatter_tokens(tokens: Tensor, cells: Cells, factor: Factor) -> Tensor:
    """(B, R, C) → (B, C, H, W) in channels_last memory, exactly zero at masked places."""
    height, width = cells.size(factor)
    positions: Tensor = _Put.apply(
        tokens.reshape(-1, tokens.shape[-1]), cells.index(factor), cells.batch * height * width
    )
    return positions.view(cells.batch, height, width, -1).permute(0, 3, 1, 2)


class _Take(Function):
    """Rows of (N, C) at `index`. No row is taken twice, so the gradient is a copy into zeros and needs no adding up."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.count = index, positions.shape[0]
        return positions.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient.new_zeros(ctx.count, gradient.shape[1]).index_copy_(0, ctx.index, gradient), None


class _Put(Function):
    """Rows put at `index` of `count` rows of zeros; the inverse of `_Take`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.index = index
        return tokens.new_zeros(count, tokens.shape[1]).index_copy_(0, index, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.index), None, None
