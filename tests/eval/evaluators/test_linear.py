"""The linear probe: its accuracy against scikit-learn's, what it chooses by, its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from eval_helpers import plain_values
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.linear import (
    LinearConfig,
    LinearEvaluator,
    confusion_matrix,
    statistics,
    stratified_split,
)
from unlabeled.ssl.core.errors import ConfigError, DataError

FAST = LinearConfig(epochs=20, batch_size=64)


def clouds(count: int, *, spread: float, seed: int, classes: int = 4) -> FeatureSplit:
    """Normal clouds in 20 dimensions of very unlike scales and offsets."""
    centers = np.random.default_rng(3).normal(size=(classes, 20))
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % classes)
    features = centers[labels] + spread * generator.normal(size=(count, 20))
    return FeatureSplit((features * np.logspace(-2, 2, 20) + 5).astype(np.float32), labels)


def dataset(spread: float, *, train: int = 400, test: int = 300) -> FeatureSet:
    return FeatureSet(clouds(train, spread=spread, seed=1), clouds(test, spread=spread, seed=2), tuple("abcd"))


def test_the_evaluator_survives_a_diverging_setting_and_refuses_when_all_diverge() -> None:
    data = dataset(0.3)
    found = plain_values(
        LinearEvaluator(LinearConfig(lr=(0.01, 1e38), weight_decay=(0.0,), epochs=10)).run(EncodedDataset(data))
    )
    assert found["lr"] == 0.01
    assert found["diverged"] == 1
    assert found["top1"] > 0.95
    with pytest.raises(DataError, match=r"evaluate\.linear\.lr: all 1 heads diverged"):
        plain_values(
            LinearEvaluator(LinearConfig(lr=(1e38,), weight_decay=(0.0,), epochs=10)).run(EncodedDataset(data))
        )


@pytest.mark.parametrize(("spread", "least"), [(0.2, 0.99), (1.5, 0.5)])
def test_accuracy_is_that_of_logistic_regression(spread: float, least: float) -> None:
    data = dataset(spread, train=800, test=1000)
    scaler = StandardScaler().fit(data.train.features)
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(data.train.features), data.train.labels)
    expected = reference.score(scaler.transform(data.test.features), data.test.labels)
    found = plain_values(LinearEvaluator(FAST).run(EncodedDataset(data)))
    assert expected > least, "the case must be neither hopeless nor, for the noisy one, trivial"
    assert found["top1"] == pytest.approx(expected, abs=0.02)


def test_values_agree_with_each_other_and_repeat() -> None:
    data = dataset(1.0)
    found, again = (plain_values(LinearEvaluator(FAST).run(EncodedDataset(data, seed=5))) for _ in range(2))
    assert found["top1"] == (found["predictions"] == data.test.labels).mean()
    assert np.trace(found["confusion"]) == pytest.approx(found["top1"] * len(data.test))
    assert found["confusion"].sum() == len(data.test)
    assert found["lr"] in FAST.lr
    assert found["weight_decay"] in FAST.weight_decay
    assert "top5" not in found
    np.testing.assert_array_equal(found["predictions"], again["predictions"])
    assert found["holdout_top1"] == again["holdout_top1"]


def test_top5_is_given_from_six_classes_on() -> None:
    train, test = (clouds(240, spread=2.0, seed=seed, classes=8) for seed in (1, 2))
    found = plain_values(LinearEvaluator(FAST).run(EncodedDataset(FeatureSet(train, test, tuple("abcdefgh")))))
    assert found["top1"] < found["top5"] < 1


def test_the_test_split_never_chooses() -> None:
    """With the test labels shuffled, the same setting is chosen with the same hold-out accuracy."""
    data = dataset(1.0)
    shuffled = FeatureSplit(data.test.features, np.roll(data.test.labels, 1))
    one, two = (
        plain_values(LinearEvaluator(FAST).run(EncodedDataset(FeatureSet(data.train, test, data.classes))))
        for test in (data.test, shuffled)
    )
    assert [one[key] for key in ("lr", "weight_decay", "holdout_top1")] == [
        two[key] for key in ("lr", "weight_decay", "holdout_top1")
    ]
    assert one["top1"] != two["top1"]


def test_the_edge_of_the_grid_is_said() -> None:
    data = dataset(1.0)
    notes = plain_values(
        LinearEvaluator(LinearConfig(lr=(1e-9, 2e-9, 1e-3), weight_decay=(0.0,), epochs=5)).run(EncodedDataset(data))
    )
    assert "learning rate, 0.001, is the largest one tried" in notes["note"]


def test_features_without_variance_are_harmless() -> None:
    data = dataset(0.3)
    for split in (data.train, data.test):
        split.features[:, 4] = 1e4 + 1 / 3
    mean, deviation = statistics(data.train.features)
    assert deviation[4] == 1
    np.testing.assert_allclose(mean, data.train.features.mean(0), rtol=1e-4)
    assert plain_values(LinearEvaluator(FAST).run(EncodedDataset(data)))["top1"] > 0.95


def test_fewer_images_than_a_batch_and_a_class_of_one_image_work() -> None:
    train, test = clouds(21, spread=0.1, seed=1), clouds(20, spread=0.1, seed=2)
    train.labels[train.labels == 3] = np.where(np.cumsum(train.labels == 3)[train.labels == 3] == 1, 3, 2)
    assert (train.labels == 3).sum() == 1
    found = plain_values(LinearEvaluator(LinearConfig()).run(EncodedDataset(FeatureSet(train, test, tuple("abcd")))))
    assert found["confusion"].shape == (4, 4)


def test_degenerate_inputs_are_refused() -> None:
    data = dataset(1.0)
    single = FeatureSplit(data.train.features, np.zeros_like(data.train.labels))
    with pytest.raises(DataError, match="all training images are of class 'a'"):
        plain_values(LinearEvaluator(FAST).run(EncodedDataset(FeatureSet(single, data.test, data.classes))))
    data.train.features[0, 0] = np.nan
    with pytest.raises(DataError, match="1 of 400 training features are NaN or infinite"):
        plain_values(LinearEvaluator(FAST).run(EncodedDataset(data)))
    lone = FeatureSplit(np.eye(4, 20, dtype=np.float32), np.arange(4))
    with pytest.raises(DataError, match="4 training images, one per class, are too few"):
        plain_values(LinearEvaluator(FAST).run(EncodedDataset(FeatureSet(lone, data.test, data.classes))))


@pytest.mark.parametrize(
    ("field", "value"), [("lr", ()), ("lr", (0.0,)), ("lr", (float("nan"),)), ("weight_decay", (-1.0,))]
)
def test_impossible_grids_are_refused(field: str, value: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.linear\.{field}: \["):
        LinearEvaluator(LinearConfig.model_validate({field: value}))


def test_the_hold_out_is_stratified_and_disjoint() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    kept, held_out = stratified_split(labels, 0.1, seed=0)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [5, 1, 1, 0]
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))
    assert np.bincount(labels[stratified_split(labels, 0.99, seed=0)[0]]).tolist() == [1, 1, 1, 1]
    assert not np.array_equal(held_out, stratified_split(labels, 0.1, seed=1)[1])


def test_confusion_rows_are_the_truth() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([1, 0, 1, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
