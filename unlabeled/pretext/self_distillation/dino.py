"""DINO: from any crop of an image, the student predicts the teacher's assignment of the other large crops.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision Transformers",
ICCV 2021, arXiv 2104.14294; code of the authors: github.com/facebookresearch/dino.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from unlabeled.pretext.common.multi_crop import GLOBALS
from unlabeled.pretext.self_distillation.self_distillation import (
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
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig


class DINOConfig(SelfDistillationConfig):
    """Settings of DINO; the defaults are those of its released code, with a warmup of the teacher's temperature."""


class DINO(TeacherStudent):
    """Matches the teacher's prototype assignments across large and small crops of an image.

    Submodules in addition to those of `TeacherStudent`: `centers` and `head`.

    Shapes: B images, V = 2 + n crops of each, D features, C channels of a direction, K prototypes.
    """

    Config: ClassVar[type[TaskConfig]] = DINOConfig
    paper = Paper(
        "Emerging Properties in Self-Supervised Vision Transformers",
        2021,
        "https://arxiv.org/abs/2104.14294",
    )
    good_for = (
        "features that you will use frozen: kNN, retrieval, linear probes; about ten crops per image make a step costly"
    )
    small_settings: ClassVar[dict[str, Any]] = {
        "locals": 0,
        "head": {"prototypes": 64, "hidden": 64, "bottleneck": 32},
    }
    recipe: ClassVar[Recipe] = {
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
    """DINO (Caron et al., ICCV 2021, arXiv 2104.14294): the published recipe of ViTs, for 100 epochs. A plain ViT
    takes the small crops with backbone.kwargs={dynamic_img_size: true, drop_path_rate: 0.1}. ResNet-50: optim
    {name: sgd, lr: 0.03, weight_decay: 1.0e-4, weight_decay_end: null}; task.global_scale=[0.14,1]
    task.local_scale=[0.05,0.14]."""
    config: DINOConfig

    def __init__(self, config: DINOConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without pooled features, ConfigError for crops that it cannot take."""
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled())  # freezes a classifier that the pooled features do not need
        self.centers = nn.ModuleDict({"head": TeacherCenter(config.head.prototypes, config.center_momentum)})
        self.follow("head", create_head(backbone.embed_dim, config.head))

    def forward(self, batch: Batch) -> StepOutput:
        """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → `cross_view_loss`."""
        crops = crops_by_size(self.backbone, batch)  # [(2 B, 3, h, w), (n B, 3, h', w') if any]
        # the teacher sees the large crops only
        assigned = self.assign(crops[0])  # (2, B, K)
        # the student sees all crops
        units, predicted = self.predict(crops)  # (V, B, C), (V, B, K)
        # compare each crop of the student with the other large crops of the teacher
        loss = cross_view_loss(assigned, predicted)
        return StepOutput(loss, assignment_metrics(assigned), units[0].detach())

    @torch.no_grad()
    def assign(self, large: Tensor) -> Tensor:
        """The teacher's assignments (2, B, K) of the large crops (2 B, 3, h, w)."""
        teacher: Any = self.teacher
        center = cast(TeacherCenter, self.centers["head"])
        return assigned_crops(teacher["head"], center, teacher["backbone"].pooled(large), self.temperature())

    def predict(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The student's directions (V, B, C) for all crops, and its log-probabilities (V, B, K)."""
        images = len(crops[0]) // GLOBALS
        pooled = torch.cat([self.backbone.pooled(of_size) for of_size in crops])  # (V B, D), one pass per size
        units = directions(self.head, pooled)  # (V B, C), one pass: the head's batch norms see all crops together
        predicted = log_probabilities(self.head, units, self.config.student_temperature)  # (V B, K)
        return by_crop(units, images), by_crop(predicted, images)

    def after_step(self, progress: float) -> None:
        """Moves the center toward the teacher's logits, and the teacher toward the student."""
        cast(TeacherCenter, self.centers["head"]).move()
        super().after_step(progress)
