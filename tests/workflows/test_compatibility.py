"""``unlabeled matrix``: its entries, its overrides, and that its page and its JSON file stay in sync."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import unlabeled.workflows.compatibility.measure as matrix_module
from unlabeled.cli import main
from unlabeled.pretext.registry import TASKS
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, PretextTask, StepOutput, TaskConfig
from unlabeled.workflows.compatibility.measure import (
    Matrix,
    MatrixEntry,
    MatrixRun,
    architecture,
    matrix_config,
    measure,
    try_task,
)
from unlabeled.workflows.compatibility.page import render_page, render_terminal, write_page


class _Plain(PretextTask):
    """A task of the tests: a linear layer on pooled features."""

    Config = TaskConfig

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = nn.Linear(backbone.embed_dim, 1)

    @classmethod
    def views(cls, config: TaskConfig, backbone: Backbone) -> Views:
        height, width = backbone.input_size
        return lambda image: {"image": image[:, :height, :width].float() / 255}

    def forward(self, batch: Batch, *args: object, **draw: Tensor) -> StepOutput:
        return StepOutput(self.head(self.backbone(batch["image"])).square().mean(), {})


class _Idle(_Plain):
    """Trains a parameter that its loss does not reach."""

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.unused = nn.Parameter(torch.zeros(1))


class _Infinite(_Plain):
    """Has an infinite loss."""

    def forward(self, batch: Batch, *args: object, **draw: Tensor) -> StepOutput:
        return StepOutput(super().forward(batch).loss * float("inf"), {})


class _Broken(_Plain):
    """Has a bug."""

    def forward(self, batch: Batch, *args: object, **draw: Tensor) -> StepOutput:
        raise IndexError("there is no\nsecond line")


class _Choosy(_Plain):
    """Refuses by itself, with a message of its own."""

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        raise CapabilityError(f"backbone: {backbone.name} cannot do Choosy: it is too small; take another")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (_Plain, _Idle, _Infinite, _Broken, _Choosy):
        monkeypatch.setitem(TASKS, cls.__name__.strip("_").lower(), f"{__name__}:{cls.__name__}")


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(
    ("task", "entry"),
    [
        ("plain", MatrixEntry("runs")),
        ("idle", MatrixEntry("fault", "unused gets no gradient")),
        ("infinite", MatrixEntry("fault", "the loss is inf")),
        ("broken", MatrixEntry("fault", "IndexError: there is no")),
        ("choosy", MatrixEntry("cannot", "it is too small; take another")),
        ("mae", MatrixEntry("cannot", "convolutions need the whole grid")),
    ],
)
def test_an_entry_has_the_result(task: str, entry: MatrixEntry) -> None:
    backbone = create_backbone("test_resnet", size=32)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert try_task(task, backbone) == entry
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.parameters())


def test_words() -> None:
    assert matrix_config([]) == MatrixRun()
    run = matrix_config(["task=mae", "module=[beit,cait]", "out=docs/reference/matrix.md"])
    assert (run.task, run.module, run.out) == (("mae",), ("beit", "cait"), Path("docs/reference/matrix.md"))
    assert matrix_config(["task=mae,rotation"]).task == ("mae", "rotation")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task=may", "task: 'may' is not a pretext task; did you mean 'mae'"),
        ("module=biet", "module: 'biet' is not an architecture module of timm; did you mean 'beit'"),
        ("modul=beit", "modul: there is no such setting; did you mean 'module'"),
        ("beit", "'beit' is not a setting; write key=value"),
        (
            "out=docs/reference/matrix.json",
            "^out: docs/reference/matrix.json is not a Markdown file; give a name such as docs/reference/matrix.md",
        ),
    ],
)
def test_words_that_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matrix_config([word])


def test_a_row_is_measured_and_the_rest_of_the_page_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "matrix.md"
    assert main(["matrix", "task=mae,rotation", "module=sknet", f"out={page}"]) == 0
    assert main(["matrix", "task=mae", "module=vision_transformer", f"out={page}"]) == 0
    found = Matrix.loads(page.with_suffix(".json").read_text())
    assert found.entries == {
        "sknet": {"mae": MatrixEntry("cannot", "convolutions need the whole grid"), "rotation": MatrixEntry("runs")},
        "vision_transformer": {"mae": MatrixEntry("runs")},
    }
    assert found.networks["vision_transformer"] == "test_vit at 64 px"
    text = page.read_text()
    assert "| mae | 1 of 2 | vision_transformer |" in text
    assert "| rotation | 1 of 1 | sknet |" in text
    assert "| sknet | <sub>1</sub> | ✓ |" in text
    assert "| vision_transformer | ✓ |  |" in text
    assert "1. convolutions need the whole grid" in text
    assert "1 x convolutions need the whole grid" in capsys.readouterr().out


def test_a_page_that_cannot_be_added_to(tmp_path: Path) -> None:
    page = tmp_path / "matrix.md"
    part = MatrixRun(task=("rotation",), module=("sknet",), out=page)
    write_page(Matrix("0.0.1", {"beit": "b"}, {"beit": {"mae": MatrixEntry("runs")}}), page)
    with pytest.raises(ConfigError, match=r"out: .*matrix.json is for timm 0.0.1, installed is .*; measure all"):
        measure(part)
    page.with_suffix(".json").write_text("[]")
    with pytest.raises(ConfigError, match=r"out: .*matrix.json is not a stored matrix .*; measure all entries"):
        measure(part)


def test_a_whole_run_forgets_what_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "matrix.md"
    write_page(Matrix(networks={"gone": "g"}, entries={"gone": {"jigsaw": MatrixEntry("runs")}}), page)
    monkeypatch.setattr(timm, "list_modules", lambda: ["sknet"])
    monkeypatch.setattr(matrix_module, "task_names", lambda: ["rotation"])
    assert measure(MatrixRun(out=page)).entries == {"sknet": {"rotation": MatrixEntry("runs")}}


def test_faults_are_shown() -> None:
    cells = {"beit": {"mae": MatrixEntry("fault", "IndexError: oh")}, "cait": {"mae": MatrixEntry("cannot", "no")}}
    matrix = Matrix(networks={"beit": "b", "cait": "c"}, entries=cells)
    page = render_page(matrix)
    assert "| beit | **✗** <sub>2</sub> |" in page
    assert "2. **fault**: IndexError: oh" in page
    shown = StringIO()
    Console(width=100, file=shown).print(render_terminal(matrix))
    assert "fault: mae on beit: IndexError: oh" in shown.getvalue()
    assert Matrix.loads(matrix.dumps()) == matrix


def test_the_page_groups_reasons_that_differ_in_the_place_only() -> None:
    reasons = ["stem.0: Flat has no masked form", "the network: Flat has no masked form", "its map of 7x7 is odd"]
    cells = {f"m{position}": {"spark": MatrixEntry("cannot", reason)} for position, reason in enumerate(reasons)}
    page = render_page(Matrix(networks=dict.fromkeys(cells, "n"), entries=cells))
    assert "1. Flat has no masked form\n2. its map of NxN is odd\n" in page
    assert "| m1 | <sub>1</sub> |\n| m2 | <sub>2</sub> |" in page


def test_a_module_that_the_table_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matrix_module, "_TABLE", tmp_path / "none.json")
    (tmp_path / "none.json").write_text("{}")
    assert architecture("sknet") == {"name": "skresnet18", "size": 64}
    assert architecture("crossvit") == {"name": "crossvit_tiny_240", "size": (240, 240)}
    assert measure(MatrixRun(task=("rotation",), module=("sknet",))).entries == {
        "sknet": {"rotation": MatrixEntry("runs")}
    }
