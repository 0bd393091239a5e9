"""LARS as in PixPro's code, registered with timm's optimizers as ``larspixpro``.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888, in the variant of
github.com/zdaxie/PixPro. It divides by |g + decay * w|, where timm's ``lars`` and lightly's divide by
|g| + decay * |w|; their defaults also adapt other tensors.
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
    """SGD with momentum that scales the gradient of each matrix and convolution to `trust` times the weight's norm.

    For each tensor of two or more dimensions: g ← g + decay * w, then g ← g * trust * |w| / (|g| + eps), unless one of
    the two norms is zero. One-dimensional tensors (biases, norms) keep their gradient and do not decay. Then SGD:
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
        """Performs one step. `closure`, if given, is called to recompute loss and gradients; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            updated: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not updated:
                continue
            velocities = [self.state[parameter].get("momentum_buffer") for parameter in updated]
            # weight_decay=0: the decay is in the adapted gradients already
            sgd(
                updated, adapted_gradients(updated, group["weight_decay"], group["trust"], group["eps"]), velocities,
                weight_decay=0.0, momentum=group["momentum"], lr=group["lr"], dampening=0.0, nesterov=False,
                maximize=False,
            )  # fmt: skip
            # sgd replaces the None of a first step in the list, not in the state
            for parameter, velocity in zip(updated, velocities, strict=True):
                self.state[parameter]["momentum_buffer"] = velocity
        return loss


def adapted_gradients(parameters: list[Tensor], weight_decay: float, trust: float, eps: float) -> list[Tensor]:
    """The gradients of `parameters`, in order, as `LARS` passes them to SGD; ``.grad`` is not modified."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    positions = [position for position, parameter in enumerate(parameters) if parameter.ndim > 1]
    if not positions:
        return gradients
    weights = [parameters[position] for position in positions]
    decayed = torch._foreach_add([gradients[position] for position in positions], weights, alpha=weight_decay)
    weight_norms, gradient_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, list(decayed)))
    # 1 where a norm is zero, so that tensors initialized to zero can leave it
    scales = torch.where((weight_norms > 0) & (gradient_norms > 0), trust * weight_norms / (gradient_norms + eps), 1.0)
    torch._foreach_mul_(decayed, list(scales.unbind()))
    for position, gradient in zip(positions, decayed, strict=True):
        gradients[position] = gradient
    return gradients


# at import, so that optim.name=larspixpro works like any of timm's names
default_registry.register(
    OptimInfo("larspixpro", LARS, "LARS as PixPro trains with it", has_eps=True, has_momentum=True)
)
