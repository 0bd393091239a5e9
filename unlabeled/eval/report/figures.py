"""The report's figures: SVG drawn by matplotlib without its global state, in the page's own colours and font.

Figures are drawn in stand-in colours, which the SVG text then replaces by the page's CSS variables, so that they follow
light and dark; text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from unlabeled.eval.intervals import wilson
from unlabeled.eval.report.document import Row, clean, online_curve
from unlabeled.eval.report.verdict import TITLES, Comparison, label_of, percent
from unlabeled.eval.size_curve import SizeCurve, SizeResult

_INK, _SOFT, _LINE, _ACCENT, _CARD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {
    _INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _ACCENT: "var(--accent)", _CARD: "var(--card)",
}  # fmt: skip
_PIXEL = "#2a9d95"
"""Of pixels, which CSS cannot recolour: near the accent, and visible on light and on dark."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}

_WIDTH = 4.4
"""Inches; a figure is as wide as a phone, so that its text needs no shrinking there."""
_POINTS = 400
_NUMBERED, _NAMED = 12, 24
"""Classes up to which a confusion matrix shows numbers, and names."""
_NAME = 14
_BARRED = 24
"""Sizes up to which each is drawn with its interval and its random weights; past it the front alone has them."""

_BESIDE = {"step", "epoch", "loss", "lr", "images_per_s", "data_wait", "grad_norm", "memory_gb", "time", "seconds"} | {
    "size"
}
"""Columns of metrics.jsonl that are no log of the task."""
_TASK_CURVES = 4


