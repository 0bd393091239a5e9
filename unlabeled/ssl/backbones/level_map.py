"""One feature map of a network, for tasks that compare places: which one, how large, and what it depends on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import probed, reached_by
from unlabeled.ssl.core.errors import CapabilityError, ConfigError


class LevelMap:
    """Map number `level` of a network of the architecture of `backbone`; negative ones count from the last.

    The last map is taken after the network's final norm, where the network can do that (transformers are trained with
    it). For any other map the network is run no further than it takes.

    Attributes: `channels`, `grid` (places (gh, gw) for an image of the backbone's own size).
    """

    def __init__(self, backbone: Backbone, level: int, *, task: str, positions: int = 1) -> None:
        """`positions`: how many the map must have along each side; `task`: who asks, for messages.

        Raises ConfigError for a level that the backbone does not have, CapabilityError for too few places.
        """
        count = len(backbone.stages)
        if not -count <= level < count:
            raise ConfigError(f"task.level: {backbone.name} has no map {level}; choose from {-count} to {count - 1}")
        self.index = level % count
        self._options = _options(backbone, self.index)
        self.channels, *_ = _shape(backbone, self.index, self._options)
        self.grid = self.grid_of(backbone, backbone.input_size)
        if min(self.grid) < positions:
            raise CapabilityError(_too_small(backbone, self, task, positions))

    def __call__(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Normalized (B, 3, H, W) → (B, channels, gh, gw), by the weights of `backbone`."""
        return _map(backbone.model, images, self.index, self._options)

    def grid_of(self, backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
        """Places (gh, gw) of the map for images of `size` (h, w)."""
        _, rows, columns = _shape(backbone, self.index, self._options, size)
        return rows, columns

    def reached(self, backbone: Backbone) -> set[str]:
        """Names of the parameters (relative to `backbone`) that the map depends on."""
        found = reached_by(
            backbone.model, backbone.input_size, lambda net, x: [_map(net, x, self.index, self._options)]
        )
        return {f"model.{name}" for name in found}

    @property
    def normed(self) -> bool:
        """Whether the map comes after the network's final norm."""
        return "norm" in self._options


def _map(model: nn.Module, images: Tensor, index: int, options: dict[str, bool]) -> Tensor:
    maps: list[Tensor] = cast(Any, model).forward_intermediates(
        images, indices=[index], output_fmt="NCHW", intermediates_only=True, **options
    )
    return maps[0]


def _options(backbone: Backbone, index: int) -> dict[str, bool]:
    """The final norm with the last map and an early stop before any other, as far as the network knows them."""
    wanted = {"norm": True} if index == len(backbone.stages) - 1 else {"stop_early": True}
    try:
        _shape(backbone, index, wanted)
    except (AssertionError, TypeError, NotImplementedError):  # Hiera, which pools first, cannot norm its maps
        return {}
    return wanted


@torch.no_grad()
def _shape(
    backbone: Backbone, index: int, options: dict[str, bool], size: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """(C, gh, gw) of a map, for images of `size`, or of the backbone's own."""
    pixels = size or backbone.input_size
    shape = probed(backbone.model, pixels, lambda net, x: _map(net, x, index, options).shape)
    return shape[1], shape[2], shape[3]


def _too_small(backbone: Backbone, found: LevelMap, task: str, positions: int) -> str:
    """The message for a map of too few places, with the nearest one that has enough, if there is one."""
    count, size = len(backbone.stages), backbone.input_size
    remedies = ["a smaller backbone.kwargs.output_stride (if the network has that) or a larger backbone.size"]
    for index in range(found.index):
        _, rows, columns = _shape(backbone, index, {})
        if min(rows, columns) >= positions:
            remedies[:-1] = [f"task.level={index - count} ({rows}x{columns})"]
    shown = f"{found.grid[0]}x{found.grid[1]} places at {size[0]}x{size[1]} pixels"
    return (
        f"backbone: {backbone.name} cannot do {task}: map {found.index - count} has {shown}, "
        f"at least {positions}x{positions} are needed; set {', '.join(remedies)}"
    )
