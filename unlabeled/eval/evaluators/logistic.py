"""Logistic regression: the convex counterpart of the linear probe, solved to convergence by L-BFGS (scikit-learn).

This is the protocol of CLIP's linear evaluation (Radford et al. 2021, 2103.00020): an L2 penalty is selected on
held-out training images, and the classifier is fitted again on all of them. Without a learning rate or a schedule, it
shows what a well-tuned linear probe can reach.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unlabeled.eval.base import Evaluator, EvaluatorConfig, FloatArray, IntArray, Measure, Value, check_features
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import best_classes
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.seeds import derive

DoubleArray = npt.NDArray[np.float64]
_MEASURES = {"top1": Measure("logistic regression"), "top5": Measure("logistic regression, top 5", guesses=5)}


class LogisticConfig(EvaluatorConfig):
    """Logistic regression on standardized features, solved by L-BFGS: what a well-tuned linear probe can reach."""

    C: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """Inverse strengths of the L2 penalty to try, in scikit-learn's convention."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training set that is held out to choose C. [fraction]"""
    iterations: int = Field(1000, ge=1)
    """Largest number of L-BFGS iterations. [iterations]"""
    limit: int | None = Field(20_000, ge=2)
    """Use at most this many training images, drawn class by class; null: all, which is slow. [images]"""


class LogisticEvaluator(Evaluator):
    """Accuracy of L2-regularized logistic regression on standardized features.

    A classifier is fitted for every C (inverse strength of the penalty) on the training split minus a stratified
    hold-out. The hold-out selects C (ties: lower log loss, then smaller C), and the classifier is fitted again on the
    entire training split. At most `limit` training images are used, drawn class by class; a ``note`` reports it.

    Yields ``top1`` and, with more than five classes, ``top5`` as fractions; ``C``; ``predictions`` int64 (N,); and a
    ``note`` if C is at the edge of the list or L-BFGS did not converge.
    """

    name: ClassVar = "logistic"
    title: ClassVar = "Logistic regression"
    needs: ClassVar = "features"
    Config: ClassVar = LogisticConfig

    def __init__(self, config: LogisticConfig) -> None:
        if not config.C or not all(math.isfinite(value) and value > 0 for value in config.C):
            raise ConfigError(f"evaluate.logistic.C: {list(config.C)} is not possible; give positive numbers")
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data, config = dataset.features, self.config
        check_features(data)
        classes, features, labels = len(data.classes), data.train.features, data.train.labels
        if config.limit is not None and config.limit < len(labels):
            rows = stratified(labels, config.limit / len(labels), derive(dataset.seed, "logistic limit"))
            yield "note", f"fitted on {len(rows):,} of {len(labels):,} training images (evaluate.logistic.limit)"
            features, labels = features[rows], labels[rows]
        wanted = sorted(set(config.C))
        chosen = wanted[0] if len(wanted) == 1 else self._choose(features, labels, wanted, dataset.seed)
        if chosen is None:
            chosen = wanted[len(wanted) // 2]
            yield (
                "note",
                f"with one training image per class, C cannot be selected; the middle value, {chosen:g}, was used",
            )
        fit = fit_logistic(features, labels, [chosen], config.iterations)
        guesses = best_classes(fit.probabilities(data.test.features, classes), 5)
        hits = guesses == data.test.labels[:, None]
        yield "top1", _MEASURES["top1"].of(float(hits[:, 0].mean()))
        if classes > 5:
            yield "top5", _MEASURES["top5"].of(float(hits.any(axis=1).mean()))
        yield "C", chosen
        yield "predictions", guesses[:, 0]
        if len(wanted) > 2 and chosen in (wanted[0], wanted[-1]):
            yield "note", f"the selected C {chosen:g} is at the edge of the list; evaluate.logistic.C may be too narrow"
        if not fit.converged:
            yield "note", f"L-BFGS stopped after {config.iterations} iterations; raise evaluate.logistic.iterations"

    def _choose(self, features: FloatArray, labels: IntArray, wanted: list[float], seed: int) -> float | None:
        """The best C on held-out images; None if every class has only one image."""
        kept = stratified(labels, 1 - self.config.holdout, derive(seed, "logistic holdout"), spare=1)
        held_out = np.setdiff1d(np.arange(len(labels)), kept)
        if len(held_out) == 0:
            return None
        classes, truth = int(labels.max()) + 1, labels[held_out]
        fit = fit_logistic(features[kept], labels[kept], wanted, self.config.iterations)
        scores = {}
        for inverse in wanted:
            found = fit.probabilities(features[held_out], classes, inverse)
            # a probability may underflow to 0, and log(0) would decide every tie
            loss = -np.log(np.maximum(found[np.arange(len(held_out)), truth], np.finfo(np.float64).tiny)).mean()
            scores[inverse] = (float((found.argmax(axis=1) == truth).mean()), -float(loss), -inverse)
        return max(wanted, key=scores.__getitem__)


@dataclass(frozen=True)
class LogisticFit:
    """Classifiers fitted to one training set, one for each C."""

    scaler: Any
    """scikit-learn's StandardScaler, fitted to the training features."""
    models: dict[float, Any]
    """C → fitted classifier."""
    converged: bool
    """Whether L-BFGS reached its tolerance for every C."""

    def probabilities(self, features: FloatArray, classes: int, inverse: float | None = None) -> DoubleArray:
        """Class probabilities float64 (N, `classes`) of features (N, D), with C = `inverse` (None: the only one).

        Classes without a training image get probability 0.
        """
        model = next(iter(self.models.values())) if inverse is None else self.models[inverse]
        found = np.zeros((len(features), classes))
        found[:, model.classes_] = model.predict_proba(self.scaler.transform(features.astype(np.float64)))
        return found


def fit_logistic(features: FloatArray, labels: IntArray, inverses: Sequence[float], iterations: int) -> LogisticFit:
    """Standardizes features (N, D) and fits a multinomial classifier for each C of `inverses`.

    `labels` (N,) must contain at least two classes.
    """
    wide = features.astype(np.float64)
    scaler = StandardScaler().fit(wide)
    rows = scaler.transform(wide)
    with warnings.catch_warnings(record=True) as caught:  # the only sign of a fit that did not converge
        warnings.simplefilter("always", ConvergenceWarning)
        models = {value: LogisticRegression(C=value, max_iter=iterations).fit(rows, labels) for value in inverses}
    return LogisticFit(scaler, models, not any(issubclass(w.category, ConvergenceWarning) for w in caught))


def stratified(labels: IntArray, fraction: float, seed: int, *, spare: int = 0) -> IntArray:
    """A random subset with about `fraction` of each class, and at least one image of each: ascending rows.

    At least `spare` images of each class are left out, as far as one remains.
    """
    generator = np.random.default_rng(seed)
    drawn: list[IntArray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        drawn.append(members[: max(1, min(round(fraction * len(members)), len(members) - spare))])
    return np.sort(np.concatenate(drawn))
