"""The largest scores of each row, kept while blocks of scores come and go.

A score and where it stands are one 64-bit number, so that an entry of more than another is the better one: the higher
score and, where scores are equal, the lower index. Numbers are all different then, the order of a result is defined,
and numpy's vectorized partition and sort find it (its `argpartition` would leave ties to chance).

Shapes: Q queries, n columns of a block, k entries kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unlabeled.eval.base import FloatArray, IntArray
from unlabeled.eval.neighbors.faiss_threads import faiss_threads

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


def _ordered(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Bits of float32 ↔ int32 of the same order."""
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def empty_keys(count: int, k: int) -> IntArray:
    """int64 (count, k): nothing found so far."""
    return np.full((count, k), EMPTY)


def merged(keys: IntArray, others: IntArray) -> IntArray:
    """The best C of keys (Q, C) and others (Q, m), ascending."""
    return np.sort(np.concatenate([keys, others], axis=1), axis=1)[:, -keys.shape[1] :]


def worst(keys: IntArray) -> FloatArray:
    """The least score of each row of ascending keys, -inf where entries are empty."""
    return decoded(keys[:, 0])[1]


def keys_of_pairs(queries: FloatArray, rows: FloatArray, indices: IntArray, offset: int) -> IntArray:
    """int64 (q, n): products of each of `queries` (q, D) and its `rows` (N, D) `indices` (q, n), -1 for none.

    The number of a pair depends on the pair alone, unlike that of a matrix product, which also depends on its size.
    """
    indices = np.ascontiguousarray(indices)
    scores = np.zeros(indices.shape, dtype=np.float32)
    if scores.size:
        with faiss_threads() as faiss:
            pointers = [faiss.swig_ptr(part) for part in (scores, queries, rows, indices)]
            faiss.fvec_inner_products_by_idx(*pointers, rows.shape[1], *indices.shape)
    missing = indices < 0
    scores[missing] = 0
    return np.where(missing, EMPTY, encoded(scores, indices + offset))


def collect(keys: IntArray, scores: Scores, columns: int, offset: int = 0, floors: FloatArray | None = None) -> None:
    """Puts into `keys` (Q, k) the best of what it holds and `columns` scores of each query, ascending.

    Column 0 gets the index `offset`; scores below `floors` (Q,) do not count. Blocks have the same shape but for the
    last queries and columns.
    """
    threads = torch.get_num_threads()
    floors = np.full(len(keys), -np.inf, dtype=np.float32) if floors is None else floors
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, columns, COLUMNS):
            part = slice(first, min(first + COLUMNS, columns))
            for start in range(0, len(keys), QUERIES * threads):
                rows = slice(start, min(start + QUERIES * threads, len(keys)))
                block = scores(rows, part).numpy()
                each = -(-len(block) // threads)
                shares = [slice(at, at + each) for at in range(0, len(block), each)]
                work = [(keys[rows][share], block[share], floors[rows][share], offset + first) for share in shares]
                list(pool.map(lambda one: _take(*one), work))


def _take(keys: IntArray, block: FloatArray, floors: FloatArray, offset: int) -> None:
    k, count = keys.shape[1], block.shape[1]
    floors = np.maximum(floors, worst(keys))
    if k < count and np.isneginf(floors).any():  # the best of this block alone are no less than its own k-th
        floors = np.maximum(floors, np.partition(block, count - k, axis=1)[:, count - k])
    positions = np.flatnonzero(block >= floors[:, None])
    if len(positions) == 0:
        return
    rows = positions // count
    counts = np.bincount(rows, minlength=len(block))
    padded = np.full((len(block), int(counts.max())), EMPTY)
    ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded[rows, ranks] = encoded(block.reshape(-1)[positions], positions - rows * count + offset)
    keys[:] = merged(keys, padded)
