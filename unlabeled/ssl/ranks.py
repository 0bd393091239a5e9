"""The processes of a run: the Accelerator, reductions over ranks, and the check that all asked-for ranks exist."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.autograd import Function

from unlabeled.ssl.errors import ConfigError, UnlabeledError

if TYPE_CHECKING:  # settings know of everything, and everything may ask for its rank
    from unlabeled.ssl.schema import EngineConfig

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")


def create_accelerator(config: EngineConfig) -> Accelerator:
    """Accelerate for this process: the CPU (gloo) where there is no accelerator or `config.device` says so."""
    AcceleratorState._reset_state(reset_partial_state=not _grouped())
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


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A fault that all ranks meet is told by the first one; the others leave without a word."""
    try:
        yield
    except UnlabeledError:
        if launched_rank() > 0:
            raise SystemExit(2) from None
        raise


def rank() -> int:
    """Number of this process among the ranks; 0 where there is no group of them."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Ranks of this run; 1 where there is no group of them."""
    return dist.get_world_size() if _grouped() else 1


def launched_rank() -> int:
    """The number that a launcher gave this process: what `rank` will be, before there is a group and after it."""
    return int(os.environ.get("RANK", "0"))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave_ranks() -> None:
    """Takes this process out of the group of ranks, whose threads must not outlive Python's own shutdown."""
    if _grouped():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks, in place; the same tensor in a single process."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) of each rank → (B * ranks, ...) in the order of ranks, on every rank; all ranks must bring equally many.

    With a gradient: what the losses of all ranks say about a row is summed up at the rank that it came from.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed.chunk(world_size())[rank()]


def gather_lists(items: list[ItemT]) -> list[ItemT]:
    """The items of all ranks, in the order of ranks, on every rank."""
    if world_size() == 1:
        return items
    parts: list[list[ItemT]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
