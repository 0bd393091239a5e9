"""Batch norm whose statistics span all ranks, on any device, over any number of rows on each.

torch's SyncBatchNorm runs on accelerators only; sparse maps may hold different numbers of visible places on each rank,
and a run on two CPU processes must equal one process. So the statistics are summed here: mean first, then the squares
around it, each through an all-reduce with a gradient.
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
    """nn.BatchNorm1d whose training statistics are those of all ranks' rows together."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """(B, C) → the same shape."""
        return batch_norm_features(self, input) if self.training and synced() else super().forward(input)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of all ranks' maps together."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """(B, C, H, W) → the same shape."""
        if not (self.training and synced()):
            return super().forward(input)
        rows = input.permute(0, 2, 3, 1)
        return batch_norm_features(self, rows.reshape(-1, rows.shape[-1])).view(rows.shape).permute(0, 3, 1, 2)


class _SyncedBatchNormAct2d(BatchNormAct2d):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and synced()):
            plain: Tensor = super().forward(x)
            return plain
        rows = x.permute(0, 2, 3, 1)
        normalized = batch_norm_features(self, rows.reshape(-1, rows.shape[-1])).view(rows.shape).permute(0, 3, 1, 2)
        activated: Tensor = self.act(self.drop(normalized))
        return activated


_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    BatchNormAct2d: _SyncedBatchNormAct2d,
}


def synchronize(module: nn.Module) -> None:
    """Gives every batch norm inside `module` the statistics of all ranks, in place; parameters and names stay.

    On any device, unlike torch's SyncBatchNorm. A norm without learnable or running parts is converted as well.
    """
    for layer in module.modules():
        if type(layer) in _SYNCED:
            layer.__class__ = _SYNCED[type(layer)]


def synced() -> bool:
    """Whether there are other ranks to share statistics with."""
    return world_size() > 1


def batch_norm_features(module: _BatchNorm, rows: Tensor) -> Tensor:
    """Batch norm of (M, C) with the settings of `module`, moving its running statistics as torch does.

    In training the statistics are those of all rows of all ranks; the running variance takes the unbiased one.
    """
    training = module.training or module.running_mean is None
    momentum = _momentum(module) if module.training else 0.0
    mean, var = module.running_mean, module.running_var
    if not (training and synced()):
        return F.batch_norm(rows, mean, var, module.weight, module.bias, training, momentum, module.eps)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    count = wide.new_tensor([float(rows.shape[0])])
    total = _all_reduce(torch.cat([count, wide.sum(0)]))
    count, center = total[0].detach(), total[1:] / total[0].detach()
    variance = _all_reduce((wide - center).square().sum(0)) / count
    if module.training and mean is not None and var is not None:
        with torch.no_grad():
            mean.lerp_(center.to(mean.dtype), momentum)
            var.lerp_((variance * (count / (count - 1))).to(var.dtype), momentum)
    normalized = (wide - center) * (variance + module.eps).rsqrt()
    if module.affine:
        normalized = normalized * module.weight + module.bias
    return normalized.to(rows.dtype)


def _momentum(module: _BatchNorm) -> float:
    """Counts the step, as torch's own forward does; without a momentum the average over steps is cumulative."""
    if not module.track_running_stats or module.num_batches_tracked is None:
        return 0.0
    module.num_batches_tracked.add_(1)
    return module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)


class _AllReduce(Function):
    """Sum over ranks; each rank's summand reaches the losses of all, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
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
