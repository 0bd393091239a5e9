"""iBOT: DINO on partly masked crops, plus the same distillation for each masked patch.

Zhou, Wei, Wang, Shen, Xie, Yuille, Kong, "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, arXiv
2111.07832; code of the authors: github.com/bytedance/ibot.

Shapes: B images, V = 2 + n crops of each, L = gh * gw positions of the last feature map, M masked positions over all
crops, D features of a crop, C channels of a direction, K prototypes.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from unlabeled.pretext.common.multi_crop import GLOBALS
from unlabeled.pretext.self_distillation.masked_patches import MaskedPatches, PatchMaskConfig, PatchMasker, at_masked
from unlabeled.pretext.self_distillation.self_distillation import (
    HeadConfig,
    SelfDistillationConfig,
    TeacherCenter,
    TeacherStudent,
    assigned_crops,
    assignment_metrics,
    by_crop,
    create_head,
    crops_by_size,
    cross_view_loss,
    directions,
    log_probabilities,
    scores,
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig

logger = logging.getLogger(__name__)


class IBOTConfig(PatchMaskConfig, SelfDistillationConfig):
    """Settings of iBOT; the defaults are the paper's (section 4)."""

    head: HeadConfig = HeadConfig(prototypes=8192)
    patch_head: HeadConfig | None = None
    """Head for patches; null: share the head of whole crops, as published (or use a separate one like it, if the last
    feature map has another number of channels than the pooled features)."""
    patch_weight: float = Field(1.0, gt=0)
    """Weight of the loss on masked patches; the loss on whole crops has weight 1."""


