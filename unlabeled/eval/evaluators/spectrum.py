"""Measures of the training features that need no labels: ranks, power law, intrinsic dimension, uniformity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from unlabeled.eval.base import Evaluator, EvaluatorConfig, FloatArray, IntArray, Measure, Value
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.metrics import (
    Spectrum,
    alpha_req,
    cluster_learnability,
    effective_rank,
    rankme,
    two_nn,
    uniformity,
)
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive

_DEAD = 1e-6
"""A feature that varies by less than this part of the largest value of any feature is dead."""
_MEASURES = {
    "rankme": Measure("RankMe", "number"),
    "effective_rank": Measure("effective rank of the centered features", "number"),
    "alpha": Measure("α-ReQ (best near 1)", "number", None),
    "dimension": Measure("intrinsic dimension (TwoNN)", "number", None),
    "learnability": Measure("cluster learnability (of CLID)", "percent", None),
    "uniformity": Measure("uniformity (-4 at best)", "number", "lower"),
    "dead": Measure("dead features", "percent", "lower"),
}


class SpectrumConfig(EvaluatorConfig):
    """Measures of the training features that need no labels: RankMe, α-ReQ, intrinsic dimension, uniformity."""

    images: int = Field(25_600, ge=2)
    """Training images to use, drawn with the seed; the default is that of the RankMe paper. [images]"""
    pairwise: int = Field(10_000, ge=2)
    """Of these, images for measures that compare pairs: intrinsic dimension, cluster learnability, uniformity.
    [images]"""


class SpectrumEvaluator(Evaluator):
    """Label-free measures of the training features: ranks, dimension, learnability, uniformity.

    Ranks and α are those of at most ``images`` images, the rest of at most ``pairwise`` of them, both drawn by the
    seed: most of these values grow with the number of images, so compare those of equal numbers. Dimension and
    learnability are the two parts of CLID, which has a value only among several encoders (`metrics.clid`).

    Yields ``rankme``, ``effective_rank``, ``alpha``, ``dimension``, ``learnability``, ``uniformity`` and ``dead`` (part
    of the features that do not vary); ``images`` and ``pairwise``, the numbers used; ``singular_values`` float64
    (min(N, D),) of the centered features over √N, deviations along the principal directions, largest first; and a
    ``note`` for each value that degenerate features do not have.
    """

    name: ClassVar = "spectrum"
    title: ClassVar = "Label-free measures"
    needs: ClassVar = "features"
    Config: ClassVar = SpectrumConfig

    def __init__(self, config: SpectrumConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        every, seed = dataset.features.train.features, dataset.seed
        features = every[chosen(len(every), self.config.images, "spectrum", seed)]
        spectrum = Spectrum.of(features)
        few = features[chosen(len(features), self.config.pairwise, "pairs", seed)]
        yield "rankme", _MEASURES["rankme"].of(rankme(spectrum))
        yield "effective_rank", _MEASURES["effective_rank"].of(effective_rank(spectrum))
        yield from _if_possible("alpha", lambda: alpha_req(spectrum))
        yield from _if_possible("dimension", lambda: two_nn(few))
        yield from _if_possible("learnability", lambda: cluster_learnability(few, seed=seed))
        yield "uniformity", _MEASURES["uniformity"].of(uniformity(few))
        yield "dead", _MEASURES["dead"].of(dead_features(features))
        yield "images", len(features)
        yield "pairwise", len(few)
        yield "singular_values", spectrum.centered / np.sqrt(spectrum.count)
        if len(features) <= features.shape[1]:
            yield (
                "note",
                f"{len(features)} images of {features.shape[1]} features: ranks cannot be more than the images",
            )


def dead_features(features: FloatArray) -> float:
    """Part of the features (N, D) that are the same for every image, but for rounding."""
    spread = features.max(axis=0) - features.min(axis=0)
    return float((spread <= _DEAD * np.abs(features).max()).mean())


def chosen(count: int, limit: int, *purpose: int | str) -> IntArray:
    """At most `limit` of `count` rows, ascending, int64; which ones follows from `purpose` alone."""
    if limit >= count:
        return np.arange(count)
    drawn = np.random.default_rng(derive(*purpose)).choice(count, size=limit, replace=False)
    return np.sort(drawn).astype(np.int64)


def _if_possible(key: str, value: Callable[[], float]) -> Iterator[tuple[str, Value]]:
    try:
        yield key, _MEASURES[key].of(value())
    except DataError as error:
        yield "note", str(error).removeprefix("evaluate: ")
