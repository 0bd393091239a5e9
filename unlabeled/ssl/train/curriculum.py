"""EfficientTrain: start training on the low frequencies of the images, which are learned first and cost less.

Wang, Yue, Lu, Liu, Zhong, Song, Huang, "EfficientTrain: Exploring Generalized Curriculum Learning for Training Visual
Backbones", ICCV 2023, arXiv 2211.09703; "EfficientTrain++", T-PAMI 2024, arXiv 2405.08768; code of the authors:
github.com/LeapLabTHU/EfficientTrain.

The loader yields images of full size, as always. On the device, the central window of their spectrum is turned into a
smaller image. Unlike resizing, this keeps every low frequency unchanged and does not alias. The size is a function of
the step alone, so a resumed run has nothing to restore. Evaluation and export, like the last phase, use the full size.

Departures from the papers: no growing magnitude of RandAugment, since pretext tasks define their own views; and of
EfficientTrain++, no larger batches at small sizes, no replay buffer, and no down-sampling in the loader in place of the
spectral crop. Learning rate and momenta follow the steps in both schedules (in the authors' code of the second one they
follow the compute spent so far).
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.schema import CurriculumName
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import Batch, PretextTask

Size = tuple[int, int]
"""(height, width) in pixels."""

_FULL = 224
"""Image size that the papers' schedules are for; other sizes are scaled."""
_STEPS = {160: 0.6, 192: 0.2, 224: 0.2}
"""EfficientTrain: size → fraction of the steps (arXiv 2211.09703)."""
_COMPUTE_TENTHS = {96: 2, 160: 4, 224: 4}
"""EfficientTrain++: size → tenths of the compute (arXiv 2405.08768)."""


class CurriculumPhase(NamedTuple):
    """Consecutive steps with images of one size."""

    first: int
    """Its first step, counted from 0."""
    steps: int
    size: Size


@dataclass(frozen=True)
class Curriculum:
    """The image size of each step; created by `create_curriculum`."""

    name: str
    phases: tuple[CurriculumPhase, ...]
    """In order, without gaps; the last has the full size."""
    finish: Callable[[Tensor], Tensor]
    """Converts values 0..255 to the range in which the task expects floating-point images."""

    @property
    def full(self) -> Size:
        return self.phases[-1].size

    def size(self, step: int) -> Size:
        """Size of the images in optimizer step `step`, counted from 0."""
        return next(phase.size for phase in reversed(self.phases) if phase.first <= step)

    def apply(self, batch: Batch, step: int) -> Batch:
        """The batch of step `step` with smaller images: uint8 (..., 3, H, W) of full size → floats (..., 3, h, w).

        Images of another size (local crops) and all other tensors are unchanged; at full size, so is the whole batch.
        Raises ConfigError if no image in the batch has the full size.
        """
        size = self.size(step)
        if size == self.full:
            return batch
        # boxes and the like need no change, since they are in units of the image
        full_images = {name for name, tensor in batch.items() if self._has_full_size(tensor)}
        if not full_images:
            raise ConfigError(
                f"engine.curriculum: no images of the batch have the backbone's {_shown(self.full)} pixels, so none "
                "can be made smaller; set engine.curriculum=null, or backbone.size to the size of the task's views"
            )
        return {name: self._smaller(tensor, size) if name in full_images else tensor for name, tensor in batch.items()}

    def _has_full_size(self, tensor: Tensor) -> bool:
        return tensor.dtype == torch.uint8 and tensor.shape[-3:] == (3, *self.full)

    @torch.no_grad()
    def _smaller(self, images: Tensor, size: Size) -> Tensor:
        return self.finish(low_frequencies(images, size))

    @property
    def compute(self) -> float:
        """Estimated compute as a fraction of that at full size throughout."""
        # proportional to the pixels, which ignores the quadratic cost of attention
        pixels = sum(phase.steps * phase.size[0] * phase.size[1] for phase in self.phases)
        return pixels / (sum(phase.steps for phase in self.phases) * self.full[0] * self.full[1])

    def __str__(self) -> str:
        phases = [f"{_shown(size)} in steps {first + 1} to {first + steps}" for first, steps, size in self.phases]
        return f"{self.name}: {', '.join(phases)}; about {self.compute:.0%} of the plain compute"


def create_curriculum(name: CurriculumName | None, task: PretextTask, total_steps: int) -> Curriculum | None:
    """The curriculum `name` for a run of `total_steps`; None if `name` is None.

    Raises ConfigError if the task or the backbone cannot process the smaller images, or if there is no smaller size.
    """
    if name is None:
        return None
    backbone, step = task.backbone, task.size_step()
    if step is None:
        raise ConfigError(
            f"engine.curriculum: {type(task).__name__} needs images of the full size; set engine.curriculum=null"
        )
    phases = tuple(plan_phases(name, total_steps, backbone.input_size, step))
    smaller = {phase.size: None for phase in phases[:-1]}  # a set that keeps the order
    if not smaller:
        raise ConfigError(
            f"engine.curriculum: {name} finds no smaller size for images of {_shown(backbone.input_size)} (multiples "
            f"of {_shown(step)}, {total_steps} steps); raise backbone.size, lower the strides (such as "
            "backbone.kwargs.output_stride=8), or set engine.curriculum=null"
        )
    for size in smaller:
        _require(task, size)
    return Curriculum(name, phases, partial(as_floats, task))


