"""``unlabeled export``: a run's network, or sizes that it holds, as files that timm loads."""

from __future__ import annotations

import argparse
import sys

from unlabeled.workflows.export import export_config, export_run


def run(given: argparse.Namespace) -> int:
    """Exports and prints, for each file, Python that loads it; returns the exit code."""
    for exported in export_run(export_config(given.run, given.overrides)):
        sys.stdout.write(f"{exported.line}\n")
    return 0
