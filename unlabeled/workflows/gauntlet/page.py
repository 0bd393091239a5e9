"""Writes the table of a gauntlet: table.json and table.csv for programs, table.md and table.html to read."""

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
"""Up to this many rows are listed after a note."""


def write_pages(document: Mapping[str, Any], folder: Path) -> Path:
    """Writes a `gauntlet_document` as ``table.{json,csv,md,html}`` and returns the path of the HTML file.

    Raises CheckpointError if the files cannot be written.
    """
    document = _cleaned(document)  # labels come from file names and settings
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
    """The table in long form: one line per row and column, including columns that the page does not show."""
    rows = {row["label"]: row for row in document["rows"]}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for column in document["columns"]:
        for value in column["values"]:
            row = rows[value["row"]]
            # an empty field where there is no interval
            ends = [*(value["over_seeds"] or ("", "")), *(value["over_images"] or ("", ""))]
            writer.writerow(
                [column[name] for name in ("data", "metric", "label", "unit", "better")]
                + [row["label"], row["kind"], row["backbone"], value["value"], value["seeds"], *ends, value["rank"]]
                + [int(value["best"]), row["mean_rank"]]
            )
    return text.getvalue()


def _tables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each dataset: its columns, and the formatted cells of each row."""
    found = []
    for data in document["data"]:
        columns = [column for column in document["columns"] if column["data"] == data["label"]]
        displayed = [column for column in columns if column["shown"]]
        failed = {
            (failure["entrant"], failure["evaluator"])
            for failure in document["failures"]
            if failure["data"] == data["label"]
        }
        found.append(
            {
                **data,
                "columns": displayed,
                "rows": _cells(document["rows"], displayed, failed),
                "all_columns": columns if len(columns) > len(displayed) else [],
                "all_rows": _cells(document["rows"], columns, failed),
            }
        )
    return found


def _overall(document: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with the cells of all datasets side by side."""
    return [
        {**row, "cells": [cell for table in tables for cell in table["rows"][position]["cells"]]}
        for position, row in enumerate(document["rows"])
    ]


def _lead(document: Mapping[str, Any]) -> str:
    """The line below the title: how much was measured."""
    cells, seeds = document["cells"], document["seeds"]
    given = sum(row["kind"] == "given" for row in document["rows"])
    facts = [
        f"{given} backbone{'s' * (given != 1)}",
        f"{len(document['data'])} dataset{'s' * (len(document['data']) != 1)}",
        f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}",
        f"{cells['done']} of {cells['total']} cells done",
    ]
    return " · ".join([*facts, f"{cells['failed']} failed"] if cells["failed"] else facts)


def _sentences(document: Mapping[str, Any]) -> list[str]:
    """The notes on how the numbers were obtained."""
    sentences = [
        "Backbones are frozen. Features are their pooled output, images are not augmented, and every row goes through "
        "the same evaluators with the same settings.",
        "Raw pixels are at most 32 x 32. Each architecture is also evaluated with random weights, one set per seed.",
        "95 % intervals over test images (Wilson for accuracies, otherwise the evaluator's own) do not account for the "
        "variation between pretraining runs of the same backbone."
        + ("" if len(document["seeds"]) == 1 else " 95 % intervals over seeds are t intervals of the mean. For given "
           "backbones, only the evaluation is repeated with each seed."),
        "The mean rank is taken over all columns above that are accuracies or other percentages; ties share their mean "
        "rank. A row without a value in one of these columns has no mean rank.",
    ]  # fmt: skip
    sentences += _input_sizes(document["rows"])
    if document["limit"] is not None:
        sentences.append(f"At most {document['limit']:,} images of each split are used, selected by a fixed shuffle.")
    recalibrated = [row["label"] for row in document["rows"] if row["recalibrated"]]
    if recalibrated:
        sentences.append(
            f"Batch-norm statistics were recomputed on unmasked training images for {', '.join(recalibrated)}."
        )
    return sentences + [f"{note['note']} ({_few(note['where'])})" for note in document["notes"]]


def _input_sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note on the input sizes of the rows, if they differ."""
    by_size: dict[str, list[str]] = {}
    for row in rows:
        if row["input_size"] is not None:
            by_size.setdefault("{} x {} pixels".format(*row["input_size"]), []).append(row["label"])
    if len(by_size) < 2:
        return []
    listed = "; ".join(f"{size} ({_few(labels)})" for size, labels in by_size.items())
    return [f"Each backbone is evaluated at its own input size: {listed}."]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]], failed: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    # a column has no entry for rows that failed or were skipped
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
    """One formatted cell: text, up to two intervals, the sort key, the rank, and whether it is among the best."""
    if value is None:
        return {"text": "failed" if failed else "–", "intervals": [], "sort": None, "rank": None, "best": False}
    unit = column["unit"]
    intervals = [
        limits({"low": ends[0], "high": ends[1]}, unit) + (" (seeds)" if name == "over_seeds" else "")
        for name in ("over_images", "over_seeds")
        if (ends := value[name]) is not None and ends[0] < ends[1]  # equal values for all seeds: no interval to show
    ]
    return {
        "text": shown(value["value"], unit),
        "intervals": intervals,
        "sort": value["value"],
        "rank": value["rank"],
        "best": value["best"],
    }


def _cleaned(value: Any) -> Any:
    """Applies `clean` to all text in `value`, so that UTF-8, HTML and terminals can display it."""
    if isinstance(value, Mapping):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value
