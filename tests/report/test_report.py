"""The report: its numbers, its words, its file, and that no name in it can break the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from report_helpers import RUN, results, with_made_up

from unlabeled.eval.comparison import compare, summarize
from unlabeled.eval.notes import skipped_images
from unlabeled.eval.registry import measure_of
from unlabeled.report.document import clean, read_report, report_document
from unlabeled.report.figures import confusion_figure, training_curves
from unlabeled.report.page import write_report
from unlabeled.report.summary import name_backbone
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.renamed import with_renamed_keys

HOSTILE = (
    "<script>steal()</script>",
    '"><img src=x onerror=steal()>',
    "</style></svg><script>steal()</script>",
    "$\\frac{1}{$",
    "a\udcffb\x00\x1b",
    "| pipe | and\nline",
)


def rows(count: int = 60) -> list[dict[str, float]]:
    trained = [
        {"step": step, "epoch": step / 10, "loss": 1 / (1 + step), "lr": 1e-4, "images_per_s": 9.0, "masked": 0.75}
        for step in range(count)
    ]
    return trained + [{"step": step, "epoch": step / 10, "eval/knn/k10": 0.1, "eval/knn/k20": 0.5} for step in (20, 40)]


class Page(HTMLParser):
    """Elements of a page, what they refer to, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_report_json_round_trips_and_is_strict(tmp_path: Path) -> None:
    broken = results()
    broken.encoders["backbone"].metrics["linear/loss"] = math.nan
    page = write_report(tmp_path, RUN, broken, rows(), {"reconstructions": torch.zeros(3, 8, 16, dtype=torch.uint8)})
    assert page == tmp_path / "report" / "report.html"
    document = read_report(tmp_path / "report" / "report.json")
    assert document == report_document(RUN, broken, rows(), ["reconstructions"])
    assert document["schema"] == 3
    assert document["results"]["encoders"]["backbone"]["metrics"]["linear/loss"] is None
    knn, linear = document["evaluators"]
    assert (knn["title"], linear["title"]) == ("Nearest neighbors", "Linear probe")
    assert linear["arrays"]["confusion"]["random"][0] == [90, 10, 10]
    assert document["run"]["parameters"] == 1_234_567
    assert document["training"]["online"] == [[2.0, 0.5], [4.0, 0.5]]
    assert document["images"] == ["reconstructions"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.json", "report.md"]


def test_another_schema_or_no_report_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_report(file)
    file.write_text(json.dumps({"schema": 99}))
    with pytest.raises(DataError, match="has schema 99, this version reads 1 to 3"):
        read_report(file)
    file.write_text(json.dumps({"schema": 1}))
    with pytest.raises(DataError, match="is not a report of schema 1; write it again"):
        read_report(file)


def test_a_report_of_schema_1_is_read_in_the_form_of_today(tmp_path: Path) -> None:
    """Made of today's by what the schemas differ in, which is what version 0.1 wrote."""
    now = report_document(RUN, results(), rows())
    old = {key: value for key, value in now.items() if key not in ("evaluators", "embedding", "maps")} | {"schema": 1}
    old["comparison"] = [
        {key: value for key, value in row.items() if key not in ("unit", "better")} for row in now["comparison"]
    ]
    confusion = now["evaluators"][1]["arrays"]["confusion"]["backbone"]
    old["verdict"] = with_renamed_keys(old.pop("summary"), {"text": "summary"})
    old["pictures"] = old.pop("images")
    counts = {"train_images": "train_pictures", "test_images": "test_pictures"}
    old["evidence"] = with_renamed_keys({**old.pop("results"), "confusion": confusion}, counts)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(old))
    found = read_report(file)
    assert found.keys() == now.keys()
    assert {key for key in now if found[key] != now[key]} == {"evaluators"}, "it held no baseline's confusion"
    for before, after in zip(found["evaluators"], now["evaluators"], strict=True):
        assert {row["metric"]: row for row in before["rows"]} == {row["metric"]: row for row in after["rows"]}
        assert before.keys() == after.keys()
    assert found["evaluators"][1]["arrays"] == {"confusion": {"backbone": confusion}}
    file.write_text(json.dumps({**old, "evidence": None, "comparison": []}))
    assert read_report(file)["evaluators"] == []


