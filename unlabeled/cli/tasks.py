"""``unlabeled tasks``: the list of pretext tasks."""

from __future__ import annotations

import argparse

from rich.console import Console

from unlabeled.workflows.list_tasks import task_table


def run(given: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    Console().print(task_table())
    return 0
