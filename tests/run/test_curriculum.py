"""Whole runs with smaller images at the start: sizes of each step, resume inside a stage and at its end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import unlabeled
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.train import loop as engine
from unlabeled.ssl.train.monitor import read_metrics

TIMED = {"images_per_s", "data_wait", "memory_gb"}
SIZES = [48] * 6 + [56] * 2 + [64] * 2
"""Of the ten steps of a run."""


def settings(out: Path) -> dict[str, Any]:
    return {
        "task": "rotation",
        "backbone": {
            "name": "resnet18",
            "size": 64,
            "kwargs": {"channels": [4, 4, 8, 8], "stem_width": 4, "output_stride": 8},
        },
        "data": {"name": "shapes", "count": 40},
        "epochs": 2,
        "batch_size": 8,
        "engine": {"workers": 0, "device": "cpu", "checkpoint_steps": 3, "keep": 9, "curriculum": "efficienttrain"},
        "log": {"every": 1, "progress": False, "tensorboard": False},
        "evaluate": {"final": False},
        "out": out,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    unlabeled.pretrain(**settings(out))
    return out


class KilledError(BaseException):
    """Ends a run where it is."""


@pytest.mark.parametrize(("after", "left"), [(4, 3), (7, 6)], ids=["first stage", "end of the first stage"])
def test_killed_and_resumed_equals_never_stopped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, left: int
) -> None:
    out, record = tmp_path / "broken", engine.record

    def record_and_die(run: Any, step: int, *arguments: Any) -> None:
        record(run, step, *arguments)
        if step == after:
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):  # noqa: PT012  the patch ends with the run
        patch.setattr(engine, "record", record_and_die)
        unlabeled.pretrain(**settings(out))
    assert (out / "checkpoints" / "last").read_text() == f"step_{left:08d}"
    unlabeled.pretrain(**settings(out))
    ends = [path / "checkpoints" / "step_00000010" for path in (whole, out)]
    for file in ("model.safetensors", "optimizer.pt"):
        read = load_file if file.endswith("safetensors") else partial(torch.load, weights_only=True)
        assert_same_bits(*(read(end / file) for end in ends))
    assert rows(whole) == rows(out)


def test_rows_have_the_size_of_their_step(whole: Path) -> None:
    assert [row["size"] for row in rows(whole)] == SIZES


def test_evaluation_sees_whole_images_and_the_plan_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[bool, tuple[int, ...], torch.dtype]] = []
    normalize = Backbone.normalize

    def remember(self: Backbone, images: Tensor) -> Tensor:
        seen.append((self.training, images.shape[-2:], images.dtype))
        return normalize(self, images)

    monkeypatch.setattr(Backbone, "normalize", remember)
    overrides = settings(tmp_path / "run") | {"evaluate": {"final": False, "every": 0.8}}
    with caplog.at_level("INFO"):
        result = unlabeled.pretrain(**overrides)
    assert "48x48 in steps 1 to 6, 56x56 in steps 7 to 8, 64x64 in steps 9 to 10" in caplog.text
    assert [row["step"] for row in result.metrics if "eval/knn/k10" in row] == [4, 8]
    trained = [(size[0], dtype) for training, size, dtype in seen if training]
    assert trained == [(size, torch.uint8 if size == 64 else torch.float32) for size in SIZES]
    assert {size for training, size, _ in seen if not training} == {(64, 64)}


def test_a_network_of_one_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shape = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vit = {"name": "vit_tiny_patch16_224", "size": 64, "kwargs": shape}
    with pytest.raises(ConfigError, match=r"set backbone.kwargs.dynamic_img_size=true"):
        unlabeled.pretrain(**(settings(tmp_path / "run") | {"backbone": vit}))
    assert not (tmp_path / "run").exists()


def rows(out: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in TIMED} for row in read_metrics(out / "metrics.jsonl")
    ]


def assert_same_bits(a: Any, b: Any) -> None:
    assert json.dumps(a, default=_bits) == json.dumps(b, default=_bits)


def _bits(tensor: Tensor) -> Any:
    return [str(tensor.dtype), tensor.tolist()]
