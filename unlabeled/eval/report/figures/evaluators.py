"""Which figures the section of an evaluator has: told from its measures and arrays, so that a new one gets them too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
from markupsafe import Markup

from unlabeled.eval.registry import EVALUATORS
from unlabeled.eval.report.figures.accuracy import class_figure, prefix_figure, series_figure
from unlabeled.eval.report.figures.matrices import confusion_figure, heat_figure, spectrum_figure
from unlabeled.eval.report.sections import Series, cut_of, find_series, per_class, title_of
from unlabeled.eval.report.verdict import Comparison, measures
from unlabeled.eval.suite import Evidence

Figure = tuple[str, Markup]
"""Title and SVG."""

_LAYERS = {
    "cka": "Likeness of the layers (CKA), percent",
    "cka_random": "Layers beside those of random weights (CKA), percent",
}


def evaluator_figures(evidence: Evidence) -> dict[str, list[Figure]]:
    """Evaluator → its figures: curves over a number, over the number of features, and of the arrays in `_arrays`."""
    rows = measures(evidence)
    found = {}
    for name in EVALUATORS:
        own = [row for row in rows if row.metric.startswith(f"{name}/")]
        found[name] = [*_curves(name, own), *_prefixes(name, own, evidence), *_arrays(name, evidence)]
    return found


def _curves(name: str, rows: Sequence[Comparison]) -> Iterator[Figure]:
    """A figure for each number that measures differ in."""
    axes: dict[str, list[Series]] = {}
    for series in find_series(rows):
        axes.setdefault(series.axis, []).append(series)
    for axis, together in axes.items():
        title = f"{title_of(name)} by {axis}"
        yield title, series_figure(together, title)


def _prefixes(name: str, rows: Sequence[Comparison], evidence: Evidence) -> Iterator[Figure]:
    """Of the measures to quote; of an evaluator without one, of its first."""
    cut = dict.fromkeys(row.metric.partition("@")[0] for row in rows if cut_of(row.metric) is not None)
    quoted = [metric for metric in cut if metric in evidence.headline] or list(cut)[:1]
    dimensions = {encoder: found.dimension for encoder, found in evidence.encoders.items()}
    labels = {row.metric: row.label for row in rows}
    for metric in quoted:
        title = f"{labels.get(metric, metric)}, by number of features"
        if figure := prefix_figure(rows, metric, dimensions, title):
            yield title, figure


def _arrays(name: str, evidence: Evidence) -> Iterator[Figure]:
    """``confusion`` (C, C) · ``per_class*`` (C,) or with the background (C + 1,) · ``singular_values`` (d,) · ``cka*``
    (L, L), with ``names`` (L,) of the layers."""
    title, classes = title_of(name), evidence.classes
    found: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for encoder, one in evidence.encoders.items():
        for key, array in one.arrays.items():
            if key.startswith(f"{name}/"):
                found.setdefault(key.removeprefix(f"{name}/"), {})[encoder] = array
    for key, arrays in found.items():
        own = arrays.get("backbone")
        if key == "confusion":
            if own is not None:
                yield f"{title}: confusion, percent of each true class", confusion_figure(own, classes, title)
            shares = {encoder: per_class(array) for encoder, array in arrays.items()}
            yield f"{title}: accuracy of each class", class_figure(shares, classes, f"{title}: accuracy of each class")
        elif key.startswith("per_class"):
            score = key.removeprefix("per_class").strip("_").replace("_", " ").replace("iou", "IoU") or "score"
            words = f"{title}: {score} of each class"
            length = len(next(iter(arrays.values())))
            named = classes if length == len(classes) else ("background", *classes)
            if length == len(named):
                yield words, class_figure(arrays, named, words)
        elif key == "singular_values":
            words = "Spectrum of the features"
            if figure := spectrum_figure(arrays, f"{words}: singular values by rank"):
                yield words, figure
        elif key.startswith("cka") and own is not None and own.ndim == 2:
            layers = [str(one) for one in found.get("names", {}).get("backbone", range(1, max(own.shape) + 1))]
            words = _LAYERS.get(key, key)
            yield words, heat_figure(own, layers[: len(own)], layers[: own.shape[1]], ("layer", "layer"), words)
