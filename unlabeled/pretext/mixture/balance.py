"""How much each of several losses counts: fixed weights, weights that move over the run, and weights that make their
gradients equally strong at what they share.

Balancing by gradient norms: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss
Balancing in Deep Multitask Networks", ICML 2018, arXiv 1711.02257; here in closed form and without its term for the
speed of training (alpha = 0). N losses throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from unlabeled.pretext.common.teacher import cosine_momentum
from unlabeled.ssl.core.distributed import sum_over_ranks, world_size
from unlabeled.ssl.task import TaskConfig

_WEAKEST = 1e-4
"""Smallest gradient norm, as a part of the largest, that is made up for: a loss that has gone flat stays flat."""
_LIFT = 2.0**12
"""Losses are multiplied by this while norms are measured, lest gradients of half precision vanish; exact otherwise."""


class Ramp(TaskConfig):
    """A weight that changes over the run."""

    start: float = Field(ge=0)
    """Weight at the start."""
    end: float = Field(ge=0)
    """Weight at the end."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the change. cosine: a half cosine, slow at both ends."""
    over: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Interval of the run in which the weight changes; before and after, it is constant. [fraction of the run]"""

    @model_validator(mode="after")
    def _goes_forward(self) -> Ramp:
        if self.over[0] >= self.over[1]:
            raise ValueError(f"over {list(self.over)} does not go forward; give [begin, end] such as [0, 0.5]")
        if self.start == self.end == 0:
            raise ValueError("start and end are both 0; give one of them above 0, or leave the task out")
        return self


Weight = Annotated[
    Annotated[float, Field(gt=0), Tag("float")] | Annotated[Ramp, Tag("Ramp")],
    Discriminator(lambda given: "Ramp" if isinstance(given, (Mapping, Ramp)) else "float"),
]
"""A number, or a `Ramp`."""


def weight_at(weight: float | Ramp, progress: float) -> float:
    """The weight when `progress` (in [0, 1]) of the run is done."""
    if not isinstance(weight, Ramp):
        return weight
    begin, end = weight.over
    passed = min(max((progress - begin) / (end - begin), 0.0), 1.0)
    if weight.schedule == "cosine":
        return cosine_momentum(weight.start, weight.end, passed)
    return weight.start + (weight.end - weight.start) * passed


def balanced(weights: Tensor, norms: Tensor) -> Tensor:
    """Weights (N,) whose products with the gradients' `norms` (N,) stand in the proportion of `weights` (N,).

    Their sum is that of `weights`. A norm below 1e-4 of the largest counts as that.
    """
    seen = norms.clamp(min=float(torch.finfo(norms.dtype).tiny)).clamp(min=_WEAKEST * norms.max())
    scaled = weights / seen
    return scaled * (weights.sum() / scaled.sum().clamp(min=float(torch.finfo(norms.dtype).tiny)))


def gradient_norms(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """(N,): L2 norm of the gradient of each loss with respect to `parameters` together, of the mean over all ranks.

    The graph stays, no ``.grad`` is touched, and hooks of DDP do not fire. All ranks must call it. At least float32.
    """
    norms = []
    with torch.autocast(losses[0].device.type, enabled=False):
        for loss in losses:
            gradients = torch.autograd.grad(loss * _LIFT, parameters, retain_graph=True, materialize_grads=True)
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32)) / (_LIFT * world_size())
            norms.append(torch.linalg.vector_norm(sum_over_ranks(flat)))
    return torch.stack(norms)


def split_rows(shares: Sequence[float], rows: int) -> list[list[int]]:
    """Numbers 0 .. rows - 1 dealt out in the proportion of `shares`, evenly along the way: no row twice, none left out.

    Each row goes to the one that lacks most of its share so far, so that halves of a batch are dealt out alike.
    """
    total = sum(shares)
    dealt: list[list[int]] = [[] for _ in shares]
    for row in range(rows):
        lacking = [share / total * (row + 1) - len(given) for share, given in zip(shares, dealt, strict=True)]
        largest = max(lacking)
        dealt[next(position for position, lack in enumerate(lacking) if lack >= largest - 1e-9)].append(row)
    return dealt
