"""Retrieval against the definitions, one query after the other, and against scikit-learn's average precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_helpers import plain_pairs, plain_values
from feature_helpers import broken, clouds, dataset, labeled, same
from sklearn.metrics import average_precision_score

from unlabeled.eval.base import Estimate, FeatureSplit
from unlabeled.eval.evaluators.retrieval import RetrievalConfig, RetrievalEvaluator, retrieval_scores
from unlabeled.eval.intervals import wilson
from unlabeled.ssl.core.errors import ConfigError, DataError

TRAIN = clouds(20, 2)


def run(test: FeatureSplit, **settings) -> dict:
    return plain_values(RetrievalEvaluator(RetrievalConfig(**settings)).run(dataset(TRAIN, test)))


def brute_force(split: FeatureSplit, ks: tuple[int, ...]) -> dict[str, float]:
    rows = split.features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found: dict[str, list[float]] = {
        name: [] for name in ("map", "map_at_r", "r_precision", *(f"recall{k}" for k in ks))
    }
    for query in range(len(rows)):
        others = [row for row in range(len(rows)) if row != query]
        ranked = sorted(others, key=lambda row: -(rows[row] @ rows[query]))
        right = [bool(split.labels[row] == split.labels[query]) for row in ranked]
        count = sum(right)
        if not count:
            continue
        precision = [sum(right[: rank + 1]) / (rank + 1) for rank in range(len(right))]
        found["map"].append(average_precision_score(right, rows[ranked] @ rows[query]))
        found["map_at_r"].append(sum(p for p, hit in zip(precision[:count], right, strict=False) if hit) / count)
        found["r_precision"].append(precision[count - 1])
        for k in ks:
            found[f"recall{k}"].append(any(right[:k]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_all_scores_are_those_of_brute_force() -> None:
    test = labeled(clouds(70, 5, spread=2, seed=3), *range(5), 0, 0, 1)
    found = run(test, k=(1, 3, 10))
    expected = brute_force(test, (1, 3, 10))
    assert {key: value.value if isinstance(value, Estimate) else value for key, value in found.items()} == {
        key: pytest.approx(value, abs=1e-6) for key, value in expected.items()
    }
    assert found["recall3"] == Estimate(found["recall3"].value, *wilson(found["recall3"].value, 70))
    assert 0.05 < found["map_at_r"] < found["map"] < found["recall3"].value < 1


def test_a_made_up_ranking() -> None:
    """From the first image the others lie at growing angles: right, wrong, right."""
    angles = torch.tensor([0.0, 0.1, 0.3, 0.8])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = retrieval_scores(features, torch.tensor([0, 0, 1, 0]), [1, 2])
    assert len(found["map"]) == 3, "the image without another of its class asks nothing"
    first = {name: float(value[0]) for name, value in found.items()}
    assert first == pytest.approx(
        {"map": (1 + 2 / 3) / 2, "map_at_r": 1 / 2, "r_precision": 1 / 2, "recall1": 1, "recall2": 1}
    )


def test_chunks_change_nothing() -> None:
    split = clouds(50, 4, spread=2)
    features, labels = torch.nn.functional.normalize(torch.from_numpy(split.features)), torch.from_numpy(split.labels)
    whole, parts = (retrieval_scores(features, labels, [1], cells=cells) for cells in (2**22, 120))
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, atol=1e-6, rtol=0)


def test_clear_and_meaningless_features() -> None:
    clear = run(clouds(60, 4, spread=0.01), k=(1,))
    assert (clear["map"], clear["map_at_r"], clear["recall1"].value) == pytest.approx((1, 1, 1))
    sorted_by_class = FeatureSplit(same(clouds(400, 4)).features, np.repeat(np.arange(4), 100))
    chance = run(sorted_by_class, k=(1,))
    assert chance["recall1"].value == pytest.approx(0.25, abs=0.1)
    assert chance["r_precision"] == pytest.approx(0.25, abs=0.03)


def test_classes_of_one_image_and_k_beyond_the_split_are_said() -> None:
    test = labeled(clouds(7, 2, spread=2), 0, 0, 1, 1, 1, 2, 3)
    pairs = plain_pairs(RetrievalEvaluator(RetrievalConfig(k=(2, 10, 20))).run(dataset(TRAIN, test)))
    assert [value for key, value in pairs if key == "note"] == [
        "2 test images are the only one of their class and were not used as queries",
        "k = 10 and 20 need more other test images than the 6 here; k = 6 is used instead",
    ]
    values = dict(pairs)
    assert {key for key in values if key.startswith("recall")} == {"recall2", "recall6"}
    expected = brute_force(test, (2, 6))
    assert values["map"] == pytest.approx(expected["map"], abs=1e-6)
    assert values["recall6"] == Estimate(1.0, *wilson(1.0, 5))


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="no test class has two images"):
        run(clouds(5, 5))
    with pytest.raises(DataError, match="all test images are of one class"):
        run(labeled(clouds(5, 5), 1))
    with pytest.raises(DataError, match="1 of 9 test features are NaN"):
        run(broken(clouds(9, 3)))
    for k in ((), (0,)):
        with pytest.raises(ConfigError, match=r"evaluate\.retrieval\.k: \["):
            RetrievalEvaluator(RetrievalConfig(k=k))


def test_measures() -> None:
    found = {key: RetrievalEvaluator.measure(key) for key in ("map", "recall10", "recallx", "note")}
    assert [measure and (measure.label, measure.unit) for measure in found.values()] == [
        ("mAP", "percent"),
        ("recall@10", "accuracy"),
        None,
        None,
    ]
