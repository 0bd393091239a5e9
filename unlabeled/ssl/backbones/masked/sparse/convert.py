"""Turns a timm ConvNet into its masked form, and runs it on visible places only."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, random_masking
from unlabeled.ssl.backbones.masked.sparse.gathering import Cells, Factor
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap, NoRuleError, OrderError, zeroed
from unlabeled.ssl.backbones.masked.sparse.rules import RULES, attends, refusal
from unlabeled.ssl.backbones.shapes import ghost

Execution = Literal["gathered", "dense"]
"""gathered: maps are rows of visible places, whole only around spatial layers; the faster one at each resolution (see
docs/results/benchmarks.md). dense: whole maps, the reference."""


def convert(module: nn.Module) -> nn.Module:
    """Gives each layer inside `module` (and itself) a masked form, in place, and returns it.

    A layer's class is exchanged for a subclass of it which treats a `MaskedMap` by the rule of the layer's exact type
    and any other tensor as before. Parameters, buffers and their names stay. A layer without a rule keeps working on
    plain tensors and raises NoRuleError for a masked map.
    """
    for child in module.children():
        convert(child)
    leaf = not any(True for _ in module.children())
    if (leaf or type(module) in RULES) and not getattr(module, "_masked", False):
        kind: Any = type(module)  # hashable, which the stubs of nn.Module do not say
        module.__class__ = _masked_class(kind)
    return module


@cache
def _masked_class(cls: type[nn.Module]) -> type[nn.Module]:
    rule = RULES.get(cls)
    plain = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (args and isinstance(args[0], MaskedMap)):
            return plain(self, *args, **kwargs)
        if rule is None:
            raise NoRuleError(refusal(cls))
        return rule(self, lambda x: plain(self, x, *args[1:], **kwargs), args[0])

    return type(f"Masked{cls.__name__}", (cls,), {"forward": forward, "_masked": True, "__module__": cls.__module__})


class SparseEncoder:
    """The feature maps of a ConvNet that sees the visible cells of an image only; a view without parameters.

    It converts the backbone's layers in place (see `convert`); the backbone stays the same network for whole images.
    """

    dense: Container[Factor] = frozenset()
    """Resolutions (places of a cell) at which a gathered execution keeps whole maps all the same."""

    def __init__(self, backbone: Backbone, cell: tuple[int, int], execution: Execution = "gathered") -> None:
        """`cell`: pixels of one cell of the mask. Raises CapabilityError for a backbone without a masked form."""
        backbone.require({"sparse_convs"}, task="sparse execution")
        self.backbone = backbone
        self.cell = cell
        self.execution = execution
        convert(backbone.model)

    def maps(self, images: Tensor, masking: Masking, indices: Iterable[int]) -> list[MaskedMap]:
        """Maps of the stages `indices` for normalized (B, 3, H, W), of which the cells of `masking` are visible."""
        cells = Cells(masking, None if self.execution == "dense" else self.dense)
        return self.backbone.maps(_masked_images(images, cells, self.cell), indices)  # type: ignore[return-value]


def _masked_images(images: Tensor, cells: Cells, cell: tuple[int, int]) -> MaskedMap:
    return MaskedMap(zeroed(images, cells, cell), cells, cell, is_gathered=False)


def sparse_convs_missing_reason(backbone: Backbone) -> str | None:
    """Why this backbone has no masked form, in a few words; None when it has one.

    Settled by trying: its layers are converted in a copy without values, which then runs on a masked image.
    """
    if not backbone.stages:
        return "it gives no feature maps"
    stride = max(stage.stride for stage in backbone.stages)
    height, width = backbone.input_size
    if height % stride or width % stride:
        return f"its stride {stride} does not divide images of {height}x{width}"
    grid = (height // stride, width // stride)
    try:
        return _failure(convert(ghost(backbone.model)), backbone.input_size, grid, "meta")
    except Exception:  # not every operation has a meta kernel
        return _failure(convert(copy.deepcopy(backbone.model)), backbone.input_size, grid, "cpu")


@torch.no_grad()
def _failure(model: nn.Module, size: tuple[int, int], grid: tuple[int, int], device: str) -> str | None:
    """What happens when the converted `model` meets a masked image: where and why it fails, or None."""
    noise = torch.rand(2, grid[0] * grid[1])
    masking = Masking(*(one.to(device) for one in random_masking(noise, max(1, noise.shape[1] // 2), grid)))
    cell = (size[0] // grid[0], size[1] // grid[1])
    images = torch.zeros(2, 3, *size, device=device, dtype=next(model.parameters()).dtype)
    with _running(model) as path:
        try:
            found = cast(Any, model.eval()).forward_intermediates(
                _masked_images(images, Cells(masking), cell), output_fmt="NCHW", intermediates_only=True
            )
        except NoRuleError as error:
            return _told(model, path, error)
    return None if all(isinstance(one, MaskedMap) for one in found) else "its maps are not those of places"


def _told(model: nn.Module, path: list[str], error: NoRuleError) -> str:
    """Where and why in one line: the innermost running module, or the attention that it belongs to or leads to."""
    kinds = {name: type(module).__name__.removeprefix("Masked") for name, module in model.named_modules()}
    later = kinds if isinstance(error, OrderError) else []  # a map becomes a list of tokens for the attention behind it
    for name in [*path, *later]:
        if name and attends(type(model.get_submodule(name))):
            return f"{name}: {kinds[name]} attends to all places"
    return f"{path[-1]} ({kinds[path[-1]]}): {error}" if path else f"its own code: {error}"


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that are running, outermost first; after an exception, where it happened."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
