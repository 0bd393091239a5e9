"""VICReg: two views agree, each feature varies across images, and features are uncorrelated.

Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, ICLR 2022,
arXiv 2105.04906; code of the authors: github.com/facebookresearch/vicreg. The loss is lightly's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import ProjectionHead
from pydantic import Field
from torch import nn

from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.two_views.two_views import FirstColors, SecondColors, TwoViewsConfig, TwoViewTask, exactly
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig
from unlabeled.ssl.train.collapse import DEVIATION


class VICRegConfig(TwoViewsConfig):
    """Settings of VICReg; the defaults are the paper's."""

    invariance_weight: float = Field(25.0, ge=0)
    """Weight of the mean squared difference between the two views."""
    variance_weight: float = Field(25.0, ge=0)
    """Weight of the hinge loss that keeps the standard deviation of each feature at 1 or above; without it, features
    collapse."""
    covariance_weight: float = Field(1.0, ge=0)
    """Weight of the squared covariances between features."""
    hidden: int = Field(8192, ge=1)
    """Width of the expander's two hidden layers. [channels]"""
    dim: int = Field(8192, ge=1)
    """Width of the projections that the loss compares. [channels]"""
    first: FirstColors = FirstColors()
    second: SecondColors = SecondColors()


class VICReg(TwoViewTask):
    """Makes two views agree, while each feature varies over images and features stay uncorrelated.

    Variance and covariance are computed over the images of all ranks. Submodules: `backbone` and `projector`.
    """

    Config: ClassVar[type[TaskConfig]] = VICRegConfig
    paper = Paper(
        "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        2022,
        "https://arxiv.org/abs/2105.04906",
    )
    good_for = "frozen features without negatives or a teacher; its loss terms show why a run fails"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "lars",
            "lr": 0.2,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "momentum": 0.9,
            "weight_decay": 1e-6,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 10, "min_factor": 0.001},
    }
    """VICReg (Bardes et al., ICLR 2022, arXiv 2105.04906): the published recipe, 100 or 1000 epochs of batches of
    2048."""
    small_settings: ClassVar[dict[str, Any]] = {"hidden": 64, "dim": 32}
    per_image: ClassVar[bool] = False
    collapse_remedy: ClassVar[str] = "raise task.variance_weight, or lower optim.lr"
    config: VICRegConfig

    def __init__(self, config: VICRegConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        width, hidden, dim = backbone.embed_dim, config.hidden, config.dim
        # not lightly's VICRegProjectionHead: its last layer has a bias, which the authors do not have
        self.projector = ProjectionHead(
            [
                (width, hidden, nn.BatchNorm1d(hidden), nn.ReLU()),
                (hidden, hidden, nn.BatchNorm1d(hidden), nn.ReLU()),
                (hidden, dim, None, None, False),
            ]
        )
        # lightly's gather returns the gradients of all ranks' losses and DDP averages over ranks: together the exact
        # gradient of one process with the whole batch
        self.loss = VICRegLoss(
            config.invariance_weight,
            config.variance_weight,
            config.covariance_weight,
            gather_distributed=torch.distributed.is_available(),
        )

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """``views`` uint8 (B, 2, 3, h, w) → the weighted sum of equation 6.

        The invariance term is the mean over images and channels, as in the authors' code.
        """
        # one pass per view, as published: batch norm never mixes the two
        first, second = (self.embed(view) for view in self.pair(batch))  # (B, D) each
        output = self.output(exactly(self.loss, first, second), first, second)
        # the standard deviation that the variance term keeps up; the collapse alarm watches it
        output.logs[DEVIATION] = widened(first.detach()).std(0).mean()
        return output
