"""Weighted nearest-neighbour classification on frozen features.

The protocol of DINO and DINOv2 (Caron et al. 2021, 2104.14294; Oquab et al. 2023, 2304.07193; facebookresearch/dinov2):
cosine similarity, one list of the largest k neighbours for each test picture, each voting for its class with weight
softmax(similarity / temperature) over that list; a smaller k uses the first k votes. One departure: a class that no
neighbour votes for never counts as one of the five guesses of a top-5 accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from unlabeled.eval.base import (
    FeatureSet,
    FeatureSplit,
    FloatArray,
    IntArray,
    Measure,
    Value,
    check_features,
)
from unlabeled.eval.intervals import over_draws
from unlabeled.eval.neighbors.search import APPROXIMATE, recall, search
from unlabeled.eval.settings import KnnConfig
from unlabeled.eval.subject import Subject
from unlabeled.ssl.core.errors import ConfigError

_HEADLINE_K = 20
_HEADLINE_TEMPERATURE = 0.07
"""Both fixed beforehand: choosing them by test accuracy would flatter the result."""
_QUERIES = 2048
"""Test pictures that vote at a time; bounds the memory of the (queries, classes) scores."""


class KnnEvaluator:
    """kNN accuracy for each k and temperature of the settings.

    Yields, for each k (cut to the number of training pictures, which a ``note`` then says), ``k20`` and with more than
    five classes ``k20_top5`` as fractions; ``k20_t0.1`` and ``k20_t0.1_top5`` for temperatures beside that of the
    headline; then for k and temperature of the headline ``predictions`` int64 (N,), ``neighbours`` int64 (N, k), rows
    of the training split, most similar first, and ``similarities`` float32 (N, k). An approximate search adds
    ``recall``, measured against the exact one, and a ``note``.

    ``shot5`` is the mean accuracy with five training pictures of each class drawn at random, with the 95 % interval of
    Student's t over the draws: it says what the choice of the pictures does, not what the number of test pictures does.

    A test picture that is also a training picture finds itself: nothing is left out, keep the splits apart.
    """

    name: ClassVar = "knn"
    title: ClassVar = "Nearest neighbours"
    needs: ClassVar = "features"

    def __init__(self, config: KnnConfig) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(
                f"evaluate.knn.k: {list(config.k)} is not possible; give whole numbers from 1, such as [20]"
            )
        if not config.temperature:
            raise ConfigError("evaluate.knn.temperature: [] is not possible; give positive numbers, such as [0.07]")
        self.config = config
        given = config.temperature
        self.temperature = _HEADLINE_TEMPERATURE if _HEADLINE_TEMPERATURE in given else given[0]

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        if key == "recall":
            return Measure("kNN, recall of the approximate search", "percent")
        if key.startswith("shot") and key[4:].isdigit():
            return Measure(f"kNN, {key[4:]} pictures a class", "percent")
        parts = re.fullmatch(r"k(\d+)(?:_t([\d.e+-]+))?(_top5)?", key)
        if parts is None:
            return None
        k, temperature, top5 = parts.groups()
        return Measure(f"kNN, k = {k}" + (f", T = {temperature}" if temperature else "") + (", top 5" if top5 else ""))

    def run(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        data = subject.features
        check_features(data)
        count = len(data.train)
        wanted = [min(k, count) for k in self.config.k]
        headline = self.headline_k(count)
        if max(self.config.k) > count:
            yield "note", f"k was cut to {count}, the number of training pictures"
        neighbours, similarities = nearest_neighbours(
            data.train.features, data.test.features, max(wanted), self.config, seed=subject.seed
        )
        for temperature in sorted(set(self.config.temperature), key=lambda one: (one != self.temperature, one)):
            guesses = _guesses(data, neighbours, similarities, sorted(set(wanted)), temperature)
            named = "" if temperature == self.temperature else f"_t{temperature:g}"
            for k in dict.fromkeys(wanted):
                hits = guesses[k] == data.test.labels[:, None]
                yield f"k{k}{named}", float(hits[:, 0].mean())
                if len(data.classes) > 5:
                    yield f"k{k}{named}_top5", float(hits.any(axis=1).mean())
            if not named:
                yield "predictions", guesses[headline][:, 0]
        yield "neighbours", neighbours[:, :headline]
        yield "similarities", similarities[:, :headline]
        if self.config.search in APPROXIMATE:
            yield from self._approximation(data, neighbours, subject.seed)
        for shots in dict.fromkeys(self.config.shots):
            yield from self._few(data, shots, subject.seed)

    def headline_k(self, count: int) -> int:
        """The k to quote with `count` training pictures: 20 when the settings have it, else the first."""
        return min(_HEADLINE_K if _HEADLINE_K in self.config.k else self.config.k[0], count)

    def _approximation(self, data: FeatureSet, neighbours: IntArray, seed: int) -> Iterator[tuple[str, Value]]:
        found = recall(data.train.features, data.test.features, neighbours, self.config, seed=seed)
        yield "recall", found
        yield "note", f"{self.config.search} is approximate: it found {found:.1%} of the {neighbours.shape[1]} nearest"

    def _few(self, data: FeatureSet, shots: int, seed: int) -> Iterator[tuple[str, Value]]:
        least = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
        if least < shots:
            yield "note", f"a class has {least} training pictures, fewer than {shots}: all that it has were taken"
        accuracies = []
        for draw in range(self.config.shot_draws):
            rows = _drawn(data.train.labels, shots, np.random.default_rng([seed, shots, draw]))
            few = replace(data, train=FeatureSplit(data.train.features[rows], data.train.labels[rows]))
            k = self.headline_k(len(rows))
            exact = self.config.model_copy(update={"search": "exact"})
            found = nearest_neighbours(few.train.features, data.test.features, k, exact)
            guesses = _guesses(few, *found, [k], self.temperature)[k]
            accuracies.append(float((guesses[:, 0] == data.test.labels).mean()))
        yield f"shot{shots}", over_draws(accuracies)


def nearest_neighbours(
    train: FloatArray, test: FloatArray, k: int, settings: KnnConfig | None = None, *, seed: int = 0
) -> tuple[IntArray, FloatArray]:
    """The `k` rows of `train` most similar to each row of `test`: indices int64 and cosines float32 (Q, k).

    As `unlabeled.eval.neighbors.search.search`, which says more; exact unless `settings` say otherwise.
    """
    return search(train, test, k, settings, seed=seed)


def _drawn(labels: IntArray, shots: int, generator: np.random.Generator) -> IntArray:
    """Ascending rows: `shots` of each class, or all that it has."""
    rows = [generator.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def _guesses(
    data: FeatureSet, neighbours: IntArray, similarities: FloatArray, ks: list[int], temperature: float
) -> dict[int, IntArray]:
    """k → the (up to) five best classes of each test picture, best first, int64 (N, 5)."""
    found: dict[int, list[IntArray]] = {k: [] for k in ks}
    for start in range(0, len(neighbours), _QUERIES):
        part = slice(start, start + _QUERIES)
        votes = data.train.labels[neighbours[part]]
        for k, scores in class_scores(votes, similarities[part], ks, temperature, len(data.classes)):
            found[k].append(best_classes(scores, 5))
    return {k: np.concatenate(parts) for k, parts in found.items()}


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
