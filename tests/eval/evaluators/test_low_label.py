"""Few labels: the probe itself with all of them, logistic regression with next to none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from eval_helpers import plain_pairs, plain_values
from feature_helpers import broken, clouds, dataset, labeled
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unlabeled.eval.base import Estimate, FeatureSplit
from unlabeled.eval.evaluators.linear import LinearConfig, LinearEvaluator
from unlabeled.eval.evaluators.logistic import stratified
from unlabeled.eval.evaluators.low_label import LowLabelConfig, LowLabelEvaluator
from unlabeled.eval.intervals import over_draws
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive

PROBE = LinearConfig(lr=(0.03, 0.3), weight_decay=(0.0,), epochs=4, batch_size=32)
TRAIN, TEST = clouds(200, 4, spread=2, seed=1), clouds(120, 4, spread=2, seed=2)


def run(config: LowLabelConfig, train: FeatureSplit = TRAIN) -> tuple[list[str], dict]:
    pairs = plain_pairs(LowLabelEvaluator(config).run(dataset(train, TEST)))
    return [value for key, value in pairs if key == "note"], {k: v for k, v in pairs if k != "note"}


def test_all_labels_are_the_linear_probe() -> None:
    notes, values = run(LowLabelConfig(fractions=(1.0,), draws=1, steps=1, probe=PROBE))
    assert values["100pct"] == plain_values(LinearEvaluator(PROBE).run(dataset(TRAIN, TEST)))["top1"]
    assert notes == []
    _, longer = run(LowLabelConfig(fractions=(1.0,), draws=1, steps=60, probe=PROBE))
    more = PROBE.model_copy(update={"epochs": 10})  # 200 images are 6 batches of 32
    assert longer["100pct"] == plain_values(LinearEvaluator(more).run(dataset(TRAIN, TEST)))["top1"]


def test_below_five_images_a_class_it_is_logistic_regression_with_the_given_c() -> None:
    notes, values = run(LowLabelConfig(fractions=(0.04,), draws=1, C=0.5))
    rows = stratified(TRAIN.labels, 0.04, derive(0, "low_label", "4", 0))
    np.testing.assert_array_equal(np.bincount(TRAIN.labels[rows]), [2, 2, 2, 2])
    scaler = StandardScaler().fit(TRAIN.features[rows])
    model = LogisticRegression(C=0.5, max_iter=1000).fit(scaler.transform(TRAIN.features[rows]), TRAIN.labels[rows])
    assert values["4pct"] == pytest.approx(model.score(scaler.transform(TEST.features), TEST.labels), abs=0.01)
    assert notes == [
        "4 %: 2.0 images per class are too few to select settings, so logistic regression with C = 0.5 was used"
    ]


def test_less_than_one_image_per_class_takes_one_and_reports_it() -> None:
    notes, values = run(LowLabelConfig(fractions=(0.01,), draws=2))
    assert notes[0] == "1 % is less than one image per class; 4 of 200 images were used"
    assert isinstance(values["1pct"], Estimate)


def test_more_labels_are_better_and_draws_make_an_interval() -> None:
    _, values = run(LowLabelConfig(fractions=(0.02, 0.5), steps=30, probe=PROBE))
    assert list(values) == ["2pct", "50pct"]
    few, many = values["2pct"], values["50pct"]
    assert few.low < few.value < few.high
    assert few.value < many.value
    again = run(LowLabelConfig(fractions=(0.02, 0.5), steps=30, probe=PROBE))[1]
    assert again == values


def test_the_interval_is_students() -> None:
    found = over_draws([0.5, 0.6, 0.7])
    assert isinstance(found, Estimate)
    assert (found.value, found.low, found.high) == pytest.approx((0.6, 0.6 - 0.248414, 0.6 + 0.248414), abs=1e-5)
    assert over_draws([0.9, 1.0]) == Estimate(pytest.approx(0.95), pytest.approx(0.95 - 12.7062 * 0.05, abs=1e-4), 1.0)
    lone = over_draws([0.3])
    assert (lone.value, math.isnan(lone.low), math.isnan(lone.high)) == (0.3, True, True)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 200 training features are NaN"):
        run(LowLabelConfig(), broken(TRAIN))
    with pytest.raises(DataError, match="all training images are of class 'class 1'"):
        run(LowLabelConfig(), labeled(TRAIN, 1))
    for fractions in ((), (0.0,), (0.5, 1.5)):
        with pytest.raises(ConfigError, match=r"evaluate\.low_label\.fractions: \["):
            LowLabelEvaluator(LowLabelConfig(fractions=fractions))
    with pytest.raises(ConfigError, match=r"evaluate\.low_label\.probe\.lr: \[\]"):
        LowLabelEvaluator(LowLabelConfig(probe=LinearConfig(lr=())))


def test_measures() -> None:
    labels = {key: LowLabelEvaluator.measure(key) for key in ("1pct", "0.5pct", "note", "xpct")}
    assert [measure and measure.label for measure in labels.values()] == [
        "1 % of labels",
        "0.5 % of labels",
        None,
        None,
    ]
