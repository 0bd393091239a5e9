"""VICReg against section 4.1 of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.registry import create_task
from unlabeled.pretext.two_views.vicreg import VICReg, VICRegConfig
from unlabeled.ssl.backbones.backbone import create_backbone


def make(**settings) -> VICReg:
    torch.manual_seed(0)
    return VICReg(VICRegConfig(hidden=24, dim=12, **settings), create_backbone("test_resnet", size=32)).double()


def batch_of(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"views": torch.randint(0, 256, (count, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)}


def terms(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Invariance, variance and covariance, channel by channel, from lists of numbers."""
    invariance = variance = covariance = 0.0
    count, channels = first.shape
    for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
        invariance += (a - b) ** 2 / (count * channels)
    for columns in (first.t().tolist(), second.t().tolist()):
        centered = [[value - sum(column) / count for value in column] for column in columns]
        for i, left in enumerate(centered):
            for j, right in enumerate(centered):
                shared = sum(a * b for a, b in zip(left, right, strict=True)) / (count - 1)
                if i == j:
                    variance += max(0.0, 1 - math.sqrt(shared + 1e-4)) / channels / 2
                else:
                    covariance += shared**2 / channels
    return invariance, variance, covariance


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_the_loss_is_the_sum_of_its_three_terms(weights):
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    task = make(**dict(zip(names, weights, strict=True)))
    scale = torch.linspace(0.2, 2.0, 5, dtype=torch.float64)  # channels on both sides of the hinge
    first, second = torch.randn(2, 6, 5, dtype=torch.float64) * scale + 3
    expected = sum(weight * term for weight, term in zip(weights, terms(first, second), strict=True))
    assert task.loss(first, second).item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_of_equal_features_of_all_images_is_known():
    constant = torch.ones(4, 12, dtype=torch.float64)
    assert make().loss(constant, constant).item() == pytest.approx(25 * (1 - 0.01))


def test_spread_and_uncorrelated_features_cost_nothing():
    hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert make().loss(hadamard, hadamard).item() == pytest.approx(0, abs=1e-12)


def test_each_view_passes_by_itself():
    task, batch = make(), batch_of()
    output = task(batch)
    assert int(task.projector.layers[1].num_batches_tracked) == 2
    views = [task.embed(task.backbone.normalize(view)) for view in batch["views"].unbind(1)]
    expected = sum(weight * term for weight, term in zip((25, 25, 1), terms(*views), strict=True))
    assert output.loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_expander_is_the_published_one():
    """Two hidden layers; no bias at its end, where no term of the loss would see it."""
    task = make()
    kinds = [type(layer).__name__ for layer in task.projector.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert task.projector.layers[-1].bias is None
    assert (VICRegConfig().hidden, VICRegConfig().dim) == (8192, 8192)
    tall = create_task({"name": "vicreg", "hidden": 6, "dim": 40}, create_backbone("test_resnet", size=32))
    assert tall(batch_of()).features.shape == (4, 40)
