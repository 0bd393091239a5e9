"""What a network costs: its weights, and multiply-adds for one image.

Counted in a forward pass on the meta device, so that no weight is made. All blocks of a stage but the first cost the
same; so the cost is linear in the depth of each stage, and a width needs one network and one more for each stage that
varies, not one for each of its sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic.network import Elastic
from unlabeled.ssl.backbones.elastic.sizes import SubSize
from unlabeled.ssl.backbones.shapes import probed


class Cost(NamedTuple):
    """Of one network."""

    parameters: int
    macs: int
    """Multiply-adds of matrix products and convolutions for one image."""


def cost_of(backbone: Backbone) -> Cost:
    """The cost of `backbone` for an image of its own size."""
    return _cost(backbone.model, backbone.input_size)


def costs_of(elastic: Elastic, backbone: Backbone) -> dict[SubSize, Cost]:
    """The cost of each size of `elastic`, smallest first; `backbone` is the whole network, weights or none."""
    costs: dict[SubSize, Cost] = {}
    for width in dict.fromkeys(size.width for size in elastic.sizes):
        wide = [size for size in elastic.sizes if size.width == width]
        least = SubSize(width, tuple(map(min, zip(*(size.depths for size in wide), strict=True))))
        base = _sub_cost(elastic, backbone, least)
        steps = [
            _difference(_sub_cost(elastic, backbone, _deeper(least, stage)), base)
            if any(size.depths[stage] > depth for size in wide)
            else Cost(0, 0)
            for stage, depth in enumerate(least.depths)
        ]
        costs |= {size: _deepened(base, steps, size, least) for size in wide}
    return costs


def _sub_cost(elastic: Elastic, backbone: Backbone, size: SubSize) -> Cost:
    arguments = {**elastic.kwargs, **elastic.family.arguments(backbone.model, size)}
    with torch.device("meta"):
        model = timm.create_model(elastic.name, **arguments)
    return _cost(model, elastic.input_size)


def _cost(model: nn.Module, size: tuple[int, int]) -> Cost:
    @torch.no_grad()
    def count(net: Any, x: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            net.forward_head(net.forward_features(x), pre_logits=True)
        return int(counter.get_total_flops()) // 2

    return Cost(sum(parameter.numel() for parameter in model.parameters()), probed(model, size, count))


def _deeper(size: SubSize, stage: int) -> SubSize:
    return SubSize(size.width, tuple(depth + (stage == position) for position, depth in enumerate(size.depths)))


def _difference(larger: Cost, smaller: Cost) -> Cost:
    return Cost(larger.parameters - smaller.parameters, larger.macs - smaller.macs)


def _deepened(base: Cost, steps: Sequence[Cost], size: SubSize, least: SubSize) -> Cost:
    added = [deep - low for deep, low in zip(size.depths, least.depths, strict=True)]
    return Cost(
        base.parameters + sum(blocks * step.parameters for blocks, step in zip(added, steps, strict=True)),
        base.macs + sum(blocks * step.macs for blocks, step in zip(added, steps, strict=True)),
    )
