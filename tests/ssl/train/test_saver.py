"""Saving a sharded run: what FSDP splits over two processes comes back whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from unlabeled.ssl.train.checkpoint import load_checkpoint
from unlabeled.ssl.train.monitor import Meter
from unlabeled.ssl.train.saver import Saver


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def sharded(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, Saver]:
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.FSDP, scaler=None, num_processes=2, is_main_process=dist.get_rank() == 0
    )
    wrapped: Any = SimpleNamespace(optimizer=optimizer)
    saver = Saver(folder, accelerator, model=model, optimizer=wrapped, every_steps=1, total_steps=3, keep=1)
    return model, optimizer, saver


def worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, optimizer, saver = sharded(Path(folder))
    train(model, optimizer, 3)
    saver.save(3, Meter())
    again, its_optimizer, other = sharded(Path(folder))
    newest = other.newest()
    assert newest is not None
    assert other.load(newest, Meter()) == 3
    train(model, optimizer, 2)
    train(again, its_optimizer, 2)
    ours, theirs = saver.full_model_state(), other.full_model_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_run_is_saved_unsharded_and_resumes_exactly(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="forkserver")
    model, _, state = load_checkpoint(tmp_path / "checkpoints" / "step_00000003")
    single = network()
    train(single, torch.optim.AdamW(single.parameters(), lr=0.1), 3)
    assert state["step"] == 3
    for name, value in single.state_dict().items():
        assert torch.allclose(model[name], value, atol=1e-6), name
