"""One short run from images to report: what it leaves behind, what it says, and how it is started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import unlabeled
from unlabeled.cli import main
from unlabeled.pretext.registry import task_names
from unlabeled.report.document import read_report
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.signals import EXIT_STOPPED
from unlabeled.ssl.train.monitor import read_metrics

sys.path.insert(0, str(Path(__file__).parent))  # for `launch`, in the processes too

from launch import launch

ROOT = Path(__file__).resolve().parents[2]
RESNET = {"name": "resnet18", "size": 32, "kwargs": {"channels": [8, 8, 16, 16], "output_stride": 8}}
BACKBONES: dict[str, dict[str, Any]] = {
    "convmae": {
        "name": "convmae_small",
        "size": 32,
        "kwargs": {"patch_size": [2, 2, 2], "dims": [8, 8, 16], "depths": [1, 1, 1], "num_heads": 2},
    },
    "fcmae": {
        "name": "convnextv2_atto",
        "size": 32,
        "kwargs": {"patch_size": 1, "dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    },
    "ibot": {
        "name": "vit_tiny_patch16_224",
        "size": 32,
        "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "dynamic_img_size": True},
    },
    "mae": {
        "name": "vit_tiny_patch16_224",
        "size": 32,
        "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "obow": RESNET,
    "pixcontrast": RESNET,
    "pixpro": RESNET,
    "poa": {
        "name": "vit_tiny_patch16_224",
        "size": 32,
        "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "dynamic_img_size": True},
    },
    "spark": RESNET,
}
CONVNEXT = {"name": "convnext_atto", "size": 32, "kwargs": {"dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}}
SMALL = {
    "byol": {"name": "byol", "hidden": 32, "dim": 16},
    "context": {"name": "context", "grid": [2, 2], "widths": [16, 16]},
    "convmae": {"name": "convmae", "decoder": {"dim": 16, "depth": 1, "heads": 2}},
    "dino": {"name": "dino", "locals": 2, "head": {"prototypes": 32, "hidden": 16, "bottleneck": 8}},
    "fcmae": {"name": "fcmae", "decoder": {"dim": 16}},
    "ibot": {"name": "ibot", "locals": 2, "head": {"prototypes": 32, "hidden": 16, "bottleneck": 8}},
    "mae": {"name": "mae", "decoder": {"dim": 16, "depth": 1, "heads": 2}},
    "obow": {"name": "obow", "words": 40, "image_crops": {"number": 1}, "patches": {"number": 2}},
    "pixcontrast": {"name": "pixcontrast", "hidden_dim": 16, "feature_dim": 8},
    "pixpro": {"name": "pixpro", "hidden_dim": 16, "feature_dim": 8, "instance_weight": 1.0},
    "poa": {"name": "poa", "locals": 2, "prototypes": [16, 32], "hidden": 16, "bottleneck": 8, "chunk": 8},
    "simclr": {"name": "simclr", "hidden": 32, "dim": 16},
    "spark": {"name": "spark", "decoder": {"width": 16}},
    "vicreg": {"name": "vicreg", "hidden": 32, "dim": 16},
}


def settings(task: str) -> dict[str, Any]:
    return {
        "task": SMALL.get(task, {"name": task}),
        "backbone": BACKBONES.get(task, CONVNEXT),
        "data": {"name": "shapes", "count": 32},
        "epochs": 2,
        "batch_size": 8,
        "schedule": {"warmup_epochs": 0},
        "engine": {"workers": 0, "device": "cpu"},
        "log": {"every": 1, "progress": False},
        "evaluate": {"every": 1, "linear": {"epochs": 2}},
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, unlabeled.PretrainResult]:
    """A finished run of every task."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: unlabeled.pretrain(**settings(name), out=folder / name) for name in task_names()}


@pytest.mark.parametrize("task", task_names())
def test_a_run_leaves_exactly_this(results: dict[str, unlabeled.PretrainResult], task: str) -> None:
    out = results[task].out
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert [name for name in found if name.startswith("pictures/")] != []
    assert {name for name in found if not name.startswith(("tensorboard/", "features/", "pictures/"))} == {
        "config.yaml", "metrics.jsonl", "backbone.safetensors", "backbone.json", "checkpoints/last",
        *(f"checkpoints/step_0000000{step}/{name}" for step in (4, 8)
          for name in ("model.safetensors", "optimizer.pt", "state.json")),
        *(f"report/report.{kind}" for kind in ("html", "md", "json")),
    }  # fmt: skip


