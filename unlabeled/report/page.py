"""Writes the report of a run: report.json for programs, report.md for terminals and reviews, report.html to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from torch import Tensor

from unlabeled.eval.comparison import compare, limits, percent, shown, signed
from unlabeled.eval.gallery import Thumbnail
from unlabeled.eval.results import Results, of_evaluator
from unlabeled.eval.size_curve import SizeCurve, read_curve
from unlabeled.report.document import Row, clean, report_document, write_json
from unlabeled.report.figures import (
    comparison_figure,
    embedding_figure,
    evaluator_figures,
    size_figure,
    training_curves,
)
from unlabeled.report.images import css_class, data_uri, shown_images
from unlabeled.report.size_table import gmacs, millions, shown_rows, size_sentence
from unlabeled.report.summary import RunSummary


def write_report(
    folder: Path,
    run: RunSummary,
    results: Results | None,
    metrics: Sequence[Row] | None,
    images: Mapping[str, Tensor] | None,
    captions: Mapping[str, str] | None = None,
) -> Path:
    """Writes ``folder/report/report.{json,md,html}`` and returns the path of the HTML file.

    `metrics` are the rows of metrics.jsonl; `images` are the task's images, name → uint8 (3, H, W), and `captions`
    explain them by name. If ``folder/sizes.json`` exists, the report gets a section on the sizes of the elastic run.
    The HTML page is self-contained and works offline. For the schema of the JSON file, see
    `unlabeled.report.document.report_document`.
    """
    return render_report(
        folder / "report", run, results, metrics, images, sizes=read_curve(folder), captions=captions or {}
    )


def render_report(
    folder: Path,
    run: RunSummary,
    results: Results | None,
    metrics: Sequence[Row] | None,
    images: Mapping[str, Tensor] | None,
    *,
    sizes: SizeCurve | None = None,
    captions: Mapping[str, str] | None = None,
) -> Path:
    """Like `write_report`, but writes into `folder` itself and takes the measured sizes as an argument."""
    folder.mkdir(parents=True, exist_ok=True)
    # report.json holds only data; figures and images are rendered for report.html alone
    document = report_document(run, results, metrics, list(images or {}), sizes)
    context = {**document, "lead": _lead(document), "facts": _facts(document), "baselines": _baselines(document)}
    if document["sizes"] is not None:
        context |= {"size_sentence": size_sentence(document["sizes"]), "size_rows": shown_rows(document["sizes"])}
    write_json(document, folder / "report.json")
    (folder / "report.md").write_text(environment(html=False).get_template("report.md.j2").render(context), "utf-8")
    page = environment(html=True).get_template("report.html.j2")
    html = page.render(
        context,
        figures=_figures(results, metrics or (), sizes),
        gallery=_gallery(results),
        shown_images=_images(results, _captioned(images or {}, captions or {})),
    )
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    return file


def environment(*, html: bool) -> Environment:
    """The Jinja environment of the report's templates, with the filters they use."""
    environment = Environment(
        loader=PackageLoader("unlabeled.report", "templates"),
        autoescape=html,
        trim_blocks=html,  # in Markdown, the newlines between blocks matter
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=percent, signed=signed, grouped="{:,}".format, md=_markdown)
    environment.filters.update(millions=millions, gmacs=gmacs, shown=shown, limits=limits)
    return environment


def _markdown(text: Any) -> str:
    """`text` on one line with Markdown's special characters escaped, so that it is safe inside a table."""
    line = " ".join(str(text).split())
    for mark in "\\`*_|[]<>":  # the backslash first, or it would escape the other escapes
        line = line.replace(mark, "\\" + mark)
    return line


def _figures(results: Results | None, metrics: Sequence[Row], sizes: SizeCurve | None) -> dict[str, Any]:
    figures: dict[str, Any] = {"curves": training_curves(metrics), "evaluators": {}}
    if sizes is not None:
        figures["sizes"] = [(sizes.label(metric), size_figure(sizes, metric)) for metric in sizes.headline]
    if results is not None:
        figures["evaluators"] = evaluator_figures(results)
        if results.headline:
            figures["comparison"] = comparison_figure(compare(results))
        if results.embedding is not None:
            figures["embedding"] = embedding_figure(results.embedding, results.classes)
    return figures


