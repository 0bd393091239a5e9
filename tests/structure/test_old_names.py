"""Names of version 0.1.0 in Python: what plugins and scripts wrote then still works."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlabeled
from unlabeled import _moved, testing
from unlabeled.eval.size_curve import SizeCurve
from unlabeled.pretext.registry import REGISTRY, register_task
from unlabeled.report.document import read_report
from unlabeled.ssl.core.errors import CheckpointError
from unlabeled.workflows.gauntlet.cells import CellResult


class Views:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, picture: Tensor) -> dict[str, Tensor]:
        image = F.interpolate(picture[None].float(), self.size, mode="bilinear", antialias=True)
        return {"image": image[0].round().to(torch.uint8)}


class OldTask(unlabeled.PretextTask):
    """Predicts the mean brightness; written for version 0.1.0."""

    Config = unlabeled.TaskConfig
    requires: ClassVar = frozenset({"pooled"})
    per_picture: ClassVar = True
    float_pictures: ClassVar = "normalised"

    def __init__(self, config: unlabeled.TaskConfig, backbone: unlabeled.Backbone) -> None:
        super().__init__(config, backbone)
        assert backbone.lacks("pooled") is None
        self.head = nn.Linear(backbone.embed_dim, 1)

    @classmethod
    def views(cls, config: Any, backbone: unlabeled.Backbone) -> Views:
        return Views(backbone.input_size)

    def forward(self, batch: unlabeled.Batch) -> unlabeled.StepOutput:
        images = self.backbone.normalize(batch["image"])
        guess = self.head(self.backbone.pooled(images)).float().squeeze(-1)
        return unlabeled.StepOutput(F.mse_loss(guess, images.float().mean((1, 2, 3))), {})

    def visualize(self, batch: unlabeled.Batch) -> dict[str, Tensor]:
        return {"first": batch["image"][0]}

    def load_official(self, state: Any) -> tuple[list[str], list[str]]:
        if "a" not in state:
            raise CheckpointError("task: not a file of this task")
        return sorted(state), []


class OldEvaluator(unlabeled.Evaluator):
    """Counts images; written for version 0.1.0."""

    name: ClassVar = "count"
    title: ClassVar = "Count"
    needs: ClassVar = "pictures"

    def run(self, subject: Any) -> Iterator[tuple[str, unlabeled.Value]]:
        yield "count", len(subject.pictures()[0])
        yield "width", subject.network().embed_dim if subject.backbone is not None else 0


def test_a_task_of_then_keeps_the_contract_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "targets", dict(REGISTRY.targets))  # other tests go through all that is registered
    register_task("old_task", "tests.structure.test_old_names:OldTask")
    unlabeled.check_task("old_task", parity=False)
    assert (OldTask.per_image, OldTask.float_images) == (True, "normalized")
    task = unlabeled.create_task({"name": "old_task"}, unlabeled.create_backbone("nin_cifar"))
    assert task.load_reference({"a": torch.ones(1)}) == (["a"], [])
    built_in = unlabeled.create_task({"name": "simclr"}, unlabeled.create_backbone("nin_cifar"))
    with pytest.raises(CheckpointError, match="SimCLR has no reference checkpoint layout"):
        built_in.load_official({})


def test_an_evaluator_of_then_needs_what_it_needed() -> None:
    assert OldEvaluator.needs == "images"


def test_results_answer_to_their_old_names(tmp_path: Path) -> None:
    settings = {"evaluators": ["knn"], "limit": 60, "maps": 0, "embedding": None}
    results = unlabeled.evaluate("nin_cifar", data="digits", pretrained=False, evaluate=settings, out=tmp_path)
    assert results.train_pictures == results.train_images > 0
    assert results.encoders["backbone"].pictures is results.encoders["backbone"].images
    assert unlabeled.summarize(results).summary == unlabeled.summarize(results).text
    with pytest.raises(AttributeError, match="'Results' object has no attribute 'nothing'"):
        results.nothing  # noqa: B018


@pytest.mark.parametrize("old", ["Evidence", "Subject", "Verdict", "gather_rows", "judge", "map_pictures"])
def test_public_names_lead_on_with_a_warning(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"unlabeled.{old} is now unlabeled.{_moved.RENAMED[old]}"):
        assert getattr(unlabeled, old) is getattr(unlabeled, _moved.RENAMED[old])


@pytest.mark.parametrize(("old", "new"), [("Subject", "TaskCase"), ("pictures", "images")])
def test_names_of_the_checks_lead_on_too(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"unlabeled.testing.{old} is now unlabeled.testing.{new}"):
        assert getattr(testing, old) is getattr(testing, new)
    with pytest.raises(AttributeError, match=r"module 'unlabeled.testing' has no attribute 'nothing'"):
        testing.nothing  # noqa: B018


def test_old_modules_know_their_names_of_then() -> None:
    with pytest.warns(DeprecationWarning, match="is now"):
        module = importlib.reload(importlib.import_module("unlabeled.eval.report.verdict"))
    assert module.judge is unlabeled.summarize


def report(schema: int) -> dict[str, Any]:
    row = {"metric": "knn/k20", "label": "kNN", "headline": True, "values": {}, "differences": {}}
    document: dict[str, Any] = {
        "schema": schema,
        "run": {},
        "verdict": {"level": "alone", "summary": "Measured.", "details": []},
        "comparison": [row],
        "evidence": {
            "encoders": {"backbone": {"title": "backbone", "metrics": {"spectrum/pictures": 5.0, "knn/k20": 0.5}}},
            "train_pictures": 10,
            "test_pictures": 4,
        },
        "pictures": ["views"],
        "sizes": {"held": 3},
    }
    if schema == 1:
        document["evidence"]["confusion"] = [[1, 0], [0, 1]]
        del document["sizes"]
        return document
    section = {"name": "knn", "title": "kNN", "rows": [row], "notes": [], "arrays": {}, "pictures": {"backbone": []}}
    return document | {"evaluators": [section], "embedding": None, "maps": []}


@pytest.mark.parametrize("schema", [1, 2])
def test_reports_of_older_schemas_are_read(tmp_path: Path, schema: int) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report(schema)))
    found = read_report(file)
    assert found["schema"] == 3
    assert found["summary"]["text"] == "Measured."
    assert (found["results"]["train_images"], found["results"]["test_images"]) == (10, 4)
    assert found["results"]["encoders"]["backbone"]["metrics"] == {"spectrum/images": 5.0, "knn/k20": 0.5}
    assert found["images"] == ["views"]
    assert found["evaluators"][0]["images"] in ({}, {"backbone": []})
    assert found.get("sizes") in (None, {"stored": 3})
    assert not {"verdict", "evidence", "pictures"} & found.keys()


def test_measured_sizes_and_cells_of_then_are_read() -> None:
    stored = {
        "settings": {"evaluate.recalibrate_pictures": 8},
        "headline": ["knn/k20"],
        "train_pictures": 5,
        "test_pictures": 2,
        "sizes": 3,
    }
    curve = SizeCurve.model_validate(stored)
    assert (curve.train_images, curve.test_images) == (5, 2)
    assert curve.settings == {"evaluate.recalibrate_images": 8}
    assert SizeCurve.model_validate_json(curve.model_dump_json()) == curve
    cell = {"entrant": "a", "data": "b", "evaluator": "knn", "seed": 0, "status": "done", "test_pictures": 7}
    assert CellResult.model_validate(cell).test_images == 7
