"""Loads reference checkpoints, in the layout of a method's authors, into the modules of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.ssl.core.errors import CheckpointError

_SAME_TABLE = 1e-4
"""Largest allowed difference between a stored sine-cosine table and the one computed here."""


def load_mapped(
    module: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Copies `tensors` into `module`; `names` maps each name in the checkpoint to the module's own name.

    Returns (missing, unexpected) names, both as the checkpoint spells them. Raises CheckpointError if a shape differs
    or if no tensor belongs to the module; nothing is copied in that case.
    """
    own = module.state_dict()
    common = [name for name in names if name in tensors]
    if not common:
        raise CheckpointError(
            f"checkpoint: it holds none of {', '.join(list(names)[:3])}, ...; is it of another method?"
        )
    # compare all shapes before the first copy, so that an error leaves the module unchanged
    for name in common:
        theirs, ours = tuple(tensors[name].shape), tuple(own[names[name]].shape)
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint: {name} is {theirs} in the file and {ours} here; "
                "take the backbone and decoder that it was trained with"
            )
    with torch.no_grad():
        for name in common:
            own[names[name]].copy_(tensors[name])  # `own` shares memory with the module; casts dtype and device
    return [name for name in names if name not in tensors], [name for name in tensors if name not in names]


def resampled_positions(stored: Tensor, own: Tensor, grid: tuple[int, int], file_prefix: int = 1) -> Tensor:
    """Adapts a checkpoint's position table (1, F + L', D) to a backbone with table `own` (1, P + L, D) and `grid`.

    F is `file_prefix`: 1 if the file has an entry for a class token, else 0. A fixed sine-cosine table is recomputed
    for `grid`; any other table is resampled bicubically. The file's prefix entry is copied; prefix entries that only
    `own` has are kept. Returns (1, P + L, D).

    The file's grid is assumed to be square, as in the authors' code, or else to equal `grid`. Raises CheckpointError if
    it can be neither, or if the width differs.
    """
    patches, prefix = grid[0] * grid[1], own.shape[1] - grid[0] * grid[1]
    if stored.ndim != 3 or stored.shape[-1] != own.shape[-1]:
        raise CheckpointError(
            f"checkpoint: pos_embed is {tuple(stored.shape)} in the file, of width {own.shape[-1]} here; "
            "take the backbone that it was trained with"
        )
    square = _square_grid(stored, file_prefix)
    # a count of patches that is no square can still be that of this very grid
    if square == grid or (square is None and stored.shape[1] == file_prefix + patches):
        entries = stored[:, file_prefix:]
    elif square is None:
        raise CheckpointError(
            f"checkpoint: pos_embed has {stored.shape[1] - file_prefix} patches, no square; "
            "set backbone.size to the file's own"
        )
    elif _is_fixed_table(stored, file_prefix):
        entries = sincos_2d(stored.shape[-1], grid)  # recomputed: resampling would only approximate it
    else:
        entries = resample_abs_pos_embed(stored[:, file_prefix:], list(grid), list(square), num_prefix_tokens=0)
    # prefix entries: keep our own, overwrite those that the file has too
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
    """Grid of a stored table (1, F + L, D), if L is a square number; None otherwise."""
    patches = stored.shape[1] - file_prefix if stored.ndim == 3 else 0
    side = math.isqrt(max(patches, 0))
    return (side, side) if patches > 0 and side * side == patches else None
