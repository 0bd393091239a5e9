"""What counts as collapse, and when it is said."""

from __future__ import annotations

import pytest
import torch

from unlabeled.ssl.train.collapse import CollapseAlarm, feature_metrics


def test_figures_of_known_features() -> None:
    torch.manual_seed(0)
    even = feature_metrics(torch.randn(256, 16))
    assert even["feature_spread"] == pytest.approx(1, abs=0.02)
    assert even["feature_rank"] == pytest.approx(16, abs=0.5)
    same = feature_metrics(torch.ones(64, 16) + 1e-6 * torch.randn(64, 16))
    assert same["feature_spread"] < 1e-3
    line = feature_metrics(torch.randn(64, 1) * torch.ones(1, 16))
    assert line["feature_rank"] == pytest.approx(1, abs=0.01)
    assert feature_metrics(torch.randn(3, 8)) == {}


def test_the_alarm_warns_once_after_several_low_readings(caplog: pytest.LogCaptureFixture) -> None:
    alarm = CollapseAlarm("change this", after=10, readings=3)
    low, fine = {"feature_spread": 1e-3}, {"feature_spread": 0.5}
    said = [alarm.update(step, values) for step, values in enumerate([low] * 14 + [fine] + [low] * 6)]
    assert [step for step, warning in enumerate(said) if warning] == [13]
    assert "change this" in caplog.text
    assert caplog.text.count("healthy above") == 1


def test_a_single_low_reading_or_none_is_no_alarm() -> None:
    alarm = CollapseAlarm("", after=0, readings=2)
    for step in range(1, 20):
        assert alarm.update(step, {"feature_rank": 1.0 if step % 2 else 5.0}) is None
        assert alarm.update(step, {"loss": 0.0}) is None


def test_features_that_shrink_are_told_by_their_deviation() -> None:
    """Directions say nothing then: spread and rank of the shrunken features are those of the healthy ones."""
    torch.manual_seed(0)
    features = torch.randn(64, 16)
    for name, value in feature_metrics(1e-3 * features).items():
        assert value == pytest.approx(feature_metrics(features)[name], rel=1e-3)
    alarm = CollapseAlarm("widen them", after=0, readings=2)
    assert alarm.update(1, {"channel_deviation": 0.9}) is None
    assert alarm.update(2, {"channel_deviation": 0.05}) is None
    warning = alarm.update(3, {"channel_deviation": 0.05})
    assert warning is not None
    assert "channel_deviation 0.05, healthy above 0.1); widen them" in warning
