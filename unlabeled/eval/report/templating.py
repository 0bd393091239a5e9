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
    found.filters.update(percent=percent, signed=signed, grouped="{:,}".format, md=markdown, measured=measured)
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
