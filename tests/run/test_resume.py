"""A run killed with SIGKILL at any step and resumed is bit-equal to one that was never stopped."""

import json
import random
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # for `launch`, in the processes too

from launch import die_after_step, launch

TIMED = {"images_per_s", "data_wait", "memory_gb"}
COMMON = [
    "data=shapes", "data.count=64", "epochs=3", "batch_size=8", "log.every=2", "log.tensorboard=false",
    "schedule.warmup_epochs=0.5", "engine.checkpoint_steps=5", "evaluate.final=false", "engine.device=cpu",
]  # fmt: skip
TOTAL = 24
VIT = [
    "backbone=vit_tiny_patch16_224",
    "backbone.size=32",
    "backbone.kwargs={patch_size:8,embed_dim:32,depth:2,num_heads:2}",
]
MAE = ["task=mae", "task.decoder={dim:32,depth:1,heads:2}", *VIT]
RESNET = ["task=rotation", "backbone=resnet18", "backbone.size=32", "backbone.kwargs={channels:[8,8,8,8],stem_width:8}"]


def run(out: Path, overrides: list[str], processes: int, kill: int | None = None) -> None:
    """One launch; a killed one must really have been killed."""
    log = out.with_suffix(".log")
    before = partial(die_after_step, kill) if kill else None
    codes = launch(["pretrain", "--debug", *COMMON, *overrides, f"out={out}"], log, ranks=processes, before=before)
    assert codes == [-signal.SIGKILL if kill else 0] * processes, log.read_text()[-3000:]


def rows(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def assert_same_bits(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{index}")
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "processes", "kills"),
    [
        pytest.param([*MAE, "engine.workers=2", "engine.accumulation=2"], 1, 3, id="mae-2-workers-accumulation"),
        pytest.param([*RESNET, "engine.workers=1"], 2, 1, id="rotation-2-processes"),
    ],
)
def test_killed_and_resumed_equals_never_stopped(
    tmp_path: Path, overrides: list[str], processes: int, kills: int
) -> None:
    run(tmp_path / "whole", overrides, processes)
    points = sorted(random.Random(f"{overrides}").sample(range(1, TOTAL), kills))
    for point in points:
        run(tmp_path / "broken", overrides, processes, kill=point)
    run(tmp_path / "broken", overrides, processes)

    whole, broken = (tmp_path / name / "checkpoints" / f"step_{TOTAL:08d}" for name in ("whole", "broken"))
    assert_same_bits(load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors"))
    assert_same_bits(*(torch.load(path / "optimizer.pt", weights_only=True) for path in (whole, broken)))
    assert_same_bits(*(json.loads((path / "state.json").read_text()) for path in (whole, broken)))
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    assert len(rows(tmp_path / "whole")) == TOTAL // 2
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "backbone.safetensors", "backbone.json",
    }  # fmt: skip
