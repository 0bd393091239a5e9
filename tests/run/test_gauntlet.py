"""A gauntlet goes on where it was killed, notes what cannot be measured, and ranks by what the numbers carry."""

from __future__ import annotations

import csv
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import ttest_1samp

from unlabeled.cli import main
from unlabeled.eval.intervals import wilson
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.weights import export_backbone
from unlabeled.ssl.core.errors import CheckpointError, ConfigError, DataError
from unlabeled.workflows.gauntlet import job
from unlabeled.workflows.gauntlet.job import run_gauntlet
from unlabeled.workflows.gauntlet.page import _sentences
from unlabeled.workflows.gauntlet.plan import make_plan
from unlabeled.workflows.gauntlet.settings import GauntletRun, gauntlet_config
from unlabeled.workflows.gauntlet.table import Value, gauntlet_document, over_seeds, ranked

sys.path.insert(0, str(Path(__file__).parent))  # for `launch`, in the processes too

from launch import die_in_cell, launch

NET = {"channels": [8, 8, 8, 8], "stem_width": 8}
FRESH = "{target: resnet18, pretrained: false, size: 32, kwargs: {channels: [8,8,8,8], stem_width: 8}}"
KNN = ["evaluate.knn.k=[5,20]", "device=cpu"]
LINEAR = ["evaluate.linear.epochs=2", "evaluate.linear.lr=[0.1]", "evaluate.linear.weight_decay=[0.0]"]
CELLS = 3 * 2 * 2 * 2
"""(A folder, random weights, raw pixels) x datasets x evaluators x seeds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported backbone, of other weights than those of the seeds below."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("backbones") / "exported"
    export_backbone(create_backbone("resnet18", size=32, **NET), path)
    return path


def overrides(folder: Path, out: Path, *more: str, knn_alone: bool = False) -> list[str]:
    chosen = ["evaluators=knn"] if knn_alone else ["evaluators=[knn,linear]", *LINEAR]
    return [
        f"backbones=[{folder},{FRESH}]", "data=[digits,{name: shapes, count: 80}]", *chosen,
        "seeds=[0,1]", "limit=60", *KNN, f"out={out}", *more,
    ]  # fmt: skip


def table(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "table.json").read_text())
    return {**found, "seconds": 0}


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the evaluators that were started in this process."""
    names: list[str] = []
    evaluate_features = job.evaluate_features

    def noted(dataset: Any, evaluator: Any, prefixes: Sequence[int]) -> Any:
        names.append(evaluator.name)
        return evaluate_features(dataset, evaluator, prefixes)

    monkeypatch.setattr(job, "evaluate_features", noted)
    return names


