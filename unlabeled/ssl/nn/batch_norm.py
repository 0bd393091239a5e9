"""Batch norm with statistics over all ranks, on any device and with any number of features on each rank.

torch's SyncBatchNorm runs on accelerators only, while here a run on two CPU processes must equal one on a single
process, and sparse maps may have different numbers of visible positions on each rank. The mean is computed first, then
the squared deviations from it, each through an all-reduce that passes gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.ssl.core.distributed import world_size


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that computes its training statistics over the features of all ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """(B, C) → the same shape."""
        return batch_norm_features(self, input) if self.training and synced() else super().forward(input)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that computes its training statistics over the feature maps of all ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """(B, C, H, W) → the same shape."""
        return _batch_norm_map(self, input) if self.training and synced() else super().forward(input)


class _SyncedBatchNormAct2d(BatchNormAct2d):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and synced()):
            plain: Tensor = super().forward(x)
            return plain
        # timm's class has dropout and activation inside
        activated: Tensor = self.act(self.drop(_batch_norm_map(self, x)))
        return activated


_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    BatchNormAct2d: _SyncedBatchNormAct2d,
}


def synchronize(module: nn.Module) -> None:
    """Makes every batch norm inside `module` compute statistics over all ranks, in place.

    Parameters and their names are unchanged. Unlike torch's SyncBatchNorm, it works on any device, and also for norms
    without learnable parameters or running statistics.
    """
    for layer in module.modules():
        # replacing the class keeps parameters, hooks, and the optimizer's references to them
        if type(layer) in _SYNCED:
            layer.__class__ = _SYNCED[type(layer)]


def synced() -> bool:
    """Whether there are other ranks to share statistics with."""
    return world_size() > 1


def _batch_norm_map(module: _BatchNorm, x: Tensor) -> Tensor:
    """`batch_norm_features` for a map (B, C, H, W), which keeps its shape."""
    channels_last = x.permute(0, 2, 3, 1)
    normalized = batch_norm_features(module, channels_last.reshape(-1, channels_last.shape[-1]))
    return normalized.view(channels_last.shape).permute(0, 3, 1, 2)


def batch_norm_features(module: _BatchNorm, features: Tensor) -> Tensor:
    """Batch norm of features (M, C) with the settings of `module`; updates its running statistics as torch does.

    In training mode the statistics are computed over the features of all ranks; M may differ between ranks.
    """
    training = module.training or module.running_mean is None
    momentum = _momentum(module) if module.training else 0.0
    mean, var = module.running_mean, module.running_var
    if not (training and synced()):
        return F.batch_norm(features, mean, var, module.weight, module.bias, training, momentum, module.eps)

    # statistics over all ranks, at least in float32; the number of features travels in the same reduction as their sum
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    count = wide.new_tensor([float(features.shape[0])])
    total = _all_reduce(torch.cat([count, wide.sum(0)]))
    count, center = total[0].detach(), total[1:] / total[0].detach()
    # in two passes: the mean of squares minus the squared mean cancels badly
    variance = _all_reduce((wide - center).square().sum(0)) / count

    if module.training and mean is not None and var is not None:
        with torch.no_grad():
            mean.lerp_(center.to(mean.dtype), momentum)
            # torch normalizes with the biased variance, but tracks the unbiased one
            var.lerp_((variance * (count / (count - 1))).to(var.dtype), momentum)
    normalized = (wide - center) * (variance + module.eps).rsqrt()
    if module.affine:
        normalized = normalized * module.weight + module.bias
    return normalized.to(features.dtype)


def _momentum(module: _BatchNorm) -> float:
    """Counts the step, as torch's forward does, and returns the weight of the new statistics."""
    if not module.track_running_stats or module.num_batches_tracked is None:
        return 0.0
    module.num_batches_tracked.add_(1)
    # without a momentum, torch averages over all steps so far
    return module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)


class _AllReduce(Function):
    """Sum over ranks. The sum enters the losses of all ranks, so the backward pass sums their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()  # all_reduce works in place
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _all_reduce(tensor: Tensor) -> Tensor:
    reduced: Tensor = _AllReduce.apply(tensor)
    return reduced
