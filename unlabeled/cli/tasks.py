"""``unlabeled tasks``: the list of pretext tasks."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from unlabeled.workflows.list_tasks import list_tasks, render_tasks, tasks_json


def run(given: argparse.Namespace) -> int:
    """Prints the tasks; returns the exit code."""
    console = Console(highlight=False)
    if given.json:
        sys.stdout.write(tasks_json(list_tasks()) + "\n")
    else:
        console.print(render_tasks(list_tasks(), console.width))
    return 0
