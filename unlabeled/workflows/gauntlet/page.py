"""The table of a gauntlet as files: table.json and table.csv for programs, table.md and table.html for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlabeled.eval.comparison import limits, shown
from unlabeled.report.document import clean
from unlabeled.report.page import environment
from unlabeled.ssl.core.files import write_atomically, writing

_CSV = (
    "data", "metric", "label", "unit", "better", "row", "kind", "backbone", "value", "seeds", "seeds_low", "seeds_high",
    "images_low", "images_high", "rank", "best", "mean_rank",
)  # fmt: skip
_NAMED = 3
"""Rows named beside a note."""


def write_pages(document: Mapping[str, Any], folder: Path) -> Path:
    """Writes ``table.{json,csv,md,html}`` of a `gauntlet_document`; returns the path of the HTML.

    Raises CheckpointError when the disk refuses.
    """
    document = _cleaned(document)
    tables = _tables(document)
    context = {
        **document,
        "tables": tables,
        "overall": _overall(document, tables),
        "lead": _lead(document),
        "sentences": _sentences(document),
    }
    texts = {
        "json": json.dumps(document, indent=1) + "\n",
        "csv": _csv(document),
        "md": environment(html=False).get_template("gauntlet.md.j2").render(context),
        "html": environment(html=True).get_template("gauntlet.html.j2").render(context),
    }
    with writing(f"out: {folder}"):
        for kind, text in texts.items():
            write_atomically(folder / f"table.{kind}", text)
    return folder / "table.html"


def _csv(document: Mapping[str, Any]) -> str:
    """One line for each row in each column, shown or not."""
    rows = {row["label"]: row for row in document["rows"]}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for column in document["columns"]:
        for value in column["values"]:
            row = rows[value["row"]]
            ends = [*(value["over_seeds"] or ("", "")), *(value["over_images"] or ("", ""))]
            writer.writerow(
                [column[name] for name in ("data", "metric", "label", "unit", "better")]
                + [row["label"], row["kind"], row["backbone"], value["value"], value["seeds"], *ends, value["rank"]]
                + [int(value["best"]), row["mean_rank"]]
            )
    return text.getvalue()


def _tables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each data set: its columns, and for each row of the table the cells as they are shown."""
    found = []
    for data in document["data"]:
        columns = [column for column in document["columns"] if column["data"] == data["label"]]
        quoted = [column for column in columns if column["shown"]]
        failed = {
            (failure["entrant"], failure["evaluator"])
            for failure in document["failures"]
            if failure["data"] == data["label"]
        }
        found.append(
            {
                **data,
                "columns": quoted,
                "rows": _cells(document["rows"], quoted, failed),
                "all_columns": columns if len(columns) > len(quoted) else [],
                "all_rows": _cells(document["rows"], columns, failed),
            }
        )
    return found


def _overall(document: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the cells of all data sets side by side."""
    return [
        {**row, "cells": [cell for table in tables for cell in table["rows"][position]["cells"]]}
        for position, row in enumerate(document["rows"])
    ]


def _lead(document: Mapping[str, Any]) -> str:
    """How much was measured."""
    cells, seeds = document["cells"], document["seeds"]
    given = sum(row["kind"] == "given" for row in document["rows"])
    parts = [
        f"{given} backbone{'s' * (given != 1)}",
        f"{len(document['data'])} data set{'s' * (len(document['data']) != 1)}",
        f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}",
        f"{cells['done']} of {cells['total']} cells done",
    ]
    return " · ".join([*parts, f"{cells['failed']} failed"] if cells["failed"] else parts)


def _sentences(document: Mapping[str, Any]) -> list[str]:
    """How the numbers came about."""
    sentences = [
        "Backbones are frozen; features are their pooled output, images are not augmented, and every row goes "
        "through the same evaluators with the same settings.",
        "Raw pixels are at most 32 x 32. Each architecture also stands there with random weights, drawn by each seed.",
        "Intervals are 95 %: over test images (Wilson for accuracies, otherwise the evaluator's own), which says "
        "nothing of another training of the same backbone"
        + ("." if len(document["seeds"]) == 1 else "; over seeds, t intervals of the mean, which for backbones that "
           "were given are seeds of the evaluation alone."),
        "The mean rank is that of all columns above that are accuracies or other percentages, ties sharing theirs; a "
        "row that lacks one of them has none.",
    ]  # fmt: skip
    if document["limit"] is not None:
        sentences.append(f"At most {document['limit']:,} images of each split, chosen by a fixed shuffle.")
    recalibrated = [row["label"] for row in document["rows"] if row["recalibrated"]]
    if recalibrated:
        sentences.append(
            f"Batch-norm statistics were estimated anew on whole training images for {', '.join(recalibrated)}."
        )
    return sentences + [f"{note['note']} ({_few(note['where'])})" for note in document["notes"]]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]], failed: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    by_row = [{value["row"]: value for value in column["values"]} for column in columns]
    return [
        {
            **row,
            "cells": [
                _cell(values.get(row["label"]), column, (row["label"], column["evaluator"]) in failed)
                for column, values in zip(columns, by_row, strict=True)
            ],
        }
        for row in rows
    ]


def _cell(value: Mapping[str, Any] | None, column: Mapping[str, Any], failed: bool) -> dict[str, Any]:
    """One cell: text, its two intervals in words, what sorts it, and whether it is marked."""
    if value is None:
        return {"text": "failed" if failed else "–", "intervals": [], "sort": None, "rank": None, "best": False}
    unit = column["unit"]
    intervals = [
        limits({"low": ends[0], "high": ends[1]}, unit) + (" (seeds)" if name == "over_seeds" else "")
        for name in ("over_images", "over_seeds")
        if (ends := value[name]) is not None and ends[0] < ends[1]  # of equal seeds there is nothing to show
    ]
    return {
        "text": shown(value["value"], unit),
        "intervals": intervals,
        "sort": value["value"],
        "rank": value["rank"],
        "best": value["best"],
    }


def _cleaned(value: Any) -> Any:
    """`value` with text that UTF-8, HTML and terminals can show."""
    if isinstance(value, Mapping):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value