def training_curves(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """(title, SVG) of the loss, the learning rate, the online kNN, and the first few of the task's own logs."""
    keys = dict.fromkeys(key for row in rows for key in row)
    logs = [key for key in keys if key not in _BESIDE and not key.startswith("eval/")]
    wanted = [("loss", "Loss"), ("lr", "Learning rate"), *((key, key) for key in logs[:_TASK_CURVES])]
    figures = []
    for key, title in wanted:
        points = [(_position(row), float(row[key])) for row in rows if _is_number(row.get(key))]
        if len(points) > 1:
            figures.append((title, _curve(points, title, _axis(rows), smooth=key != "lr")))
    online = online_curve(rows)
    if len(online) > 1:
        title = "kNN accuracy during the run"
        figures.insert(2, (title, _curve([(x, y) for x, y in online], title, _axis(rows), smooth=False, fraction=True)))
    return figures


def comparison_figure(comparisons: Sequence[Comparison]) -> Markup:
    """The headline accuracies of all encoders as points with their intervals."""
    quoted = [comparison for comparison in comparisons if comparison.headline]
    rows = [(c, name) for c in quoted for name in c.values]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.5 + 0.3 * len(rows))
        places = [-row - 0.6 * quoted.index(comparison) for row, (comparison, _) in enumerate(rows)]
        for place, (comparison, name) in zip(places, rows, strict=True):
            estimate, color = comparison.values[name], _ACCENT if name == "backbone" else _SOFT
            axes.plot([estimate.low, estimate.high], [place, place], color=color)
            axes.plot([estimate.value], [place], "o", color=color, markersize=6)
            axes.annotate(
                f"{percent(estimate.value)} %", (estimate.high, place), (6, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=_INK if name == "backbone" else _SOFT,
            )  # fmt: skip
        axes.set_yticks(places, [f"{c.label}: {TITLES.get(name, name)}" for c, name in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(min(places) - 0.6, 0.6)
        axes.margins(x=0.16)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, "Accuracy of each encoder with its 95 % interval")


def confusion_figure(matrix: npt.NDArray[np.int64], classes: Sequence[str], of: str = "the linear probe") -> Markup:
    """True class (row) by predicted class (column), as part of each true class."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(matrix)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(_WIDTH * 0.92)
        colors = np.empty((count * count, 4))
        colors[:] = to_rgba(_ACCENT if count <= _NAMED else _PIXEL)
        colors[:, 3] = share.ravel()
        mesh = axes.pcolormesh(np.zeros((count, count)), linewidth=0, rasterized=count > _NAMED)
        axes.grid(visible=False)
        mesh.set_array(None)
        mesh.set_facecolors(colors)  # type: ignore[attr-defined]
        axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal", xlabel="predicted", ylabel="true")
        if count <= _NAMED:
            names = [_short(name) for name in classes]
            axes.set_xticks(np.arange(count) + 0.5, names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(np.arange(count) + 0.5, names)
        axes.tick_params(length=0)
        if count <= _NUMBERED:
            for (row, column), value in np.ndenumerate(share):
                if value >= 0.005:
                    color = _CARD if value > 0.55 else _INK
                    axes.text(
                        column + 0.5, row + 0.5, f"{100 * value:.0f}",
                        ha="center", va="center", fontsize=7.5, color=color,
                    )  # fmt: skip
        return _svg(figure, f"Confusion matrix of {of}, percent of each true class")


def size_figure(curve: SizeCurve, metric: str) -> Markup:
    """Accuracy of each size against its weights, its Pareto front, random weights, raw pixels, others trained alone."""
    front = curve.front(metric)
    measured = [result for result in curve.results if metric in result.metrics]
    extracted = [result for result in measured if result.kind == "extracted"]
    few = len(extracted) <= _BARRED
    twins = [result for result in (extracted if few else front) if metric in result.random]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        above, below = _size_axes(figure, measured, twins, curve, metric)
        _points(above, [one for one in extracted if one not in front], metric, "sizes of this network", alpha=0.45)
        _points(above, front, metric, "no smaller one is as good", linestyle="-")
        _points(
            above, [one for one in measured if one.kind == "alone"], metric, "trained alone", color=_INK, marker="D"
        )
        for result in measured if few else ():
            color, ends = (
                _INK if result.kind == "alone" else _ACCENT,
                wilson(result.metrics[metric], curve.test_pictures),
            )
            above.plot([result.parameters] * 2, ends, color=color, linewidth=0.9, alpha=0.6)
        if twins:
            xs, ys = [one.parameters for one in twins], [one.random[metric] for one in twins]
            look: Any = {"marker": "o", "markersize": 3.5, "markerfacecolor": _CARD} if few else {}
            below.plot(xs, ys, "--", color=_SOFT, linewidth=1.1, label="random weights", **look)
        if metric in curve.pixels:
            below.axhline(curve.pixels[metric], color=_SOFT, linestyle=(0, (1, 2)), linewidth=1.2, label="raw pixels")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=_SOFT)
        return _svg(figure, f"{label_of(metric)} of each size against its number of parameters")


def _size_axes(
    figure: Figure, measured: Sequence[SizeResult], twins: Sequence[SizeResult], curve: SizeCurve, metric: str
) -> tuple[Axes, Axes]:
    """Where sizes are drawn and where baselines: apart when these lie so far below that sizes would become a line."""
    values = [result.metrics[metric] for result in measured]
    baselines = [found[metric] for found in (curve.pixels, *(result.random for result in twins)) if metric in found]
    far = bool(baselines) and min(values) - max(baselines) > max(values) - min(values)
    axes: list[Axes] = list(figure.subplots(1 + far, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + far]).flat)
    for part, ticks in zip(axes, (5, 2), strict=False):
        part.yaxis.set_major_locator(MaxNLocator(ticks))
        part.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        part.margins(x=0.06, y=0.1 if part is axes[0] else 0.3)
    if far:
        axes[0].spines["bottom"].set_visible(False)
        axes[0].tick_params(axis="x", length=0, which="both")
        tear: Any = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 7, "color": _SOFT, "clip_on": False}
        axes[0].plot([0], [0], transform=axes[0].transAxes, **tear)
        axes[1].plot([0], [1], transform=axes[1].transAxes, **tear)
    last = axes[-1]
    last.set_xscale("log")
    last.set_xlabel("million parameters")
    last.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    last.xaxis.set_minor_formatter(NullFormatter())
    return axes[0], last


def _points(axes: Axes, results: Sequence[SizeResult], metric: str, label: str, **look: Any) -> None:
    if results:
        xs, ys = [result.parameters for result in results], [result.metrics[metric] for result in results]
        axes.plot(
            xs, ys, **{"marker": "o", "linestyle": "", "markersize": 4.5, "color": _ACCENT, "label": label, **look}
        )


def _curve(
    points: Sequence[tuple[float, float]], title: str, axis: str, *, smooth: bool, fraction: bool = False
) -> Markup:
    xs, ys = _thinned(np.array([x for x, _ in points]), np.array([y for _, y in points]))
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.3)
        if smooth and len(ys) > 20:
            axes.plot(xs, ys, color=_ACCENT, alpha=0.3, linewidth=0.8)
            axes.plot(xs, _rolling(ys, max(3, len(ys) // 20)), color=_ACCENT)
        else:
            axes.plot(xs, ys, color=_ACCENT, marker="o" if len(ys) < 30 else None, markersize=3.5)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if fraction:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        elif np.abs(ys).max(initial=0) < 0.01:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        return _svg(figure, title)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element that takes its colours and font from the page and its width from its place."""
    buffer = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": label}):
        warnings.filterwarnings("ignore", message="Glyph")  # the browser, not matplotlib, draws the text
        figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{escape(label)}"', text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return Markup(text)  # matplotlib escapes the text that it draws


def _position(row: Mapping[str, Any]) -> float:
    return float(row["epoch"] if "epoch" in row else row.get("step", 0))


def _axis(rows: Sequence[Row]) -> str:
    return "epoch" if rows and "epoch" in rows[0] else "step"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _thinned(
    xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most `_POINTS` points, means of neighbouring ones."""
    if len(xs) <= _POINTS:
        return xs, ys
    parts = np.array_split(np.arange(len(xs)), _POINTS)
    return np.array([xs[part].mean() for part in parts]), np.array([ys[part].mean() for part in parts])


def _rolling(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Centred moving mean over `width` values, over fewer at the ends."""
    kernel = np.ones(width)
    mean: npt.NDArray[np.float64] = np.convolve(values, kernel, "same") / np.convolve(
        np.ones_like(values), kernel, "same"
    )
    return mean


def _short(name: str) -> str:
    name = clean(name).replace("\n", " ")
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"
