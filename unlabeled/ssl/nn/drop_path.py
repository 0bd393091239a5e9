"""Stochastic depth (arXiv 1603.09382): residual branches that are left out at random, for an image at a time."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from unlabeled.ssl.core.errors import CapabilityError, ConfigError

_NAMES = ("drop_path", "drop_path1", "drop_path2")
"""What the blocks of timm's networks call their stochastic depth."""

_NONE_OR_SOME = (nn.Identity, type(None), DropPath)
"""What stands there: transformers and ConvNeXt have an Identity for a rate of 0, ResNets have None."""


def uniform_drop_path(model: nn.Module, rate: float) -> None:
    """Gives all residual branches of a timm `model` the same `rate` in [0, 1), where timm lets it grow with depth.

    Raises ConfigError for another rate, CapabilityError for a network without stochastic depth.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"drop path: a rate of {rate} is not possible; give one from 0 to below 1")
    branches = [
        (module, name)
        for module in model.modules()
        for name in _NAMES
        if isinstance(getattr(module, name, 0), _NONE_OR_SOME)
    ]
    if not branches:
        raise CapabilityError(
            f"drop path: {type(model).__name__} has no residual branches that are dropped; leave the rate out"
        )
    for module, name in branches:
        setattr(module, name, DropPath(rate).train(module.training))
