"""Self-distillation with prototypes: a student learns the assignments of a teacher that is its own moving average.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision Transformers"
(DINO), ICCV 2021, arXiv 2104.14294; code of the authors: github.com/facebookresearch/dino.

Shapes: B pictures, V crops of each, D features, K prototypes. Rows of crops are crop by crop (see `multi_crop`).
Head and centre are lightly's. Its DINOLoss is not used, as it moves its centre inside of each forward pass, in
evaluation too; `cross_view_loss` gives the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from lightly.models.modules.center import Center
from lightly.models.modules.heads import DINOProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from unlabeled.pretext.common.multi_crop import (
    GLOBALS,
    MultiCropConfig,
    MultiCropViews,
    by_crop,
    crop_major,
    crop_sheet,
    local_size,
    require_crops,
)
from unlabeled.pretext.common.patches import widened
from unlabeled.pretext.common.teacher import cosine_momentum, frozen_copy
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic.slices import Slice
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.nn.ema import ema_update
from unlabeled.ssl.task import Batch, NamedParameter, PretextTask, TaskConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class HeadConfig(TaskConfig):
    """A projection head: three linear layers, a direction, and its products with the prototypes."""

    prototypes: int = Field(65536, ge=2)
    """K."""
    hidden: int = Field(2048, ge=1)
    """Channels between the linear layers."""
    bottleneck: int = Field(256, ge=1)
    """Channels of the direction."""
    batch_norm: bool = False
    """Batch norms between the linear layers."""
    unit_prototypes: bool = True
    """Prototypes of length one; False: their lengths are learned, which can be better and less stable."""


class TeacherStudentConfig(MultiCropConfig):
    """Settings of teacher and temperatures; the defaults are DINO's, parts of a run are of its 100 epochs."""

    student_temperature: float = Field(0.1, gt=0)
    """What the student's logits are divided by."""
    teacher_temperature: float = Field(0.07, gt=0)
    """What the teacher's are divided by after the warm-up; lower is sharper."""
    teacher_temperature_start: float = Field(0.04, gt=0)
    """The same when the warm-up begins."""
    temperature_warmup: float = Field(0.3, ge=0, le=1)
    """Part of the run over which the teacher's temperature rises linearly (30 epochs)."""
    momentum: float = Field(0.996, ge=0, le=1)
    """Of the teacher's moving average, at the start."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    """Where its half cosine ends."""
    momentum_stretch: float = Field(1.0, gt=0, le=1)
    """Part of that half cosine that the run goes through."""
    freeze_prototypes: float = Field(0.01, ge=0, le=1)
    """Part of the run, at its start, in which the prototypes stay (one epoch)."""
    export: Literal["teacher", "student"] = "teacher"
    """Whose backbone is evaluated and exported; published numbers are the teacher's."""


