"""Nearest-neighbor search by cosine similarity, over all rows or with a faiss index.

- ``exact``: float32 products of blocks; only scores above the k-th best so far are kept.
- ``reduced``: 8-bit products first. Their error is bounded for each pair (module `reduced`), which proves that most
  rows are not among the nearest; the others are computed in float32. If too many remain, the search is ``exact``.
- ``ivf``, ``hnsw``: approximate; `recall` measures their quality.

Training features may be on disk (`mapped_features`): ``exact`` and ``reduced`` load a chunk of them at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.eval.base import FloatArray, IntArray
from unlabeled.eval.neighbors.faiss_threads import faiss_threads
from unlabeled.eval.neighbors.reduced import reduced_search
from unlabeled.eval.neighbors.topk import COLUMNS, QUERIES, collect, decoded, empty_keys, keys_of_pairs, merged, worst
from unlabeled.ssl.core.cpu import cpu_kernels
from unlabeled.ssl.core.errors import ConfigError, DataError

APPROXIMATE = ("ivf", "hnsw")
_ROWS = 4096
"""Rows normalized at a time; bounds the memory of float64 copies."""
_SAMPLE = 1000
"""Queries on which an approximate search is compared with the exact one."""
_ROUNDING = 1e-5
"""Far more than the difference between two orders of summation of a cosine."""
_LINKS = 32
"""Links per node of the HNSW graph; the lowest layer has twice as many."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the neighbor search; see `KnnConfig`."""

    kind: Literal["exact", "reduced", "ivf", "hnsw"] = "exact"
    effort: int = 64
    """Approximate search only: lists to visit (ivf), or breadth of the graph search, at least k (hnsw)."""
    memory_gb: float = 2.0
    """Memory for training features, in 1e9 bytes; an approximate search needs all of them at once."""


def search(
    train: FloatArray, test: FloatArray, k: int, settings: SearchSettings | None = None, *, seed: int = 0
) -> tuple[IntArray, FloatArray]:
    """The `k` rows of `train` (N, D) most similar to each row of `test` (Q, D), by cosine.

    Returns indices int64 and cosines float32, (Q, min(k, N)) each, most similar first; ties go to the lower index. Zero
    vectors have similarity 0 to everything. Features must be finite. `train` may be a memory map, of which at most
    ``settings.memory_gb`` is loaded at a time. Raises DataError for features of different widths, and ConfigError if an
    index would exceed ``settings.memory_gb``.
    """
    settings, k = settings or SearchSettings(), min(k, len(train))
    if train.shape[1] != test.shape[1]:
        raise DataError(f"evaluate.data: {train.shape[1]} training features but {test.shape[1]} test features")
    queries = normalized(test)
    if settings.kind in APPROXIMATE:
        return _indexed(train, queries, k, settings, seed)
    keys = empty_keys(len(queries), k)
    chunk = _chunk_rows(train.shape[1], settings)
    for start in range(0, len(train), chunk):
        _search_chunk(keys, queries, normalized(train[start : start + chunk]), start, settings)
    return decoded(keys[:, ::-1])  # keys are ascending


def _search_chunk(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int, settings: SearchSettings) -> None:
    """Merges the rows of a chunk into `keys`."""
    if settings.kind == "exact" or not integers_are_fast():
        exact_search(keys, queries, rows, offset)
        return
    unproven = reduced_search(keys, queries, rows, offset)
    found = keys[unproven]  # a copy: indexing with an array gives no view
    exact_search(found, queries[unproven], rows, offset)
    keys[unproven] = found


