"""Reading what belongs to kept patches out of what belongs to all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_patches(x: Tensor, ids: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels of the patches `ids` (B, K, raster order) of (B, C, H, W) → (B, K, C, ph, pw); the rest is not read."""
    batch, channels, height, width = x.shape
    gh, gw = height // patch[0], width // patch[1]
    cells = x.reshape(batch, channels, gh, patch[0], gw, patch[1]).permute(0, 2, 4, 1, 3, 5)
    rows = torch.arange(batch, device=x.device)[:, None]
    return cells[rows, ids // gw, ids % gw]


def gather_pairs(table: Tensor, ids: Tensor) -> Tensor:
    """Entries of `table` (N, N, C) for each pair of the tokens `ids` (B, K) → (B, K, K, C)."""
    places = ids[:, :, None] * table.shape[0] + ids[:, None, :]
    return F.embedding(places, table.flatten(0, 1))


def with_prefix(ids: Tensor, prefix: int) -> Tensor:
    """Indices of kept patches (B, K) → of kept tokens (B, P + K), where P prefix tokens stand first and are kept."""
    first = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([first, ids + prefix], dim=1)
