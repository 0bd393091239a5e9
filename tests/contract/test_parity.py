"""Two gloo processes on half batches give the loss and the gradients of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_tasks import tiny_task, views_batch
from torch.nn.parallel import DistributedDataParallel

from unlabeled.pretext.registry import task_names
from unlabeled.ssl.batch_norm import synchronize


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name in task_names():
        task = tiny_task(name).double()
        batch = views_batch(task)
        draw = task.draw(batch)
        rows = slice(rank * 2, rank * 2 + 2)
        if task.synced_statistics:
            synchronize(task)
        model = DistributedDataParallel(task)
        loss = model({k: v[rows] for k, v in batch.items()}, **{k: v[rows] for k, v in draw.items()}).loss
        loss.backward()
        dist.all_reduce(loss_sum := loss.detach().clone())
        torch.manual_seed(100 + rank)
        own = task.draw(batch)  # as the engine seeds it: another one on each rank
        torch.save(
            {
                "loss": loss_sum / 2,
                "grads": {k: p.grad for k, p in task.named_parameters() if p.grad is not None},
                "draw": own,
            },
            f"{folder}/{name}_{rank}.pt",
        )
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    mp.spawn(_worker, args=(str(folder / "rendezvous"), str(folder)), nprocs=2)
    return folder


def load(folder: Path, name: str, rank: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}_{rank}.pt", weights_only=True)
    return loaded


@pytest.mark.slow
def test_loss_and_gradients_of_two_processes_equal_one(two_processes: Path, name: str) -> None:
    task = tiny_task(name).double()
    batch = views_batch(task)
    output = task(batch, **task.draw(batch))
    output.loss.backward()
    for rank in (0, 1):
        found = load(two_processes, name, rank)
        assert abs(found["loss"] - output.loss) < 1e-6
        for key, parameter in task.named_parameters():
            if parameter.grad is not None:
                scale = max(1.0, float(parameter.grad.abs().max()))
                assert (found["grads"][key] - parameter.grad).abs().max() <= 1e-6 * scale, key


@pytest.mark.slow
def test_ranks_draw_different_random_numbers(two_processes: Path, name: str) -> None:
    first, second = (load(two_processes, name, rank)["draw"] for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[key], second[key]) for key in first)
