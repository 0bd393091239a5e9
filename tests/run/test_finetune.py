"""``unlabeled finetune``: a classifier that learned, its baseline, exact resume, plain timm files, clear faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import unlabeled
from unlabeled.cli import main
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.weights import export_backbone, load_backbone
from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.signals import EXIT_STOPPED
from unlabeled.ssl.train import loop as engine
from unlabeled.workflows.finetune.run import FinetuneResult, baseline_of, finetune_config

sys.path.insert(0, str(Path(__file__).parent))  # for `launch`, in the processes too

from launch import launch

ROOT = Path(__file__).resolve().parents[2]
RESNET = {"size": 16, "channels": [16, 16, 16, 32], "stem_width": 8, "output_stride": 8}
FAST = {
    "batch_size": 32,
    "augment": None,
    "optim": {"lr": 0.04, "layer_decay": None},
    "schedule": {"warmup_epochs": 0.5},
    "engine": {"workers": 0, "device": "cpu"},
    "log": {"progress": False, "tensorboard": False},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small ResNet."""
    torch.manual_seed(0)
    return export_backbone(create_backbone("resnet18", **RESNET), tmp_path_factory.mktemp("target") / "x.safetensors")


@pytest.fixture(scope="module")
def result(target: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    out = tmp_path_factory.mktemp("finetune") / "run"
    data = {"name": "digits", "limit": 640}
    return unlabeled.finetune(target, data, out=out, epochs=5, ema=0.9, evaluate={"every": 2.5}, **FAST)


def test_it_learns_far_above_chance_and_says_how_far_above_random_weights(result: FinetuneResult) -> None:
    assert result.accuracy is not None
    assert result.baseline is not None
    top1 = result.accuracy.values["top1"]
    assert top1.low > 0.5, "chance is 0.1"
    assert 0 < result.baseline.values["top1"].value < 1
    assert result.accuracy.values["top5"].value >= top1.value
    assert result.accuracy.confusion.sum() == result.accuracy.images == 451
    assert result.accuracy.confusion.trace() == round(top1.value * 451)
    curve = [row["test_top1_averaged"] for row in result.metrics if "test_top1_averaged" in row]
    assert curve[-1] == pytest.approx(top1.value)


def test_it_leaves_exactly_this(result: FinetuneResult) -> None:
    steps = [f"checkpoints/step_{step:08d}/{name}" for step in (80, 100)
             for name in ("model.safetensors", "optimizer.pt", "state.json")]  # fmt: skip
    run = ["config.yaml", "metrics.jsonl", "checkpoints/last", *steps]
    assert {str(path.relative_to(result.out)) for path in result.out.rglob("*") if path.is_file()} == {
        *run, *(f"scratch/{name}" for name in run), "classifier.safetensors", "classifier.json",
        *(f"report/report.{kind}" for kind in ("html", "md", "json")),
    }  # fmt: skip


def test_the_report_quotes_the_averaged_weights_against_the_baseline(result: FinetuneResult) -> None:
    assert result.report is not None
    assert result.accuracy is not None
    assert result.baseline is not None
    document = json.loads(result.report.with_suffix(".json").read_text())
    quoted = document["comparison"][0]
    assert quoted["label"] == "top-1, averaged weights"
    assert quoted["values"]["backbone"]["value"] == result.accuracy.values["top1"].value
    assert quoted["values"]["from scratch"]["value"] == result.baseline.values["top1"].value
    gap = quoted["differences"]["from scratch"]
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert document["summary"]["level"] == ("better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "even")
    page = result.report.read_text()
    assert document["summary"]["text"] in page
    assert 'src="http' not in page
    assert document["summary"]["text"].split(":")[0] in result.report.with_suffix(".md").read_text()


def test_plain_timm_loads_the_classifier_and_gives_its_logits(result: FinetuneResult) -> None:
    made = json.loads((result.out / "classifier.json").read_text())
    assert made["classes"] == [str(digit) for digit in range(10)]
    model = timm.create_model(made["name"], checkpoint_path=str(result.weights), **made["kwargs"]).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), result.backbone.model.eval()(x))
    again = load_backbone(result.weights)
    assert again.embed_dim == result.backbone.embed_dim


def test_the_exported_weights_are_the_averaged_ones(result: FinetuneResult) -> None:
    state = load_file(result.out / "checkpoints" / "step_00000100" / "model.safetensors")
    exported = load_file(result.weights)
    for name, tensor in exported.items():
        assert torch.equal(tensor, state[f"ema.module.model.{name}"]), name
    assert not torch.equal(exported["fc.weight"], state["backbone.model.fc.weight"])


