from __future__ import annotations

import pytest
import torch
from torch import nn

from unlabeled.ssl.nn.ema import ema_update


def _network(dtype: torch.dtype) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).to(dtype)
    for tensor in (*network.parameters(), network[1].running_mean):
        nn.init.normal_(tensor)
    return network


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
def test_formula_in_double_precision(momentum):
    teacher, student = _network(torch.float64), _network(torch.float64)
    student[1].num_batches_tracked.fill_(7)
    expected = [
        momentum * t.detach() + (1 - momentum) * s.detach()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    positions = [parameter.data_ptr() for parameter in teacher.parameters()]
    statistics = teacher[1].running_mean.clone()
    before = [parameter.clone() for parameter in student.parameters()]
    ema_update(teacher, student, momentum)
    for found, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-14, atol=1e-15)
    assert [parameter.data_ptr() for parameter in teacher.parameters()] == positions
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert torch.equal(teacher[1].running_mean, statistics)
    assert teacher[1].num_batches_tracked == 0


def test_shapes_and_types_stay():
    teacher, student = _network(torch.float32), _network(torch.float32)
    described = [(name, tensor.shape, tensor.dtype) for name, tensor in teacher.state_dict().items()]
    ema_update(teacher, student, 0.9)
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in teacher.state_dict().items()] == described
    assert all(parameter.grad_fn is None for parameter in teacher.parameters())


def test_networks_of_different_structure_are_refused():
    with pytest.raises(RuntimeError, match=r"same number|size|length"):
        ema_update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
