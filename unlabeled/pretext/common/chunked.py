"""Losses that are sums over rows, in the memory of a few rows.

Where each row meets a large shared tensor, as features meet tens of thousands of prototypes, what it leaves behind for
its gradient is far larger than row and gradient. So gradients are computed together with the loss, chunk by chunk, and
kept for the backward pass, which multiplies them by the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Terms = Callable[..., Tensor]
_SETTINGS = 5
"""Inputs of `_Summed` that come before its tensors."""


def summed_in_chunks(
    terms: Terms,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    chunk: int | None,
    weights: Sequence[float],
    *,
    dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """The sum over chunks of `terms(*rows of a chunk, *shared)`, P numbers → its product with as many `weights`, a
    scalar with a gradient for rows and shared tensors, and the sum itself (P,), without one.

    `rows` are equally long along `dim`, a chunk is `chunk` of that; None: one call and ordinary autograd. `terms` must
    be a sum over rows, and get all that needs a gradient as arguments. It runs without autocast, in which gradients
    computed inside of a forward pass lose precision. There are no second derivatives.
    """
    with torch.autocast(rows[0].device.type, enabled=False):
        if chunk is None:
            found = terms(*rows, *shared)
            return _weighted(found, weights), found.detach()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *shared)):
            total, found = _Summed.apply(terms, len(rows), chunk, weights, dim, *rows, *shared)
            return total, found
        starts = _starts(rows[0], chunk, dim)
        found = torch.stack([terms(*_parts(rows, start, chunk, dim), *shared) for start in starts]).sum(0)
        return _weighted(found, weights), found.detach()


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    total = values.new_zeros(())
    for value, weight in zip(values.unbind(), weights, strict=True):
        total = total + weight * value
    return total


def _starts(rows: Tensor, chunk: int, dim: int) -> range:
    """One chunk also where there are no rows, as the sum over none has a shape."""
    return range(0, max(rows.shape[dim], 1), chunk)


def _parts(rows: Sequence[Tensor], start: int, chunk: int, dim: int) -> list[Tensor]:
    return [tensor.narrow(dim, start, min(chunk, tensor.shape[dim] - start)) for tensor in rows]


class _Summed(torch.autograd.Function):
    """Inputs are rows and then shared tensors; outputs as those of `summed_in_chunks`."""

    @staticmethod
    def forward(
        ctx: Any, terms: Terms, count: int, chunk: int, weights: Sequence[float], dim: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed: tuple[bool, ...] = ctx.needs_input_grad[-len(tensors) :]
        gradients = {place: torch.zeros_like(tensors[place]) for place, need in enumerate(needed) if need}
        found = []
        for start in _starts(tensors[0], chunk, dim):
            values = [*_parts(tensors[:count], start, chunk, dim), *tensors[count:]]
            leaves = [value.detach().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
            with torch.enable_grad():
                sums = terms(*leaves)
                parts = torch.autograd.grad(
                    _weighted(sums, weights), [leaves[place] for place in gradients], allow_unused=True
                )
            for (place, gradient), part in zip(gradients.items(), parts, strict=True):
                if part is not None:
                    into = _parts([gradient], start, chunk, dim)[0] if place < count else gradient
                    into += part
            found.append(sums.detach())
        ctx.places = tuple(gradients)
        ctx.save_for_backward(*gradients.values())
        summed = torch.stack(found).sum(0)
        ctx.mark_non_differentiable(summed)
        return _weighted(summed, weights), summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = dict(zip(ctx.places, ctx.saved_tensors, strict=True))
        inputs = range(len(ctx.needs_input_grad) - _SETTINGS)
        return (None,) * _SETTINGS + tuple(gradients[i] * of_total if i in gradients else None for i in inputs)
