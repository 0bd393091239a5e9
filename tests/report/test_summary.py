"""What a report says of the run: its wall clock, from the rows that it wrote."""

from __future__ import annotations

import pytest

from unlabeled.report.summary import training_seconds


def row(step: int, speed: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0, "images_per_s": speed}


def test_the_wall_clock_is_the_sum_over_the_rows() -> None:
    rows = [row(10, 20), {"step": 10, "eval/knn/k20": 0.5}, row(20, 40), row(25, 10)]
    assert training_seconds(rows, 8) == pytest.approx(10 * 8 / 20 + 10 * 8 / 40 + 5 * 8 / 10)


def test_without_speeds_it_is_not_known() -> None:
    assert training_seconds([], 8) is None
    assert training_seconds([{"step": 10, "loss": 1.0}], 8) is None
