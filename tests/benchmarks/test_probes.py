"""The benchmark of the linear probe runs, and would notice sides that compute different things."""

from __future__ import annotations

import pytest

from benchmarks import probes


def test_both_sides_end_at_the_same_weights_and_the_table_says_so() -> None:
    words = ["--probe-classes", "3", "--probe-width", "64", "--probe-images", "300", "--probe-pairs", "2"]
    lines = probes.main(words)
    assert lines[0] == "| classes | ours, ms | 52 layers, ms | ratio | weights differ by | predictions that differ |"
    assert lines[2].startswith("| 3 |")
    assert lines[2].endswith("| 0.00 % |")
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[0] == "300 x 64, 10 classes"
    assert 20 < float(cells[4]) < 80
    assert float(cells[4]) == pytest.approx(float(cells[5]), abs=5)


def test_other_updates_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlabeled.eval.probe.heads._MOMENTUM", 0.5)
    with pytest.raises(AssertionError, match="weights differ by"):
        probes.main(["--probe-classes", "3", "--probe-width", "8", "--probe-images", "--probe-pairs", "1"])
