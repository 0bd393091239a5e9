"""What POA's heads learn from: a teacher and two students, intact and elastic, before one set of prototypes.

Zhang, Guo, Lao, Yu, Ru, Wang, Ye, He, Chen, Yang, "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv
2408.01031; code of the authors: github.com/alipay/POA. Where paper and code weigh terms differently, this is the code.

Shapes: B pictures, V = 2 + n crops of each, the large ones first, R hidden places of large crops, C channels of a
direction, K prototypes. Crops are crop by crop (see `multi_crop`). Directions are at least float32 and of length one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightly.loss.koleo_loss import KoLeoLoss
from torch import Tensor

from unlabeled.pretext.common.chunked import summed_in_chunks
from unlabeled.pretext.common.multi_crop import GLOBALS
from unlabeled.pretext.common.patches import widened
from unlabeled.pretext.self_distillation.self_distillation import cross_view_loss
from unlabeled.pretext.self_distillation.sinkhorn import assignments


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
    """(K, C), in their lengths."""
    temperature: Tensor | float
    """What logits are divided by."""


class Crops(NamedTuple):
    """Directions of whole crops in one head."""

    teacher: Tensor
    """(2, B, C), of the large crops."""
    students: Sequence[Tensor]
    """(V, B, C) of the intact student, and of the elastic one if there is one."""
    offsets: Tensor
    """(K,): of the teacher's assignments (see `sinkhorn`)."""


class Places(NamedTuple):
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
    places: Places | None,
    teacher: TeacherHead,
    prototypes: Tensor,
    *,
    weights: TermWeights,
    temperature: float = 0.1,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a head's terms, and each term as it is, detached, by the names of `TermWeights`.

    `prototypes` (K, C): the students'; `temperature`: what their logits are divided by; `chunk`: rows of logits that
    each network has at a time, None: all. Gradients reach `prototypes` and the students' directions; those of the
    intact student get none from being the elastic student's target. `places` None: without hidden places.
    """
    images, pictures = crops.teacher.shape[:2].numel(), crops.teacher.shape[1]

    def crop_terms(units: Tensor, *others: Tensor) -> Tensor:
        *students, shared, offsets = others
        assigned, predicted = _assigned(units, teacher, offsets), _log_predicted(students, shared, temperature)
        terms = [cross_view_loss(assigned, student) for student in predicted]
        if len(students) > 1:
            terms.append(same_view_loss(*predicted))
        return torch.stack(terms) * (units.shape[1] / pictures)

    def place_terms(units: Tensor, counted: Tensor, *others: Tensor) -> Tensor:
        *students, shared, offsets = others
        predicted = _log_predicted(students, shared, temperature)
        entropies = -(_assigned(units, teacher, offsets) * predicted).sum(-1)
        return (entropies * counted).sum(-1) / images

    elastic, shared = len(crops.students) > 1, widened(prototypes)
    names = ["cross_intact", *["cross_elastic", "same_elastic"] * elastic]
    at_once = None if chunk is None else max(1, chunk // len(crops.students[0]))
    total, found = summed_in_chunks(
        crop_terms, [crops.teacher, *crops.students], [shared, crops.offsets], at_once, _of(weights, names), dim=1
    )
    if places is not None:
        more = ["patch_intact", *["patch_elastic"] * elastic]
        rows = [places.teacher, places.weights, *places.students]
        added, terms = summed_in_chunks(place_terms, rows, [shared, places.offsets], chunk, _of(weights, more))
        total, found, names = total + added, torch.cat([found, terms]), names + more
    return total, dict(zip(names, found.unbind(), strict=True))


def same_view_loss(intact: Tensor, elastic: Tensor) -> Tensor:
    """Log-probabilities (V, B, K) of both students → cross-entropy of the elastic one's with the intact one's, which
    get no gradient: the mean over large crops and the mean over small ones, added up."""
    entropies = -(intact.detach().exp() * elastic).sum(-1)  # (V, B)
    large, small = entropies[:GLOBALS], entropies[GLOBALS:]
    return large.mean() + small.mean() if len(small) else large.mean()


def koleo(features: Tensor) -> Tensor:
    """(V, B, D) → how near the pictures of a crop lie: minus the mean logarithm of the distance of the nearest other.

    Directions of the features, in at least float32; mean over pictures and crops, those of this rank. A picture twice
    in a batch gives a large gradient, but a finite one. Source: Sablayrolles et al., ICLR 2019, arXiv 1806.03198.
    """
    loss = KoLeoLoss()
    with torch.autocast(features.device.type, enabled=False):
        return torch.stack([loss(crop) for crop in widened(features)]).mean()


def prototypes_of(head: Any) -> Tensor:
    """(K, C): the weight of the last layer of a head made by `create_head`, in the graph of its direction and length.

    Needed where logits are not made by the layer itself, which derives its weight when called.
    """
    layer = head.last_layer
    with torch.autocast(layer.weight_v.device.type, enabled=False):
        weight: Tensor = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
    return weight


@torch.no_grad()
def _assigned(units: Tensor, teacher: TeacherHead, offsets: Tensor) -> Tensor:
    """The teacher's directions (..., C) → assignments (..., K)."""
    return assignments(units @ widened(teacher.prototypes).t(), teacher.temperature, offsets)


def _log_predicted(students: Sequence[Tensor], prototypes: Tensor, temperature: float) -> Tensor:
    """Directions (..., C) of S students → their log-probabilities (S, ..., K)."""
    return (torch.stack(list(students)) / temperature @ prototypes.t()).log_softmax(-1)


def _of(weights: TermWeights, names: Sequence[str]) -> list[float]:
    return [getattr(weights, name) for name in names]
