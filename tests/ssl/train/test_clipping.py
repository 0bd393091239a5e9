"""Clipping of gradients: all together, or each part of a task by itself."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils import DistributedType
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from unlabeled.ssl.config.schema import EngineConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.train.accelerator import create_accelerator
from unlabeled.ssl.train.loop import gradient_norm, parameters_by_child

LIMIT = 1.5


class Task(nn.Module):
    """Parts with large and small gradients, one without any, a frozen one, a shared layer and a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(4))
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
        self.heads = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])
        self.again = nn.ModuleList([self.backbone[2]])
        self.unused = nn.Linear(2, 2)
        self.teacher = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x + self.token)
        return 1e-3 * self.heads[0](features).square().sum() + 200 * self.heads[1](features).square().sum()


def with_gradients(task: nn.Module) -> nn.Module:
    task(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).backward()
    return task


def run_of(task: nn.Module, accelerator: Any, **engine: Any) -> Any:
    config = SimpleNamespace(engine=EngineConfig(**engine))
    return SimpleNamespace(config=config, accelerator=accelerator, model=task, task=task)


def gradients(task: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}


def norm_of(values: dict[str, Tensor], part: str) -> float:
    return math.sqrt(sum(value.double().square().sum() for name, value in values.items() if name.startswith(part)))


@pytest.fixture
def accelerator() -> Any:
    return create_accelerator(EngineConfig(device="cpu"))


def test_each_part_is_clipped_by_itself_and_the_norm_is_that_of_all(accelerator: Any) -> None:
    task = with_gradients(Task())
    before = gradients(task)
    norm = gradient_norm(run_of(task, accelerator, clip=LIMIT, clip_parts=True))
    after = gradients(task)
    assert norm.item() == pytest.approx(norm_of(before, ""), rel=1e-6)
    assert before.keys() == after.keys()
    for part in ("backbone.", "heads.", "token"):
        assert norm_of(before, part) > LIMIT
        assert norm_of(after, part) == pytest.approx(LIMIT, rel=1e-5)
        for name in before:
            if name.startswith(part):
                assert torch.allclose(after[name] / LIMIT, before[name] / norm_of(before, part), rtol=1e-5)


def test_parts_below_the_limit_stay_as_they_are(accelerator: Any) -> None:
    task = with_gradients(Task())
    task.token.grad *= 1e-6  # type: ignore[union-attr,operator]
    before = gradients(task)
    gradient_norm(run_of(task, accelerator, clip=LIMIT, clip_parts=True))
    after = gradients(task)
    assert torch.equal(after["token"], before["token"])
    assert norm_of(after, "heads.") == pytest.approx(LIMIT, rel=1e-5)


def test_without_parts_all_are_clipped_together(accelerator: Any) -> None:
    task = with_gradients(Task())
    before = gradients(task)
    norm = gradient_norm(run_of(task, accelerator, clip=LIMIT))
    assert norm.item() == pytest.approx(norm_of(before, ""), rel=1e-6)
    assert norm_of(gradients(task), "") == pytest.approx(LIMIT, rel=1e-5)


def test_every_trainable_parameter_is_in_one_part() -> None:
    task: Any = Task()
    parts = [{id(parameter) for parameter in part} for part in parameters_by_child(task)]
    assert len(parts) == 4  # the token, backbone with the layer that is shared, heads, unused
    assert sum(map(len, parts)) == len(set().union(*parts)) == sum(p.requires_grad for p in task.parameters())


def test_clip_parts_needs_a_limit_and_full_gradients() -> None:
    with pytest.raises(ValidationError, match=r"clip_parts has no effect without clip; set engine\.clip"):
        EngineConfig(clip_parts=True)
    older: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ConfigError, match=r"engine\.clip_parts: FSDP 1 .*set fsdp_version: 2"):
        gradient_norm(run_of(Task(), older, clip=LIMIT, clip_parts=True))


def worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_fsdp2=True,
        unscale_gradients=lambda: None,
        device=torch.device("cpu"),
    )
    task = fully_shard(Task(), mesh=init_device_mesh("cpu", (2,)))
    with_gradients(task)
    norm = gradient_norm(run_of(task, accelerator, clip=LIMIT, clip_parts=True))
    ours = {
        name: parameter.grad.full_tensor()
        for name, parameter in task.named_parameters()
        if isinstance(parameter.grad, DTensor)
    }
    alone = with_gradients(Task())
    single: Any = SimpleNamespace(**{**vars(accelerator), "distributed_type": DistributedType.NO})
    assert norm.item() == pytest.approx(gradient_norm(run_of(alone, single, clip=LIMIT, clip_parts=True)).item())
    theirs = gradients(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5) for name in ours)
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_gradients_are_clipped_like_unsharded_ones(tmp_path: Any) -> None:
    mp.start_processes(worker, args=(str(tmp_path / "rendezvous"),), nprocs=2, start_method="forkserver")