def test_a_killed_job_repeats_no_finished_cell_and_ends_like_an_unbroken_one(
    folder: Path, tmp_path: Path, begun: list[str]
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    log = tmp_path / "log"
    codes = launch(["gauntlet", "--debug", *overrides(folder, broken)], log, before=partial(die_in_cell, 6))
    assert codes == [-signal.SIGKILL], log.read_text()
    finished = {file.name: file.stat().st_mtime_ns for file in (broken / "cells").glob("*.json")}
    assert len(finished) == 5, "the sixth was killed"
    assert main(["gauntlet", *overrides(folder, broken)]) == 0
    assert len(begun) == CELLS - 5
    after = {file.name: file.stat().st_mtime_ns for file in (broken / "cells").glob("*.json")}
    assert len(after) == CELLS
    assert {name: after[name] for name in finished} == finished
    assert main(["gauntlet", *overrides(folder, broken)]) == 0
    assert len(begun) == CELLS - 5, "nothing was left to do"

    assert main(["gauntlet", *overrides(folder, whole)]) == 0
    assert len(begun) == 2 * CELLS - 5
    assert table(broken) == table(whole)
    assert sorted(after) == sorted(file.name for file in (whole / "cells").glob("*.json"))


def test_features_are_computed_once_for_each_network_and_data_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    backbone = type(create_backbone("resnet18", size=32, **NET))
    pooled = backbone.pooled

    def counted(self: Any, x: Any) -> Any:
        passes.append(self.name)
        return pooled(self, x)

    monkeypatch.setattr(backbone, "pooled", counted)
    given = overrides(folder, tmp_path / "g", "data=digits", knn_alone=True)
    main(["gauntlet", *given])
    networks, splits = 1 + 2, 2  # a folder, and random weights of two seeds; one batch holds a split
    assert len(passes) == networks * splits
    main(["gauntlet", *given, "evaluate.knn.k=[3]"])
    assert len(passes) == networks * splits, "other settings read them back"


def test_rows_are_the_backbones_random_weights_of_each_architecture_and_raw_pixels(
    folder: Path, tmp_path: Path
) -> None:
    main(["gauntlet", *overrides(folder, tmp_path / "g")])
    document = table(tmp_path / "g")
    assert {(row["label"], row["kind"]) for row in document["rows"]} == {
        ("exported", "given"), ("random weights, resnet18", "random"), ("raw pixels", "pixels"),
    }  # fmt: skip
    assert document["cells"] == {"total": CELLS, "done": CELLS, "failed": 0}
    shown = [(column["data"], column["metric"]) for column in document["columns"] if column["shown"]]
    assert shown == [(data, metric) for data in ("digits", "shapes") for metric in ("knn/k20", "linear/top1")]
    knn = next(column for column in document["columns"] if column["metric"] == "knn/k20")
    fixed = next(value for value in knn["values"] if value["row"] == "exported")
    assert fixed["over_seeds"] == [fixed["value"], fixed["value"]], "kNN draws nothing"
    assert fixed["over_images"] == pytest.approx(wilson(fixed["value"], 60))
    drawn = next(value for value in knn["values"] if value["row"].startswith("random"))
    assert drawn["seeds"] == 2
    assert drawn["over_seeds"][0] < drawn["value"] < drawn["over_seeds"][1], "each seed draws other weights"
    lines = list(csv.DictReader((tmp_path / "g" / "table.csv").open()))
    assert len(lines) == sum(len(column["values"]) for column in document["columns"])
    assert {line["row"] for line in lines} == {row["label"] for row in document["rows"]}


def test_what_cannot_be_measured_is_noted_and_the_job_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[str]
) -> None:
    evaluate_features, broken = job.evaluate_features, ["knn"]

    def failing(dataset: Any, evaluator: Any, prefixes: Sequence[int]) -> Any:
        if evaluator.name in broken and dataset.backbone is not None:
            begun.append("failed")
            raise DataError("evaluate.data: no <b>masks</b>")
        return evaluate_features(dataset, evaluator, prefixes)

    monkeypatch.setattr(job, "evaluate_features", failing)
    given = overrides(folder, tmp_path / "g", "seeds=0", "data=digits")
    assert main(["gauntlet", *given]) == 0
    document = table(tmp_path / "g")
    assert document["cells"] == {"total": 6, "done": 4, "failed": 2}
    assert document["failures"][0] == {
        "entrant": "exported", "data": "digits", "evaluator": "knn", "seed": 0,
        "reason": "evaluate.data: no <b>masks</b>",
    }  # fmt: skip
    ranks = {row["label"]: row["mean_rank"] for row in document["rows"]}
    assert ranks["exported"] is None
    assert ranks["raw pixels"] is not None
    assert "no &lt;b&gt;masks" in (tmp_path / "g" / "table.html").read_text()
    assert "no \\<b\\>masks" in (tmp_path / "g" / "table.md").read_text()

    broken.clear()
    main(["gauntlet", *given])
    assert begun.count("failed") == 2
    assert table(tmp_path / "g") == document, "a failure stays until it is to be tried again"
    main(["gauntlet", *given, "retry_failed=true"])
    assert table(tmp_path / "g")["cells"] == {"total": 6, "done": 6, "failed": 0}


def test_raw_pixels_that_an_evaluator_cannot_judge_are_no_failure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_features = job.evaluate_features

    def of_networks(dataset: Any, evaluator: Any, prefixes: Sequence[int]) -> Any:
        if dataset.backbone is None:
            raise DataError("evaluate: knn needs dense features")
        return evaluate_features(dataset, evaluator, prefixes)

    monkeypatch.setattr(job, "evaluate_features", of_networks)
    main(["gauntlet", *overrides(folder, tmp_path / "g", "seeds=0", "data=digits", knn_alone=True)])
    document = table(tmp_path / "g")
    assert document["cells"] == {"total": 3, "done": 3, "failed": 0}
    assert document["failures"] == []
    assert {"note": "evaluate: knn needs dense features", "where": ["raw pixels on digits"]} in document["notes"]


def test_diverged_weights_fail_in_one_line(tmp_path: Path) -> None:
    backbone = create_backbone("resnet18", size=32, **NET)
    with torch.no_grad():
        next(backbone.parameters()).fill_(float("nan"))
    export_backbone(backbone, tmp_path / "nan")
    run_gauntlet(gauntlet_config(overrides(tmp_path / "nan", tmp_path / "g", "data=digits", "seeds=0")))
    reasons = [failure["reason"] for failure in table(tmp_path / "g")["failures"]]
    assert len(reasons) == 2
    assert all("training features are NaN or infinite" in reason and "\n" not in reason for reason in reasons)


