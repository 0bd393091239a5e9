"""The style of the report's figures: SVG from matplotlib, without its global state, in the page's colors and font.

Figures are drawn in placeholder colors, which are then replaced with the page's CSS variables in the SVG text, so that
figures follow light and dark mode. Text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from unlabeled.report.document import clean

INK, SOFT, LINE, ACCENT, CARD = "#010101", "#020202", "#030303", "#040404", "#050505"
KINDS = tuple(f"#0600{number:02x}" for number in range(10))
"""Colors of classes, as many as can be distinguished: ``--kind0`` to ``--kind9`` of the page."""
PIXEL = "#2a9d95"
"""Color of rasterized figures, which CSS cannot recolor: close to the accent, visible in light and dark mode."""
_VARIABLES = {
    INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", ACCENT: "var(--accent)", CARD: "var(--card)",
    **{color: f"var(--kind{number})" for number, color in enumerate(KINDS)},
}  # fmt: skip

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text instead of becoming paths
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # class names may contain "$"
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}

WIDTH = 4.4
"""Inches. A figure is as wide as a phone screen, so that its text stays readable there."""
_NAME = 14
"""Letters of a name on an axis."""

STYLES: dict[str, dict[str, Any]] = {
    "backbone": {"color": ACCENT, "marker": "o", "markersize": 4, "zorder": 3},
    "pixels": {"color": SOFT, "linestyle": (0, (1, 2)), "marker": "s", "markersize": 3, "linewidth": 1.2},
    "random": {"color": SOFT, "linestyle": "--", "marker": "D", "markersize": 3, "linewidth": 1.1},
}
"""Line style of each encoder; their names are in `unlabeled.eval.comparison.TITLES`."""


def drawing(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width, `height` inches high, and its axes."""
    # not pyplot: it keeps every figure alive in global state
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: Figure, axes: Axes, **options: Any) -> None:
    """Adds one legend above the whole figure."""
    options = {"loc": "outside upper left", "ncols": 3, "frameon": False, "fontsize": 8, "labelcolor": SOFT, **options}
    figure.legend(*axes.get_legend_handles_labels(), **options)


def percent_axis(axes: Axes, ticks: int = 5) -> None:
    """Shows fractions as percent on the y axis."""
    axes.yaxis.set_major_locator(MaxNLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def svg(figure: Figure, label: str) -> Markup:
    """Renders the figure as an SVG element that takes its colors and font from the page and its width from its parent.

    `label` describes the figure to screen readers. It must be unique on a page, because the ids inside the SVG are
    derived from it.
    """
    label = clean(label)
    buffer = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": label}):
        warnings.filterwarnings("ignore", message="Glyph")  # the browser, not matplotlib, draws the text
        figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # drop the XML header, metadata, styles, fonts and the fixed size, which would override those of the page
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    named = f' role="img" aria-label="{escape(label)}"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda match: match[1] + named, text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return Markup(text)  # matplotlib escapes the text that it draws


def short(name: str, length: int = _NAME) -> str:
    """`name` on one line, cut to at most `length` letters."""
    name = clean(name).replace("\n", " ")
    return name if len(name) <= length else name[: length - 1] + "…"
