"""``unlabeled pretrain``: one run, or with ``--multirun`` every combination of swept values."""

from __future__ import annotations

import argparse
import logging
import shlex

from unlabeled.ssl.core.distributed import leave_ranks
from unlabeled.ssl.core.signals import EXIT_STOPPED
from unlabeled.workflows.pretrain import pretrain_config, pretrain_from, swept_configs

log = logging.getLogger(__name__)


def run(given: argparse.Namespace) -> int:
    """Pretrains; returns the exit code."""
    configs = swept_configs(given.overrides) if given.multirun else [("", pretrain_config(given.overrides))]
    try:
        for number, (label, config) in enumerate(configs, start=1):
            if label:
                log.info("run %d of %d: %s", number, len(configs), label)
            if pretrain_from(config).stopped:
                return EXIT_STOPPED
        if len(configs) > 1:
            # quoted in front of the star only, which the shell has to expand
            folder = shlex.quote(str(configs[0][1].out.parent))
            log.info("%d runs finished; compare them: unlabeled report %s/*", len(configs), folder)
    finally:
        leave_ranks()
    return 0
