"""PixPro's LARS, tensor by tensor against its rule."""

from __future__ import annotations

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.config.schema import OptimConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.nn.lars import LARS
from unlabeled.ssl.train.optimizer import create_optimizer


def parameter(*values: float, matrix: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.tensor([values]) if matrix else torch.tensor(values))


def test_the_norm_is_taken_after_decay_is_added() -> None:
    weight = parameter(3.0, 4.0)
    weight.grad = torch.tensor([[1.0, -1.0]])
    LARS([weight], lr=2.0, weight_decay=0.5).step()
    # g + 0.5 w = (2.5, 1), of length sqrt(7.25); |w| = 5
    scale = 1e-3 * 5 / 7.25**0.5
    expected = torch.tensor([[3 - 2 * 2.5 * scale, 4 - 2 * 1.0 * scale]])
    assert torch.allclose(weight.detach(), expected, rtol=0, atol=1e-6)
    wrong = 1e-3 * 5 / (2**0.5 + 0.5 * 5)  # timm's and lightly's denominator
    assert abs(wrong - scale) > 5e-4


def test_one_dimension_neither_decays_nor_is_scaled() -> None:
    bias = parameter(3.0, 4.0, matrix=False)
    bias.grad = torch.tensor([1.0, -1.0])
    LARS([bias], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(bias.detach(), torch.tensor([2.9, 4.1]))


def test_momentum_gathers_scaled_gradients() -> None:
    weight = parameter(3.0, 4.0)
    optimizer = LARS([weight], lr=1.0, momentum=0.9)
    steps, velocity = [], torch.zeros(1, 2)
    for gradient in ([[0.6, 0.8]], [[2.0, 0.0]]):
        before = weight.detach().clone()
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        direction = torch.tensor(gradient) / torch.tensor(gradient).norm()
        velocity = 0.9 * velocity + 1e-3 * before.norm() * direction
        steps.append((before - weight.detach(), velocity))
    for found, expected in steps:
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("values", "gradient"), [((0.0, 0.0), (1.0, 2.0)), ((3.0, 4.0), (0.0, 0.0))])
def test_a_norm_of_zero_leaves_the_gradient(values: tuple[float, ...], gradient: tuple[float, ...]) -> None:
    weight = parameter(*values)
    weight.grad = torch.tensor([gradient])
    LARS([weight], lr=1.0).step()
    assert torch.equal(weight.detach(), torch.tensor([values]) - torch.tensor([gradient]))


def test_gradients_stay_as_they_are_and_absent_ones_are_passed_over() -> None:
    first, second = parameter(3.0, 4.0), parameter(1.0, 2.0)
    first.grad = torch.tensor([[1.0, -1.0]])
    LARS([first, second], weight_decay=0.5).step()
    assert torch.equal(first.grad, torch.tensor([[1.0, -1.0]]))
    assert torch.equal(second.detach(), torch.tensor([[1.0, 2.0]]))


def test_a_resumed_optimizer_goes_on() -> None:
    def run(stop: bool) -> torch.Tensor:
        weight, bias = parameter(3.0, 4.0), parameter(1.0, matrix=False)
        optimizer = LARS([weight, bias], lr=0.5, weight_decay=0.1)
        for step in range(4):
            weight.grad, bias.grad = torch.tensor([[1.0, step]]), torch.tensor([0.5])
            optimizer.step()
            if stop and step == 1:
                stored = optimizer.state_dict()
                optimizer = LARS([weight, bias], lr=9.0)
                optimizer.load_state_dict(stored)
        return torch.cat([weight.detach().flatten(), bias.detach()])

    assert torch.equal(run(stop=True), run(stop=False))


def test_a_closure_gives_the_loss() -> None:
    weight = parameter(1.0, 1.0)
    optimizer = LARS([weight], lr=1.0)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert weight.detach().norm() < 2**0.5


def test_it_is_an_optimizer_of_the_settings() -> None:
    assert "larspixpro" in list_optimizers()
    task = create_task({"name": "rotation"}, create_backbone("test_resnet", size=32))
    optimizer = create_optimizer(
        task,
        OptimConfig(name="larspixpro", lr=1.0, weight_decay=1e-5, momentum=0.8, kwargs={"trust": 0.01, "eps": 1e-6}),
    )
    assert isinstance(optimizer, LARS)
    assert {(group["momentum"], group["trust"], group["eps"]) for group in optimizer.param_groups} == {
        (0.8, 0.01, 1e-6)
    }
    with pytest.raises(ConfigError, match=r"optim: larspixpro does not take these settings \(trust is -1"):
        create_optimizer(task, OptimConfig(name="larspixpro", kwargs={"trust": -1}))
