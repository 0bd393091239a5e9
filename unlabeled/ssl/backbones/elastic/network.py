"""Sub-networks of a backbone: timm models with parameters that are slices of the full backbone's.

timm builds each sub-network once, on the meta device: a tree of modules without values. `Elastic.take` copies that tree
and gives it slices of the full backbone's parameters. Width and blocks of a forward pass thus belong to the modules
that run it and to nothing else: several sub-networks may share one graph, activation checkpoints find the same slices
again, and a sub-network is by construction what timm builds and what is exported. Source of the slices: alipay/POA
(arXiv 2408.01031, section 3.1 and appendix).
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
"""Attributes that a sub-network's module takes from the full backbone's module, if both have them."""


class Elastic:
    """The sub-networks of backbones of one architecture. Their parameters come from the backbone passed to `take`.

    Batch norms: in train mode a sub-network normalizes with the statistics of its own batches and does not update the
    full backbone's running statistics; in eval mode it uses slices of these. They were measured on other inputs, so
    recompute them for extracted sub-networks: `unlabeled.eval.features.recalibrate`. With synchronized batch norms, all
    ranks must take the same size.

    Attributes: `sizes` (smallest first, the last is `full`), `family`.
    """

    def __init__(self, backbone: Backbone, config: ElasticConfig) -> None:
        """Raises CapabilityError for a backbone without sub-networks, ConfigError for sizes that it does not have."""
        self.family = family_of(backbone)
        self.name, self.kwargs, self.input_size = backbone.name, backbone.kwargs, backbone.input_size
        self.full: SubSize = self.family.read(backbone.model)
        self.config = config
        self.sizes = candidates(config, self.full, self.family.unit(backbone.model), self.family.remedy)
        self._arguments = {size: dict(self.family.arguments(backbone.model, size)) for size in self.sizes}
        self._trees: dict[SubSize, _Node] = {}
        # build one size of each width now, so that a width that timm rejects fails before training
        for width in {size.width for size in self.sizes}:
            self._tree(backbone, next(size for size in self.sizes if size.width == width))

    def blocks(self, size: SubSize) -> tuple[tuple[int, ...], ...]:
        """For each stage, the indices of the blocks that a sub-network keeps."""
        choose = alternating if self.family.shifts and self.config.block_order == "alternating" else evenly
        return tuple(choose(kept, total) for kept, total in zip(size.depths, self.full.depths, strict=True))

    def arguments(self, size: SubSize) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` for the sub-network, in addition to the model's name."""
        return self.kwargs | self._arguments[size]

    def take(self, backbone: Backbone, size: SubSize) -> Backbone:
        """The sub-network of `backbone`, in its graph: gradients reach the slices of the parameters that were used.

        For the full size this is `backbone` itself. Modes, drop rates and activation checkpointing are those that
        `backbone` has now; each block takes them from the block that it is a slice of.
        """
        return backbone if size == self.full else cast(Backbone, _bound(self._tree(backbone, size), backbone))

    @torch.no_grad()
    def extract(self, backbone: Backbone, size: SubSize) -> Backbone:
        """The sub-network of `backbone` as an independent backbone, which any copy of timm builds and loads strictly.

        Drop rates are those that timm gives a model of this depth. Raises ConfigError for a Swin whose kept blocks do
        not alternate between plain and shifted windows (`block_order=published`), since timm cannot build it.
        """
        alone = self._create(size)
        taken = self.take(backbone, size)
        if _shifts(alone) != _shifts(taken):
            raise ConfigError(
                f"elastic.block_order: published keeps blocks for {size} whose windows do not alternate, as those of "
                "every Swin that timm builds do; train with block_order=alternating, or extract another depth"
            )
        # the state dict copies the slices, so the extracted weights share no memory with `backbone`
        like = next(backbone.parameters())
        alone.to(device=like.device, dtype=like.dtype)
        alone.load_state_dict(taken.state_dict())
        alone.set_statistics(backbone.mean, backbone.std)
        alone.trained = True
        return alone.train(backbone.training)

    def _create(self, size: SubSize) -> Backbone:
        with torch.random.fork_rng(devices=[]):  # weights are replaced anyway: do not advance the global generator
            return create_backbone(self.name, size=self.input_size, **self.arguments(size))

    def _tree(self, backbone: Backbone, size: SubSize) -> _Node:
        if size not in self._trees:
            try:
                with torch.device("meta"):
                    skeleton = self._create(size)
            except ConfigError as error:
                # the cause is timm's own exception, without our advice on backbone settings
                reason = str(error.__cause__ or error).rstrip(".")
                raise CapabilityError(
                    f"backbone: {self.name} cannot be elastic: timm does not build it at width {size.width} ({reason})"
                ) from error
            # some models ignore the arguments for their size
            if self.family.read(skeleton.model) != size:
                raise CapabilityError(f"backbone: {self.name} cannot be elastic: timm does not build it in other sizes")
            paths = (f"model.{self.family.blocks(stage)}" for stage in range(len(size.depths)))
            self._trees[size] = _plan(skeleton, backbone, dict(zip(paths, self.blocks(size), strict=True)))
        return self._trees[size]


