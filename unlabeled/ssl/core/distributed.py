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
def told_once() -> Iterator[None]:
    """A fault that all ranks meet is told by the first one; the others leave without a word."""
    try:
        yield
    except UnlabeledError:
        if int(os.environ.get("RANK", "0")) > 0:
            raise SystemExit(2) from None
        raise


def leave_ranks() -> None:
    """Takes this process out of the group of ranks, whose threads must not outlive Python's own shutdown."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks, in place; the same tensor in a single process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) of each rank → (B * ranks, ...) in the order of ranks, on every rank; all ranks must bring equally many.

    With a gradient: what the losses of all ranks say about a row is summed up at the rank that it came from.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


def gather_lists(items: list[ItemT]) -> list[ItemT]:
    """The items of all ranks, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return items
    parts: list[list[ItemT]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
