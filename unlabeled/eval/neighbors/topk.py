"""The k largest scores of each query, updated as blocks of scores arrive.

A score and its index are packed into one 64-bit integer, the key, such that the larger key is the better entry: the
higher score or, for equal scores, the lower index. So all keys differ, the order of results is defined, and numpy's
vectorized partition and sort can find it (`argpartition` would leave the order of ties undefined).

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
"""Size of a thread's block of scores, which fits into the processor's cache."""
EMPTY = np.iinfo(np.int64).min
"""Key of an empty entry, smaller than all others."""
_LOW = 0xFFFFFFFF

Scores = Callable[[slice, slice], Tensor]
"""(queries, columns) → finite float32 scores of that block."""


def encoded(scores: FloatArray, indices: IntArray) -> IntArray:
    """Packs finite scores and their indices (below 2^32) into int64 keys; `decoded` is the inverse."""
    bits = (scores + np.float32(0)).view(np.int32)  # adding 0 turns -0.0 into 0.0, which has other bits
    return (_ordered(bits).astype(np.int64) << 32) | (_LOW - indices)


def decoded(keys: IntArray) -> tuple[IntArray, FloatArray]:
    """Indices int64 and scores float32 of `keys`; -1 and -inf for empty ones."""
    scores = _ordered((keys >> 32).astype(np.int32)).view(np.float32)
    empty = keys == EMPTY
    return np.where(empty, -1, _LOW - (keys & _LOW)), np.where(empty, np.float32(-np.inf), scores)


def _ordered(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Maps the bits of float32 to int32 values of the same order; its own inverse."""
    # the bits of negative floats increase with their magnitude, so all but the sign are inverted
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def empty_keys(count: int, k: int) -> IntArray:
    """Keys int64 (count, k) of entries that are all empty."""
    return np.full((count, k), EMPTY)


def merged(keys: IntArray, others: IntArray) -> IntArray:
    """The k best of `keys` (Q, k) and `others` (Q, m), ascending."""
    return np.sort(np.concatenate([keys, others], axis=1), axis=1)[:, -keys.shape[1] :]


def worst(keys: IntArray) -> FloatArray:
    """The lowest score of each row of ascending keys; -inf if an entry is empty."""
    return decoded(keys[:, 0])[1]


def keys_of_pairs(queries: FloatArray, rows: FloatArray, indices: IntArray, offset: int) -> IntArray:
    """Keys int64 (q, n) of the inner products of `queries` (q, D) with ``rows[indices]``, `indices` (q, n).

    Index -1 gives an empty key; the others get `offset` added.
    """
    # pair by pair, since the result of a matrix product depends on its size
    indices = np.ascontiguousarray(indices)
    scores = np.zeros(indices.shape, dtype=np.float32)
    if scores.size:
        with faiss_threads() as faiss:
            pointers = [faiss.swig_ptr(array) for array in (scores, queries, rows, indices)]
            faiss.fvec_inner_products_by_idx(*pointers, rows.shape[1], *indices.shape)
    missing = indices < 0
    scores[missing] = 0  # faiss leaves them at -inf, which cannot be encoded
    return np.where(missing, EMPTY, encoded(scores, indices + offset))


def collect(keys: IntArray, scores: Scores, columns: int, offset: int = 0, floors: FloatArray | None = None) -> None:
    """Updates `keys` (Q, k), ascending, with the scores of all queries and `columns` columns.

    `scores` computes a block; blocks have the same shape, except for the last queries and columns. Column 0 gets the
    index `offset`. Scores below `floors` (Q,) are ignored.
    """
    threads = torch.get_num_threads()
    floors = np.full(len(keys), -np.inf, dtype=np.float32) if floors is None else floors
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, columns, COLUMNS):
            block_columns = slice(first, min(first + COLUMNS, columns))
            for start in range(0, len(keys), QUERIES * threads):
                rows = slice(start, min(start + QUERIES * threads, len(keys)))
                block = scores(rows, block_columns).numpy()
                # each thread updates its own rows of the keys
                each = -(-len(block) // threads)
                shares = [slice(at, at + each) for at in range(0, len(block), each)]
                work = [(keys[rows][share], block[share], floors[rows][share], offset + first) for share in shares]
                list(pool.map(lambda one: _take(*one), work))


def _take(keys: IntArray, block: FloatArray, floors: FloatArray, offset: int) -> None:
    """Merges a block of scores (q, n) into `keys` (q, k); column 0 has the index `offset`."""
    k, count = keys.shape[1], block.shape[1]
    floors = np.maximum(floors, worst(keys))
    if k < count and np.isneginf(floors).any():  # while entries are empty, the block's own k-th best is a bound
        floors = np.maximum(floors, np.partition(block, count - k, axis=1)[:, count - k])
    # after the first blocks, few scores pass this comparison: it saves partitioning every block
    positions = np.flatnonzero(block >= floors[:, None])
    if len(positions) == 0:
        return
    # encode the survivors, left-aligned in rows of equal length
    rows = positions // count
    counts = np.bincount(rows, minlength=len(block))
    padded = np.full((len(block), int(counts.max())), EMPTY)
    ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded[rows, ranks] = encoded(block.reshape(-1)[positions], positions - rows * count + offset)
    keys[:] = merged(keys, padded)
