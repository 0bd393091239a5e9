"""Self-distillation with prototypes: a student learns the assignments of a teacher that is its own moving average.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision Transformers"
(DINO), ICCV 2021, arXiv 2104.14294; code of the authors: github.com/facebookresearch/dino. Assignments that use all
prototypes equally: Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv 1306.0895; as a target: Caron et al. (SwAV),
arXiv 2006.09882, and Oquab et al. (DINOv2), arXiv 2304.07193.

In this order: settings, the momentum teacher, crops, heads, the teacher's assignments (`TeacherCenter`, or
Sinkhorn-Knopp), the loss. A task's `forward` calls those that it needs.

Shapes: B images, V crops of each, D features, C channels of a direction, K prototypes, n vectors of any kind. Batches
hold crops image by image; backbones get them crop by crop: the first crop of each image, then the second of each, ...
Head and center are lightly's. Its DINOLoss is not used, because it moves its center in each forward pass, even in
evaluation; `cross_view_loss` computes the same values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from lightly.models.modules.center import Center
from lightly.models.modules.heads import DINOProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.multi_crop import (
    GLOBALS,
    MultiCropConfig,
    MultiCropViews,
    crop_sheet,
    local_size,
    require_crops,
)
from unlabeled.pretext.common.teacher import cosine_momentum, frozen_copy, without_dropout
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic.slices import Slice
from unlabeled.ssl.core.distributed import sum_over_ranks, world_size
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.nn.ema import ema_update
from unlabeled.ssl.task import Batch, NamedParameter, PretextTask, TaskConfig


class HeadConfig(TaskConfig):
    """A projection head: three linear layers, normalization, and the similarity to each prototype."""

    prototypes: int = Field(65536, ge=2)
    """Number of prototypes that images are assigned to (K in the paper). [prototypes]"""
    hidden: int = Field(2048, ge=1)
    """Width of the hidden layers. [channels]"""
    bottleneck: int = Field(256, ge=1)
    """Width of the normalized output that is compared with the prototypes. [channels]"""
    batch_norm: bool = False
    """Use batch norm between the linear layers."""
    unit_prototypes: bool = True
    """Keep prototypes at length one; false: learn their lengths, which can be better but is less stable."""


class TeacherStudentConfig(MultiCropConfig):
    """Settings of the teacher and of temperatures; the defaults are DINO's, as fractions of a run of 100 epochs."""

    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's logits."""
    teacher_temperature: float = Field(0.07, gt=0)
    """Temperature of the teacher's logits after its warmup; lower is sharper."""
    teacher_temperature_start: float = Field(0.04, gt=0)
    """Temperature of the teacher's logits at the start of its warmup."""
    temperature_warmup: float = Field(0.3, ge=0, le=1)
    """Length of the linear warmup of the teacher's temperature. [fraction of the run]"""
    momentum: float = Field(0.996, ge=0, le=1)
    """Decay rate of the teacher's weights at the start of the run."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    """Value that the decay rate reaches along a half cosine."""
    momentum_stretch: float = Field(1.0, gt=0, le=1)
    """Fraction of that half cosine that the run covers. [fraction]"""
    freeze_prototypes: float = Field(0.01, ge=0, le=1)
    """Keep the prototypes fixed for this long at the start. [fraction of the run]"""
    export: Literal["teacher", "student"] = "teacher"
    """Which backbone is evaluated and exported; published numbers are the teacher's."""


class SelfDistillationConfig(TeacherStudentConfig):
    """Settings of DINO's head and centering; the defaults are the published ones."""

    head: HeadConfig = HeadConfig()
    """The projection head."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the running mean of the teacher's logits, which is subtracted from them."""


