"""``unlabeled finetune``: a classifier from a backbone, beside the same network from random weights."""

from __future__ import annotations

import argparse

from unlabeled.ssl.core.distributed import leave_ranks
from unlabeled.ssl.core.signals import EXIT_STOPPED
from unlabeled.workflows.finetune.run import finetune_config, finetune_from


def run(given: argparse.Namespace) -> int:
    """Fine-tunes; returns the exit code."""
    try:
        return EXIT_STOPPED if finetune_from(finetune_config(given.target, given.overrides)).stopped else 0
    finally:
        leave_ranks()
