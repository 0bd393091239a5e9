"""The section of each evaluator: its rows, their intervals and units, its series and figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_helpers import RUN, measured, results, with_made_up

from unlabeled.eval.base import Cut, Estimate, Point, Unit
from unlabeled.eval.comparison import Comparison, compare, measures, shown
from unlabeled.eval.intervals import wilson
from unlabeled.eval.registry import measure_of
from unlabeled.eval.results import Results
from unlabeled.report.document import report_document
from unlabeled.report.figures import evaluator_figures
from unlabeled.report.page import write_report
from unlabeled.report.sections import find_series, per_class


@pytest.fixture
def found() -> Results:
    return with_made_up(results())


def row(metric: str, label: str, unit: Unit = "accuracy", **where: Any) -> Comparison:
    return Comparison(metric, label, False, {"backbone": Estimate(0.5, 0.4, 0.6)}, {}, unit, **where)


def test_intervals_come_from_the_evaluator_or_from_the_number_of_images(found: Results) -> None:
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
    found: Results, tmp_path: Path
) -> None:
    for value in (math.nan, 1.5, -0.1):
        found.encoders["backbone"].metrics["made_up/noise_1"] = value
        one = next(one for one in measures(found) if one.metric == "made_up/noise_1")
        assert math.isnan(one.values["backbone"].low)
    found.encoders["random"].metrics["made_up/noise_1"] = math.nan
    assert "noise, severity 1" in write_report(tmp_path, RUN, found, None, None).read_text()


def test_the_headline_is_that_of_the_quoted_metrics_alone(found: Results) -> None:
    assert [one.metric for one in compare(found) if one.headline] == ["knn/k20", "linear/top1"]
    assert "made_up/shots5" not in {one.metric for one in compare(found)}, "no fraction of the test images"
    measured(found.encoders["backbone"], "knn", {"k20": 0.7}, Cut(8))
    assert "knn/k20@8" not in {one.metric for one in compare(found)}


def test_the_section_as_data(found: Results) -> None:
    measured(found.encoders["backbone"], "knn", {"k20": 0.7}, Cut(8, principal=True))
    document = report_document(RUN, found, None)
    knn, _, section = document["evaluators"]
    assert [(one["metric"], one["cut"]) for one in knn["rows"]][-1] == ("knn/k20@pca8", "pca8")
    assert section["notes"] == ["said of all <script>note()</script>", "raw pixels: of one"]
    assert not [note for note in document["notes"] if "made_up" in note]
    assert set(section["arrays"]) == {"singular_values", "cka", "names"}, "predictions are not for figures"
    assert section["arrays"]["cka"]["random"] == [[0.4] * 3] * 3
    assert section["images"] == {name: ["pairs"] for name in ("backbone", "pixels", "random")}
    rank = next(one for one in section["rows"] if one["metric"] == "made_up/rank")
    assert rank["values"]["backbone"] == {"value": pytest.approx(1111.05), "low": None, "high": None}
    assert document["embedding"]["points"] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    assert document["maps"] == ["attention"]


def test_large_arrays_stay_out_of_the_data(found: Results) -> None:
    found.encoders["backbone"].arrays["made_up/cka"] = np.zeros((51, 51))
    section = report_document(RUN, found, None)["evaluators"][-1]
    assert set(section["arrays"]["cka"]) == {"pixels", "random"}


def test_better_and_worse_depend_on_the_direction(found: Results, tmp_path: Path) -> None:
    for encoder, value in (("backbone", 0.01), ("pixels", 0.2), ("random", 0.001)):
        found.encoders[encoder].metrics["made_up/leak"] = value
        found.encoders[encoder].intervals["made_up/leak"] = (value * 0.9, value * 1.1)
    html = write_report(tmp_path, RUN, found, None, None).read_text()
    cells = html[html.index("&lt;i&gt;leak") :].split("</tr>")[0].split("<td>")
    assert 'title="lower is better">↓' in cells[0]
    assert '<span class="clear">−19.0</span>' in cells[4]
    assert "<span>+0.9</span>" in cells[5]
    assert "1.0 %<small>0.9 to 1.1</small>" in cells[1]


def test_a_long_table_is_folded_and_a_short_one_is_not(found: Results, tmp_path: Path) -> None:
    html = write_report(tmp_path, RUN, found, None, None).read_text()
    assert html.count("<summary>All ") == 1
    assert "<summary>All 10 metrics</summary>" in html
    assert html.count("images for random weights</summary>") == 1


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.7123, "accuracy", "71.2 %"), (-0.05, "percent", "−5.0 %"), (1234.6, "number", "1,235"), (3.0, "number", "3"),
     (0.012345, "number", "0.0123"), (-1.5, "number", "−1.5"), (None, "number", "–"), (math.inf, "percent", "–")],
)  # fmt: skip
def test_values_are_shown_by_their_unit(value: float | None, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_measures_of_one_curve_make_a_series_in_ascending_order() -> None:
    rows = [row(f"k{k}", f"kNN, k = {k}", point=Point("kNN", "k", k)) for k in (20, 10, 200)]
    (series,) = find_series(rows)
    assert (series.title, series.axis) == ("kNN", "k")
    assert [one.metric for _, one in series.points] == ["k10", "k20", "k200"]


def test_a_lone_point_and_parts_of_the_features_make_none() -> None:
    assert find_series([row("top1", "linear probe"), row("top5", "linear probe, top 5")]) == []
    point = Point("kNN", "k", 20)
    assert find_series([row("k20", "kNN, k = 20", point=point)]) == []
    cut = row("k20@64", "kNN, k = 20, first 64 features", point=replace(point, at=10), cut=Cut(64))
    assert find_series([row("k20", "kNN, k = 20", point=point), cut]) == []


def test_curves_are_distinguished_by_what_they_share_and_by_their_unit() -> None:
    rows = [
        row(f"{w}way_{s}shot", f"{w}-way {s}-shot", point=Point(f"{w}-way", "shot", s)) for w in (5, 20) for s in (1, 5)
    ]
    assert [(one.title, len(one.points)) for one in find_series(rows)] == [("5-way", 2), ("20-way", 2)]
    units = [row("n_1", "n 1", point=Point("n", "n", 1)), row("n_2", "n 2", "number", point=Point("n", "n", 2))]
    assert find_series(units) == [], "they share no axis"


@pytest.mark.parametrize(
    ("metrics", "title", "axis"),
    [
        ({"knn/k10": 10, "knn/k20": 20}, "kNN", "k"),
        ({"knn/k10_top5": 10, "knn/k20_top5": 20}, "kNN, top 5", "k"),
        ({"knn/k10_t0.1": 10, "knn/k20_t0.1": 20}, "kNN, T = 0.1", "k"),
        ({"knn/shot1": 1, "knn/shot5": 5}, "kNN", "images per class"),
        ({"few_shot/5way_1shot": 1, "few_shot/5way_5shot": 5}, "5-way", "shot"),
        ({"low_label/0.5pct": 0.5, "low_label/10pct": 10}, "% of labels", "% of labels"),
        ({"retrieval/recall1": 1, "retrieval/recall10": 10}, "recall", "k"),
        ({"linear/top1": None, "linear/top5": None, "retrieval/map": None, "corruption/clean": None}, None, None),
    ],
)  # fmt: skip
def test_the_curves_of_the_built_in_evaluators(metrics: dict[str, float | None], title: str, axis: str) -> None:
    for metric, at in metrics.items():
        measure = measure_of(metric)
        assert measure is not None
        assert measure.point == (None if at is None else Point(title, axis, at))


def test_figures_of_an_evaluator_that_nobody_knows(found: Results) -> None:
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


def test_figures_of_arrays_by_class_and_by_severity(found: Results) -> None:
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


def test_curves_by_number_of_features(found: Results) -> None:
    for name, encoder in found.encoders.items():
        for length, first, components in ((8, 0.3, 0.4), (16, 0.5, 0.5)):
            measured(encoder, "knn", {"k20": first}, Cut(length))
            measured(encoder, "knn", {"k20": components}, Cut(length, principal=True))
        if name == "pixels":
            measured(encoder, "knn", {"k10": 0.3}, Cut(8))
    figures = dict(evaluator_figures(found)["knn"])
    assert list(figures) == ["Nearest neighbors by k", "kNN, k = 20, by number of features"]
    svg = figures["kNN, k = 20, by number of features"]
    for part in ("this backbone, PCA", "random weights", "raw pixels", ">8<", ">16<", ">32<"):
        assert part in svg, part
    assert "raw pixels, PCA" not in svg
    for encoder in found.encoders.values():
        measured(encoder, "made_up", {"rank": 3.0}, Cut(8))
        measured(encoder, "made_up", {"rank": 4.0}, Cut(16))
    assert not [title for title, _ in evaluator_figures(found)["made_up"] if "number of features" in title]


def test_accuracy_of_each_class_from_a_confusion_matrix() -> None:
    np.testing.assert_allclose(per_class(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])), [0.75, 1, np.nan])
