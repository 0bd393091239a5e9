"""The first layer of a network, where it turns each patch of the image into one token of its own.

Such a stem lets a learned token take the place of a patch right after it: nothing of the patch is left then, while
positions, class token and everything after see a token like any other. A stem is known by what it does, not by its
name: it is run on images that differ in some patches only.

Shapes as in `unlabeled.ssl.task`: B images, L = gh * gw patches, D channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.shapes import probed

Layout = Literal["NLC", "NHWC", "NCHW"]

_TOLERANCE = 1e-5
"""Largest difference of tokens that count as equal, over the largest value."""


class Stem(NamedTuple):
    """Where in a network its patches become tokens."""

    name: str
    """Path of the module in the model, such as ``patch_embed``."""
    patch: tuple[int, int]
    """Pixels of a patch, (height, width)."""
    dim: int
    """D."""
    layout: Layout
    """Of its result: (B, L, D), (B, gh, gw, D) or (B, D, gh, gw)."""

    def arranged(self, grid: Tensor) -> Tensor:
        """(B, gh, gw) → (B, L, 1), (B, gh, gw, 1) or (B, 1, gh, gw): one value per token of the result."""
        return {"NLC": grid.flatten(1)[..., None], "NHWC": grid[..., None], "NCHW": grid[:, None]}[self.layout]

    def tokens(self, result: Tensor, grid: tuple[int, int]) -> Tensor:
        """The stem's result for images of `grid` (gh, gw) patches → (B, gh, gw, D)."""
        return result.permute(0, 2, 3, 1) if self.layout == "NCHW" else result.reshape(-1, *grid, self.dim)


@contextmanager
def substituted(model: nn.Module, stem: Stem, visible: Tensor, token: Tensor) -> Iterator[None]:
    """While it is open, tokens that are not `visible` (bool, B, gh, gw) leave the stem as `token` (1, 1, D).

    Of a token with more channels than `model` has, a sub-network of another, the first are taken. The mask lives in
    this call only, so forwards with other masks may come before the backward pass of this one.
    """
    shown = stem.arranged(visible)
    channel = 1 if stem.layout == "NCHW" else -1
    hidden = token.view(1, -1, 1, 1) if stem.layout == "NCHW" else token.view(-1)

    def replace(_module: nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
        return torch.where(shown, tokens, hidden.narrow(channel, 0, tokens.shape[channel]).to(tokens.dtype))

    handle = model.get_submodule(stem.name).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def find_stem(model: nn.Module, size: tuple[int, int]) -> Stem | None:
    """The outermost module that makes one token of each patch, before positions; None where there is none.

    It is called once with the image of `size` (h, w) alone, each of its tokens depends on the pixels of its own
    patch and in the same way at each place, and nothing else in the network reads the image. Statistics over
    patches, as batch norm has them, are a dependence too.
    """
    for name, shape in _called_with_image(model, size).items():
        module = model.get_submodule(name)
        for stem in _readings(name, _patch(module), shape, size):
            if _keeps_patches_apart(module, stem, size) and _alone(model, stem, size):
                return stem
    return None


def _patch(module: nn.Module) -> tuple[int, int]:
    """Product of the strides (rows, columns) of all convolutions of `module`."""
    strides = [conv.stride for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    return math.prod(stride[0] for stride in strides), math.prod(stride[1] for stride in strides)


def _of_patches(module: nn.Module) -> bool:
    """Whether `module` holds convolutions, all over disjoint patches, and no linear layer (so no attention)."""
    convs = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    disjoint = all(
        conv.kernel_size == conv.stride and set(conv.padding) == {0} and set(conv.dilation) == {1} for conv in convs
    )
    return bool(convs) and disjoint and not any(isinstance(part, nn.Linear) for part in module.modules())


def _called_with_image(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the result, of the modules of patch convolutions called once, with the image alone."""

    def run(net: nn.Module, x: Tensor) -> dict[str, list[tuple[int, ...] | None]]:
        calls: dict[str, list[tuple[int, ...] | None]] = {}
        for name, module in net.named_modules():
            if name and _of_patches(module):
                module.register_forward_hook(_recorder(calls, name, x), with_kwargs=True)
        with torch.no_grad():
            cast(Any, net).forward_features(x)
        return calls

    calls = probed(model, size, run)
    order = [name for name, _ in model.named_modules()]  # outermost first
    return {name: found[0] for name in order if len(found := calls.get(name, [])) == 1 and found[0] is not None}


def _recorder(calls: dict[str, list[tuple[int, ...] | None]], name: str, image: Tensor) -> Any:
    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        alone = len(args) == 1 and not kwargs and args[0] is image  # not something already made of it
        fits = alone and isinstance(result, Tensor) and len(result) == len(image)
        calls.setdefault(name, []).append(tuple(result.shape) if fits else None)

    return record


def _readings(name: str, patch: tuple[int, int], shape: tuple[int, ...], size: tuple[int, int]) -> list[Stem]:
    """The ways to read a result of `shape` (1, ...) as the grid of patches of an image of `size`."""
    if size[0] % patch[0] or size[1] % patch[1]:
        return []
    grid = (size[0] // patch[0], size[1] // patch[1])
    layouts: dict[Layout, tuple[int, ...]] = {
        "NLC": (1, grid[0] * grid[1], shape[-1]),
        "NHWC": (1, *grid, shape[-1]),
        "NCHW": (1, shape[1], *grid) if len(shape) > 1 else (),
    }
    fitting = [layout for layout, expected in layouts.items() if shape == expected]
    return [Stem(name, patch, shape[1] if layout == "NCHW" else shape[-1], layout) for layout in fitting]


@torch.no_grad()
def _keeps_patches_apart(module: nn.Module, stem: Stem, size: tuple[int, int]) -> bool:
    """Whether exactly the tokens of changed patches change, in train mode, and a flat image has equal tokens."""
    part = copy.deepcopy(module).to("cpu", torch.float32).train()
    generator = torch.Generator().manual_seed(0)
    grid = (size[0] // stem.patch[0], size[1] // stem.patch[1])
    images, others = torch.randn(2, 2, 3, *size, generator=generator)
    changed = torch.rand(2, *grid, generator=generator) < 0.5
    pixels = changed.repeat_interleave(stem.patch[0], 1).repeat_interleave(stem.patch[1], 2)[:, None]
    before, after, flat = (
        stem.tokens(part(x), grid) for x in (images, torch.where(pixels, others, images), torch.ones_like(images))
    )
    limit = _TOLERANCE * before.abs().amax()
    moved = (before - after).abs().amax(-1) > limit  # (2, gh, gw)
    even = (flat - flat[:1, :1, :1]).abs().amax() <= limit
    return torch.equal(moved, changed) and bool(even)


@torch.enable_grad()
def _alone(model: nn.Module, stem: Stem, size: tuple[int, int]) -> bool:
    """Whether no feature map depends on the image once all tokens of the stem are replaced."""

    def run(net: nn.Module, x: Tensor) -> bool:
        x.requires_grad_(True)
        for parameter in net.parameters():
            parameter.requires_grad_(True)  # so that there is a graph without the image too
        net.get_submodule(stem.name).register_forward_hook(lambda *call: call[2].detach())
        maps = cast(Any, net).forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
        total = torch.stack([one.sum() for one in maps]).sum()
        return torch.autograd.grad(total, [x], allow_unused=True)[0] is None

    return probed(model, size, run)
