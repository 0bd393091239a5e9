"""Nearest class mean: the simplest classifier on frozen features (Mensink et al., 2013)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from unlabeled import EncodedDataset, Evaluator, EvaluatorConfig, FloatArray, Measure, Point, Value, check_features


class CentroidConfig(EvaluatorConfig):
    """Settings of the nearest class mean."""

    unit_length: bool = True
    """Scale features to unit length first, so that directions are compared."""
    shots: tuple[int, ...] = ()
    """Also with the means of so many training images of each class, drawn by the seed."""


class Centroid(Evaluator):
    """Accuracy of the class whose mean training feature is nearest.

    Yields ``top1`` with all training images, ``shot5`` with five of each class, and ``predictions`` int64 (N,).
    """

    name: ClassVar = "centroid"
    title: ClassVar = "Nearest class mean"
    Config: ClassVar = CentroidConfig

    def __init__(self, config: CentroidConfig) -> None:
        self.config = config

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data = dataset.features
        check_features(data)
        train, test = (self._scaled(split.features) for split in (data.train, data.test))
        members = [np.flatnonzero(data.train.labels == label) for label in np.unique(data.train.labels)]
        classes = np.array([data.train.labels[rows[0]] for rows in members])

        def predicted(chosen: list[np.ndarray]) -> np.ndarray:
            means = np.stack([train[rows].mean(axis=0) for rows in chosen])
            distances = ((test[:, None] - means[None]) ** 2).sum(axis=2)  # (N, classes)
            nearest: np.ndarray = classes[distances.argmin(axis=1)]
            return nearest

        guesses = predicted(members)
        yield "top1", Measure("nearest class mean").of((guesses == data.test.labels).mean())
        yield "predictions", guesses
        for shots in self.config.shots:
            generator = np.random.default_rng([dataset.seed, shots])
            few = predicted([generator.permutation(rows)[:shots] for rows in members])
            measure = Measure(f"class mean of {shots} images", point=Point("class mean", "images", shots))
            yield f"shot{shots}", measure.of((few == data.test.labels).mean())

    def _scaled(self, features: FloatArray) -> np.ndarray:
        lengths = np.linalg.norm(features, axis=1, keepdims=True) if self.config.unit_length else 1
        return features / np.where(lengths == 0, 1, lengths)
