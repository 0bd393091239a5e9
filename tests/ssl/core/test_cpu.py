"""CPU kernels chosen by the engine: the same numbers, where they apply, and where they do not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.core import cpu
from unlabeled.ssl.core.cpu import cpu_kernels, matrix_product

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not cpu._available(), reason="this build of torch has no oneDNN")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Counts the products that oneDNN computes."""
    counted = mock.Mock(side_effect=cpu._product)
    monkeypatch.setattr(cpu, "_product", counted)
    return counted


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_usual_product(
    shape: tuple[int, ...], bias: bool, products: mock.Mock
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4, bias=bias), torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 4)

    def run(context) -> list[Tensor]:
        with context:
            y = layer(x)
        return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]

    for found, expected in zip(run(cpu_kernels(CPU, True)), run(nullcontext()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert products.call_count == 3, "forward, gradient of the input, gradient of the weights"


def test_strided_inputs_and_parts_of_a_weight_are_right() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, 5).transpose(1, 2), torch.randn(12, 8)
    with cpu_kernels(CPU, True):
        found = F.linear(x, weight[4:])
    torch.testing.assert_close(found, x @ weight[4:].t(), rtol=1e-5, atol=1e-5)


def test_gradients_that_nobody_asked_for_are_not_computed(products: mock.Mock) -> None:
    layer = nn.Linear(8, 4)
    layer.weight.requires_grad_(False)
    with cpu_kernels(CPU, True):
        layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((4,), 2.0))
    assert products.call_count == 1


def test_other_types_and_autocast_compute_as_ever(products: mock.Mock) -> None:
    with cpu_kernels(CPU, True):
        assert nn.Linear(8, 4).double()(torch.randn(2, 8).double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.Linear(8, 4)(torch.randn(2, 8)).dtype == torch.bfloat16
        assert nn.Linear(8, 4)(torch.randn(0, 8)).shape == (0, 4)
        assert products.call_count == 0
        nn.Linear(8, 4)(torch.randn(2, 8))
    nn.Linear(8, 4)(torch.randn(2, 8))
    assert products.call_count == 1, "only inside"


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Counts the attentions that are computed as products."""
    counted = mock.Mock(side_effect=cpu._attention)
    monkeypatch.setattr(cpu, "_attention", counted)
    return counted


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_in_bfloat16_is_right_in_values_and_gradients(
    scale: float | None, bias: bool, attentions: mock.Mock
) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, count, 8, requires_grad=True) for count in (5, 7, 7)]
    mask = torch.randn(1, 3, 5, 7) if bias else None
    weights = torch.randn(2, 3, 5, 8)

    def run(context, autocast: bool) -> list[Tensor]:
        with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = F.scaled_dot_product_attention(*exact, mask, scale=scale)
        return [y.float(), *torch.autograd.grad((y.float() * weights).sum(), exact)]

    for found, expected in zip(run(cpu_kernels(CPU, True), True), run(nullcontext(), False), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.02
    assert attentions.call_count == 1


def test_attentions_of_other_kinds_compute_as_ever(attentions: mock.Mock) -> None:
    half = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    with cpu_kernels(CPU, True):
        F.scaled_dot_product_attention(half.float(), half.float(), half.float())
        F.scaled_dot_product_attention(half, half, half, is_causal=True)
        F.scaled_dot_product_attention(half, half, half, None, 0.5)
        F.scaled_dot_product_attention(half, half, half, torch.ones(4, 4, dtype=torch.bool))
        assert attentions.call_count == 0
        assert F.scaled_dot_product_attention(half, half, half).dtype == torch.bfloat16
    assert attentions.call_count == 1


@pytest.mark.parametrize(
    ("listing", "capability", "device", "used"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", "cpu", True),
        ("vendor_id : GenuineIntel", "AVX512", "cpu", False),
        ("vendor_id : AuthenticAMD", "AVX2", "cpu", False),
        ("vendor_id : AuthenticAMD", "AVX512", "cuda", False),
    ],
)
def test_it_is_used_where_mkl_is_slow(
    listing: str, capability: str, device: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: listing)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    context = cpu_kernels(torch.device(device))
    assert isinstance(context, cpu._Kernels) == used
    assert isinstance(cpu_kernels(torch.device(device), False), nullcontext)


@pytest.mark.parametrize("faster", [True, False])
def test_products_of_matrices_and_of_transposes(
    faster: bool, products: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_faster_on", lambda device: faster)
    product = matrix_product(CPU)
    x, y = torch.randn(5, 8), torch.randn(3, 8)
    torch.testing.assert_close(product(x, y), x @ y.T)
    torch.testing.assert_close(product(x.T.contiguous().T, y.T.contiguous().T), x @ y.T)
    assert products.call_count == (2 if faster else 0)
