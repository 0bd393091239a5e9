"""Accuracies of several encoders in one plot: as points, as curves, and by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from unlabeled.eval.base import Estimate
from unlabeled.eval.comparison import TITLES, Comparison, percent
from unlabeled.report.figures.style import (
    ACCENT,
    CARD,
    INK,
    SOFT,
    STYLE,
    STYLES,
    WIDTH,
    drawing,
    legend,
    percent_axis,
    short,
    svg,
)
from unlabeled.report.sections import Series

_ROWS = 24
"""Up to this many classes, each class has its own row."""


def comparison_figure(comparisons: Sequence[Comparison]) -> Markup:
    """The headline accuracies of all encoders, as points with their intervals."""
    quoted = [comparison for comparison in comparisons if comparison.headline]
    rows = [(c, name) for c in quoted for name in c.values]
    with mpl.rc_context(STYLE):
        figure, axes = drawing(0.5 + 0.3 * len(rows))
        # rows from top to bottom, with a gap between metrics
        positions = [-row - 0.6 * quoted.index(comparison) for row, (comparison, _) in enumerate(rows)]
        for position, (comparison, name) in zip(positions, rows, strict=True):
            estimate, color = comparison.values[name], ACCENT if name == "backbone" else SOFT
            axes.plot([estimate.low, estimate.high], [position, position], color=color)
            axes.plot([estimate.value], [position], "o", color=color, markersize=6)
            axes.annotate(
                f"{percent(estimate.value)} %", (estimate.high, position), (6, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=INK if name == "backbone" else SOFT,
            )  # fmt: skip
        axes.set_yticks(positions, [f"{c.label}: {TITLES.get(name, name)}" for c, name in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(min(positions) - 0.6, 0.6)
        axes.margins(x=0.16)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return svg(figure, "Accuracy of each encoder with 95 % interval")


def series_figure(series: Sequence[Series], title: str) -> Markup:
    """Plots series of one evaluator as small charts side by side, with baselines dashed.

    The charts share a y axis if all series have the same unit.
    """
    columns = min(2, len(series))
    rows = -(-len(series) // columns)  # rounded up
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4 if rows == 1 else 0.5 + 1.55 * rows), layout="constrained")
        one_unit = len({one.points[0][1].unit for one in series}) == 1
        charts: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharey=one_unit).flat)
        for axes, one in zip(charts, series, strict=False):
            # not every encoder has every point: an evaluator may skip raw pixels
            names = dict.fromkeys(name for _, row in one.points for name in row.values)
            for name in names:
                _line(axes, [(x, row.values[name]) for x, row in one.points if name in row.values], name)
            if len(series) > 1:
                axes.set_title(short(one.title, 28), fontsize=8.5, loc="left", color=INK)
            _numbered(axes, [x for x, _ in one.points])
            axes.set_xlabel(short(one.axis, 28))
            if one.points[0][1].unit != "number":
                percent_axis(axes, 4)
        for axes in charts[len(series) :]:
            axes.set_axis_off()
        legend(figure, charts[0])
        return svg(figure, title)


def prefix_figure(rows: Sequence[Comparison], dimensions: Mapping[str, int], title: str) -> Markup | None:
    """Plots one metric against the number of features it was computed on: the first k, and k principal components.

    `rows` has the metric on all features and on each subset. Points of principal components are hollow; raw pixels with
    all features are a horizontal line. Returns None if there are no subsets.
    """
    lines: dict[tuple[str, bool], list[tuple[float, Estimate]]] = {}
    pixels: Estimate | None = None
    for row in rows:
        pixels = row.values.get("pixels") if row.cut is None else pixels
        for name in [name for name in row.values if name != "pixels"]:
            length = dimensions[name] if row.cut is None else row.cut.length
            # all features are the last point of both lines
            for principal in (False, True):
                if row.cut is None or principal == row.cut.principal:
                    lines.setdefault((name, principal), []).append((length, row.values[name]))
    lines = {line: sorted(points, key=lambda point: point[0]) for line, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = drawing(3)
        for (name, principal), points in lines.items():
            label = TITLES.get(name, name) + (", PCA" if principal else "")
            _line(axes, points, name, label=label, **({"markerfacecolor": CARD, "alpha": 0.75} if principal else {}))
        if pixels is not None:
            axes.axhline(pixels.value, label=TITLES["pixels"], **{**STYLES["pixels"], "marker": None})
        _numbered(axes, sorted({x for points in lines.values() for x, _ in points}))
        axes.set_xlabel("number of features")
        percent_axis(axes)
        legend(figure, axes)
        return svg(figure, title)


def class_figure(scores: Mapping[str, npt.NDArray[np.float64]], classes: Sequence[str], label: str) -> Markup:
    """Plots a score per class (C,) for each encoder.

    Each class has a row; with more than 24 classes, each encoder is a curve from its best to its worst class.
    """
    with mpl.rc_context(STYLE):
        if len(classes) > _ROWS:
            figure, axes = drawing(2.6)
            for name, score in scores.items():
                # each encoder has its own order, so a position on the x axis is not the same class for all
                values = np.sort(score[np.isfinite(score)])[::-1]
                style = {**STYLES.get(name, {"color": SOFT}), "marker": None}
                axes.plot(np.arange(1, len(values) + 1), values, label=TITLES.get(name, name), **style)
            axes.set_xlabel("classes, best first")
            percent_axis(axes)
        else:
            figure, axes = drawing(0.7 + 0.22 * len(classes))
            for name, score in scores.items():
                style = {**STYLES.get(name, {"color": SOFT}), "linestyle": ""}
                axes.plot(score, np.arange(len(score)), label=TITLES.get(name, name), **style)
            axes.set_yticks(np.arange(len(classes)), [short(name) for name in classes])
            axes.set_ylim(len(classes) - 0.5, -0.5)  # the first class on top
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            axes.xaxis.set_major_locator(MaxNLocator(4))
        legend(figure, axes)
        return svg(figure, label)


def _line(axes: Axes, points: Sequence[tuple[float, Estimate]], name: str, **style: Any) -> None:
    """Draws one encoder's values and their intervals."""
    xs, ys = [x for x, _ in points], [one.value for _, one in points]
    style = {"label": TITLES.get(name, name), **STYLES.get(name, {"color": SOFT}), **style}
    axes.plot(xs, ys, **style)
    for x, one in points:
        axes.plot([x, x], [one.low, one.high], color=style["color"], linewidth=0.9, alpha=0.5)


def _numbered(axes: Axes, positions: Sequence[float]) -> None:
    """Puts ticks at the measured positions, on a log scale if they span more than a factor of eight."""
    if min(positions) > 0 and max(positions) > 8 * min(positions):
        axes.set_xscale("log")
    elif max(positions) > min(positions):
        edge = 0.06 * (max(positions) - min(positions))
        axes.set_xlim(min(positions) - edge, max(positions) + edge)
    axes.xaxis.set_major_locator(FixedLocator(list(positions)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
