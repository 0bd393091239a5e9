"""The loss of POA's heads: a teacher and two students, intact and elastic, compared over one set of prototypes.

Zhang, Guo, Lao, Yu, Ru, Wang, Ye, He, Chen, Yang, "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv
2408.01031; code of the authors: github.com/alipay/POA. Where paper and code weight terms differently, this follows the
code.

Shapes: B images, V = 2 + n crops of each, the large ones first, R masked patches of large crops, C channels of a
direction, K prototypes. Tensors are in at least float32, and directions have length 1.

`head_loss` can compute its terms chunk by chunk to save memory. The logits of all crops and patches over tens of
thousands of prototypes, which autograd would store for the backward pass, are far larger than the directions and their
gradients. So `summed_in_chunks` computes gradients together with the loss and keeps only them; the backward pass
multiplies them by the gradient of the loss.
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
"""Number of inputs of `_Summed` before its tensors; their gradients are None."""


class TermWeights(NamedTuple):
    """Weights of the terms of a head's loss. Defaults: lambda = 0.8, as published."""

    cross_intact: float = 0.8
    """Intact student: predicts the teacher's assignments of other crops."""
    cross_elastic: float = 0.2
    """Elastic student: the same."""
    same_elastic: float = 0.2
    """Elastic student: predicts the intact student's prediction for the same crop."""
    patch_intact: float = 0.8
    """Intact student: predicts the teacher's assignments of masked patches."""
    patch_elastic: float = 0.2
    """Elastic student: the same."""

    @classmethod
    def balanced(cls, intact: float) -> TermWeights:
        """Weight `intact` (lambda) for the intact student's terms, and 1 minus that for the elastic student's."""
        return cls(intact, 1 - intact, 1 - intact, intact, 1 - intact)


class TeacherHead(NamedTuple):
    """The last layer of the teacher's head."""

    prototypes: Tensor
    """(K, C), not normalized, from `prototypes_of`."""
    temperature: Tensor | float
    """Divisor of the logits."""


class Crops(NamedTuple):
    """Directions of whole crops in one head."""

    teacher: Tensor
    """(2, B, C), of the large crops."""
    students: Sequence[Tensor]
    """(V, B, C) of the intact student, and of the elastic one if there is one."""
    offsets: Tensor
    """(K,): of the teacher's assignments (see `sinkhorn_offsets`)."""


class PatchTerms(NamedTuple):
    """Directions of masked patches in one head, in any order."""

    teacher: Tensor
    """(R, C)."""
    students: Sequence[Tensor]
    """(R, C) of the intact student, and of the elastic one if there is one."""
    weights: Tensor
    """(R,): 1 / number of masked patches in the crop; 0 for padding."""
    offsets: Tensor
    """(K,): of the teacher's assignments."""


