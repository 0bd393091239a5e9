"""The most similar rows among many, by cosine: all of them looked at, or an index of faiss asked.

- ``exact``: float32 products of blocks; what is kept of a block is found by comparison with the k-th best so far.
- ``reduced``: 8-bit products first. Their error has a bound for each pair (module `reduced`), so that a row
  left out is proven to be none of the nearest; what remains is computed in float32. Where too much remains, as exact.
- ``ivf``, ``hnsw``: approximate; `recall` measures how good.

Training features may lie on disk (`mapped_features`): both of the first take a part of them into memory at a time.
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
"""Rows normalized at a time."""
_SAMPLE = 1000
"""Queries on which an approximate search is compared with the exact one."""
_ROUNDING = 1e-5
"""Far more than two ways to sum a cosine differ by."""
_LINKS = 32
"""Neighbors of a node of the HNSW graph; the lowest layer has twice as many."""


@dataclass(frozen=True)
class SearchSettings:
    """How the neighbors are found."""

    kind: Literal["exact", "reduced", "ivf", "hnsw"] = "exact"
    effort: int = 64
    """Of an approximate search: lists that ivf visits, breadth of the search through hnsw (at least k)."""
    memory_gb: float = 2.0
    """Of training features made ready in memory at a time, in 1e9 bytes; an approximate search needs them all."""


def search(
    train: FloatArray, test: FloatArray, k: int, settings: SearchSettings | None = None, *, seed: int = 0
) -> tuple[IntArray, FloatArray]:
    """The `k` rows of `train` (N, D) most similar to each of `test` (Q, D): indices int64 and cosines float32 (Q, k).

    The most similar first; of equal ones the lower index. At most N of them, and zero vectors have similarity 0 to
    everything. Features must be finite. `train` may be a memory map; ``settings.memory_gb`` bounds what is taken of it.
    Raises DataError for features of two widths and ConfigError for an index that memory cannot hold.
    """
    settings, k = settings or SearchSettings(), min(k, len(train))
    if train.shape[1] != test.shape[1]:
        raise DataError(f"evaluate.data: {train.shape[1]} training features but {test.shape[1]} test features")
    queries = normalized(test)
    if settings.kind in APPROXIMATE:
        return _indexed(train, queries, k, settings, seed)
    keys = empty_keys(len(queries), k)
    rows_at_a_time = _part(train.shape[1], settings)
    for start in range(0, len(train), rows_at_a_time):
        _search_part(keys, queries, normalized(train[start : start + rows_at_a_time]), start, settings)
    return decoded(keys[:, ::-1])


def _search_part(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int, settings: SearchSettings) -> None:
    if settings.kind == "exact" or not integers_are_fast():
        exact_search(keys, queries, rows, offset)
        return
    left = reduced_search(keys, queries, rows, offset)
    found = keys[left]
    exact_search(found, queries[left], rows, offset)
    keys[left] = found


def recall(train: FloatArray, test: FloatArray, found: IntArray, settings: SearchSettings, *, seed: int = 0) -> float:
    """Part of the true k nearest that `found` (Q, k) names, on a sample of at most 1000 queries drawn by `seed`."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(test))[:_SAMPLE])
    true, _ = search(train, test[chosen], found.shape[1], replace(settings, kind="exact"))
    both = sum(len(np.intersect1d(*pair)) for pair in zip(true, found[chosen], strict=True))
    return both / true.size


