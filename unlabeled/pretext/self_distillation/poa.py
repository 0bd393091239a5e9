"""POA: one pretraining run of a backbone that contains sub-networks of many sizes, each usable without more training.

Zhang, Guo, Lao, Yu, Ru, Wang, Ye, He, Chen, Yang, "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv
2408.01031; code of the authors: github.com/alipay/POA. Where paper and code differ, this follows the code. Deviations:
a sub-network equals what timm builds at its size (Swin's first norm is over the sub-network's channels, its windows
shift in every second block), and masked patches of ResNets are a color in the image, not a token after the pooling.

Shapes: B images, V = 2 + n crops of each, M masked patches over all large crops, D channels of the full backbone and d
of a sub-network, C channels of a direction, K prototypes.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, NamedTuple, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.pretext.common.multi_crop import GLOBALS
from unlabeled.pretext.common.views import Fraction
from unlabeled.pretext.self_distillation.masked_patches import (
    MaskedPatches,
    PatchMaskConfig,
    PatchMasker,
    Spread,
    at_masked,
)
from unlabeled.pretext.self_distillation.poa_losses import (
    Crops,
    PatchTerms,
    TeacherHead,
    TermWeights,
    head_loss,
    koleo,
    prototypes_of,
)
from unlabeled.pretext.self_distillation.self_distillation import (
    HeadConfig,
    TeacherStudent,
    TeacherStudentConfig,
    assignment_metrics,
    assignments,
    by_crop,
    create_head,
    crops_by_size,
    directions,
    sinkhorn_offsets,
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig, SubSize
from unlabeled.ssl.backbones.elastic.sampler import SizeSampler
from unlabeled.ssl.core.distributed import rank
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.nn.drop_path import uniform_drop_path
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig

logger = logging.getLogger(__name__)

_WATCHED = 64
"""Maximum number of large crops from which metrics of the assignments are computed."""


class POAConfig(PatchMaskConfig, TeacherStudentConfig):
    """Settings of POA; the defaults are those of its code for ViTs, as fractions of a run of 346 epochs."""

    elastic: ElasticConfig = ElasticConfig()
    """Which sizes the network holds. If it holds only its own, there is no elastic student and the loss is DINOv2's."""
    size_scale: float = Field(3.0, ge=1)
    """How much more often the smallest width and depth are drawn than the largest (2 for Swin and ResNet)."""
    size_per_rank: bool = False
    """Train another sub-network on each process in a step, as published; each step then waits for the largest."""
    prototypes: tuple[int, ...] = (8192, 16384, 32768, 65536)
    """Number of prototypes of each head. [prototypes]"""
    hidden: int = Field(2048, ge=1)
    """Width of the heads' hidden layers. [channels]"""
    bottleneck: int = Field(256, ge=1)
    """Width of the heads' normalized output. [channels]"""
    chunk: int | None = Field(None, ge=1)
    """Compute logits for this many crops or patches at a time to save memory; null: all at once. [rows]"""
    intact_weight: float = Field(0.8, ge=0, le=1)
    """Weight of the full student's losses (lambda in the paper); those of the elastic student have 1 minus this."""
    terms: TermWeights | None = None
    """Weight of each loss term, in place of `intact_weight`: {cross_intact, cross_elastic, same_elastic, patch_intact,
    patch_elastic}."""
    koleo_weight: float = Field(0.1, ge=0)
    """Weight of the KoLeo regularizer, which spreads the features of different images (gamma in the paper)."""
    patches_from: float = Field(30 / 346, ge=0, le=1)
    """When masking starts: before that, crops are not masked. [fraction of the run]"""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth, the same for each block (0.2 for ViTs); null: as the network is built."""

    global_scale: tuple[Fraction, Fraction] = (0.32, 1.0)
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.32)
    mask_spread: Spread = "even"
    temperature_warmup: float = Field(30 / 346, ge=0, le=1)
    momentum: float = Field(0.992, ge=0, le=1)
    momentum_end: float = Field(0.9999, ge=0, le=1)
    momentum_stretch: float = Field(0.78, gt=0, le=1)
    freeze_prototypes: float = Field(1 / 346, ge=0, le=1)

    @field_validator("prototypes")
    @classmethod
    def _has_heads(cls, prototypes: tuple[int, ...]) -> tuple[int, ...]:
        if not prototypes or min(prototypes) < 2:
            raise ValueError(f"prototypes {list(prototypes)} must be one number or more of at least 2")
        return prototypes

    def head(self, prototypes: int) -> HeadConfig:
        """Settings of the head with that many prototypes, of learned lengths."""
        return HeadConfig(prototypes=prototypes, hidden=self.hidden, bottleneck=self.bottleneck, unit_prototypes=False)


class Features(NamedTuple):
    """Features that one backbone computes for a batch."""

    crops: Tensor
    """(V, B, d), large crops first; for the teacher (2, B, D), since it sees large crops only."""
    patches: Tensor
    """Of the masked patches, (M, d)."""


class Targets(NamedTuple):
    """What the assignments of one of the teacher's heads are computed from.

    Assignments are recomputed when needed, since those of all crops and patches would be a step's largest tensors.
    """

    crops: Tensor
    """Directions (2, B, C)."""
    patches: Tensor
    """Directions (M, C)."""
    crop_offsets: Tensor
    """(K,), see `sinkhorn_offsets`."""
    patch_offsets: Tensor
    """(K,)."""


class POA(TeacherStudent):
    """Distills a teacher into a full student and into a sub-network that changes with each step.

    Submodules in addition to those of `TeacherStudent`: `heads`, one for each number of prototypes,
    and `mask_token` (see `unlabeled.pretext.self_distillation.masked_patches`).

    The sub-network of a step is determined by two buffers: `steps`, the number of steps done, and `seed`, drawn when
    the task is built.
    """

    Config: ClassVar[type[TaskConfig]] = POAConfig
    paper = Paper("POA: Pre-training Once for Models of All Sizes", 2024, "https://arxiv.org/abs/2408.01031")
    good_for = "getting models of many sizes from one run"
    recipe: ClassVar[Recipe] = {
        "task": {"mask_pattern": "block"},
        "optim": {
            "name": "adamw",
            "lr": 0.004,
            "lr_scaling": "sqrt",
            "lr_batch": 1024,
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "layer_decay": 0.9,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 10, "min_lr": 2e-5},
        "engine": {"clip": 1.5},
        "batch_size": 1600,
        "epochs": 100,
    }
    """POA (Zhang et al., ECCV 2024, arXiv 2408.01031): the published recipe of ViTs up to ViT-L, shortened; all
    three published recipes are in recipe/imagenet. A plain ViT takes the small crops with
    backbone.kwargs={dynamic_img_size: true}."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled", "dense_map", "elastic"})
    small_settings: ClassVar[dict[str, Any]] = {"locals": 0, "prototypes": (32, 64), "hidden": 32, "bottleneck": 16}
    per_image: ClassVar[bool] = False
    config: POAConfig
    steps: Tensor
    seed: Tensor

    def __init__(self, config: POAConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without sub-networks or feature maps, ConfigError for sizes or crops
        that do not fit."""
        if config.drop_path is not None:  # before the teacher is copied
            uniform_drop_path(backbone.model, config.drop_path)
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled() | backbone.reached_by_maps([-1]))
        if backbone.stages[-1].channels != backbone.embed_dim:
            raise CapabilityError(
                f"backbone: {backbone.name} cannot do POA: crops and patches share heads, but its last map has "
                f"{backbone.stages[-1].channels} channels and its features {backbone.embed_dim}"
            )
        # ranks with different sub-networks would wait for each other in different batch norms forever
        if config.size_per_rank and any(isinstance(module, _BatchNorm) for module in backbone.modules()):
            raise ConfigError(
                f"task.size_per_rank: true is not possible with {backbone.name}, whose batch norms span all ranks; "
                "set it to false, or take group norms (backbone.kwargs.norm_layer=groupnorm)"
            )
        self.sizes = Elastic(backbone, config.elastic)
        self.alone = len(self.sizes.sizes) == 1
        self.masker = PatchMasker(config, backbone, task="POA")
        self.mask_token = self.masker.new_token()
        self.follow("heads", nn.ModuleList(create_head(backbone.embed_dim, config.head(k)) for k in config.prototypes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.randint(2**31, ()))
        self._sampler: SizeSampler | None = None
        logger.info(
            "poa: %d sizes from %s to %s; masked patches enter %s",
            len(self.sizes.sizes), self.sizes.sizes[0], self.sizes.full, self.masker.entry,
        )  # fmt: skip

    def elastic(self) -> ElasticConfig:
        return self.config.elastic

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, 2, L): the largest values are masked. ``ratio`` (B, 2): fraction of masked patches."""
        noise, ratio = self.masker.draw(self.backbone, batch["globals"])
        return {"noise": noise, "ratio": ratio * (self.progress >= self.config.patches_from)}

    def forward(self, batch: Batch, *, noise: Tensor | None = None, ratio: Tensor | None = None) -> StepOutput:
        """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → mean of `head_loss` over heads plus the
        KoLeo regularizer of both students.

        `noise` and `ratio` determine the masks; if either is None, they are drawn.
        """
        if noise is None or ratio is None:
            noise, ratio = self.draw(batch).values()
        # choose which patches of the large crops to mask
        crops = crops_by_size(self.backbone, batch)  # [(2 B, 3, h, w), (n B, 3, h', w') if any]
        masked = self.masker.mask(self.backbone, noise, ratio, crops[0])  # M patches over all large crops
        # the teacher sees unmasked large crops; the intact and the elastic student see masked ones and the small crops
        with torch.no_grad():
            taught = self.encode(self.teacher["backbone"], crops[:1], masked, unmasked=True)
        students = [self.encode(backbone, crops, masked) for backbone in self.students()]
        # each head compares both students with the teacher, and the elastic student with the intact one
        heads = zip(cast(Any, self.heads), cast(Any, self.teacher["heads"]), strict=True)
        results = [self.head_terms(head, teacher, taught, students, masked) for head, teacher in heads]
        # spread the features of different images: large crops only, before any head
        spread = torch.stack([koleo(features.crops[:GLOBALS]) for features in students]).sum()
        loss = torch.stack([loss for loss, _ in results]).mean() + self.config.koleo_weight * spread
        logs = {name: torch.stack([terms[name] for _, terms in results]).mean() for name in results[0][1]}
        return StepOutput(loss, logs | {"koleo": spread.detach() / len(students)}, students[0].crops[0].detach())

    def students(self) -> list[Backbone]:
        """The intact student and, if the backbone holds other sizes, the elastic student of this step."""
        # the elastic one consists of slices of the intact one's parameters, so one backward pass serves both
        return [self.backbone] if self.alone else [self.backbone, self.sizes.take(self.backbone, self.size())]

    def encode(self, backbone: Any, crops: list[Tensor], masked: MaskedPatches, *, unmasked: bool = False) -> Features:
        """Features of all `crops` and of the `masked` patches; with `unmasked`, the large crops are not masked."""
        large, *small = crops
        visible = None if unmasked else masked.visible
        pooled, patches = self.masker.encode(backbone, large, visible, self.mask_token)  # (2 B, d), (2 B, L, d)
        pooled = torch.cat([pooled, *(backbone.pooled(of_size) for of_size in small)])  # (V B, d)
        return Features(by_crop(pooled, len(large) // GLOBALS), at_masked(patches, masked))

    def head_terms(
        self, head: Any, teacher: Any, taught: Features, students: list[Features], masked: MaskedPatches
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one head, and for the log its terms and metrics of the teacher's assignments."""
        last, targets, metrics = self.assign(teacher, taught)
        units = [_directions(head, features) for features in students]  # (V, B, C) and (M, C) of each
        loss, terms = head_loss(
            Crops(targets.crops, [crops for crops, _ in units], targets.crop_offsets),
            PatchTerms(targets.patches, [patches for _, patches in units], masked.weights, targets.patch_offsets),
            last,
            prototypes_of(head),
            weights=self.config.terms or TermWeights.balanced(self.config.intact_weight),
            temperature=self.config.student_temperature,
            chunk=self.config.chunk,
        )
        return loss, terms | metrics

    @torch.no_grad()
    def assign(self, teacher: Any, taught: Features) -> tuple[TeacherHead, Targets, dict[str, Tensor]]:
        """The last layer of one of the teacher's heads, the targets from which assignments follow, and metrics."""
        last = TeacherHead(prototypes_of(teacher), self.temperature())
        crops, patches = _directions(teacher, taught)  # (2, B, C), (M, C)
        # Sinkhorn-Knopp, separately: crops and patches use prototypes differently; (K,) each
        crop_offsets, patch_offsets = (
            sinkhorn_offsets(units.flatten(0, -2), last.prototypes, last.temperature, chunk=self.config.chunk)
            for units in (crops, patches)
        )
        # metrics from a few crops are enough, and a full table of logits would be large
        logits = crops.flatten(0, 1)[:_WATCHED] @ last.prototypes.t()
        metrics = assignment_metrics(assignments(logits, last.temperature, crop_offsets))
        return last, Targets(crops, patches, crop_offsets, patch_offsets), metrics

    def size(self) -> SubSize:
        """The size of this step's sub-network, on this rank."""
        seed = int(self.seed)
        # built on first use and after a state dict with another seed was loaded
        if self._sampler is None or self._sampler.seed != seed:
            self._sampler = SizeSampler(
                self.sizes.sizes,
                seed=seed,
                scale=self.config.size_scale,
                by_width=self.sizes.family.multiplied_by_width,
                shared=not self.config.size_per_rank,
            )
        return self._sampler.at(int(self.steps), rank())

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.steps += 1

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``crops``: one row per image (the first 4): large crops, masked large crops, and small crops."""
        return {"crops": self.masker.sheet(self.backbone, batch, **self.draw(batch))}


def _directions(head: Any, features: Features) -> tuple[Tensor, Tensor]:
    """Directions of crops (V, B, C) and masked patches (M, C) in the bottleneck of `head`, in one pass."""
    views, images = features.crops.shape[:2]
    units = directions(head, torch.cat([features.crops.flatten(0, 1), features.patches]))
    return by_crop(units[: views * images], images), units[views * images :]
