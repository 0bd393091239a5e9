"""Run folders that version 0.1.0 wrote: resumed, evaluated, exported and reported by the code of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from unlabeled.cli import main
from unlabeled.report.document import read_report

FOLDERS = Path(__file__).parents[1] / "fixtures" / "run_folders"
COMMON = [
    "data=digits",
    "data.limit=64",
    "batch_size=16",
    "epochs=2",
    "engine.workers=0",
    "log.every=1",
    "log.tensorboard=false",
    "log.progress=false",
    "evaluate.every=1",
    "evaluate.limit=60",
    "evaluate.linear.epochs=2",
    "evaluate.maps=0",
    "evaluate.embedding=null",
    "engine.checkpoint_steps=5",
    "engine.keep=2",
    "schedule.warmup_epochs=0.5",
    "optim.lr_scaling=none",
    "optim.lr=1e-3",
    "backbone.size=16",
]
CROPS = [
    "task.locals=2",
    "task.local_size=8",
    "task.first_colors={blur:0.0}",
    "task.second_colors={blur:0.0}",
    "task.local_colors={blur:0.0}",
]


def vit(depth: int) -> list[str]:
    kwargs = f"{{patch_size:4,embed_dim:24,depth:{depth},num_heads:2,dynamic_img_size:true}}"
    return ["backbone.name=vit_tiny_patch16_224", f"backbone.kwargs={kwargs}"]


WORDS = {
    "rotation": [
        "task=rotation", "optim.name=adamw", "schedule.name=cosine", "backbone.name=resnet10t",
        "backbone.kwargs={channels:[8,12,16,24],stem_width:8}",
    ],
    "mae": ["task=mae", *vit(2), "task.decoder={dim:16,depth:1,heads:2}"],
    "dino": ["task=dino", *vit(2), "task.head={prototypes:32,hidden:16,bottleneck:8}", *CROPS],
    "poa": [
        "task=poa", *vit(3), "task.elastic={width:12,width_step:12,depth:2}", "task.prototypes=[16,32]",
        "task.hidden=16", "task.bottleneck=8", *CROPS,
    ],
}  # fmt: skip
"""What each of them was started with."""


@pytest.fixture(params=sorted(WORDS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(task: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDERS / task, tmp_path / task))


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def metrics(report: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_report(report)["results"]["encoders"]["backbone"]["metrics"]  # whatever its schema
    return found


def test_the_same_command_goes_on_and_ends_where_it_did(task: str, folder: Path) -> None:
    for name in ("backbone.safetensors", "backbone.json"):
        (folder / name).unlink()
    assert main(["pretrain", *WORDS[task], *COMMON, "evaluate.final=false", f"out={folder}"]) == 0
    before = losses(FOLDERS / task)
    assert losses(folder) == pytest.approx(before, rel=1e-3)  # other processors round otherwise
    assert list(before) == list(range(1, 9))
    then, now = (load_file(one / "backbone.safetensors") for one in (FOLDERS / task, folder))
    assert then.keys() == now.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def test_another_setting_is_still_refused(task: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *WORDS[task], *COMMON, "optim.lr=2e-3", f"out={folder}"]) == 2
    assert "holds another run (optim.lr: 0.001 there, 0.002 here)" in capsys.readouterr().err


def test_it_is_evaluated_exported_and_reported(task: str, folder: Path, tmp_path: Path) -> None:
    overrides = [
        "evaluate.limit=60",
        "evaluate.linear.epochs=2",
        "evaluate.maps=0",
        "evaluate.embedding=null",
        "workers=0",
    ]
    before = metrics(folder / "report" / "report.json")
    assert main(["report", str(folder), f"out={tmp_path / 'compared'}"]) == 0  # from the report of then
    assert main(["evaluate", str(folder), *overrides]) == 0
    now = metrics(folder / "report" / "report.json")
    shown = [name for name in before if name.startswith("knn/k")]
    assert shown
    assert [now[name] for name in shown] == pytest.approx([before[name] for name in shown], abs=0.04)
    assert main(["report", str(folder), str(FOLDERS / task), f"out={tmp_path / 'compared'}"]) == 0
    assert main(["export", str(folder), f"out={tmp_path / 'x.safetensors'}"]) == 0
    description = json.loads((tmp_path / "x.json").read_text())
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in description["kwargs"].items()}
    model = timm.create_model(description["name"], checkpoint_path=str(tmp_path / "x.safetensors"), **kwargs)
    for name, tensor in load_file(FOLDERS / task / "backbone.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name
