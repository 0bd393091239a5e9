"""What POA's heads learn from: a teacher and two students, intact and elastic, before one set of prototypes.

Zhang, Guo, Lao, Yu, Ru, Wang, Ye, He, Chen, Yang, "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv
2408.01031; code of the authors: github.com/alipay/POA. Where paper and code weigh terms differently, this is the code.

Shapes: B images, V = 2 + n crops of each, the large ones first, R hidden places of large crops, C channels of a
direction, K prototypes. Crops are crop by crop. Directions and prototypes are at least float32, directions of length
one.

`head_loss` sums its terms in the memory of a few rows. Where each row meets a large shared tensor, as directions meet
tens of thousands of prototypes, what it leaves behind for its gradient is far larger than row and gradient. So
gradients are computed together with the loss, chunk by chunk, and kept for the backward pass, which multiplies them by
the gradient of the loss (`summed_in_chunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightly.loss.koleo_loss import KoLeoLoss
from torch import Tensor
from torch.autograd.function import once_differentiable

from unlabeled.pretext.common.multi_crop import GLOBALS
from unlabeled.pretext.self_distillation.self_distillation import assignments, cross_view_loss

Terms = Callable[..., Tensor]
_SETTINGS = 5
"""Inputs of `_Summed` that come before its tensors."""


class TermWeights(NamedTuple):
    """Weights of the terms of a head's loss. Defaults: lambda = 0.8, as published."""

    cross_intact: float = 0.8
    """Of the intact student's predictions of the teacher's assignments of other crops."""
    cross_elastic: float = 0.2
    """The same of the elastic student."""
    same_elastic: float = 0.2
    """Of the elastic student's predictions of what the intact one predicts for the same crop."""
    patch_intact: float = 0.8
    """Of the intact student's predictions of the teacher's assignments of hidden places."""
    patch_elastic: float = 0.2
    """The same of the elastic student."""

    @classmethod
    def balanced(cls, intact: float) -> TermWeights:
        """`intact` (lambda) for the intact student's terms, what it lacks of one for the elastic student's."""
        return cls(intact, 1 - intact, 1 - intact, intact, 1 - intact)


class TeacherHead(NamedTuple):
    """The last layer of the teacher's head."""

    prototypes: Tensor
    """(K, C), in their lengths, as `prototypes_of` gives them."""
    temperature: Tensor | float
    """What logits are divided by."""


class Crops(NamedTuple):
    """Directions of whole crops in one head."""

    teacher: Tensor
    """(2, B, C), of the large crops."""
    students: Sequence[Tensor]
    """(V, B, C) of the intact student, and of the elastic one if there is one."""
    offsets: Tensor
    """(K,): of the teacher's assignments (see `sinkhorn_offsets`)."""


class PatchTerms(NamedTuple):
    """Directions of hidden places in one head, in any order."""

    teacher: Tensor
    """(R, C)."""
    students: Sequence[Tensor]
    """(R, C) of the intact student, and of the elastic one if there is one."""
    weights: Tensor
    """(R,): one over the number of hidden places of the crop; 0 for rows that hold no place."""
    offsets: Tensor
    """(K,): of the teacher's assignments."""