@pytest.mark.parametrize("task", task_names())
def test_rows_evidence_and_report(results: dict[str, unlabeled.PretrainResult], task: str) -> None:
    result = results[task]
    steps = [row for row in result.metrics if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert {"epoch", "loss", "lr", "images_per_s", "data_wait", "grad_norm", "memory_gb"} <= steps[0].keys()
    assert [row["step"] for row in result.metrics if "eval/knn/k10" in row] == [4, 8]
    assert result.stopped is None
    assert result.results is not None
    assert set(result.results.encoders) == {"backbone", "pixels", "random"}
    assert result.report is not None
    html = result.report.read_text()
    assert "raw pixels" in html
    assert "data:image/" in html
    assert "http-equiv" not in html
    assert 'src="http' not in html


@pytest.mark.parametrize("task", task_names())
def test_the_exported_backbone_is_plain_timm(results: dict[str, unlabeled.PretrainResult], task: str) -> None:
    result = results[task]
    made = json.loads((result.out / "backbone.json").read_text())
    model = timm.create_model(made["name"], checkpoint_path=str(result.weights), **made["kwargs"]).eval()
    x = torch.randn(2, 3, *result.backbone.input_size)
    result.backbone.eval().to(memory_format=torch.contiguous_format)  # convolutions sum in another order in the other
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), result.backbone.pooled(x))


@pytest.mark.parametrize("task", task_names())
def test_resumed_in_the_middle_equals_never_stopped(
    results: dict[str, unlabeled.PretrainResult], task: str, tmp_path: Path
) -> None:
    """As if killed after the first checkpoint; `test_resume.py` really kills, at any step."""
    whole = results[task].out / "checkpoints" / "step_00000008"
    broken = tmp_path / "broken"
    shutil.copytree(results[task].out / "checkpoints" / "step_00000004", broken / "checkpoints" / "step_00000004")
    (broken / "checkpoints" / "last").write_text((whole.parent / "last").read_text().replace("08", "04"))
    shutil.copy(results[task].out / "config.yaml", broken)
    unlabeled.pretrain(**settings(task), out=broken, evaluate__final=False)
    resumed = broken / "checkpoints" / "step_00000008"
    for file in ("model.safetensors", "optimizer.pt"):
        read = load_file if file.endswith("safetensors") else partial(torch.load, weights_only=True)
        assert_same_bits(read(whole / file), read(resumed / file), file)
    assert (whole / "state.json").read_text() == (resumed / "state.json").read_text()


def assert_same_bits(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def test_a_finished_run_started_again_trains_no_step(results: dict[str, unlabeled.PretrainResult]) -> None:
    before = load_file(results["rotation"].weights)
    rows = len(results["rotation"].metrics)
    again = unlabeled.pretrain(**settings("rotation"), out=results["rotation"].out)
    assert len(again.metrics) == rows
    assert read_report(again.out / "report" / "report.json")["run"]["seconds"] > 0, "that of the first time"
    assert all(torch.equal(value, before[name]) for name, value in load_file(again.weights).items())


def test_continued_pretraining_starts_from_the_given_weights(
    results: dict[str, unlabeled.PretrainResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = settings("mae")
    overrides["backbone"] = {**overrides["backbone"], "checkpoint": str(results["mae"].out)}
    overrides["optim"] = {"lr": 1e-12, "weight_decay": 0.0}
    with caplog.at_level("INFO"):
        result = unlabeled.pretrain(**overrides, out=tmp_path / "on", evaluate__final=False)
    assert "loaded" in caplog.text
    before, after = load_file(results["mae"].weights), load_file(result.weights)
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


@pytest.mark.parametrize("labeled", [False, True])
def test_images_in_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture, labeled: bool) -> None:
    """Without labels there is a report without evidence; sub-folders are labels."""
    for index in range(48):
        path = tmp_path / "images" / (f"class{index % 2}" if labeled else ".") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 48), 20 + 60 * (index % 2)).save(path)
    overrides = settings("rotation") | {"data": tmp_path / "images", "evaluate": {"linear": {"epochs": 2}}}
    with caplog.at_level("INFO"):
        result = unlabeled.pretrain(**overrides, out=tmp_path / "run")
    assert result.report is not None
    assert result.report.is_file()
    assert (result.results is not None) == labeled
    measure = f"unlabeled evaluate {tmp_path / 'run'} data=folder data.path=LABELED data.labels=true"
    line = f"no evaluation: the images have no labels; to measure, run: {measure}"
    assert caplog.messages.count(line) == (0 if labeled else 1)
    assert "no evaluation: " not in caplog.text.replace(line, "")
    if not labeled:
        with pytest.raises(DataError, match=r"^data: the run's own data has no labels; give labeled images: data=fold"):
            unlabeled.evaluate(tmp_path / "run")


def test_evaluating_a_run_again_gives_the_same_numbers(results: dict[str, unlabeled.PretrainResult]) -> None:
    result = results["rotation"]
    assert result.results is not None
    again = unlabeled.evaluate(result.out, evaluate={"linear": {"epochs": 2}})
    assert again.encoders["backbone"].metrics == result.results.encoders["backbone"].metrics


