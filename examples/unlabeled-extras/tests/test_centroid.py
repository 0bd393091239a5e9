"""Nearest class mean: the contract, and what is particular to the evaluator."""

from __future__ import annotations

import numpy as np

from unlabeled import EncodedDataset, FeatureSet, FeatureSplit, Measured, check_evaluator
from unlabeled_extras.centroid import Centroid, CentroidConfig


def test_contract() -> None:
    check_evaluator(Centroid, settings={"shots": [1, 5]})


def test_the_nearest_mean_wins_and_scale_does_not_matter() -> None:
    train = FeatureSplit(np.array([[1, 0], [3, 0], [0, 1], [0, 5]], np.float32), np.array([0, 0, 2, 2]))
    test = FeatureSplit(np.array([[9, 1], [0.1, 0.2], [1, 0]], np.float32), np.array([0, 2, 2]))
    found = dict(Centroid(CentroidConfig()).run(EncodedDataset(FeatureSet(train, test, ("a", "b", "c")))))
    assert np.array_equal(found["predictions"], [0, 2, 0])
    assert isinstance(found["top1"], Measured)
    assert found["top1"].value == 2 / 3
