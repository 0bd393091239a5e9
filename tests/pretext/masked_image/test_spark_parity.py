"""SparK with batch norms everywhere: two gloo processes on half batches equal one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.task import PretextTask


def tiny_task() -> PretextTask:
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", size=32, channels=(8, 8, 16, 24), output_stride=8)
    return create_task({"name": "spark", "decoder": {"width": 16}}, backbone).double().train()


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": images}, torch.rand(4, 16, generator=generator)


def results(task: PretextTask, loss: torch.Tensor) -> dict[str, Any]:
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    statistics = {name: value for name, value in task.named_buffers() if "running" in name}
    return {"loss": loss.detach(), **gradients, **statistics}


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    task = tiny_task()
    model = DistributedDataParallel(task)
    batch, noise = inputs()
    half = slice(2 * rank, 2 * rank + 2)
    loss = model({"image": batch["image"][half]}, noise=noise[half]).loss
    loss.backward()
    dist.all_reduce(mean := loss.detach() / 2)
    torch.save(results(task, mean), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="forkserver")
    task = tiny_task()
    batch, noise = inputs()
    loss = task(batch, noise=noise).loss
    loss.backward()
    expected = results(task, loss)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            assert (found[name] - value).abs().max() <= 1e-6 * scale, name
