"""``unlabeled report``: runs side by side."""

from __future__ import annotations

import argparse
import logging

from unlabeled.workflows.compare import report_runs

log = logging.getLogger(__name__)


def run(given: argparse.Namespace) -> int:
    """Writes the comparison and says where; returns the exit code."""
    log.info("Comparison: %s", report_runs(given.overrides))
    return 0
