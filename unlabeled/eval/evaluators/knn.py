"""Weighted nearest-neighbour classification on frozen features.

The protocol of DINO and DINOv2 (Caron et al. 2021, 2104.14294; Oquab et al. 2023, 2304.07193; facebookresearch/dinov2):
cosine similarity, one list of the largest k neighbours for each test picture, each voting for its class with weight
softmax(similarity / temperature) over that list; a smaller k uses the first k votes. One departure: a class that no
neighbour votes for never counts as one of the five guesses of a top-5 accuracy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from unlabeled.eval.base import FeatureSet, FloatArray, IntArray, Measure, Value, check_features
from unlabeled.eval.settings import KnnConfig
from unlabeled.eval.subject import Subject
from unlabeled.ssl.errors import ConfigError

_HEADLINE_K = 20
"""Fixed beforehand: choosing k by its test accuracy would flatter the result."""
_QUERIES = 2048
"""Test pictures that vote at a time; bounds the memory of the (queries, classes) scores."""


class KnnEvaluator:
    """kNN accuracy for each k of the settings.

    Yields, for each k (cut to the number of training pictures, which a ``note`` then says), ``k20`` and with more than
    five classes ``k20_top5`` as fractions; then for the k of the headline ``predictions`` int64 (N,), ``neighbours``
    int64 (N, k), rows of the training split, most similar first, and ``similarities`` float32 (N, k).
    """

    name: ClassVar = "knn"
    title: ClassVar = "Nearest neighbours"
    needs: ClassVar = "features"

    def __init__(self, config: KnnConfig) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(
                f"evaluate.knn.k: {list(config.k)} is not possible; give whole numbers from 1, such as [20]"
            )
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        first, _, rest = key.partition("_")
        if first[:1] != "k" or not first[1:].isdigit() or rest not in ("", "top5"):
            return None
        return Measure(f"kNN, k = {first[1:]}" + (", top 5" if rest else ""))

    def run(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        data = subject.features
        check_features(data)
        count = len(data.train)
        wanted = [min(k, count) for k in self.config.k]
        headline = self.headline_k(count)
        if max(self.config.k) > count:
            yield "note", f"k was cut to {count}, the number of training pictures"
        neighbours, similarities = nearest_neighbours(data.train.features, data.test.features, max(wanted))
        guesses = self._guesses(data, neighbours, similarities, sorted(set(wanted)))
        for k in dict.fromkeys(wanted):
            hits = guesses[k] == data.test.labels[:, None]
            yield f"k{k}", float(hits[:, 0].mean())
            if len(data.classes) > 5:
                yield f"k{k}_top5", float(hits.any(axis=1).mean())
        yield "predictions", guesses[headline][:, 0]
        yield "neighbours", neighbours[:, :headline]
        yield "similarities", similarities[:, :headline]

    def headline_k(self, count: int) -> int:
        """The k to quote with `count` training pictures: 20 when the settings have it, else the first."""
        return min(_HEADLINE_K if _HEADLINE_K in self.config.k else self.config.k[0], count)

    def _guesses(
        self, data: FeatureSet, neighbours: IntArray, similarities: FloatArray, ks: list[int]
    ) -> dict[int, IntArray]:
        """k → the (up to) five best classes of each test picture, best first, int64 (N, 5)."""
        found: dict[int, list[IntArray]] = {k: [] for k in ks}
        for start in range(0, len(neighbours), _QUERIES):
            part = slice(start, start + _QUERIES)
            votes = data.train.labels[neighbours[part]]
            for k, scores in class_scores(votes, similarities[part], ks, self.config.temperature, len(data.classes)):
                found[k].append(best_classes(scores, 5))
        return {k: np.concatenate(parts) for k, parts in found.items()}


def nearest_neighbours(train: FloatArray, test: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """The `k` rows of `train` most similar to each row of `test`: indices int64 (N, k) and cosines float32 (N, k).

    Zero vectors have similarity 0 to everything.
    """
    import faiss  # loads its own OpenMP runtime, which a run without kNN does not need

    index = faiss.IndexFlatIP(train.shape[1])
    with faiss_threads():
        index.add(normalized(train))
        similarities, indices = index.search(normalized(test), k)
    return indices.astype(np.int64), similarities


@contextmanager
def faiss_threads() -> Iterator[None]:
    """As many threads for faiss as torch has; one on macOS, where two OpenMP runtimes with several threads crash."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def normalized(features: FloatArray) -> FloatArray:
    """Rows of unit L2 norm, float32 (N, D); zero rows stay zero."""
    wide = features.astype(np.float64)  # squares of large float32 values overflow
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.ascontiguousarray(wide / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def class_scores(
    votes: IntArray, similarities: FloatArray, ks: list[int], temperature: float, classes: int
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """For each k of ascending `ks`: the summed weights of the first k votes for each class, float64 (N, classes).

    `votes` int64 (N, K) are the neighbours' labels, most similar first. The weights are a softmax over all K, so the
    scores of a smaller k add up to less than 1.
    """
    logits = similarities.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    cells = np.arange(len(votes))[:, None] * classes + votes
    scores = np.zeros(len(votes) * classes)
    done = 0
    for k in ks:
        scores = scores + np.bincount(
            cells[:, done:k].ravel(), weights=weights[:, done:k].ravel(), minlength=len(scores)
        )
        done = k
        yield k, scores.reshape(len(votes), classes)


def best_classes(scores: npt.NDArray[np.floating[Any]], count: int) -> IntArray:
    """The `count` classes of highest score, best first, int64 (N, min(count, C)); ties go to the lower class.

    -1 stands where fewer classes have a positive score.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(scores, order, axis=1) > 0, order, -1).astype(np.int64)