@dataclass(frozen=True)
class _Node:
    """A module of a sub-network, and how its tensors follow from the full backbone's."""

    module: nn.Module
    """The module as timm builds it, without values."""
    slices: Mapping[str, Slice]
    """Slices for its own parameters and buffers, by name."""
    children: Mapping[str, tuple[str, _Node | None]]
    """Name → name of the child in the full backbone's module, which differs for blocks, and its node."""


def _plan(
    module: nn.Module,
    source: nn.Module,
    kept: Mapping[str, Sequence[int]],
    path: str = "",
    parent: nn.Module | None = None,
) -> _Node:
    """The tree of nodes for `module`. `kept`: path of a list of blocks → indices of the blocks to keep."""
    role = path.rpartition(".")[2]
    slices = {
        leaf: _slice_of(source, leaf, parameter, axis_groups(parent, role, parameter.ndim))
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    # running statistics; a buffer that the full backbone does not fill stays empty
    for leaf, buffer in module._buffers.items():
        if buffer is not None and source._buffers[leaf] is not None:
            slices[leaf] = Slice(tuple(buffer.shape), (1,) * buffer.ndim)
    children: dict[str, tuple[str, _Node | None]] = {}
    for name, child in module._modules.items():
        # block i of the sub-network is block kept[i] of the full backbone; other modules have the same name in both
        source_name = str(kept[path][int(name)]) if path in kept else name
        below, inner = source._modules[source_name], f"{path}.{name}" if path else name
        node = None if child is None or below is None else _plan(child, below, kept, inner, module)
        children[name] = source_name, node
    return _Node(module, slices, children)


def _slice_of(source: nn.Module, leaf: str, parameter: Tensor, groups: tuple[int, ...]) -> Slice:
    """How `parameter` follows from the parameter `leaf` of `source`."""
    full = source.get_parameter(leaf)
    # layers that sum over input channels; a depthwise convolution does not
    sums = isinstance(source, nn.Linear) or (isinstance(source, nn.Conv2d) and source.groups == 1)
    scale = full.shape[1] / parameter.shape[1] if sums and leaf == "weight" else 1.0
    slice_ = Slice(tuple(parameter.shape), groups, scale)
    assert slice_.fits(full), f"{type(source).__name__}.{leaf}: {tuple(full.shape)} has no slice {slice_}"
    return slice_


def _bound(node: _Node, source: nn.Module) -> nn.Module:
    """A copy of the tree of modules that runs with slices of the parameters of `source`, and with its settings."""
    copy = _shell(node.module, source)
    # written to __dict__, since nn.Module.__setattr__ accepts only leaf parameters, and slices are not leaves
    slices, state = node.slices, copy.__dict__
    # whatever changed since the skeleton was built: modes, drop rates, statistics, checkpointing
    for name in _SETTINGS:
        if name in state and name in source.__dict__:
            state[name] = source.__dict__[name]
    parameters, buffers = source._parameters, source._buffers
    state["_parameters"] = {leaf: _sliced(slices.get(leaf), parameters[leaf]) for leaf in node.module._parameters}
    state["_buffers"] = {leaf: _sliced(slices.get(leaf), buffers[leaf]) for leaf in node.module._buffers}
    for leaf, buffer in state["_buffers"].items():
        if buffer is not None and leaf not in source._non_persistent_buffers_set:
            state["_buffers"][leaf] = buffer.clone()  # so that the full backbone's running statistics stay as they are
    state["_modules"] = {}
    for name, (source_name, child) in node.children.items():
        below = source._modules[source_name]
        # timm has DropPath only in blocks with a rate above 0, so take whatever the full backbone's block has
        dropping = isinstance(below, DropPath) or (child is not None and isinstance(child.module, DropPath))
        if below is None or child is None or dropping:
            state["_modules"][name] = None if below is None else _shell(below, below)
        else:
            state["_modules"][name] = _bound(child, below)
    return copy


def _sliced(slice_: Slice | None, full: Tensor | None) -> Tensor | None:
    return full if slice_ is None or full is None else slice_.of(full)


def _shell(module: nn.Module, source: nn.Module) -> nn.Module:
    """A copy of `module` without its children, with its own dicts of hooks. A batch norm gets the class of `source`,
    which may have been converted to a synchronized one."""
    kind: Any = type(source) if isinstance(source, _BatchNorm) else type(module)
    # no __init__, which would allocate and draw weights
    copy: nn.Module = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    for hooks in _HOOKS:
        copy.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
    return copy


def _shifts(module: nn.Module) -> dict[str, Any]:
    """Window shifts of Swin's blocks."""
    return {name: child.shift_size for name, child in module.named_modules() if hasattr(child, "shift_size")}
