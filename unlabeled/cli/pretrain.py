"""``unlabeled pretrain``: one run, or with ``--multirun`` every combination of swept values."""

from __future__ import annotations

import argparse
import logging

from unlabeled.ssl.core.distributed import leave_ranks
from unlabeled.ssl.core.signals import EXIT_STOPPED
from unlabeled.workflows.pretrain import pretrain_config, pretrain_from, swept_configs

log = logging.getLogger(__name__)


def run(given: argparse.Namespace) -> int:
    """Pretrains; returns the exit code."""
    configs = swept_configs(given.overrides) if given.multirun else [("", pretrain_config(given.overrides))]
    try:
        for label, config in configs:
            if label:
                log.info("--- %s", label)
            if pretrain_from(config).stopped:
                return EXIT_STOPPED
    finally:
        leave_ranks()
    return 0
