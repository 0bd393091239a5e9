"""``unlabeled gauntlet``: many backbones on many datasets in one job."""

from __future__ import annotations

import argparse
import logging

from unlabeled.workflows.gauntlet.job import run_gauntlet
from unlabeled.workflows.gauntlet.progress import CellProgress
from unlabeled.workflows.gauntlet.settings import gauntlet_config

log = logging.getLogger(__name__)


def run(given: argparse.Namespace) -> int:
    """Evaluates what is not done yet and writes the table; returns the exit code."""
    config = gauntlet_config(given.overrides)
    with CellProgress() as progress:
        cells = run_gauntlet(config, progress.begin)["cells"]
    log.info("%d of %d cells, %d failed: %s", cells["done"], cells["total"], cells["failed"], config.out / "table.html")
    return 0
