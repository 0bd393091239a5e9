"""ConvNets on whole maps whose masked places hold zeros: what SparK calls sparse convolution on dense hardware.

Shapes as in `unlabeled.ssl.task`; the visible map is bool (B, 1, gh, gw).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = Callable[[Tensor], Tensor]


class Active:
    """Which places of a map of any size are visible. Worked out anew for each layer that asks, as the original does."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible

    def at(self, x: Tensor) -> Tensor:
        """Bool (B, 1, h, w) for a map (B, C, h, w)."""
        rows, columns = (x.shape[axis] // self.visible.shape[axis] for axis in (2, 3))
        return self.visible.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)

    def on_rows(self, x: Tensor, function: Rows) -> Tensor:
        """Applies `function` to the visible places (M, C) of (B, C, h, w); the others become 0."""
        last = x.permute(0, 2, 3, 1)
        positions = self.at(x).squeeze(1).nonzero(as_tuple=True)
        rows = function(last[positions])
        whole = torch.zeros_like(last, dtype=rows.dtype)
        whole[positions] = rows
        return whole.permute(0, 3, 1, 2)

    def convolved(self, x: Tensor, layer: Any) -> Tensor:
        """A dense convolution, then zeros at masked places."""
        x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return x * self.at(x)

    def batch_normed(self, x: Tensor, layer: Any) -> Tensor:
        """Batch norm with the statistics of the visible places."""
        layer.num_batches_tracked.add_(1)

        def norm(rows: Tensor) -> Tensor:
            return F.batch_norm(
                rows, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, layer.momentum, layer.eps
            )

        return self.on_rows(x, norm)

    def layer_normed(self, x: Tensor, layer: Any) -> Tensor:
        """Layer norm over the channels of the visible places."""
        return self.on_rows(x, lambda rows: F.layer_norm(rows, rows.shape[-1:], layer.weight, layer.bias, layer.eps))


def convnext_maps(model: Any, x: Tensor, active: Active) -> list[Tensor]:
    """The four maps of timm's ``ConvNeXt`` for (B, 3, H, W), finest first; masked places are 0."""
    x = active.layer_normed(active.convolved(x, model.stem[0]), model.stem[1])
    maps = []
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            norm, convolution = stage.downsample
            x = active.convolved(active.layer_normed(x, norm), convolution)
        for block in stage.blocks:
            x = x + _convnext_branch(block, x, active)
        maps.append(x)
    return maps


def _convnext_branch(block: Any, x: Tensor, active: Active) -> Tensor:
    x = active.layer_normed(active.convolved(x, block.conv_dw), block.norm).permute(0, 2, 3, 1)
    x = block.mlp.fc2(block.mlp.act(block.mlp.fc1(x)))
    x = (x if block.gamma is None else block.gamma * x).permute(0, 3, 1, 2)
    return x * active.at(x)


def resnet_maps(model: Any, x: Tensor, active: Active) -> list[Tensor]:
    """The last four maps of timm's ``ResNet`` with bottlenecks for (B, 3, H, W), finest first; masked places are 0."""
    x = F.relu(active.batch_normed(active.convolved(x, model.conv1), model.bn1))
    pool = model.maxpool
    x = F.max_pool2d(x, pool.kernel_size, pool.stride, pool.padding)
    x = x * active.at(x)
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            x = _bottleneck(block, x, active)
        maps.append(x)
    return maps


def _bottleneck(block: Any, x: Tensor, active: Active) -> Tensor:
    shortcut = x
    if block.downsample is not None:
        convolution, norm = block.downsample
        shortcut = active.batch_normed(active.convolved(x, convolution), norm)
    x = F.relu(active.batch_normed(active.convolved(x, block.conv1), block.bn1))
    x = F.relu(active.batch_normed(active.convolved(x, block.conv2), block.bn2))
    x = active.batch_normed(active.convolved(x, block.conv3), block.bn3)
    return F.relu(x + shortcut)
