"""Runs side by side: the numbers of their reports, no difference between different data, and one line for bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_helpers import RUN, results

from unlabeled.cli import main
from unlabeled.eval.intervals import difference, wilson
from unlabeled.eval.results import Results
from unlabeled.report.document import report_document, write_json
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.workflows.compare import report_runs

CONFIG = "task:\n  name: {task}\ndata:\n  name: digits\nevaluate:\n  data: null\noptim:\n  lr: {lr}\nout: {task}\n"


def run_folder(folder: Path, found: Results | None, *, task: str = "mae", lr: float = 0.1, online: bool = True) -> str:
    rows: list[dict[str, float]] = [{"step": step, "epoch": step / 10, "loss": 1.0} for step in range(5)]
    if online:
        rows += [{"step": step, "epoch": step, "eval/knn/k20": step / 100} for step in range(10, 40, 10)]
    summary = replace(RUN, task=task, title=task, config=CONFIG.format(task=task, lr=lr))
    (folder / "report").mkdir(parents=True)
    write_json(report_document(summary, found, rows), folder / "report" / "report.json")
    return str(folder)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """The first clearly better in kNN, and the linear probe of all within chance."""
    return [
        run_folder(tmp_path / "a", results((0.9, 0.6, 0.5), (0.9, 0.7, 0.6))),
        run_folder(tmp_path / "b", results((0.8, 0.6, 0.5), (0.905, 0.7, 0.6)), task="simclr", lr=0.2),
        run_folder(tmp_path / "c", results((0.7, 0.6, 0.5), (0.89, 0.7, 0.6)), task="byol", online=False),
    ]


def compared(overrides: list[str], out: Path) -> dict[str, Any]:
    report_runs([*overrides, f"out={out}"])
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def test_values_baselines_and_differences_are_those_of_the_reports(three: list[str], tmp_path: Path) -> None:
    document = compared(three, tmp_path / "out")
    assert [run["label"] for run in document["runs"]] == ["a", "b", "c"]
    assert document["fair"]
    knn, linear, other = document["measures"]
    assert [row["metric"] for row in (knn, linear, other)] == ["knn/k20", "linear/top1", "knn/k10"]
    assert [row["headline"] for row in (knn, linear, other)] == [True, True, False]
    low, high = wilson(0.8, 1000)
    assert knn["values"][1] == pytest.approx({"value": 0.8, "low": low, "high": high})
    assert [one["value"] for one in knn["random"]] == [0.5, 0.5, 0.5]
    assert [one["value"] for one in knn["pixels"]] == [0.6, 0.6, 0.6]
    assert knn["differences"][0] is None
    low, high = difference(0.8, 0.9, 1000)
    assert knn["differences"][1] == pytest.approx({"value": -0.1, "low": low, "high": high})
    assert knn["best"] == [True, False, False]
    assert linear["best"] == [False, False, False], "their intervals meet"
    assert document["online"] == [[[10.0, 0.1], [20.0, 0.2], [30.0, 0.3]]] * 2 + [[]]


def test_only_settings_that_differ_are_listed(three: list[str], tmp_path: Path) -> None:
    document = compared(three, tmp_path / "out")
    assert document["settings"] == [
        {"name": "task.name", "values": ["mae", "simclr", "byol"]},
        {"name": "optim.lr", "values": [0.1, 0.2, 0.1]},
    ]


def test_an_earlier_run_differs_in_no_setting_that_its_source_did_not_read(three: list[str], tmp_path: Path) -> None:
    file = Path(three[2]) / "report" / "report.json"
    document = json.loads(file.read_text())
    earlier = "name: digits\n  count: 2048\n  labels: true\n  path: null\n  limit: null\n"
    document["run"]["config"] = document["run"]["config"].replace("name: digits\n", earlier)
    file.write_text(json.dumps(document))
    names = [row["name"] for row in compared([three[0], three[2]], tmp_path / "out")["settings"]]
    assert names == ["task.name"]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (results(count=500), "test images: 1,000 (a); 500 (d)"),
        (results(classes=("cat", "dog", "elk")), "classes: same number, but not the same ones"),
    ],
)
def test_runs_evaluated_on_different_data_are_reported_and_not_compared(
    three: list[str], tmp_path: Path, other: Results, line: str
) -> None:
    document = compared([three[0], run_folder(tmp_path / "d", other)], tmp_path / "out")
    assert not document["fair"]
    assert line in document["differs"]
    for row in document["measures"]:
        assert row["differences"] == [None, None]
        assert row["best"] == [False, False]
    assert f"<li>{line}</li>" in (tmp_path / "out" / "compare.html").read_text()


def test_different_evaluation_data_is_found_in_the_settings(three: list[str], tmp_path: Path) -> None:
    file = Path(three[1]) / "report" / "report.json"
    document = json.loads(file.read_text())
    document["run"]["config"] = document["run"]["config"].replace("data: null", "data:\n    name: shapes")
    file.write_text(json.dumps(document))
    found = compared(three[:2], tmp_path / "out")
    assert found["differs"] == ["evaluation data: digits (a); shapes (b)"]


def test_a_run_without_evidence_and_a_single_run_have_a_page(three: list[str], tmp_path: Path) -> None:
    bare = run_folder(tmp_path / "bare", None)
    document = compared([three[0], bare], tmp_path / "out")
    assert document["measures"][0]["values"][1] is None
    assert "test images: 1,000 (a); none (bare)" in document["differs"]
    alone = compared(three[:1], tmp_path / "alone")
    assert alone["settings"] == []
    assert alone["measures"][0]["best"] == [False]
    assert (tmp_path / "alone" / "compare.html").is_file()


def test_intervals_of_evaluators_are_taken_from_their_sections(three: list[str], tmp_path: Path) -> None:
    file = Path(three[0]) / "report" / "report.json"
    document = json.loads(file.read_text())
    values = {"backbone": {"value": 0.5, "low": 0.4, "high": 0.6}}
    document["results"]["encoders"]["backbone"]["metrics"]["knn/k99"] = 0.5
    row = {"metric": "knn/k99", "label": "kNN, k = 99", "values": values}
    document["evaluators"] = [{"name": "knn", "rows": [row]}]
    file.write_text(json.dumps(document))
    row = compared(three, tmp_path / "out")["measures"][-1]
    assert row["metric"] == "knn/k99"
    assert row["values"] == [values["backbone"], None, None]
    assert row["best"] == [False] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "report: no run is given"),
        (["out=x"], "report: no run is given"),
        (["NOWHERE"], r"NOWHERE does not exist; give the folder of a run"),
        (["BARE"], r"BARE contains no report\.json; write it with `unlabeled evaluate"),
        ([""], r"holds no report but 7 runs; did you mean \S+/\*\?"),
        (["A", "BROKEN"], r"report\.json cannot be read"),
        (["A", "SCHEMA"], r"report\.json has schema 99"),
        (["A", "EMPTY"], r"report\.json is not the report of a run"),
        (["A", "ODD"], r"a report\.json is damaged"),
    ],
)
def test_bad_input_is_one_line(three: list[str], tmp_path: Path, overrides: list[str], message: str) -> None:
    valid = json.loads((Path(three[0]) / "report" / "report.json").read_text())
    odd = {**valid, "comparison": [{"metric": "knn/k20", "values": {"backbone": {"value": 0.5}}}]}
    texts = {
        "BROKEN": "{",
        "SCHEMA": '{"schema": 99}',
        "EMPTY": json.dumps({"schema": valid["schema"], "results": None, "comparison": []}),
        "ODD": json.dumps(odd),
    }
    (tmp_path / "BARE").mkdir()
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    given = [word if "=" in word else str(tmp_path / word.replace("A", "a", word == "A")) for word in overrides]
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        report_runs(given)
    assert "\n" not in str(caught.value)


def test_the_command_exits_with_two_and_says_where_the_page_is(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert re.search(r"^unlabeled: report: \S+ does not exist", capsys.readouterr().err)
    monkeypatch.chdir(tmp_path)
    assert main(["report", *three[:2]]) == 0
    assert (tmp_path / "reports" / "a_b" / "compare.html").is_file()


def test_a_whole_sweep_gives_its_name_to_the_page_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "task=mae,optim.lr=0.1,backbone.kwargs.depth=12,epochs=10,seed="
    runs = [run_folder(tmp_path / "sweep" / f"{long}{seed}", results()) for seed in range(3)]
    monkeypatch.chdir(tmp_path)
    whole = report_runs(runs)
    assert whole == Path("reports/sweep/compare.html")
    assert "<h1>sweep: 3 runs</h1>" in whole.read_text()
    parts = [report_runs(part).parent.name for part in (runs[:2], [runs[0], runs[2]])]
    assert len({*parts, "sweep"}) == 3
    assert max(map(len, parts)) == 80


def test_two_runs_are_compared_in_words(three: list[str], tmp_path: Path) -> None:
    compared(three[:2], tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "kNN, k = 20: a is better than b by 10.0 points (6.9 to 13.1)" in page
    assert "linear probe: no clear difference between a and b (+0.5 points for b, −2.1 to +3.1)" in page
    assert "<small>vs a −10.0 (−13.1 to −6.9)</small>" in page


def test_folders_of_one_name_and_names_with_equal_signs_are_distinguished(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "lr=1" / "run", results())
    second = run_folder(tmp_path / "lr=2" / "run", results())
    document = compared([first, str(Path(second) / "report" / "report.json")], tmp_path / "out")
    assert [run["label"] for run in document["runs"]] == ["1: run", "2: run"]


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=steal()>"
    folder = run_folder(tmp_path / hostile, results())
    file = Path(folder) / "report" / "report.json"
    document = json.loads(file.read_text())
    document["run"]["task"] = "</style><script>steal()</script>"
    document["run"]["config"] = "task: '<script>steal()</script> | x'\n"
    document["summary"]["summary"] = "</title><script>steal()</script>"
    file.write_text(json.dumps(document))
    report_runs([folder, run_folder(tmp_path / "b", results()), f"out={tmp_path / 'out'}"])
    tags = Tags((tmp_path / "out" / "compare.html").read_text()).found
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert not any("src" in given or "onerror" in given for _, given in tags)
    assert "\\<script\\>steal()\\</script\\> \\| x" in (tmp_path / "out" / "compare.md").read_text()
