"""``unlabeled matrix``: every task tried on every architecture of timm."""

from __future__ import annotations

import argparse
import logging

from rich.console import Console
from rich.progress import track

from unlabeled.workflows.compatibility.measure import matrix_config, measure
from unlabeled.workflows.compatibility.page import render_terminal, write_page


def run(given: argparse.Namespace) -> int:
    """Measures, prints the table and writes the page if ``out=`` is given; returns the exit code."""
    config = matrix_config(given.overrides)
    errors, tasks = Console(stderr=True), logging.getLogger("unlabeled.pretext")
    level = tasks.level
    tasks.setLevel(logging.WARNING)  # what a task says of itself, it would say for each cell
    try:
        matrix = measure(config, lambda modules: iter(track(modules, description="modules", console=errors)))
    finally:
        tasks.setLevel(level)
    if config.out is not None:
        write_page(matrix, config.out)
    Console().print(render_terminal(matrix))
    return 0
