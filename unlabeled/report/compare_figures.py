"""The figures of a comparison: accuracies with their intervals, and the curves of several runs in one plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from unlabeled.eval.comparison import percent
from unlabeled.report.figures.style import (
    ACCENT,
    INK,
    KINDS,
    SOFT,
    STYLE,
    drawing,
    legend,
    percent_axis,
    short,
    svg,
)

_LABEL = 28
"""Letters of a run's label that fit next to the plot."""
_LINES = ("-", "--", ":", "-.")


def accuracy_figure(labels: Sequence[str], measures: Sequence[Mapping[str, Any]]) -> Markup:
    """One row per metric and run: the accuracy with its interval, and random weights as a hollow point."""
    rows = [(number, measure, run) for number, measure in enumerate(measures) for run in range(len(labels))]
    rows = [row for row in rows if row[1]["values"][row[2]] is not None]
    with mpl.rc_context(STYLE):
        figure, axes = drawing(0.6 + 0.3 * len(rows))
        # from top to bottom, with a gap before each metric for its name
        positions = [-position - 0.9 * number for position, (number, _, _) in enumerate(rows)]
        for position, (_, measure, run) in zip(positions, rows, strict=True):
            value, random = measure["values"][run], measure["random"][run]
            color = ACCENT if measure["best"][run] else INK
            low, high = (value[end] if value[end] is not None else value["value"] for end in ("low", "high"))
            axes.plot([low, high], [position, position], color=color)
            axes.plot([value["value"]], [position], "o", color=color, markersize=6)
            if random is not None:
                axes.plot([random["value"]], [position], "o", color=SOFT, markersize=5, markerfacecolor="none")
            axes.annotate(
                f"{percent(value['value'])} %", (high, position), (6, 0), textcoords="offset points", va="center",
                fontsize=8.5, color=color,
            )  # fmt: skip
        # name each metric above its first row
        for number, measure in enumerate(measures):
            top = max(
                (position for position, row in zip(positions, rows, strict=True) if row[0] == number), default=0.0
            )
            axes.text(
                0, top + 0.7, measure["label"], transform=axes.get_yaxis_transform(), fontsize=8.5, color=SOFT,
                va="center",
            )  # fmt: skip
        axes.set_yticks(positions, [short(labels[run], _LABEL) for _, _, run in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(min(positions) - 0.6, 1.1)
        axes.margins(x=0.16)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return svg(figure, "Accuracy of each run with 95 % interval")


def online_figure(labels: Sequence[str], curves: Sequence[Sequence[Sequence[float]]]) -> Markup:
    """kNN accuracy of each run during training; `curves` has [epoch, accuracy] for each run."""
    # all colors with solid lines first, then with dashes: more runs than colors stay distinguishable
    styles = itertools.cycle(itertools.product(_LINES, KINDS))
    with mpl.rc_context(STYLE):
        figure, axes = drawing(2.9)
        for label, curve, (line, color) in zip(labels, curves, styles, strict=False):
            if len(curve) > 1:
                xs, ys = zip(*curve, strict=True)
                axes.plot(xs, ys, line, color=color, label=short(label, _LABEL))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        percent_axis(axes)
        legend(figure, axes, ncols=2)
        return svg(figure, "kNN accuracy of each run during training")
