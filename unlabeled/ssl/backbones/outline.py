"""The structure of a model that timm cannot build by name, kept without values, to make new copies from.

Taken before anything is done to the model: tasks replace some of its modules, and FSDP's modules cannot be copied.
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
"""Names that torch's layers use for the method that draws their initial weights."""


def outline(model: nn.Module) -> nn.Module:
    """A copy of `model` with parameters that have shapes but no values; buffers keep their values.

    Raises CapabilityError for a module that Python cannot copy.
    """
    try:
        with modes_kept(model):
            return _copied(model, lambda parameter: torch.empty_like(parameter, device="meta"))
    except Exception as error:  # __deepcopy__ and __reduce__ may raise anything
        name = type(model).__name__
        raise CapabilityError(
            f"backbone: {name} cannot be copied ({first_line(error)}), and a run needs copies of it; keep what copy."
            "deepcopy cannot take (generators, open files, locks, tensors of a graph) out of the module"
        ) from error


def unfilled(outlined: nn.Module) -> nn.Module:
    """The model with parameters on the CPU, to load a state dict into; until then they are zero."""
    return _copied(outlined, lambda parameter: torch.zeros_like(parameter, device="cpu"))


def reinitialized(outlined: nn.Module, name: str) -> nn.Module:
    """The model with new random weights, drawn by its layers' ``reset_parameters`` from torch's global generator.

    Buffers keep their values unless a layer resets them too. Raises ConfigError if no layer draws some parameter; the
    message names the first one.
    """
    # NaN marks the parameters that no reset has filled
    model = _copied(outlined, lambda parameter: torch.full_like(parameter, torch.nan, device="cpu"))
    try:
        with torch.no_grad():
            model.apply(_reset)  # children first, so that a model's own method overrides its layers'
    except Exception as error:  # the method may be user code
        raise ConfigError(f"backbone: {name} cannot be reinitialized, its reset fails ({first_line(error)})") from error
    kept = [key for key, parameter in model.named_parameters() if bool(parameter.isnan().any())]
    if kept:
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        raise ConfigError(
            f"backbone: {name} has no timm name, and no reset_parameters() of its layers draws {kept[0]}{more}, so it "
            "cannot be built with random weights; give its module that method"
        )
    return model


def _reset(module: nn.Module) -> None:
    # _reset_parameters is the name in nn.Transformer and nn.MultiheadAttention
    reset = next((found for name in _RESETS if callable(found := getattr(module, name, None))), None)
    if reset is not None:
        reset()


def _copied(model: nn.Module, values: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with `values(parameter)` in place of each parameter; shared parameters stay shared."""
    # deepcopy takes objects from its memo instead of copying them
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(values(parameter.detach()), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)
