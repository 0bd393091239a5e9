"""The report's section of each evaluator as data, and the curves that its measures make together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unlabeled.eval.comparison import TITLES, Comparison, cut_of, measures
from unlabeled.eval.registry import EVALUATORS, evaluator_class
from unlabeled.eval.results import Evidence

_ELEMENTS = 2500
"""Largest array that report.json holds."""

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FILLERS = ("at", "of", "with", "=", "%")
"""Words of a label that do not name the number beside them."""


def evaluator_sections(evidence: Evidence) -> list[dict[str, Any]]:
    """One entry for each evaluator that found anything; what is in it says `report_document` under ``evaluators``."""
    rows = measures(evidence)
    found = ((name, section_of(evidence, name, rows)) for name in EVALUATORS)
    return [
        {"name": name, "title": title_of(name), **section}
        for name, section in found
        if any(section[part] for part in ("rows", "notes", "arrays", "pictures"))
    ]


def section_of(evidence: Evidence, name: str, rows: Sequence[Comparison]) -> dict[str, Any]:
    """Rows, notes, small arrays and names of pictures of one evaluator."""
    begin = f"{name}/"
    arrays: dict[str, dict[str, Any]] = {}
    for encoder, found in evidence.encoders.items():
        for key, array in found.arrays.items():
            if key.startswith(begin) and drawn(key) and array.size <= _ELEMENTS:
                arrays.setdefault(key.removeprefix(begin), {})[encoder] = array
    return {
        "rows": [{**asdict(row), "cut": cut_of(row.metric)} for row in rows if row.metric.startswith(begin)],
        "notes": list(_notes(evidence, name)),
        "arrays": arrays,
        "pictures": {
            encoder: keys
            for encoder, found in evidence.encoders.items()
            if (keys := [key.removeprefix(begin) for key in found.pictures if key.startswith(begin)])
        },
    }


def title_of(name: str) -> str:
    """The heading of an evaluator's section; of one that is not installed here its name."""
    return str(evaluator_class(name).title) if name in EVALUATORS else name


def caption_of(key: str) -> str:
    """What the picture ``evaluator/key`` shows, by the evaluator's ``captions``; else its key."""
    name, _, key = key.partition("/")
    captions: dict[str, str] = getattr(evaluator_class(name), "captions", {}) if name in EVALUATORS else {}
    return captions.get(key, key)


def drawn(key: str) -> bool:
    """Whether a figure shows the array ``evaluator/key``: others, such as predictions, are for programs."""
    name = key.partition("/")[2]
    return (
        name in ("confusion", "singular_values", "accuracies", "names", "severities")
        or is_per_class(name)
        or (name.startswith("cka"))
    )


def is_per_class(name: str) -> bool:
    """Whether an array holds a score of each class."""
    return name.startswith("per_class") or name.endswith("iou")


def general_notes(evidence: Evidence) -> Iterator[str]:
    """Notes that belong to no evaluator."""
    for encoder, found in evidence.encoders.items():
        for note in found.notes:
            if note.partition(": ")[0] not in EVALUATORS:
                yield f"{TITLES.get(encoder, encoder)}: {note}"


def _notes(evidence: Evidence, name: str) -> Iterator[str]:
    """The evaluator's notes, those that all encoders share once."""
    said = {encoder: [note for note in found.notes if note.startswith(f"{name}: ")]
            for encoder, found in evidence.encoders.items()}  # fmt: skip
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
    """The series of two and more among measures of one evaluator on all features, told from keys and labels.

    ``noise_1`` "noise, severity 1" and ``noise_3`` "noise, severity 3" make "noise" by "severity". The labels must
    differ in that number alone, else there is no telling what it means.
    """
    groups: dict[tuple[str, str], list[tuple[float, Comparison]]] = {}
    for row in rows:
        if cut_of(row.metric) is None:
            for number in _NUMBER.finditer(row.metric):
                template = row.metric[: number.start()] + "\0" + row.metric[number.end() :]
                groups.setdefault((template, row.unit), []).append((float(number[0]), row))
    found, used = [], set[str]()
    for points in sorted(groups.values(), key=len, reverse=True):
        named = _named(points)
        if len(points) > 1 and named and not used & {row.metric for _, row in points}:
            found.append(Series(*named, tuple(sorted(points, key=lambda point: point[0]))))
            used |= {row.metric for _, row in points}
    place = {row.metric: index for index, row in enumerate(rows)}
    return sorted(found, key=lambda series: min(place[row.metric] for _, row in series.points))


def _named(points: Sequence[tuple[float, Comparison]]) -> tuple[str, str] | None:
    """(title, axis) from the text around the one number in which the labels differ; None when there is not one."""
    parts = [_NUMBER.split(row.label) for _, row in points]
    numbers = [_NUMBER.findall(row.label) for _, row in points]
    if any(part != parts[0] for part in parts):
        return None
    differ = [place for place, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if len(differ) != 1:
        return None
    label, number = points[0][1].label, list(_NUMBER.finditer(points[0][1].label))[differ[0]]
    before, after = label[: number.start()].split(), label[number.end() :].strip(" ,-")
    while before and before[-1] in _FILLERS:
        before.pop()
    if before and not before[-1].endswith(",") and not label[number.end() :].startswith("-"):
        axis = before.pop()
        if axis.endswith("@"):
            before, axis = [*before, axis.rstrip("@")], "k"
    else:
        axis, after = after.partition(",")[0], after.partition(",")[2].strip()
    return ", ".join(part for part in (" ".join(before).rstrip(","), after) if part) or axis, axis


def per_class(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(C, C) confusion → the part of each true class that is right, float64 (C,); NaN for classes without a picture."""
    totals = array.sum(axis=1)
    return np.where(totals > 0, array.diagonal() / np.maximum(totals, 1), np.nan)
