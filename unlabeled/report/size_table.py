"""The sizes of an elastic run: a table for the terminal, and a section of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from unlabeled.eval.comparison import percent
from unlabeled.eval.intervals import wilson
from unlabeled.eval.size_curve import SizeCurve, SizeResult
from unlabeled.ssl.backbones.elastic import SubSize
from unlabeled.ssl.backbones.elastic.cost import Cost

_MANY = 24
"""With more rows than this, the page shows only the best sizes and collapses the full table."""


def render_terminal(costs: Mapping[SubSize, Cost], curve: SizeCurve | None) -> Group:
    """A table of every size with its cost, and its accuracies where they were measured."""
    headline = {metric: curve.label(metric) for metric in curve.headline} if curve is not None else {}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("width", "blocks", "parameters\n(million)", "GMACs"):
        table.add_column(name, justify="right")
    for label in headline.values():
        # break the labels, so that the table fits 80 columns
        table.add_column(label.replace(", ", ",\n"), justify="right")
        table.add_column("random\nweights", justify="right", style="dim")
    for size, cost in costs.items():
        blocks = "-".join(map(str, size.depths)) + (f" ({size.depth})" if len(size.depths) > 1 else "")
        result = curve.find("extracted", str(size)) if curve is not None else None
        measured = (
            [values.get(metric) for metric in headline for values in (result.metrics, result.random)] if result else []
        )
        shown = ["" if value is None else percent(value) for value in measured]
        table.add_row(str(size.width), blocks, millions(cost.parameters), gmacs(cost.macs), *shown)
    return Group(table, *(_reference_lines(curve) if curve is not None else ()))


def _reference_lines(curve: SizeCurve) -> Iterator[str]:
    """One line for raw pixels and one for each run that was trained alone."""
    others = {f"{one.title} (trained alone)": one.metrics for one in curve.results if one.kind == "alone"}
    for title, values in {"raw pixels": curve.pixels, **others}.items():
        found = [f"{curve.label(metric)} {percent(values[metric])} %" for metric in curve.headline if metric in values]
        if found:
            yield f"{title}: {'; '.join(found)}"


def millions(count: int) -> str:
    """1234567 → ``1.23``."""
    return f"{count / 1e6:.2f}"


def gmacs(macs: int) -> str:
    """Billions of multiply-adds to three digits: 1234567890 → ``1.23``."""
    return f"{macs / 1e9:#.3g}".rstrip(".")  # "#" keeps trailing zeros, but also the point of "123."


def size_section(curve: SizeCurve) -> dict[str, Any]:
    """The section as data, as stored in report.json under ``sizes`` (see `report_document`)."""
    front = {metric: {result.title for result in curve.front(metric)} for metric in curve.headline}

    def row(result: SizeResult) -> dict[str, Any]:
        extracted = result.kind == "extracted"  # runs trained alone are not on the model's own front
        return {
            **result.model_dump(
                include={"kind", "title", "width", "depths", "parameters", "macs", "recalibrated", "seconds"}
            ),
            "values": {metric: _estimate(value, curve) for metric, value in result.metrics.items()},
            "random": {metric: _estimate(value, curve) for metric, value in result.random.items()},
            "front": [metric for metric in curve.headline if extracted and result.title in front[metric]],
        }

    return {
        "stored": curve.sizes,
        "measured": sum(result.kind == "extracted" for result in curve.results),
        "headline": [{"metric": metric, "label": curve.label(metric)} for metric in curve.headline],
        "pixels": curve.pixels,
        "train_images": curve.train_images,
        "test_images": curve.test_images,
        "rows": [row(result) for result in curve.results],
    }


def size_sentence(section: Mapping[str, Any]) -> str:
    """The paragraph that introduces the section."""
    measured, stored = section["measured"], section["stored"]
    text = (
        f"{f'All {stored}' if measured == stored else f'{measured} of the {stored}'} sizes of this elastic model, each "
        "extracted as a separate model and evaluated frozen. Highlighted: sizes that are better than every smaller "
        "measured size. A size is written as width x blocks. GMACs are billions of multiply-adds for one image at the "
        "run's input size."
    )
    if pixels := section["pixels"]:
        shown = ", ".join(
            f"{q['label']} {percent(pixels[q['metric']])} %" for q in section["headline"] if q["metric"] in pixels
        )
        text += f" Raw pixels: {shown}."
    if images := max((row["recalibrated"] for row in section["rows"]), default=0):
        # relative to one pass over both splits, which is what evaluating a size costs otherwise
        fraction = images / (section["train_images"] + section["test_images"])
        text += (
            f" Batch-norm statistics depend on the size, so they were recomputed for each size on {images:,} unlabeled "
            f"training images, which adds {100 * fraction:.0f} % to the number of images processed."
        )
    return text


def shown_rows(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All rows; if there are many, only those on a Pareto front and those of other runs."""
    rows: list[dict[str, Any]] = section["rows"]
    return rows if len(rows) <= _MANY else [row for row in rows if row["front"] or row["kind"] == "alone"]


def _estimate(value: float, curve: SizeCurve) -> dict[str, float]:
    low, high = wilson(value, curve.test_images)
    return {"value": value, "low": low, "high": high}
