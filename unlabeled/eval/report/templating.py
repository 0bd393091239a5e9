"""What the templates of all pages share: escaping, numbers, and names in Markdown."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader

from unlabeled.eval.report.verdict import percent, signed


@functools.cache
def environment(*, html: bool) -> Environment:
    """Loads from ``templates/``; pages escape everything, Markdown is given the filter ``md``."""
    found = Environment(
        loader=PackageLoader("unlabeled.eval.report", "templates"),
        autoescape=html,
        trim_blocks=html,
        keep_trailing_newline=True,
    )
    found.filters.update(percent=percent, signed=signed, grouped="{:,}".format, md=markdown, measured=measured, gap=gap)
    return found


def markdown(text: Any) -> str:
    """`text` as it stands, in one line, inside a table too."""
    line = " ".join(str(text).split())
    for mark in "\\`*_|[]<>":
        line = line.replace(mark, "\\" + mark)
    return line


def measured(value: float | None, unit: str) -> str:
    """A value as a table shows it: percent of 1, or three figures; a dash for one that is not finite."""
    if value is None:
        return "–"
    return f"{value:.3g}" if unit == "number" else percent(value)


def gap(value: float, unit: str) -> str:
    """A difference: points of percent, or a number, with its sign."""
    return f"{value:+.3g}".replace("-", "−") if unit == "number" else signed(value)


def duration(seconds: float) -> str:
    """3725 → ``1 h 2 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