def recall(train: FloatArray, test: FloatArray, found: IntArray, settings: SearchSettings, *, seed: int = 0) -> float:
    """Fraction of the true k nearest rows that `found` (Q, k) contains, on at most 1000 queries drawn with `seed`."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(test))[:_SAMPLE])
    true, _ = search(train, test[chosen], found.shape[1], replace(settings, kind="exact"))
    both = sum(len(np.intersect1d(*pair)) for pair in zip(true, found[chosen], strict=True))
    return both / true.size


def exact_search(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int) -> None:
    """Merges the cosines of unit `queries` (Q, D) and `rows` (N, D) into `keys` (Q, k) of module `topk`.

    Row 0 gets the index `offset`.
    """
    # matrix products propose a few more rows than k; their cosines are then computed pair by pair, since results of a
    # matrix product depend on its size
    left, right = torch.from_numpy(queries), torch.from_numpy(rows)
    k = keys.shape[1]
    candidates = empty_keys(len(queries), min(k + max(8, k // 8), len(rows)))

    def scores(some: slice, columns: slice) -> Tensor:
        block = right[columns]
        # padded to the size of the other blocks, so that equal rows have equal scores
        missing = COLUMNS - len(block) if columns.start else 0
        products = F.linear(left[some], F.pad(block, (0, 0, 0, missing)) if missing else block)
        return products[:, : len(block)].contiguous()

    with torch.inference_mode(), cpu_kernels(torch.device("cpu")):
        collect(candidates, scores, len(rows), floors=worst(keys) - _ROUNDING)
    for start in range(0, len(keys), QUERIES):
        some = slice(start, start + QUERIES)
        best, _ = decoded(candidates[some])
        keys[some] = merged(keys[some], keys_of_pairs(queries[some], rows, best, offset))


def integers_are_fast() -> bool:
    """Whether this processor multiplies 8-bit integers faster than float32 (VNNI); if not, `reduced` is `exact`."""
    # private functions, of which torch versions have one or the other
    known = [getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_avx512_vnni_supported")]
    return any(function is not None and function() for function in known)


def normalized(features: FloatArray) -> FloatArray:
    """Rows scaled to unit L2 norm, float32 (N, D); zero rows stay zero."""
    found = np.empty(features.shape, dtype=np.float32)
    for start in range(0, len(features), _ROWS):
        rows = slice(start, start + _ROWS)
        wide = features[rows].astype(np.float64)  # squares of large values overflow in float32
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
        np.divide(wide, np.where(lengths > 0, lengths, 1), out=found[rows], casting="same_kind")
    return found


def mapped_features(file: Path, name: str = "features") -> FloatArray:
    """A float32 matrix in a safetensors file as a read-only memory map, which may be larger than memory.

    For .npy files, use ``np.load(..., mmap_mode="r")``. Raises DataError if the file has no such matrix.
    """
    # the format: header length in 8 bytes, JSON header, data
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry: dict[str, Any] | None = json.loads(stream.read(length)).get(name)
    if entry is None or entry["dtype"] != "F32" or len(entry["shape"]) != 2:
        raise DataError(f"{file}: contains no float32 matrix called {name!r}")
    begin = 8 + length + entry["data_offsets"][0]
    return np.memmap(file, dtype="<f4", mode="r", offset=begin, shape=tuple(entry["shape"]))


def _chunk_rows(width: int, settings: SearchSettings) -> int:
    """Training rows to load at a time, a multiple of the columns of a block."""
    # 4 bytes for a feature and 1 for its 8-bit copy
    return max(1, int(settings.memory_gb * 1e9 / (5 * width * COLUMNS))) * COLUMNS


def _indexed(
    train: FloatArray, queries: FloatArray, k: int, settings: SearchSettings, seed: int
) -> tuple[IntArray, FloatArray]:
    """`search` with a faiss index."""
    need = len(train) * (4 * train.shape[1] * 2 + 8 * _LINKS) / 1e9  # features, their copy in the index, and links
    if need > settings.memory_gb:
        raise ConfigError(
            f"evaluate.knn.search: {settings.kind} needs about {need:.1f} GB of memory for {len(train)} images, "
            f"and evaluate.knn.memory_gb is {settings.memory_gb:g}; raise it, or use exact"
        )
    rows = normalized(train)
    with faiss_threads() as faiss:
        index = faiss.index_factory(rows.shape[1], _described(len(rows), settings), faiss.METRIC_INNER_PRODUCT)
        if settings.kind == "ivf":
            index.cp.seed, index.nprobe = seed + 1, settings.effort  # cp: parameters of the k-means of the lists
        else:
            index.hnsw.efSearch = max(settings.effort, k)
        index.train(rows)
        index.add(rows)
        cosines, indices = index.search(queries, k)
    return _completed(rows, queries, indices.astype(np.int64), cosines)


def _described(count: int, settings: SearchSettings) -> str:
    """The faiss description of the index for `count` rows."""
    if settings.kind == "hnsw":
        return f"HNSW{_LINKS},Flat"
    return f"IVF{max(1, min(int(4 * count**0.5), count // 39))},Flat"  # faiss warns below 39 rows per list


def _completed(
    rows: FloatArray, queries: FloatArray, indices: IntArray, cosines: npt.NDArray[np.float32]
) -> tuple[IntArray, FloatArray]:
    """Completes the results of an index: queries with fewer than k results are searched exactly, and ties sorted."""
    incomplete = np.flatnonzero((indices < 0).any(axis=1))  # faiss fills up with -1
    if len(incomplete):
        indices[incomplete], cosines[incomplete] = search(rows, queries[incomplete], indices.shape[1])
    order = np.lexsort((indices, -cosines), axis=1)
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(cosines, order, axis=1)
