"""The dynamic prediction head: the weights of the student's classifier are generated from the words themselves."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.pretext.common.patches import widened
from unlabeled.ssl.core.distributed import gather_rows
from unlabeled.ssl.nn.batch_norm import SyncedBatchNorm1d, synced


class WordHead(nn.Module):
    """Words (K, C) → one unit vector (K, D) each: norm, linear, batch norm over the words, ReLU, linear, norm.

    Source: section 3.3 of the paper; hidden width 2 D. In training each rank generates its share of the words where
    their number divides; statistics and gradients are those of all of them, and an average of gradients over ranks (as
    DDP takes it) is the gradient of one process that generates all.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 2 * dim, bias=False)
        self.bn = SyncedBatchNorm1d(2 * dim)
        self.last_layer = nn.Linear(2 * dim, dim)

    def forward(self, words: Tensor) -> Tensor:
        """(K, C) → (K, D), at least float32; with a gradient to the head's parameters only."""
        ranks = dist.get_world_size() if self.training and synced() else 1
        shared = ranks > 1 and words.shape[0] % ranks == 0
        own = words.chunk(ranks)[dist.get_rank()] if shared else words
        hidden = F.relu(self.bn(self.fc(F.normalize(own, dim=1))))
        weights = F.normalize(widened(self.last_layer(hidden)), dim=1)
        return gather_rows(weights) if shared else weights


def bow_logits(features: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Student features (..., D), as they are, and weights (K, D) → scale * f . w, (..., K), at least float32.

    Outside autocast: bfloat16 would round the larger logits to whole numbers.
    """
    with torch.autocast(features.device.type, enabled=False):
        return scale * F.linear(widened(features), weights)