def head_loss(
    crops: Crops,
    positions: PatchTerms | None,
    teacher: TeacherHead,
    prototypes: Tensor,
    *,
    weights: TermWeights,
    temperature: float = 0.1,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a head's terms, and each term as it is, detached, by the names of `TermWeights`.

    `prototypes` (K, C): the students', as `prototypes_of` gives them; `temperature`: what their logits are divided by;
    `chunk`: rows of logits that each network has at a time, None: all. Gradients reach `prototypes` and the students'
    directions; those of the intact student get none from being the elastic student's target. `positions` None: without
    hidden places.
    """
    crops_in_all, count = crops.teacher.shape[:2].numel(), crops.teacher.shape[1]

    def crop_terms(units: Tensor, *others: Tensor) -> Tensor:
        *students, shared, offsets = others
        assigned = _assigned(units, teacher, offsets)  # (2, b, K): b images of the chunk
        predicted = _log_predicted(students, shared, temperature)  # (S, V, b, K)
        terms = [cross_view_loss(assigned, student) for student in predicted]
        if len(students) > 1:
            terms.append(same_view_loss(*predicted))
        return torch.stack(terms) * (units.shape[1] / count)  # means over the chunk's images, to be added up

    def patch_terms(units: Tensor, counted: Tensor, *others: Tensor) -> Tensor:
        *students, shared, offsets = others
        predicted = _log_predicted(students, shared, temperature)  # (S, r, K): r rows of the chunk
        entropies = -(_assigned(units, teacher, offsets) * predicted).sum(-1)  # (S, r)
        return (entropies * counted).sum(-1) / crops_in_all

    elastic = len(crops.students) > 1
    names = ["cross_intact", *["cross_elastic", "same_elastic"] * elastic]
    # a chunk of crops is one of images, with all crops of each: its terms compare them
    at_once = None if chunk is None else max(1, chunk // len(crops.students[0]))
    total, found = summed_in_chunks(
        crop_terms, [crops.teacher, *crops.students], [prototypes, crops.offsets], at_once, _of(weights, names), dim=1
    )
    if positions is not None:
        more = ["patch_intact", *["patch_elastic"] * elastic]
        rows = [positions.teacher, positions.weights, *positions.students]
        added, terms = summed_in_chunks(patch_terms, rows, [prototypes, positions.offsets], chunk, _of(weights, more))
        total, found, names = total + added, torch.cat([found, terms]), names + more
    return total, dict(zip(names, found.unbind(), strict=True))


def same_view_loss(intact: Tensor, elastic: Tensor) -> Tensor:
    """Log-probabilities (V, B, K) of both students → cross-entropy of the elastic one's with the intact one's, which
    get no gradient: the mean over large crops and the mean over small ones, added up."""
    entropies = -(intact.detach().exp() * elastic).sum(-1)  # (V, B)
    large, small = entropies[:GLOBALS], entropies[GLOBALS:]  # all small ones weigh as much as the large ones
    return large.mean() + small.mean() if len(small) else large.mean()


def koleo(features: Tensor) -> Tensor:
    """(V, B, D) → how near the images of a crop lie: minus the mean logarithm of the distance of the nearest other.

    Directions of the features, in at least float32; mean over images and crops, those of this rank. An image twice
    in a batch gives a large gradient, but a finite one. Source: Sablayrolles et al., ICLR 2019, arXiv 1806.03198.
    """
    loss = KoLeoLoss()
    with torch.autocast(features.device.type, enabled=False):
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return torch.stack([loss(crop) for crop in wide]).mean()


def prototypes_of(head: Any) -> Tensor:
    """(K, C): the weight of the last layer of a head made by `create_head`, in the graph of its direction and length,
    at least float32.

    Needed where logits are not made by the layer itself, which derives its weight when called.
    """
    layer = head.last_layer
    with torch.autocast(layer.weight_v.device.type, enabled=False):
        weight: Tensor = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def _assigned(units: Tensor, teacher: TeacherHead, offsets: Tensor) -> Tensor:
    """The teacher's directions (..., C) → assignments (..., K)."""
    return assignments(units @ teacher.prototypes.t(), teacher.temperature, offsets)


def _log_predicted(students: Sequence[Tensor], prototypes: Tensor, temperature: float) -> Tensor:
    """Directions (..., C) of S students → their log-probabilities (S, ..., K)."""
    return (torch.stack(list(students)) / temperature @ prototypes.t()).log_softmax(-1)


def _of(weights: TermWeights, names: Sequence[str]) -> list[float]:
    return [getattr(weights, name) for name in names]


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
            found = terms(*rows, *shared)  # (P,)
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
        gradients = {position: torch.zeros_like(tensors[position]) for position, need in enumerate(needed) if need}
        found = []
        for start in _starts(tensors[0], chunk, dim):
            values = [*_parts(tensors[:count], start, chunk, dim), *tensors[count:]]
            leaves = [value.detach().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
            with torch.enable_grad():
                sums = terms(*leaves)
                parts = torch.autograd.grad(
                    _weighted(sums, weights), [leaves[position] for position in gradients], allow_unused=True
                )
            for (position, gradient), part in zip(gradients.items(), parts, strict=True):
                if part is not None:
                    into = _parts([gradient], start, chunk, dim)[0] if position < count else gradient
                    into += part
            found.append(sums.detach())
        ctx.positions = tuple(gradients)
        ctx.save_for_backward(*gradients.values())
        summed = torch.stack(found).sum(0)
        ctx.mark_non_differentiable(summed)
        return _weighted(summed, weights), summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = dict(zip(ctx.positions, ctx.saved_tensors, strict=True))
        inputs = range(len(ctx.needs_input_grad) - _SETTINGS)
        return (None,) * _SETTINGS + tuple(gradients[i] * of_total if i in gradients else None for i in inputs)
