"""SimCLR against equation 1 of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.registry import create_task
from unlabeled.pretext.two_views.simclr import SimCLR, SimCLRConfig
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import ConfigError


def make(**settings) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(SimCLRConfig(hidden=24, dim=12, **settings), create_backbone("test_resnet", size=32)).double()


def batch_of(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"views": torch.randint(0, 256, (count, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)}


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> float:
    """Equation 1, view by view: z_k belongs to z_(k + N)."""
    count = len(first)
    z = [row / row.norm() for row in torch.cat([first, second]).detach()]
    total = 0.0
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        others = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * count) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[partner]) / temperature) / others)
    return total / (2 * count)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_equation_1(temperature):
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    loss = make(temperature=temperature).loss(first, second)
    assert loss.item() == pytest.approx(nt_xent(first, second, temperature), rel=1e-12)


def test_the_loss_of_orthogonal_images_with_equal_views_is_known():
    """Each view has one partner at cosine 1 and 2 (B - 1) others at cosine 0; itself is not among them."""
    loss = make(temperature=0.5).loss(torch.eye(6), torch.eye(6))
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 10) - 2, rel=1e-6)


def test_the_length_of_projections_is_of_no_matter():
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    loss = make().loss
    assert loss(3 * first, 0.1 * second).item() == pytest.approx(loss(first, second).item(), rel=1e-12)


def test_all_views_pass_together_so_that_batch_norm_sees_both():
    task, batch = make(temperature=0.5), batch_of()
    norm = task.projector.layers[1]
    output = task(batch)
    assert int(norm.num_batches_tracked) == 1
    normalized = task.backbone.normalize(
        batch["views"].transpose(0, 1).flatten(0, 1)
    ).double()  # first views, then second
    first, second = task.projector(task.backbone.pooled(normalized)).chunk(2)
    assert output.loss.item() == pytest.approx(nt_xent(first, second, 0.5), rel=1e-9)
    apart = [task.embed(task.backbone.normalize(view)) for view in batch["views"].unbind(1)]
    assert abs(nt_xent(*apart, 0.5) - output.loss.item()) > 1e-4


def test_the_head_is_the_published_one():
    task = create_task({"name": "simclr"}, create_backbone("test_resnet", size=32))
    kinds = [type(layer).__name__ for layer in task.projector.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [layer.out_features for layer in task.projector.layers if hasattr(layer, "out_features")] == [2048, 128]
    assert task.config.temperature == 0.1
    with pytest.raises(ConfigError, match=r"task.temperature"):
        create_task({"name": "simclr", "temperature": 0}, create_backbone("test_resnet", size=32))