def exact_search(keys: IntArray, queries: FloatArray, rows: FloatArray, offset: int) -> None:
    """Puts into `keys` (Q, k) of module `topk` the cosines of unit `queries` and `rows`, row 0 being `offset`.

    Matrix products choose a few rows more than k, whose cosines are then computed pair by pair.
    """
    left, right = torch.from_numpy(queries), torch.from_numpy(rows)
    k = keys.shape[1]
    candidates = empty_keys(len(queries), min(k + max(8, k // 8), len(rows)))

    def scores(some: slice, part: slice) -> Tensor:
        block = right[part]
        missing = COLUMNS - len(block) if part.start else 0  # equal rows have equal scores in products of one size
        products = F.linear(left[some], F.pad(block, (0, 0, 0, missing)) if missing else block)
        return products[:, : len(block)].contiguous()

    with torch.inference_mode(), cpu_kernels(torch.device("cpu")):
        collect(candidates, scores, len(rows), floors=worst(keys) - _ROUNDING)
    for start in range(0, len(keys), QUERIES):
        some = slice(start, start + QUERIES)
        best, _ = decoded(candidates[some])
        keys[some] = merged(keys[some], keys_of_pairs(queries[some], rows, best, offset))


def integers_are_fast() -> bool:
    """Whether this processor multiplies 8-bit numbers faster than float32 (VNNI). Elsewhere `reduced` is `exact`."""
    known = [getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_avx512_vnni_supported")]
    return any(function is not None and function() for function in known)


def normalized(features: FloatArray) -> FloatArray:
    """Rows of unit L2 norm, float32 (N, D); zero rows stay zero."""
    found = np.empty(features.shape, dtype=np.float32)
    for start in range(0, len(features), _ROWS):
        part = slice(start, start + _ROWS)
        wide = features[part].astype(np.float64)  # squares of large float32 values overflow
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
        np.divide(wide, np.where(lengths > 0, lengths, 1), out=found[part], casting="same_kind")
    return found


def mapped_features(file: Path, name: str = "features") -> FloatArray:
    """A float32 matrix of a safetensors file as a read-only memory map, of any size (an array for ``np.save``: its
    ``np.load(..., mmap_mode="r")`` does the same).

    Raises DataError when the file has no such matrix.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry: dict[str, Any] | None = json.loads(stream.read(length)).get(name)
    if entry is None or entry["dtype"] != "F32" or len(entry["shape"]) != 2:
        raise DataError(f"{file}: there is no float32 matrix called {name!r} in it")
    begin = 8 + length + entry["data_offsets"][0]
    return np.memmap(file, dtype="<f4", mode="r", offset=begin, shape=tuple(entry["shape"]))


def _part(width: int, settings: SearchSettings) -> int:
    """Training rows in memory at a time, a multiple of a block's columns: 4 bytes a feature, 1 for its 8-bit copy."""
    return max(1, int(settings.memory_gb * 1e9 / (5 * width * COLUMNS))) * COLUMNS


def _indexed(
    train: FloatArray, queries: FloatArray, k: int, settings: SearchSettings, seed: int
) -> tuple[IntArray, FloatArray]:
    need = len(train) * (4 * train.shape[1] * 2 + 8 * _LINKS) / 1e9  # features twice, links
    if need > settings.memory_gb:
        raise ConfigError(
            f"evaluate.knn.search: {settings.kind} needs about {need:.1f} GB of memory for {len(train)} images, "
            f"and evaluate.knn.memory_gb is {settings.memory_gb:g}; raise it, or use exact"
        )
    rows = normalized(train)
    with faiss_threads() as faiss:
        index = faiss.index_factory(rows.shape[1], _described(len(rows), settings), faiss.METRIC_INNER_PRODUCT)
        if settings.kind == "ivf":
            index.cp.seed, index.nprobe = seed + 1, settings.effort
        else:
            index.hnsw.efSearch = max(settings.effort, k)
        index.train(rows)
        index.add(rows)
        cosines, indices = index.search(queries, k)
    return _completed(rows, queries, indices.astype(np.int64), cosines)


def _described(count: int, settings: SearchSettings) -> str:
    """The index in faiss's words."""
    if settings.kind == "hnsw":
        return f"HNSW{_LINKS},Flat"
    return f"IVF{max(1, min(int(4 * count**0.5), count // 39))},Flat"  # k-means wants 39 rows a center


def _completed(
    rows: FloatArray, queries: FloatArray, indices: IntArray, cosines: npt.NDArray[np.float32]
) -> tuple[IntArray, FloatArray]:
    """Queries for which an index found fewer than k are searched exactly; ties in order of the index."""
    short = np.flatnonzero((indices < 0).any(axis=1))
    if len(short):
        indices[short], cosines[short] = search(rows, queries[short], indices.shape[1])
    order = np.lexsort((indices, -cosines), axis=1)
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(cosines, order, axis=1)
