"""The label-free measures of an encoder's training features."""

from __future__ import annotations

import numpy as np
import pytest
from eval_helpers import plain_pairs, plain_values

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.spectrum import SpectrumConfig, SpectrumEvaluator, dead_features, sample_rows
from unlabeled.eval.metrics import Spectrum, rankme, two_nn, uniformity
from unlabeled.ssl.core.errors import DataError

VALUES = {"rankme", "effective_rank", "alpha", "dimension", "learnability", "uniformity", "dead"}


def dataset(features: np.ndarray, seed: int = 0) -> EncodedDataset:
    split = FeatureSplit(features.astype(np.float32), np.zeros(len(features), np.int64))
    return EncodedDataset(FeatureSet(split, split, ("only",)), seed=seed)


def cloud(count: int = 300, width: int = 20) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)) * np.linspace(1, 4, width) + 1


def test_values_are_those_of_the_metrics_and_a_single_class_is_no_hindrance() -> None:
    features = cloud().astype(np.float32)
    found = plain_values(SpectrumEvaluator(SpectrumConfig()).run(dataset(features)))
    assert set(found) == {*VALUES, "images", "pairwise", "singular_values"}
    assert found["rankme"] == rankme(Spectrum.of(features))
    assert found["dimension"] == two_nn(features)
    assert found["uniformity"] == uniformity(features)
    assert found["images"] == found["pairwise"] == 300
    assert found["dead"] == 0
    expected = np.sqrt(np.linalg.eigvalsh(np.cov(features, rowvar=False, bias=True)))[::-1]
    np.testing.assert_allclose(found["singular_values"], expected, rtol=1e-5)


def test_every_value_of_the_table_has_a_meaning_and_counts_have_none() -> None:
    assert {key for key in VALUES if SpectrumEvaluator.measure(key)} == VALUES
    assert SpectrumEvaluator.measure("images") is None
    alpha = SpectrumEvaluator.measure("alpha")
    assert alpha is not None
    assert alpha.better is None


def test_images_are_limited_by_the_seed_alone() -> None:
    config = SpectrumConfig(images=100, pairwise=40)
    one, again, other = (
        plain_values(SpectrumEvaluator(config).run(dataset(cloud(), seed))) for seed in (0, 0, 1)
    )  # fmt: skip
    assert (one["images"], one["pairwise"]) == (100, 40)
    assert all(one[key] == again[key] for key in VALUES)
    assert one["rankme"] != other["rankme"]
    rows = sample_rows(300, 100, "spectrum", 0)
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(sample_rows(3, 10, "spectrum"), [0, 1, 2])


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_features_that_do_not_vary_give_finite_values_and_notes(value: float) -> None:
    pairs = plain_pairs(SpectrumEvaluator(SpectrumConfig()).run(dataset(np.full((40, 10), value))))
    found = dict(pairs)
    numbers = [number for number in found.values() if isinstance(number, float)]
    assert np.isfinite(numbers).all()
    assert found["dead"] == 1
    assert found["effective_rank"] == 0
    assert found["uniformity"] == pytest.approx(0, abs=1e-12)
    notes = [text for key, text in pairs if key == "note"]
    assert notes == [
        "α-ReQ needs 7 directions in which the features vary, and there are 0",
        "TwoNN needs three distinct feature vectors, and there are 1",
        "all features fall into one cluster; there is nothing to learn",
    ]


def test_duplicates_and_few_images() -> None:
    features = cloud(60)
    doubled = plain_values(SpectrumEvaluator(SpectrumConfig()).run(dataset(np.concatenate([features, features]))))
    assert doubled["dimension"] == pytest.approx(two_nn(features), rel=1e-3)
    few = plain_values(SpectrumEvaluator(SpectrumConfig()).run(dataset(cloud(12))))
    assert few["note"] == "ranks are limited by the number of images: 12 images with 20 features"
    assert few["rankme"] <= 12.001


def test_dead_features_are_counted_but_for_rounding() -> None:
    features = cloud(30, 8).astype(np.float32)
    features[:, 2] = 5
    features[:, 4] = 5 + 1e-7 * np.arange(30)
    features[:, 6] = 0
    assert dead_features(features) == 3 / 8


def test_broken_features_are_refused() -> None:
    features = cloud(30)
    features[3, 2] = np.nan
    with pytest.raises(DataError, match="1 of 30 features are NaN or infinite"):
        plain_values(SpectrumEvaluator(SpectrumConfig()).run(dataset(features)))
