"""Stochastic depth (arXiv 1603.09382): residual branches that are dropped at random, independently for each image."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from unlabeled.ssl.core.errors import CapabilityError, ConfigError

_NAMES = ("drop_path", "drop_path1", "drop_path2")
"""Attributes in which the blocks of timm's models keep their stochastic depth."""

_NONE_OR_SOME = (nn.Identity, type(None), DropPath)
"""Types of these attributes: at a rate of 0, transformers and ConvNeXt have an Identity and ResNets have None."""


def uniform_drop_path(model: nn.Module, rate: float) -> None:
    """Sets one drop `rate` in [0, 1) for all residual branches of a timm `model`; timm would increase it with depth.

    Raises ConfigError for any other rate and CapabilityError for a model without stochastic depth.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"drop path: a rate of {rate} is not possible; give one from 0 to below 1")
    branches = [
        (module, name)
        for module in model.modules()
        for name in _NAMES
        if isinstance(getattr(module, name, 0), _NONE_OR_SOME)  # 0 for a missing attribute, since None is a hit
    ]
    if not branches:
        raise CapabilityError(
            f"drop path: {type(model).__name__} has no residual branches that are dropped; leave the rate out"
        )
    for module, name in branches:
        setattr(module, name, DropPath(rate).train(module.training))  # new modules are in training mode
