"""Made-up features of two splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset


def clouds(count: int, classes: int, *, spread: float = 1.0, seed: int = 0, width: int = 16) -> FeatureSplit:
    """Normal clouds around fixed centers, the classes in turn."""
    centers = np.random.default_rng(7).normal(size=(classes, width))
    labels = np.arange(count) % classes
    features = centers[labels] + spread * np.random.default_rng(seed).normal(size=(count, width))
    return FeatureSplit(features.astype(np.float32), labels)


def dataset(train: FeatureSplit, test: FeatureSplit, *, seed: int = 0) -> EncodedDataset:
    """Bare features, with as many classes as there are labels."""
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return EncodedDataset(FeatureSet(train, test, tuple(f"class {n}" for n in range(classes))), seed=seed)


def labeled(split: FeatureSplit, *labels: int) -> FeatureSplit:
    """`split` with these labels in turn."""
    return replace(split, labels=np.resize(np.array(labels), len(split)))


def same(split: FeatureSplit, value: float = 3.0) -> FeatureSplit:
    """`split` with the same features for all images."""
    return replace(split, features=np.full_like(split.features, value))


def broken(split: FeatureSplit) -> FeatureSplit:
    """`split` with NaN in its first row."""
    features = split.features.copy()
    features[0, 0] = np.nan
    return replace(split, features=features)
