"""Any timm model behind one small interface, and the capabilities it has."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

import unlabeled.ssl.backbones.networks  # noqa: F401  registers our own architectures with timm
from unlabeled.ssl.backbones.layer_index import block_layers, count_blocks
from unlabeled.ssl.backbones.outline import outline, reinitialized, unfilled
from unlabeled.ssl.backbones.shapes import Shapes, probe_shapes, reached_by_maps, reached_by_pooled
from unlabeled.ssl.config.messages import in_short
from unlabeled.ssl.core.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    MissingCapabilityError,
    first_line,
    nearest,
)
from unlabeled.ssl.core.plain import class_path

__all__ = ["CAPABILITIES", "CUSTOM", "Backbone", "FeatureStage", "block_layers", "create_backbone"]

CAPABILITIES: dict[str, str] = {
    "pooled": "unlabeled.ssl.backbones.backbone:_pooled_missing_reason",
    "dense_map": "unlabeled.ssl.backbones.backbone:_dense_map_missing_reason",
    "token_dropping": "unlabeled.ssl.backbones.masked.tokens:token_dropping_missing_reason",
    "masked_stages": "unlabeled.ssl.backbones.masked.stages:masked_stages_missing_reason",
    "sparse_convs": "unlabeled.ssl.backbones.masked.sparse:sparse_convs_missing_reason",
    "elastic": "unlabeled.ssl.backbones.elastic:elastic_missing_reason",
}
"""Capability → ``"module:function"``. The function takes a Backbone and returns why the capability is missing, or None.

Named by path, not imported: those modules import this one."""

CUSTOM = "custom"
"""Written in place of a timm name in settings and exports."""
_DEFAULT_STRIDE = 32
"""Assumed stride, in pixels, for a backbone without feature maps to measure."""


class FeatureStage(NamedTuple):
    """One level of a backbone's feature hierarchy."""

    channels: int
    stride: int
    """Input pixels per position of the map."""