def test_other_settings_weights_or_data_are_other_cells(folder: Path, tmp_path: Path, begun: list[str]) -> None:
    out = tmp_path / "g"
    base = [f"backbones={folder}", "data=digits", "evaluators=knn", "limit=60", *KNN, f"out={out}"]
    main(["gauntlet", *base])
    assert len(begun) == 3
    for change in ("evaluate.knn.temperature=0.1", "limit=50", "seeds=[7]"):
        begun.clear()
        main(["gauntlet", *base, change])
        assert len(begun) == 3, change
    torch.manual_seed(2)
    other = tmp_path / "other"
    export_backbone(create_backbone("resnet18", size=32, **NET), other)
    begun.clear()
    main(["gauntlet", *base, f"backbones=[{folder},{other}]"])
    assert begun == ["knn"], "one architecture: its random weights and the pixels are there"
    begun.clear()
    renamed = f"backbones=[{{target: {folder}, label: renamed}}]"
    main(["gauntlet", *base, renamed, "evaluators=[knn,linear]", *LINEAR])
    assert begun == ["linear"] * 3, "neither a label nor another evaluator's settings matter"
    assert {row["label"] for row in table(out)["rows"] if row["kind"] == "given"} == {"renamed"}


def test_a_damaged_cell_is_measured_again(folder: Path, tmp_path: Path, begun: list[str]) -> None:
    given = [f"backbones={folder}", "data=digits", "evaluators=knn", "limit=60", *KNN, f"out={tmp_path / 'g'}"]
    main(["gauntlet", *given])
    before = table(tmp_path / "g")
    file = sorted((tmp_path / "g" / "cells").glob("*.json"))[0]
    file.write_text(file.read_text()[:40])
    begun.clear()
    main(["gauntlet", *given])
    assert begun == ["knn"]
    assert table(tmp_path / "g") == before


def test_a_cell_from_before_values_said_what_they_are_is_read(folder: Path, tmp_path: Path, begun: list[str]) -> None:
    given = [f"backbones={folder}", "data=digits", "evaluators=knn", "limit=60", *KNN, f"out={tmp_path / 'g'}"]
    main(["gauntlet", *given])
    before = table(tmp_path / "g")
    for file in (tmp_path / "g" / "cells").glob("*.json"):
        cell = json.loads(file.read_text())
        assert cell.pop("measures")["knn/k20"]["label"] == "kNN, k = 20"
        file.write_text(json.dumps(cell))
    begun.clear()
    main(["gauntlet", *given])
    assert begun == []
    assert table(tmp_path / "g") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbones=[resnet81]", "target: 'resnet81' is not a run folder"),
        ("backbones=[{target: EXPORTED, size: 64}]", "is a run with its own backbone; remove name, size and kwargs"),
        ("backbones=[EXPORTED,EXPORTED]", "2 entries have the label 'exported'; give each its own"),
        ("backbones=[{targte: x, target: x}]", r"backbones.0.targte: there is no such setting in backbones.0; did you"),
        ("data.limit=3", "data.limit=3: data is a list; set this inside one of its mappings"),
        ("data=[digits,digits]", "data: 2 entries have the label 'digits'"),
        ("data=[digist]", "'digist' is not a data source; did you mean 'digits'"),
        ("data=[{name: digits, limits: 3}]", "limits: there is no such setting"),
        ("evaluators=[knn,liner]", "evaluate.evaluators: 'liner' is not an evaluator; did you mean 'linear'"),
        (
            "evaluate.few_shot.ways=3",
            r"evaluate\.few_shot: ways=3 has no effect, few_shot is not among the evaluators; add it to evaluators, or",
        ),
        ("evaluate.knn.kk=3", r"evaluate\.knn\.kk: there is no such setting in evaluate\.knn; did you mean 'k'\?"),
        (
            "evaluate.lineer.epochs=3",
            r"evaluate\.lineer: there is no such setting in evaluate; did you mean 'linear'\?",
        ),
        ("evaluate.limit=3", "evaluate.limit has no effect in a gauntlet; set limit=... instead"),
        ("measures=[knn/k20,linear/lr]", "measures: 'linear/lr' is not a metric of"),
        ("measures=[few_shot/5way_1shot]", "measures: 'few_shot/5way_1shot' is not a metric of knn/..."),
        ("seeds=[1,1]", r"seeds: \[1, 1\] has duplicates"),
        ("seeds=[]", "seeds: "),
    ],
)
def test_faults_of_the_input_are_one_line_before_anything_is_computed(
    folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    given = overrides(folder, tmp_path / "g", change.replace("EXPORTED", str(folder)))
    with pytest.raises(ConfigError, match=message) as caught:
        run_gauntlet(gauntlet_config(given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "g").exists()


def test_data_without_labels_and_folders_of_other_things_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="is not empty and contains no gauntlet"):
        run_gauntlet(gauntlet_config(overrides(folder, tmp_path / "other")))
    with pytest.raises(DataError, match="flat"):
        run_gauntlet(
            gauntlet_config(overrides(folder, tmp_path / "g", f"data=[{{name: folder, path: {tmp_path / 'flat'}}}]"))
        )


def test_paths_with_equals_signs_are_accepted_in_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task=mae").mkdir()
    for entry in ("task=mae", '"task=mae"', "{target: task=mae}"):
        run = gauntlet_config([f"backbones=[resnet18, {entry}]", "data=digits"])
        assert [backbone.target for backbone in run.backbones] == ["resnet18", "task=mae"]
    with pytest.raises(ConfigError, match=r'the path lr=1 contains "="; quote it inside the list'):
        gauntlet_config(["backbones=[lr=1,2]", "data=digits"])


def test_rows_that_are_alike_have_their_input_size_as_a_label() -> None:
    entries = [f"{{target: resnet10t, size: {size}, pretrained: false}}" for size in (32, 64)]
    run = gauntlet_config([f"backbones=[{', '.join(entries)}]", "data=digits", "limit=20", "evaluators=knn"])
    plan = make_plan(run)
    labels = [entrant.label for entrant in plan.entrants]
    assert labels[:2] == ["random weights, resnet10t at 32 px", "random weights, resnet10t at 64 px"]
    note = "Each backbone is evaluated at its own input size: 32 x 32 pixels (random weights, resnet10t at 32 px); "
    assert any(sentence.startswith(note) for sentence in _sentences(gauntlet_document(run, plan, {})))


def test_words_and_mappings_mean_the_same() -> None:
    short = GauntletRun.model_validate({"backbones": "resnet18", "data": "digits", "evaluators": "knn"})
    full = GauntletRun.model_validate(
        {"backbones": [{"target": "resnet18"}], "data": [{"name": "digits"}], "evaluators": ["knn"]}
    )
    assert short == full
    assert gauntlet_config(["backbones=resnet18", "data=digits", "evaluators=knn"]) == short
    assert gauntlet_config(["backbones=[resnet18]", "data=[digits]", "evaluators=[knn]"]) == short


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.61, 0.58, 0.66, 0.6]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert over_seeds(values) == pytest.approx((expected.low, expected.high))
    assert over_seeds([0.5]) is None
    assert over_seeds([0.1, 0.1, 0.1]) == (0.1, 0.1), "and not beside it by rounding"


