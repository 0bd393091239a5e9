"""Creates the Accelerator of a run and checks that all requested processes are running."""

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
    """The Accelerator of this process; on the CPU (gloo) if there is no accelerator or `config.device` is cpu.

    Raises ConfigError for a precision that the device does not support.
    """
    # Accelerate keeps its state in a singleton, and a second run in one process may have another device or precision
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    precision = "no" if config.precision == "fp32" else config.precision
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # saves a copy of all gradients
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
    except ValueError as error:
        raise ConfigError(
            f"engine.precision: {config.precision} does not work here ({error}); give fp32 or bf16"
        ) from None
    if cpu and (threads := config.threads or _share_of_cores(accelerator)):
        torch.set_num_threads(threads)
    requested = requested_processes()
    if requested is not None and requested > accelerator.num_processes:
        logger.warning(
            "%d processes were asked for, %d is running: `accelerate launch --cpu` starts one; "
            "use --config_file configs/accelerate/cpu_2.yaml or --multi_gpu --num_processes %d",
            requested,
            accelerator.num_processes,
            requested,
        )
    return accelerator


def _share_of_cores(accelerator: Accelerator) -> int | None:
    """Threads for this process if a launcher reduced them to one; None: keep the present number."""
    # launchers set OMP_NUM_THREADS=1 for each process, which leaves most cores idle in a run on the CPU
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or torch.get_num_threads() > 1:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    # cores that this process may use: containers and taskset allow fewer than the machine has; Linux only
    return max(len(os.sched_getaffinity(0)) // local, 1) if hasattr(os, "sched_getaffinity") else None


def requested_processes() -> int | None:
    """N in the ``--num_processes N`` of the launcher that started this process; None without one."""
    # read from the parent's command line: with --cpu, Accelerate ignores the option and passes nothing on
    try:
        import psutil  # a dependency of accelerate

        command = " ".join(psutil.Process(os.getppid()).cmdline())
    except Exception:  # the parent has exited or must not be inspected
        return None
    match = re.search(r"\blaunch\b.*--num[_-]processes[= ](\d+)", command)
    return int(match.group(1)) if match else None
