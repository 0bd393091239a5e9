"""The processes of a run: reductions over ranks, gathering, and faults that all of them meet."""

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


def gather_across_ranks(rows: Tensor) -> Tensor:
    """(B, ...) of each rank → (B * ranks, ...) in the order of ranks, on every rank; all ranks must bring equally many.

    With a gradient: what the losses of all ranks say about a row is summed up at the rank that it came from.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherAcrossRanks.apply(rows)
    return gathered


class _GatherAcrossRanks(Function):
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
