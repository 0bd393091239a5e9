"""``unlabeled settings``: what can be set, and what it means."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from unlabeled.workflows.describe_settings import describe, overview
from unlabeled.workflows.print_settings import overview_json, render_overview, render_tables, tables_json


def run(given: argparse.Namespace) -> int:
    """Prints the settings that were asked for, or what there is; returns the exit code."""
    console = Console(highlight=False)
    if given.json:
        text = overview_json(overview()) if given.what is None else tables_json(describe(given.what))
        sys.stdout.write(text + "\n")
    elif given.what is None:
        console.print(render_overview(overview()))
    else:
        console.print(render_tables(describe(given.what), console.width))
    return 0
