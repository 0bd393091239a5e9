"""Convolutions and other spatial layers on masked maps.

A masked convolution sees zeros at masked places and its output exists at visible places only, so its support never
grows; nothing is renormalized by the number of visible inputs (SparK, arXiv 2301.03580; github.com/keyu-tian/SparK).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from unlabeled.ssl.backbones.masked.sparse.gathering import Cells, Factor
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap, NoRuleError

Pair = int | tuple[int, ...] | list[int]


def on_dense(x: MaskedMap, spatial: Callable[[Tensor], Tensor]) -> MaskedMap:
    """Any layer that mixes places: runs on the map with zeros at masked places; its output is kept at visible ones."""
    if x.last:
        raise NoRuleError("a spatial layer on a map with channels last has no masked form")
    dense = spatial(x.dense())
    return MaskedMap.from_dense(dense, x.cells, factor_of(dense, x.cells))


def factor_of(dense: Tensor, cells: Cells) -> Factor:
    """Places in a cell of a map (B, C, H, W). Raises NoRuleError when cells do not divide the map."""
    height, width = dense.shape[-2:]
    tokens, columns = cells.grid
    if height % tokens or width % columns:
        raise NoRuleError(f"its map of {height}x{width} does not divide into {tokens}x{columns} cells")
    return height // tokens, width // columns


def convolve(
    x: MaskedMap,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> MaskedMap:
    """torch's ``conv2d`` on a masked map.

    A kernel that stays inside a cell (1x1, or as large as its stride) is a matrix product on the rows of its inputs;
    any other runs on the dense map.
    """
    kernel, step = (weight.shape[2], weight.shape[3]), _pair(stride)
    inside = groups == 1 and padding in (0, (0, 0), [0, 0], "valid") and not x.last and x.border is None
    divides = not (x.factor[0] % step[0] or x.factor[1] % step[1])
    factor = (x.factor[0] // step[0], x.factor[1] // step[1])
    if inside and divides and kernel in ((1, 1), step) and x.cells.gathers(factor):
        tokens = F.linear(_inputs(x, kernel, step), weight.permute(0, 2, 3, 1).flatten(1), bias)
        return MaskedMap.from_tokens(tokens, x.cells, factor)
    return on_dense(x, lambda dense: F.conv2d(dense, weight, bias, step, _padding(padding), _pair(dilation), groups))


def _inputs(x: MaskedMap, kernel: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """Rows (B, R / (sh * sw), kh * kw * C) of what each output place of a kernel inside the cell reads."""
    tokens = x.tokens()
    if step == (1, 1):
        return tokens
    (fh, fw), (sh, sw) = x.factor, step
    blocks = tokens.view(tokens.shape[0], -1, fh // sh, sh, fw // sw, sw, tokens.shape[-1])
    read = blocks[:, :, :, : kernel[0], :, : kernel[1]].transpose(3, 4)
    return read.reshape(tokens.shape[0], -1, kernel[0] * kernel[1] * tokens.shape[-1])


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _padding(padding: Pair | str) -> tuple[int, int] | str:
    return padding if isinstance(padding, str) else _pair(padding)
