"""``unlabeled evaluate``: what a target may be, where the report goes, and one line for each mistake."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from eval_helpers import MemorySource, tiny_vit

from unlabeled.report.images import save_images
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.weights import export_backbone
from unlabeled.ssl.config.schema import DataConfig, EvaluateRun, PretrainConfig
from unlabeled.ssl.core.errors import CheckpointError, ConfigError, DataError
from unlabeled.ssl.data.source import Split
from unlabeled.workflows import evaluate as command
from unlabeled.workflows.evaluate import evaluate_target, resolve_target

FAST = {"knn": {"k": [5]}, "linear": {"epochs": 2, "lr": [0.1], "weight_decay": [0.0]}}
TINY = {
    "name": "vit_tiny_patch16_224",
    "size": 32,
    "kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
}


class FakeReport(NamedTuple):
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[DataConfig]:
    """Replaces the data by images in memory; the settings that they were opened with."""
    calls: list[DataConfig] = []

    def open_memory(config: DataConfig, split: Split = "train") -> MemorySource:
        calls.append(config)
        classes = None if config.name == "folder" and not getattr(config, "labels", False) else ("red", "green", "blue")
        return MemorySource(30 if split == "train" else 9, classes=classes, split=split)

    monkeypatch.setattr(command, "open_source", open_memory)
    return calls


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Stands in for `unlabeled.ssl.backbones.weights`, so that only this side of it is tested; names it finds
    missing."""
    missing: dict[str, list[str]] = {"names": []}
    monkeypatch.setattr(command, "load_backbone", lambda folder: tiny_vit(seed=4))
    monkeypatch.setattr(command, "load_weights", lambda backbone, path: FakeReport([], missing["names"], []))
    return missing


def request(target: str | Path, **settings) -> EvaluateRun:
    return EvaluateRun.model_validate(
        {"target": str(target), "evaluate": FAST, "device": "cpu", "workers": 0, **settings}
    )


def run_folder(folder: Path, **settings) -> Path:
    folder.mkdir()
    config = PretrainConfig.model_validate({"task": {"name": "mae"}, "backbone": TINY, "out": str(folder), **settings})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for name in ("backbone.safetensors", "backbone.json"):
        (folder / name).touch()
    rows = [
        {"step": step, "epoch": step / 10, "loss": 1 / (step + 1), "lr": 0.1, "images_per_s": 3.5}
        for step in range(0, 40, 10)
    ]
    save_images(folder, {"views": torch.full((3, 8, 8), 9, dtype=torch.uint8)})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 4')
    return folder


