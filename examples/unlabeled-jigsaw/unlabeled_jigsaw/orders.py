"""Permutations of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from unlabeled import ConfigError


def shuffled(tiles: Tensor, orders: Tensor) -> Tensor:
    """Tiles (B, n, ...) and orders (B, n) → tiles, of which number i is the given number ``orders[:, i]``."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], orders]


def distant_orders(tiles: int, count: int) -> Tensor:
    """(count, tiles): permutations far from each other in Hamming distance, chosen greedily; always the same ones."""
    ranks = torch.rand(max(1000, 4 * count), tiles, generator=torch.Generator().manual_seed(0))
    pool: Tensor = torch.unique(ranks.argsort(1), dim=0)
    if count > len(pool):
        raise ConfigError(f"task.permutations: {count} is more than {tiles} tiles have; set {len(pool)} or fewer")
    chosen, nearest = [0], (pool != pool[0]).sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum((pool != pool[chosen[-1]]).sum(1))
    return pool[chosen]
