"""Sub-networks of a network, as timm models whose parameters are slices of its own.

A sub-network is built by timm at its size once, on the meta device: a tree of modules without values. Whenever it is
taken, a copy of that tree gets slices of the whole network's parameters. So the width and the blocks of a forward pass
belong to the modules that run it and to nothing else: several sub-networks may be in one graph, activation checkpoints
find the same slices again, and a sub-network is by construction what timm builds and what is exported. Source of the
slices: alipay/POA (arXiv 2408.01031, section 3.1 and appendix).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic.config import ElasticConfig
from unlabeled.ssl.backbones.elastic.families import axis_groups, family_of
from unlabeled.ssl.backbones.elastic.sizes import SubSize, alternating, candidates, evenly
from unlabeled.ssl.backbones.elastic.slices import Slice
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
_SETTINGS = ("training", "grad_checkpointing", "p", "shift_size", "mean", "std", "trained")
"""What a module of a sub-network has from the one whose parameters it runs with."""


class Elastic:
    """The sub-networks of networks of one architecture; their parameters come from whichever is given.

    Batch norms: a sub-network has statistics of its own batches in train mode and leaves the running ones of the whole
    network alone, of which it has slices in eval mode. They are those of other inputs, so extracted networks with batch
    norms need fresh ones: `unlabeled.eval.features.recalibrate`. Where batch norms are synchronized, all ranks must
    take the same size.

    Attributes: `sizes` (smallest first, the last is `full`), `family`.
    """

    def __init__(self, backbone: Backbone, config: ElasticConfig) -> None:
        """Raises CapabilityError for a network without sub-networks, ConfigError for sizes that it does not have."""
        self.family = family_of(backbone)
        self.name, self.kwargs, self.input_size = backbone.name, backbone.kwargs, backbone.input_size
        self.full: SubSize = self.family.read(backbone.model)
        self.config = config
        self.sizes = candidates(config, self.full, self.family.unit(backbone.model), self.family.remedy)
        self._arguments = {size: dict(self.family.arguments(backbone.model, size)) for size in self.sizes}
        self._built: dict[SubSize, _Part] = {}
        for width in {size.width for size in self.sizes}:  # so that what timm refuses is told before training
            self._part(backbone, next(size for size in self.sizes if size.width == width))

    def blocks(self, size: SubSize) -> tuple[tuple[int, ...], ...]:
        """Numbers of the blocks that a sub-network keeps of each stage."""
        choose = alternating if self.family.shifts and self.config.block_order == "alternating" else evenly
        return tuple(choose(kept, whole) for kept, whole in zip(size.depths, self.full.depths, strict=True))

    def arguments(self, size: SubSize) -> dict[str, Any]:
        """What ``timm.create_model`` builds the sub-network from, beside the network's name."""
        return self.kwargs | self._arguments[size]

    def take(self, backbone: Backbone, size: SubSize) -> Backbone:
        """The sub-network of `backbone` in its graph: gradients reach the parts of its parameters that were used.

        The whole network's own for its full size. Modes, rates of dropping and activation checkpointing are those of
        `backbone` at this moment, each block's those of the block that it is a slice of.
        """
        return backbone if size == self.full else cast(Backbone, _bound(self._part(backbone, size), backbone))

    @torch.no_grad()
    def extract(self, backbone: Backbone, size: SubSize) -> Backbone:
        """The sub-network of `backbone` as a network of its own, which any copy of timm builds and loads strictly.

        Rates of dropping are those that timm gives a network of this depth. Raises ConfigError for a Swin whose kept
        blocks do not alternate between plain and shifted windows (`block_order=published`), since timm builds none.
        """
        alone = self._create(size)
        taken = self.take(backbone, size)
        if _shifts(alone) != _shifts(taken):
            raise ConfigError(
                f"elastic.block_order: published keeps blocks for {size} whose windows do not alternate, as those of "
                "every Swin that timm builds do; train with block_order=alternating, or extract another depth"
            )
        like = next(backbone.parameters())
        alone.to(device=like.device, dtype=like.dtype)
        alone.load_state_dict(taken.state_dict())
        alone.set_statistics(backbone.mean, backbone.std)
        alone.trained = True
        return alone.train(backbone.training)

    def _create(self, size: SubSize) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            return create_backbone(self.name, size=self.input_size, **self.arguments(size))

    def _part(self, backbone: Backbone, size: SubSize) -> _Part:
        if size not in self._built:
            try:
                with torch.device("meta"):
                    skeleton = self._create(size)
            except ConfigError as error:
                reason = str(error.__cause__ or error).rstrip(".")
                raise CapabilityError(
                    f"backbone: {self.name} cannot be elastic: timm does not build it at width {size.width} ({reason})"
                ) from error
            if self.family.read(skeleton.model) != size:
                raise CapabilityError(f"backbone: {self.name} cannot be elastic: timm does not build it in other sizes")
            paths = (f"model.{self.family.blocks(stage)}" for stage in range(len(size.depths)))
            self._built[size] = _part(skeleton, backbone, dict(zip(paths, self.blocks(size), strict=True)))
        return self._built[size]


