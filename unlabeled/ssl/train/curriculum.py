"""EfficientTrain: a run that begins with the low frequencies of its images, which are learned first and cost less.

Wang, Yue, Lu, Liu, Zhong, Song, Huang, "EfficientTrain: Exploring Generalized Curriculum Learning for Training Visual
Backbones", ICCV 2023, arXiv 2211.09703; "EfficientTrain++", T-PAMI 2024, arXiv 2405.08768; code of the authors:
github.com/LeapLabTHU/EfficientTrain.

Whole images come from the loader as ever. On the device, the central window of their spectrum becomes a smaller
image: unlike a resized one it has every low frequency as it was, and no aliasing. All of this is a function of the
step alone, so a resumed run has nothing to restore. Evaluation and export know nothing of it and, like the last stage,
have whole images.

Not taken over: the growing magnitude of RandAugment, which does not apply to pretext tasks, whose views are their own;
of EfficientTrain++ the larger batches at small sizes, the replay buffer, and the down-sampling in the loader that takes
the place of the spectrum's crop. Learning rate and momenta follow the steps in both schedules (in the authors' code of
the second one they follow the compute that was spent).
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
"""Pixels, (height, width)."""

_FULL = 224
_STEPS = {160: 0.6, 192: 0.2, 224: 0.2}
"""EfficientTrain: size → part of the steps, for images of 224 pixels (arXiv 2211.09703)."""
_EQUAL_STAGES = {96: 2, 160: 4, 224: 4}
"""EfficientTrain++: size → how many of ten stages of equal compute (arXiv 2405.08768)."""


class CurriculumPhase(NamedTuple):
    """Consecutive steps with images of one size."""

    first: int
    """Its first step."""
    steps: int
    size: Size


@dataclass(frozen=True)
class Curriculum:
    """What size the images of each step have; made by `create_curriculum`."""

    name: str
    stages: tuple[CurriculumPhase, ...]
    """In order, without gaps; the last has the full size."""
    finish: Callable[[Tensor], Tensor]
    """Values 0..255 → what the task takes floating images for."""

    @property
    def full(self) -> Size:
        return self.stages[-1].size

    def size(self, step: int) -> Size:
        """Size of the images that optimizer step `step` (from 0) sees."""
        return next(stage.size for stage in reversed(self.stages) if stage.first <= step)

    def apply(self, batch: Batch, step: int) -> Batch:
        """The batch of step `step` with smaller images: floats, where they were uint8 (..., 3, H, W) of full size.

        Images of another size (local crops) and all other tensors stay, boxes in units of the image too; at full
        size everything does. Raises ConfigError when none of the images has the full size.
        """
        size = self.size(step)
        if size == self.full:
            return batch
        whole = {name for name, tensor in batch.items() if self._is_whole(tensor)}
        if not whole:
            raise ConfigError(
                f"engine.curriculum: no images of the batch have the network's {_shown(self.full)} pixels, so none "
                "can be made smaller; set engine.curriculum=null, or backbone.size to the size of the task's views"
            )
        return {name: self._smaller(tensor, size) if name in whole else tensor for name, tensor in batch.items()}

    def _is_whole(self, tensor: Tensor) -> bool:
        return tensor.dtype == torch.uint8 and tensor.shape[-3:] == (3, *self.full)

    @torch.no_grad()
    def _smaller(self, images: Tensor, size: Size) -> Tensor:
        return self.finish(low_frequencies(images, size))

    @property
    def compute(self) -> float:
        """Expected compute over that of whole images throughout, taken to grow with the number of pixels."""
        seen = sum(stage.steps * stage.size[0] * stage.size[1] for stage in self.stages)
        return seen / (sum(stage.steps for stage in self.stages) * self.full[0] * self.full[1])

    def __str__(self) -> str:
        parts = [f"{_shown(size)} in steps {first + 1} to {first + steps}" for first, steps, size in self.stages]
        return f"{self.name}: {', '.join(parts)}; about {self.compute:.0%} of the plain compute"


def create_curriculum(name: CurriculumName | None, task: PretextTask, total_steps: int) -> Curriculum | None:
    """The curriculum `name` of a run of `total_steps`; None when there is to be none.

    Raises ConfigError when task or backbone cannot do with the smaller images, or when there is no smaller size.
    """
    if name is None:
        return None
    backbone, step = task.backbone, task.size_step()
    if step is None:
        raise ConfigError(
            f"engine.curriculum: {type(task).__name__} needs images of the full size; set engine.curriculum=null"
        )
    stages = tuple(plan_phases(name, total_steps, backbone.input_size, step))
    smaller = {stage.size: None for stage in stages[:-1]}
    if not smaller:
        raise ConfigError(
            f"engine.curriculum: {name} finds no smaller size for images of {_shown(backbone.input_size)} (multiples "
            f"of {_shown(step)}, {total_steps} steps); raise backbone.size, lower the strides (such as "
            "backbone.kwargs.output_stride=8), or set engine.curriculum=null"
        )
    for size in smaller:
        _require(task, size)
    return Curriculum(name, stages, partial(as_floats, task))


def as_floats(task: PretextTask, images: Tensor) -> Tensor:
    """Floating images (..., 3, H, W) of values 0..255 → what `task` takes floating images for."""
    if task.float_images == "bytes":
        return images
    return images / 255 if task.float_images == "unit" else task.backbone.normalize(images / 255)


def plan_phases(name: CurriculumName, total_steps: int, full: Size, step: Size) -> list[CurriculumPhase]:
    """The stages of curriculum `name`; neighbors of one size are one stage.

    Sizes are parts of `full`, each side for itself, rounded to multiples of `step`; the last stage has the full size
    and at least one step.
    """
    weights: dict[Size, float] = {}
    for pixels, weight in (_STEPS if name == "efficienttrain" else _EQUAL_STAGES).items():
        size = full if pixels == _FULL else _rounded(pixels, full, step)
        if name == "efficienttrain++":  # equal compute: steps in inverse proportion to the number of pixels
            weight *= full[0] * full[1] / (size[0] * size[1])
        weights[size] = weights.get(size, 0.0) + weight
    total = sum(weights.values())
    ends = [min(round(total_steps * done / total), total_steps - 1) for done in itertools.accumulate(weights.values())]
    ends[-1] = total_steps
    stages = [
        CurriculumPhase(begin, end - begin, size) for size, begin, end in zip(weights, [0, *ends], ends, strict=False)
    ]
    return [stage for stage in stages if stage.steps]


def low_frequencies(images: Tensor, size: Size) -> Tensor:
    """(..., H, W) of any type → float32 (..., h, w) with the frequencies below h / 2 and w / 2 cycles an image.

    These keep amplitude and phase, so the mean stays as it was. Values may lie a little outside the range of the input.
    The crop of a turned or mirrored image is the turned or mirrored crop. Source: arXiv 2211.09703; see `_crop`.
    """
    rows, columns = (_crop(whole, side).to(images.device) for whole, side in zip(images.shape[-2:], size, strict=True))
    with torch.autocast(images.device.type, enabled=False):
        return rows @ (images.float() @ columns.T)


@cache
def _crop(whole: int, side: int) -> Tensor:
    """The crop of a spectrum along one axis as a matrix, float32 (side, whole).

    Fourier transform, shift, window [whole / 2 - side / 2, whole / 2 + side / 2), inverse, real part, times
    side / whole, all in one: entry (n, m) is the sum of cos(2 pi k (u_n - u_m)) over the frequencies k of the window,
    over `whole`. As in the paper but for where places lie: u is the center of a pixel in units of the image, where
    the paper has its corner. That puts the crop off the middle by up to half a pixel, and the seam where the spectrum
    takes opposite sides for neighbors then tells the first row from the last: enough to solve rotation without
    looking at the image.
    """
    frequencies = torch.arange(-(side // 2), side - side // 2, dtype=torch.float64)
    after, before = (
        2 * math.pi * ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None] * frequencies
        for count in (side, whole)
    )
    return ((after.cos() @ before.cos().T + after.sin() @ before.sin().T) / whole).float()


def _rounded(pixels: int, full: Size, step: Size) -> Size:
    """`full` times pixels / 224, as multiples of `step` that are not above `full`."""
    height, width = (
        min(max(int(side * pixels / _FULL / multiple + 0.5), 1) * multiple, side)
        for side, multiple in zip(full, step, strict=True)
    )
    return height, width


def _require(task: PretextTask, size: Size) -> None:
    """Raises ConfigError when the backbone or the task cannot do with images of `size`."""
    if (reason := task.backbone.refuses(size)) is not None:
        raise ConfigError(
            f"engine.curriculum: {task.backbone.name} takes no images of {_shown(size)} ({reason}); "
            + _remedy(task.backbone)
        )
    try:
        task.require_size(size)
    except ConfigError as error:
        raise ConfigError(f"engine.curriculum: images of {_shown(size)} do not fit: {error}") from error


def _remedy(backbone: Backbone) -> str:
    if "dynamic_img_size" in inspect.signature(type(backbone.model).__init__).parameters:
        return "set backbone.kwargs.dynamic_img_size=true"
    return "take a network for any size, such as a ConvNet, or set engine.curriculum=null"


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