class TeacherStudent(PretextTask):
    """Base of tasks in which the teacher is a moving average of the student. Submodules: `backbone` and `teacher`.

    `teacher` holds the average of each submodule of the student under the same name; `follow` adds more of them.
    Schedules depend on the progress of the run, which is stored in the buffer `progress`. A subclass freezes parameters
    that its loss does not reach (`train_only`), adds its heads, and implements the method in its `forward`.
    """

    Config: ClassVar[type[TaskConfig]] = TeacherStudentConfig
    requires: ClassVar[frozenset[str]] = frozenset({"pooled"})
    small_settings: ClassVar[dict[str, Any]] = {"locals": 0}
    synced_statistics: ClassVar[bool] = True
    collapse_remedy: ClassVar[str] = (
        "lower optim.lr or task.teacher_temperature, lengthen schedule.warmup_epochs, or raise task.freeze_prototypes"
    )
    config: TeacherStudentConfig
    progress: Tensor

    def __init__(self, config: TeacherStudentConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without pooled features, ConfigError for crops that it cannot take."""
        super().__init__(config, backbone)
        require_crops(config, backbone)
        self.teacher = nn.ModuleDict({"backbone": without_dropout(frozen_copy(backbone))})
        self.register_buffer("progress", torch.zeros(()))

    @classmethod
    def views(cls, config: TeacherStudentConfig, backbone: Backbone) -> Views:
        return MultiCropViews(config, backbone.input_size, local_size(config, backbone))

    def encoder(self) -> Backbone:
        """The teacher's backbone, or the student's under ``export: student``."""
        return cast(Backbone, self.teacher["backbone"]) if self.config.export == "teacher" else self.backbone

    def follow(self, name: str, module: nn.Module) -> None:
        """Adds `module` to the student as submodule `name`, and a copy of it to `teacher`."""
        self.add_module(name, module)
        self.teacher[name] = frozen_copy(module)

    def temperature(self) -> Tensor:
        """The teacher's temperature at `progress`, a scalar tensor on the device of the task."""
        # computed from a buffer: reading it as a number would wait for the device
        config = self.config
        start, end = config.teacher_temperature_start, config.teacher_temperature
        if not config.temperature_warmup:
            return torch.full_like(self.progress, end)
        return start + (end - start) * (self.progress / config.temperature_warmup).clamp(max=1)

    def before_step(self, progress: float) -> None:
        """Freezes the prototypes at the start of a run."""
        if progress < self.config.freeze_prototypes:
            for head in self._heads():
                for parameter in head.last_layer.parameters():
                    parameter.grad = None  # not zero: an optimizer would still apply weight decay and momentum

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the teacher toward the student and records the progress."""
        config = self.config
        momentum = cosine_momentum(config.momentum, config.momentum_end, progress * config.momentum_stretch)
        for name, module in self.teacher.items():
            ema_update(module, self.get_submodule(name), momentum)  # batch norms keep their own running statistics
        self.progress.fill_(progress)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """As in the base class, but without weight decay for the lengths of prototypes (``weight_g``)."""
        for named in super().parameter_groups():
            yield named._replace(decay=False) if named.name.endswith("weight_g") else named

    def _heads(self) -> Iterator[Any]:
        """The student's projection heads."""
        for name in self.teacher:
            modules = self.get_submodule(name).modules()
            yield from (module for module in modules if isinstance(module, DINOProjectionHead))

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``crops``: one row per image (the first 4), large crops and then small ones at the same scale."""
        return {"crops": crop_sheet(batch[name] for name in ("globals", "locals") if name in batch)}


def crops_by_size(backbone: Backbone, batch: Batch) -> list[Tensor]:
    """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → normalized, crop by crop: (2 B, 3, h, w)
    and, if there are small crops, (n B, 3, h', w'). A backbone needs one pass per size."""
    return [backbone.normalize(crop_major(batch[name])) for name in ("globals", "locals") if name in batch]


def crop_major(crops: Tensor) -> Tensor:
    """(B, V, 3, h, w) → (V * B, 3, h, w): the first crop of each image, the second of each, ..."""
    return crops.transpose(0, 1).flatten(0, 1)


def by_crop(features: Tensor, images: int) -> Tensor:
    """(V * B, ...), crop by crop → (V, B, ...) for B `images`."""
    return features.view(-1, images, *features.shape[1:])


def create_head(dim: int, config: HeadConfig) -> DINOProjectionHead:
    """lightly's projection head, (N, `dim`) → (N, K)."""
    with warnings.catch_warnings(), torch.no_grad():  # no_grad: a weight with a graph could not be deep-copied
        warnings.simplefilter("ignore", FutureWarning)  # lightly uses torch's old weight norm, with DINO's names
        return DINOProjectionHead(
            dim,
            config.hidden,
            config.bottleneck,
            config.prototypes,
            batch_norm=config.batch_norm,
            norm_last_layer=config.unit_prototypes,
        )


def directions(head: Any, features: Tensor) -> Tensor:
    """Features (..., D) → their directions (..., C) in the head's bottleneck: vectors of length 1, at least float32."""
    flat, (first, *others) = features.flatten(0, -2), head.layers  # (n, D): batch norms take two dimensions
    weight, width = first.weight, flat.shape[1]
    # a sub-network (see `unlabeled.ssl.backbones.elastic`) has fewer features: slice the first layer, and scale it up
    # because a sum over fewer inputs is smaller
    if width < first.in_features:
        weight = Slice((first.out_features, width), (1, 1), first.in_features / width).of(weight)
    projected: Tensor = F.linear(flat, weight, first.bias)
    for layer in others:
        projected = layer(projected)
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))  # (n, C); autocast returns bfloat16
    return F.normalize(wide, dim=1).view(*features.shape[:-1], wide.shape[-1])


