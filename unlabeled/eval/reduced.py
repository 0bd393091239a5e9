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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.base import FloatArray, IntArray
from unlabeled.eval.faiss_threads import faiss_threads
from unlabeled.eval.topk import COLUMNS, EMPTY, QUERIES, Window, collect, decoded, empty_keys, encoded, merged

_CANDIDATES = 3
"""Candidates for each neighbour wanted."""
_FIRST = 512
"""Queries tried before all: where few of them can be proven, the exact search alone is faster."""


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


def reduced_search(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int) -> IntArray:
    """Puts into `keys` (Q, k) of `unlabeled.eval.topk` the cosines of unit `queries` and `rows`, row 0 being `offset`.

    Returns the queries for which that could not be proven to be right, whose keys are as they were.
    """
    count, wanted = len(queries), _CANDIDATES * keys.shape[1]
    if 2 * wanted > len(rows):
        return np.arange(count)
    with torch.inference_mode():
        bounds = _Bounds(queries, rows)
        tried = [_search(bounds, slice(0, _FIRST), keys, queries, rows, offset, wanted)]
        if 2 * len(tried[0]) > min(_FIRST, count):
            return np.concatenate([tried[0], np.arange(_FIRST, count)]) if count > _FIRST else tried[0]
        if count > _FIRST:
            tried.append(_search(bounds, slice(_FIRST, count), keys, queries, rows, offset, wanted) + _FIRST)
    return np.concatenate(tried)


def _search(
    bounds: _Bounds, part: slice, keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int, wanted: int
) -> IntArray:
    candidates = empty_keys(len(queries[part]), wanted)
    window = Window(keys.shape[1], bounds.widths[part].numpy())
    collect(candidates, lambda some, cut: bounds.block(_shifted(some, part.start), cut), len(rows), window=window)
    left = []
    for start in range(0, len(candidates), QUERIES):
        some = slice(start, min(start + QUERIES, len(candidates)))
        mine = _shifted(some, part.start)
        best, upper = decoded(candidates[some][:, ::-1])
        upper += bounds.of_query[mine].numpy()[:, None]
        found = _refined(keys[mine], queries[mine], rows, best, upper, offset)
        proven = upper[:, -1] < _worst(found)
        keys[mine][proven] = found[proven]
        left.append(np.flatnonzero(~proven) + start)
    return np.concatenate(left)


class _Bounds:
    """Upper bounds of the cosines of `queries` and `rows`: ``block`` plus ``of_query``.

    They exceed the cosines by at most ``widths`` of the query.
    """

    def __init__(self, queries: FloatArray, rows: FloatArray) -> None:
        mean = torch.from_numpy(rows.mean(axis=0, dtype=np.float64).astype(np.float32))
        self.left, self.right = _rounded(torch.from_numpy(queries), mean), _rounded(torch.from_numpy(rows), mean)
        self.of_row = torch.mv(torch.from_numpy(rows), mean) - mean.dot(mean)
        largest = (self.right.lengths + self.right.errors).max()
        # Sums of D float32 products of unit vectors, and the few operations here, are wrong by less than the last term.
        error = self.left.errors * largest + (queries.shape[1] + 64) * 2.0**-23
        self.of_query = torch.mv(torch.from_numpy(queries), mean) + error
        self.widths = 2 * (error + self.left.lengths * self.right.errors.max())

    def block(self, some: slice, part: slice) -> Tensor:
        """float32 (q, n), without what is the same for all rows."""
        left, right = self.left, self.right
        bounds = torch._int_mm(left.values[some], right.values[part].t()).float()
        bounds.mul_(right.scales[part])
        torch.addcmul(self.of_row[part], bounds, left.scales[some, None], out=bounds)
        return bounds.addcmul_(left.lengths[some, None], right.errors[part])


def _rounded(rows: Tensor, mean: Tensor) -> _Rounded:
    """`rows` (N, D) less `mean` (D,), a block at a time."""
    parts = []
    for block in rows.split(COLUMNS):
        centred = block - mean
        scales = (centred.abs().amax(dim=1) / 127).clamp_min(1e-30)
        values = (centred / scales[:, None]).round_()
        errors = (centred - values * scales[:, None]).norm(dim=1)
        parts.append((values.to(torch.int8), scales, centred.norm(dim=1), errors))
    return _Rounded(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _refined(
    keys: IntArray, queries: FloatArray, rows: FloatArray, best: IntArray, upper: FloatArray, offset: int
) -> IntArray:
    """`keys` (q, k) with the cosines of the candidates `best` (q, C), highest bound first, that their bounds allow."""
    k = keys.shape[1]
    keys = merged(keys, _keys_of(queries, rows, best[:, :k], offset))
    open_ones = upper[:, k:] >= _worst(keys)[:, None]
    width = int(open_ones.sum(axis=1).max(initial=0))
    if width == 0:
        return keys
    rest = np.where(open_ones, best[:, k:], -1)[:, :width]  # bounds fall, so these come first
    return merged(keys, _keys_of(queries, rows, rest, offset))


def _keys_of(queries: FloatArray, rows: FloatArray, indices: IntArray, offset: int) -> IntArray:
    """Cosines of each query and its rows `indices` (q, n), -1 for none, as int64 (q, n)."""
    indices = np.ascontiguousarray(indices)
    cosines = np.empty(indices.shape, dtype=np.float32)
    with faiss_threads() as faiss:
        pointers: list[Any] = [faiss.swig_ptr(part) for part in (cosines, queries, rows, indices)]
        faiss.fvec_inner_products_by_idx(*pointers, rows.shape[1], *indices.shape)
    return np.where(indices < 0, EMPTY, encoded(np.where(indices < 0, np.float32(0), cosines), indices + offset))


def _worst(keys: IntArray) -> FloatArray:
    """The least score of each row, -inf where there are fewer than k."""
    return decoded(keys[:, 0])[1]


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
