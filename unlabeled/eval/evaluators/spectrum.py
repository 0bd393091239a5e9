"""Label-free measures of the training features: ranks, power law, intrinsic dimension, uniformity."""

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
"""A feature is dead if it varies by less than this fraction of the largest absolute value of all features."""
_MEASURES = {
    "rankme": Measure("RankMe", "number"),
    "effective_rank": Measure("effective rank of the centered features", "number"),
    "alpha": Measure("α-ReQ (best near 1)", "number", None),
    "dimension": Measure("intrinsic dimension (TwoNN)", "number", None),
    "learnability": Measure("cluster learnability (part of CLID)", "percent", None),
    "uniformity": Measure("uniformity (best near -4)", "number", "lower"),
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
    """Ranks, power law, intrinsic dimension, cluster learnability and uniformity of the training features.

    Ranks and α are computed on at most ``images`` images, the other values on at most ``pairwise`` of these, both drawn
    with the seed. Most values grow with the number of images, so compare only values for equal numbers. Dimension and
    learnability are the two terms of CLID, which is defined only for several encoders (`metrics.clid`).

    Yields ``rankme``, ``effective_rank``, ``alpha``, ``dimension``, ``learnability``, ``uniformity`` and ``dead``, the
    fraction of features that do not vary; the numbers of ``images`` and ``pairwise`` images used; ``singular_values``
    float64 (min(N, D),) of the centered features divided by √N, which are the standard deviations along the principal
    directions, largest first; and a ``note`` for each value that is undefined for degenerate features.
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
        train, seed = dataset.features.train.features, dataset.seed
        features = train[sample_rows(len(train), self.config.images, "spectrum", seed)]
        spectrum = Spectrum.of(features)
        few = features[sample_rows(len(features), self.config.pairwise, "pairs", seed)]
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
                f"ranks are limited by the number of images: {len(features)} images with {features.shape[1]} features",
            )


def dead_features(features: FloatArray) -> float:
    """Fraction of the D features (N, D) that are the same for all images, up to rounding."""
    spread = features.max(axis=0) - features.min(axis=0)
    return float((spread <= _DEAD * np.abs(features).max()).mean())


def sample_rows(count: int, limit: int, *purpose: int | str) -> IntArray:
    """A random sample of at most `limit` of `count` rows, ascending, int64 (n,); `purpose` is the seed."""
    if limit >= count:
        return np.arange(count)
    drawn = np.random.default_rng(derive(*purpose)).choice(count, size=limit, replace=False)
    return np.sort(drawn).astype(np.int64)


def _if_possible(key: str, value: Callable[[], float]) -> Iterator[tuple[str, Value]]:
    """Yields the value, or a note if it is undefined for these features."""
    try:
        yield key, _MEASURES[key].of(value())
    except DataError as error:
        yield "note", str(error).removeprefix("evaluate: ")
