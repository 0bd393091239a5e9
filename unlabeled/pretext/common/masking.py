"""Random masks: how many patches stay, and which. A mask says *visible* (True)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

CountRule = Literal["exact", "official"]


class Masking(NamedTuple):
    """Which of L patches each picture keeps; every picture keeps the same number K."""

    ids_keep: Tensor
    """Raster indices of the kept patches, int64 (B, K), in ascending order of noise."""
    ids_masked: Tensor
    """Raster indices of the others, int64 (B, L - K), in ascending order of noise."""
    ids_restore: Tensor
    """Rank of each raster position, int64 (B, L): gathering ``cat(kept, masked)`` with it gives raster order."""
    visible: Tensor
    """Bool (B, L), raster order."""

    def restore(self, tokens: Tensor) -> Tensor:
        """(B, L, D) with the kept tokens first and the masked ones after them → raster order."""
        return tokens.gather(1, self.ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))


def count_keep(patches: int, ratio: float, rule: CountRule = "exact") -> int:
    """Patches that stay visible when the part `ratio` of them is masked: the integer part of L (1 - ratio).

    ``exact`` takes it of the decimal product: 20 of 100 at 0.8. ``official`` takes it of the product in double
    precision, as the authors' code does: 19 of 100 at 0.8, since that product is slightly under 20.
    """
    return int(patches * (1 - ratio) + (1e-9 if rule == "exact" else 0.0))


def random_masking(noise: Tensor, keep: int) -> Masking:
    """Keeps the `keep` patches with the smallest `noise` (B, L) of each picture, each picture by itself.

    Source: MAE (arXiv 2111.06377), appendix A.1: random sampling without replacement, by a shuffle.
    """
    ids_shuffle = noise.argsort(dim=1)
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, ranks)
    return Masking(ids_shuffle[:, :keep], ids_shuffle[:, keep:], ids_restore, ids_restore < keep)
