"""Weighted nearest-neighbor classification on frozen features.

This is the protocol of DINO and DINOv2 (Caron et al. 2021, 2104.14294; Oquab et al. 2023, 2304.07193; repository
facebookresearch/dinov2). The nearest training images by cosine similarity, as many as the largest k, vote for their
class with weight softmax(similarity / temperature) over all of them; a smaller k uses the first k votes. One departure:
a class without any vote never counts among the five guesses of a top-5 accuracy.
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
from unlabeled.eval.notes import cut_k
from unlabeled.ssl.core.errors import ConfigError

_HEADLINE_K = 20
_HEADLINE_TEMPERATURE = 0.07
"""Both are fixed in advance, since choosing them by test accuracy would inflate the result."""
_QUERIES = 2048
"""Test images classified at a time; bounds the memory of the (queries, classes) scores."""


def _listed(value: Any) -> Any:
    """A single number as a list of one."""
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
    """Accuracy of weighted k-nearest-neighbor classification, for each k and temperature in the settings.

    Yields, for each k, ``k20`` and, with more than five classes, ``k20_top5``, as fractions; ``k20_t0.1`` and
    ``k20_t0.1_top5`` for temperatures other than that of the headline. If k exceeds the number of training images, it
    is cut, and a ``note`` reports it. For the headline's k and temperature, also ``predictions`` int64 (N,),
    ``neighbors`` int64 (N, k), which are rows of the training split, most similar first, and ``similarities`` float32
    (N, k). An approximate search adds its ``recall`` and a ``note``.

    ``shot5`` is the mean accuracy with five training images per class drawn at random, with Student's 95 % interval
    over the draws. The interval covers the choice of training images, not that of test images.

    Training and test split must not overlap: a test image that is also a training image is its own neighbor.
    """

    name: ClassVar = "knn"
    title: ClassVar = "Nearest neighbors"
    needs: ClassVar = "features"
    Config: ClassVar = KnnConfig

    def __init__(self, config: KnnConfig) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(
                f"evaluate.knn.k: {list(config.k)} is not possible; give integers of at least 1, such as [20]"
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
        match = re.fullmatch(r"k(\d+)(?:_t([\d.e+-]+))?(_top5)?", key)
        return _votes(int(match[1]), match[2], 5 if match[3] else 1) if match is not None else None

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data = dataset.features
        check_features(data)
        count = len(data.train)
        wanted = [min(k, count) for k in self.config.k]
        headline = self.headline_k(count)
        if (note := cut_k(self.config.k, count, "training images")) is not None:
            yield "note", note
        # one search for all k
        neighbors, similarities = nearest_neighbors(
            data.train.features, data.test.features, max(wanted), self.config, seed=dataset.seed
        )
        # the headline's temperature first
        for temperature in sorted(set(self.config.temperature), key=lambda one: (one != self.temperature, one)):
            guesses = _guesses(data, neighbors, similarities, sorted(set(wanted)), temperature)
            other = None if temperature == self.temperature else f"{temperature:g}"
            suffix = "" if other is None else f"_t{other}"
            # a single k gives no curve over k, so its values form one over the temperatures
            curve = {"along": temperature} if len(set(wanted)) == 1 else {}
            for k in dict.fromkeys(wanted):
                hits = guesses[k] == data.test.labels[:, None]
                yield f"k{k}{suffix}", _votes(k, other, **curve).of(float(hits[:, 0].mean()))
                if len(data.classes) > 5:
                    yield f"k{k}{suffix}_top5", _votes(k, other, 5, **curve).of(float(hits.any(axis=1).mean()))
            if other is None:
                yield "predictions", guesses[headline][:, 0]
        yield "neighbors", neighbors[:, :headline]
        yield "similarities", similarities[:, :headline]
        if self.config.search in APPROXIMATE:
            yield from self._approximation(data, neighbors, dataset.seed)
        for shots in dict.fromkeys(self.config.shots):
            yield from self._few(data, shots, dataset.seed)

    def headline_k(self, count: int) -> int:
        """The k of the headline with `count` training images: 20 if it is in the settings, else the first one."""
        return min(_HEADLINE_K if _HEADLINE_K in self.config.k else self.config.k[0], count)

    def _approximation(self, data: FeatureSet, neighbors: IntArray, seed: int) -> Iterator[tuple[str, Value]]:
        found = recall(data.train.features, data.test.features, neighbors, search_settings(self.config), seed=seed)
        yield "recall", _RECALL.of(found)
        yield (
            "note",
            f"{self.config.search} is approximate: it found {found:.1%} of the {neighbors.shape[1]} nearest neighbors",
        )

    def _few(self, data: FeatureSet, shots: int, seed: int) -> Iterator[tuple[str, Value]]:
        least = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
        if least < shots:
            yield "note", f"a class has only {least} training images, fewer than {shots}: all of them were used"
        accuracies = []
        for draw in range(self.config.shot_draws):
            rows = _drawn(data.train.labels, shots, np.random.default_rng([seed, shots, draw]))
            few = replace(data, train=FeatureSplit(data.train.features[rows], data.train.labels[rows]))
            k = self.headline_k(len(rows))
            exact = replace(search_settings(self.config), kind="exact")  # so few images need no index
            found = search(few.train.features, data.test.features, k, exact)
            guesses = _guesses(few, *found, [k], self.temperature)[k]
            accuracies.append(float((guesses[:, 0] == data.test.labels).mean()))
        yield f"shot{shots}", _shots(shots).of(over_draws(accuracies))


_RECALL = Measure("kNN, recall of the approximate search", "percent")


def _votes(k: int, temperature: str | None = None, guesses: int = 1, *, along: float | None = None) -> Measure:
    """Describes the accuracy with `k` neighbors; `temperature` is None for that of the headline.

    The value is a point on a curve over k, or, with `along`, on a curve over temperatures at temperature `along`.
    """
    top, scaled = f", top {guesses}" if guesses > 1 else "", f", T = {temperature}" if temperature else ""
    point = Point(f"kNN{scaled}{top}", "k", k) if along is None else Point(f"kNN, k = {k}{top}", "T", along)
    return Measure(f"kNN, k = {k}{scaled}{top}", point=point, guesses=guesses)


def _shots(shots: int) -> Measure:
    return Measure(f"kNN, {shots} images per class", "percent", point=Point("kNN", "images per class", shots))


def search_settings(config: KnnConfig) -> SearchSettings:
    """The settings of the neighbor search."""
    return SearchSettings(config.search, config.effort, config.memory_gb)


def nearest_neighbors(
    train: FloatArray, test: FloatArray, k: int, settings: KnnConfig | None = None, *, seed: int = 0
) -> tuple[IntArray, FloatArray]:
    """The `k` rows of `train` most similar to each row of `test`: indices int64 and cosines float32, (Q, k) each.

    See `unlabeled.eval.neighbors.search.search` for details. Without `settings`, the search is exact.
    """
    return search(train, test, k, search_settings(settings) if settings is not None else None, seed=seed)


def _drawn(labels: IntArray, shots: int, generator: np.random.Generator) -> IntArray:
    """Ascending rows: `shots` random ones of each class, or all of a smaller class."""
    rows = [generator.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def _guesses(
    data: FeatureSet, neighbors: IntArray, similarities: FloatArray, ks: list[int], temperature: float
) -> dict[int, IntArray]:
    """k → the five best classes of each test image, best first, int64 (N, 5); -1 for missing ones."""
    found: dict[int, list[IntArray]] = {k: [] for k in ks}
    for start in range(0, len(neighbors), _QUERIES):
        chunk = slice(start, start + _QUERIES)
        votes = data.train.labels[neighbors[chunk]]
        for k, scores in class_scores(votes, similarities[chunk], ks, temperature, len(data.classes)):
            found[k].append(best_classes(scores, 5))
    return {k: np.concatenate(chunks) for k, chunks in found.items()}


def class_scores(
    votes: IntArray, similarities: FloatArray, ks: list[int], temperature: float, classes: int
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yields (k, scores) for each k of ascending `ks`: summed weights of the first k votes, float64 (N, classes).

    `votes` int64 (N, K) are the neighbors' labels, most similar first. The weights are a softmax over all K, so the
    scores of a smaller k sum to less than 1.
    """
    logits = similarities.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))  # the maximum cancels, but exp cannot overflow
    weights /= weights.sum(axis=1, keepdims=True)
    cells = np.arange(len(votes))[:, None] * classes + votes  # index of (image, class) in the flat scores
    scores = np.zeros(len(votes) * classes)
    done = 0
    for k in ks:
        # only the votes that a larger k adds
        scores = scores + np.bincount(
            cells[:, done:k].ravel(), weights=weights[:, done:k].ravel(), minlength=len(scores)
        )
        done = k
        yield k, scores.reshape(len(votes), classes)


def best_classes(scores: npt.NDArray[np.floating[Any]], count: int) -> IntArray:
    """The `count` classes with the highest scores, best first, int64 (N, min(count, C)); ties go to the lower class.

    Classes without a positive score are replaced by -1.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(scores, order, axis=1) > 0, order, -1).astype(np.int64)