class TeacherStudent(PretextTask):
    """Base of tasks whose teacher is the moving average of the student. Submodules: `backbone` and `teacher`.

    `teacher` holds the average of each submodule of the student under the same name; `follow` adds further ones.
    Everything that depends on the run's course follows from the progress that the engine hands over, kept in the buffer
    `progress` for `temperature`.
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
        """Raises CapabilityError for a backbone that does not pool, ConfigError for crops that it cannot take."""
        super().__init__(config, backbone)
        require_crops(config, backbone)
        self.train_only(self.reached())
        self.teacher = nn.ModuleDict({"backbone": without_dropping(frozen_copy(backbone))})
        self.register_buffer("progress", torch.zeros(()))

    @classmethod
    def views(cls, config: TeacherStudentConfig, backbone: Backbone) -> Views:
        return MultiCropViews(config, backbone.input_size, local_size(config, backbone))

    def encoder(self) -> Backbone:
        """The teacher's backbone, or the student's under ``export: student``."""
        return cast(Backbone, self.teacher["backbone"]) if self.config.export == "teacher" else self.backbone

    def reached(self) -> set[str]:
        """Names of the backbone's parameters that the loss depends on."""
        return self.backbone.reached_by_pooled()

    def follow(self, name: str, part: nn.Module) -> None:
        """`part` of the student as submodule `name`, and its copy in `teacher`."""
        self.add_module(name, part)
        self.teacher[name] = frozen_copy(part)

    def crops(self, batch: Batch) -> list[Tensor]:
        """Normalised crops, crop by crop: (2 B, 3, h, w) and, if there are small ones, (n B, 3, h', w')."""
        return [self.backbone.normalize(crop_major(batch[name])) for name in ("globals", "locals") if name in batch]

    def temperature(self) -> Tensor:
        """The teacher's temperature at `progress`, a scalar on its device."""
        config = self.config
        start, end = config.teacher_temperature_start, config.teacher_temperature
        if not config.temperature_warmup:
            return torch.full_like(self.progress, end)
        return start + (end - start) * (self.progress / config.temperature_warmup).clamp(max=1)

    def before_step(self, progress: float) -> None:
        """Without gradients an optimizer leaves the prototypes alone: no momentum, no decay, no count of steps."""
        if progress < self.config.freeze_prototypes:
            for head in self._heads():
                for parameter in head.last_layer.parameters():
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The teacher follows the student, time goes on."""
        config = self.config
        momentum = cosine_momentum(config.momentum, config.momentum_end, progress * config.momentum_stretch)
        for name, part in self.teacher.items():
            ema_update(part, self.get_submodule(name), momentum)
        self.progress.fill_(progress)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """As in the base class, and no decay of the prototypes' lengths."""
        for named in super().parameter_groups():
            yield named._replace(decay=False) if named.name.endswith("weight_g") else named

    def _heads(self) -> Iterator[Any]:
        for name in self.teacher:
            yield from (part for part in self.get_submodule(name).modules() if isinstance(part, DINOProjectionHead))

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``crops``: a row a picture (the first 4), large crops and then small ones in the same scale."""
        return {"crops": crop_sheet(batch[name] for name in ("globals", "locals") if name in batch)}


class SelfDistillationConfig(TeacherStudentConfig):
    """Settings of DINO's head and centre, the defaults as published."""

    head: HeadConfig = HeadConfig()
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Of the moving average of the teacher's logits, which its assignments are taken without."""


