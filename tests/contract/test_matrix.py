"""The committed matrix: it is complete, its entries hold when tried again, and its page matches them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm

from unlabeled.pretext.registry import create_task, task_class, task_names
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CapabilityError
from unlabeled.workflows.compatibility.measure import Matrix, MatrixEntry, architecture, try_task
from unlabeled.workflows.compatibility.page import render_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "matrix.md"
MATRIX = Matrix.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
RUNS, REFUSALS = 12, 6
LARGE = {"byoanet"}
"""Modules whose network takes images of 256 pixels, and a step of it seconds."""
same_timm = pytest.mark.skipif(timm.__version__ != MATRIX.timm, reason=f"the matrix is for timm {MATRIX.timm}")


def sample(status: str, count: int) -> list[tuple[str, str]]:
    """(module, task) of `count` entries of `status`, the same ones each time, from all tasks in turn."""
    drawn: dict[str, list[tuple[str, str]]] = {}
    for module, task, _ in MATRIX.having(status):
        if module in LARGE and status == "runs":
            continue
        drawn.setdefault(task, []).append((module, task))
    for pairs in drawn.values():
        pairs.sort(key=lambda pair: hashlib.sha256("/".join(pair).encode()).hexdigest())
    turns = [(position, pair) for pairs in drawn.values() for position, pair in enumerate(pairs)]
    return [pair for _, pair in sorted(turns)[:count]]


@same_timm
def test_every_module_and_every_task_has_a_cell() -> None:
    assert sorted(MATRIX.entries) == sorted(timm.list_modules())
    for module, row in MATRIX.entries.items():
        assert sorted(row) == task_names(), f"{module}: run `make matrix`"


def test_nothing_fails_in_another_way_than_by_refusing() -> None:
    assert MATRIX.having("fault") == []
    assert all(reason for _, _, reason in MATRIX.having("cannot"))


def test_the_page_shows_these_cells() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(MATRIX)


@pytest.mark.slow
@same_timm
@pytest.mark.parametrize(("module", "task"), sample("runs", RUNS))
def test_what_runs_runs(module: str, task: str) -> None:
    network = architecture(module)
    backbone = create_backbone(network["name"], size=network["size"], **network.get("kwargs", {}))
    assert try_task(task, backbone) == MatrixEntry("runs")


@pytest.mark.slow
@same_timm
@pytest.mark.parametrize(("module", "task"), sample("cannot", REFUSALS))
def test_what_cannot_says_why(module: str, task: str) -> None:
    network = architecture(module)
    backbone = create_backbone(network["name"], size=network["size"], **network.get("kwargs", {}))
    entry = MATRIX.entries[module][task]
    assert try_task(task, backbone) == entry
    with pytest.raises(CapabilityError) as caught:
        create_task({"name": task, **task_class(task).small_settings}, backbone)
    assert entry.reason in str(caught.value)
