"""Few labels: the linear probe with a small fraction of the training labels.

Self-supervised methods are often compared with 1 % and 10 % of the labels (Chen et al. 2020, 2002.05709); here on
frozen features. With fewer than five images per class, nothing can be held out to select settings, so logistic
regression with a fixed penalty replaces the probe, as in evaluations with so few labels (Assran et al. 2022,
2204.07141).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from unlabeled.eval.base import (
    Evaluator,
    EvaluatorConfig,
    FeatureSplit,
    IntArray,
    Measure,
    Measured,
    Point,
    Value,
    check_features,
)
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.linear import LinearConfig, LinearEvaluator
from unlabeled.eval.evaluators.logistic import fit_logistic, stratified
from unlabeled.eval.intervals import over_draws
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.seeds import derive

_FEWEST = 5
"""Images per class, on average, that the linear probe needs to select its settings."""
_ITERATIONS = 1000


class LowLabelConfig(EvaluatorConfig):
    """The linear probe with only a fraction of the labels."""

    fractions: tuple[float, ...] = (0.01, 0.1)
    """Fractions of the training labels, drawn class by class, one result for each. [fraction]"""
    draws: int = Field(3, ge=1)
    """Random draws of the labeled images; they give the confidence interval. [draws]"""
    steps: int = Field(500, ge=1)
    """Smallest number of optimizer steps, since an epoch of few images has few steps. [steps]"""
    C: float = Field(0.01, gt=0)
    """Inverse strength of the penalty of logistic regression, which replaces the probe below five images per class."""
    probe: LinearConfig = LinearConfig()
    """Settings of the probe, as in evaluate.linear."""


class LowLabelEvaluator(Evaluator):
    """Test accuracy of a linear probe with a fraction of the training labels, averaged over several draws.

    The labeled images are drawn class by class, at least one of each. Yields ``1pct`` and so on: the mean with
    Student's 95 % interval over the draws, which covers the choice of training images, not that of test images (a
    single draw has no interval); and a ``note`` if a fraction is less than one image per class or too small for a
    hold-out. Raises DataError for the same data as the linear probe.
    """

    name: ClassVar = "low_label"
    title: ClassVar = "Few labels"
    needs: ClassVar = "features"
    Config: ClassVar = LowLabelConfig

    def __init__(self, config: LowLabelConfig) -> None:
        if not config.fractions or not all(0 < fraction <= 1 for fraction in config.fractions):
            raise ConfigError(
                f"evaluate.low_label.fractions: {list(config.fractions)} is not possible; give numbers above 0 and up "
                "to 1, such as [0.01, 0.1]"
            )
        try:  # refuses invalid settings of the probe before anything is computed
            LinearEvaluator(config.probe)
        except ConfigError as error:
            raise ConfigError(str(error).replace("evaluate.linear", "evaluate.low_label.probe")) from None
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        number = key.removesuffix("pct")
        if number == key or not number.replace(".", "", 1).isdigit():
            return None
        return _with_labels(number)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        labels = dataset.features.train.labels
        check_features(dataset.features)
        for fraction in dict.fromkeys(self.config.fractions):
            key = f"{100 * fraction:g}"
            draws = [
                stratified(labels, fraction, derive(dataset.seed, "low_label", key, draw))
                for draw in range(self.config.draws)
            ]
            count, classes = len(draws[0]), len(np.unique(labels))
            if fraction * len(labels) < classes:
                yield "note", f"{key} % is less than one image per class; {count} of {len(labels):,} images were used"
            if count < _FEWEST * classes:
                yield (
                    "note",
                    f"{key} %: {count / classes:.1f} images per class are too few to select settings, so logistic "
                    f"regression with C = {self.config.C:g} was used",
                )
            accuracies = [self._accuracy(dataset, rows, classes) for rows in draws]
            yield f"{key}pct", _with_labels(key).of(over_draws(accuracies))

    def _accuracy(self, dataset: EncodedDataset, rows: IntArray, classes: int) -> float:
        """Test accuracy with the labels of the training images `rows` only."""
        subset = replace(dataset.features, train=_rows(dataset.features.train, rows))
        if len(rows) < _FEWEST * classes:
            fit = fit_logistic(subset.train.features, subset.train.labels, [self.config.C], _ITERATIONS)
            found = fit.probabilities(subset.test.features, len(subset.classes)).argmax(axis=1)
            return float((found == subset.test.labels).mean())
        probe = self.config.probe
        # few images make short epochs: more of them give the probe enough steps
        per_epoch = max(1, len(rows) // probe.batch_size)
        epochs = max(probe.epochs, math.ceil(self.config.steps / per_epoch))
        values = LinearEvaluator(probe.model_copy(update={"epochs": epochs})).run(replace(dataset, features=subset))
        return next(value.value for key, value in values if key == "top1" and isinstance(value, Measured))


def _with_labels(percent: str) -> Measure:
    """Describes the accuracy with `percent` % of the labels, such as ``0.5``."""
    return Measure(f"{percent} % of labels", point=Point("% of labels", "% of labels", float(percent)))


def _rows(split: FeatureSplit, rows: IntArray) -> FeatureSplit:
    """The images `rows` of `split`."""
    indices = rows if split.indices is None else split.indices[rows]
    return replace(split, features=split.features[rows], labels=split.labels[rows], indices=indices)
