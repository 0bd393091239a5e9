"""Runs that collapse are told so, with what to change; healthy ones of all tasks are left in peace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import unlabeled
from unlabeled.pretext.registry import TASKS, create_task, task_names
from unlabeled.pretext.two_views.byol import BYOL, BYOLConfig
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.data.loader import Sample, ViewDataset
from unlabeled.ssl.task import Recipe
from unlabeled.ssl.train.collapse import DEVIATION, INFORMATION

sys.path.insert(0, str(Path(__file__).parent))

from test_pretrain import settings

STEPS = 110
"""The alarm lets 50 pass and wants five readings, ten steps apart."""
RATES = {"dino": 1e-4, "ibot": 1e-4}
"""Of healthy runs, otherwise 0.001. The published rule gives self-distillation 3e-5 for batches of 16; at 0.001 iBOT
does collapse, and is told so."""
FIGURES = {"feature_spread", "feature_rank", DEVIATION, INFORMATION}


@pytest.fixture(autouse=True)
def _views_of_four_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs see the views of four epochs again and again: to draw them is most of what these small networks cost."""
    drawn: dict[tuple[int, int], Sample] = {}
    draw = ViewDataset.__getitem__

    def again(dataset: ViewDataset, key: tuple[int, int]) -> Sample:
        epoch, index = key
        if (found := drawn.get((epoch % 4, index))) is None:
            found = drawn[epoch % 4, index] = draw(dataset, (epoch % 4, index))
        return found

    monkeypatch.setattr(ViewDataset, "__getitem__", again)


class WithoutPredictor(BYOL):
    """BYOL without what keeps it from collapsing, under an optimizer that collapses it soon."""

    recipe: ClassVar[Recipe] = {"optim": {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.05}}

    def __init__(self, config: BYOLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.predictor = nn.Identity()


def words_of(task: str, lr: float, **changes: Any) -> dict[str, Any]:
    """A run of STEPS steps on drawn shapes, with the rate `lr` and some settings of the task changed."""
    overrides = settings(task)
    return overrides | {
        "task": overrides["task"] | changes,
        "epochs": STEPS * overrides["batch_size"] / overrides["data"]["count"],
        "optim": {"lr": lr, "lr_scaling": "none"},
        "engine": overrides["engine"] | {"cpu_kernels": False, "checkpoint_epochs": 1000},
        "log": {"every": 10, "progress": False, "tensorboard": False},
        "evaluate": {"final": False},
    }


def watched_figures(overrides: dict[str, Any]) -> set[str]:
    """The figures of a task that the alarm can look at; none for tasks that cannot collapse."""
    network = overrides["backbone"]
    task = create_task(overrides["task"], create_backbone(network["name"], size=network["size"], **network["kwargs"]))
    views = type(task).views(task.config, task.backbone)
    rows = [views(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)) for _ in range(8)]
    output = task({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    given = {"feature_spread", "feature_rank"} if output.features is not None else set()
    return FIGURES & (given | output.logs.keys())


def warnings_of(overrides: dict[str, Any], out: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the alarm says in a run, which goes on to its end all the same; it has something to look at throughout."""
    result = unlabeled.pretrain(**overrides, out=out)
    figures = watched_figures(overrides)
    read = [row["step"] for row in result.metrics if figures <= row.keys()]
    assert read == list(range(10, STEPS + 1, 10))
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("collapse: ")]


@pytest.mark.slow
def test_vicreg_without_its_variance_term_is_told_to_raise_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = words_of("vicreg", 2e-2, variance_weight=0, covariance_weight=0)
    (warning,) = warnings_of(overrides, tmp_path / "run", caplog)
    assert "the features of all images have shrunk to nearly nothing since step" in warning
    assert "raise task.variance_weight" in warning


@pytest.mark.slow
def test_byol_without_a_predictor_is_told_that_all_features_are_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "without_predictor", f"{__name__}:WithoutPredictor")
    overrides = words_of("byol", 2e-2, name="without_predictor", momentum=0)
    (warning,) = warnings_of(overrides, tmp_path / "run", caplog)
    assert "the features of all images are nearly the same since step" in warning
    assert "raise task.momentum" in warning


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_a_healthy_run_is_not_warned(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = words_of(task, RATES.get(task, 1e-3))
    if not watched_figures(overrides):
        pytest.skip(f"{task} gives no features: it cannot collapse")
    assert warnings_of(overrides, tmp_path / "run", caplog) == []