@dataclass(frozen=True)
class _Part:
    """A module of a sub-network: how it follows from one of the whole network."""

    module: nn.Module
    """As timm builds it, without values."""
    slices: Mapping[str, Slice]
    """Of its own parameters and buffers."""
    children: Mapping[str, tuple[str, _Part | None]]
    """Name → name within the whole network's module, which differs for blocks."""


def _part(
    module: nn.Module,
    source: nn.Module,
    kept: Mapping[str, Sequence[int]],
    path: str = "",
    parent: nn.Module | None = None,
) -> _Part:
    """The tree of parts; `kept` has the numbers of the kept blocks by the path of the module that holds them."""
    role = path.rpartition(".")[2]
    slices = {
        leaf: _slice_of(source, leaf, parameter, axis_groups(parent, role, parameter.ndim))
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    for leaf, buffer in module._buffers.items():
        if buffer is not None and source._buffers[leaf] is not None:
            slices[leaf] = Slice(tuple(buffer.shape), (1,) * buffer.ndim)
    children: dict[str, tuple[str, _Part | None]] = {}
    for name, child in module._modules.items():
        position = str(kept[path][int(name)]) if path in kept else name
        below, inner = source._modules[position], f"{path}.{name}" if path else name
        children[name] = position, None if child is None or below is None else _part(child, below, kept, inner, module)
    return _Part(module, slices, children)


def _slice_of(source: nn.Module, leaf: str, parameter: Tensor, groups: tuple[int, ...]) -> Slice:
    """How `parameter` follows from the one that `source` calls `leaf`."""
    whole = source.get_parameter(leaf)
    sums = isinstance(source, nn.Linear) or (isinstance(source, nn.Conv2d) and source.groups == 1)
    scale = whole.shape[1] / parameter.shape[1] if sums and leaf == "weight" else 1.0
    part = Slice(tuple(parameter.shape), groups, scale)
    assert part.fits(whole), f"{type(source).__name__}.{leaf}: {tuple(whole.shape)} has no slice {part}"
    return part


def _bound(part: _Part, source: nn.Module) -> nn.Module:
    """A copy of the tree of modules that runs with slices of the parameters of `source` and with its settings."""
    copy = _shell(part.module, source)
    slices, state = part.slices, copy.__dict__
    for name in _SETTINGS:
        if name in state and name in source.__dict__:
            state[name] = source.__dict__[name]
    parameters, buffers = source._parameters, source._buffers
    state["_parameters"] = {leaf: _sliced(slices.get(leaf), parameters[leaf]) for leaf in part.module._parameters}
    state["_buffers"] = {leaf: _sliced(slices.get(leaf), buffers[leaf]) for leaf in part.module._buffers}
    for leaf, buffer in state["_buffers"].items():
        if buffer is not None and leaf not in source._non_persistent_buffers_set:
            state["_buffers"][leaf] = buffer.clone()  # running statistics of the whole network do not move
    state["_modules"] = {}
    for name, (position, child) in part.children.items():
        below = source._modules[position]
        dropping = isinstance(below, DropPath) or (child is not None and isinstance(child.module, DropPath))
        if below is None or child is None or dropping:  # a rate belongs to a block; where it is 0, there is no DropPath
            state["_modules"][name] = None if below is None else _shell(below, below)
        else:
            state["_modules"][name] = _bound(child, below)
    return copy


def _sliced(part: Slice | None, whole: Tensor | None) -> Tensor | None:
    return whole if part is None or whole is None else part.of(whole)


def _shell(module: nn.Module, source: nn.Module) -> nn.Module:
    """A copy of `module` alone, with hooks of its own; of the class of `source` for batch norms, which may be swapped
    for synchronized ones."""
    kind: Any = type(source) if isinstance(source, _BatchNorm) else type(module)
    copy: nn.Module = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    for hooks in _HOOKS:
        copy.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
    return copy


def _shifts(module: nn.Module) -> dict[str, Any]:
    """Window shifts of Swin's blocks."""
    return {name: part.shift_size for name, part in module.named_modules() if hasattr(part, "shift_size")}