class Backbone(nn.Module):
    """A timm model, or any module with timm's methods, as a feature extractor without a head.

    >>> backbone = unlabeled.Backbone(MyNet(), size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))

    The module needs ``forward_features(x)`` and ``forward_head(features, pre_logits=True)``, which return the pooled
    features. Feature maps also need ``feature_info`` and ``forward_intermediates(x, indices, output_fmt,
    intermediates_only)``. Widths and strides are measured rather than read (see `unlabeled.ssl.backbones.shapes`).

    `name` and `kwargs` are the arguments that ``timm.create_model`` built the model with; `name` is None for a module
    of your own. `size` is in pixels, one number or (h, w); `mean` and `std` are on the 0..1 scale. They default to the
    model's ``pretrained_cfg``, else to 224 and ImageNet's statistics.

    Attributes: `model`, `name` (the class name if there is no timm name), `custom` (whether there is no timm name),
    `origin` (``package.module:Class``), `kwargs`, `embed_dim`, `stages` (empty without feature maps), `input_size`
    (h, w), `depth` (number of blocks), `mean`, `std`.

    Raises CapabilityError for a module without these methods and ConfigError for a size that it cannot take.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str | None = None,
        kwargs: dict[str, Any] | None = None,
        size: int | tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_surface(model)
        self.model = model
        self.custom = name is None or name == CUSTOM
        self.name = type(model).__name__ if name is None or self.custom else name
        self.origin = class_path(type(model))
        self.kwargs = dict(kwargs or {})
        self.trained = False
        """Whether it starts from trained weights, which a task then leaves as they are."""
        data = resolve_model_data_config(model)
        self.input_size: tuple[int, int] = _pixels(size) or (int(data["input_size"][-2]), int(data["input_size"][-1]))
        self.mean = _statistics("mean", data["mean"] if mean is None else mean)
        self.std = _statistics("std", data["std"] if std is None else std)
        self._shapes = _measure(model, self.name, self.input_size, self.custom)
        self.embed_dim: int = self._shapes.pooled[0]
        self.stages: list[FeatureStage] = _stages(model, self._shapes, self.input_size)
        self.depth = count_blocks(name for name, _ in model.named_parameters())
        # In a tuple, so that it is not registered as a submodule. Taken now, before a task changes the model.
        self._outline: tuple[nn.Module, ...] = (outline(model),) if self.custom else ()
        # not persistent: state dicts have the names and tensors of the timm model, nothing else
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or 0..1 float (B, 3, H, W) → normalized float32 (B, 3, H, W), on the images' device."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (scaled - cast(Tensor, self._mean)) / cast(Tensor, self._std)

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Sets the `mean` and `std`, on the 0..1 scale, that `normalize` uses from now on."""
        self.mean, self.std = mean, std
        # in place, so that the buffers stay on their device
        cast(Tensor, self._mean).copy_(torch.tensor(mean).view(1, -1, 1, 1))
        cast(Tensor, self._std).copy_(torch.tensor(std).view(1, -1, 1, 1))

    def pooled(self, x: Tensor) -> Tensor:
        """Normalized (B, 3, H, W) → (B, embed_dim), the result of timm's ``forward_head(..., pre_logits=True)``."""
        model = cast(Any, self.model)
        features: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
        # some heads keep 1x1 spatial axes
        return features.flatten(1)

    def map(self, x: Tensor) -> Tensor:
        """Normalized (B, 3, H, W) → (B, C, H', W'), the last feature map."""
        return self.maps(x, [-1])[0]

    def maps(self, x: Tensor, indices: Iterable[int]) -> list[Tensor]:
        """Feature maps (B, C_i, H_i, W_i) of the stages `indices`, in that order; negative indices count from the end.

        Raises CapabilityError for a stage that the backbone does not have.
        """
        requested = list(indices)
        count = len(self.stages)
        if missing := [index for index in requested if not -count <= index < count]:
            raise CapabilityError(f"backbone: {self.name} has {count} feature maps; there is no number {missing[0]}")
        positions = [index % count for index in requested]
        ascending = sorted(set(positions))  # timm returns maps in network order, whatever order you ask for
        found: list[Tensor] = cast(Any, self.model).forward_intermediates(
            x, indices=ascending, output_fmt="NCHW", intermediates_only=True
        )
        return [found[ascending.index(position)] for position in positions]

    def forward(self, x: Tensor) -> Tensor:
        """Same as `pooled`."""
        return self.pooled(x)

    def missing_reason(self, capability: str) -> str | None:
        """Why this backbone is missing `capability`, in a few words; None if it has it."""
        if capability not in CAPABILITIES:
            raise CapabilityError(f"capability: {capability!r} is unknown; {nearest(capability, CAPABILITIES)}")
        module, _, function = CAPABILITIES[capability].partition(":")
        reason: str | None = getattr(importlib.import_module(module), function)(self)
        return reason

    def lacks(self, capability: str) -> str | None:
        """Old name of `missing_reason`."""
        return self.missing_reason(capability)

    def require(self, capabilities: Iterable[str], *, task: str) -> None:
        """Raises MissingCapabilityError naming the backbone, the task and the first missing capability."""
        for capability in sorted(capabilities):
            if (reason := self.missing_reason(capability)) is not None:
                raise MissingCapabilityError(
                    f"backbone: {self.name} cannot do {task}: it lacks {capability} ({reason})"
                )

    def size_step(self) -> tuple[int, int]:
        """Multiples (h, w) that image sides should be: of the largest stride of the maps, and of the patch size."""
        embed = getattr(self.model, "patch_embed", None)
        patch = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
        stride = max((stage.stride for stage in self.stages), default=_DEFAULT_STRIDE)
        return math.lcm(stride, int(patch[0])), math.lcm(stride, int(patch[1]))

    def refuses(self, size: tuple[int, int]) -> str | None:
        """Why the backbone, built for `input_size`, cannot take images of `size`; None if it can."""
        try:
            shapes = probe_shapes(self.model, size)
        except Exception as error:  # a model's forward may raise anything
            return first_line(error)
        # models that flatten their map into a linear layer accept other sizes only without that layer
        return None if shapes.pooled == self._shapes.pooled else "its features then have another width"

    def parameter_layers(self) -> dict[str, int]:
        """Parameter name (relative to this module) → layer for layer-wise decay: 0 for the stem, up to depth + 1."""
        names = [name for name, _ in self.model.named_parameters()]
        return dict(zip((f"model.{name}" for name in names), block_layers(names), strict=True))

    def twin(self) -> Backbone:
        """The same architecture with fresh random weights and the same image statistics.

        A module without a timm name is reinitialized by its layers' own ``reset_parameters``. Raises ConfigError when
        some of its parameters have no such method.
        """
        return self._rewrap(reinitialized(self._outline[0], self.name)) if self.custom else self.unfilled()

    def unfilled(self) -> Backbone:
        """The same architecture, for weights that are loaded next; its own values mean nothing."""
        if self.custom:
            return self._rewrap(unfilled(self._outline[0]))
        rebuilt = create_backbone(self.name, size=self.input_size, **self.kwargs)
        rebuilt.set_statistics(self.mean, self.std)
        return rebuilt

    def _rewrap(self, model: nn.Module) -> Backbone:
        """`model` in a Backbone with the size, statistics, name and origin of this one."""
        backbone = Backbone(model, size=self.input_size, mean=self.mean, std=self.std)
        backbone.name, backbone.origin = self.name, self.origin
        return backbone

    def reached_by_pooled(self) -> set[str]:
        """Names of the parameters (relative to this module) that the pooled features depend on."""
        return {f"model.{name}" for name in reached_by_pooled(self.model, self.input_size)}

    def reached_by_maps(self, indices: Iterable[int]) -> set[str]:
        """Names of the parameters (relative to this module) that the feature maps `indices` depend on."""
        positions = sorted({index % len(self.stages) for index in indices})
        return {f"model.{name}" for name in reached_by_maps(self.model, self.input_size, positions)}


