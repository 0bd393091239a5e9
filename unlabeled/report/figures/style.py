"""How the report's figures look: SVG drawn by matplotlib without its global state, in the page's own colors and font.

Figures are drawn in stand-in colors, which the SVG text then replaces by the page's CSS variables, so that they follow
light and dark; text stays text.
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
"""Of classes: as many as can be told apart; ``--kind0`` to ``--kind9`` of the page."""
PIXEL = "#2a9d95"
"""Of pixels, which CSS cannot recolor: near the accent, and visible on light and on dark."""
_VARIABLES = {
    INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", ACCENT: "var(--accent)", CARD: "var(--card)",
    **{color: f"var(--kind{number})" for number, color in enumerate(KINDS)},
}  # fmt: skip

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
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
"""Inches; a figure is as wide as a phone, so that its text needs no shrinking there."""
_NAME = 14

STYLES: dict[str, dict[str, Any]] = {
    "backbone": {"color": ACCENT, "marker": "o", "markersize": 4, "zorder": 3},
    "pixels": {"color": SOFT, "linestyle": (0, (1, 2)), "marker": "s", "markersize": 3, "linewidth": 1.2},
    "random": {"color": SOFT, "linestyle": "--", "marker": "D", "markersize": 3, "linewidth": 1.1},
}
"""Line of each encoder; tables and figures name them as `unlabeled.eval.comparison.TITLES` does."""


def drawing(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width and `height` inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: Figure, axes: Axes, **options: Any) -> None:
    """One legend above everything."""
    options = {"loc": "outside upper left", "ncols": 3, "frameon": False, "fontsize": 8, "labelcolor": SOFT, **options}
    figure.legend(*axes.get_legend_handles_labels(), **options)


def percent_axis(axes: Axes, ticks: int = 5) -> None:
    """Fractions as percent on the y axis."""
    axes.yaxis.set_major_locator(MaxNLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element that takes its colors and font from the page and its width from its place.

    `label` says to those who cannot see it what it shows; of two figures of a page it must differ.
    """
    label = clean(label)
    buffer = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": label}):
        warnings.filterwarnings("ignore", message="Glyph")  # the browser, not matplotlib, draws the text
        figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    named = f' role="img" aria-label="{escape(label)}"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda found: found[1] + named, text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return Markup(text)  # matplotlib escapes the text that it draws


def short(name: str, length: int = _NAME) -> str:
    """A name in one line of at most `length` letters."""
    name = clean(name).replace("\n", " ")
    return name if len(name) <= length else name[: length - 1] + "…"
