"""LARS as PixPro trains with it, under the name ``larspixpro`` among timm's optimizers.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888, in the form of
github.com/zdaxie/PixPro. timm's ``lars`` and lightly's put |g| + decay * |w| where this one has |g + decay * w|, and
their defaults adapt other tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd


class LARS(Optimizer):
    """SGD with momentum whose gradients of matrices and convolutions have a length of `trust` times their weights'.

    For each tensor of two or more dimensions: g ← g + decay * w, then g ← g * trust * |w| / (|g| + eps), unless one of
    the two norms is zero. Tensors of one dimension (biases, norms) keep their gradient and do not decay. Then SGD:
    v ← momentum * v + g, w ← w - lr * v.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        eps: float = 1e-8,
    ) -> None:
        """Raises ValueError for a negative setting."""
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, which is negative")
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure`, if one is given, computes loss and gradients anew, and the loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moving:
                continue
            velocities = [self.state[parameter].get("momentum_buffer") for parameter in moving]
            sgd(
                moving, adapted_gradients(moving, group["weight_decay"], group["trust"], group["eps"]), velocities,
                weight_decay=0.0, momentum=group["momentum"], lr=group["lr"], dampening=0.0, nesterov=False,
                maximize=False,
            )  # fmt: skip
            for parameter, velocity in zip(moving, velocities, strict=True):
                self.state[parameter]["momentum_buffer"] = velocity
        return loss


def adapted_gradients(parameters: list[Tensor], weight_decay: float, trust: float, eps: float) -> list[Tensor]:
    """Gradients of `parameters` in their order, as `LARS` hands them to SGD; those in ``.grad`` stay as they are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    positions = [position for position, parameter in enumerate(parameters) if parameter.ndim > 1]
    if not positions:
        return gradients
    weights = [parameters[position] for position in positions]
    decayed = torch._foreach_add([gradients[position] for position in positions], weights, alpha=weight_decay)
    lengths, slopes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, list(decayed)))
    scales = torch.where((lengths > 0) & (slopes > 0), trust * lengths / (slopes + eps), 1.0)
    torch._foreach_mul_(decayed, list(scales.unbind()))
    for position, gradient in zip(positions, decayed, strict=True):
        gradients[position] = gradient
    return gradients


default_registry.register(
    OptimInfo("larspixpro", LARS, "LARS as PixPro trains with it", has_eps=True, has_momentum=True)
)
