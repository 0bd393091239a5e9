"""Re-estimates batch-norm statistics on unmasked images, for backbones that were trained on masked ones.

The running statistics of a backbone trained on masked images describe visible positions only, which shifts the features
of unmasked images. So the statistics are re-estimated before an evaluation with frozen weights. SparK (arXiv
2301.03580) trains such backbones; the estimate is "precise batch norm" (arXiv 2105.07576, section 3).
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
    """Number of images on which to re-estimate the statistics of `backbone`; 0: keep them.

    `masked_statistics`: whether the running statistics were collected on masked images (see `PretextTask`).
    """
    wanted = masked_statistics if config.recalibrate == "auto" else config.recalibrate
    if wanted and not batch_norms(backbone):
        if config.recalibrate is True:
            log.warning("evaluate.recalibrate: true has no effect because %s has no batch norms", backbone.name)
        return 0
    return config.recalibrate_images if wanted else 0


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms in `module` that have running statistics."""
    norms = [submodule for submodule in module.modules() if isinstance(submodule, _BatchNorm)]
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
    """A copy of `backbone` with batch-norm statistics re-estimated on up to `count` images of `source`.

    Running mean and variance (unbiased) become those over all positions of all these images. During the estimate, batch
    norms normalize with the statistics of their batch, and everything else runs in evaluation mode. Under
    torch.distributed, every process does the same work and receives the statistics of the first one. `backbone` and the
    global random state do not change.

    Raises DataError if fewer than two of the images can be decoded.
    """
    device = torch.device(device)
    with modes_kept(backbone):  # also drops tensors kept from earlier passes, which deepcopy cannot copy
        twin = copy.deepcopy(backbone).to(device).eval()
    # shuffled, since a folder's order would give batches of a single class; always in the same way
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist()
    batches = load_images(source, EvalTransform(twin.input_size), order, batch_size=max(2, batch_size), workers=workers)
    with _collecting(twin) as collected, torch.no_grad():
        for _, images, _ in batches:
            if images is not None and len(images) > 1:  # a norm after pooling has no variance over one image
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
    """Running mean and sum of squared deviations of each channel (parallel algorithm of Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Adds the values of a batch (B, C, ...)."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        variance, mean = variance.double(), mean.double()  # sums over many batches lose digits in float32
        count, total = x.numel() // x.shape[1], self.count + x.numel() // x.shape[1]
        shift = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + variance * count + shift.square() * (self.count * count / total)
        self.mean, self.count = self.mean.to(mean) + shift * (count / total), total

    def store(self, norm: _BatchNorm) -> None:
        """Writes mean and unbiased variance into the running statistics of `norm`; nothing if it was never used."""
        if self.count < 2 or norm.running_mean is None or norm.running_var is None:
            return
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.squares / (self.count - 1))
        if world_size() > 1:
            dist.broadcast(norm.running_mean, src=0)
            dist.broadcast(norm.running_var, src=0)


@contextmanager
def _collecting(module: nn.Module) -> Iterator[dict[_BatchNorm, _Statistics]]:
    """Within the block, batch norms of `module` use batch statistics, and statistics of their inputs are collected."""
    collected = {norm: _Statistics() for norm in batch_norms(module)}
    # passes in training mode also count batches and update the running statistics, which `store` overwrites
    updates = {
        norm: None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in collected
    }

    def collect(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        collected[norm].add(inputs[0])

    handles = [norm.register_forward_pre_hook(collect) for norm in collected]
    for norm in collected:
        norm.training = True  # not train(), which would also change an activation or a dropout inside
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
        for norm, count in updates.items():
            norm.training = False
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
