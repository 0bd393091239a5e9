"""Reading checkpoints in the layout of a method's authors into our modules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.ssl.core.errors import CheckpointError

_SAME_TABLE = 1e-4
"""Largest difference between a stored fixed table and the one computed here."""


def load_mapped(
    module: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Copies `tensors` (their layout's names) into `module`; `names` maps that layout's names to the module's own.

    Returns (missing, unexpected), both in the layout's names. Raises CheckpointError, before anything is copied, when
    a tensor has another shape or not one of them belongs to the module.
    """
    own = module.state_dict()
    common = [name for name in names if name in tensors]
    if not common:
        raise CheckpointError(
            f"checkpoint: it holds none of {', '.join(list(names)[:3])}, ...; is it of another method?"
        )
    for name in common:
        theirs, ours = tuple(tensors[name].shape), tuple(own[names[name]].shape)
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint: {name} is {theirs} in the file and {ours} here; "
                "take the backbone and decoder that it was trained with"
            )
    with torch.no_grad():
        for name in common:
            own[names[name]].copy_(tensors[name])
    return [name for name in names if name not in tensors], [name for name in tensors if name not in names]


def resampled_positions(stored: Tensor, own: Tensor, grid: tuple[int, int], file_prefix: int = 1) -> Tensor:
    """Table of positions (1, F + L', D) of a file for a network whose table `own` (1, P + L, D) has `grid` (L patches).

    F is `file_prefix`, 1 for a class token or 0. The fixed sine-cosine table is made anew for `grid`, any other is
    resampled bicubically over its patch entries. Of the prefix the first entry (class token) is taken over; entries
    that only `own` has stay.

    A file's grid is square (the authors' code knows no other), or else `grid` itself.
    Raises CheckpointError when it can be neither, or the width is another one.
    """
    patches, prefix = grid[0] * grid[1], own.shape[1] - grid[0] * grid[1]
    if stored.ndim != 3 or stored.shape[-1] != own.shape[-1]:
        raise CheckpointError(
            f"checkpoint: pos_embed is {tuple(stored.shape)} in the file, of width {own.shape[-1]} here; "
            "take the backbone that it was trained with"
        )
    square = _square_grid(stored, file_prefix)
    if square == grid or (square is None and stored.shape[1] == file_prefix + patches):
        entries = stored[:, file_prefix:]
    elif square is None:
        raise CheckpointError(
            f"checkpoint: pos_embed has {stored.shape[1] - file_prefix} patches, no square; "
            "set backbone.size to the file's own"
        )
    elif _is_fixed_table(stored, file_prefix):
        entries = sincos_2d(stored.shape[-1], grid)
    else:
        entries = resample_abs_pos_embed(stored[:, file_prefix:], list(grid), list(square), num_prefix_tokens=0)
    first = own.detach()[:, :prefix].clone()
    first[:, :file_prefix] = stored[:, :file_prefix] if prefix else first
    return torch.cat([first, entries.to(first)], dim=1)


def require_fixed_table(name: str, stored: Tensor, file_prefix: int = 1) -> None:
    """Raises CheckpointError unless `stored` (1, F + L, D) is the sine-cosine table of a square grid."""
    if not _is_fixed_table(stored, file_prefix):
        raise CheckpointError(f"checkpoint: {name} is not the fixed sine-cosine table; other positions are not read")


def _is_fixed_table(stored: Tensor, file_prefix: int) -> bool:
    square = _square_grid(stored, file_prefix)
    if square is None or stored.shape[-1] % 4:
        return False
    table = sincos_2d(stored.shape[-1], square, prefix=file_prefix)
    return torch.allclose(stored.detach().cpu().float(), table, atol=_SAME_TABLE)


def _square_grid(stored: Tensor, file_prefix: int) -> tuple[int, int] | None:
    """Grid of a stored table (1, F + L, D): the authors train on square images only. None when L is no square."""
    patches = stored.shape[1] - file_prefix if stored.ndim == 3 else 0
    side = math.isqrt(max(patches, 0))
    return (side, side) if patches > 0 and side * side == patches else None
