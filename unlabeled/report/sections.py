"""The report's section on each evaluator as data, and the curves that its metrics form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unlabeled.eval.comparison import TITLES, Comparison, as_row, measures
from unlabeled.eval.results import Results, of_evaluator

_ELEMENTS = 2500
"""Largest array that is stored in report.json."""


def evaluator_sections(results: Results) -> list[dict[str, Any]]:
    """One entry per evaluator with any output; its keys are documented in `report_document` under ``evaluators``."""
    rows = measures(results)
    found = ((name, evaluator.title, section_of(results, name, rows)) for name, evaluator in results.evaluators.items())
    return [
        {"name": name, "title": title, **section}
        for name, title, section in found
        if any(section[key] for key in ("rows", "notes", "arrays", "images"))
    ]


def section_of(results: Results, name: str, rows: Sequence[Comparison]) -> dict[str, Any]:
    """One evaluator's rows, notes, small arrays and names of images."""
    arrays: dict[str, dict[str, Any]] = {}
    for encoder, found in results.encoders.items():
        for key, array in of_evaluator(name, found.arrays).items():
            # larger arrays would make the page slow, and their figures unreadable
            if drawn(key) and array.size <= _ELEMENTS:
                arrays.setdefault(key, {})[encoder] = array
    own = [row for row in rows if row.evaluator == name]
    return {
        "rows": [{**as_row(row), "cut": None if row.cut is None else str(row.cut)} for row in own],
        "notes": list(_notes(results, name)),
        "arrays": arrays,
        "images": {
            encoder: list(images)
            for encoder, found in results.encoders.items()
            if (images := of_evaluator(name, found.images))
        },
    }


def drawn(key: str) -> bool:
    """Whether the report plots an evaluator's array `key`; others, such as predictions, are only for programs."""
    return (
        key in ("confusion", "singular_values", "accuracies", "names", "severities")
        or is_per_class(key)
        or key.startswith("cka")
    )


def is_per_class(name: str) -> bool:
    """Whether an array contains one score per class."""
    return name.startswith("per_class") or name.endswith("iou")


def general_notes(results: Results) -> Iterator[str]:
    """Yields the notes that belong to no evaluator, each with the name of its encoder."""
    owners = tuple(f"{name}: " for name in results.evaluators)
    for encoder, found in results.encoders.items():
        for note in found.notes:
            if not note.startswith(owners):
                yield f"{TITLES.get(encoder, encoder)}: {note}"


def _notes(results: Results, name: str) -> Iterator[str]:
    """Yields the evaluator's notes: first those shared by all encoders, once, then those of a single encoder."""
    by_encoder = {encoder: [note for note in found.notes if note.startswith(f"{name}: ")]
                  for encoder, found in results.encoders.items()}  # fmt: skip
    shared = [note for note in by_encoder["backbone"] if all(note in notes for notes in by_encoder.values())]
    yield from (note.removeprefix(f"{name}: ") for note in shared)
    for encoder, notes in by_encoder.items():
        for note in notes:
            if note not in shared:
                yield f"{TITLES.get(encoder, encoder)}: {note.removeprefix(f'{name}: ')}"


@dataclass(frozen=True)
class Series:
    """Metrics that differ in one number only, such as the number of shots of few-shot episodes: a curve."""

    title: str
    """What the metrics have in common."""
    axis: str
    """Name of the number."""
    points: tuple[tuple[float, Comparison], ...]
    """(number, metric), ascending."""


def find_series(rows: Sequence[Comparison]) -> list[Series]:
    """The curves with at least two points among one evaluator's metrics on all features, in the order of `rows`."""
    groups: dict[tuple[str, str, str], list[tuple[float, Comparison]]] = {}
    for row in rows:
        if row.point is not None and row.cut is None:
            # metrics in different units cannot share a y axis
            groups.setdefault((row.point.curve, row.point.axis, row.unit), []).append((row.point.at, row))
    return [
        Series(curve, axis, tuple(sorted(points, key=lambda point: point[0])))
        for (curve, axis, _), points in groups.items()
        if len(points) > 1
    ]


def per_class(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Confusion matrix (C, C) → accuracy of each true class, float64 (C,); NaN for classes without test images."""
    totals = array.sum(axis=1)
    # the maximum only avoids a division by zero, `where` discards those entries
    return np.where(totals > 0, array.diagonal() / np.maximum(totals, 1), np.nan)
