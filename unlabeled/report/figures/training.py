"""Curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from unlabeled.report.document import Row, online_curve
from unlabeled.report.figures.style import ACCENT, STYLE, drawing, percent_axis, svg

_POINTS = 400
"""Points per curve; more would only make the page larger."""
_ENGINE_COLUMNS = {
    "step", "epoch", "loss", "lr", "images_per_s", "data_wait", "grad_norm", "memory_gb", "time", "seconds", "size",
}  # fmt: skip
"""Columns of metrics.jsonl that the engine writes; all others are logged by the task."""
_TASK_CURVES = 4
"""Task logs that are plotted; report.json and metrics.jsonl have all of them."""


def training_curves(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """(title, SVG) of the loss, the learning rate, the online kNN accuracy, and the first few of the task's logs."""
    keys = dict.fromkeys(key for row in rows for key in row)
    logs = [key for key in keys if key not in _ENGINE_COLUMNS and not key.startswith("eval/")]
    wanted = [("loss", "Loss"), ("lr", "Learning rate"), *((key, key) for key in logs[:_TASK_CURVES])]
    figures = []
    for key, title in wanted:
        points = [(_position(row), float(row[key])) for row in rows if _is_number(row.get(key))]
        constant = len({value for _, value in points}) == 1
        if len(points) > 1 and not (constant and key == "bad_images"):
            figures.append((title, _curve(points, title, _axis(rows), smooth=key != "lr")))
    online = online_curve(rows)
    if len(online) > 1:
        # after the loss and the learning rate, before the task's logs
        title = "kNN accuracy during the run"
        figures.insert(2, (title, _curve([(x, y) for x, y in online], title, _axis(rows), smooth=False, fraction=True)))
    return figures


def _curve(
    points: Sequence[tuple[float, float]], title: str, axis: str, *, smooth: bool, fraction: bool = False
) -> Markup:
    xs, ys = _thinned(np.array([x for x, _ in points]), np.array([y for _, y in points]))
    with mpl.rc_context(STYLE):
        figure, axes = drawing(2.3)
        if smooth and len(ys) > 20:  # the raw values behind their moving mean
            axes.plot(xs, ys, color=ACCENT, alpha=0.3, linewidth=0.8)
            axes.plot(xs, _rolling(ys, max(3, len(ys) // 20)), color=ACCENT)
        else:
            axes.plot(xs, ys, color=ACCENT, marker="o" if len(ys) < 30 else None, markersize=3.5)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if fraction:
            percent_axis(axes, 4)
        elif np.abs(ys).max(initial=0) < 0.01:
            # small learning rates would otherwise need many digits on each tick
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        return svg(figure, title)


def _position(row: Mapping[str, Any]) -> float:
    return float(row["epoch"] if "epoch" in row else row.get("step", 0))


def _axis(rows: Sequence[Row]) -> str:
    return "epoch" if rows and "epoch" in rows[0] else "step"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _thinned(
    xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Reduces a curve to at most `_POINTS` points, each the mean of neighboring ones."""
    if len(xs) <= _POINTS:
        return xs, ys
    chunks = np.array_split(np.arange(len(xs)), _POINTS)
    return np.array([xs[chunk].mean() for chunk in chunks]), np.array([ys[chunk].mean() for chunk in chunks])


def _rolling(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Centered moving mean over `width` values, over fewer at the ends."""
    # dividing by the convolved ones corrects for the zeros that "same" pads the ends with
    kernel = np.ones(width)
    mean: npt.NDArray[np.float64] = np.convolve(values, kernel, "same") / np.convolve(
        np.ones_like(values), kernel, "same"
    )
    return mean
