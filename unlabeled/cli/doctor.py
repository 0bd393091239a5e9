"""``unlabeled doctor``: a scan of a data source before anyone trains on it."""

from __future__ import annotations

import argparse

from rich.console import Console

from unlabeled.workflows.inspect_data import doctor_config, examine, render


def run(given: argparse.Namespace) -> int:
    """Scans and prints what was found; returns the exit code."""
    Console().print(render(examine(doctor_config(given.overrides))))
    return 0
