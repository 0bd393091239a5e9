"""Finds the stem: the first layer of a backbone, if it turns each patch of the image into one token of its own.

Behind such a stem a learned token can replace a patch: no information about the patch is left, while positions, class
token and all later layers treat it like any other token. A stem is recognized by its behavior rather than its name, on
images that differ in some patches only.

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
"""Largest difference between tokens that count as equal, relative to the largest value."""


class Stem(NamedTuple):
    """The module of a backbone that turns patches into tokens."""

    name: str
    """Path of the module in the model, such as ``patch_embed``."""
    patch: tuple[int, int]
    """Size of a patch in pixels, (height, width)."""
    dim: int
    """D, the channels of a token."""
    layout: Layout
    """Axes of its output: (B, L, D), (B, gh, gw, D) or (B, D, gh, gw)."""

    def arranged(self, grid: Tensor) -> Tensor:
        """(B, gh, gw) → (B, L, 1), (B, gh, gw, 1) or (B, 1, gh, gw): one value per token, for all channels."""
        return {"NLC": grid.flatten(1)[..., None], "NHWC": grid[..., None], "NCHW": grid[:, None]}[self.layout]

    def tokens(self, output: Tensor, grid: tuple[int, int]) -> Tensor:
        """The stem's output for images of `grid` (gh, gw) patches → (B, gh, gw, D)."""
        return output.permute(0, 2, 3, 1) if self.layout == "NCHW" else output.reshape(-1, *grid, self.dim)


@contextmanager
def substituted(model: nn.Module, stem: Stem, visible: Tensor, token: Tensor) -> Iterator[None]:
    """Inside the context, tokens that are not `visible` (bool, B, gh, gw) leave the stem as `token` (1, 1, D).

    If `token` has more channels than the stem, as in an elastic sub-network, its first channels are used. The mask
    belongs to this context only, so you may run forward passes with other masks before the backward pass of this one.
    """
    keep = stem.arranged(visible)
    channel = 1 if stem.layout == "NCHW" else -1
    mask_token = token.view(1, -1, 1, 1) if stem.layout == "NCHW" else token.view(-1)

    def replace(_module: nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
        # under autocast the stem's output has another dtype than the parameter
        return torch.where(keep, tokens, mask_token.narrow(channel, 0, tokens.shape[channel]).to(tokens.dtype))

    handle = model.get_submodule(stem.name).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def find_stem(model: nn.Module, size: tuple[int, int]) -> Stem | None:
    """The outermost module that makes one token of each patch, before positions are added; None if there is none.

    It is called once, with the image of `size` (h, w) alone. Each of its tokens depends on the pixels of its own patch
    only, and in the same way at each position. Nothing else in the model reads the image. Statistics over patches, as
    in batch norm, count as a dependence on other patches.
    """
    # cheap checks first: most modules fail on their type or on the shape of their output
    for name, shape in _called_with_image(model, size).items():
        module = model.get_submodule(name)
        for stem in _candidates(name, _patch(module), shape, size):
            if _keeps_patches_apart(module, stem, size) and _alone(model, stem, size):
                return stem
    return None


def _patch(module: nn.Module) -> tuple[int, int]:
    """Product of the strides (vertical, horizontal) of all convolutions in `module`."""
    strides = [conv.stride for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    return math.prod(stride[0] for stride in strides), math.prod(stride[1] for stride in strides)


def _of_patches(module: nn.Module) -> bool:
    """Whether `module` has convolutions, all over disjoint patches, and no linear layer (hence no attention)."""
    convs = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    disjoint = all(
        conv.kernel_size == conv.stride and set(conv.padding) == {0} and set(conv.dilation) == {1} for conv in convs
    )
    return bool(convs) and disjoint and not any(isinstance(child, nn.Linear) for child in module.modules())


def _called_with_image(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name → output shape of the patch-convolution modules that are called once, with the image alone."""

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
        alone = len(args) == 1 and not kwargs and args[0] is image  # the image itself, not something computed from it
        fits = alone and isinstance(result, Tensor) and len(result) == len(image)
        calls.setdefault(name, []).append(tuple(result.shape) if fits else None)

    return record


def _candidates(name: str, patch: tuple[int, int], shape: tuple[int, ...], size: tuple[int, int]) -> list[Stem]:
    """The layouts that an output of `shape` (1, ...) can have as the grid of patches of an image of `size`."""
    if size[0] % patch[0] or size[1] % patch[1]:
        return []
    grid = (size[0] // patch[0], size[1] // patch[1])
    layouts: dict[Layout, tuple[int, ...]] = {
        "NLC": (1, grid[0] * grid[1], shape[-1]),
        "NHWC": (1, *grid, shape[-1]),
        "NCHW": (1, shape[1], *grid) if len(shape) > 1 else (),
    }
    # several layouts may fit, such as NHWC and NCHW of a square grid with as many channels as rows
    fitting = [layout for layout, expected in layouts.items() if shape == expected]
    return [Stem(name, patch, shape[1] if layout == "NCHW" else shape[-1], layout) for layout in fitting]


@torch.no_grad()
def _keeps_patches_apart(module: nn.Module, stem: Stem, size: tuple[int, int]) -> bool:
    """Whether tokens change exactly where patches change, in train mode, and a constant image has equal tokens."""
    trial = copy.deepcopy(module).to("cpu", torch.float32).train()  # train mode, in which batch norm mixes patches
    generator = torch.Generator().manual_seed(0)
    grid = (size[0] // stem.patch[0], size[1] // stem.patch[1])
    images, others = torch.randn(2, 2, 3, *size, generator=generator)
    # change half of the patches
    changed = torch.rand(2, *grid, generator=generator) < 0.5
    pixels = changed.repeat_interleave(stem.patch[0], 1).repeat_interleave(stem.patch[1], 2)[:, None]
    before, after, flat = (
        stem.tokens(trial(x), grid) for x in (images, torch.where(pixels, others, images), torch.ones_like(images))
    )
    limit = _TOLERANCE * before.abs().amax()
    moved = (before - after).abs().amax(-1) > limit  # (2, gh, gw)
    # positions added inside the module would make the tokens of a constant image differ
    uniform = (flat - flat[:1, :1, :1]).abs().amax() <= limit
    return torch.equal(moved, changed) and bool(uniform)


@torch.enable_grad()
def _alone(model: nn.Module, stem: Stem, size: tuple[int, int]) -> bool:
    """Whether the feature maps depend on the image through the stem's tokens alone."""

    def run(net: nn.Module, x: Tensor) -> bool:
        x.requires_grad_(True)
        for parameter in net.parameters():
            parameter.requires_grad_(True)  # so that the maps have a graph without the image, too
        # cut the graph at the stem's output: a gradient that still reaches the image took another way
        net.get_submodule(stem.name).register_forward_hook(lambda *call: call[2].detach())
        maps = cast(Any, net).forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
        total = torch.stack([one.sum() for one in maps]).sum()
        return torch.autograd.grad(total, [x], allow_unused=True)[0] is None

    return probed(model, size, run)
