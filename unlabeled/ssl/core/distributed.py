"""The processes (ranks) of a distributed run: sums and gathering over ranks, and errors that all ranks raise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from unlabeled.ssl.core.errors import UnlabeledError

ItemT = TypeVar("ItemT")


@contextlib.contextmanager
def report_errors_once() -> Iterator[None]:
    """Reports an error that every rank raises only on the first rank; the others exit silently with code 2."""
    try:
        yield
    except UnlabeledError:
        if launched_rank() > 0:  # not `rank()`: errors in the settings are raised before the process group exists
            raise SystemExit(2) from None
        raise


def rank() -> int:
    """Index of this process among the ranks; 0 without a process group."""
    return dist.get_rank() if _in_process_group() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if _in_process_group() else 1


def launched_rank() -> int:
    """The rank that a launcher assigned to this process; unlike `rank`, also known without a process group."""
    return int(os.environ.get("RANK", "0"))


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave_ranks() -> None:
    """Destroys the process group, if there is one."""
    if _in_process_group():  # its threads must not outlive Python's own shutdown
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums `values` over all ranks, in place, and returns it; does nothing in a single process. No gradient."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_across_ranks(tensor: Tensor) -> Tensor:
    """Concatenates (B, ...) of each rank to (B * ranks, ...), in rank order, on every rank; B must be the same on all.

    Differentiable: the gradient of an entry is summed over the losses of all ranks and returned to the rank that
    contributed the entry.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _GatherAcrossRanks.apply(tensor)
    return gathered


class _GatherAcrossRanks(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        by_rank = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(by_rank, tensor.contiguous())
        return torch.cat(by_rank)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # a clone, since autograd may use the incoming gradient elsewhere and all_reduce works in place
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed.chunk(world_size())[rank()]


def gather_lists(items: list[ItemT]) -> list[ItemT]:
    """The picklable items of all ranks, in rank order, on every rank; ranks may contribute different numbers."""
    if world_size() == 1:
        return items
    by_rank: list[list[ItemT]] = [[] for _ in range(world_size())]
    dist.all_gather_object(by_rank, items)
    return [item for gathered in by_rank for item in gathered]
