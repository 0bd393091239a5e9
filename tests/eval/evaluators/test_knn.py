"""Weighted kNN against brute force, closed forms and the published implementation's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import plain_values
from sklearn.neighbors import KNeighborsClassifier

from unlabeled.eval.base import Estimate, FeatureSet, FeatureSplit, Measured, Point
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import KnnConfig, KnnEvaluator, best_classes, class_scores, nearest_neighbors
from unlabeled.eval.intervals import over_draws
from unlabeled.ssl.core.errors import ConfigError, DataError


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def clusters(count: int, classes: int, *, spread: float = 1.0, seed: int = 0) -> FeatureSplit:
    """Normal clouds around fixed centers in 16 dimensions."""
    centers = np.random.default_rng(7).normal(size=(classes, 16))
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = centers[labels] + spread * generator.normal(size=(count, 16))
    return FeatureSplit(features.astype(np.float32), labels)


def brute_force(train: FeatureSplit, test: FeatureSplit, k: int, temperature: float, classes: int) -> np.ndarray:
    """Scores by the definition, one test image after the other."""
    rows = []
    for query in test.features.astype(np.float64):
        cosines = [
            query @ other / np.linalg.norm(query) / np.linalg.norm(other) for other in train.features.astype(np.float64)
        ]
        nearest = sorted(range(len(cosines)), key=lambda row: -cosines[row])[:k]
        scores = np.zeros(classes)
        for row in nearest:
            scores[train.labels[row]] += np.exp(cosines[row] / temperature)
        rows.append(scores / scores.sum())
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_accuracy_and_scores_are_those_of_brute_force(k: int) -> None:
    train, test = clusters(120, 8, spread=2, seed=1), clusters(100, 8, spread=2, seed=2)
    expected = brute_force(train, test, k, 0.07, 8)
    found = plain_values(KnnEvaluator(KnnConfig(k=(k, 30))).run(EncodedDataset(FeatureSet(train, test, names(8)))))
    assert found[f"k{k}"] == pytest.approx((expected.argmax(1) == test.labels).mean())
    np.testing.assert_array_equal(found["predictions"], expected.argmax(1))
    indices, similarities = nearest_neighbors(train.features, test.features, k)
    ((_, scores),) = class_scores(train.labels[indices], similarities, [k], 0.07, 8)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    ranked = np.sort(np.argsort(-expected, axis=1)[:, :5], axis=1)
    guessed = [row in order for row, order in zip(test.labels, ranked, strict=True)]
    if k == 30:
        assert found["k30_top5"] == pytest.approx(np.mean(guessed))


def test_a_near_neighbor_outvotes_two_far_ones_exactly_as_the_temperature_says() -> None:
    train = FeatureSplit(np.array([[1, 0], [0, 1], [0, 1]], np.float32), np.array([0, 1, 1]))
    ((_, scores),) = class_scores(np.array([[0, 1, 1]]), np.array([[0.8, 0.6, 0.6]], np.float32), [3], 0.1, 2)
    np.testing.assert_allclose(scores[0, 0], 1 / (1 + 2 * np.exp(-2)), rtol=1e-6)
    test = FeatureSplit(np.array([[0.8, 0.6]], np.float32), np.array([0]))
    sharp = plain_values(
        KnnEvaluator(KnnConfig(k=(3,), temperature=0.1)).run(EncodedDataset(FeatureSet(train, test, names(2))))
    )
    blunt = plain_values(
        KnnEvaluator(KnnConfig(k=(3,), temperature=10)).run(EncodedDataset(FeatureSet(train, test, names(2))))
    )
    assert (sharp["k3"], blunt["k3"]) == (1.0, 0.0)


def test_top5_counts_the_five_best_and_never_a_class_without_a_vote() -> None:
    scores = np.array([[0.1, 0.2, 0.3, 0.15, 0.05, 0.2], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(best_classes(scores, 5), [[2, 1, 5, 3, 0], [2, -1, -1, -1, -1]])


def test_top5_only_with_more_than_five_classes_and_headline_is_k20_or_the_first() -> None:
    data = FeatureSet(clusters(60, 5), clusters(20, 5, seed=9), names(5))
    found = plain_values(KnnEvaluator(KnnConfig(k=(3, 20))).run(EncodedDataset(data)))
    assert {key for key in found if key.startswith("k")} == {"k3", "k20"}
    assert found["neighbors"].shape == found["similarities"].shape == (20, 20)
    assert plain_values(KnnEvaluator(KnnConfig(k=(3, 5))).run(EncodedDataset(data)))["neighbors"].shape == (20, 3)


def test_k_beyond_the_training_set_is_cut_and_said() -> None:
    data = FeatureSet(clusters(15, 3), clusters(6, 3, seed=4), names(3))
    found = plain_values(KnnEvaluator(KnnConfig(k=(10, 20, 100))).run(EncodedDataset(data)))
    assert found["note"] == "k = 20 and 100 need more training images than the 15 here; k = 15 is used instead"
    assert {key for key in found if key.startswith("k")} == {"k10", "k15"}
    assert found["neighbors"].shape == (6, 15)


def test_zero_and_huge_vectors_are_safe() -> None:
    train = clusters(12, 3)
    train.features[0] = 0
    train.features[1] *= 1e30
    test = FeatureSplit(np.stack([np.zeros(16), train.features[1]]).astype(np.float32), np.array([0, 1]))
    found = plain_values(KnnEvaluator(KnnConfig(k=(1, 12))).run(EncodedDataset(FeatureSet(train, test, names(3)))))
    assert np.isfinite(found["similarities"]).all()
    assert found["predictions"][1] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_features_are_refused(value: float) -> None:
    test = clusters(9, 3)
    test.features[2, 1] = value
    with pytest.raises(DataError, match="1 of 9 test features are NaN or infinite"):
        plain_values(KnnEvaluator(KnnConfig()).run(EncodedDataset(FeatureSet(clusters(9, 3), test, names(3)))))


def test_unusable_labels_and_splits_are_refused() -> None:
    evaluator, good = KnnEvaluator(KnnConfig()), clusters(9, 3)
    single = FeatureSplit(good.features, np.full(9, 2))
    with pytest.raises(DataError, match="all training images are of class 'class 2'"):
        plain_values(evaluator.run(EncodedDataset(FeatureSet(single, good, names(3)))))
    with pytest.raises(DataError, match="test label 2 is outside the 2 classes"):
        plain_values(
            evaluator.run(EncodedDataset(FeatureSet(FeatureSplit(good.features, good.labels % 2), good, names(2))))
        )
    with pytest.raises(DataError, match="training label -1 is outside"):
        plain_values(
            evaluator.run(EncodedDataset(FeatureSet(FeatureSplit(good.features, good.labels - 1), good, names(3))))
        )
    empty = FeatureSplit(good.features[:0], good.labels[:0])
    with pytest.raises(DataError, match="test split has no readable image"):
        plain_values(evaluator.run(EncodedDataset(FeatureSet(good, empty, names(3)))))


@pytest.mark.parametrize("k", [(), (0,), (5, -1)])
def test_impossible_k_is_refused(k: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.knn\.k: \["):
        KnnEvaluator(KnnConfig(k=k))


def test_scikit_learn_with_the_same_weights_agrees() -> None:
    train, test = clusters(200, 8, spread=2, seed=11), clusters(80, 8, spread=2, seed=12)
    model = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(train.features, train.labels)
    found = plain_values(KnnEvaluator(KnnConfig(k=(20,))).run(EncodedDataset(FeatureSet(train, test, names(8)))))
    np.testing.assert_array_equal(found["predictions"], model.predict(test.features))


def test_several_temperatures_have_keys_of_their_own_and_the_headline_stays() -> None:
    data = FeatureSet(clusters(90, 6, spread=3, seed=1), clusters(60, 6, spread=3, seed=2), names(6))
    found = plain_values(KnnEvaluator(KnnConfig(k=(20, 50), temperature=[1, 0.07, 0.2])).run(EncodedDataset(data)))
    keys = [key for key in found if key.startswith("k")]
    assert keys[:4] == ["k20", "k20_top5", "k50", "k50_top5"]
    assert set(keys[4:]) == {f"k{k}_t{t}{rest}" for k in (20, 50) for t in ("0.2", "1") for rest in ("", "_top5")}
    for temperature, named in ((0.07, ""), (0.2, "_t0.2"), (1.0, "_t1")):
        alone = plain_values(KnnEvaluator(KnnConfig(k=(20, 50), temperature=temperature)).run(EncodedDataset(data)))
        assert [alone["k50"], alone["k50_top5"]] == [found[f"k50{named}"], found[f"k50{named}_top5"]]
        if not named:
            np.testing.assert_array_equal(alone["predictions"], found["predictions"])
    assert found["k50"] != found["k50_t1"]


def test_labels_of_what_is_yielded() -> None:
    labels = {key: getattr(KnnEvaluator.measure(key), "label", None) for key in (
        "k20", "k20_top5", "k20_t0.1", "k200_t1e-05_top5", "shot5", "recall", "predictions", "k_", "k20_t", "kNN",
    )}  # fmt: skip
    assert list(labels.values()) == [
        "kNN, k = 20", "kNN, k = 20, top 5", "kNN, k = 20, T = 0.1", "kNN, k = 200, T = 1e-05, top 5",
        "kNN, 5 images per class", "kNN, recall of the approximate search", None, None, None, None,
    ]  # fmt: skip


def test_few_shots_are_the_mean_over_draws_of_images() -> None:
    data = FeatureSet(clusters(300, 6, spread=3, seed=3), clusters(200, 6, spread=3, seed=4), names(6))
    config = KnnConfig(k=(20,), shots=(2, 10), shot_draws=4)
    found = plain_values(KnnEvaluator(config).run(EncodedDataset(data, seed=5)))
    again = plain_values(KnnEvaluator(config).run(EncodedDataset(data, seed=5)))
    other = plain_values(KnnEvaluator(config).run(EncodedDataset(data, seed=6)))
    assert (found["shot2"], found["shot10"]) == (again["shot2"], again["shot10"])
    assert found["shot2"] != other["shot2"]
    assert found["shot2"].low < found["shot2"].value < found["shot2"].high
    assert found["shot2"].value < found["shot10"].value < found["k20"]
    every = plain_values(KnnEvaluator(KnnConfig(k=(20,), shots=(50,))).run(EncodedDataset(data)))
    assert every["shot50"] == Estimate(every["k20"], every["k20"], every["k20"])  # each draw takes all 50 of a class
    assert "note" not in every


def test_a_class_with_too_few_images_is_taken_whole_and_said() -> None:
    train = clusters(30, 3)
    rare = FeatureSplit(train.features, np.where(np.arange(30) < 2, 0, 1 + np.arange(30) % 2))
    found = plain_values(
        KnnEvaluator(KnnConfig(k=(5,), shots=(4,))).run(EncodedDataset(FeatureSet(rare, clusters(9, 3), names(3))))
    )
    assert found["note"] == "a class has only 2 training images, fewer than 4: all of them were used"
    assert 0 <= found["shot4"].low <= found["shot4"].high <= 1


def test_the_interval_over_draws_is_that_of_student() -> None:
    found = over_draws([0.5, 0.6, 0.7])
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t with two degrees of freedom
    assert over_draws([0.99, 1.0]).high == 1.0


def test_an_approximate_search_says_so() -> None:
    data = FeatureSet(clusters(3000, 6, spread=3, seed=7), clusters(50, 6, spread=3, seed=8), names(6))
    found = plain_values(KnnEvaluator(KnnConfig(k=(20,), search="ivf", effort=1)).run(EncodedDataset(data)))
    exact = plain_values(KnnEvaluator(KnnConfig(k=(20,))).run(EncodedDataset(data)))
    hits = [len(set(a) & set(b)) for a, b in zip(found["neighbors"], exact["neighbors"], strict=True)]
    assert found["recall"] == pytest.approx(np.mean(hits) / 20)
    assert found["note"].startswith("ivf is approximate: it found ")
    assert "recall" not in exact


def test_features_on_disk_are_judged_as_those_in_memory(tmp_path: Path) -> None:
    data = FeatureSet(clusters(300, 6, spread=3, seed=3), clusters(50, 6, spread=3, seed=4), names(6))
    np.save(tmp_path / "train.npy", data.train.features)
    stored = replace(data.train, features=np.load(tmp_path / "train.npy", mmap_mode="r"))
    config = KnnConfig(shots=(3,), memory_gb=1e-6)
    found = plain_values(KnnEvaluator(config).run(EncodedDataset(replace(data, train=stored))))
    expected = plain_values(KnnEvaluator(config).run(EncodedDataset(data)))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found if key != "shot3")
    assert found["shot3"] == expected["shot3"]


def test_no_temperature_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.knn\.temperature: \[\] is not possible"):
        KnnEvaluator(KnnConfig(temperature=()))


def test_several_temperatures_make_a_curve_where_there_is_one_k_alone() -> None:
    data = FeatureSet(clusters(60, 3), clusters(20, 3), names(3))
    one = dict(KnnEvaluator(KnnConfig(k=(20,), temperature=(0.07, 0.2))).run(EncodedDataset(data)))
    points = {key: value.measure.point for key, value in one.items() if isinstance(value, Measured)}
    assert points == {"k20": Point("kNN, k = 20", "T", 0.07), "k20_t0.2": Point("kNN, k = 20", "T", 0.2)}
    two = dict(KnnEvaluator(KnnConfig(k=(5, 20), temperature=(0.07, 0.2))).run(EncodedDataset(data)))
    points = {key: value.measure.point for key, value in two.items() if isinstance(value, Measured)}
    assert points["k20"] == Point("kNN", "k", 20)
    assert points["k5_t0.2"] == Point("kNN, T = 0.2", "k", 5)
