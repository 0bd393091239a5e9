"""Rank correlations against their definitions, and the tables of a few small runs."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from benchmarks.rank_correlation import MEASURES, main, rank_correlation, tables
from unlabeled.api import pretrain
from unlabeled.ssl.core.errors import ConfigError


def test_correlations_are_those_of_the_definitions() -> None:
    first, second = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 2.8, 18.0]
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    found = rank_correlation(first, second)
    assert found.encoders == 6
    assert found.spearman == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    pairs = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in combinations(range(6), 2)]
    assert found.kendall == pytest.approx(sum(1 if pair > 0 else -1 for pair in pairs) / len(pairs))
    assert found.low < found.spearman < found.high
    width = math.atanh(found.high) - math.atanh(found.low)
    assert width == pytest.approx(2 * 1.96 * math.sqrt((1 + found.spearman**2 / 2) / 3))


def test_equal_and_opposite_rankings_and_what_has_none() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert rank_correlation(values, [10.0**value for value in values])[1] == pytest.approx(1)
    assert rank_correlation(values, values[::-1]).kendall == pytest.approx(-1)
    assert math.isnan(rank_correlation(values, [2.0] * 5).spearman)
    assert math.isnan(rank_correlation(values[:3], values[:3]).kendall_p)


def test_tables_have_all_encoders_and_say_how_many_a_measure_had() -> None:
    found = {
        f"run {number}": {"accuracy": number / 10, "spectrum/alpha": 1 + number, "spectrum/rankme": float(number)}
        for number in range(1, 6)
    }
    del found["run 1"]["spectrum/rankme"]
    lines = tables(found)
    assert lines[2].startswith("| run 5 | 50.0 | 5 | – | 6 |"), "best first"
    assert len(lines) == 2 + 5 + 1 + 2 + len(MEASURES)
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[8:]}
    assert rows["RankMe"].startswith("| RankMe | + | 1.00 (1.00 to 1.00)")
    assert rows["RankMe"].endswith("| 4 |")
    assert rows["distance of α-ReQ from 1"].startswith("| distance of α-ReQ from 1 | - | 1.00")
    assert rows["LiDAR"] == "| LiDAR | + | – | – | – | – | 0 |"


@pytest.mark.slow
def test_runs_and_their_older_checkpoints_are_measured_and_left_alone(tmp_path: Path) -> None:
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        pretrain(
            task="rotation",
            backbone={"name": "vit_tiny_patch16_224", "size": 32, "kwargs": shape},
            data={"name": "digits", "limit": 96},
            batch_size=32,
            epochs=2,
            out=folder,
            engine={"seed": seed, "workers": 0, "checkpoint_epochs": 1},
            evaluate={"final": False},
            log={"tensorboard": False, "progress": False},
        )
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    words = [str(folder) for folder in folders]
    words += ["data=digits", "evaluate.limit=64", "evaluate.invariance.images=8", "workers=0"]
    lines = main(["--checkpoints", "--cache", str(tmp_path / "cache"), *words])
    assert sum(line.startswith(("| 0", "| 1")) for line in lines) == 4
    assert any(line.startswith("| 0, step") for line in lines)
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    accuracies = [line.split(" | ")[1] for line in lines[2:6]]
    assert accuracies == sorted(accuracies, key=float, reverse=True)


def test_without_runs_or_data_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RUN: not given"):
        main(["data=digits"])
    with pytest.raises(ConfigError, match="data: not given"):
        main([str(tmp_path)])