def test_debug_is_a_tiny_run_and_multirun_makes_a_folder_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    overrides = ["task=rotation", "data=digits", "debug=true", "evaluate.final=false", "backbone=resnet18"]
    overrides += [
        "backbone.size=32",
        "backbone.kwargs={channels:[8,8,8,8],stem_width:8}",
        "engine.seed=0,1",
        "epochs=100",
    ]
    assert main(["pretrain", "--multirun", *overrides, f"out={tmp_path}/sweep"]) == 0
    assert caplog.messages[:2] == ["debug=true: epochs 100 -> 2"] * 2
    assert "run 2 of 2: engine.seed=1" in caplog.messages
    assert caplog.messages[-1] == f"2 runs finished; compare them: unlabeled report {tmp_path}/sweep/*"
    folders = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert folders == ["engine.seed=0", "engine.seed=1"]
    first, second = (read_metrics(tmp_path / "sweep" / name / "metrics.jsonl") for name in folders)
    assert len(first) == 4
    assert first[0]["loss"] != second[0]["loss"]


def test_accumulation_gives_the_large_batch(tmp_path: Path) -> None:
    runs = {}
    for parts in (1, 4):
        overrides = settings("rotation") | {
            "evaluate": {"final": False},
            "engine": {"workers": 0, "accumulation": parts},
        }
        runs[parts] = unlabeled.pretrain(**overrides, out=tmp_path / str(parts)).metrics
    for whole, summed in zip(runs[1], runs[4], strict=True):
        assert summed["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        assert summed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    overrides = settings("rotation") | {"epochs": 200, "evaluate": {"final": False}, "out": tmp_path / "run"}

    def stop() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").is_file() or not read_metrics(
            tmp_path / "run" / "metrics.jsonl"
        ):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=stop)
    thread.start()
    result = unlabeled.pretrain(**overrides)
    thread.join()
    assert result.stopped == "SIGUSR1"
    assert EXIT_STOPPED == 75
    done = result.metrics[-1]["step"]
    assert (result.out / "checkpoints" / "last").read_text() == f"step_{done:08d}"
    assert 0 < done < 800
    assert caplog.messages.count("SIGUSR1: stopping after this step, Ctrl-C to stop at once") == 1
    assert f"stopped at step {done} of 800, checkpoint written; repeat the command to continue" in caplog.messages


def test_a_finished_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = settings("rotation") | {"evaluate": {"final": False}, "out": tmp_path / "run"}
    unlabeled.pretrain(**overrides)
    caplog.clear()
    caplog.set_level("INFO")
    unlabeled.pretrain(**overrides)
    assert f"{tmp_path / 'run'} is already finished (8 steps)" in caplog.messages
    assert "32 images, 2 epochs of 4 steps = 8 steps; batch 8" in caplog.messages
    assert "resuming" not in caplog.text


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_do_what_one_does(tmp_path: Path) -> None:
    """The same images, losses and gradients for the same command; rotation draws nothing per rank."""
    overrides = [
        "task=rotation", "data=shapes", "data.count=32", "backbone=convnext_atto", "backbone.size=32",
        "backbone.kwargs={dims:[8,16,16,16],depths:[1,1,1,1]}", "epochs=2", "batch_size=8", "engine.workers=0",
        "log.every=1", "evaluate.linear.epochs=2", "evaluate.every=1",
    ]  # fmt: skip
    config = ["--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml"), "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *config, str(ROOT / "pretrain.py")]
    done = subprocess.run(
        [*launcher, *overrides, f"out={tmp_path / 'two'}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes x 1 micro-step x 4" in done.stderr
    log = tmp_path / "log"
    assert launch([*overrides, f"out={tmp_path / 'one'}"], log, script=ROOT / "pretrain.py") == [0], log.read_text()
    assert "2 processes x 1 micro-step x 4" not in log.read_text()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 10
    for single, double in zip(one, two, strict=True):
        for key in single.keys() & {"loss", "grad_norm", "lr", "eval/knn/k10"}:
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key
    reports = [json.loads((tmp_path / name / "report" / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["results"]["encoders"].keys() == reports[1]["results"]["encoders"].keys()


def test_fewer_processes_than_asked_for_are_said(tmp_path: Path) -> None:
    code = "from unlabeled.ssl.train.accelerator import create_accelerator\n"
    code += "from unlabeled.ssl.config.schema import EngineConfig\n"
    script = tmp_path / "start.py"
    script.write_text(code + "import logging; logging.basicConfig(); create_accelerator(EngineConfig())\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120)
    assert "2 processes were asked for, 1 is running" in done.stderr
