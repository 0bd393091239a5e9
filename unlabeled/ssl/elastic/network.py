"""Sub-networks of a network, as timm models whose parameters are slices of its own.

A sub-network is built by timm at its size once, and its parameters are thrown away; whenever it is taken, a copy of
that module tree (not of tensors) gets slices of the whole network's parameters in their place. So the width and the
blocks of a forward pass belong to the module that runs it and to nothing else: several sub-networks may be in one
graph, activation checkpoints find the same slices again, and a sub-network is by construction what timm builds and
what is exported. Source of the slices: alipay/POA (arXiv 2408.01031, section 3.1 and appendix).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.ssl.backbone import Backbone, create_backbone
from unlabeled.ssl.elastic.config import ElasticConfig
from unlabeled.ssl.elastic.families import axis_groups, family_of
from unlabeled.ssl.elastic.sizes import SubSize, alternating, candidates, evenly
from unlabeled.ssl.elastic.slices import Slice

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
_SETTINGS = ("training", "drop_prob", "grad_checkpointing", "p")
"""What a module of a sub-network has from the one whose parameters it runs with."""


class Elastic:
    """The sub-networks of networks of one architecture; their parameters come from whichever is given.

    Attributes: `sizes` (smallest first, the last is `full`), `family`.
    """

    def __init__(self, backbone: Backbone, config: ElasticConfig) -> None:
        """Raises CapabilityError for a network without sub-networks, ConfigError for sizes that it does not have."""
        self.family = family_of(backbone)
        self.name, self.kwargs, self.input_size = backbone.name, backbone.kwargs, backbone.input_size
        self.full: SubSize = self.family.read(backbone.model)
        self.config = config
        self.sizes = candidates(config, self.full, self.family.unit(backbone.model))
        self._arguments = {size: dict(self.family.arguments(backbone.model, size)) for size in self.sizes}
        self._built: dict[SubSize, tuple[Backbone, dict[str, Slice]]] = {}

    def blocks(self, size: SubSize) -> tuple[tuple[int, ...], ...]:
        """Numbers of the blocks that a sub-network keeps of each stage."""
        choose = alternating if self.family.shifts and self.config.block_order == "alternating" else evenly
        return tuple(choose(kept, whole) for kept, whole in zip(size.depths, self.full.depths, strict=True))

    def arguments(self, size: SubSize) -> dict[str, Any]:
        """What ``timm.create_model`` builds the sub-network from, beside the network's name."""
        own = {key: value for key, value in self.kwargs.items() if key != "img_size"}
        return own | self._arguments[size]

    def take(self, backbone: Backbone, size: SubSize) -> Backbone:
        """The sub-network of `backbone` in its graph: gradients reach the parts of its parameters that were used.

        The whole network's own for its full size. Modes, rates of dropping and activation checkpointing are those of
        `backbone` at this moment.
        """
        if size == self.full:
            return backbone
        skeleton, slices = self._skeleton(backbone, size)
        parameters = dict(backbone.named_parameters())
        tensors = {name: part.of(parameters[part.source]) for name, part in slices.items()}
        modules = dict(backbone.named_modules())
        sources = {name: modules[self._source(name, size)] for name, _ in skeleton.named_modules()}
        taken = _bound(skeleton, tensors, sources)
        taken.set_statistics(backbone.mean, backbone.std)
        return taken

    @torch.no_grad()
    def extract(self, backbone: Backbone, size: SubSize) -> Backbone:
        """The sub-network of `backbone` as a network of its own, which any copy of timm builds and loads strictly."""
        alone = create_backbone(self.name, size=self.input_size, **self.arguments(size))
        parameters = dict(backbone.named_parameters())
        _, slices = self._skeleton(backbone, size)
        for name, parameter in alone.named_parameters():
            parameter.copy_(slices[name].of(parameters[slices[name].source]))
        buffers = dict(backbone.named_buffers())
        for name, buffer in alone.named_buffers():
            whole = buffers.get(self._source(name, size))
            if whole is not None and whole.shape == buffer.shape:
                buffer.copy_(whole)
        alone.set_statistics(backbone.mean, backbone.std)
        if self.config.block_order == "published" and self.family.shifts:
            self._keep_shifts(alone, backbone, size)
        return alone.to(next(backbone.parameters()).device).train(backbone.training)

    def _skeleton(self, backbone: Backbone, size: SubSize) -> tuple[Backbone, dict[str, Slice]]:
        """The sub-network without parameters, on the device and in the type of `backbone`, and its slices."""
        like = next(backbone.parameters())
        if size not in self._built:
            with torch.random.fork_rng(devices=[]):
                skeleton = create_backbone(self.name, size=self.input_size, **self.arguments(size))
            slices = {
                name: self._slice(skeleton, backbone, name, tuple(parameter.shape), size)
                for name, parameter in skeleton.named_parameters()
            }
            if self.config.block_order == "published" and self.family.shifts:
                self._keep_shifts(skeleton, backbone, size)
            _forget_parameters(skeleton)
            self._built[size] = skeleton, slices
        skeleton, slices = self._built[size]
        for module in skeleton.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(like.device, like.dtype if buffer.is_floating_point() else None)
        return skeleton, slices

    def _slice(self, skeleton: Backbone, backbone: Backbone, name: str, shape: tuple[int, ...], size: SubSize) -> Slice:
        source = self._source(name, size)
        whole = backbone.get_parameter(source)
        groups = axis_groups(backbone.model, source.removeprefix("model."), shape)
        owner = backbone.get_submodule(source.rpartition(".")[0])
        sums = isinstance(owner, nn.Linear) or (isinstance(owner, nn.Conv2d) and owner.groups == 1)
        scale = whole.shape[1] / shape[1] if sums and name.endswith(".weight") else 1.0
        return Slice(source, shape, groups, scale)

    def _source(self, name: str, size: SubSize) -> str:
        """The whole network's name of a module or parameter of a sub-network."""
        for stage, kept in enumerate(self.blocks(size)):
            prefix = f"model.{self.family.blocks(stage)}."
            if name.startswith(prefix):
                number, dot, rest = name.removeprefix(prefix).partition(".")
                return f"{prefix}{kept[int(number)]}{dot}{rest}"
        return name

    def _keep_shifts(self, alone: Backbone, backbone: Backbone, size: SubSize) -> None:
        """Gives each block the window shift of the one that it comes from."""
        modules = dict(backbone.named_modules())
        for name, module in alone.named_modules():
            if hasattr(module, "shift_size") and hasattr(module, "attn_mask"):
                source = cast(Any, modules[self._source(name, size)])
                module.shift_size = source.shift_size
                module.register_buffer(
                    "attn_mask", None if source.attn_mask is None else source.attn_mask.clone(), False
                )


def _forget_parameters(module: nn.Module) -> None:
    """Leaves shapes alone."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _bound(module: ModuleT, tensors: dict[str, Tensor], sources: dict[str, nn.Module], name: str = "") -> ModuleT:
    """A copy of the tree of modules that runs with `tensors`, by name, and with the settings of `sources`."""
    source, prefix = sources[name], f"{name}." if name else ""
    kind: Any = type(source) if isinstance(source, _BatchNorm) else type(module)
    copy: ModuleT = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    for setting in _SETTINGS:
        if setting in source.__dict__ and setting in module.__dict__:
            copy.__dict__[setting] = source.__dict__[setting]
    for hooks in _HOOKS:
        if hooks in module.__dict__:
            copy.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
    copy.__dict__["_parameters"] = {
        leaf: None if parameter is None else tensors[prefix + leaf] for leaf, parameter in module._parameters.items()
    }
    copy.__dict__["_buffers"] = dict(module._buffers)
    copy.__dict__["_modules"] = {
        child: None if part is None else _bound(part, tensors, sources, prefix + child)
        for child, part in module._modules.items()
    }
    return copy