def test_the_baseline_differs_in_weights_and_layer_decay_alone(target: Path) -> None:
    config = finetune_config(str(target), ["data=digits", "ema=0.9"])
    other = baseline_of(config)
    assert config.optim.layer_decay == 0.65
    assert other.optim.layer_decay is None
    changed = {"scratch", "optim", "out"}
    assert config.model_dump(exclude=changed) == other.model_dump(exclude=changed)
    assert config.optim.model_dump(exclude={"layer_decay"}) == other.optim.model_dump(exclude={"layer_decay"})


def test_frozen_trains_the_classifier_alone(target: Path, tmp_path: Path) -> None:
    data = {"name": "digits", "limit": 320}
    done = unlabeled.finetune(target, data, out=tmp_path / "x", epochs=1, frozen=True, baseline=False, **FAST)
    before, after = load_file(target), load_file(done.weights)
    assert after.keys() - before.keys() == {"fc.weight", "fc.bias"}
    for name, tensor in before.items():  # batch-norm statistics too
        assert torch.equal(tensor, after[name]), name
    assert after["fc.weight"].abs().max() > 1e-2
    assert done.baseline is None


class _KilledError(Exception):
    pass


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int, folder: str) -> None:
    """The run in `folder` dies after `step` steps."""
    record = engine.record

    def record_and_die(run: Any, done: int, *arguments: Any) -> None:
        record(run, done, *arguments)
        if done == step and run.config.out.name == folder:
            raise _KilledError

    monkeypatch.setattr(engine, "record", record_and_die)


