"""``unlabeled tasks``: the pretext tasks, built in and from installed packages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from unlabeled.pretext.registry import task_class, task_names, task_origin
from unlabeled.ssl.config.docstrings import first_sentence
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import Paper

WIDE = 140
"""Columns of a terminal from which on a table of five columns is easier to read than a list."""

NEEDS = {
    "pooled": "pooled features: every backbone has them",
    "dense_map": "a feature map: most backbones, from ViT to ResNet",
    "token_dropping": "a transformer that can run on some of its patches, such as ViT",
    "masked_stages": "convolution stages before a transformer that can be masked: convmae_*",
    "sparse_convs": "a convolutional network that can skip masked cells, such as ResNet or ConvNeXt",
    "elastic": "a network that holds smaller ones: ViT, Swin or ResNet",
}
"""What the names of capabilities mean. ``unlabeled matrix`` tries them on every architecture."""


@dataclass(frozen=True)
class TaskSummary:
    """What ``unlabeled tasks`` says of one task."""

    name: str
    summary: str
    """The first sentence of its docstring; the reason where a plugin's task cannot be imported."""
    good_for: str
    needs: tuple[str, ...]
    """Names of the capabilities that it needs of the backbone."""
    paper: Paper | None
    origin: str
    """"built in", or the package that brings it."""


def list_tasks() -> list[TaskSummary]:
    """Every task, in the order of names."""
    return [_summary(name) for name in task_names()]


def _summary(name: str) -> TaskSummary:
    try:
        task = task_class(name)
    except ConfigError as error:  # of a plugin that cannot be imported; the others are listed all the same
        return TaskSummary(name, str(error), "", (), None, task_origin(name))
    needs = tuple(sorted(task.requires))
    return TaskSummary(name, first_sentence(task.__doc__), task.good_for, needs, task.paper, task_origin(name))


def tasks_json(tasks: Sequence[TaskSummary]) -> str:
    """A list of tasks with everything that the table shows."""
    found = [{**asdict(one), "paper": one.paper and one.paper._asdict()} for one in tasks]
    return json.dumps(found, indent=2, ensure_ascii=False)


def render_tasks(tasks: Sequence[TaskSummary], width: int) -> RenderableType:
    """The tasks as a table, or on a terminal of fewer than `WIDE` columns one below the other."""
    shown = _table(tasks) if width >= WIDE else _listed(tasks)
    legend = Table.grid(padding=(0, 2, 0, 0))
    legend.add_column(no_wrap=True)
    for name in dict.fromkeys(name for one in tasks for name in one.needs):
        legend.add_row(f"  {name}", NEEDS.get(name, ""))
    more = Text("Settings and recipe of a task: unlabeled settings task=NAME")
    return Group(shown, Text("Needs of the backbone", style="bold"), legend, Text(), more)


def _table(tasks: Sequence[TaskSummary]) -> Table:
    table = Table(box=None, padding=(0, 3, 1, 0), header_style="bold")
    table.add_column("task", style="cyan", no_wrap=True)
    table.add_column("what it does", ratio=5)
    table.add_column("choose it for", ratio=5)
    table.add_column("needs", no_wrap=True)
    table.add_column("paper", ratio=4)
    foreign = any(one.origin != "built in" for one in tasks)
    if foreign:
        table.add_column("from")
    for one in tasks:
        origin = [one.origin] if foreign else []
        cells = (one.name, one.summary, one.good_for, "\n".join(one.needs), _cited(one.paper), *origin)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _listed(tasks: Sequence[TaskSummary]) -> Group:
    parts: list[RenderableType] = []
    for one in tasks:
        parts.append(Text.assemble((one.name, "bold cyan"), "" if one.origin == "built in" else f"  from {one.origin}"))
        parts.append(Padding(Text(one.summary), (0, 0, 0, 4)))
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="dim", no_wrap=True)
        rows = {"choose it for": one.good_for, "needs": ", ".join(one.needs), "paper": _cited(one.paper)}
        for name, text in rows.items():
            if text:
                facts.add_row(f"    {name}", Text(text))
        parts += [facts, Text()]
    return Group(*parts)


def _cited(paper: Paper | None) -> str:
    return f"{paper.title} ({paper.year})" if paper else ""