def value(row: str, mean: float, half: float | None = None) -> Value:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Value(row, mean, low, high, None, None, 1)


def test_ranks_follow_the_direction_and_marks_follow_the_intervals() -> None:
    values = [value("a", 0.5, 0.05), value("b", 0.7, 0.06), value("c", 0.6, 0.05), value("d", 0.6, 0.01)]
    up = ranked(values, "higher")
    assert [(one.row, one.rank, one.best) for one in up] == [
        ("b", 1, True), ("c", 2.5, True), ("d", 2.5, False), ("a", 4, False),
    ]  # fmt: skip
    down = ranked(values, "lower")
    assert [(one.row, one.best) for one in down] == [("a", True), ("c", True), ("d", False), ("b", False)]
    assert [one.rank for one in ranked(values, None)] == [None] * 4
    bare = ranked([value("a", 3.0), value("b", 3.0), value("c", 2.9)], "higher")
    assert [(one.rank, one.best) for one in bare] == [(1.5, True), (1.5, True), (3, False)]
    assert ranked([], "higher") == []


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_names_stay_text_and_the_page_needs_no_other_file(folder: Path, tmp_path: Path) -> None:
    hostile = '</style><script>steal()</script>" onload=x | a\nb'
    run = GauntletRun.model_validate(
        {
            "backbones": [{"target": str(folder), "label": hostile}],
            "data": [{"name": "digits", "label": "<img src=x onerror=steal()>"}],
            "evaluators": ["knn"], "limit": 40, "out": str(tmp_path / "g"), "device": "cpu",
        }
    )  # fmt: skip
    run_gauntlet(run)
    tags = Tags((tmp_path / "g" / "table.html").read_text()).found
    assert [tag for tag, _ in tags].count("script") == 1, "its own, that sorts"
    assert not any("src" in given or "href" in given or "onload" in given for _, given in tags)
    text = (tmp_path / "g" / "table.md").read_text()
    row = next(line for line in text.splitlines() if "steal()" in line and line.startswith("|") and "style" in line)
    assert "\\<script\\>" in row
    assert "\\| a b" in row
