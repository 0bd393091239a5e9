"""Chooses the figures of an evaluator's section from its metrics and arrays, so that new evaluators get them too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt
from markupsafe import Markup

from unlabeled.eval.base import Estimate
from unlabeled.eval.comparison import Comparison, measures
from unlabeled.eval.results import Results, of_evaluator
from unlabeled.report.figures.accuracy import class_figure, prefix_figure, series_figure
from unlabeled.report.figures.matrices import confusion_figure, heat_figure, spectrum_figure
from unlabeled.report.sections import Series, find_series, is_per_class, per_class

Figure = tuple[str, Markup]
"""Title and SVG."""
Arrays = dict[str, dict[str, npt.NDArray[Any]]]
"""Key → encoder → array."""

_LAYERS = {
    "cka": "Similarity of the layers (CKA), percent",
    "cka_random": "Layers versus layers with random weights (CKA), percent",
}


def evaluator_figures(results: Results) -> dict[str, list[Figure]]:
    """Evaluator → its figures: curves over a number, curves over the number of features, and plots of arrays."""
    rows = measures(results)
    found = {}
    for name, evaluator in results.evaluators.items():
        own = [row for row in rows if row.evaluator == name]
        arrays = _arrays(evaluator.title, _arrays_of(name, results), results.classes)
        found[name] = [*_curves(evaluator.title, own), *_prefixes(own, results), *arrays]
    return found


def _curves(evaluator: str, rows: Sequence[Comparison]) -> Iterator[Figure]:
    """Yields one figure per axis: each number in which metrics differ."""
    axes: dict[str, list[Series]] = {}
    for series in find_series(rows):
        axes.setdefault(series.axis, []).append(series)
    for axis, together in axes.items():
        title = f"{evaluator} by {axis}"
        yield title, series_figure(together, title)


def _prefixes(rows: Sequence[Comparison], results: Results) -> Iterator[Figure]:
    """Yields accuracy by number of features for each headline metric, or for the first fraction if there is none."""
    rows = [row for row in rows if row.unit != "number"]
    cut = list(dict.fromkeys(row.whole for row in rows if row.cut is not None))
    headline = {row.whole for row in rows if row.headline}
    dimensions = {encoder: found.dimension for encoder, found in results.encoders.items()}
    for label in [label for label in cut if label in headline] or cut[:1]:
        title = f"{label}, by number of features"
        if figure := prefix_figure([row for row in rows if row.whole == label], dimensions, title):
            yield title, figure


def _arrays_of(name: str, results: Results) -> Arrays:
    found = Arrays()
    for encoder, one in results.encoders.items():
        for key, array in of_evaluator(name, one.arrays).items():
            found.setdefault(key, {})[encoder] = array
    return found


def _arrays(title: str, found: Arrays, classes: Sequence[str]) -> Iterator[Figure]:
    """Yields figures of the arrays with these names; others are not plotted.

    ``confusion`` (C, C) · ``per_class*``, ``*iou`` (C,) or with the background (C + 1,) · ``singular_values`` (d,) ·
    ``cka*`` (L, L) with ``names`` (L,) of the layers · ``accuracies`` (K, S) with ``names`` (K,) and ``severities``.
    """
    for key, arrays in found.items():
        own = arrays.get("backbone")
        if key == "confusion":
            yield from _confusions(title, arrays, classes)
        elif is_per_class(key):
            yield from _classes(title, key, arrays, classes)
        elif key == "accuracies":
            yield from _severities(title, found)
        elif key == "singular_values":
            caption = "Spectrum of the features"
            if figure := spectrum_figure(arrays, f"{caption}: singular values by rank"):
                yield caption, figure
        elif key.startswith("cka") and own is not None and own.ndim == 2:
            names = [str(one) for one in found.get("names", {}).get("backbone", ())]
            # numbers instead of names if the other backbone has another number of layers
            rows, columns = (names if len(names) == n else [str(i + 1) for i in range(n)] for n in own.shape)
            caption = _LAYERS.get(key, key)
            yield caption, heat_figure(own, rows, columns, ("layer", "layer"), caption)


def _confusions(title: str, arrays: Mapping[str, npt.NDArray[Any]], classes: Sequence[str]) -> Iterator[Figure]:
    if "backbone" in arrays:
        own = confusion_figure(arrays["backbone"], classes, title)
        yield f"{title}: confusion, percent of each true class", own
    accuracies = {encoder: per_class(array) for encoder, array in arrays.items()}
    caption = f"{title}: accuracy of each class"
    yield caption, class_figure(accuracies, classes, caption)


def _classes(title: str, key: str, arrays: Mapping[str, npt.NDArray[Any]], classes: Sequence[str]) -> Iterator[Figure]:
    # ``per_class_knn_iou`` → ``kNN IoU``
    score = (
        key.removeprefix("per_class").strip("_").replace("_", " ").replace("iou", "IoU").replace("knn", "kNN")
        or "score"
    )
    # an array of any other length cannot be labeled with class names and is skipped
    lengths = {len(array) for array in arrays.values()}
    for named in (classes, ("background", *classes)):
        if lengths == {len(named)}:
            caption = f"{title}: {score} of each class"
            yield caption, class_figure(arrays, named, caption)


def _severities(title: str, found: Arrays) -> Iterator[Figure]:
    """Yields one figure with a chart for each row of ``accuracies``: a kind of corruption, by severity."""
    series = []
    levels = [float(level) for level in found.get("severities", {}).get("backbone", ())]
    for row, kind in enumerate(str(one) for one in found.get("names", {}).get("backbone", ())):
        points = []
        for column, level in enumerate(levels):
            values = {
                encoder: Estimate(float(array[row, column]), math.nan, math.nan)
                for encoder, array in found["accuracies"].items()
            }
            points.append((level, Comparison(kind, kind, False, values, {}, "percent")))
        series.append(Series(kind.replace("_", " "), "severity", tuple(points)))
    if series and levels:
        yield f"{title} by severity", series_figure(series, f"{title} by severity")
