"""PixContrast: near cells of two views attract each other, far cells of the same image repel.

Xie, Lin, Zhang, Cao, Lin, Hu, "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
Representation Learning", CVPR 2021, arXiv 2011.10043, section 3.1. The authors did not release its code, so temperature
and means follow other implementations.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.dense_contrast.pixel_pairs import PixelPairs, PixelPairsConfig, overlap_logs
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig


class PixContrastConfig(PixelPairsConfig):
    """Settings of PixContrast; those shared with PixPro have the same defaults."""

    temperature: float = Field(0.3, gt=0)
    """Temperature of the contrastive loss: cosine similarities are divided by it."""


class PixContrast(PixelPairs):
    """Pulls together nearby cells of two views of an image and pushes distant cells apart.

    Submodules: `backbone`, `projector`, and `teacher`, which holds momentum copies of both."""

    Config: ClassVar[type[TaskConfig]] = PixContrastConfig
    paper = Paper(
        "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning",
        2021,
        "https://arxiv.org/abs/2011.10043",
    )
    good_for = "dense features for detection and segmentation; the contrastive baseline of PixPro"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "larspixpro",
            "lr": 1.0,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "momentum": 0.9,
            "weight_decay": 1e-5,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 5, "start_factor": 0.01, "min_lr": 1e-6},
        "engine": {"channels_last": True},
        "batch_size": 1024,
        "epochs": 100,
    }
    """PixContrast (Xie et al., CVPR 2021, arXiv 2011.10043, section 3.1): PixPro's recipe."""
    config: PixContrastConfig

    def forward(self, batch: Batch) -> StepOutput:
        """``views`` uint8 (B, 2, 3, h, w), ``boxes`` (B, 2, 4) → mean of `contrast` over both directions."""
        # the student computes queries and the teacher keys, lists with one tensor per view
        images = self.images_of(batch)  # (B, 3, h, w) each
        _, queries = self.student_maps(images)  # (B, C, gh, gw) each
        _, keys = self.teacher_maps(images)  # (B, C, gh, gw) each
        # cells that are near each other in the image are positive pairs, all others negative
        positive = self.positive_pairs(batch["boxes"], tuple(queries[0].shape))  # bool (B, L, L)
        forth = contrast(queries[0], keys[1], positive, self.config.temperature)
        # transposed: rows are cells of the second view now
        back = contrast(queries[1], keys[0], positive.transpose(1, 2), self.config.temperature)
        loss = (forth.mean() + back.mean()) / 2
        return StepOutput(loss, overlap_logs(positive), queries[0].detach().mean((2, 3)))


def contrast(queries: Tensor, keys: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Contrastive loss (B,) of maps (B, C, gh, gw) of two views with `positive` pairs (bool, B, L1, L2).

    For each cell with partners: -log of their fraction of the sum of exp(cosine / temperature) over all cells of the
    other view (section 3.1). Averaged over these cells; 0 for an image without any. In at least float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        q, k = (F.normalize(widened(maps).flatten(2), dim=1) for maps in (queries, keys))
        logits = torch.einsum("bcl,bcm->blm", q, k) / temperature
        # the smallest finite value, not -inf: a cell without partners would give NaN, even with the `where` below
        near = logits.masked_fill(~positive, torch.finfo(logits.dtype).min)
        terms = logits.logsumexp(2) - near.logsumexp(2)
        paired = positive.any(2)
        summed = torch.where(paired, terms, 0.0).sum(1)
        return summed / paired.sum(1).clamp(min=1)