def test_the_comparison_puts_quoted_metrics_first_and_knows_the_stronger_baseline() -> None:
    first, second, third = compare(results((0.8, 0.6, 0.7)))
    assert [first.metric, second.metric, third.metric] == ["knn/k20", "linear/top1", "knn/k10"]
    assert [first.headline, second.headline, third.headline] == [True, True, False]
    assert first.stronger() == "random"
    assert second.stronger() == "pixels"
    assert first.differences["pixels"].value == pytest.approx(0.2)
    assert first.values["backbone"].low < 0.8 < first.values["backbone"].high


@pytest.mark.parametrize(
    ("metric", "label"),
    [("knn/k20", "kNN, k = 20"), ("knn/k5_top5", "kNN, k = 5, top 5"), ("linear/top5", "linear probe, top 5"),
     ("linear/lr", None), ("linear/holdout_top1", None), ("knn/kind", None), ("knn/k20@x", None), ("no/top1", None),
     ("knn/k20@64", "kNN, k = 20, first 64 features"), ("linear/top1@pca8", "linear probe, 8 principal components")],
)  # fmt: skip
def test_values_that_no_table_shows_have_no_label(metric: str, label: str | None) -> None:
    measure = measure_of(metric)
    assert (measure and measure.text) == label


@pytest.mark.parametrize(
    ("knn", "linear", "level", "text"),
    [
        ((0.8, 0.6, 0.5), (0.9, 0.7, 0.6), "better", "Better than both baselines: 20.0 points above raw pixels in kNN, "
         "k = 20 and 20.0 points above raw pixels in the linear probe."),
        ((0.4, 0.6, 0.5), (0.5, 0.6, 0.7), "worse", "Not better than the baselines: 20.0 points below raw pixels in "
         "kNN, k = 20 and 20.0 points below random weights in the linear probe."),
        ((0.61, 0.6, 0.5), (0.6, 0.6, 0.5), "even", "No clear difference from the stronger baseline: 1.0 points above "
         "raw pixels in kNN, k = 20 (the interval includes 0) and level with raw pixels in the linear probe (the "
         "interval includes 0)."),
        ((0.8, 0.6, 0.5), (0.5, 0.6, 0.5), "mixed", "Mixed results: 20.0 points above raw pixels in kNN, k = 20 and "
         "10.0 points below raw pixels in the linear probe."),
    ],
)  # fmt: skip
def test_the_summary_says_what_the_numbers_say(knn, linear, level: str, text: str) -> None:
    summary = summarize(results(knn, linear))
    assert (summary.level, summary.text) == (level, text)


def test_worse_and_even_is_not_mixed() -> None:
    summary = summarize(results((0.4, 0.6, 0.5), (0.6, 0.61, 0.5)))
    assert summary.level == "worse"
    assert summary.text == (
        "Not better than the baselines: 20.0 points below raw pixels in kNN, k = 20 and 1.0 points below raw pixels in "
        "the linear probe (the interval includes 0)."
    )


def test_a_large_difference_on_few_images_is_not_clear() -> None:
    assert summarize(results((0.8, 0.6, 0.5), (0.8, 0.6, 0.5), count=1000)).level == "better"
    few = summarize(results((0.8, 0.6, 0.5), (0.8, 0.6, 0.5), count=20))
    assert few.level == "even"
    assert few.text.startswith("Cannot tell yet: too few test images (20); 20.0 points above raw pixels in kNN, k = 20")