@pytest.mark.usefixtures("weights")
def test_a_run_folder_is_evaluated_on_its_own_data_with_labels(
    tmp_path: Path, opened: list[DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder(tmp_path / "run", data={"name": "folder", "path": str(tmp_path)}, batch_size=7)
    with caplog.at_level(logging.INFO, logger="unlabeled"):
        results = evaluate_target(request(folder))
    assert results.encoders["backbone"].metrics["knn/k5"] > 0
    assert [config.labels for config in opened] == [True, True]
    document = json.loads((folder / "report" / "report.json").read_text())
    assert document["run"]["title"] == "run"
    assert document["run"]["steps"] == 30
    assert document["run"]["images"] == 210
    assert document["run"]["seconds"] == 60
    assert document["images"] == ["views"]
    assert "What the task sees" in (folder / "report" / "report.html").read_text()
    assert document["training"]["rows"] == 4
    stopped = f"{folder} stopped at step 30 of 1000: these are unfinished weights"
    assert stopped in caplog.text
    assert document["run"]["notes"][0].startswith(stopped)
    assert (folder / "report" / "report.html").is_file()
    assert f"Report: {folder / 'report' / 'report.html'}" in caplog.text
    assert len(list((folder / "features").iterdir())) == 6


@pytest.mark.usefixtures("weights")
def test_the_data_named_for_evaluation_comes_before_the_runs_own(tmp_path: Path, opened: list[DataConfig]) -> None:
    folder = run_folder(tmp_path / "run", evaluate={"data": {"name": "shapes"}})
    evaluate_target(request(folder))
    evaluate_target(request(folder, data={"name": "digits"}))
    assert [config.name for config in opened] == ["shapes", "shapes", "digits", "digits"]


def test_a_timm_name_without_weights_reports_into_the_given_folder(tmp_path: Path, opened: list[DataConfig]) -> None:
    settings = {"pretrained": False, "data": {"name": "digits"}, "backbone": TINY, "out": str(tmp_path / "here")}
    first = evaluate_target(request("vit_tiny_patch16_224", **settings))
    second = evaluate_target(request("vit_tiny_patch16_224", **settings))
    assert first.encoders["backbone"].metrics == second.encoders["backbone"].metrics
    document = json.loads((tmp_path / "here" / "report.json").read_text())
    assert document["run"]["title"] == "vit_tiny_patch16_224, random weights"
    assert document["run"]["epochs"] is None


def test_without_out_the_report_of_a_timm_name_lies_under_reports(
    tmp_path: Path, opened: list[DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate_target(request("vit_tiny_patch16_224", pretrained=False, data={"name": "digits"}, backbone=TINY))
    assert Path("reports/vit_tiny_patch16_224/report.html").is_file()


def test_a_file_of_weights_fills_the_named_backbone(tmp_path: Path, weights: dict[str, list[str]]) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    target = resolve_target(request(file, backbone=TINY))
    assert target.backbone.embed_dim == 32
    assert target.backbone.input_size == (32, 32)
    weights["names"] = ["blocks.0.attn.qkv.weight", "norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing 2 tensors of vit_tiny.*such as blocks\.0\.attn\.qkv\.weight"):
        resolve_target(request(file, backbone=TINY))
    with pytest.raises(ConfigError, match=r"backbone\.name: not given; weights such as weights\.safetensors"):
        resolve_target(request(file))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("resnet81", "'resnet81' is not a run folder, weights file or timm model; did you mean 'resnet"),
        ("runs/nowhere", "'runs/nowhere' does not exist; give a run folder"),
        ("resnet18.pth", r"'resnet18\.pth' does not exist"),
    ],
)
def test_unknown_targets_are_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"target: {message}"):
        resolve_target(request(target))


@pytest.mark.usefixtures("weights")
def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contains no backbone\.safetensors"):
        resolve_target(request(tmp_path))
    folder = run_folder(tmp_path / "run")
    (folder / "config.yaml").write_text("task: {name: mae}\nepoch: 3\n")
    with pytest.raises(ConfigError, match=r"epoch: there is no such setting; did you mean 'epochs'"):
        resolve_target(request(folder))
    for text in ("a: [", "epochs: 3"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match="is not a run's configuration"):
            resolve_target(request(folder))


def test_published_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> Backbone:
        raise OSError("no route to host\nRetrying in 1s")

    monkeypatch.setattr(command, "create_backbone", offline)
    with pytest.raises(
        CheckpointError, match=r"of resnet18 cannot be loaded \(no route to host\); go online"
    ) as caught:
        resolve_target(request("resnet18"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="timm has no published weights for vit_small_patch16_18x2_224"):
        resolve_target(request("vit_small_patch16_18x2_224"))


def test_impossible_arguments_of_the_backbone_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"(?s)^backbone.*(?<!\n)$"):
        resolve_target(request("resnet18", pretrained=False, backbone={"name": "resnet18", "kwargs": {"wings": 2}}))


def test_missing_data_and_missing_labels_are_said(opened: list[DataConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^data: not given; a target other than a run folder needs labeled data"):
        evaluate_target(request("vit_tiny_patch16_224", pretrained=False, backbone=TINY))
    with pytest.raises(DataError, match="the data has no labels"):
        evaluate_target(
            request("vit_tiny_patch16_224", pretrained=False, backbone=TINY, data={"name": "folder", "path": "x"})
        )


def test_an_exported_backbone_comes_back(tmp_path: Path) -> None:
    backbone = tiny_vit(seed=8)
    file = export_backbone(backbone, tmp_path)
    for target in (resolve_target(request(tmp_path)), resolve_target(request(file, backbone=TINY))):
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, target.backbone.state_dict()[name]), name
