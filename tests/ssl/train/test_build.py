"""What a run says before its first step."""

from __future__ import annotations

from typing import Any

import pytest

from unlabeled.ssl.config.schema import PretrainConfig
from unlabeled.ssl.core.plain import counted
from unlabeled.ssl.train.build import _shares, _warn_about_schedule


@pytest.mark.parametrize(
    ("division", "text"),
    [
        ((64, 1, 1), "64"),
        ((64, 2, 1), "64 = 2 processes x 1 micro-step x 32"),
        ((64, 1, 4), "64 = 1 process x 4 micro-steps x 16"),
    ],
)
def test_the_batch_and_its_division(division: tuple[int, int, int], text: str) -> None:
    assert _shares(*division) == text


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 step"), (0.5, "0.5 steps"), (2.0, "2 steps"), (1281167, "1281167 steps")]
)
def test_a_number_with_its_noun(count: float, text: str) -> None:
    assert counted(count, "step") == text


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({"epochs": 20}, True), ({"epochs": 61}, False), ({"epochs": 20, "debug": True}, False)],
)
def test_milestones_after_the_end_are_warned_about(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], warned: bool
) -> None:
    schedule = {"name": "multistep", "milestones": [60, 120, 160], "warmup_epochs": 0}
    _warn_about_schedule(PretrainConfig.model_validate({"schedule": schedule, **settings}))
    line = "schedule.milestones: [60, 120, 160] lie after the last epoch (20), so the learning rate never falls; "
    assert caplog.messages == [line + "set schedule.name=cosine or other milestones"] * warned