def test_skipped_images_are_counted_in_words() -> None:
    assert skipped_images("train", ["a.png"]) == "1 training image could not be decoded and was skipped: a.png"
    assert skipped_images("test", list("abcdef")).endswith("6 test images could not be decoded and were skipped: a, b, "
                                                           "c, d, e, ...")  # fmt: skip


def test_the_number_of_bad_images_is_plotted_only_if_it_changes() -> None:
    trained = [{**row, "bad_images": 1} for row in rows() if "loss" in row]
    assert "bad_images" not in [title for title, _ in training_curves(trained)]
    assert "bad_images" in [title for title, _ in training_curves([*trained, {**trained[-1], "bad_images": 2}])]


def test_warnings_and_captions_are_on_the_page(tmp_path: Path) -> None:
    run = replace(RUN, notes=("Debug run",))
    images = {name: torch.zeros(3, 8, 8, dtype=torch.uint8) for name in ("rotations", "views")}
    page = write_report(tmp_path, run, results(), rows(), images, {"rotations": "green: correct"})
    html = page.read_text()
    assert "<b>Debug run</b>" in html
    assert "<h3>rotations: green: correct</h3>" in html
    assert "<h3>views</h3>" in html
    assert "**Debug run**" in page.with_suffix(".md").read_text()


def test_lists_and_tuples_of_a_backbone_are_written_alike() -> None:
    created = create_backbone("resnet10t", size=32, channels=(8, 8, 8, 8))
    assert name_backbone(created) == "resnet10t (channels [8, 8, 8, 8])"


def test_the_summary_without_baselines_and_without_results() -> None:
    alone = results()
    alone = replace(alone, encoders={"backbone": alone.encoders["backbone"]})
    assert summarize(alone).level == "alone"
    assert summarize(None).level == "none"


def test_an_accuracy_near_the_most_common_class_is_called_out() -> None:
    details = summarize(results((0.35, 0.3, 0.2))).details
    assert details[-1] == "Not clearly above always guessing the most common class (34.0 %): kNN, k = 20."
    assert len(summarize(results()).details) == 2


def test_the_page_stands_alone_and_shows_every_part(tmp_path: Path) -> None:
    file = write_report(tmp_path, RUN, results(), rows(), {"reconstructions": torch.zeros(3, 8, 16, dtype=torch.uint8)})
    html = file.read_text(encoding="utf-8")
    page = Page(html)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value.startswith(("data:image/", "#")), (name, value[:60])
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in html
    text = " ".join(" ".join(page.words).split())
    for part in ("Better than both baselines", "Nearest training images", "reconstructions", "Loss", "Learning rate",
                 "kNN accuracy during the run", "masked", "1 h 2 min", "51,200", "abc1234", "name: mae", "bad.png",
                 "hold-out of the training split", "from the last step", "1.23 million"):  # fmt: skip
        assert part in text, part
    assert "prefers-color-scheme: dark" in html
    assert 'content="width=device-width' in html
    assert "var(--accent)" in html[html.index("<svg") :]