class SelfDistillation(TeacherStudent):
    """Base of DINO and iBOT. Submodules beside those of `TeacherStudent`: `head` and `centers`.

    A subclass may add parts and centres with `add_head` and `add_center`.
    """

    Config: ClassVar[type[TaskConfig]] = SelfDistillationConfig
    config: SelfDistillationConfig

    def __init__(self, config: SelfDistillationConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone that does not pool, ConfigError for crops that it cannot take."""
        super().__init__(config, backbone)
        self.centers = nn.ModuleDict()
        self._means: dict[str, list[Tensor]] = {}
        self.add_head("head", backbone.embed_dim, config.head)
        self.add_center("head", config.head.prototypes)

    def add_head(self, name: str, dim: int, config: HeadConfig) -> None:
        """A head of the student as submodule `name`, and its copy in `teacher`."""
        self.follow(name, create_head(dim, config))

    def add_center(self, name: str, prototypes: int) -> None:
        """The centre `name` of the teacher's logits, at zero."""
        self.centers[name] = Center((1, prototypes), momentum=self.config.center_momentum)
        self._means[name] = []

    @torch.no_grad()
    def assigned_crops(self, pooled: Tensor) -> Tensor:
        """The teacher's pooled features (2 B, D) of the large crops → its assignments (2, B, K)."""
        head = self.teacher["head"]
        logits = scores(head, directions(head, pooled))
        self.observe(logits.mean(0, keepdim=True), "head")
        return by_crop(self.assign(logits, "head"), len(pooled) // GLOBALS)

    def log_predicted(self, head: Any, units: Tensor) -> Tensor:
        """Directions (..., bottleneck) → the student's log-probabilities (..., K)."""
        return (scores(head, units) / self.config.student_temperature).log_softmax(-1)

    def assign(self, logits: Tensor, center: str) -> Tensor:
        """The teacher's logits (..., K) → its assignments (..., K), under the centre as it was after the last step."""
        value: Tensor = cast(Center, self.centers[center]).value
        return ((logits - value) / self.temperature()).softmax(-1)

    def observe(self, mean: Tensor, center: str) -> None:
        """Takes the mean (1, K) of the teacher's logits of a micro-step, for `after_step` to move the centre by."""
        if self.training:
            self._means[center].append(mean)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Centres follow the logits of all ranks and micro-steps."""
        for name, means in self._means.items():
            if means:
                cast(Center, self.centers[name]).update(torch.cat(means))  # averages over rows and ranks
                means.clear()
        super().after_step(progress)


def create_head(dim: int, config: HeadConfig) -> DINOProjectionHead:
    """lightly's head: (N, `dim`) → (N, K)."""
    with warnings.catch_warnings(), torch.no_grad():  # no graph in its derived weight, so that it can be copied
        warnings.simplefilter("ignore", FutureWarning)  # it uses torch's older weight norm, whose names are DINO's
        return DINOProjectionHead(
            dim,
            config.hidden,
            config.bottleneck,
            config.prototypes,
            batch_norm=config.batch_norm,
            norm_last_layer=config.unit_prototypes,
        )


def directions(head: Any, features: Tensor) -> Tensor:
    """Features (..., D) → their directions in the head's bottleneck, of length one, at least float32.

    Features of a sub-network (see `unlabeled.ssl.backbones.elastic`) are narrower than the head's first layer, which is
    sliced.
    """
    rows, (first, *others) = features.flatten(0, -2), head.layers  # rows, as its batch norms need
    width = rows.shape[1]
    weight = Slice((first.out_features, width), (1, 1), first.in_features / width).of(first.weight)
    projected: Tensor = F.linear(rows, weight, first.bias)
    for layer in others:
        projected = layer(projected)
    return F.normalize(widened(projected), dim=1).view(*features.shape[:-1], projected.shape[-1])


def scores(head: Any, units: Tensor) -> Tensor:
    """Directions (..., bottleneck) → logits (..., K), at least float32 also under autocast.

    Divided by a temperature of 0.04, what bfloat16 rounds off of a cosine would change assignments by a tenth.
    """
    with torch.autocast(units.device.type, enabled=False):
        logits: Tensor = head.last_layer(units)
    return logits


def cross_view_loss(assigned: Tensor, log_predicted: Tensor) -> Tensor:
    """Mean cross-entropy over pictures and over pairs of a teacher's crop and another crop of the student.

    `assigned` (T, B, K): the teacher's; `log_predicted` (V, B, K): log-probabilities of the student's V >= T crops, of
    which the first T are the teacher's. T V - T pairs: 18 for 2 large and 8 small crops. Source: equation 3 of DINO.
    """
    teachers, pictures = assigned.shape[:2]
    every = (assigned.sum(0) * log_predicted).sum()
    same = (assigned * log_predicted[:teachers]).sum()
    return (same - every) / (teachers * (len(log_predicted) - 1) * pictures)


@torch.no_grad()
def assignment_figures(assigned: Tensor) -> dict[str, Tensor]:
    """Assignments (..., K) → ``teacher_entropy``, 0 sharp to 1 even, and ``teacher_information`` (see
    `unlabeled.ssl.train.collapse`), both over log K."""
    rows = assigned.flatten(0, -2)
    most = torch.log(torch.tensor(float(rows.shape[1]), dtype=rows.dtype, device=rows.device))
    entropy = torch.special.entr(rows).sum(1).mean() / most
    marginal = torch.special.entr(rows.mean(0)).sum() / most
    return {"teacher_entropy": entropy, "teacher_information": marginal - entropy}


def without_dropping(network: ModuleT) -> ModuleT:
    """Sets the rates of dropout and stochastic depth to zero, as teachers have none; in train mode, for batch norms."""
    for module in network.modules():
        names = ["drop_prob", "drop_rate", "prob"] + ["p"] * isinstance(module, _DropoutNd)
        for name in names:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network
