"""What a network really gives: one forward pass on the meta device, where tensors have shapes but no values.

``feature_info`` is a statement of intent (TResNet's first stage says stride 2 and has 4; a head that projects or
concatenates has a width of its own), so the adapter measures instead. The pass costs about a tenth of building the
network, and no memory: parameters are replaced by empty ones while the copy is made. Small networks run on real tensors
instead: the meta kernels of norms and activations are written in Python, and cost more than the pass itself.
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
_Results = Callable[[Any, Tensor], list[Tensor]]
"""(network, image) → what is read of it."""


_SMALL = 2**37
"""Parameters times pixels of an image up to which a real pass is the cheaper one: 32 million at 64x64."""


class Shapes(NamedTuple):
    """Shapes for one image, without the batch axis."""

    pooled: tuple[int, ...]
    """(D,) where the head pools."""
    maps: list[tuple[int, ...]] | None
    """(C, H, W) of each feature map; None without ``forward_intermediates``."""


def probe_shapes(model: nn.Module, size: tuple[int, int]) -> Shapes:
    """Shapes that `model` gives for an image of `size` (h, w).

    Raises whatever the network raises for an image that it cannot take.
    """
    try:
        if _small(model, size):
            with torch.random.fork_rng(devices=[]):
                return _run(_copy(model), size, torch.device("cpu"))
        return _run(ghost(model), size, torch.device("meta"))
    except Exception:  # not all can be copied or has a meta kernel; the network itself says what is wrong, or works
        return _run_real(model, size)


def _small(model: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a pass of real tensors is cheap: a network on the CPU, of few parameters for its images."""
    parameters = list(model.parameters())
    usual = all(one.device.type == "cpu" and one.dtype in (torch.float32, torch.float64) for one in parameters)
    return usual and sum(one.numel() for one in parameters) * size[0] * size[1] <= _SMALL


def _run_real(model: nn.Module, size: tuple[int, int]) -> Shapes:
    first = next(model.parameters(), None)
    with modes_kept(model):
        return _run(model.eval(), size, first.device if first is not None else torch.device("cpu"))


def probed(model: nn.Module, size: tuple[int, int], run: Callable[[nn.Module, Tensor], _T]) -> _T:
    """What `run(network, image)` gives for a copy of `model` in eval mode and an image of `size`: shapes, graphs.

    On the meta device where the network can, else, and where it is small, with real tensors. Raises whatever `run`
    raises there.
    """
    first = next(model.parameters(), None)
    dtype = first.dtype if first is not None else torch.float32
    if _small(model, size):
        with torch.random.fork_rng(devices=[]):
            return run(_copy(model), torch.zeros(1, 3, *size, dtype=dtype))
    try:
        return run(ghost(model), torch.zeros(1, 3, *size, device="meta", dtype=dtype))
    except Exception:  # see probe_shapes
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
    """Copy of `model` in eval mode whose parameters and buffers lie on the meta device."""
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
    """Each module is in its mode again afterwards.

    The network enters train mode first and last, which makes LeViT and its like forget what they keep in eval mode of
    earlier passes: tables computed from weights that may be replaced, and that belong to a graph.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        model.train()
        for module, training in modes:
            module.training = training


def reached_by_pooled(model: nn.Module, size: tuple[int, int]) -> set[str]:
    """Names of the parameters that the pooled features depend on; the others get no gradient from a loss on them."""
    return reached_by(model, size, lambda net, x: [net.forward_head(net.forward_features(x), pre_logits=True)])


def reached_by_maps(model: nn.Module, size: tuple[int, int], indices: list[int]) -> set[str]:
    """Names of the parameters that the feature maps `indices` (ascending, from 0) depend on."""
    options = {"indices": indices, "output_fmt": "NCHW", "intermediates_only": True}
    return reached_by(model, size, lambda net, x: net.forward_intermediates(x, **options))


def reached_by(model: nn.Module, size: tuple[int, int], results: _Results) -> set[str]:
    """Names of the parameters that ``results(network, images)`` depend on."""

    @torch.enable_grad()
    def reached(net: nn.Module, x: Tensor) -> set[str]:
        parameters = {name: parameter.requires_grad_(True) for name, parameter in net.named_parameters()}
        total = torch.stack([result.sum() for result in results(net, x)]).sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}

    return probed(model, size, reached)