def head_loss(
    crops: Crops,
    patches: PatchTerms | None,
    teacher: TeacherHead,
    prototypes: Tensor,
    *,
    weights: TermWeights,
    temperature: float = 0.1,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a head's terms, and each term without its weight, detached, by the names of `TermWeights`.

    `patches`: None if nothing is masked. `prototypes` (K, C): those of the students, from `prototypes_of`.
    `temperature`: divisor of the students' logits. `chunk`: rows of logits per student at a time; None: all at once.
    Gradients reach `prototypes` and the students' directions, but no gradient reaches the intact student through its
    role as the elastic student's target.
    """
    crops_in_all, count = crops.teacher.shape[:2].numel(), crops.teacher.shape[1]

    def crop_terms(units: Tensor, *others: Tensor) -> Tensor:
        *students, shared, offsets = others
        assigned = _assigned(units, teacher, offsets)  # (2, b, K): b images of the chunk
        predicted = _log_predicted(students, shared, temperature)  # (S, V, b, K)
        terms = [cross_view_loss(assigned, student) for student in predicted]
        if len(students) > 1:
            terms.append(same_view_loss(*predicted))
        # `terms` are means over the chunk's images: scale them so that their sum over chunks is the mean over all
        return torch.stack(terms) * (units.shape[1] / count)

    def patch_terms(units: Tensor, counted: Tensor, *others: Tensor) -> Tensor:
        *students, shared, offsets = others
        predicted = _log_predicted(students, shared, temperature)  # (S, r, K): r rows of the chunk
        entropies = -(_assigned(units, teacher, offsets) * predicted).sum(-1)  # (S, r)
        return (entropies * counted).sum(-1) / crops_in_all

    elastic = len(crops.students) > 1
    names = ["cross_intact", *["cross_elastic", "same_elastic"] * elastic]
    # a chunk of crops consists of images with all their crops, because the terms compare these
    at_once = None if chunk is None else max(1, chunk // len(crops.students[0]))
    total, found = summed_in_chunks(
        crop_terms, [crops.teacher, *crops.students], [prototypes, crops.offsets], at_once, _of(weights, names), dim=1
    )
    if patches is not None:
        more = ["patch_intact", *["patch_elastic"] * elastic]
        rows = [patches.teacher, patches.weights, *patches.students]
        added, terms = summed_in_chunks(patch_terms, rows, [prototypes, patches.offsets], chunk, _of(weights, more))
        total, found, names = total + added, torch.cat([found, terms]), names + more
    return total, dict(zip(names, found.unbind(), strict=True))


def same_view_loss(intact: Tensor, elastic: Tensor) -> Tensor:
    """Cross-entropy of the elastic student's log-probabilities (V, B, K) with the intact student's (V, B, K).

    The mean over large crops plus the mean over small crops. The intact student gets no gradient.
    """
    entropies = -(intact.detach().exp() * elastic).sum(-1)  # (V, B)
    large, small = entropies[:GLOBALS], entropies[GLOBALS:]
    return large.mean() + small.mean() if len(small) else large.mean()


def koleo(features: Tensor) -> Tensor:
    """KoLeo regularizer of features (V, B, D): minus the mean log distance to the nearest other image.

    Features are normalized; distances are between the same crop (index in V) of different images of this rank. Computed
    in at least float32. If an image is in the batch twice, its gradient is large but finite. Source: Sablayrolles et
    al., ICLR 2019, arXiv 1806.03198.
    """
    loss = KoLeoLoss()
    with torch.autocast(features.device.type, enabled=False):
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return torch.stack([loss(crop) for crop in wide]).mean()


def prototypes_of(head: Any) -> Tensor:
    """Prototypes (K, C) of a head from `create_head`, in at least float32, with gradients to the layer's parameters."""
    # weight norm: the layer computes its weight from direction and length when called, so do the same here
    layer = head.last_layer
    with torch.autocast(layer.weight_v.device.type, enabled=False):
        weight: Tensor = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def _assigned(units: Tensor, teacher: TeacherHead, offsets: Tensor) -> Tensor:
    """The teacher's directions (..., C) → its assignments (..., K)."""
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
    """Sums `terms(*chunk of rows, *shared)`, a vector (P,), over chunks.

    Returns the product of the sum with `weights` (P,), a scalar with gradients to `rows` and `shared`, and the sum
    itself (P,), detached.

    `rows` have the same length along `dim` and are cut into chunks of `chunk` along it; None: one call with ordinary
    autograd. `terms` must be a sum over rows and must get everything that needs a gradient as an argument. There are no
    second derivatives.
    """
    # no autocast: gradients that are computed inside of a forward pass would lose precision
    with torch.autocast(rows[0].device.type, enabled=False):
        if chunk is None:
            sums = terms(*rows, *shared)  # (P,)
            return _weighted(sums, weights), sums.detach()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *shared)):
            total, sums = _Summed.apply(terms, len(rows), chunk, weights, dim, *rows, *shared)
            return total, sums
        # nobody needs gradients
        starts = _starts(rows[0], chunk, dim)
        sums = torch.stack([terms(*_chunk(rows, start, chunk, dim), *shared) for start in starts]).sum(0)
        return _weighted(sums, weights), sums.detach()


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    total = values.new_zeros(())
    for value, weight in zip(values.unbind(), weights, strict=True):
        total = total + weight * value
    return total


def _starts(rows: Tensor, chunk: int, dim: int) -> range:
    """Where the chunks start. Without rows there is one empty chunk, so that the sum has a shape."""
    return range(0, max(rows.shape[dim], 1), chunk)


def _chunk(rows: Sequence[Tensor], start: int, chunk: int, dim: int) -> list[Tensor]:
    """The chunk of each tensor that begins at `start`, as views."""
    return [tensor.narrow(dim, start, min(chunk, tensor.shape[dim] - start)) for tensor in rows]


class _Summed(torch.autograd.Function):
    """`summed_in_chunks` with gradients: its tensors are `count` rows and then the shared ones."""

    @staticmethod
    def forward(
        ctx: Any, terms: Terms, count: int, chunk: int, weights: Sequence[float], dim: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed: tuple[bool, ...] = ctx.needs_input_grad[-len(tensors) :]
        gradients = {index: torch.zeros_like(tensors[index]) for index, need in enumerate(needed) if need}
        found = []
        for start in _starts(tensors[0], chunk, dim):
            # a graph of its own for each chunk, freed before the next one
            values = [*_chunk(tensors[:count], start, chunk, dim), *tensors[count:]]
            leaves = [value.detach().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
            with torch.enable_grad():
                sums = terms(*leaves)
                of_chunk = torch.autograd.grad(
                    _weighted(sums, weights), [leaves[index] for index in gradients], allow_unused=True
                )
            # gradients of rows go to their chunk, those of shared tensors are added up
            for (index, total), gradient in zip(gradients.items(), of_chunk, strict=True):
                if gradient is not None:
                    into = _chunk([total], start, chunk, dim)[0] if index < count else total
                    into += gradient
            found.append(sums.detach())
        ctx.indices = tuple(gradients)
        ctx.save_for_backward(*gradients.values())
        summed = torch.stack(found).sum(0)
        ctx.mark_non_differentiable(summed)
        return _weighted(summed, weights), summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # the loss is linear in `of_total`, so the gradients of the forward pass only have to be scaled
        gradients = dict(zip(ctx.indices, ctx.saved_tensors, strict=True))
        inputs = range(len(ctx.needs_input_grad) - _SETTINGS)
        return (None,) * _SETTINGS + tuple(gradients[i] * of_total if i in gradients else None for i in inputs)
