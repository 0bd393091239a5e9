"""iBOT: DINO on images of which a part is hidden, and the same distillation for each hidden patch.

Zhou, Wei, Wang, Shen, Xie, Yuille, Kong, "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, arXiv
2111.07832; code of the authors: github.com/bytedance/ibot.

Shapes: B images, V = 2 + n crops of each, L = gh * gw places of the last feature map, M of them hidden over all
crops, D features of a crop, C channels of a direction, K prototypes.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from unlabeled.pretext.common.multi_crop import GLOBALS
from unlabeled.pretext.self_distillation.masked_patches import MaskedPatches, PatchMaskConfig, PatchMasker, at_positions
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

    Submodules on top of those of `TeacherStudent`: `centers`, `head`, `mask_token` (see
    `unlabeled.pretext.self_distillation.masked_patches`), and `patch_head` where it is not shared.
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
        self.positions = PatchMasker(config, backbone, task="iBOT")
        self.mask_token = self.positions.new_token()
        self.shared = config.patch_head is None and channels == backbone.embed_dim
        patch_head = config.patch_head or config.head
        if not self.shared:
            self.follow("patch_head", create_head(channels, patch_head))
        # patches have a center of their own under a shared head too: they are not distributed as whole crops are
        self.centers["patch_head"] = TeacherCenter(patch_head.prototypes, config.center_momentum)
        heads = "share a head" if self.shared else "have heads of their own"
        logger.info("ibot: hidden places enter %s %s; crops and patches %s", backbone.name, self.positions.entry, heads)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, 2, L): the places with the largest are hidden. ``ratio`` (B, 2): how many, 0 for none."""
        noise, ratio = self.positions.draw(self.backbone, batch["globals"])
        return {"noise": noise, "ratio": ratio}

    def forward(self, batch: Batch, *, noise: Tensor | None = None, ratio: Tensor | None = None) -> StepOutput:
        """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → DINO's loss, of a student that sees
        the large crops with hidden places, and the cross-entropy of these places.

        `noise` and `ratio` decide what is hidden; None: as `draw` gives them.
        """
        if noise is None or ratio is None:
            noise, ratio = self.draw(batch).values()
        crops = crops_by_size(self.backbone, batch)  # [(2 B, 3, h, w), (n B, 3, h', w') if any]
        hidden = self.positions.hide(self.backbone, noise, ratio, crops[0])  # M places of all large crops
        assigned, assigned_patches = self.assign(crops[0], hidden)  # (2, B, K), (M, K): the teacher sees whole crops
        units, predicted, predicted_patches = self.predict(crops, hidden)  # (V, B, C), (V, B, K), (M, K)
        crop_loss = cross_view_loss(assigned, predicted)
        patch_loss = masked_loss(assigned_patches, predicted_patches, hidden)
        loss = crop_loss + self.config.patch_weight * patch_loss
        logs = {"crop_loss": crop_loss.detach(), "patch_loss": patch_loss.detach(), **assignment_metrics(assigned)}
        return StepOutput(loss, logs, units[0].detach())

    @torch.no_grad()
    def assign(self, large: Tensor, hidden: MaskedPatches) -> tuple[Tensor, Tensor]:
        """The teacher's assignments of whole large crops (2, B, K), and of the places that are hidden (M, K)."""
        teacher: Any = self.teacher
        crop_center, patch_center = (cast(TeacherCenter, self.centers[name]) for name in ("head", "patch_head"))
        pooled, patches = self.positions.encode(teacher["backbone"], large)  # (2 B, D), (2 B, L, channels)
        head = teacher["head" if self.shared else "patch_head"]
        units = directions(head, patches)  # (2 B, L, C)
        patch_center.observe(scores(head, units.mean((0, 1))[None]))  # of all places: logits are linear in directions
        assigned = assigned_crops(teacher["head"], crop_center, pooled, self.temperature())
        return assigned, patch_center.assign(scores(head, at_positions(units, hidden)), self.temperature())

    def predict(self, crops: list[Tensor], hidden: MaskedPatches) -> tuple[Tensor, Tensor, Tensor]:
        """The student's directions (V, B, C) of all crops, their log-probabilities (V, B, K), and those of the hidden
        places (M, K)."""
        (large, *small), temperature = crops, self.config.student_temperature
        pooled, patches = self.positions.encode(self.backbone, large, hidden.visible, self.mask_token)
        pooled = torch.cat([pooled, *(self.backbone.pooled(of_size) for of_size in small)])  # small crops stay whole
        units = directions(self.head, pooled)  # (V B, C)
        predicted = log_probabilities(self.head, units, temperature)  # (V B, K)
        head = self.head if self.shared else self.patch_head
        patch_units = directions(head, at_positions(patches, hidden))  # (M, C)
        images = len(large) // GLOBALS
        return by_crop(units, images), by_crop(predicted, images), log_probabilities(head, patch_units, temperature)

    def after_step(self, progress: float) -> None:
        """The centers follow the teacher's logits, the teacher follows the student."""
        for center in self.centers.values():
            cast(TeacherCenter, center).move()
        super().after_step(progress)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``crops``: a row an image (the first 4): large crops, the same with hidden places in gray, small crops."""
        return {"crops": self.positions.sheet(self.backbone, batch, **self.draw(batch))}


def masked_loss(assigned: Tensor, log_predicted: Tensor, hidden: MaskedPatches) -> Tensor:
    """Cross-entropy of hidden places: mean over those of a crop, then over all N crops, also those without.

    `assigned` and `log_predicted` (M, K). Source: equation 2 of iBOT.
    """
    entropies = -(assigned * log_predicted).sum(-1)  # (M,)
    return (entropies * hidden.weights).sum() / len(hidden.visible)
