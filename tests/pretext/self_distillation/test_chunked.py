"""Sums in chunks against plain autograd: values, gradients, and what is held in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretext.self_distillation.poa_losses import summed_in_chunks

ROWS, CHANNELS, COLUMNS = 11, 5, 7
WEIGHTS = (0.8, -0.3)
CHUNKS = [None, 1, 4, 11, 50]


def inputs(rows: int = ROWS) -> list[Tensor]:
    """Two kinds of rows, and two shared tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, CHANNELS), (rows, COLUMNS), (COLUMNS, CHANNELS), (COLUMNS,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def terms(rows: Tensor, targets: Tensor, columns: Tensor, bias: Tensor) -> Tensor:
    """Cross-entropies, and squares of logits: (2,)."""
    logits = rows @ columns.t() + bias
    return torch.stack([-(targets.softmax(1) * logits.log_softmax(1)).sum(), logits.square().sum()])


def plain(tensors: list[Tensor]) -> Tensor:
    values = terms(*tensors)
    return WEIGHTS[0] * values[0] + WEIGHTS[1] * values[1]


def in_chunks(tensors: list[Tensor], chunk: int | None) -> tuple[Tensor, Tensor]:
    return summed_in_chunks(terms, tensors[:2], tensors[2:], chunk, WEIGHTS)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("needed", [(1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0)])
def test_values_and_gradients_are_those_of_plain_autograd(chunk, needed):
    tensors = [tensor.requires_grad_(bool(need)) for tensor, need in zip(inputs(), needed, strict=True)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    total, found = in_chunks(tensors, chunk)
    assert torch.allclose(found, terms(*tensors), rtol=1e-12)
    assert not found.requires_grad
    assert torch.allclose(total, plain(tensors), rtol=1e-12)
    expected = torch.autograd.grad(3 * plain(tensors).square(), leaves)
    for one, other in zip(torch.autograd.grad(3 * total.square(), leaves), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 2])
def test_rows_may_lie_along_another_axis(chunk):
    rows, targets, *shared = inputs(12)
    whole = [rows.view(3, 4, -1).requires_grad_(), targets.view(3, 4, -1).requires_grad_()]

    def flat(rows: Tensor, targets: Tensor, *others: Tensor) -> Tensor:
        assert rows.shape[0] == 3
        return terms(rows.flatten(0, 1), targets.flatten(0, 1), *others)

    total, _ = summed_in_chunks(flat, whole, shared, chunk, WEIGHTS, dim=1)
    expected = plain([*(one.flatten(0, 1) for one in whole), *shared])
    assert torch.allclose(total, expected, rtol=1e-12)
    for one, other in zip(torch.autograd.grad(total, whole), torch.autograd.grad(expected, whole), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_without_grad_mode_there_are_values_only(chunk):
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    with torch.no_grad():
        total, found = in_chunks(tensors, chunk)
    assert not total.requires_grad
    assert torch.allclose(total, plain(tensors))
    assert torch.allclose(found, terms(*tensors))


@pytest.mark.parametrize("chunk", [None, 4])
def test_no_rows_give_zeros(chunk):
    tensors = [tensor.requires_grad_() for tensor in inputs(0)]
    total, found = in_chunks(tensors, chunk)
    assert torch.equal(found, torch.zeros(2, dtype=torch.float64))
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, tensors))


def test_a_tensor_that_the_terms_ignore_gets_a_gradient_of_zero():
    rows, unused, columns, bias = (tensor.requires_grad_() for tensor in inputs())
    total, _ = summed_in_chunks(
        lambda rows, unused, columns, bias: terms(rows, rows.new_zeros(len(rows), COLUMNS), columns, bias.detach()),
        [rows, unused], [columns, bias], 4, WEIGHTS,
    )  # fmt: skip
    total.backward()
    assert rows.grad.any()
    assert columns.grad.any()
    assert not unused.grad.any()
    assert not bias.grad.any()


def test_gradients_reach_what_rows_and_shared_tensors_are_made_of():
    """A weight norm behind the shared tensor and a layer behind the rows; two losses add up, as over several heads."""
    torch.manual_seed(0)
    _, targets, _, bias = inputs()
    stem = nn.Linear(3, CHANNELS).double()
    last = nn.utils.parametrizations.weight_norm(nn.Linear(CHANNELS, COLUMNS, bias=False)).double()
    images = torch.randn(ROWS, 3, dtype=torch.float64)
    found: dict[object, list[Tensor]] = {}
    for chunk in (None, 4):
        rows, weight = stem(images), last.weight
        losses = [
            summed_in_chunks(terms, [rows, more], [weight, bias], chunk, WEIGHTS)[0]
            for more in (targets, rows @ weight.t())
        ]
        found[chunk] = list(torch.autograd.grad(sum(losses), [*stem.parameters(), *last.parameters()]))
    for one, other in zip(found[None], found[4], strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_backward_may_run_twice_where_the_graph_is_kept():
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    total, _ = in_chunks(tensors, 4)
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    second = torch.autograd.grad(2 * total, tensors)
    assert all(torch.equal(2 * one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [None, 4])
def test_autocast_changes_neither_values_nor_gradients(chunk):
    tensors = [tensor.float().requires_grad_() for tensor in inputs()]
    expected = torch.autograd.grad(plain(tensors), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = in_chunks(tensors, chunk)
    for one, other in zip(torch.autograd.grad(total, tensors), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


class _Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


def test_no_tensor_has_more_rows_of_logits_than_a_chunk():
    rows, columns = 64, 40
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 2), (rows, 1), (columns, 2), (columns,))
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for chunk, most in ((None, rows * columns), (8, 8 * columns)):
        with _Largest() as largest:
            in_chunks(tensors, chunk)[0].backward()
        assert largest.numbers == most, chunk
