"""Episodes: against nearest centroids of scikit-learn, closed forms, and splits that are too small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from eval_helpers import plain_pairs, plain_values
from feature_helpers import broken, clouds, dataset, labeled, same
from sklearn.neighbors import NearestCentroid

from unlabeled.eval.base import Estimate, FeatureSplit
from unlabeled.eval.evaluators.few_shot import FewShotConfig, FewShotEvaluator, episodes, possible
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive

SHORT = FewShotConfig(episodes=40)


def run(config: FewShotConfig, train: FeatureSplit, test: FeatureSplit) -> tuple[list[str], dict]:
    pairs = plain_pairs(FewShotEvaluator(config).run(dataset(train, test)))
    return [value for key, value in pairs if key == "note"], {k: v for k, v in pairs if k != "note"}


def test_episodes_are_those_of_nearest_centroids() -> None:
    split = clouds(160, 8, spread=2, seed=1)
    members = [np.flatnonzero(split.labels == label) for label in range(8)]
    found = episodes(split.features, members, 4, 3, 6, 25, seed=9)
    generator = np.random.default_rng(9)
    expected = []
    for _ in range(25):
        right = 0
        drawn = [generator.choice(members[one], 9, replace=False) for one in generator.permutation(8)[:4]]
        support = np.concatenate([rows[:3] for rows in drawn])
        assert len(np.unique(np.concatenate(drawn))) == 36, "no image twice in an episode"
        model = NearestCentroid().fit(split.features[support].astype(np.float64), split.labels[support])
        for rows in drawn:
            right += (model.predict(split.features[rows[3:]].astype(np.float64)) == split.labels[rows[3:]]).sum()
        expected.append(right / 24)
    np.testing.assert_allclose(found, expected)
    assert 0.4 < found.mean() < 0.95


def test_features_are_centered_on_training_and_scaled_to_unit_length() -> None:
    train, test = clouds(60, 6, spread=1.5, seed=1), clouds(180, 6, spread=1.5, seed=2)
    _, values = run(SHORT, train, test)
    centered = (test.features - train.features.mean(0)).astype(np.float64)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    members = [np.flatnonzero(test.labels == label) for label in range(6)]
    accuracy = episodes(centered, members, 5, 5, 15, 40, derive(0, "few_shot", 5))
    estimate = values["5way_5shot"]
    assert estimate.value == pytest.approx(accuracy.mean())
    half = 1.96 * accuracy.std(ddof=1) / np.sqrt(40)
    assert (estimate.low, estimate.high) == (
        pytest.approx(accuracy.mean() - half),
        pytest.approx(accuracy.mean() + half),
    )
    lengths = np.random.default_rng(0).uniform(0.1, 9, size=(180, 1))
    moved = replace(test, features=(train.features.mean(0) + centered * lengths).astype(np.float32))
    assert run(SHORT, train, moved)[1]["5way_5shot"].value == pytest.approx(accuracy.mean(), abs=1e-3)


def test_clear_and_meaningless_features() -> None:
    clear = run(SHORT, clouds(60, 6, spread=0.01), clouds(180, 6, spread=0.01, seed=2))[1]
    assert clear == {"5way_1shot": Estimate(1, 1, 1), "5way_5shot": Estimate(1, 1, 1)}
    nothing = run(SHORT, same(clouds(60, 6)), same(clouds(180, 6)))[1]
    assert [value.value for value in nothing.values()] == pytest.approx([0.2, 0.2])


def test_queries_then_ways_are_cut_and_said() -> None:
    notes, values = run(FewShotConfig(ways=3, episodes=5, shots=(1, 5)), clouds(20, 4), clouds(24, 4, seed=1))
    assert list(values) == ["3way_1shot", "3way_5shot"]
    assert notes == [
        "1-shot: the test split allows only 3 ways and 5 queries per class instead of 3 and 15",
        "5-shot: the test split allows only 3 ways and 1 queries per class instead of 3 and 15",
    ]
    uneven = labeled(clouds(24, 4, seed=1), *[0] * 11, *[1] * 11, 2, 3)
    notes, values = run(FewShotConfig(episodes=5, shots=(1, 5, 50)), clouds(20, 4), uneven)
    assert list(values) == ["2way_1shot", "2way_5shot"]
    assert notes[-1] == "no two test classes have enough images for 50 shots"


def test_ways_and_queries_that_are_possible() -> None:
    members = [np.arange(size) for size in (20, 9, 4, 1)]
    assert possible(members, 2, 1, 15) == (2, 8)
    assert possible(members, 5, 1, 15) == (3, 3)
    assert possible(members, 5, 8, 15) == (2, 1)
    assert possible(members, 5, 9, 15)[0] == 1
    assert possible(members, 5, 30, 15)[0] == 0


def test_what_cannot_be_judged_is_refused() -> None:
    evaluator, good = FewShotEvaluator(SHORT), clouds(60, 3)
    with pytest.raises(DataError, match="no two test classes have 2 images, one more than the shots"):
        plain_values(evaluator.run(dataset(good, clouds(3, 3))))
    with pytest.raises(DataError, match="no two test classes"):
        plain_values(evaluator.run(dataset(good, labeled(good, 1))))
    with pytest.raises(DataError, match="1 of 60 test features are NaN"):
        plain_values(evaluator.run(dataset(good, broken(good))))
    for shots in ((), (0,)):
        with pytest.raises(ConfigError, match=r"evaluate\.few_shot\.shots: \["):
            FewShotEvaluator(FewShotConfig(shots=shots))


def test_measures() -> None:
    measure = FewShotEvaluator.measure("5way_1shot")
    assert measure is not None
    assert (measure.label, measure.unit) == ("5-way 1-shot", "percent")
    assert FewShotEvaluator.measure("note") is None
