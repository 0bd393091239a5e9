"""Parameter groups and the optimizer: which parameters decay, and how the rate falls with depth."""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers

import unlabeled.ssl.nn.lars  # noqa: F401  registers PixPro's LARS with timm
from unlabeled.ssl.backbones.layer_index import layer_scale
from unlabeled.ssl.config.schema import OptimConfig
from unlabeled.ssl.core.errors import ConfigError, nearest
from unlabeled.ssl.task import PretextTask

logger = logging.getLogger(__name__)

_CLIPPING = frozenset({"clamb", "clambw", "lamb", "lambc", "lambcd", "lambcw", "lambw"})
"""Optimizers that by default clip the gradient to 1, which is the engine's work (``engine.clip``)."""


def parameter_groups(task: PretextTask, config: OptimConfig) -> list[dict[str, Any]]:
    """One group for each (layer multiplier, decays or not), in the order of first appearance.

    Each holds ``params``, ``names``, ``lr_scale`` (``layer_decay^(depth + 1 - layer)``, of the backbone's patch
    embedding times ``patch_embed_lr``) and ``decays``.
    """
    depth = task.encoder().depth
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for named in task.parameter_groups():
        scale = layer_scale(named.layer, depth, config.layer_decay or 1.0)
        if _embeds_patches(named.name):
            scale *= config.patch_embed_lr
        group = groups.setdefault(
            (scale, named.decay), {"params": [], "names": [], "lr_scale": scale, "decays": named.decay}
        )
        group["params"].append(named.parameter)
        group["names"].append(named.name)
    if config.patch_embed_lr != 1 and not any(
        _embeds_patches(name) for one in groups.values() for name in one["names"]
    ):
        logger.warning("optim.patch_embed_lr: %s has no patch_embed, so this has no effect", task.backbone.name)
    return list(groups.values())


def _embeds_patches(name: str) -> bool:
    """By name, as in DINOv2: timm's transformers call it patch_embed; stems of ConvNets are not meant."""
    return name.startswith("backbone.") and ".patch_embed" in name


def create_optimizer(task: PretextTask, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer `config.name` over the task's parameter groups; rates are set before each step.

    Raises ConfigError for an unknown name or arguments that the optimizer does not take.
    """
    known = list_optimizers()
    if config.name not in known:
        raise ConfigError(f"optim.name: {config.name!r} is not an optimizer; {nearest(config.name, known)}")
    groups = [
        {**group, "weight_decay": config.weight_decay * group["decays"]} for group in parameter_groups(task, config)
    ]
    extra = dict(config.kwargs) | ({"betas": config.betas} if config.betas else {})
    if any(parameter.is_cuda for parameter in task.parameters()) and config.name in ("adam", "adamw"):
        extra.setdefault("fused", True)
    if config.name in _CLIPPING:
        extra.setdefault("max_grad_norm", None)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **extra
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {config.name} does not take these settings ({error}); see optim.kwargs") from None
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets learning rate and weight decay of every group for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["decays"]