def _captioned(images: Mapping[str, Tensor], captions: Mapping[str, str]) -> dict[str, Tensor]:
    """The task's images, each named with its caption if there is one."""
    return {f"{name}: {captions[name]}" if name in captions else name: image for name, image in images.items()}


def _images(results: Results | None, images: Mapping[str, Tensor]) -> dict[str, list[dict[str, Any]]]:
    """Images for the page, by group: ``task``, ``maps``, and one ``evaluator/encoder`` for each set of drawings."""
    groups: dict[str, dict[str, Tensor]] = {"task": dict(images), "maps": results.maps if results else {}}
    for name, evaluator in results.evaluators.items() if results else ():
        for encoder, found in results.encoders.items() if results else ():
            drawn = of_evaluator(name, found.images)  # keys are prefixed with the evaluator's name
            if drawn:
                groups[f"{name}/{encoder}"] = {evaluator.captions.get(key, key): image for key, image in drawn.items()}
    return shown_images(groups)


def _gallery(results: Results | None) -> list[dict[str, Any]]:
    """Query images with their nearest training images, ready for the template."""
    if results is None:
        return []

    def entry(thumbnail: Thumbnail, truth: int) -> dict[str, Any]:
        return {
            "uri": data_uri(thumbnail.image),
            "css": css_class(thumbnail.image),
            "label": clean(results.classes[thumbnail.label]),
            "name": clean(thumbnail.name),
            "right": thumbnail.label == truth,
            "similarity": "" if thumbnail.similarity is None else f"{thumbnail.similarity:.2f}",
        }

    return [
        {
            "query": entry(row.query, row.query.label),
            "neighbors": [entry(neighbor, row.query.label) for neighbor in row.neighbors],
        }
        for row in results.gallery
    ]


def _baselines(document: Mapping[str, Any]) -> list[str]:
    return [name for name in (document["results"] or {}).get("encoders", {}) if name != "backbone"]


def _lead(document: Mapping[str, Any]) -> str:
    run = document["run"]
    return " · ".join(fact for fact in (run["task"], run["backbone"], run["data"], run["date"]) if fact)


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every known fact about the run, in reading order."""
    run, results = document["run"], document["results"] or {}
    size = run["input_size"]
    known: list[tuple[str, Any]] = [
        ("Task", run["task"]),
        ("Backbone", run["backbone"]),
        ("Parameters", f"{run['parameters'] / 1e6:.2f} million"),
        ("Input", f"{size[0]} x {size[1]} pixels" if size else None),
        ("Data", run["data"]),
        ("Epochs", None if run["epochs"] is None else f"{run['epochs']:g}"),
        ("Steps", None if run["steps"] is None else f"{run['steps']:,}"),
        ("Images seen", None if run["images"] is None else f"{run['images']:,}"),
        ("Pretraining time", duration(run["seconds"])),
        ("Evaluation time", duration(results.get("seconds"))),
        ("Device", run["device"]),
        ("Evaluated on", ", ".join(f"{k} {v}" for k, v in results.get("hardware", {}).items())),
        ("Training images", f"{results['train_images']:,}" if results else None),
        ("Test images", f"{results['test_images']:,}" if results else None),
        ("Batch-norm statistics", _batch_norms(results.get("recalibrated", 0))),
        ("Seed", str(run["seed"])),
        ("Evaluation seeds", ", ".join(f"{name} {seed}" for name, seed in results.get("seeds", {}).items())),
        ("Commit", run["commit"]),
        ("Versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())),
    ]
    return [(name, str(value)) for name, value in known if value]


def _batch_norms(images: int) -> str | None:
    return f"recomputed on {images:,} unmasked training images" if images else None


def duration(seconds: float | None) -> str | None:
    """Formats a duration for people: 3725 → ``1 h 2 min``; None stays None."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)  # rounded first: never "1 min 60 s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
