"""Points of a plane from features: who is near whom, and what is drawn when there is little to draw."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from eval_helpers import MemorySource, tiny_vit

from unlabeled.eval.base import FeatureSplit
from unlabeled.eval.embedding import embed
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import ConfigError, DataError


def groups(count: int, kinds: int = 3, width: int = 16) -> FeatureSplit:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % kinds
    return FeatureSplit(
        (rng.normal(size=(kinds, width))[labels] * 5 + rng.normal(size=(count, width))).astype("f"), labels
    )


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_neighbors_of_the_plane_are_of_the_same_group(method: str) -> None:
    found = embed(groups(60), method)
    assert found.points.shape == (60, 2)
    assert found.points.dtype == np.float32
    distances = np.linalg.norm(found.points[:, None] - found.points[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (found.labels[distances.argmin(axis=1)] == found.labels).mean() > 0.95
    again = embed(groups(60), method)
    np.testing.assert_array_equal(found.points, again.points)


def test_the_first_two_components_are_those_of_the_covariance() -> None:
    split = groups(40)
    found = embed(split, "pca")
    unit = split.features / np.linalg.norm(split.features, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit, rowvar=False))
    expected = (unit - unit.mean(axis=0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found.points), np.abs(expected), atol=1e-5)
    np.testing.assert_allclose(found.points.var(axis=0, ddof=1), values[::-1][:2], rtol=1e-4)


def test_at_most_so_many_images_drawn_by_seed_and_said() -> None:
    one, other = embed(groups(300), "pca", images=100, seed=1), embed(groups(300), "pca", images=100, seed=2)
    assert len(one.points) == len(one.labels) == 100
    assert not np.array_equal(one.labels, other.labels) or not np.array_equal(one.points, other.points)
    assert (
        one.method
        == "The first two principal components of 100 test images drawn at random, on L2-normalized features, seed 1"
    )


def test_too_few_or_equal_images_give_components() -> None:
    assert embed(groups(20), "tsne").method.startswith("The first two principal components")
    equal = embed(FeatureSplit(np.ones((60, 8), np.float32), np.zeros(60, np.int64)), "tsne")
    np.testing.assert_array_equal(equal.points, 0)
    narrow = embed(FeatureSplit(np.arange(60, dtype=np.float32)[:, None], np.zeros(60, np.int64)), "tsne")
    assert narrow.points.shape == (60, 2)
    duplicates = embed(FeatureSplit(np.repeat(groups(15).features, 4, axis=0), np.arange(60)), "tsne")
    assert np.isfinite(duplicates.points).all()
    assert embed(groups(1), "tsne").points.shape == (1, 2)


def test_features_that_are_not_finite_are_refused() -> None:
    split = groups(60)
    split.features[3, 1] = np.nan
    with pytest.raises(DataError, match=r"^evaluate\.embedding: features are NaN or infinite"):
        embed(split, "tsne")


def test_a_missing_library_is_said_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "umap" else found(name, *rest))
    train, test = MemorySource(12), MemorySource(6, split="test")
    with pytest.raises(ConfigError, match=r"^evaluate\.embedding: umap needs umap-learn; pip install"):
        evaluate_backbone(tiny_vit(), train, test, EvaluateConfig(embedding="umap"))
    assert train.reads == 0
