"""Assignments in which all prototypes are used alike: Sinkhorn-Knopp over the rows of all ranks.

Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv 1306.0895; as a target of self-supervised learning: Caron et al.
(SwAV), arXiv 2006.09882, and Oquab et al. (DINOv2), arXiv 2304.07193.

The published iteration takes exp(logits / temperature) and divides in turns by the sums over rows and over prototypes.
Sums over prototypes come last, so a row's result is a softmax of its logits less one offset per prototype: these K
numbers are all that has to be kept. In logarithms nothing overflows; constants that all prototypes share, like the
numbers of rows and of prototypes, cancel.

Shapes: n rows on this rank, C channels, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from unlabeled.pretext.common.patches import widened
from unlabeled.ssl.core.distributed import sum_over_ranks


@torch.no_grad()
def sinkhorn_offsets(
    units: Tensor,
    prototypes: Tensor,
    temperature: Tensor | float,
    *,
    iterations: int = 3,
    chunk: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Directions `units` (n, C) and `prototypes` (K, C) in their lengths → offsets (K,), the same on every rank.

    Logits are made anew in each iteration for `chunk` rows at a time; None: once for all. Rows whose `weights` (n,) are
    0 take no part; ranks may bring different numbers of rows, and none. Without a row on any rank offsets are 0.
    At least float32, also under autocast.
    """
    with torch.autocast(units.device.type, enabled=False):
        rows, columns = widened(units) / temperature, widened(prototypes).t()
        offsets = columns.new_zeros(columns.shape[1])
        chunks = _Logits(rows, columns, len(rows) if chunk is None else chunk, weights)
        for iteration in range(iterations):
            total = torch.full_like(offsets, -torch.inf)
            for logits, valid in chunks:
                values = logits - offsets
                if iteration:
                    values -= values.logsumexp(1, keepdim=True)
                if valid is not None:
                    values.masked_fill_(~valid, -torch.inf)
                total = torch.logaddexp(total, values.logsumexp(0))
            offsets = offsets + _logsumexp_over_ranks(total)
    return offsets


def assignments(logits: Tensor, temperature: Tensor | float, offsets: Tensor) -> Tensor:
    """Logits (..., K) → their assignments (..., K) under `offsets` (K,), which sum to one."""
    return (logits / temperature - offsets).softmax(-1)


class _Logits:
    """Logits of a chunk of rows, and which of them count (bool, (rows, 1)); kept where there is one chunk only."""

    def __init__(self, rows: Tensor, columns: Tensor, chunk: int, weights: Tensor | None) -> None:
        self.rows, self.columns, self.chunk = rows, columns, max(chunk, 1)
        self.valid = None if weights is None else weights[:, None] > 0
        self.kept = rows @ columns if len(rows) <= self.chunk else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        if self.kept is not None:
            yield self.kept, self.valid
            return
        for start in range(0, len(self.rows), self.chunk):
            part = slice(start, start + self.chunk)
            yield self.rows[part] @ self.columns, None if self.valid is None else self.valid[part]


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Logarithm of the sum of exp(values) over ranks; 0 where that sum is 0."""
    largest = values.clone()
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    largest.masked_fill_(largest == -torch.inf, 0)  # would give the difference of two infinities
    found = largest + sum_over_ranks((values - largest).exp()).log()
    return found.masked_fill(found == -torch.inf, 0)
