"""Fixed position embeddings for the patches of a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(dim: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Sine-cosine position embeddings of a (gh, gw) grid of L patches, float32 (1, prefix + L, dim).

    Patches are in raster order, after `prefix` zero vectors. The first half of the channels encodes the column x, the
    second half the row y; each half is sin(x w), then cos(x w), with w_k = 10000^(-k / (dim / 4)). `dim` must be a
    multiple of 4. Source: MoCo v3 (arXiv 2104.02057), as used by MAE.
    """
    assert dim % 4 == 0, f"sine-cosine positions need a multiple of 4 channels, got {dim}"
    # float64 throughout, as in MAE's NumPy code, so that the table matches the one in its files
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies  # (L, dim / 4)
        halves += [angles.sin(), angles.cos()]
    table = torch.cat(halves, dim=1)
    return torch.cat([table.new_zeros(prefix, dim), table]).float()[None]
