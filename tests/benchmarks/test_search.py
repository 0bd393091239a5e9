"""The sides of the kNN benchmark predict the same, and its tables are complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import search
from benchmarks.eval import main


def test_all_sides_predict_the_same() -> None:
    data = search.made_up(600, 150, 24, 7)
    expected = search.published(data, 30)
    assert 0.3 < (expected == data.test.labels).mean() < 1
    for side in (search.ours("exact"), search.ours("reduced"), search.scikit_learn):
        np.testing.assert_array_equal(side(data, 30), expected)


def test_a_row_for_each_search_and_baseline(tmp_path: Path) -> None:
    words = ["knn", "--train", "300", "--test", "100", "--widths", "16", "--classes", "5", "--k", "20", "--pairs", "1"]
    head, _, *rows = main(words)
    assert head.startswith("| features, test images | search | against | ours, s | theirs, s |")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1:3] for row in cells] == [
        ["exact", "torch"], ["reduced", "torch"], ["exact", "scikit-learn"], ["reduced", "scikit-learn"],
    ]  # fmt: skip
    assert {row[0] for row in cells} == {"300 x 16, 5 classes, 100"}
    assert {row[-1] for row in cells} == {"0"}
    data = search.made_up(200, 90, 8, 3)
    for name, split in (("train", data.train), ("test", data.test)):
        save_file({"features": split.features, "labels": split.labels}, tmp_path / name)
    words = ["knn", "--files", str(tmp_path / "train"), str(tmp_path / "test"), "--k", "9", "--pairs", "1"]
    assert main([*words, "--searches", "exact", "--baselines", "torch"])[2].startswith("| 200 x 8, 3 classes, 90 |")


def test_different_predictions_are_not_timed_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.BASELINES, "torch", lambda data, k: 1 - search.published(data, k))
    with pytest.raises(AssertionError, match="50 of 50 predictions differ"):
        main(["knn", "--train", "90", "--test", "50", "--widths", "8", "--classes", "2", "--k", "5", "--pairs", "1"])


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    words = ["memory", "--rows", "20000", "--width", "32", "--queries", "10", "--k", "5", "--folder", str(tmp_path)]
    *_, row = main([*words, "--memory-gb", "0.001", "--searches", "exact"])
    name, rows, _, bound, peak, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, rows, bound) == ("exact", "20000 x 32", "0.001")
    assert 0.05 < float(peak) < 3
    assert list(tmp_path.iterdir()) == []
