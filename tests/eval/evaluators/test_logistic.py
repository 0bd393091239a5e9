"""Logistic regression: against scikit-learn put together by hand, and on data that leaves it little to go on."""

from __future__ import annotations

import numpy as np
import pytest
from eval_helpers import plain_pairs, plain_values
from feature_helpers import broken, clouds, dataset, labeled, same
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unlabeled.eval.base import FeatureSplit
from unlabeled.eval.evaluators.logistic import LogisticConfig, LogisticEvaluator, fit_logistic, stratified
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive


def test_predictions_are_those_of_scikit_learn_with_the_best_c_on_the_holdout() -> None:
    train, test = clouds(160, 7, spread=2, seed=1), clouds(90, 7, spread=2, seed=2)
    config = LogisticConfig(C=(1e-4, 0.03, 100.0), holdout=0.25)
    found = plain_values(LogisticEvaluator(config).run(dataset(train, test, seed=5)))
    kept = stratified(train.labels, 0.75, derive(5, "logistic holdout"), spare=1)
    held_out = np.setdiff1d(np.arange(160), kept)
    scores = {}
    for inverse in config.C:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=inverse, max_iter=1000))
        model.fit(train.features[kept].astype(np.float64), train.labels[kept])
        guess = model.predict_proba(train.features[held_out].astype(np.float64))
        scores[inverse] = (guess.argmax(1) == train.labels[held_out]).mean(), -log_loss(train.labels[held_out], guess)
    assert len(set(scores.values())) == 3
    assert found["C"] == max(scores, key=lambda inverse: scores[inverse])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=found["C"], max_iter=1000))
    guess = model.fit(train.features.astype(np.float64), train.labels).predict_proba(test.features.astype(np.float64))
    np.testing.assert_array_equal(found["predictions"], guess.argmax(1))
    assert found["top1"] == (guess.argmax(1) == test.labels).mean()
    best = np.argsort(-guess, axis=1)[:, :5]
    assert found["top5"] == (best == test.labels[:, None]).any(axis=1).mean()
    assert "note" not in found


def test_scale_offset_and_a_constant_feature_change_nothing() -> None:
    train, test = clouds(60, 3, spread=2, seed=1), clouds(60, 3, spread=2, seed=2)
    stretch = np.logspace(-3, 3, 16).astype(np.float32)

    def moved(split: FeatureSplit) -> FeatureSplit:
        features = np.concatenate([split.features * stretch + 5, np.full((60, 1), 1e4)], axis=1)
        return FeatureSplit(features.astype(np.float32), split.labels)

    evaluator = LogisticEvaluator(LogisticConfig(C=(0.1,)))
    plain, other = (
        plain_values(evaluator.run(dataset(one, two))) for one, two in ((train, test), (moved(train), moved(test)))
    )
    np.testing.assert_array_equal(plain["predictions"], other["predictions"])
    assert 0.4 < plain["top1"] < 1


def test_more_images_than_the_limit_are_drawn_class_by_class_and_said() -> None:
    train = labeled(clouds(100, 4), *[0] * 90, *[1] * 8, 2, 3)
    notes, values = notes_and_values(LogisticConfig(limit=20, C=(0.1,)), train, clouds(12, 4, seed=3))
    assert notes == ["fitted on 22 of 100 training images (evaluate.logistic.limit)"]
    assert set(values["predictions"]) <= {0, 1, 2, 3}


def notes_and_values(config: LogisticConfig, train: FeatureSplit, test: FeatureSplit) -> tuple[list[str], dict]:
    pairs = plain_pairs(LogisticEvaluator(config).run(dataset(train, test)))
    return [value for key, value in pairs if key == "note"], dict(pairs)


def test_one_image_per_class_a_narrow_list_and_an_early_stop_are_noted() -> None:
    notes, values = notes_and_values(LogisticConfig(C=(1.0, 0.01, 0.1)), clouds(4, 4), clouds(12, 4, seed=3))
    assert values["C"] == 0.1
    assert notes == ["with one training image per class, C cannot be selected; the middle value, 0.1, was used"]
    config = LogisticConfig(C=(1e-7, 1e-6, 1e-5), iterations=1)
    notes, _ = notes_and_values(config, clouds(60, 3, spread=2), clouds(12, 3, seed=3))
    assert notes == [
        "the selected C 1e-05 is at the edge of the list; evaluate.logistic.C may be too narrow",
        "L-BFGS stopped after 1 iterations; raise evaluate.logistic.iterations",
    ]


def test_a_class_without_training_images_is_never_guessed() -> None:
    fit = fit_logistic(clouds(30, 3).features, np.arange(30) % 3 * 2, [1.0], 100)
    found = fit.probabilities(clouds(9, 3, seed=1).features, 6)
    assert found.shape == (9, 6)
    assert (found[:, [1, 3, 5]] == 0).all()
    np.testing.assert_allclose(found.sum(1), 1)
    _, values = notes_and_values(LogisticConfig(C=(1.0,)), labeled(clouds(30, 3), 0, 2), labeled(clouds(8, 3), 1))
    assert values["top1"] == 0


def test_uninformative_features_give_the_most_common_class() -> None:
    train = labeled(same(clouds(40, 2)), 0, 1, 1, 1)
    _, values = notes_and_values(LogisticConfig(), train, labeled(same(clouds(10, 2)), 0, 1))
    assert (values["predictions"] == 1).all()
    assert values["top1"] == 0.5


def test_stratified_parts() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    rows = stratified(labels, 0.1, 3)
    np.testing.assert_array_equal(np.bincount(labels[rows]), [10, 1, 1])
    np.testing.assert_array_equal(rows, stratified(labels, 0.1, 3))
    assert (rows != stratified(labels, 0.1, 4)).any()
    np.testing.assert_array_equal(np.bincount(labels[stratified(labels, 0.99, 3, spare=1)]), [99, 9, 1])
    np.testing.assert_array_equal(stratified(labels, 1.0, 3), np.arange(111))


def test_what_cannot_be_fitted_is_refused() -> None:
    for bad in ((), (0.0,), (1.0, float("inf"))):
        with pytest.raises(ConfigError, match=r"evaluate\.logistic\.C: \["):
            LogisticEvaluator(LogisticConfig(C=bad))
    evaluator, good = LogisticEvaluator(LogisticConfig()), clouds(9, 3)
    with pytest.raises(DataError, match="1 of 9 training features are NaN"):
        plain_values(evaluator.run(dataset(broken(good), good)))
    with pytest.raises(DataError, match="all training images are of class 'class 0'"):
        plain_values(evaluator.run(dataset(labeled(good, 0), good)))