def test_hostile_names_do_not_leave_the_text(tmp_path: Path) -> None:
    hostile = results(classes=HOSTILE)
    run = replace(RUN, title=HOSTILE[0], task=HOSTILE[1], data=HOSTILE[4], config=f"a: </pre>{HOSTILE[0]}")
    file = write_report(tmp_path, run, hostile, rows(), {HOSTILE[1]: torch.zeros(3, 8, 8, dtype=torch.uint8)})
    page = Page(file.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("img") == 4, "the query, its two neighbors and the task's image"
    assert page.tags.count("svg") == page.tags.count("figure") - 2, "all but the gallery and the task's image"
    text = "".join(page.words)
    assert HOSTILE[0] in text
    assert "\x00" not in text
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert markdown.splitlines()[0] == "# \\<script\\>steal()\\</script\\>"
    assert read_report(tmp_path / "report" / "report.json")["results"]["classes"][4] == "a\ufffdb\ufffd\ufffd"


def test_a_report_without_results_metrics_or_images_is_still_one(tmp_path: Path) -> None:
    file = write_report(tmp_path, replace(RUN, epochs=None), None, None, None)
    text = " ".join(Page(file.read_text(encoding="utf-8")).words)
    assert "No results" in text
    assert "Nearest training images" not in text
    assert read_report(file.with_name("report.json"))["results"] is None


def test_hostile_evaluators_do_not_leave_the_text(tmp_path: Path) -> None:
    file = write_report(tmp_path, RUN, with_made_up(results(classes=HOSTILE)), rows(), None)
    page = Page(file.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = "".join(page.words)
    for part in ("<script>note()</script>", "</h2><script>title()</script>", "<i>leak</i> | share", "<svg onload"):
        assert part in text, part
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "\\<script\\>note()" in markdown
    header, *_, leak = [line for line in markdown.splitlines() if line.startswith(("| Metric", "| \\<i"))]
    assert leak.replace("\\|", "").count("|") == header.count("|")


def test_every_link_of_the_contents_leads_somewhere(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, RUN, results(), rows(), None).read_text(encoding="utf-8"))
    links = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")]
    positions = [value for name, value in page.attributes if name == "id"]
    assert {"baselines", "eval-knn", "eval-linear", "neighbors", "training", "run", "notes"} <= set(links)
    assert set(links) <= set(positions)
    headings = [value for value in positions if value in links]
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("evaluators", [(), ("linear/",)])
def test_a_report_without_the_usual_evaluators(tmp_path: Path, evaluators: tuple[str, ...]) -> None:
    found = results()
    for encoder in found.encoders.values():
        for metric in [metric for metric in encoder.metrics if not metric.startswith(evaluators)]:
            del encoder.metrics[metric]
    found = replace(found, headline=tuple(one for one in found.headline if one.startswith(evaluators)), gallery=())
    text = write_report(tmp_path, RUN, found, None, None).read_text(encoding="utf-8")
    assert "was fixed in advance" not in text
    assert ("evaluated once on the test split" in text) == bool(evaluators)
    assert ("Against the baselines" in text) == bool(evaluators)


def test_markdown_has_the_table(tmp_path: Path) -> None:
    write_report(tmp_path, RUN, results(), None, None)
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    header = next(row for row in lines if row.startswith("| Metric"))
    assert header == "| Metric | this backbone | raw pixels | random weights | vs raw pixels | vs random weights |"
    quoted = next(row for row in lines if row.startswith("| kNN, k = 20"))
    assert quoted.split(" | ")[1] == "80.0 (77.4 to 82.4)"
    assert quoted.count("|") == header.count("|")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_report(tmp_path / name, RUN, results(), rows(), None).read_bytes() for name in ("one", "two"))
    assert one == two


def test_curves_are_thinned_and_skip_what_is_no_number() -> None:
    short = dict(training_curves(rows(60)))
    assert list(short) == ["Loss", "Learning rate", "kNN accuracy during the run", "masked"]
    long = dict(training_curves(rows(20000)))
    assert len(long["Loss"]) < 3 * len(dict(training_curves(rows(400)))["Loss"])
    broken = [{"step": 0, "loss": math.nan, "lr": 0.1}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert list(dict(training_curves(broken))) == ["Loss"]
    assert training_curves([]) == []


@pytest.mark.parametrize("count", [2, 24, 200])
def test_confusion_of_any_size_is_drawn(count: int) -> None:
    svg = confusion_figure(np.eye(count, dtype=np.int64), [f"class {n}" for n in range(count)])
    assert ("class 1" in svg) == (count <= 24)
    assert len(svg) < 400_000
    assert ("data:image/png" in svg) == (count > 24), "many cells are drawn as pixels"


def test_clean_keeps_letters_of_every_script() -> None:
    assert clean("Ünïcödé 猫 😀\t\n") == "Ünïcödé 猫 😀\t\n"
    assert clean("a\x00b\ud800") == "a\ufffdb\ufffd"
