"""Heads trained side by side against torch's own layers and optimizers, one for each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unlabeled.eval.probe import heads
from unlabeled.eval.probe.heads import GroupedSgd, Setting, hold_out

CPU = torch.device("cpu")
GRID = [Setting(0.1, 0.0), Setting(0.5, 0.01), Setting(0.02, 0.3)]


def batch(count: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator)
    return features, torch.randint(0, classes, (count,), generator=generator)


def separately(
    features: Tensor, labels: Tensor, classes: int, setting: Setting, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights and biases after twelve steps of torch's SGD on one linear layer, float64."""
    layer = torch.nn.Linear(features.shape[1], classes, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(start)
        layer.bias.zero_()
    groups = [
        {"params": [layer.weight], "weight_decay": setting.weight_decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * 0.5 * (1 - step / 12)
        rows = torch.arange(step, step + 16)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(features[rows].double()), labels[rows]).backward()
        optimizer.step()
    return layer.weight.detach().float(), layer.bias.detach().float()


@pytest.mark.parametrize("cache", [1, 2**20])
def test_each_head_is_a_linear_layer_with_its_own_optimizer(monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    """Also where the weights are more than the caches hold (here: one head at a time)."""
    monkeypatch.setattr(heads, "_CACHE", cache)
    features, labels = batch(40, 6, 5)
    start = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 0.1
    grouped = GroupedSgd(6, 5, GRID, device=CPU, lr_scale=0.5, start=start)
    assert len(grouped._chunks) == (3 if cache == 1 else 1)
    for step in range(12):
        grouped.step(features[step : step + 16], labels[step : step + 16], lr_factor=1 - step / 12)
    for weight, bias, setting in zip(*grouped.heads(), GRID, strict=True):
        expected = separately(features, labels, 5, setting, start)
        torch.testing.assert_close(weight, expected[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(bias, expected[1], atol=2e-6, rtol=1e-5)


def test_columns_of_a_wider_matrix_are_read_like_a_matrix_of_their_own() -> None:
    """A slice is not contiguous, which the products behind must not notice."""
    features, labels = batch(16, 10, 3)
    sliced, own = (GroupedSgd(4, 3, GRID, device=CPU) for _ in range(2))
    for _ in range(3):
        sliced.step(features[:, 3:7], labels, lr_factor=1.0)
        own.step(features[:, 3:7].clone(), labels, lr_factor=1.0)
    assert torch.equal(sliced.heads()[0], own.heads()[0])
    assert torch.equal(sliced.scores(features[:, 3:7]), own.scores(features[:, 3:7].clone()))


def test_a_diverging_head_leaves_the_others_bit_equal() -> None:
    features, labels = batch(32, 6, 3)
    calm, wild = Setting(0.1, 0.01), Setting(1e38, 0.01)
    alone = GroupedSgd(6, 3, [calm, calm], device=CPU)
    mixed = GroupedSgd(6, 3, [wild, calm], device=CPU)
    for _ in range(8):
        alone.step(features, labels, lr_factor=1.0)
        mixed.step(features, labels, lr_factor=1.0)
    assert mixed.finite().tolist() == [False, True]
    for found, expected in zip(mixed.heads(), alone.heads(), strict=True):
        assert torch.equal(found[1], expected[1])


def test_scores_and_the_hold_out_are_those_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = batch(50, 6, 4)
    group = GroupedSgd(6, 4, GRID, device=CPU)
    for _ in range(5):
        group.step(features, labels, lr_factor=1.0)
    monkeypatch.setattr(heads, "_LOGITS", 3 * 4 * 7)  # seven rows at a time
    accuracy, loss = hold_out(group, features, labels)
    for head, (weight, bias) in enumerate(zip(*group.heads(), strict=True)):
        logits = features @ weight.T + bias
        torch.testing.assert_close(group.scores(features)[head], logits.T)
        assert float(accuracy[head]) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert float(loss[head]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_heads_that_start_from_zero_guess_evenly() -> None:
    features, labels = batch(9, 6, 4)
    group = GroupedSgd(6, 4, GRID, device=CPU)
    assert hold_out(group, features, labels)[1].tolist() == pytest.approx([math.log(4)] * 3)