def create_backbone(
    name: str,
    *,
    pretrained: bool = False,
    size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> Backbone:
    """Builds timm model `name` without a head. `size` is passed on as ``img_size`` if the model takes one.

    Raises ConfigError for an unknown name (listing the nearest ones), for arguments that the model does not take and
    for a size that does not fit it; CheckpointError when published weights cannot be downloaded.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"backbone.name: {name!r} is not a timm model; {nearest(name, timm.list_models())}")
    if kwargs.get("in_chans", 3) != 3:
        raise ConfigError(f"backbone.kwargs.in_chans: {kwargs['in_chans']} is not possible; images are RGB, give 3")
    pixels = _pixels(size)
    own = _pixels(kwargs.get("img_size"))
    if pixels and own and pixels != own:
        raise ConfigError(f"backbone.size: {size} and backbone.kwargs.img_size: {own[0]}x{own[1]} differ; give one")
    pixels = pixels or own
    arguments: dict[str, Any] = {"num_classes": 0, **kwargs}
    # fixed-size models (ViT, Swin) need img_size at construction; the others reject it and take any size
    if pixels is not None:
        try:
            return _create(name, pretrained, arguments | {"img_size": pixels}, pixels)
        except _UnknownArgumentError as error:
            if error.argument != "img_size" or own:
                raise
    return _create(name, pretrained, arguments, pixels)


def _create(name: str, pretrained: bool, arguments: dict[str, Any], size: tuple[int, int] | None) -> Backbone:
    backbone = Backbone(_build(name, pretrained, arguments), name, arguments, size)
    backbone.trained = pretrained
    return backbone


class _UnknownArgumentError(ConfigError):
    def __init__(self, model: str, argument: str) -> None:
        super().__init__(f"backbone.kwargs.{argument}: {model} takes no such argument; remove it")
        self.argument = argument


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # constructors and the hub raise anything; report it in one line
        # timm has no exception of its own for this, so the argument's name is taken from Python's message
        if match := re.search(r"unexpected keyword argument[^']*'(\w+)'", str(error)):
            raise _UnknownArgumentError(name, match.group(1)) from error
        if pretrained and not isinstance(error, (AssertionError, TypeError)):
            remedy = f"give a file (backbone.checkpoint=FILE, or `unlabeled evaluate FILE backbone={name}`)"
            reason = f"no weights for {name} ({first_line(error)})"
            if isinstance(error, LocalEntryNotFoundError):  # its text is long and does not name the model
                reason = f"cannot download {name} (no connection to the Hugging Face Hub)"
            raise CheckpointError(f"backbone.pretrained: {reason}; {remedy}, or set pretrained=false") from error
        raise ConfigError(f"backbone: {name} cannot be built with {arguments} ({first_line(error)})") from error
    return model


def _check_surface(model: Any) -> None:
    """Raises CapabilityError unless `model` has timm's methods."""
    if isinstance(model, type):
        raise CapabilityError(f"backbone: {in_short(model)} is a class; build it: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise CapabilityError(
            f"backbone: {in_short(model)} is not an nn.Module; build one, or give a timm name to create_backbone"
        )
    for method in ("forward_features", "forward_head"):
        if not callable(getattr(model, method, None)):
            needed = "forward_features(x) and forward_head(features, pre_logits=True), as timm's models have"
            raise CapabilityError(f"backbone: {type(model).__name__} has no {method}; a backbone needs {needed}")


def _statistics(field: str, values: Sequence[float]) -> tuple[float, ...]:
    """`values` as three floats, one per channel. Raises ConfigError for anything else."""
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or (field == "std" and min(found) <= 0):
        sign = "positive numbers" if field == "std" else "numbers"
        raise ConfigError(f"backbone.{field}: {values!r} is not possible; give three {sign}, one per channel")
    return found


def _measure(model: nn.Module, name: str, size: tuple[int, int], custom: bool) -> Shapes:
    """Output shapes of the model at `size`. Raises ConfigError if it cannot take that size."""
    shown = f"{size[0]}x{size[1]}"
    patches = getattr(model, "patch_embed", None)
    if isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad:
        # timm would silently cut off the rest of the image
        for pixels, patch in zip(size, cast(tuple[int, int], patches.patch_size), strict=True):
            if pixels % patch:
                near = " or ".join(str(patch * n) for n in (pixels // patch, pixels // patch + 1) if n)
                raise ConfigError(f"backbone.size: {shown} is not a multiple of {name}'s patch, {patch}; give {near}")
    try:
        return probe_shapes(model, size)
    except Exception as error:  # a model's forward may raise anything; report it in one line, with its cause
        if custom:
            raise ConfigError(
                f"backbone: {name} fails on an image of 3x{shown} ({first_line(error)}); give the size that it takes, "
                "as unlabeled.Backbone(module, size=(h, w)), or fix its forward_features and forward_head"
            ) from error
        raise ConfigError(
            f"backbone.size: {name} cannot take images of {shown} ({first_line(error)}); give another backbone.size"
        ) from error


def _stages(model: nn.Module, shapes: Shapes, size: tuple[int, int]) -> list[FeatureStage]:
    """Channels and stride of each map: the stated stride, unless it is far from the map's measured size."""
    if shapes.maps is None or not all(len(shape) == 3 for shape in shapes.maps):
        return []
    info = getattr(model, "feature_info", [])
    stated = [int(one["reduction"]) for one in (info if isinstance(info, list) else info.info)]
    stages = []
    for position, (channels, height, _) in enumerate(shapes.maps):
        measured = max(1, round(size[0] / height))
        stride = stated[position] if len(stated) == len(shapes.maps) else measured
        # maps of models without padding are up to four positions smaller than their stride implies
        near = abs(size[0] / stride - height) <= max(4.0, 0.25 * height)
        stages.append(FeatureStage(channels, stride if near else measured))
    return stages


def _pixels(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        sides = (size, size) if isinstance(size, int) else () if isinstance(size, str) else size  # "64" is not 6 x 4
        height, width = (int(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ConfigError(f"backbone.size: {size!r} is not possible; give pixels, one number or (height, width)")
    return height, width


def _pooled_missing_reason(backbone: Backbone) -> str | None:
    # (D, 1, 1) counts as pooled: `Backbone.pooled` flattens it
    shape = backbone._shapes.pooled
    if all(length == 1 for length in shape[1:]):
        return None
    return f"its head does not pool but returns {tuple(shape)} for an image"


def _dense_map_missing_reason(backbone: Backbone) -> str | None:
    if backbone.stages:
        return None
    maps = backbone._shapes.maps
    return "no forward_intermediates" if maps is None else f"its features are not maps but of shape {maps[0]}"
