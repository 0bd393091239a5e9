"""Batch-norm statistics of dense images, for networks that trained on masked ones.

The running statistics of a network that saw only the visible part of its images are those of visible positions; under
them the features of whole images are shifted. They are therefore estimated anew before a frozen evaluation (SparK,
arXiv 2301.03580, trains such networks; "precise batch norm" of arXiv 2105.07576, section 3, is the estimate). Weights
stay as they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.eval.features.extract import EvalTransform, load_images
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.distributed import world_size
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.data.source import ImageSource

log = logging.getLogger(__name__)


def recalibration_images(config: EvaluateConfig, backbone: Backbone, masked_statistics: bool) -> int:
    """How many images the statistics of `backbone` are to be estimated on; 0: they stay as they are.

    `masked_statistics`: whether its running statistics were collected on masked images (see `PretextTask`).
    """
    wanted = masked_statistics if config.recalibrate == "auto" else config.recalibrate
    if wanted and not batch_norms(backbone):
        if config.recalibrate is True:
            log.warning("evaluate.recalibrate: true has no effect, %s has no batch norms", backbone.name)
        return 0
    return config.recalibrate_images if wanted else 0


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms inside `module` that keep running statistics."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]


def recalibrated(
    backbone: Backbone,
    source: ImageSource,
    *,
    count: int,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Backbone:
    """A copy of `backbone` whose batch norms have the statistics of up to `count` whole images of `source`.

    Running mean and variance (unbiased) are those of all positions of all these images together, while every batch
    norm normalizes with the statistics of its batch; all else runs in evaluation mode. The images come in a fixed
    shuffle, since the order of a folder would make batches of one class. Every process of torch.distributed does the
    same work and ends with the first one's numbers. Random state and `backbone` are left as they were.

    Raises DataError when fewer than two of the images can be decoded.
    """
    device = torch.device(device)
    with modes_kept(backbone):  # which also drops tensors kept from earlier passes that cannot be copied
        twin = copy.deepcopy(backbone).to(device).eval()
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist()
    batches = load_images(source, EvalTransform(twin.input_size), order, batch_size=max(2, batch_size), workers=workers)
    with _collecting(twin) as collected, torch.no_grad():
        for _, images, _ in batches:
            if images is not None and len(images) > 1:  # of a single value there is no variance
                twin.pooled(twin.normalize(images.to(device, non_blocking=True)))
    if not any(statistics.count for statistics in collected.values()):
        raise DataError(
            f"evaluate.recalibrate: fewer than two of {len(order)} training images can be decoded; "
            "run `unlabeled doctor`"
        )
    for norm, statistics in collected.items():
        statistics.store(norm)
    return twin


class _Statistics:
    """Mean and summed squared deviations of each channel over all values seen so far (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Takes in (B, C, ...)."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        variance, mean = variance.double(), mean.double()
        count, total = x.numel() // x.shape[1], self.count + x.numel() // x.shape[1]
        shift = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + variance * count + shift.square() * (self.count * count / total)
        self.mean, self.count = self.mean.to(mean) + shift * (count / total), total

    def store(self, norm: _BatchNorm) -> None:
        """Writes them into the running statistics of `norm`, unless it was never reached."""
        if self.count < 2 or norm.running_mean is None or norm.running_var is None:
            return
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.squares / (self.count - 1))
        if world_size() > 1:
            dist.broadcast(norm.running_mean, src=0)
            dist.broadcast(norm.running_var, src=0)


@contextmanager
def _collecting(module: nn.Module) -> Iterator[dict[_BatchNorm, _Statistics]]:
    """Batch norms of `module` run on batch statistics, and what enters them is collected."""
    collected = {norm: _Statistics() for norm in batch_norms(module)}
    updates = {
        norm: None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in collected
    }

    def collect(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        collected[norm].add(inputs[0])

    handles = [norm.register_forward_pre_hook(collect) for norm in collected]
    for norm in collected:
        norm.training = True  # not train(): an activation or a dropout inside keeps its mode
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
        for norm, count in updates.items():
            norm.training = False
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
