"""Pictures as sequences of patches, and the target of masked autoencoders.

A patch vector has the order row, column, channel: element ``(dy * pw + dx) * C + c`` is channel c of the pixel dy rows
down and dx columns right of the patch's corner (MAE, arXiv 2111.06377; the channel runs fastest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from unlabeled.ssl.backbones.masked.tokens import gather_patches

_EPS = 1e-6
"""Added to the variance, inside the square root."""


def patchify(images: Tensor, patch: tuple[int, int], ids: Tensor | None = None) -> Tensor:
    """(B, C, H, W) → (B, L, ph * pw * C) in raster order, or the patches `ids` (B, K) only → (B, K, ph * pw * C)."""
    if ids is not None:
        return gather_patches(images, ids, patch).permute(0, 1, 3, 4, 2).flatten(2)
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch[0] * patch[1] * channels)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B, gh * gw, ph * pw * C) → (B, C, gh * ph, gw * pw); the inverse of `patchify`."""
    cells = patches.reshape(patches.shape[0], *grid, *patch, -1).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(patches.shape[0], -1, grid[0] * patch[0], grid[1] * patch[1])


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is that: what targets and losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch over its pixels and channels, (..., n) → two of (..., 1), at least float32.

    The variance is unbiased (over n - 1) and 1e-6 is added to it. Half precision is left first: it is off by more
    than 1 on patches of low contrast.
    """
    variance, mean = torch.var_mean(widened(patches), dim=-1, keepdim=True, correction=1)
    return mean, (variance + _EPS).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch (..., n) minus its mean, over its deviation; at least float32. A constant patch becomes exactly 0."""
    mean, deviation = patch_statistics(patches)
    return (patches.to(mean.dtype) - mean) / deviation
