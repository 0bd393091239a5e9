"""BYOL: predict the teacher's features of the other view, where the teacher slowly follows the student. No negatives.

Grill, Strub, Altché et al.: Bootstrap your own latent, NeurIPS 2020, arXiv 2006.07733; code of the authors:
github.com/google-deepmind/deepmind-research (byol). The loss and the heads are lightly's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from pydantic import Field
from torch import nn

from unlabeled.pretext.common.teacher import cosine_momentum, frozen_copy
from unlabeled.pretext.two_views.two_views import FirstColors, SecondColors, TwoViewsConfig, TwoViewTask, exactly
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.nn.ema import ema_update
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig


class BYOLConfig(TwoViewsConfig):
    """Settings of BYOL; the defaults are those of the run of 1000 epochs."""

    momentum: float = Field(0.996, ge=0, le=1)
    """Decay rate of the teacher's weights at the start; it rises to 1 along a half cosine. Use 0.99 for 300 epochs or
    fewer (appendix C)."""
    hidden: int = Field(4096, ge=1)
    """Width of the hidden layer of projector and predictor. [channels]"""
    dim: int = Field(256, ge=1)
    """Width of projections and predictions. [channels]"""
    first: FirstColors = FirstColors()
    second: SecondColors = SecondColors()


class BYOL(TwoViewTask):
    """Predicts the features that a slowly updated copy of the network, the teacher, computes from another view.

    Submodules: `backbone`, `projector` and `predictor` (the student); `teacher` is a copy of the first two.

    The teacher starts as an exact copy. Its batch norms normalize with the statistics of each batch and keep their own
    running statistics. It moves after the optimizer step.
    """

    Config: ClassVar[type[TaskConfig]] = BYOLConfig
    paper = Paper(
        "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
        2020,
        "https://arxiv.org/abs/2006.07733",
    )
    good_for = "frozen features from medium batches, without negatives; two full-size views per image"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "lars",
            "lr": 0.2,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "momentum": 0.9,
            "weight_decay": 1.5e-6,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 10},
    }
    """BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733): the published recipe of 1000 epochs of batches of 4096.
    100 epochs: optim {lr: 0.45, weight_decay: 1.0e-6}, task.momentum=0.99. 300 epochs: lr 0.3, the rest as for
    100."""
    collapse_remedy: ClassVar[str] = "raise task.momentum, lower optim.lr, or lengthen schedule.warmup_epochs"
    config: BYOLConfig

    def __init__(self, config: BYOLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = BYOLProjectionHead(backbone.embed_dim, config.hidden, config.dim)
        self.predictor = BYOLPredictionHead(config.dim, config.hidden, config.dim)
        self.teacher = frozen_copy(self.followed())  # without `predictor`: only the student predicts
        self.negative_cosine = NegativeCosineSimilarity()

    def followed(self) -> nn.Sequential:
        """The student's backbone and projector, which the teacher follows."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, projector=self.projector))

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """``views`` uint8 (B, 2, 3, h, w) → mean of 2 - 2 cos(prediction, target), summed over both directions."""
        views = self.pair(batch)  # (B, 3, h, w) each
        # one pass per view, as published: batch norm never mixes the two
        predictions = [self.predictor(self.embed(view)) for view in views]  # (B, D) each
        with torch.no_grad():
            targets = [self.teacher(view) for view in views]  # (B, D) each
        # each view predicts the teacher's features of the other view
        pairs = zip(predictions, reversed(targets), strict=True)
        # lightly's loss is -cos, so this is 2 - 2 cos
        loss = torch.stack([2 + 2 * exactly(self.negative_cosine, *pair) for pair in pairs]).sum()
        return self.output(loss, predictions[0], targets[1])

    def after_step(self, progress: float) -> None:
        """Moves the teacher's parameters toward the student's; its batch norms keep their own running statistics."""
        ema_update(self.teacher, self.followed(), cosine_momentum(self.config.momentum, 1.0, progress))
