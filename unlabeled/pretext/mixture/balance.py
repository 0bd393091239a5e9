"""Weights of several losses: fixed, changing over the run, or balanced by the norms of their gradients.

Balancing by gradient norms: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss
Balancing in Deep Multitask Networks", ICML 2018, arXiv 1711.02257; here in closed form and without its term for the
speed of training (alpha = 0). Shapes: N losses.
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
"""Smallest gradient norm to compensate for, as a fraction of the largest: a loss with no gradient is not blown up."""
_LIFT = 2.0**12
"""Factor for losses while norms are measured, so that gradients in half precision do not underflow. As a power of two,
it changes nothing else."""


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
    """The weight at `progress` in [0, 1] of the run."""
    if not isinstance(weight, Ramp):
        return weight
    begin, end = weight.over
    done = min(max((progress - begin) / (end - begin), 0.0), 1.0)  # fraction of the interval
    if weight.schedule == "cosine":
        return cosine_momentum(weight.start, weight.end, done)
    return weight.start + (weight.end - weight.start) * done


def balanced(weights: Tensor, norms: Tensor) -> Tensor:
    """Rescales `weights` (N,) so that weight times gradient norm (`norms`, (N,)) is proportional to `weights`.

    The sum of the weights stays the same. A norm below 1e-4 of the largest counts as 1e-4 of it.
    """
    # the clamps to the smallest normal number only matter if all norms are 0
    bounded = norms.clamp(min=float(torch.finfo(norms.dtype).tiny)).clamp(min=_WEAKEST * norms.max())
    scaled = weights / bounded
    return scaled * (weights.sum() / scaled.sum().clamp(min=float(torch.finfo(norms.dtype).tiny)))


def gradient_norms(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm of the gradient of each loss with respect to all `parameters` together, (N,), in at least float32.

    Gradients are averaged over ranks first, so all ranks must call this.
    """
    norms = []
    with torch.autocast(losses[0].device.type, enabled=False):
        for loss in losses:
            # not `backward`: it would write ``.grad`` and fire DDP's hooks; the graph is kept for the training step
            gradients = torch.autograd.grad(loss * _LIFT, parameters, retain_graph=True, materialize_grads=True)
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32)) / (_LIFT * world_size())
            norms.append(torch.linalg.vector_norm(sum_over_ranks(flat)))
    return torch.stack(norms)


def split_images(portions: Sequence[float], images: int) -> list[list[int]]:
    """Distributes the indices 0 .. images - 1 in proportion to `portions`; each index goes to exactly one list.

    Indices are spread evenly, so that both halves of a batch are distributed alike.
    """
    total = sum(portions)
    split: list[list[int]] = [[] for _ in portions]
    for index in range(images):
        # the next image goes to the task that is furthest behind its portion
        deficits = [portion / total * (index + 1) - len(own) for portion, own in zip(portions, split, strict=True)]
        largest = max(deficits)
        # with a tolerance, as rounding must not decide between tasks that are equally far behind
        split[next(task for task, deficit in enumerate(deficits) if deficit >= largest - 1e-9)].append(index)
    return split
