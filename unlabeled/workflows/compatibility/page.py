"""The capability matrix as a page for people: counts, one table with numbered reasons, and the networks behind it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from unlabeled.pretext.registry import task_names
from unlabeled.workflows.compatibility.measure import Matrix, MatrixEntry

_HEAD = """\
# What runs on what

Every architecture module of timm {timm}, and our own, under every pretext task. Nothing here is guessed: each ✓ is one
forward and one backward pass of the task, with its default settings, that gave a finite loss and a gradient for every
parameter that it trains. (PixPro and PixContrast look at the second map, DINO and iBOT do without local crops, OBoW has
64 words: the images are small.) Where a task cannot, a number stands for [the reason](#why-not); the command itself
also names the layer.

One small network stands for each module ([which ones](#the-networks)); others of the same module may differ.

Made by `make matrix`. One pair by itself: `unlabeled matrix task=mae module=beit`.
"""

_FEW = 20
"""Modules that are also named beside their count."""
_NEVER = MatrixEntry("cannot", "not tried")


def render_page(matrix: Matrix) -> str:
    """The page, as Markdown."""
    reasons = _numbered(matrix)
    absent = sorted(set(task_names()) - set(matrix.tasks))
    parts = [
        _HEAD.format(timm=matrix.timm) + (f"\nNot tried yet: {', '.join(absent)}.\n" if absent else ""),
        _counts(matrix),
        "## The table\n\n" + _table(matrix, reasons),
        "## Why not\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()),
        "## The networks\n\n"
        + "\n".join(f"- `{module}`: {matrix.networks[module]}" for module in sorted(matrix.cells)),
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def write_page(matrix: Matrix, page: Path) -> None:
    """Writes `page` and, beside it, the cells as JSON."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(matrix.dumps(), encoding="utf-8")
    page.write_text(render_page(matrix), encoding="utf-8")


def render_terminal(matrix: Matrix) -> RenderableType:
    """Counts for each task, why some cannot, and every fault."""
    table = Table("task", "runs on", "cannot", "why", box=None)
    for task in matrix.tasks:
        cells = _column(matrix, task)
        why = Counter(_general(cell.reason) for cell in cells if cell.status == "cannot")
        counts = Counter(cell.status for cell in cells)
        shown = "\n".join(f"{count} x {reason}" for reason, count in why.most_common())
        table.add_row(task, f"{counts['runs']} of {len(cells)}", str(counts["cannot"]), shown)
    faults = [f"[red]fault[/red]: {task} on {module}: {reason}" for module, task, reason in matrix.having("fault")]
    return Group(table, *faults)


def _general(reason: str) -> str:
    """`reason` without what belongs to one network only: the place inside of it, and numbers of pixels."""
    reason = re.sub(r"^[\w.]+ \((\w+)\): ", r"\1: ", re.sub(r"^(the network|[\w.]+): ", "", reason))
    if reason.endswith(" attends to all places"):
        return "attention between all places needs the whole grid"
    return re.sub(r"\d+x\d+", "NxN", re.sub(r"^(\w+): \1 ", r"\1 ", reason))


def _numbered(matrix: Matrix) -> dict[str, int]:
    """Reason → number, the most frequent first."""
    found = Counter(_general(reason) for _, _, reason in matrix.having("cannot"))
    ordered = sorted(found, key=lambda reason: (-found[reason], reason))
    faults = sorted({f"**fault**: {reason}" for _, _, reason in matrix.having("fault")})
    return {reason: number for number, reason in enumerate([*ordered, *faults], start=1)}


def _column(matrix: Matrix, task: str) -> list[MatrixEntry]:
    return [row[task] for row in matrix.cells.values() if task in row]


def _counts(matrix: Matrix) -> str:
    """Modules per task; where they are few, which."""
    lines = ["| task | runs on | |", "| :-- | --: | :-- |"]
    for task in matrix.tasks:
        able = sorted(module for module, row in matrix.cells.items() if row.get(task, _NEVER).status == "runs")
        few = ", ".join(able) if len(able) <= _FEW else ""
        lines.append(f"| {task} | {len(able)} of {len(_column(matrix, task))} | {few} |")
    return "\n".join(lines)


def _networks(matrix: Matrix) -> str:
    shown = "\n".join(f"- `{module}`: {matrix.networks[module]}" for module in sorted(matrix.cells))
    title = f"{len(matrix.cells)} modules and the network that was tried"
    return f"<details><summary>{title}</summary>\n\n{shown}\n\n</details>"


def _table(matrix: Matrix, reasons: dict[str, int]) -> str:
    tasks = matrix.tasks
    lines = ["| | " + " | ".join(tasks) + " |", "| :-- |" + " :-: |" * len(tasks)]
    for module, row in sorted(matrix.cells.items()):
        marks = [_mark(row.get(task), reasons) for task in tasks]
        lines.append(f"| {module} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def _mark(cell: MatrixEntry | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell.status == "runs":
        return "✓"
    if cell.status == "cannot":
        return f"<sub>{reasons[_general(cell.reason)]}</sub>"
    return f"**✗** <sub>{reasons[f'**fault**: {cell.reason}']}</sub>"
