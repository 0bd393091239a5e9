"""A sharded task around a network without a timm name comes back whole; ranks must bring the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils import DistributedType
from own_networks import Scaled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.given import require_same_weights
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.loop import unsharded_task
from unlabeled.ssl.train.saver import Saver


def task(seed: int = 0) -> PretextTask:
    torch.manual_seed(seed)
    return create_task({"name": "rotation"}, Backbone(Scaled(), size=16))


def worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    require_same_weights(task().backbone)
    with pytest.raises(
        ConfigError, match=r"Scaled has different weights in each process; call torch.manual_seed before"
    ):
        require_same_weights(task(seed=rank).backbone)
    model = task()
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.backbone.model, model):
        fully_shard(part, mesh=mesh)
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.FSDP, device=torch.device("cpu"), num_processes=2, is_main_process=rank == 0
    )
    saver = Saver(Path("."), accelerator, model=model, optimizer=None, every_steps=1, total_steps=1, keep=1)
    run: Any = SimpleNamespace(task=model, saver=saver, accelerator=accelerator)
    whole, single = unsharded_task(run), task()
    assert whole.backbone.name == "Scaled"
    for name, tensor in single.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_custom_backbone_is_restored_in_full(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "rendezvous"),), nprocs=2)
