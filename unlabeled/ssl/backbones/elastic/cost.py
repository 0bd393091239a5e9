"""Cost of each sub-network: parameters, and multiply-adds for one image.

Counted in a forward pass on the meta device, so that no weights are allocated. All blocks of a stage but the first cost
the same, so the cost is linear in the depth of each stage. One model per width, plus one for each stage that varies, is
then enough to know the cost of every size.
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
    """Cost of one model."""

    parameters: int
    macs: int
    """Multiply-adds of matrix products and convolutions for one image."""


def cost_of(backbone: Backbone) -> Cost:
    """Cost of `backbone` for an image of its own size."""
    return _cost(backbone.model, backbone.input_size)


def costs_of(elastic: Elastic, backbone: Backbone) -> dict[SubSize, Cost]:
    """Cost of each size of `elastic`, smallest first. `backbone` is the full backbone; its weights do not matter."""
    costs: dict[SubSize, Cost] = {}
    for width in dict.fromkeys(size.width for size in elastic.sizes):
        same_width = [size for size in elastic.sizes if size.width == width]
        # the smallest depth of each stage on its own, which need not be one of the sizes
        least = SubSize(width, tuple(map(min, zip(*(size.depths for size in same_width), strict=True))))
        base = _sub_cost(elastic, backbone, least)
        # what one more block of each stage adds; measured only for stages that vary
        steps = [
            _difference(_sub_cost(elastic, backbone, _deeper(least, stage)), base)
            if any(size.depths[stage] > depth for size in same_width)
            else Cost(0, 0)
            for stage, depth in enumerate(least.depths)
        ]
        costs |= {size: _deepened(base, steps, size, least) for size in same_width}
    return costs


def _sub_cost(elastic: Elastic, backbone: Backbone, size: SubSize) -> Cost:
    arguments = {**elastic.kwargs, **elastic.family.arguments(backbone.model, size)}
    # timm directly rather than `create_backbone`, which would run a forward pass to measure shapes
    with torch.device("meta"):
        model = timm.create_model(elastic.name, **arguments)
    return _cost(model, elastic.input_size)


def _cost(model: nn.Module, size: tuple[int, int]) -> Cost:
    @torch.no_grad()
    def count(net: Any, x: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            net.forward_head(net.forward_features(x), pre_logits=True)
        return int(counter.get_total_flops()) // 2  # the counter has two operations per multiply-add

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
