"""Mixtures through the command line and whole runs: losses of each task, weights that move, an exact resume."""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unlabeled
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.workflows.pretrain import pretrain_config

VIT = {
    "name": "vit_tiny_patch16_224",
    "size": 32,
    "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
}
RESNET = {"name": "resnet18", "size": 32, "kwargs": {"channels": [8, 8, 16, 16], "output_stride": 8}}
MIXTURES: dict[str, dict[str, Any]] = {
    "mae-rotation": {
        "backbone": VIT,
        "task": {
            "name": "multi",
            "tasks": [
                {"name": "mae", "weight": 1, "decoder": {"dim": 16, "depth": 1, "heads": 2}},
                {"name": "rotation", "weight": 0.25},
            ],
            "balance": "gradient_norm",
            "balance_every": 3,
        },
    },
    "spark-rotation": {
        "backbone": RESNET,
        "task": {
            "name": "multi",
            "tasks": [
                {"name": "spark", "weight": {"start": 0.5, "end": 1.5}, "decoder": {"width": 16}},
                {"name": "rotation", "weight": 0.25, "portion": 0.5},
            ],
            "batch": "split",
        },
    },
}
LABELS = {"mae-rotation": ("mae", "rotation"), "spark-rotation": ("spark", "rotation")}


def settings(name: str) -> dict[str, Any]:
    return {
        **MIXTURES[name],
        "data": {"name": "shapes", "count": 48},
        "epochs": 2,
        "batch_size": 12,
        "schedule": {"warmup_epochs": 0},
        "engine": {"workers": 0, "device": "cpu", "accumulation": 2, "checkpoint_steps": 5, "keep": 9},
        "log": {"every": 1, "progress": False},
        "evaluate": {"every": 2, "final": False},
    }


@pytest.fixture(scope="module", params=list(MIXTURES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    name = str(request.param)
    return name, unlabeled.pretrain(**settings(name), out=tmp_path_factory.mktemp("runs") / name)


def test_every_row_has_the_loss_of_each_task(run: tuple[str, Any]) -> None:
    name, result = run
    rows = [row for row in result.metrics if "loss" in row]
    assert len(rows) == 8
    first, second = LABELS[name]
    assert {f"{first}/loss", f"{first}/explained", f"{first}/weight", f"{second}/loss", f"{second}/accuracy"} <= set(
        rows[0]
    )
    for row in rows:
        weights = [row[f"{first}/weight"], row.get(f"{second}/weight", 0.25)]
        total = weights[0] * row[f"{first}/loss"] + weights[1] * row[f"{second}/loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert [row["step"] for row in result.metrics if "eval/knn/k10" in row] == [8]


def test_weights_of_the_rows(run: tuple[str, Any]) -> None:
    name, result = run
    rows = [row for row in result.metrics if "loss" in row]
    if name == "spark-rotation":
        assert [row["spark/weight"] for row in rows] == pytest.approx([0.5 + step / 8 for step in range(8)])
        return
    assert [rows[0][f"{label}/weight"] for label in LABELS[name]] == [1, 0.25]
    for before, row in itertools.pairwise(rows):
        strengths = [row[f"{label}/weight"] * row[f"{label}/grad_norm"] for label in LABELS[name]]
        assert strengths[1] / strengths[0] == pytest.approx(0.25, rel=1e-5)
        assert sum(row[f"{label}/weight"] for label in LABELS[name]) == pytest.approx(1.25)
        # measured in steps 1, 4 and 7, and in force from the step after
        assert (row["mae/grad_norm"] != before["mae/grad_norm"]) == (row["step"] in (2, 5, 8))


def test_resumed_in_the_middle_equals_never_stopped(run: tuple[str, Any], tmp_path: Path) -> None:
    name, result = run
    shutil.copytree(result.out / "checkpoints" / "step_00000005", tmp_path / "checkpoints" / "step_00000005")
    (tmp_path / "checkpoints" / "last").write_text("step_00000005")
    shutil.copy(result.out / "config.yaml", tmp_path)
    again = unlabeled.pretrain(**settings(name), out=tmp_path)
    whole, resumed = (out / "checkpoints" / "step_00000008" for out in (result.out, tmp_path))
    for file in ("model.safetensors", "optimizer.pt"):
        read = load_file if file.endswith("safetensors") else partial(torch.load, weights_only=True)
        assert_same_bits(read(whole / file), read(resumed / file))
    losses = [key for key in result.metrics[0] if key.endswith("loss")]
    assert len(losses) == 3
    rows = {row["step"]: row for row in result.metrics if "loss" in row}
    assert [row["step"] for row in again.metrics if "loss" in row] == [6, 7, 8]
    for row in again.metrics:
        assert all(row[key] == rows[row["step"]][key] for key in losses if key in row)


def assert_same_bits(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert all(assert_same_bits(a[key], b[key]) is None for key in a)
    elif isinstance(a, (list, tuple)):
        assert all(assert_same_bits(x, y) is None for x, y in zip(a, b, strict=True))
    else:
        assert a == b


def test_the_words_of_the_command_line() -> None:
    overrides = ["task=multi", "task.tasks=[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]", "data=shapes"]
    tasks = [{"name": "mae", "weight": 1}, {"name": "rotation", "weight": 0.2}]
    assert pretrain_config(overrides).task == {"name": "multi", "tasks": tasks}
    changed = pretrain_config(
        [*overrides, "task.tasks[0].mask_ratio=0.5", "task.tasks.1.weight={start: 0, end: 1}"]
    ).task
    assert changed["tasks"][0] == {"name": "mae", "weight": 1, "mask_ratio": 0.5}
    assert changed["tasks"][1] == {"name": "rotation", "weight": {"start": 0, "end": 1}}
    with pytest.raises(ConfigError, match=r"^task.tasks\[1\].angles: 3 is not possible; choose 2 or 4$"):
        pretrain_config([*overrides, "task.tasks[1].angles=3"])


@pytest.mark.parametrize("recipe", ["cifar10/multi_mae_rotation_vit", "cifar10/multi_spark_rotation_resnet18"])
def test_the_recipes_run(recipe: str, tmp_path: Path) -> None:
    from unlabeled.cli import main

    overrides = [f"recipe={recipe}", "data=shapes", "batch_size=8", "evaluate.every=0"]
    overrides += ["evaluate.final=false", "log.progress=false", f"out={tmp_path}"]
    assert main(["pretrain", "--debug", *overrides, "debug=true"]) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(len([key for key in row if key.endswith("/loss")]) == 2 for row in rows)