def scores(head: Any, units: Tensor) -> Tensor:
    """Directions (..., C) → logits (..., K), in at least float32."""
    # no autocast: divided by a temperature of 0.04, bfloat16's rounding of a cosine changes assignments by a tenth
    with torch.autocast(units.device.type, enabled=False):
        logits: Tensor = head.last_layer(units)
    return logits


def log_probabilities(head: Any, units: Tensor, temperature: float) -> Tensor:
    """Directions (..., C) → the student's log-probabilities (..., K)."""
    return (scores(head, units) / temperature).log_softmax(-1)


class TeacherCenter(Center):  # type: ignore[misc]
    """The moving average of the teacher's logits, (1, K), which is subtracted before its assignments are computed.

    Unlike lightly's, it moves once per optimizer step, so that all micro-steps of a step use the same center.
    """

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__((1, prototypes), momentum=momentum)
        self.observed: list[Tensor] = []
        """Mean logits (1, K) of each micro-step since the last move."""

    def assign(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The teacher's logits (..., K) → its assignments (..., K), with the center after the last step."""
        assigned: Tensor = ((logits - self.value) / temperature).softmax(-1)
        return assigned

    def observe(self, mean: Tensor) -> None:
        """Records the mean (1, K) of the teacher's logits in a micro-step; ignored in eval mode."""
        if self.training:
            self.observed.append(mean)

    def move(self) -> None:
        """Moves the center toward the mean of what was observed in all micro-steps, on all ranks."""
        if self.observed:
            self.update(torch.cat(self.observed))  # lightly averages over micro-steps and ranks
            self.observed.clear()


@torch.no_grad()
def assigned_crops(head: Any, center: TeacherCenter, pooled: Tensor, temperature: Tensor) -> Tensor:
    """The teacher's pooled features (2 B, D) of the large crops → its assignments (2, B, K); `center` observes."""
    logits = scores(head, directions(head, pooled))  # (2 B, K)
    center.observe(logits.mean(0, keepdim=True))
    return by_crop(center.assign(logits, temperature), len(pooled) // GLOBALS)


@torch.no_grad()
def sinkhorn_offsets(
    units: Tensor,
    prototypes: Tensor,
    temperature: Tensor | float,
    *,
    iterations: int = 3,
    chunk: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sinkhorn-Knopp: directions `units` (n, C) and `prototypes` (K, C), not normalized → offsets (K,).

    `assignments` computes the assignments from these offsets, which are the same on every rank. Logits are recomputed
    in each iteration for `chunk` rows at a time; None: computed once. Rows with `weights` (n,) of 0 are ignored. Ranks
    may have different numbers of rows, including none; without any row, offsets are 0. Computed in at least float32.
    """
    # The published iteration divides exp(logits / temperature) in turns by its sums over rows and over prototypes. The
    # sum over prototypes comes last, so the result is a softmax over logits minus one offset per prototype, and only
    # these K values have to be kept. Logarithms prevent overflow; constants such as n and K cancel in the softmax.
    with torch.autocast(units.device.type, enabled=False):
        dtype = torch.promote_types(units.dtype, torch.float32)
        rows, columns = units.to(dtype) / temperature, prototypes.to(dtype).t()  # (n, C), (C, K)
        offsets = columns.new_zeros(columns.shape[1])
        chunks = _LogitChunks(rows, columns, len(rows) if chunk is None else chunk, weights)
        for iteration in range(iterations):
            total = torch.full_like(offsets, -torch.inf)
            for logits, valid in chunks:
                values = logits - offsets  # (rows of the chunk, K)
                if iteration:  # the iteration begins with the sums over rows, not over prototypes
                    values -= values.logsumexp(1, keepdim=True)
                if valid is not None:
                    values.masked_fill_(~valid, -torch.inf)  # log 0: ignored by the sum
                total = torch.logaddexp(total, values.logsumexp(0))
            offsets = offsets + _logsumexp_over_ranks(total)
    return offsets


def assignments(logits: Tensor, temperature: Tensor | float, offsets: Tensor) -> Tensor:
    """Logits (..., K) → assignments (..., K), which sum to 1, given the `offsets` (K,) of `sinkhorn_offsets`."""
    return (logits / temperature - offsets).softmax(-1)


class _LogitChunks:
    """Iterates over logits in chunks of rows, with a mask (rows, 1) of the rows that count (None: all)."""

    def __init__(self, rows: Tensor, columns: Tensor, chunk: int, weights: Tensor | None) -> None:
        self.rows, self.columns, self.chunk = rows, columns, max(chunk, 1)
        self.valid = None if weights is None else weights[:, None] > 0
        # a single chunk is computed once; several would not fit into memory together
        self.kept = rows @ columns if len(rows) <= self.chunk else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        if self.kept is not None:
            yield self.kept, self.valid
            return
        for start in range(0, len(self.rows), self.chunk):
            of_chunk = slice(start, start + self.chunk)
            yield self.rows[of_chunk] @ self.columns, None if self.valid is None else self.valid[of_chunk]


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Logarithm of the sum of exp(values) over ranks; 0 where that sum is 0."""
    if world_size() > 1:
        # subtract the largest value over ranks first, so that exp does not overflow
        largest = values.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        largest.masked_fill_(largest == -torch.inf, 0)  # -inf minus -inf would be NaN
        values = largest + sum_over_ranks((values - largest).exp()).log()
    return values.masked_fill(values == -torch.inf, 0)


def cross_view_loss(assigned: Tensor, log_predicted: Tensor) -> Tensor:
    """Mean cross-entropy over images and over all pairs of a crop of the teacher and a different crop of the student.

    `assigned` (T, B, K): the teacher's assignments. `log_predicted` (V, B, K): the student's log-probabilities for
    V >= T crops, the first T being those of the teacher. There are T V - T pairs: 18 for 2 large and 8 small crops.
    Source: equation 3 of DINO.
    """
    teachers, images = assigned.shape[:2]
    # sum over all pairs, minus pairs of a crop with itself; summing over T first needs no tensor of pairs
    every = (assigned.sum(0) * log_predicted).sum()
    same = (assigned * log_predicted[:teachers]).sum()
    return (same - every) / (teachers * (len(log_predicted) - 1) * images)


@torch.no_grad()
def assignment_metrics(assigned: Tensor) -> dict[str, Tensor]:
    """Assignments (..., K) → ``teacher_entropy``, from 0 (one-hot) to 1 (uniform), and ``teacher_information`` (see
    `unlabeled.ssl.train.collapse`), both divided by log K."""
    flat = assigned.flatten(0, -2)  # (n, K)
    most = torch.log(torch.tensor(float(flat.shape[1]), dtype=flat.dtype, device=flat.device))
    entropy = torch.special.entr(flat).sum(1).mean() / most
    marginal = torch.special.entr(flat.mean(0)).sum() / most
    return {"teacher_entropy": entropy, "teacher_information": marginal - entropy}
