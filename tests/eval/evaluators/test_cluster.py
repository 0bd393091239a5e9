"""k-means against classes: every permutation tried, pairs counted, scikit-learn's k-means, and features of no use."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from eval_helpers import plain_values
from feature_helpers import broken, clouds, dataset, labeled, same
from sklearn.cluster import KMeans

from unlabeled.eval.base import FeatureSplit
from unlabeled.eval.evaluators.cluster import ClusterConfig, ClusterEvaluator, kmeans
from unlabeled.ssl.core.errors import DataError

TRAIN = clouds(20, 2)


def run(test: FeatureSplit, *, seed: int = 0, **settings) -> dict:
    return plain_values(ClusterEvaluator(ClusterConfig(**settings)).run(dataset(TRAIN, test, seed=seed)))


def test_scores_are_those_of_brute_force(capfd: pytest.CaptureFixture[str]) -> None:
    test = clouds(90, 5, spread=1.5, seed=3)
    found = run(test)
    clusters, truth = found["clusters"], test.labels
    accuracies = [(np.array(order)[clusters] == truth).mean() for order in itertools.permutations(range(5))]
    assert found["accuracy"] == pytest.approx(max(accuracies)) == pytest.approx((clusters == truth).mean())
    together = clusters[:, None] == clusters
    alike = truth[:, None] == truth
    pairs = np.triu(np.ones((90, 90), bool), 1)
    both, one, two = (float((pairs & kind).sum()) for kind in (together & alike, together, alike))
    chance = one * two / pairs.sum()
    assert found["ari"] == pytest.approx((both - chance) / ((one + two) / 2 - chance))
    joint = np.histogram2d(truth, clusters, bins=(5, 5))[0] / 90

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    one, two = entropy(joint.sum(0)), entropy(joint.sum(1))
    assert found["nmi"] == pytest.approx((one + two - entropy(joint)) / ((one + two) / 2))
    assert 0.1 < found["ari"] < found["accuracy"] < 1
    assert capfd.readouterr() == ("", ""), "faiss is silent about few points"


def test_clear_clusters_are_found_and_the_draw_follows_the_seed() -> None:
    found = run(clouds(60, 4, spread=0.01, seed=3))
    assert (found["accuracy"], found["nmi"], found["ari"]) == (1, pytest.approx(1), 1)
    hard = clouds(90, 5, spread=3, seed=3)
    np.testing.assert_array_equal(run(hard, restarts=1)["clusters"], run(hard, restarts=1)["clusters"])
    others = [run(hard, restarts=1, seed=seed)["clusters"] for seed in range(4)]
    assert any((one != others[0]).any() for one in others[1:])


def test_the_objective_is_as_good_as_scikit_learns() -> None:
    rows = clouds(200, 6, spread=1, seed=5).features
    found = kmeans(rows, 6, restarts=8, iterations=50, spherical=False, seed=1)
    inertia = sum(((rows[found == k] - rows[found == k].mean(0)) ** 2).sum() for k in range(6))
    assert inertia <= 1.02 * KMeans(6, n_init=8, random_state=0).fit(rows).inertia_


def test_spherical_clusters_know_no_lengths_and_euclidean_ones_do() -> None:
    test = clouds(60, 4, spread=0.5, seed=3)
    stretched = replace(test, features=test.features * np.geomspace(0.01, 100, 60, dtype=np.float32)[:, None])
    np.testing.assert_array_equal(run(test)["clusters"], run(stretched)["clusters"])
    assert run(test, spherical=False)["accuracy"] > 0.9 > run(stretched, spherical=False)["accuracy"]


def test_features_without_variance_are_one_cluster() -> None:
    found = run(labeled(same(clouds(40, 4)), 0, 0, 1, 2))
    assert found["note"] == "there are only 1 distinct test features, fewer than the 3 classes"
    assert (found["accuracy"], found["ari"]) == (0.5, 0)
    assert found["nmi"] == pytest.approx(0, abs=1e-9)
    twice = replace(clouds(40, 4), features=np.repeat(clouds(40, 4).features[:2], 20, axis=0))
    assert run(twice)["note"].startswith("there are only 2 distinct test features")
    assert len(np.unique(run(twice)["clusters"])) == 2


def test_as_many_classes_as_images() -> None:
    found = run(clouds(7, 7, seed=1))
    assert (found["accuracy"], found["ari"]) == (1, 1)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="all test images are of class 'class 1'"):
        run(labeled(clouds(9, 3), 1))
    with pytest.raises(DataError, match="1 of 9 test features are NaN"):
        run(broken(clouds(9, 3)))
