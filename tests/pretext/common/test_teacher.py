"""Copies that follow slowly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unlabeled.pretext.common.teacher import cosine_momentum, frozen_copy


def test_a_frozen_copy_is_exact_and_its_own() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    student(torch.randn(5, 3))
    teacher = frozen_copy(student)
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True)
    )
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert teacher[0].weight.data_ptr() != student[0].weight.data_ptr()


@pytest.mark.parametrize(("progress", "momentum"), [(0.0, 0.99), (0.5, 0.995), (1.0, 1.0)])
def test_the_momentum_follows_half_a_cosine(progress: float, momentum: float) -> None:
    assert cosine_momentum(0.99, 1.0, progress) == pytest.approx(momentum, abs=1e-15)
