"""SimCLR: find the other view of an image among all other views in the batch.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
arXiv 2002.05709; code of the authors: github.com/google-research/simclr. The loss and the head are lightly's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from pydantic import Field

from unlabeled.pretext.common.views import ColorConfig, Probability
from unlabeled.pretext.two_views.two_views import TwoViewsConfig, TwoViewTask, exactly
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig


class SimCLRColors(ColorConfig):
    """Color augmentation of both views at strength 1 (appendix A); half of it suits CIFAR (appendix B.9)."""

    brightness: float = Field(0.8, ge=0)
    contrast: float = Field(0.8, ge=0)
    saturation: float = Field(0.8, ge=0)
    hue: float = Field(0.2, ge=0, le=0.5)
    blur: Probability = 0.5


class SimCLRConfig(TwoViewsConfig):
    """Settings of SimCLR; the defaults are those for ImageNet."""

    temperature: float = Field(0.1, gt=0)
    """Temperature of the contrastive loss; 0.5 for CIFAR (appendix B.9)."""
    hidden: int = Field(2048, ge=1)
    """Width of the projection head's hidden layer; the authors use that of the backbone, 2048 for a ResNet-50.
    [channels]"""
    dim: int = Field(128, ge=1)
    """Width of the projections that the loss compares. [channels]"""
    first: SimCLRColors = SimCLRColors()
    second: SimCLRColors = SimCLRColors()


class SimCLR(TwoViewTask):
    """Finds the other view of an image among all views in the batch.

    The loss is NT-Xent over the views of all ranks. Submodules: `backbone` and `projector`.
    """

    Config: ClassVar[type[TaskConfig]] = SimCLRConfig
    paper = Paper(
        "A Simple Framework for Contrastive Learning of Visual Representations",
        2020,
        "https://arxiv.org/abs/2002.05709",
    )
    good_for = "a simple contrastive baseline, if you can afford large batches"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "lars",
            "lr": 0.075,
            "lr_scaling": "sqrt",
            "lr_batch": 1,
            "momentum": 0.9,
            "weight_decay": 1e-6,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 10},
    }
    """SimCLR (Chen et al., ICML 2020, arXiv 2002.05709): the published recipe, 100 to 1000 epochs of batches of 256
    to 8192, with the square-root rule of its appendix B.1. LARS leaves norms and biases alone, as published."""
    per_image: ClassVar[bool] = False
    collapse_remedy: ClassVar[str] = "lower optim.lr, raise batch_size, or lower task.temperature"
    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = SimCLRProjectionHead(backbone.embed_dim, config.hidden, config.dim)
        # lightly's gather returns the gradients of all ranks' losses and DDP averages over ranks: together the exact
        # gradient of one process with the whole batch
        self.loss = NTXentLoss(config.temperature, gather_distributed=torch.distributed.is_available())

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """``views`` uint8 (B, 2, 3, h, w) → mean over 2 B views of the cross-entropy of equation 1."""
        # one pass over 2 B views, as published: batch norm computes its statistics over both views
        first, second = self.embed(torch.cat(self.pair(batch))).chunk(2)  # (B, D) each
        # compare each view with all others, of all ranks
        return self.output(exactly(self.loss, first, second), first, second)
