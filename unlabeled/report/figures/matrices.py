"""Heat maps of matrices, and spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from unlabeled.eval.comparison import TITLES
from unlabeled.report.figures.style import (
    ACCENT,
    CARD,
    INK,
    PIXEL,
    SOFT,
    STYLE,
    STYLES,
    WIDTH,
    drawing,
    legend,
    short,
    svg,
)

_NUMBERED, _NAMED = 12, 24
"""Up to this many rows or columns, a heat map shows numbers, and names."""
_DECADES = 8
"""Decades of a spectrum drawn below its largest value; smaller values are rounding errors."""


def confusion_figure(matrix: npt.NDArray[np.int64], classes: Sequence[str], title: str = "linear probe") -> Markup:
    """Plots true class (row) by predicted class (column), as a fraction of each true class."""
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    label = f"Confusion matrix of the {title}, percent of each true class"
    return heat_figure(fractions, classes, classes, ("true", "predicted"), label)


def heat_figure(
    values: npt.NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], axis: tuple[str, str], label: str
) -> Markup:
    """Plots a matrix (R, C) of values from 0 to 1. `axis` names the rows and the columns; NaN stays empty."""
    values = np.asarray(values, np.float64)
    with mpl.rc_context(STYLE):
        figure, axes = drawing(WIDTH * 0.92 * min(1.0, max(0.4, values.shape[0] / values.shape[1])))
        named = max(values.shape) <= _NAMED
        # one color with the value as its opacity, so that the page's CSS can recolor it; pixels of a large,
        # rasterized matrix cannot follow CSS and get a fixed color
        colors = np.empty((values.size, 4))
        colors[:] = to_rgba(ACCENT if named else PIXEL)
        colors[:, 3] = np.clip(np.nan_to_num(values), 0, 1).ravel()
        mesh = axes.pcolormesh(np.zeros(values.shape), linewidth=0, rasterized=not named)
        axes.grid(visible=False)
        mesh.set_array(None)  # else matplotlib maps values to colors again when it draws
        mesh.set_facecolors(colors)  # type: ignore[attr-defined]
        height, width = values.shape
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", ylabel=axis[0], xlabel=axis[1])
        if named:
            names = [short(name) for name in columns]
            axes.set_xticks(np.arange(width) + 0.5, names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(np.arange(height) + 0.5, [short(name) for name in rows])
        axes.tick_params(length=0)
        if max(values.shape) <= _NUMBERED:
            _numbers(axes, values)
        return svg(figure, label)


def _numbers(axes: Axes, values: npt.NDArray[np.float64]) -> None:
    """Writes each value into its cell, in percent."""
    for (row, column), value in np.ndenumerate(values):
        if value >= 0.005:  # less is "0", which would only clutter
            axes.text(
                column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5,
                color=CARD if value > 0.75 else INK,
            )  # fmt: skip


def spectrum_figure(spectra: Mapping[str, npt.NDArray[Any]], label: str) -> Markup | None:
    """Plots the singular values of each encoder's features by rank, relative to the largest, on log axes.

    Encoders without a positive finite value are left out; returns None if no encoder remains.
    """
    with mpl.rc_context(STYLE):
        figure, axes = drawing(2.9)
        for name, found in spectra.items():
            values = np.sort(np.asarray(found, np.float64).ravel())[::-1]
            values = values[np.isfinite(values) & (values > 0)]
            if len(values):
                relative = values / values[0]
                relative = relative[relative > 10.0**-_DECADES]
                # a line through one point is invisible, so it gets a marker
                style = {**STYLES.get(name, {"color": SOFT}), "marker": None if len(relative) > 1 else "o"}
                axes.plot(np.arange(1, len(relative) + 1), relative, label=TITLES.get(name, name), **style)
        if not axes.lines:
            return None
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="singular value / largest")
        for side in (axes.xaxis, axes.yaxis):
            side.set_minor_formatter(NullFormatter())
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        legend(figure, axes)
        return svg(figure, label)
