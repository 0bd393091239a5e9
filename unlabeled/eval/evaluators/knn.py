"""Weighted nearest-neighbor classification on frozen features.

The protocol of DINO and DINOv2 (Caron et al. 2021, 2104.14294; Oquab et al. 2023, 2304.07193; facebookresearch/dinov2):
cosine similarity, one list of the largest k neighbors for each test image, each voting for its class with weight
softmax(similarity / temperature) over that list; a smaller k uses the first k votes. One departure: a class that no
neighbor votes for never counts as one of the five guesses of a top-5 accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

from unlabeled.eval.base import (
    Evaluator,
    EvaluatorConfig,
    FeatureSet,
    FeatureSplit,
    FloatArray,
    IntArray,
    Measure,
    Point,
    Value,
    check_features,
)
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.intervals import over_draws
from unlabeled.eval.neighbors.search import APPROXIMATE, SearchSettings, recall, search
from unlabeled.ssl.core.errors import ConfigError

_HEADLINE_K = 20
_HEADLINE_TEMPERATURE = 0.07
"""Both fixed beforehand: choosing them by test accuracy would flatter the result."""
_QUERIES = 2048
"""Test images that vote at a time; bounds the memory of the (queries, classes) scores."""


def _listed(value: Any) -> Any:
    """One number as a list of one."""
    return (value,) if isinstance(value, (int, float)) else value


class KnnConfig(EvaluatorConfig):
    """Weighted k-nearest-neighbor classification, following DINO's protocol."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbors that vote, one result for each. [neighbors]"""
    temperature: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)] = (0.07,)
    """Temperature of the weights of votes, one or a list. The headline result uses 0.07, or the first if 0.07 is not in
    the list."""
    search: Literal["exact", "reduced", "ivf", "hnsw"] = "exact"
    """exact: float32 products. reduced: 8-bit products first, then exact ones for the candidates; the neighbors are the
    same, and it is faster on processors with 8-bit instructions. ivf, hnsw: approximate; their recall is measured."""
    effort: int = Field(64, ge=1)
    """For ivf: lists to visit. For hnsw: breadth of the search, at least k."""
    memory_gb: float = Field(2.0, gt=0)
    """Training features to hold in memory at a time; ivf and hnsw need all of them. [GB]"""
    shots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also evaluate with only this many training images of each class, one result for each number in the list.
    [images]"""
    shot_draws: int = Field(5, ge=2)
    """For `shots`: random draws of these images; they give the mean and its confidence interval. [draws]"""


class KnnEvaluator(Evaluator):
    """kNN accuracy for each k and temperature of the settings.

    Yields, for each k (cut to the number of training images, which a ``note`` then says), ``k20`` and with more than
    five classes ``k20_top5`` as fractions; ``k20_t0.1`` and ``k20_t0.1_top5`` for temperatures beside that of the
    headline; then for k and temperature of the headline ``predictions`` int64 (N,), ``neighbors`` int64 (N, k), rows
    of the training split, most similar first, and ``similarities`` float32 (N, k). An approximate search adds
    ``recall``, measured against the exact one, and a ``note``.

    ``shot5`` is the mean accuracy with five training images of each class drawn at random, with the 95 % interval of
    Student's t over the draws: it says what the choice of the images does, not what the number of test images does.

    A test image that is also a training image finds itself: nothing is left out, keep the splits apart.
    """

    name: ClassVar = "knn"
    title: ClassVar = "Nearest neighbors"
    needs: ClassVar = "features"
    Config: ClassVar = KnnConfig

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
            return _RECALL
        if key.startswith("shot") and key[4:].isdigit():
            return _shots(int(key[4:]))
        parts = re.fullmatch(r"k(\d+)(?:_t([\d.e+-]+))?(_top5)?", key)
        return _votes(int(parts[1]), parts[2], 5 if parts[3] else 1) if parts is not None else None

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data = dataset.features
        check_features(data)
        count = len(data.train)
        wanted = [min(k, count) for k in self.config.k]
        headline = self.headline_k(count)
        if max(self.config.k) > count:
            yield "note", f"k was cut to {count}, the number of training images"
        neighbors, similarities = nearest_neighbors(
            data.train.features, data.test.features, max(wanted), self.config, seed=dataset.seed
        )
        for temperature in sorted(set(self.config.temperature), key=lambda one: (one != self.temperature, one)):
            guesses = _guesses(data, neighbors, similarities, sorted(set(wanted)), temperature)
            other = None if temperature == self.temperature else f"{temperature:g}"
            named = "" if other is None else f"_t{other}"
            curve = {"along": temperature} if len(set(wanted)) == 1 else {}
            for k in dict.fromkeys(wanted):
                hits = guesses[k] == data.test.labels[:, None]
                yield f"k{k}{named}", _votes(k, other, **curve).of(float(hits[:, 0].mean()))
                if len(data.classes) > 5:
                    yield f"k{k}{named}_top5", _votes(k, other, 5, **curve).of(float(hits.any(axis=1).mean()))
            if other is None:
                yield "predictions", guesses[headline][:, 0]
        yield "neighbors", neighbors[:, :headline]
        yield "similarities", similarities[:, :headline]
        if self.config.search in APPROXIMATE:
            yield from self._approximation(data, neighbors, dataset.seed)
        for shots in dict.fromkeys(self.config.shots):
            yield from self._few(data, shots, dataset.seed)

    def headline_k(self, count: int) -> int:
        """The k to quote with `count` training images: 20 when the settings have it, else the first."""
        return min(_HEADLINE_K if _HEADLINE_K in self.config.k else self.config.k[0], count)

    def _approximation(self, data: FeatureSet, neighbors: IntArray, seed: int) -> Iterator[tuple[str, Value]]:
        found = recall(data.train.features, data.test.features, neighbors, search_settings(self.config), seed=seed)
        yield "recall", _RECALL.of(found)
        yield "note", f"{self.config.search} is approximate: it found {found:.1%} of the {neighbors.shape[1]} nearest"

    def _few(self, data: FeatureSet, shots: int, seed: int) -> Iterator[tuple[str, Value]]:
        least = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
        if least < shots:
            yield "note", f"a class has {least} training images, fewer than {shots}: all that it has were taken"
        accuracies = []
        for draw in range(self.config.shot_draws):
            rows = _drawn(data.train.labels, shots, np.random.default_rng([seed, shots, draw]))
            few = replace(data, train=FeatureSplit(data.train.features[rows], data.train.labels[rows]))
            k = self.headline_k(len(rows))
            exact = replace(search_settings(self.config), kind="exact")
            found = search(few.train.features, data.test.features, k, exact)
            guesses = _guesses(few, *found, [k], self.temperature)[k]
            accuracies.append(float((guesses[:, 0] == data.test.labels).mean()))
        yield f"shot{shots}", _shots(shots).of(over_draws(accuracies))


_RECALL = Measure("kNN, recall of the approximate search", "percent")


def _votes(k: int, temperature: str | None = None, guesses: int = 1, *, along: float | None = None) -> Measure:
    """What the accuracy of `k` neighbors is; `temperature` None: that of the headline.

    It is a point over k, or, where there is one k alone, over the temperature `along`.
    """
    top, warm = f", top {guesses}" if guesses > 1 else "", f", T = {temperature}" if temperature else ""
    point = Point(f"kNN{warm}{top}", "k", k) if along is None else Point(f"kNN, k = {k}{top}", "T", along)
    return Measure(f"kNN, k = {k}{warm}{top}", point=point, guesses=guesses)


def _shots(shots: int) -> Measure:
    return Measure(f"kNN, {shots} images a class", "percent", point=Point("kNN", "images a class", shots))


def search_settings(config: KnnConfig) -> SearchSettings:
    """The part of the settings that says how neighbors are found."""
    return SearchSettings(config.search, config.effort, config.memory_gb)


def nearest_neighbors(
    train: FloatArray, test: FloatArray, k: int, settings: KnnConfig | None = None, *, seed: int = 0
) -> tuple[IntArray, FloatArray]:
    """The `k` rows of `train` most similar to each row of `test`: indices int64 and cosines float32 (Q, k).

    As `unlabeled.eval.neighbors.search.search`, which says more; exact unless `settings` say otherwise.
    """
    return search(train, test, k, search_settings(settings) if settings is not None else None, seed=seed)


def _drawn(labels: IntArray, shots: int, generator: np.random.Generator) -> IntArray:
    """Ascending rows: `shots` of each class, or all that it has."""
    rows = [generator.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def _guesses(
    data: FeatureSet, neighbors: IntArray, similarities: FloatArray, ks: list[int], temperature: float
) -> dict[int, IntArray]:
    """k → the (up to) five best classes of each test image, best first, int64 (N, 5)."""
    found: dict[int, list[IntArray]] = {k: [] for k in ks}
    for start in range(0, len(neighbors), _QUERIES):
        part = slice(start, start + _QUERIES)
        votes = data.train.labels[neighbors[part]]
        for k, scores in class_scores(votes, similarities[part], ks, temperature, len(data.classes)):
            found[k].append(best_classes(scores, 5))
    return {k: np.concatenate(parts) for k, parts in found.items()}


def class_scores(
    votes: IntArray, similarities: FloatArray, ks: list[int], temperature: float, classes: int
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """For each k of ascending `ks`: the summed weights of the first k votes for each class, float64 (N, classes).

    `votes` int64 (N, K) are the neighbors' labels, most similar first. The weights are a softmax over all K, so the
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
