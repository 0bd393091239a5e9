"""``unlabeled tasks``: the pretext tasks, built in and from installed packages."""

from __future__ import annotations

from rich.table import Table

from unlabeled.pretext.registry import task_class, task_names, task_origin
from unlabeled.ssl.core.errors import ConfigError


def task_table() -> Table:
    """A row for each task: its name, what it is, what it needs of the backbone, and who brings it."""
    table = Table("task", "what it is", "needs of the backbone", "from", box=None)
    for name in task_names():
        try:
            task = task_class(name)
            what, needs = (task.__doc__ or "-").strip().splitlines()[0], ", ".join(sorted(task.requires))
        except ConfigError as error:  # of a plugin that cannot be imported; the others are listed all the same
            what, needs = str(error), ""
        table.add_row(name, what, needs or "-", task_origin(name))
    return table
