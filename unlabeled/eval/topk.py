"""The largest scores of each row, kept while blocks of scores come and go.

A score and where it stands are one 64-bit number, so that an entry of more than another is the better one: the higher
score and, where scores are equal, the lower index. Numbers are all different then, the order of a result is defined,
and numpy's vectorised partition and sort find it (its `argpartition` would leave ties to chance).

Shapes: Q queries, n columns of a block, k entries kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.base import FloatArray, IntArray

QUERIES, COLUMNS = 512, 4096
"""Size of a block of scores for each thread: it stays in the processor's cache."""
EMPTY = np.iinfo(np.int64).min
_LOW = 0xFFFFFFFF

Scores = Callable[[slice, slice], Tensor]
"""(queries, columns) → float32 scores of that block, finite."""


def encoded(scores: FloatArray, indices: IntArray) -> IntArray:
    """One int64 for each finite score and its index (below 2^32); `decoded` takes them apart again."""
    bits = (scores + np.float32(0)).view(np.int32)  # there is one zero alone
    return (_ordered(bits).astype(np.int64) << 32) | (_LOW - indices)


def decoded(keys: IntArray) -> tuple[IntArray, FloatArray]:
    """Indices int64 and scores float32 of `keys`; -1 and -inf of empty ones."""
    scores = _ordered((keys >> 32).astype(np.int32)).view(np.float32)
    empty = keys == EMPTY
    return np.where(empty, -1, _LOW - (keys & _LOW)), np.where(empty, np.float32(-np.inf), scores)


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 ↔ int32 of the same order."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def empty_keys(count: int, k: int) -> IntArray:
    """int64 (count, k): nothing found so far."""
    return np.full((count, k), EMPTY)


def merged(keys: IntArray, others: IntArray) -> IntArray:
    """The best C of keys (Q, C) and others (Q, m), ascending."""
    return np.sort(np.concatenate([keys, others], axis=1), axis=1)[:, -keys.shape[1] :]


@dataclass(frozen=True)
class Window:
    """For scores that are upper bounds: what lies further below the k-th best than this is not worth keeping."""

    k: int
    widths: FloatArray
    """(Q,) in units of the scores."""


def collect(keys: IntArray, scores: Scores, columns: int, offset: int = 0, window: Window | None = None) -> None:
    """Puts into `keys` (Q, C) the best of what it holds and `columns` scores of each query, ascending.

    Column 0 gets the index `offset`. Blocks have the same shape but for the last queries and columns.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, columns, COLUMNS):
            part = slice(first, min(first + COLUMNS, columns))
            for start in range(0, len(keys), QUERIES * threads):
                rows = slice(start, min(start + QUERIES * threads, len(keys)))
                block = scores(rows, part).numpy()
                each = -(-len(block) // threads)
                shares = [slice(at, min(at + each, len(block))) for at in range(0, len(block), each)]
                work = [
                    (keys[rows][share], block[share], offset + first, _part_of(window, rows, share)) for share in shares
                ]
                list(pool.map(lambda one: _take(*one), work))


def _take(keys: IntArray, block: FloatArray, offset: int, window: Window | None) -> None:
    places = np.flatnonzero(block >= _floor(keys, block, window)[:, None])
    if len(places) == 0:
        return
    rows = places // block.shape[1]
    counts = np.bincount(rows, minlength=len(block))
    padded = np.full((len(block), int(counts.max())), EMPTY)
    begins = np.arange(len(block)) * block.shape[1]
    ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded[rows, ranks] = encoded(block.reshape(-1)[places], places - begins[rows] + offset)
    keys[:] = merged(keys, padded)


def _floor(keys: IntArray, block: FloatArray, window: Window | None) -> FloatArray:
    """What a score must reach to be kept, (q,)."""
    kept, count = keys.shape[1], block.shape[1]
    _, floor = decoded(keys[:, 0])
    if kept < count and np.isneginf(floor).any():  # the best of this block alone are no less than its own kept-th
        floor = np.maximum(floor, np.partition(block, count - kept, axis=1)[:, count - kept])
    if window is None:
        return floor
    _, nearest = decoded(keys[:, -window.k])
    if window.k < count and np.isneginf(nearest).any():
        nearest = np.maximum(nearest, np.partition(block, count - window.k, axis=1)[:, count - window.k])
    return np.maximum(floor, nearest - window.widths)


def _part_of(window: Window | None, rows: slice, share: slice) -> Window | None:
    return window and replace(window, widths=window.widths[rows][share])
