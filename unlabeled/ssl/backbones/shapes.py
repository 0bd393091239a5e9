"""Measures a model's output shapes with one forward pass on the meta device, where tensors have shapes but no values.

``feature_info`` is not always right (TResNet's first stage states stride 2 and has 4; a head that projects or
concatenates has a width of its own), so the adapter measures instead. The pass takes about a tenth of the time to build
the model, and no memory: parameters are replaced by empty ones during the copy. Small models run on real tensors: the
meta kernels of norms and activations are written in Python, and cost more than the pass itself.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

_T = TypeVar("_T")
_Outputs = Callable[[Any, Tensor], list[Tensor]]
"""(model, image) → the output tensors to trace back to parameters."""


_SMALL = 2**37
"""Parameters times pixels up to which a pass on real tensors is cheaper: 32 million parameters at 64x64."""


class Shapes(NamedTuple):
    """Output shapes for one image, without the batch axis."""

    pooled: tuple[int, ...]
    """(D,) if the head pools."""
    maps: list[tuple[int, ...]] | None
    """(C, H, W) of each feature map; None without ``forward_intermediates``."""


def probe_shapes(model: nn.Module, size: tuple[int, int]) -> Shapes:
    """Output shapes of `model` for an image of `size` (h, w).

    Raises whatever the model raises for an image that it cannot take.
    """
    try:
        if _small(model, size):
            # a forward pass may draw random numbers; the global generator must not advance
            with torch.random.fork_rng(devices=[]):
                return _run(_copy(model), size, torch.device("cpu"))
        return _run(ghost(model), size, torch.device("meta"))
    except Exception:  # not every model can be copied or has meta kernels; run the model itself, or let it raise
        return _run_real(model, size)


def _small(model: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a pass on real tensors is cheap: a model on the CPU with few parameters for the image size."""
    parameters = list(model.parameters())
    # half precision is slow on the CPU, or has no kernels
    ordinary = all(one.device.type == "cpu" and one.dtype in (torch.float32, torch.float64) for one in parameters)
    return ordinary and sum(one.numel() for one in parameters) * size[0] * size[1] <= _SMALL


def _run_real(model: nn.Module, size: tuple[int, int]) -> Shapes:
    first = next(model.parameters(), None)
    with modes_kept(model):
        return _run(model.eval(), size, first.device if first is not None else torch.device("cpu"))


def probed(model: nn.Module, size: tuple[int, int], run: Callable[[nn.Module, Tensor], _T]) -> _T:
    """`run(model, image)` on a copy of `model` in eval mode, for results that need no values: shapes, graphs.

    Runs on the meta device if the model can, and on real tensors if it cannot or is small. Raises whatever `run`
    raises there.
    """
    first = next(model.parameters(), None)
    dtype = first.dtype if first is not None else torch.float32
    if _small(model, size):
        with torch.random.fork_rng(devices=[]):
            return run(_copy(model), torch.zeros(1, 3, *size, dtype=dtype))
    try:
        return run(ghost(model), torch.zeros(1, 3, *size, device="meta", dtype=dtype))
    except Exception:  # no copy or no meta kernels, as in probe_shapes
        device = first.device if first is not None else torch.device("cpu")
        return run(_copy(model), torch.zeros(1, 3, *size, device=device, dtype=dtype))


@torch.no_grad()
def _run(model: nn.Module, size: tuple[int, int], device: torch.device) -> Shapes:
    first = next(model.parameters(), None)
    net = cast(Any, model)
    x = torch.zeros(1, 3, *size, device=device, dtype=first.dtype if first is not None else torch.float32)
    pooled: Tensor = net.forward_head(net.forward_features(x), pre_logits=True)
    maps = None
    if hasattr(model, "forward_intermediates"):
        found: list[Tensor] = net.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
        maps = [tuple(one.shape[1:]) for one in found]
    return Shapes(tuple(pooled.shape[1:]), maps)


def ghost(model: nn.Module) -> nn.Module:
    """Copy of `model` in eval mode with parameters and buffers on the meta device."""
    # deepcopy takes objects from its memo instead of copying them, so no weight is ever duplicated
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return _copy(model, memo)


def _copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy in eval mode."""
    with modes_kept(model):
        return copy.deepcopy(model, memo).eval()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the train or eval mode of every module afterwards.

    The model enters train mode first and last. That makes LeViT and similar models drop the tables that they cache in
    eval mode: these are computed from weights that may be replaced, and belong to a graph.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        model.train()
        # flag by flag: train(False) on a parent would also switch the children that were in train mode
        for module, training in modes:
            module.training = training


def reached_by_pooled(model: nn.Module, size: tuple[int, int]) -> set[str]:
    """Names of the parameters that the pooled features depend on; a loss on them gives the others no gradient."""
    return reached_by(model, size, lambda net, x: [net.forward_head(net.forward_features(x), pre_logits=True)])


def reached_by_maps(model: nn.Module, size: tuple[int, int], indices: list[int]) -> set[str]:
    """Names of the parameters that the feature maps `indices` (ascending, from 0) depend on."""
    options = {"indices": indices, "output_fmt": "NCHW", "intermediates_only": True}
    return reached_by(model, size, lambda net, x: net.forward_intermediates(x, **options))


def reached_by(model: nn.Module, size: tuple[int, int], outputs: _Outputs) -> set[str]:
    """Names of the parameters that ``outputs(model, images)`` depend on."""

    @torch.enable_grad()
    def reached(net: nn.Module, x: Tensor) -> set[str]:
        # frozen parameters count too: the question is about the architecture
        parameters = {name: parameter.requires_grad_(True) for name, parameter in net.named_parameters()}
        total = torch.stack([output.sum() for output in outputs(net, x)]).sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}

    return probed(model, size, reached)
