"""BYOL against section 3 of its paper, trap by trap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unlabeled.pretext.two_views.byol import BYOL, BYOLConfig
from unlabeled.ssl.backbones.backbone import create_backbone


def make(**settings) -> BYOL:
    torch.manual_seed(0)
    return BYOL(BYOLConfig(hidden=24, dim=12, **settings), create_backbone("test_resnet", size=32)).double()


def batch_of(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"views": torch.randint(0, 256, (count, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)}


def disturb(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_the_loss_is_the_squared_distance_of_unit_vectors_in_both_directions():
    task, batch = make(), batch_of()
    disturb(task.teacher)
    first, second = (task.backbone.normalize(view) for view in batch["views"].unbind(1))
    total = torch.zeros(())
    for view, other in ((first, second), (second, first)):
        for prediction, target in zip(task.predictor(task.embed(view)), task.teacher(other), strict=True):
            total = total + (prediction / prediction.norm() - target / target.norm()).square().sum() / 4
    loss = task(batch).loss.item()
    assert loss == pytest.approx(total.item(), rel=1e-9)
    assert 0 < loss < 8


@pytest.mark.parametrize("network", ["predictor", "teacher.projector"])
def test_the_length_of_outputs_is_of_no_matter(network):
    task, batch = make(), batch_of()
    disturb(task.teacher)
    before = task(batch).loss.item()
    last = task.get_submodule(network).layers[-1]
    with torch.no_grad():
        last.weight.mul_(7)
        last.bias.mul_(7)
    assert task(batch).loss.item() == pytest.approx(before, rel=1e-9)


def test_the_teacher_starts_as_an_exact_copy_projector_included():
    task = make()
    student, teacher = task.followed().state_dict(), task.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert any(name.startswith("projector.") for name in teacher)
    assert all(torch.equal(teacher[name], student[name]) for name in teacher)
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert not any(group.name.startswith("teacher.") for group in task.parameter_groups())


def test_the_teacher_gets_no_gradient_and_the_whole_student_does():
    task = make()
    task(batch_of()).loss.backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)
    assert all(parameter.requires_grad for parameter in task.predictor.parameters())


def test_batch_norms_of_the_teacher_use_the_batch_and_keep_statistics_of_their_own():
    task = make(momentum=0.0).train()
    disturb(task.teacher)
    batch = batch_of()
    norm, students = task.teacher.projector.layers[1], task.projector.layers[1]
    first = task(batch).loss.item()
    assert int(norm.num_batches_tracked) == int(students.num_batches_tracked) == 2  # each view by itself
    assert not torch.equal(norm.running_mean, students.running_mean)
    own = norm.running_mean.clone()
    task.after_step(0.0)
    assert torch.equal(norm.weight, students.weight)
    assert torch.equal(norm.running_mean, own)
    norm.running_mean.fill_(100.0)  # which a norm in eval mode would take off its input
    assert task(batch).loss.item() != first
    moved = task(batch).loss.item()
    norm.running_mean.fill_(-100.0)
    assert task(batch).loss.item() == pytest.approx(moved, rel=1e-12)


def test_the_teacher_follows_once_a_step_with_a_momentum_that_rises_to_one():
    task = make(momentum=0.9)
    disturb(task.followed())
    before = {name: value.clone() for name, value in task.teacher.named_parameters()}
    task(batch_of())
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.named_parameters())
    task.after_step(0.5)  # momentum 1 - 0.1 (1 + cos(pi / 2)) / 2 = 0.95
    student = dict(task.followed().named_parameters())
    for name, value in task.teacher.named_parameters():
        assert torch.allclose(value, 0.95 * before[name] + 0.05 * student[name], rtol=0, atol=1e-14)
    half = {name: value.clone() for name, value in task.teacher.named_parameters()}
    task.after_step(1.0)
    assert all(torch.allclose(value, half[name], atol=1e-15) for name, value in task.teacher.named_parameters())


def test_defaults_and_heads_are_the_published_ones():
    config = BYOLConfig()
    assert (config.momentum, config.hidden, config.dim) == (0.996, 4096, 256)
    for head in (make().projector, make().predictor):
        assert [type(layer).__name__ for layer in head.layers] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