def test_killed_in_either_half_and_resumed_equals_never_stopped(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FAST | {
        "augment": {"flip": 0.0, "erase": 0.5},
        "engine": {"workers": 0, "device": "cpu", "checkpoint_steps": 2},
        "label_fraction": 0.2,
        "epochs": 1,
        "ema": 0.9,
        "model": {"drop_path": 0.2},
    }
    whole = unlabeled.finetune(target, "digits", out=tmp_path / "whole", **settings)
    for folder in ("broken", "scratch"):
        with monkeypatch.context() as patch:
            killed_after(patch, 3, folder)
            with pytest.raises(_KilledError):
                unlabeled.finetune(target, "digits", out=tmp_path / "broken", **settings)
    broken = unlabeled.finetune(target, "digits", out=tmp_path / "broken", **settings)
    for part in ("", "scratch"):
        states = [
            load_file(one.out / part / "checkpoints" / "step_00000008" / "model.safetensors") for one in (whole, broken)
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert int(states[0]["updates"]) == 8
    assert whole.accuracy is not None
    assert broken.accuracy is not None
    assert whole.accuracy.values == broken.accuracy.values


def test_a_signal_ends_with_75(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = engine.record

    def record_and_signal(run: Any, done: int, *arguments: Any) -> None:
        import signal

        record(run, done, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(engine, "record", record_and_signal)
    overrides = [
        "data=digits",
        "augment=null",
        "epochs=1",
        "engine.workers=0",
        "engine.device=cpu",
        f"out={tmp_path / 'x'}",
    ]
    assert main(["finetune", str(target), *overrides]) == EXIT_STOPPED
    assert (tmp_path / "x" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "x" / "classifier.safetensors").exists()


def test_a_run_brings_its_data_and_a_classifier_can_be_tuned_further(result: FinetuneResult, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings = {"task": {"name": "mae"}, "data": {"name": "shapes", "count": 32, "limit": 8}}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))
    found = finetune_config(str(tmp_path / "run"), [])
    assert found.data == DataConfig(name="shapes", count=32)
    settings["data"] = {"name": "folder", "path": "images", "count": 2048}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))
    named = finetune_config(str(tmp_path / "run"), []).data.model_extra
    assert named == {"path": Path("images"), "test_path": None, "test_fraction": 0.2, "labels": True}
    overrides = {"out": tmp_path / "more", "epochs": 1, "label_fraction": 0.1, "baseline": False}
    more = unlabeled.finetune(result.weights, "digits", **FAST | overrides | {"optim__lr": 1e-9})
    old, new = load_file(result.weights), load_file(more.weights)
    torch.testing.assert_close(old["conv1.weight"], new["conv1.weight"], atol=1e-6, rtol=0)
    assert new["fc.weight"].abs().max() < 1e-3, "the classifier is a new one"


def write_classes(folder: Path, *names: str, count: int = 4) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.effect_noise((16, 16), 60).convert("RGB").save(folder / name / f"{index}.png")
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unlabeled")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data: not given; a target other than a run folder needs labeled data"),
        (["data=digits", "label_fraction=0.001"], "label_fraction: 0.001 leaves none of the"),
        (["data=digits", "label_fraction=2"], "label_fraction: 2 is not possible; give less than or equal to 1"),
        (
            ["data=digits", "batch_size=63"],
            "batch_size: mixup needs an even number of images per process and micro-step, not 63",
        ),
        (["data=digits", "batch_size=2000"], "batch_size: 2000 is larger than the data (1346 images)"),
        (["data=digits", "augment.auto=rnd-m9"], "augment.auto: 'rnd-m9' is not a policy of timm"),
        (["data=digits", "augment.crop=[1.0,0.5]"], "augment: crop [1.0, 0.5] is not possible; give the smaller frac"),
        (["data=digits", "augment.jitter=0.4"], "jitter has no effect with auto"),
        (
            ["data=digits", "augment.mixpu=1"],
            "augment.mixpu: there is no such setting in augment; did you mean 'mixup'",
        ),
        (["data=digits", "optim.name=adamm"], "optim.name: 'adamm' is not an optimizer"),
        (["data=digits", "model.kwargs={dept:1}"], "model.kwargs.dept: resnet18 takes no such argument"),
        (["data=digits", "model.kwargs={block_args:{}, channels:[8,8,8,8]}"], "has shape"),
        (["data=digits", "ema=1"], "ema: 1 is not possible; give less than 1"),
    ],
)
def test_bad_words(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert main(["finetune", str(target), f"out={out}", "engine.device=cpu", "engine.workers=0", *overrides]) == 2
    assert message in said(capsys)
    assert not out.exists()


def test_bad_targets_and_folders(result: FinetuneResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        ("runs/nope", "target: 'runs/nope' does not exist; give a run folder, a weights file or a timm model"),
        ("no_such_run", "'no_such_run' is not a run folder, weights file or timm model"),
        (str(result.out), "is a fine-tuning run; give"),
    ):
        assert main(["finetune", given, f"out={tmp_path / 'x'}"]) == 2
        assert message in said(capsys)
    other = ["task=rotation", "data=digits", "backbone=resnet18", "backbone.size=16"]
    assert main(["pretrain", *other, f"out={result.out}", "engine.device=cpu"]) == 2
    assert "holds another run" in said(capsys)


def test_bad_labels(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "one", "cat")
    write_classes(tmp_path / "more" / "train", "cat", "dog")
    write_classes(tmp_path / "more" / "test", "cat", "fox")
    write_classes(tmp_path / "flat", ".")
    for name, message in (
        ("one", "all training images are of class 'cat'; give data with at least two classes"),
        ("more", "is not among the training classes"),
        ("flat", "label"),
    ):
        overrides = ["data=folder", f"data.path={tmp_path / name}", f"out={tmp_path / 'run'}"]
        assert main(["finetune", str(target), *overrides]) == 2
        assert message in said(capsys)


@pytest.mark.slow
def test_two_processes_are_one(target: Path, tmp_path: Path) -> None:
    vit = create_backbone("vit_tiny_patch16_224", size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    weights = export_backbone(vit, tmp_path / "vit.safetensors")
    overrides = [
        str(weights), "data=digits", "data.limit=256", "augment=null", "epochs=1", "batch_size=32", "log.every=1",
        "engine.workers=0", "engine.device=cpu", "ema=0.9", "optim.lr=1e-2",
    ]  # fmt: skip
    assert main(["finetune", *overrides, f"out={tmp_path / 'one'}"]) == 0
    log = tmp_path / "log"
    codes = launch([*overrides, f"out={tmp_path / 'two'}"], log, script=ROOT / "finetune.py", ranks=2)
    assert codes == [0, 0], log.read_text()[-3000:]
    for part in ("", "scratch/"):
        rows = [
            [json.loads(line) for line in (tmp_path / name / part / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        ]
        for one, two in zip(*rows, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["accuracy"] == pytest.approx(one["accuracy"])
    documents = [json.loads((tmp_path / name / "report" / "report.json").read_text()) for name in ("one", "two")]
    assert documents[0]["confusion"] == documents[1]["confusion"]
