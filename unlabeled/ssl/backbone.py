"""Any timm model behind one small surface, and what it is capable of."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from unlabeled.ssl.errors import CapabilityError, ConfigError, nearest

CAPABILITIES: dict[str, str] = {
    "dense_map": "unlabeled.ssl.backbone:_lacks_dense_map",
    "token_dropping": "unlabeled.ssl.tokens:lacks_token_dropping",
}
"""Capability → ``"module:function"``; the function takes a Backbone and says in a few words why it lacks it, or None."""


class Stage(NamedTuple):
    """One level of a backbone's feature maps."""

    channels: int
    stride: int
    """Pixels of the input per place of the map."""


class Backbone(nn.Module):
    """A timm model (or any module with timm's surface) as a feature extractor without a head.

    Attributes: `model`, `name` and `kwargs` (what ``timm.create_model`` needs to build it again), `embed_dim`,
    `stages`, `input_size` (h, w), `depth` (number of blocks), `mean` and `std` (of the pictures, for 0..1 values).
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "custom",
        kwargs: dict[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.kwargs = dict(kwargs or {})
        self.trained = False
        data = resolve_model_data_config(model)
        self.input_size: tuple[int, int] = size or (int(data["input_size"][-2]), int(data["input_size"][-1]))
        self.mean: tuple[float, ...] = tuple(data["mean"])
        self.std: tuple[float, ...] = tuple(data["std"])
        self.stages: list[Stage] = [Stage(info["num_chs"], info["reduction"]) for info in _feature_info(model)]
        self.embed_dim = int(cast(Any, model).head_hidden_size if hasattr(model, "head_hidden_size") else 0) or int(
            cast(Any, model).num_features
        )
        self.depth = max(self.parameter_layers().values(), default=1) - 1
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or 0..1 float (B, 3, H, W) → normalised float32 (B, 3, H, W), on the images' device."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (scaled - cast(Tensor, self._mean)) / cast(Tensor, self._std)

    def pooled(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) → (B, embed_dim), as timm's ``forward_head(..., pre_logits=True)`` gives it."""
        model = cast(Any, self.model)
        features: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
        return features.flatten(1)

    def map(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) → (B, C, H', W'), the last feature map."""
        return self.maps(x, [len(self.stages) - 1])[0]

    def maps(self, x: Tensor, indices: Iterable[int]) -> list[Tensor]:
        """Feature maps (B, C_i, H_i, W_i) of the stages `indices`."""
        maps: list[Tensor] = cast(Any, self.model).forward_intermediates(
            x, indices=list(indices), output_fmt="NCHW", intermediates_only=True
        )
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Same as `pooled`."""
        return self.pooled(x)

    def lacks(self, capability: str) -> str | None:
        """Why this backbone lacks `capability`, in a few words; None when it has it."""
        module, _, function = CAPABILITIES[capability].partition(":")
        reason: str | None = getattr(importlib.import_module(module), function)(self)
        return reason

    def require(self, capabilities: Iterable[str], *, task: str) -> None:
        """Raises CapabilityError naming the backbone, the task, what is missing, and what would do instead."""
        for capability in sorted(capabilities):
            if (reason := self.lacks(capability)) is not None:
                raise CapabilityError(f"backbone: {self.name} cannot do {task}: it lacks {capability} ({reason})")

    def parameter_layers(self) -> dict[str, int]:
        """Name of each parameter (relative to this module) → layer for layer-wise decay: 0 stem .. depth + 1.

        Blocks count over all stages; what stands before the first block is the stem (0), what stands between two
        blocks belongs to the earlier one, what follows the last block gets depth + 1.
        """
        names = [f"model.{name}" for name, _ in self.model.named_parameters()]
        return dict(zip(names, block_layers(names), strict=True))


_BLOCK = re.compile(r"(?:^|\.)((?:layers?\d*|stages?\d*)\.\d+(?:\.blocks)?\.\d+|(?:layer|stage)\d+\.\d+|blocks\.\d+(?:\.\d+)?)\.")


def block_layers(names: Iterable[str]) -> list[int]:
    """Layer of each parameter name in module order; see `Backbone.parameter_layers`."""
    ordered = list(names)
    keys = [match.group(1) if (match := _BLOCK.search(name)) else None for name in ordered]
    blocks = {key: position + 1 for position, key in enumerate(dict.fromkeys(key for key in keys if key))}
    layers, current = [], 0
    for key in keys:
        current = blocks[key] if key else current
        layers.append(current)
    last = max((position for position, key in enumerate(keys) if key), default=-1)
    return [layer if position <= last else len(blocks) + 1 for position, layer in enumerate(layers)]


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None)
    if info is None:
        raise CapabilityError(f"backbone: {type(model).__name__} has no feature_info; give a timm model or one like it")
    return list(info if isinstance(info, list) else info.info)


def _lacks_dense_map(backbone: Backbone) -> str | None:
    return None if hasattr(backbone.model, "forward_intermediates") else "no forward_intermediates"


def create_backbone(
    name: str,
    *,
    pretrained: bool = False,
    size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> Backbone:
    """Builds timm model `name` without a head; `size` is passed on as ``img_size`` where the model takes one.

    Raises ConfigError for an unknown name (with the nearest ones) and for arguments that the model refuses.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"backbone.name: {name!r} is not a timm model; {nearest(name, timm.list_models())}")
    pixels = (size, size) if isinstance(size, int) else size
    arguments: dict[str, Any] = {"num_classes": 0, **kwargs}
    if pixels is not None and _takes_img_size(name):
        arguments.setdefault("img_size", pixels)
    model = timm.create_model(name, pretrained=pretrained, **arguments)
    return Backbone(model, name, arguments, pixels)


def _takes_img_size(name: str) -> bool:
    module = inspect.getmodule(timm.model_entrypoint(name.split(".")[0]))
    return "img_size" in inspect.getsource(cast(Any, module))