def as_floats(task: PretextTask, images: Tensor) -> Tensor:
    """Converts floating-point images (..., 3, H, W) from 0..255 to the range that `task` expects (`float_images`)."""
    if task.float_images == "bytes":
        return images
    return images / 255 if task.float_images == "unit" else task.backbone.normalize(images / 255)


def plan_phases(name: CurriculumName, total_steps: int, full: Size, step: Size) -> list[CurriculumPhase]:
    """The phases of the curriculum `name`, in order.

    Each side of `full` is scaled separately and rounded to a multiple of `step`. Phases that round to the same size are
    merged. The last phase has the full size and at least one step.
    """
    weights: dict[Size, float] = {}
    for pixels, weight in (_STEPS if name == "efficienttrain" else _COMPUTE_TENTHS).items():
        size = full if pixels == _FULL else _rounded(pixels, full, step)
        if name == "efficienttrain++":  # from compute to steps: a step costs in proportion to its pixels
            weight *= full[0] * full[1] / (size[0] * size[1])
        weights[size] = weights.get(size, 0.0) + weight
    total = sum(weights.values())
    # one step less than all, so that even a very short run ends at full size
    ends = [min(round(total_steps * done / total), total_steps - 1) for done in itertools.accumulate(weights.values())]
    ends[-1] = total_steps
    phases = [
        CurriculumPhase(begin, end - begin, size) for size, begin, end in zip(weights, [0, *ends], ends, strict=False)
    ]
    return [phase for phase in phases if phase.steps]


def low_frequencies(images: Tensor, size: Size) -> Tensor:
    """Crops the spectrum: (..., H, W) of any type → float32 (..., h, w).

    Frequencies below h / 2 and w / 2 cycles per image keep their amplitude and phase, so the mean is unchanged. Values
    may lie slightly outside the range of the input. Rotating or mirroring by multiples of 90 degrees commutes with the
    crop. Source: arXiv 2211.09703; see `_crop`.
    """
    vertical, horizontal = (
        _crop(full, side).to(images.device) for full, side in zip(images.shape[-2:], size, strict=True)
    )
    # the sums run over whole rows and columns of values up to 255, which bfloat16 cannot hold
    with torch.autocast(images.device.type, enabled=False):
        return vertical @ (images.float() @ horizontal.T)


@cache
def _crop(full: int, side: int) -> Tensor:
    """The spectral crop along one axis from `full` to `side` pixels as a matrix, float32 (side, full).

    It combines Fourier transform, shift, window [full / 2 - side / 2, full / 2 + side / 2), inverse, real part, and
    the factor side / full: entry (n, m) is the sum of cos(2 pi k (u_n - u_m)) over the frequencies k of the window,
    divided by `full`. It departs from the paper in where pixels lie: u is the center of a pixel in units of the image,
    and in the paper its corner.
    """
    # with corners the crop is off-center by up to half a pixel, and since the transform treats opposite edges as
    # neighbors, that distinguishes the first row from the last: enough to solve rotation without using the image
    frequencies = torch.arange(-(side // 2), side - side // 2, dtype=torch.float64)
    after, before = (
        2 * math.pi * ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None] * frequencies
        for count in (side, full)
    )
    # cos(a - b) = cos a cos b + sin a sin b
    return ((after.cos() @ before.cos().T + after.sin() @ before.sin().T) / full).float()


def _rounded(pixels: int, full: Size, step: Size) -> Size:
    """`full` times pixels / 224, rounded to positive multiples of `step` and at most `full`."""
    height, width = (
        min(max(int(side * pixels / _FULL / multiple + 0.5), 1) * multiple, side)
        for side, multiple in zip(full, step, strict=True)
    )
    return height, width


def _require(task: PretextTask, size: Size) -> None:
    """Raises ConfigError if the backbone or the task cannot process images of `size`."""
    if (reason := task.backbone.refuses(size)) is not None:
        raise ConfigError(
            f"engine.curriculum: {task.backbone.name} does not accept images of {_shown(size)} ({reason}); "
            + _remedy(task.backbone)
        )
    try:
        task.require_size(size)
    except ConfigError as error:
        raise ConfigError(f"engine.curriculum: images of {_shown(size)} do not fit: {error}") from error


def _remedy(backbone: Backbone) -> str:
    if "dynamic_img_size" in inspect.signature(type(backbone.model).__init__).parameters:
        return "set backbone.kwargs.dynamic_img_size=true"
    return "choose a backbone for any size, such as a ConvNet, or set engine.curriculum=null"


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
