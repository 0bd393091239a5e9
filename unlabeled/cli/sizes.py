"""``unlabeled sizes``: the sizes that an elastic run holds."""

from __future__ import annotations

import argparse

from rich.console import Console

from unlabeled.workflows.elastic_sizes import size_table


def run(given: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    Console().print(size_table(given.run))
    return 0
