"""Exact nearest neighbors from 8-bit products: what rounding leaves undecided is computed in float32.

For unit rows q and x, the mean m, and roundings q' of q - m and x' of x - m (each row with a scale of its own),

    q.x = q'.x' + (q - m - q').x' + (q - m).(x - m - x') + m.(x - m) + q.m

where the second and third terms are at most |q - m - q'| |x'| and |q - m| |x - m - x'| (Cauchy-Schwarz), which are
known. So one integer product gives an upper bound of every cosine. The candidates are the rows with the highest bounds,
and their cosines are computed in float32. If the k-th best of these exceeds the bound of the last candidate, no other
row can be among the k nearest. The bounds are tight enough only because the mean, which dominates the features of a
backbone, is subtracted.

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
"""Candidates per requested neighbor."""
_UNPROVEN = 1 / 8
"""If more than this fraction of the first queries cannot be proven, the exact search alone is faster."""


def reduced_search(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int) -> IntArray:
    """Merges the cosines of unit `queries` (Q, D) and `rows` (N, D) into `keys` (Q, k) of module `topk`.

    Row 0 gets the index `offset`. Returns the queries whose result could not be proven; their keys are unchanged.
    """
    indices = np.arange(len(queries))
    if 2 * _CANDIDATES * keys.shape[1] > len(rows):  # too many candidates to save anything
        return indices
    # the first queries show whether the bounds are tight enough for these features
    first, rest = indices[:QUERIES], indices[QUERIES:]
    with torch.inference_mode():
        bounds = _Bounds(queries, rows)
        unproven = _search(bounds, keys, slice(0, len(first)), queries, rows, offset)
        if len(unproven) > _UNPROVEN * len(first):
            return np.concatenate([unproven, rest])
        return np.concatenate([unproven, _search(bounds, keys, slice(QUERIES, None), queries, rows, offset)])


class _Bounds:
    """Upper bounds of the cosines of `queries` and `rows`, as the sum of `block` and `of_query`."""

    def __init__(self, queries: FloatArray, rows: FloatArray) -> None:
        mean = torch.from_numpy(rows.mean(axis=0, dtype=np.float64).astype(np.float32))
        self.left, self.right = _rounded(torch.from_numpy(queries), mean), _rounded(torch.from_numpy(rows), mean)
        self.of_row = torch.mv(torch.from_numpy(rows), mean) - mean.dot(mean)
        longest = (self.right.lengths + self.right.errors).max()
        self.of_query = torch.mv(torch.from_numpy(queries), mean) + self.left.errors * longest
        # the rounding errors of sums of D float32 products of unit vectors, and of the operations here, are smaller
        self.of_query += (queries.shape[1] + 64) * 2.0**-23

    def block(self, some: slice, columns: slice) -> Tensor:
        """Bounds float32 (q, n) of the queries `some` and the rows `columns`, without the terms of the query alone."""
        left, right = self.left, self.right
        bounds = torch._int_mm(left.values[some], right.values[columns].t()).float()  # private in torch, but fast
        bounds.mul_(right.scales[columns])
        torch.addcmul(self.of_row[columns], bounds, left.scales[some, None], out=bounds)
        return bounds.addcmul_(left.lengths[some, None], right.errors[columns])


@dataclass(frozen=True)
class _Rounded:
    """Rows minus the mean, rounded to 8 bits."""

    values: Tensor
    """int8 (N, D)."""
    scales: Tensor
    """(N,): the value of one step of a row."""
    lengths: Tensor
    """(N,): norms before rounding."""
    errors: Tensor
    """(N,): norms of the rounding errors."""


def _rounded(rows: Tensor, mean: Tensor) -> _Rounded:
    """Rounds `rows` (N, D) minus `mean` (D,), a block at a time."""
    found = _Rounded(torch.empty(rows.shape, dtype=torch.int8), *(torch.empty(len(rows)) for _ in range(3)))
    for start in range(0, len(rows), COLUMNS):
        block = slice(start, start + COLUMNS)
        centered = rows[block] - mean
        scales = (centered.abs().amax(dim=1) / 127).clamp_min(1e-30)  # a row equal to the mean has no scale
        values = (centered / scales[:, None]).round_()
        found.values[block], found.scales[block] = values.to(torch.int8), scales
        found.lengths[block], found.errors[block] = (
            centered.norm(dim=1),
            (centered - values * scales[:, None]).norm(dim=1),
        )
    return found


def _search(
    bounds: _Bounds, keys: IntArray, chosen: slice, queries: FloatArray, rows: FloatArray, offset: int
) -> IntArray:
    """`reduced_search` for the queries `chosen`."""
    begin, end, _ = chosen.indices(len(queries))
    # the rows with the highest bounds
    candidates = empty_keys(end - begin, _CANDIDATES * keys.shape[1])
    collect(
        candidates,
        lambda some, columns: bounds.block(slice(begin + some.start, begin + some.stop), columns),
        len(rows),
        floors=worst(keys[chosen]) - bounds.of_query[chosen].numpy(),  # lower bounds cannot improve on earlier rows
    )
    # their exact cosines, and whether these prove the result
    unproven = []
    for start in range(begin, end, QUERIES):
        some = slice(start, min(start + QUERIES, end))
        best, upper = decoded(candidates[start - begin : start - begin + QUERIES, ::-1])
        upper += bounds.of_query[some].numpy()[:, None]
        found = _refined(keys[some], queries[some], rows, best, upper, offset)
        proven = upper[:, -1] < worst(found)
        keys[some][proven] = found[proven]
        unproven.append(np.flatnonzero(~proven) + start)
    return np.concatenate(unproven) if unproven else np.arange(0)


def _refined(
    keys: IntArray, queries: FloatArray, rows: FloatArray, best: IntArray, upper: FloatArray, offset: int
) -> IntArray:
    """`keys` (q, k) merged with the cosines of the candidates `best` (q, C), sorted by descending bound `upper`.

    Candidates with a bound below the k-th best cosine are skipped.
    """
    k = keys.shape[1]
    keys = merged(keys, keys_of_pairs(queries, rows, best[:, :k], offset))
    possible = upper[:, k:] >= worst(keys)[:, None]
    width = int(possible.sum(axis=1).max(initial=0))  # bounds descend, so the possible ones come first
    rest = np.where(possible, best[:, k:], -1)[:, :width]
    return merged(keys, keys_of_pairs(queries, rows, rest, offset))
