"""Nearest rows through 8-bit products, proven: what the rounding leaves open is computed in float32.

For unit rows q and x, means m, and rounded q' of q - m and x' of x - m (each row with a scale of its own),

    q.x = q'.x' + (q - m - q').x' + (q - m).(x - m - x') + m.(x - m) + q.m

of which the second and third term are at most |q - m - q'| |x'| and |q - m| |x - m - x'| (Cauchy and Schwarz), numbers
that are known. That gives an upper bound of every cosine from one integer product. The candidates are the rows of the
highest bounds, their cosines are computed in float32, and when the k-th of these is above the bound of the last
candidate, no other row can be among the k nearest. Subtracting the mean, which all features of a network share, is what
makes the bounds narrow enough.

Shapes: Q queries, N rows, D features, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.base import FloatArray, IntArray
from unlabeled.eval.neighbors.topk import COLUMNS, QUERIES, collect, decoded, empty_keys, keys_of_pairs, merged, worst

_CANDIDATES = 3
"""Candidates for each neighbor wanted."""
_UNPROVEN = 1 / 8
"""Where more of the first queries than this cannot be proven, the exact search alone is faster."""


def reduced_search(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int) -> IntArray:
    """Puts into `keys` (Q, k) of module `topk` the cosines of unit `queries` and `rows`, row 0 being `offset`.

    Returns the queries for which that could not be proven to be right, whose keys are as they were.
    """
    everything = np.arange(len(queries))
    if 2 * _CANDIDATES * keys.shape[1] > len(rows):
        return everything
    first, rest = everything[:QUERIES], everything[QUERIES:]
    with torch.inference_mode():
        bounds = _Bounds(queries, rows)
        left = _search(bounds, keys, slice(0, len(first)), queries, rows, offset)
        if len(left) > _UNPROVEN * len(first):
            return np.concatenate([left, rest])
        return np.concatenate([left, _search(bounds, keys, slice(QUERIES, None), queries, rows, offset)])


class _Bounds:
    """Upper bounds of the cosines of `queries` and `rows`: ``block`` plus ``of_query``."""

    def __init__(self, queries: FloatArray, rows: FloatArray) -> None:
        mean = torch.from_numpy(rows.mean(axis=0, dtype=np.float64).astype(np.float32))
        self.left, self.right = _rounded(torch.from_numpy(queries), mean), _rounded(torch.from_numpy(rows), mean)
        self.of_row = torch.mv(torch.from_numpy(rows), mean) - mean.dot(mean)
        longest = (self.right.lengths + self.right.errors).max()
        self.of_query = torch.mv(torch.from_numpy(queries), mean) + self.left.errors * longest
        # Sums of D float32 products of unit vectors, and the few operations here, are wrong by less than this.
        self.of_query += (queries.shape[1] + 64) * 2.0**-23

    def block(self, some: slice, part: slice) -> Tensor:
        """float32 (q, n), without what is the same for all rows."""
        left, right = self.left, self.right
        bounds = torch._int_mm(left.values[some], right.values[part].t()).float()
        bounds.mul_(right.scales[part])
        torch.addcmul(self.of_row[part], bounds, left.scales[some, None], out=bounds)
        return bounds.addcmul_(left.lengths[some, None], right.errors[part])


@dataclass(frozen=True)
class _Rounded:
    """Rows less the mean in 8 bits."""

    values: Tensor
    """int8 (N, D)."""
    scales: Tensor
    """(N,): what 1 stands for."""
    lengths: Tensor
    """(N,): norms before rounding."""
    errors: Tensor
    """(N,): norms of what rounding took away."""


def _rounded(rows: Tensor, mean: Tensor) -> _Rounded:
    """`rows` (N, D) less `mean` (D,), a block at a time."""
    found = _Rounded(torch.empty(rows.shape, dtype=torch.int8), *(torch.empty(len(rows)) for _ in range(3)))
    for start in range(0, len(rows), COLUMNS):
        part = slice(start, start + COLUMNS)
        centered = rows[part] - mean
        scales = (centered.abs().amax(dim=1) / 127).clamp_min(1e-30)
        values = (centered / scales[:, None]).round_()
        found.values[part], found.scales[part] = values.to(torch.int8), scales
        found.lengths[part], found.errors[part] = (
            centered.norm(dim=1),
            (centered - values * scales[:, None]).norm(dim=1),
        )
    return found


def _search(
    bounds: _Bounds, keys: IntArray, part: slice, queries: FloatArray, rows: FloatArray, offset: int
) -> IntArray:
    """`reduced_search` for the queries `part`."""
    begin, end, _ = part.indices(len(queries))
    candidates = empty_keys(end - begin, _CANDIDATES * keys.shape[1])
    collect(
        candidates,
        lambda some, columns: bounds.block(slice(begin + some.start, begin + some.stop), columns),
        len(rows),
        floors=worst(keys[part]) - bounds.of_query[part].numpy(),
    )
    left = []
    for start in range(begin, end, QUERIES):
        some = slice(start, min(start + QUERIES, end))
        best, upper = decoded(candidates[start - begin : start - begin + QUERIES, ::-1])
        upper += bounds.of_query[some].numpy()[:, None]
        found = _refined(keys[some], queries[some], rows, best, upper, offset)
        proven = upper[:, -1] < worst(found)
        keys[some][proven] = found[proven]
        left.append(np.flatnonzero(~proven) + start)
    return np.concatenate(left) if left else np.arange(0)


def _refined(
    keys: IntArray, queries: FloatArray, rows: FloatArray, best: IntArray, upper: FloatArray, offset: int
) -> IntArray:
    """`keys` (q, k) with the cosines of the candidates `best` (q, C), highest bound first, that their bounds allow."""
    k = keys.shape[1]
    keys = merged(keys, keys_of_pairs(queries, rows, best[:, :k], offset))
    possible = upper[:, k:] >= worst(keys)[:, None]
    width = int(possible.sum(axis=1).max(initial=0))  # bounds fall, so the possible ones come first
    rest = np.where(possible, best[:, k:], -1)[:, :width]
    return merged(keys, keys_of_pairs(queries, rows, rest, offset))
