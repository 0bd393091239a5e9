"""The section of each evaluator: its rows, their intervals and units, its series and figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from report_helpers import RUN, evidence, with_made_up

from unlabeled.eval.base import Estimate
from unlabeled.eval.comparison import Comparison, compare, measures, shown
from unlabeled.eval.intervals import wilson
from unlabeled.eval.registry import EVALUATORS
from unlabeled.eval.results import Evidence
from unlabeled.report.document import report_document
from unlabeled.report.figures import evaluator_figures
from unlabeled.report.page import write_report
from unlabeled.report.sections import find_series, per_class


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Evidence:
    monkeypatch.setitem(EVALUATORS, "made_up", "report_helpers:MadeUp")
    return with_made_up(evidence())


def row(metric: str, label: str, unit: str = "accuracy") -> Comparison:
    return Comparison(metric, label, False, {"backbone": Estimate(0.5, 0.4, 0.6)}, {}, unit)


def test_intervals_come_from_the_evaluator_or_from_the_number_of_pictures(found: Evidence) -> None:
    rows = {one.metric: one for one in measures(found)}
    assert "made_up/hidden" not in rows
    shots, noise, rank = rows["made_up/shots5"], rows["made_up/noise_1"], rows["made_up/rank"]
    assert shots.values["backbone"] == Estimate(0.9, 0.89, 0.92)
    gap = shots.differences["pixels"]
    assert (gap.value, gap.low, gap.high) == pytest.approx(
        (0.4, 0.4 - math.hypot(0.01, 0.02), 0.4 + math.hypot(0.02, 0.01))
    )
    assert noise.values["backbone"] == Estimate(0.85, *wilson(0.85, 1000))
    assert math.isnan(rank.values["backbone"].low)
    assert rank.differences == {}
    leak = rows["made_up/leak"].differences["pixels"]
    assert leak.value == pytest.approx(-0.4)
    assert math.isnan(leak.low)


def test_a_value_that_is_no_accuracy_has_no_interval_and_does_not_stop_the_report(
    found: Evidence, tmp_path: Path
) -> None:
    for value in (math.nan, 1.5, -0.1):
        found.encoders["backbone"].metrics["made_up/noise_1"] = value
        one = next(one for one in measures(found) if one.metric == "made_up/noise_1")
        assert math.isnan(one.values["backbone"].low)
    found.encoders["random"].metrics["made_up/noise_1"] = math.nan
    assert "noise, severity 1" in write_report(tmp_path, RUN, found, None, None).read_text()


def test_the_headline_is_that_of_the_quoted_metrics_alone(found: Evidence) -> None:
    assert [one.metric for one in compare(found) if one.headline] == ["knn/k20", "linear/top1"]
    assert "made_up/shots5" not in {one.metric for one in compare(found)}, "no fraction of the test pictures"
    found.encoders["backbone"].metrics["knn/k20@8"] = 0.7
    assert "knn/k20@8" not in {one.metric for one in compare(found)}


def test_the_section_as_data(found: Evidence) -> None:
    found.encoders["backbone"].metrics["knn/k20@pca8"] = 0.7
    document = report_document(RUN, found, None)
    knn, _, section = document["evaluators"]
    assert [(one["metric"], one["cut"]) for one in knn["rows"]][-1] == ("knn/k20@pca8", "pca8")
    assert section["notes"] == ["said of all <script>note()</script>", "raw pixels: of one"]
    assert not [note for note in document["notes"] if "made_up" in note]
    assert set(section["arrays"]) == {"singular_values", "cka", "names"}, "predictions are not for figures"
    assert section["arrays"]["cka"]["random"] == [[0.4] * 3] * 3
    assert section["pictures"] == {name: ["pairs"] for name in ("backbone", "pixels", "random")}
    rank = next(one for one in section["rows"] if one["metric"] == "made_up/rank")
    assert rank["values"]["backbone"] == {"value": pytest.approx(1111.05), "low": None, "high": None}
    assert document["embedding"]["points"] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    assert document["maps"] == ["attention"]


def test_large_arrays_stay_out_of_the_data(found: Evidence) -> None:
    found.encoders["backbone"].arrays["made_up/cka"] = np.zeros((51, 51))
    section = report_document(RUN, found, None)["evaluators"][-1]
    assert set(section["arrays"]["cka"]) == {"pixels", "random"}


def test_better_and_worse_are_told_from_the_direction(found: Evidence, tmp_path: Path) -> None:
    for encoder, value in (("backbone", 0.01), ("pixels", 0.2), ("random", 0.001)):
        found.encoders[encoder].metrics["made_up/leak"] = value
        found.encoders[encoder].intervals["made_up/leak"] = (value * 0.9, value * 1.1)
    html = write_report(tmp_path, RUN, found, None, None).read_text()
    cells = html[html.index("&lt;i&gt;leak") :].split("</tr>")[0].split("<td>")
    assert 'title="lower is better">↓' in cells[0]
    assert '<span class="clear">−19.0</span>' in cells[4]
    assert "<span>+0.9</span>" in cells[5]
    assert "1.0 %<small>0.9 to 1.1</small>" in cells[1]


def test_a_long_table_is_folded_and_a_short_one_is_not(found: Evidence, tmp_path: Path) -> None:
    html = write_report(tmp_path, RUN, found, None, None).read_text()
    assert html.count("<summary>All ") == 1
    assert "<summary>All 10 measures</summary>" in html
    assert html.count("pictures of random weights</summary>") == 1


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.7123, "accuracy", "71.2 %"), (-0.05, "percent", "−5.0 %"), (1234.6, "number", "1,235"), (3.0, "number", "3"),
     (0.012345, "number", "0.0123"), (-1.5, "number", "−1.5"), (None, "number", "–"), (math.inf, "percent", "–")],
)  # fmt: skip
def test_values_are_shown_by_their_unit(value: float | None, unit: str, text: str) -> None:
    assert shown(value, unit) == text


@pytest.mark.parametrize(
    ("labels", "title", "axis"),
    [
        ({"k10": "kNN, k = 10", "k20": "kNN, k = 20"}, "kNN", "k"),
        ({"k10_top5": "kNN, k = 10, top 5", "k20_top5": "kNN, k = 20, top 5"}, "kNN, top 5", "k"),
        ({"5way_1shot": "5-way 1-shot", "5way_5shot": "5-way 5-shot"}, "5-way", "shot"),
        ({"1pct": "1 % of labels", "10pct": "10 % of labels"}, "% of labels", "% of labels"),
        ({"recall1": "recall@1", "recall10": "recall@10"}, "recall", "k"),
        ({"noise_1": "noise, severity 1", "noise_5": "noise, severity 5"}, "noise", "severity"),
        ({"f0.1": "fraction = 0.1", "f0.5": "fraction = 0.5"}, "fraction", "fraction"),
    ],
)  # fmt: skip
def test_measures_that_differ_in_a_number_make_a_series(labels: dict[str, str], title: str, axis: str) -> None:
    rows = [row(f"knn/{key}", label) for key, label in reversed(labels.items())]
    (series,) = find_series(rows)
    assert (series.title, series.axis) == (title, axis)
    assert [one.metric for _, one in series.points] == [f"knn/{key}" for key in labels], "in ascending order"


@pytest.mark.parametrize(
    "labels",
    [
        {"top1": "linear probe", "top5": "linear probe, top 5"},
        {"k10": "ten", "k20": "twenty"},
        {"a1b2": "a 1, b 2", "a2b2": "a 2, b 3"},
        {"k20": "kNN, k = 20", "k20@64": "kNN, k = 20, first 64 features"},
        {"k20": "kNN, k = 20"},
    ],
)
def test_measures_whose_number_has_no_one_meaning_make_none(labels: dict[str, str]) -> None:
    assert find_series([row(f"knn/{key}", label) for key, label in labels.items()]) == []


def test_series_of_two_numbers_run_along_the_longer_one() -> None:
    rows = [row(f"x/{w}way_{s}shot", f"{w}-way {s}-shot") for w in (5, 20) for s in (1, 5, 10)]
    assert [(one.title, len(one.points)) for one in find_series(rows)] == [("5-way", 3), ("20-way", 3)]
    units = [row("x/n_1", "n 1"), row("x/n_2", "n 2", "number")]
    assert find_series(units) == [], "they share no axis"


def test_figures_of_an_evaluator_that_nobody_knows(found: Evidence) -> None:
    figures = dict(evaluator_figures(found)["made_up"])
    curves, spectrum, cka = figures.values()
    assert ">noise<" in curves
    assert ">blur<" in curves
    first, second, _ = figures
    assert first.endswith("by severity")
    assert second == "Spectrum of the features"
    assert ">raw pixels<" in spectrum
    assert "&lt;svg onload" in cka
    assert ">90<" in cka, "percent"


def test_figures_of_arrays_by_class_and_by_severity(found: Evidence) -> None:
    for name, encoder in found.encoders.items():
        encoder.arrays["made_up/probe_iou"] = np.array([0.9, 0.1, np.nan, 0.2])
        encoder.arrays["made_up/knn_iou"] = np.zeros(7)
        encoder.arrays["made_up/accuracies"] = np.array([[0.9, 0.5, 0.2], [0.8, 0.7, 0.6]])
        encoder.arrays["made_up/names"] = np.array(["gaussian_blur", "jpeg"])
        encoder.arrays["made_up/severities"] = np.array([1, 3, 5])
        if name == "pixels":
            del encoder.arrays["made_up/cka"]
    figures = {title.rpartition(">")[2]: svg for title, svg in evaluator_figures(found)["made_up"]}
    classes, severities = figures[": probe IoU of each class"], figures[" by severity"]
    assert ">background<" in classes
    assert ">owl<" in classes
    assert ">gaussian blur<" in severities
    assert ">5<" in severities
    assert not [title for title in figures if "kNN IoU" in title], "seven scores of three classes have no names"


def test_curves_by_number_of_features(found: Evidence) -> None:
    for name, encoder in found.encoders.items():
        encoder.metrics.update({"knn/k20@8": 0.3, "knn/k20@pca8": 0.4, "knn/k20@16": 0.5, "knn/k20@pca16": 0.5})
        if name == "pixels":
            encoder.metrics.update({"knn/k10@8": 0.3})
    figures = dict(evaluator_figures(found)["knn"])
    assert list(figures) == ["Nearest neighbours by k", "kNN, k = 20, by number of features"]
    svg = figures["kNN, k = 20, by number of features"]
    for part in ("this backbone, PCA", "random weights", "raw pixels", ">8<", ">16<", ">32<"):
        assert part in svg, part
    assert "raw pixels, PCA" not in svg
    for encoder in found.encoders.values():
        encoder.metrics.update({"made_up/rank@8": 3.0, "made_up/rank@16": 4.0})
    assert not [title for title, _ in evaluator_figures(found)["made_up"] if "number of features" in title]


def test_accuracy_of_each_class_from_a_confusion_matrix() -> None:
    np.testing.assert_allclose(per_class(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])), [0.75, 1, np.nan])
