"""The Accelerator of a run, and the check that all the processes that were asked for exist."""

from __future__ import annotations

import logging
import os
import re

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from unlabeled.ssl.config.schema import EngineConfig
from unlabeled.ssl.core.errors import ConfigError

logger = logging.getLogger(__name__)


def create_accelerator(config: EngineConfig) -> Accelerator:
    """Accelerate for this process: the CPU (gloo) where there is no accelerator or `config.device` says so."""
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    precision = "no" if config.precision == "fp32" else config.precision
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
    except ValueError as error:
        raise ConfigError(
            f"engine.precision: {config.precision} does not work here ({error}); give fp32 or bf16"
        ) from None
    if cpu and (threads := config.threads or _share_of_cores(accelerator)):
        torch.set_num_threads(threads)
    asked = processes_asked_for()
    if asked is not None and asked > accelerator.num_processes:
        logger.warning(
            "%d processes were asked for, %d is running: `accelerate launch --cpu` starts one; "
            "use --config_file configs/accelerate/cpu_2.yaml or --multi_gpu --num_processes %d",
            asked,
            accelerator.num_processes,
            asked,
        )
    return accelerator


def _share_of_cores(accelerator: Accelerator) -> int | None:
    """Threads for this process where a launcher set them to one; None: leave them as they are."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or torch.get_num_threads() > 1:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return max(len(os.sched_getaffinity(0)) // local, 1) if hasattr(os, "sched_getaffinity") else None


def processes_asked_for() -> int | None:
    """``--num_processes N`` of the launcher that started this process, if there is one."""
    try:
        import psutil  # a dependency of accelerate

        words = " ".join(psutil.Process(os.getppid()).cmdline())
    except Exception:  # the parent is gone or not ours to look at
        return None
    match = re.search(r"\blaunch\b.*--num[_-]processes[= ](\d+)", words)
    return int(match.group(1)) if match else None
