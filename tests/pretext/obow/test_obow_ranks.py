"""OBoW on two processes: words are generated in shares and queued in one order; all as on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unlabeled.pretext.obow import OBoW, OBoWConfig
from unlabeled.pretext.obow.vocabulary import WordHead
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.nn.batch_norm import synchronize

WORDS = (10, 9)
"""The first are shared out between two ranks, the second are not."""
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS = {
    "resnet18": {"channels": [8, 8, 8, 8], "stem_width": 8, "output_stride": 8},
    "vit_tiny_patch16_224": {**VIT, "dynamic_img_size": True},
}
STEPS = 3


def head_loss(rank: int, words: int) -> tuple[WordHead, Tensor]:
    """A head, and the loss that rank `rank` sees of it."""
    torch.manual_seed(0)
    head, vocabulary = WordHead(3, 4).double(), torch.rand(words, 3).double()
    target = torch.rand(2, words, 4).double()
    return head, (head(vocabulary) - target[rank]).square().sum()


def run(name: str, words: int, ranks: int, rank: int) -> dict[str, Tensor]:
    """A few steps of a task on the images of one rank; its losses, summed over them, and its state."""
    torch.manual_seed(0)
    backbone = create_backbone(name, size=32, **NETWORKS[name])
    settings = {"words": words, "image_crops": {"number": 1}, "patches": {"number": 0}}
    task = OBoW(OBoWConfig(**settings), backbone).double().train()
    generator = torch.Generator().manual_seed(1)
    if ranks > 1:
        synchronize(task)
    model = DistributedDataParallel(task) if ranks > 1 else task
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.01)
    own = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    losses = []
    for step in range(STEPS):
        batch = {
            "image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator),
            "crops": torch.randint(0, 256, (4, 1, 3, 24, 24), dtype=torch.uint8, generator=generator),
        }
        position = torch.rand(4, 2, generator=generator)
        optimizer.zero_grad()
        loss = model({key: value[own] for key, value in batch.items()}, position=position[own]).loss
        loss.backward()
        optimizer.step()
        task.after_step(step / STEPS)
        losses.append(loss.detach() / ranks)
    return {"losses": torch.stack(losses), **task.state_dict()}


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found: dict[str, dict[str, Tensor]] = {}
    for words in WORDS:
        head, loss = head_loss(rank, words)
        loss.backward()
        for parameter in head.parameters():
            dist.all_reduce(parameter.grad)
        found[f"head{words}"] = {name: parameter.grad / 2 for name, parameter in head.named_parameters()}
    for name in NETWORKS:
        found[name] = run(name, WORDS[0], 2, rank)
        dist.all_reduce(found[name]["losses"])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("obow")
    mp.start_processes(_worker, args=(str(folder / "rendezvous"), str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("words", WORDS)
def test_shared_generation_has_the_gradient_of_generating_all(two, words) -> None:
    expected: dict[str, Tensor] = {}
    for rank in (0, 1):
        head, loss = head_loss(rank, words)
        loss.backward()
        for name, parameter in head.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad / 2
    for found in two:
        assert found[f"head{words}"].keys() == expected.keys()
        for name, gradient in found[f"head{words}"].items():
            assert torch.allclose(gradient, expected[name], atol=1e-12), name


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_on_two_ranks_are_those_of_one(two, name) -> None:
    alone = run(name, WORDS[0], 1, 0)
    assert alone["vocabularies.0.pointer"].item() == STEPS * 4 % WORDS[0]
    for found in two:
        assert torch.allclose(found[name]["losses"], alone["losses"], atol=1e-8)
        for key, value in alone.items():
            assert torch.allclose(found[name][key].double(), value.double(), atol=1e-7), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_queues_of_the_ranks_are_the_same_to_the_bit(two, name) -> None:
    for key in (key for key in two[0][name] if key.startswith("vocabularies")):
        assert torch.equal(two[0][name][key], two[1][name][key]), key
