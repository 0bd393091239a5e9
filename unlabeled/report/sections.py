"""The report's section of each evaluator as data, and the curves that its measures make together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unlabeled.eval.comparison import TITLES, Comparison, as_row, measures
from unlabeled.eval.results import Results, of_evaluator

_ELEMENTS = 2500
"""Largest array that report.json holds."""


def evaluator_sections(results: Results) -> list[dict[str, Any]]:
    """One entry for each evaluator that found anything; what is in it says `report_document` under ``evaluators``."""
    rows = measures(results)
    found = ((name, evaluator.title, section_of(results, name, rows)) for name, evaluator in results.evaluators.items())
    return [
        {"name": name, "title": title, **section}
        for name, title, section in found
        if any(section[part] for part in ("rows", "notes", "arrays", "images"))
    ]


def section_of(results: Results, name: str, rows: Sequence[Comparison]) -> dict[str, Any]:
    """Rows, notes, small arrays and names of images of one evaluator."""
    arrays: dict[str, dict[str, Any]] = {}
    for encoder, found in results.encoders.items():
        for key, array in of_evaluator(name, found.arrays).items():
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
    """Whether a figure shows an evaluator's array `key`: others, such as predictions, are for programs."""
    return (
        key in ("confusion", "singular_values", "accuracies", "names", "severities")
        or is_per_class(key)
        or key.startswith("cka")
    )


def is_per_class(name: str) -> bool:
    """Whether an array holds a score of each class."""
    return name.startswith("per_class") or name.endswith("iou")


def general_notes(results: Results) -> Iterator[str]:
    """Notes that belong to no evaluator."""
    owners = tuple(f"{name}: " for name in results.evaluators)
    for encoder, found in results.encoders.items():
        for note in found.notes:
            if not note.startswith(owners):
                yield f"{TITLES.get(encoder, encoder)}: {note}"


def _notes(results: Results, name: str) -> Iterator[str]:
    """The evaluator's notes, those that all encoders share once."""
    said = {encoder: [note for note in found.notes if note.startswith(f"{name}: ")]
            for encoder, found in results.encoders.items()}  # fmt: skip
    shared = [note for note in said["backbone"] if all(note in notes for notes in said.values())]
    yield from (note.removeprefix(f"{name}: ") for note in shared)
    for encoder, notes in said.items():
        for note in notes:
            if note not in shared:
                yield f"{TITLES.get(encoder, encoder)}: {note.removeprefix(f'{name}: ')}"


@dataclass(frozen=True)
class Series:
    """Measures that differ in one number alone, such as the shots of few-shot episodes."""

    title: str
    """What they have in common."""
    axis: str
    """What the number is."""
    points: tuple[tuple[float, Comparison], ...]
    """(number, measure), ascending."""


def find_series(rows: Sequence[Comparison]) -> list[Series]:
    """The curves of two points and more among measures of one evaluator, on all features, in the order of `rows`."""
    groups: dict[tuple[str, str, str], list[tuple[float, Comparison]]] = {}
    for row in rows:
        if row.point is not None and row.cut is None:
            groups.setdefault((row.point.curve, row.point.axis, row.unit), []).append((row.point.at, row))
    return [
        Series(curve, axis, tuple(sorted(points, key=lambda point: point[0])))
        for (curve, axis, _), points in groups.items()
        if len(points) > 1
    ]


def per_class(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(C, C) confusion → the part of each true class that is right, float64 (C,); NaN for classes without an image."""
    totals = array.sum(axis=1)
    return np.where(totals > 0, array.diagonal() / np.maximum(totals, 1), np.nan)
