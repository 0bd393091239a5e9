"""Accuracy of the sizes of an elastic model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from unlabeled.eval.intervals import wilson
from unlabeled.eval.size_curve import SizeCurve, SizeResult
from unlabeled.report.figures.style import ACCENT, CARD, INK, SOFT, STYLE, WIDTH, percent_axis, svg

_BARRED = 24
"""Up to this many sizes, each has its interval and its random weights; otherwise only the Pareto front has them."""


def size_figure(curve: SizeCurve, metric: str) -> Markup:
    """Plots the accuracy of each size by its number of parameters.

    Also shows the Pareto front, random weights, raw pixels, and other runs trained alone.
    """
    front = curve.front(metric)
    measured = [result for result in curve.results if metric in result.metrics]
    extracted = [result for result in measured if result.kind == "extracted"]
    few = len(extracted) <= _BARRED  # intervals of many sizes would hide the points
    # the same sizes with random weights
    twins = [result for result in (extracted if few else front) if metric in result.random]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        above, below = _size_axes(figure, measured, twins, curve, metric)
        _points(above, [one for one in extracted if one not in front], metric, "sizes of this model", alpha=0.45)
        _points(above, front, metric, "better than every smaller size", linestyle="-")
        _points(above, [one for one in measured if one.kind == "alone"], metric, "trained alone", color=INK, marker="D")
        for result in measured if few else ():
            color, ends = (
                INK if result.kind == "alone" else ACCENT,
                wilson(result.metrics[metric], curve.test_images),
            )
            above.plot([result.parameters] * 2, ends, color=color, linewidth=0.9, alpha=0.6)
        if twins:
            xs, ys = [one.parameters for one in twins], [one.random[metric] for one in twins]
            style: Any = {"marker": "o", "markersize": 3.5, "markerfacecolor": CARD} if few else {}
            below.plot(xs, ys, "--", color=SOFT, linewidth=1.1, label="random weights", **style)
        if metric in curve.pixels:
            below.axhline(curve.pixels[metric], color=SOFT, linestyle=(0, (1, 2)), linewidth=1.2, label="raw pixels")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=SOFT)
        return svg(figure, f"{curve.label(metric)} of each size against its number of parameters")


def _size_axes(
    figure: Figure, measured: Sequence[SizeResult], twins: Sequence[SizeResult], curve: SizeCurve, metric: str
) -> tuple[Axes, Axes]:
    """Returns the axes for the sizes and the axes for the baselines.

    They are the same axes, unless the baselines are so far below that the sizes would be squeezed into a line: then the
    y axis is broken into two panels.
    """
    values = [result.metrics[metric] for result in measured]
    baselines = [found[metric] for found in (curve.pixels, *(result.random for result in twins)) if metric in found]
    broken = bool(baselines) and min(values) - max(baselines) > max(values) - min(values)
    ratios = [3, 1] if broken else [1]
    axes: list[Axes] = list(figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios).flat)
    for panel, ticks in zip(axes, (5, 2), strict=False):
        percent_axis(panel, ticks)
        panel.margins(x=0.06, y=0.1 if panel is axes[0] else 0.3)
    if broken:
        # slanted strokes on both panels mark the break of the axis
        axes[0].spines["bottom"].set_visible(False)
        axes[0].tick_params(axis="x", length=0, which="both")
        stroke: Any = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 7, "color": SOFT, "clip_on": False}
        axes[0].plot([0], [0], transform=axes[0].transAxes, **stroke)
        axes[1].plot([0], [1], transform=axes[1].transAxes, **stroke)
    last = axes[-1]
    last.set_xscale("log")
    last.set_xlabel("million parameters")
    last.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    last.xaxis.set_minor_formatter(NullFormatter())
    return axes[0], last


def _points(axes: Axes, results: Sequence[SizeResult], metric: str, label: str, **style: Any) -> None:
    if results:
        xs, ys = [result.parameters for result in results], [result.metrics[metric] for result in results]
        axes.plot(
            xs,
            ys,
            **{"marker": "o", "linestyle": "", "markersize": 4.5, "color": ACCENT, "label": label, **style},
        )
