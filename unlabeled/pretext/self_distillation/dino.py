"""DINO: the student's assignment of any crop of a picture follows the teacher's of its other large crops.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision Transformers",
ICCV 2021, arXiv 2104.14294; code of the authors: github.com/facebookresearch/dino.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from unlabeled.pretext.common.multi_crop import by_crop
from unlabeled.pretext.self_distillation.self_distillation import (
    SelfDistillation,
    SelfDistillationConfig,
    assignment_figures,
    cross_view_loss,
    directions,
)
from unlabeled.ssl.task import Batch, Recipe, StepOutput, TaskConfig


class DINOConfig(SelfDistillationConfig):
    """Settings of DINO; the defaults are those of its released code, with the warm-up of the teacher's temperature."""


class DINO(SelfDistillation):
    """Self-distillation of whole crops. Submodules: see `SelfDistillation`.

    Shapes: B pictures, V = 2 + n crops of each, K prototypes.
    """

    Config: ClassVar[type[TaskConfig]] = DINOConfig
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "adamw",
            "lr": 0.0005,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 10, "min_lr": 1e-06},
        "engine": {"clip": 3.0},
        "batch_size": 1024,
        "epochs": 100,
    }
    """DINO (Caron et al., ICCV 2021, arXiv 2104.14294): the published recipe of ViTs, for 100 epochs. A plain ViT
    takes the small crops with backbone.kwargs={dynamic_img_size: true, drop_path_rate: 0.1}. ResNet-50: optim
    {name: sgd, lr: 0.03, weight_decay: 1.0e-4, weight_decay_end: null}; task.global_scale=[0.14,1]
    task.local_scale=[0.05,0.14]."""
    config: DINOConfig

    def forward(self, batch: Batch) -> StepOutput:
        """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → `cross_view_loss`.

        Large and small crops pass the network apart from each other, and its head together.
        """
        crops = self.crops(batch)
        pictures = len(batch["globals"])
        with torch.no_grad():
            teacher: Any = self.teacher["backbone"]
            assigned = self.assigned_crops(teacher.pooled(crops[0]))  # (2, B, K)
        units = directions(self.head, torch.cat([self.backbone.pooled(of_size) for of_size in crops]))  # (V B, ...)
        loss = cross_view_loss(assigned, by_crop(self.log_predicted(self.head, units), pictures))
        return StepOutput(loss, assignment_figures(assigned), units[:pictures].detach())
