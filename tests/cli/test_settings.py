"""``unlabeled settings`` and ``unlabeled tasks`` as they are typed."""

from __future__ import annotations

import json

import pytest

from unlabeled.cli.main import main
from unlabeled.pretext.registry import task_names
from unlabeled.workflows.print_settings import WIDE


def printed(words: list[str], columns: int, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    patch.setenv("COLUMNS", str(columns))
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 119, 120, 140, 160])
@pytest.mark.parametrize(
    "words",
    [
        ["settings"],
        ["settings", "task=mae"],
        ["settings", "task=poa"],
        ["settings", "evaluator=low_label"],
        ["settings", "data=folder"],
        ["settings", "evaluate"],
        ["settings", "gauntlet"],
        ["tasks"],
    ],
    ids=" ".join,
)
def test_it_fits_and_cuts_nothing(
    words: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(words, columns, capsys, monkeypatch)
    assert max(len(line) for line in text.splitlines()) <= columns
    assert "…" not in text
    if words == ["settings", "task=mae"]:
        unit = "blocks" if columns >= WIDE else "[blocks]"  # a table has a column of its own for it
        assert all(part in text.split() for part in ("task.decoder.depth", "8", unit, "optim.lr=1.5e-4"))
        assert " ".join(text.split()).count("Fraction of the cells (patches) that is masked.") == 1
    if words == ["tasks"]:
        assert all(name in text.split() for name in task_names())
        assert "token_dropping" in text
        assert "(2022)" in text


def test_json_of_a_task(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (table,) = json.loads(printed(["settings", "task=mae", "--json"], 80, capsys, monkeypatch))
    depth = next(one for one in table["settings"] if one["name"] == "task.decoder.depth")
    assert (depth["type"], depth["default"], depth["unit"]) == ("integer", "8", "blocks")
    assert depth["meaning"].startswith("Transformer blocks.")
    assert table["recipe"]["optim.lr"] == "1.5e-4"


def test_json_of_the_overview(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(printed(["settings", "--json"], 80, capsys, monkeypatch))
    assert list(found["Tasks"]) == task_names()
    assert found["Groups of settings"]["data"].startswith("Where the images come from")


def test_json_of_the_tasks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {one["name"]: one for one in json.loads(printed(["tasks", "--json"], 80, capsys, monkeypatch))}
    assert list(found) == task_names()
    assert found["mae"]["paper"]["url"] == "https://arxiv.org/abs/2111.06377"
    assert found["mae"]["needs"] == ["token_dropping"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("schedul", "settings: 'schedul' is no group or command; did you mean 'schedule'?"),
        ("knn", "settings: 'knn' is no group or command; did you mean evaluator=knn?"),
        ("task=rotatoin", "task: 'rotatoin' is not a pretext task; did you mean 'rotation'?"),
        ("evaluator=lineal", "'lineal' is not an evaluator; did you mean 'linear'?"),
        ("data=foldr", "data: 'foldr' is not a data source; did you mean 'folder'?"),
        ("tsk=mae", "write task=NAME, evaluator=NAME or data=NAME"),
    ],
)
def test_unknown_names_are_one_line(what: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", what]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
