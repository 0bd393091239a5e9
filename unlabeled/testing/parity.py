"""Two gloo processes on half a batch each give the loss and gradients of one process on the full batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from unlabeled.ssl.nn.batch_norm import synchronize
from unlabeled.ssl.task import PretextTask
from unlabeled.testing.case import IMAGES, TaskCase, require
from unlabeled.testing.loss import cut, loss_and_gradients, without_dropout

_TOLERANCE = 1e-6
"""Largest difference, absolute and relative to the largest gradient, in double precision."""


@dataclass(frozen=True)
class RankResult:
    """What one process measured."""

    loss: float
    """Mean over the ranks."""
    gradients: dict[str, Tensor]
    draw: dict[str, Tensor]
    """What the task drew under this rank's own seed."""


def two_processes_equal_one(case: TaskCase) -> None:
    """Starts two processes, which takes a few seconds. They must be able to import the task's class."""
    compare_with_one(case, run_two_processes([case])[0])


def run_two_processes(cases: Sequence[TaskCase]) -> list[tuple[RankResult, RankResult]]:
    """One forward and backward pass of each case, split over two processes: the results of rank 0 and rank 1."""
    with tempfile.TemporaryDirectory() as folder:
        start = cast(Callable[..., None], spawn)
        start(_work, args=(folder, list(cases)), nprocs=2)
        first, second = (torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in (0, 1))
    return [(RankResult(**one), RankResult(**two)) for one, two in zip(first, second, strict=True)]


def compare_with_one(case: TaskCase, found: tuple[RankResult, RankResult]) -> None:
    """Raises ContractError if loss or gradients differ from one process, or if both ranks draw the same numbers."""
    task = _prepared(case)
    batch = case.batch(task)
    loss, gradients = loss_and_gradients(task, batch, _common_draw(task, batch))
    remedy = (
        "what is compared or averaged over the batch must span the ranks: "
        "unlabeled.gather_across_ranks or sum_over_ranks"
    )
    for rank, result in enumerate(found):
        same = abs(result.loss - loss) <= _TOLERANCE
        require(same, f"the loss is {loss:.6g} in one process, {result.loss:.6g} in two", remedy)
        for name, gradient in gradients.items():
            other = result.gradients.get(name)
            require(other is not None, f"{name} has no gradient on rank {rank}", remedy)
            off = float("inf") if other is None else float((other - gradient).abs().max())
            limit = _TOLERANCE * max(1.0, float(gradient.abs().max()))
            require(off <= limit, f"{name}: its gradient differs by {off:.2g} on rank {rank}", remedy)
    first, second = (result.draw for result in found)
    alike = [name for name in first if torch.equal(first[name], second[name])]
    require(not alike, f"draw[{alike and alike[0]!r}] is the same on both ranks", "draw from torch's global generator")


def _work(rank: int, folder: str, cases: list[TaskCase]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = IMAGES // 2
    share = slice(rank * half, (rank + 1) * half)
    results = []
    for case in cases:
        task = _prepared(case)
        batch = case.batch(task)
        draw = _common_draw(task, batch)
        if task.synced_statistics:
            synchronize(task)
        loss, gradients = loss_and_gradients(DistributedDataParallel(task), cut(batch, share), cut(draw, share))
        dist.all_reduce(total := torch.tensor(loss, dtype=torch.float64))
        torch.manual_seed(100 + rank)  # different on each rank, as in a run
        own = task.draw(batch)
        named = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
        results.append({"loss": total.item() / 2, "gradients": named, "draw": own})
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.barrier()  # a rank that leaves early would break the other's connection
    dist.destroy_process_group()


def _prepared(case: TaskCase) -> PretextTask:
    """The task in double precision without dropout; batch norms that are not synced use running statistics."""
    task = case.task().double()
    without_dropout(task)
    if not task.synced_statistics:
        for module in task.modules():
            module.training &= not isinstance(module, _BatchNorm)
    return task


def _common_draw(task: PretextTask, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(11)
    return task.draw(batch)
