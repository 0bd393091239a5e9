"""The structure of a network that has no name to build it by: kept without weights, from which new copies are made.

Taken before anything is done to the network: tasks replace parts of theirs, and FSDP's cannot be copied any more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.core.errors import CapabilityError, ConfigError, first_line

_RESETS = ("reset_parameters", "_reset_parameters")
"""What torch's layers call the method that draws their initial weights."""


def outline(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have shapes but no values; buffers keep theirs.

    Raises CapabilityError for a module that Python cannot copy.
    """
    try:
        with modes_kept(model):
            return _copied(model, lambda parameter: torch.empty_like(parameter, device="meta"))
    except Exception as error:  # __deepcopy__ and __reduce__ raise whatever they like
        name = type(model).__name__
        raise CapabilityError(
            f"backbone: {name} cannot be copied ({first_line(error)}), and a run needs copies of it; keep what copy."
            "deepcopy cannot take (generators, open files, locks, tensors of a graph) out of the module"
        ) from error


def unfilled(outlined: nn.Module) -> nn.Module:
    """The network with parameters on the CPU that have yet to be loaded."""
    return _copied(outlined, lambda parameter: torch.zeros_like(parameter, device="cpu"))


def redrawn(outlined: nn.Module, name: str) -> nn.Module:
    """The network with new random weights from torch's global generator, by its layers' own ``reset_parameters``.

    Buffers stay as they were unless a layer resets them too. Raises ConfigError, naming the first of them, when there
    are parameters that no layer draws.
    """
    model = _copied(outlined, lambda parameter: torch.full_like(parameter, torch.nan, device="cpu"))
    try:
        with torch.no_grad():
            model.apply(_reset)  # children first, so that a network's own method has the last word
    except Exception as error:  # a method of the user's
        raise ConfigError(f"backbone: {name} cannot be drawn anew, its reset fails ({first_line(error)})") from error
    kept = [key for key, parameter in model.named_parameters() if bool(parameter.isnan().any())]
    if kept:
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        raise ConfigError(
            f"backbone: {name} has no timm name, and no reset_parameters() of its layers draws {kept[0]}{more}, so it "
            "cannot be built with random weights; give its module that method"
        )
    return model


def _reset(module: nn.Module) -> None:
    reset = next((found for name in _RESETS if callable(found := getattr(module, name, None))), None)
    if reset is not None:
        reset()


def _copied(model: nn.Module, values: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with `values` of each parameter in its place; parameters that are shared stay shared."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(values(parameter.detach()), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)
