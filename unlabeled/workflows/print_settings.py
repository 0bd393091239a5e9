"""The settings of `unlabeled.workflows.describe_settings` for a terminal, and as JSON for scripts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from unlabeled.ssl.config.readable import REQUIRED
from unlabeled.workflows.describe_settings import Setting, SettingsTable

WIDE = 120
"""Columns of a terminal from which on a table is easier to read than a list."""
_LONG = 24
"""Letters of a default beyond which it is broken at its commas."""
_HOW = (
    ("unlabeled settings NAME", "the settings of a command or group, such as: unlabeled settings optim"),
    ("unlabeled settings task=NAME", "the settings of a task, and its recipe"),
    ("unlabeled settings evaluator=NAME", "the settings of an evaluator"),
    ("unlabeled settings data=NAME", "the settings of a data source"),
)


def overview_json(found: Mapping[str, Mapping[str, str]]) -> str:
    """Kind → name → what it is."""
    return json.dumps(found, indent=2, ensure_ascii=False)


def tables_json(tables: Sequence[SettingsTable]) -> str:
    """A list of tables: title, summary, settings, and for a task its recipe."""
    return json.dumps(
        [{**asdict(table), "recipe": dict(table.recipe)} for table in tables], indent=2, ensure_ascii=False
    )


def render_overview(found: Mapping[str, Mapping[str, str]]) -> RenderableType:
    """Everything that has settings, one line each, and how to go on."""
    parts: list[RenderableType] = []
    for kind, entries in found.items():
        parts += [Text(kind, style="bold"), _columns(entries.items()), Text()]
    return Group(*parts, Text("To go on", style="bold"), _columns(_HOW))


def _columns(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True, min_width=16)
    table.add_column()
    for name, text in rows:
        table.add_row(f"  {name}", Text(text))
    return table


def render_tables(tables: Sequence[SettingsTable], width: int) -> RenderableType:
    """Settings as a table, or on a terminal of fewer than `WIDE` columns as a list of two lines each."""
    parts: list[RenderableType] = []
    for table in tables:
        parts += [Text(table.title, style="bold"), Text(table.summary), Text()]
        if not table.settings:
            parts += [Text("  There is nothing to set."), Text()]
        elif width >= WIDE:
            parts += [_table(table.settings), Text()]
        else:
            parts += _listed(table.settings, width)
        if table.recipe:
            parts += [*_recipe(table), Text()]
    return Group(*parts[:-1])  # without the last empty line


def _table(settings: Sequence[Setting]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=bool(settings), header_style="bold")
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=_LONG + 4)
    table.add_column("type", max_width=26)
    table.add_column("unit", no_wrap=True)
    table.add_column("meaning", ratio=1)
    for one in settings:
        table.add_row(*(Text(text) for text in (one.name, _broken(one.default), one.type, one.unit, one.meaning)))
    return table


def _listed(settings: Sequence[Setting], width: int) -> list[RenderableType]:
    """Name and default, type and unit on a line if they fit; the meaning below, indented."""
    parts: list[RenderableType] = []
    for one in settings:
        unit = f" [{one.unit}]" if one.unit else ""
        given = "  (required)" if one.default == REQUIRED else f" = {one.default}" if one.default else ""
        head = Text.assemble((one.name, "cyan"), given)
        kind = Text(f"{one.type}{unit}", style="dim")
        if len(head) + len(kind) + 3 <= width:
            parts.append(Text.assemble(head, " " * (width - len(head) - len(kind)), kind))
        else:
            parts += [head, Padding(kind, (0, 0, 0, 4))]
        parts += [Padding(Text(one.meaning), (0, 0, 0, 4)), Text()]
    return parts


def _recipe(table: SettingsTable) -> list[RenderableType]:
    words = Text("  ".join(shlex.quote(f"{name}={value}".replace(" ", "")) for name, value in table.recipe))
    return [
        Text(f"Recipe: {table.title} also sets the following, unless you set it yourself."),
        Padding(words, (0, 0, 0, 4)),
    ]


def _broken(default: str) -> str:
    """A long list in several lines, each of which ends with a comma."""
    lines = [""]
    for part in default.replace(",", ",\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > _LONG:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
