"""Batch norms and gathered rows over two processes equal one process, in values, gradients and running statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from unlabeled.ssl.core.distributed import gather_across_ranks
from unlabeled.ssl.nn.batch_norm import synchronize


def network() -> nn.Module:
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(maps, nn.Flatten(), nn.BatchNorm1d(4, affine=False)).double()


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """Compares each row of this rank with the rows of all ranks."""
    rows = net(x)
    return (rows @ gather_across_ranks(rows).t()).tanh().mean()


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3, 4, 4, dtype=torch.double)


def worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    net = network()
    synchronize(net)
    loss = loss_of(net, inputs()[rank * 3 : rank * 3 + 3])
    loss.backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2  # as data-parallel training does
    dist.all_reduce(loss)
    torch.save((loss / 2, [p.grad for p in net.parameters()], net.state_dict()), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="forkserver")
    net = network()
    loss = loss_of(net, inputs())
    loss.backward()
    for rank in (0, 1):
        found, gradients, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, loss.detach())
        for gradient, parameter in zip(gradients, net.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-12, rtol=1e-9)
        for name, value in net.state_dict().items():
            torch.testing.assert_close(state[name], value)


def test_alone_nothing_changes() -> None:
    plain, converted = network(), network()
    synchronize(converted)
    assert torch.equal(plain(inputs()), converted(inputs()))
    assert plain.state_dict().keys() == converted.state_dict().keys()
    assert gather_across_ranks(inputs()).shape == inputs().shape