class IBOT(TeacherStudent):
    """Combines DINO's loss on whole crops with the same distillation for each masked patch.

    Submodules in addition to those of `TeacherStudent`: `centers`, `head`, `mask_token` (see
    `unlabeled.pretext.self_distillation.masked_patches`), and `patch_head` if it is not shared.
    """

    Config: ClassVar[type[TaskConfig]] = IBOTConfig
    paper = Paper("iBOT: Image BERT Pre-Training with Online Tokenizer", 2022, "https://arxiv.org/abs/2111.07832")
    good_for = "frozen features for whole images and for patches (segmentation); costs slightly more than DINO"
    small_settings: ClassVar[dict[str, Any]] = {
        "locals": 0,
        "head": {"prototypes": 64, "hidden": 64, "bottleneck": 32},
    }
    recipe: ClassVar[Recipe] = {
        "task": {
            "locals": 10,
            "global_scale": [0.25, 1.0],
            "local_scale": [0.05, 0.25],
            "head": {"prototypes": 8192, "unit_prototypes": False},
        },
        "optim": {
            "name": "adamw",
            "lr": 5e-4,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 10, "min_lr": 1e-6},
        "engine": {"clip": 3.0},
        "batch_size": 1024,
        "epochs": 100,
    }
    """iBOT (Zhou et al., ICLR 2022, arXiv 2111.07832): the published recipe of ViT-S, for 100 epochs. A plain ViT
    takes the small crops with backbone.kwargs={dynamic_img_size: true, drop_path_rate: 0.1}."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled", "dense_map"})
    config: IBOTConfig

    def __init__(self, config: IBOTConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without feature maps, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled() | backbone.reached_by_maps([-1]))
        self.centers = nn.ModuleDict({"head": TeacherCenter(config.head.prototypes, config.center_momentum)})
        self.follow("head", create_head(backbone.embed_dim, config.head))
        channels = backbone.stages[-1].channels
        self.masker = PatchMasker(config, backbone, task="iBOT")
        self.mask_token = self.masker.new_token()
        self.shared = config.patch_head is None and channels == backbone.embed_dim
        patch_head = config.patch_head or config.head
        if not self.shared:
            self.follow("patch_head", create_head(channels, patch_head))
        # patches have their own center even if the head is shared, because their logits have another mean
        self.centers["patch_head"] = TeacherCenter(patch_head.prototypes, config.center_momentum)
        heads = "share a head" if self.shared else "have separate heads"
        logger.info("ibot: masked patches enter %s %s; crops and patches %s", backbone.name, self.masker.entry, heads)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, 2, L): the largest values are masked. ``ratio`` (B, 2): fraction of masked patches."""
        noise, ratio = self.masker.draw(self.backbone, batch["globals"])
        return {"noise": noise, "ratio": ratio}

    def forward(self, batch: Batch, *, noise: Tensor | None = None, ratio: Tensor | None = None) -> StepOutput:
        """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → loss of crops plus loss of patches.

        The student sees masked large crops, the teacher unmasked ones. `noise` and `ratio` determine the masks; if
        either is None, they are drawn.
        """
        if noise is None or ratio is None:
            noise, ratio = self.draw(batch).values()
        # choose which patches of the large crops to mask
        crops = crops_by_size(self.backbone, batch)  # [(2 B, 3, h, w), (n B, 3, h', w') if any]
        masked = self.masker.mask(self.backbone, noise, ratio, crops[0])  # M patches over all large crops
        # the teacher sees unmasked large crops, the student masked ones and the small crops
        assigned, assigned_patches = self.assign(crops[0], masked)  # (2, B, K), (M, K)
        units, predicted, predicted_patches = self.predict(crops, masked)  # (V, B, C), (V, B, K), (M, K)
        # compare crops with other crops, and each masked patch with the same patch
        crop_loss = cross_view_loss(assigned, predicted)
        patch_loss = masked_loss(assigned_patches, predicted_patches, masked)
        loss = crop_loss + self.config.patch_weight * patch_loss
        logs = {"crop_loss": crop_loss.detach(), "patch_loss": patch_loss.detach(), **assignment_metrics(assigned)}
        return StepOutput(loss, logs, units[0].detach())

    @torch.no_grad()
    def assign(self, large: Tensor, masked: MaskedPatches) -> tuple[Tensor, Tensor]:
        """The teacher's assignments of the large crops (2, B, K) and of the `masked` patches (M, K)."""
        teacher: Any = self.teacher
        crop_center, patch_center = (cast(TeacherCenter, self.centers[name]) for name in ("head", "patch_head"))
        pooled, patches = self.masker.encode(teacher["backbone"], large)  # (2 B, D), (2 B, L, channels)
        head = teacher["head" if self.shared else "patch_head"]
        units = directions(head, patches)  # (2 B, L, C)
        # the mean over all patches, not only masked ones; logits are linear in directions, so average those
        patch_center.observe(scores(head, units.mean((0, 1))[None]))
        assigned = assigned_crops(teacher["head"], crop_center, pooled, self.temperature())
        return assigned, patch_center.assign(scores(head, at_masked(units, masked)), self.temperature())

    def predict(self, crops: list[Tensor], masked: MaskedPatches) -> tuple[Tensor, Tensor, Tensor]:
        """The student's directions (V, B, C) for all crops, its log-probabilities (V, B, K), and those of the masked
        patches (M, K)."""
        (large, *small), temperature = crops, self.config.student_temperature
        pooled, patches = self.masker.encode(self.backbone, large, masked.visible, self.mask_token)
        pooled = torch.cat([pooled, *(self.backbone.pooled(of_size) for of_size in small)])  # small: never masked
        units = directions(self.head, pooled)  # (V B, C)
        predicted = log_probabilities(self.head, units, temperature)  # (V B, K)
        head = self.head if self.shared else self.patch_head
        patch_units = directions(head, at_masked(patches, masked))  # (M, C)
        images = len(large) // GLOBALS
        return by_crop(units, images), by_crop(predicted, images), log_probabilities(head, patch_units, temperature)

    def after_step(self, progress: float) -> None:
        """Moves the centers toward the teacher's logits, and the teacher toward the student."""
        for center in self.centers.values():
            cast(TeacherCenter, center).move()
        super().after_step(progress)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``crops``: one row per image (the first 4): large crops, masked large crops, and small crops."""
        return {"crops": self.masker.sheet(self.backbone, batch, **self.draw(batch))}


def masked_loss(assigned: Tensor, log_predicted: Tensor, masked: MaskedPatches) -> Tensor:
    """Mean cross-entropy between `assigned` and `log_predicted` (M, K) of the masked patches.

    First the mean over the masked patches of a crop, then over all N crops, including those without masked patches.
    Source: equation 2 of iBOT.
    """
    entropies = -(assigned * log_predicted).sum(-1)  # (M,)
    return (entropies * masked.weights).sum() / len(masked.visible)
