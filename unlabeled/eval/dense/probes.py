"""Two classifiers of single positions: a linear layer, and nearest neighbors in a memory bank.

Shapes: M training positions, Q query positions, C channels, K classes, H learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.eval.dense.miou import Overlap, mean_iou
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive

_MOMENTUM = 0.9
_LR_BATCH = 256
"""Batch size that the learning rates in the settings refer to."""
_QUERIES = 1024
"""Positions compared with the bank at a time; bounds memory."""


@dataclass(frozen=True)
class LabeledFeatures:
    """Dense features of training positions with soft labels, all on one device."""

    features: Tensor
    """float32 (M, C)."""
    fractions: Tensor
    """float32 (M, K): fraction of each class among the labeled pixels; rows sum to 1."""
    labeled: Tensor
    """float32 (M,): fraction of the position's pixels that are labeled, more than 0."""
    images: Tensor
    """int64 (M,): index of the image that each position comes from."""

    def select(self, rows: Tensor) -> LabeledFeatures:
        """The positions `rows`, given as a mask or as indices."""
        return LabeledFeatures(self.features[rows], self.fractions[rows], self.labeled[rows], self.images[rows])


class ProbeSettings(Protocol):
    """The settings of an evaluator that the linear probe uses; see `SegmentationConfig`."""

    @property
    def lr(self) -> tuple[float, ...]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def holdout(self) -> float: ...


class LinearSegmenter:
    """A linear layer on standardized features, trained with soft labels.

    The loss of a position is the cross-entropy with its class fractions, weighted by its labeled fraction. This equals
    the loss over all labeled pixels if every pixel had the scores of its position. The learning rate with the highest
    mean IoU on held-out training images is selected (ties: the lower one), and the layer is trained again on all.

    Attributes: `lr`, `holdout_miou`, `diverged` (number of learning rates that gave a non-finite weight).
    Raises DataError for a single image, and if all learning rates diverge.
    """

    def __init__(self, bank: LabeledFeatures, config: ProbeSettings, seed: int) -> None:
        self._mean = bank.features.mean(dim=0)
        deviation = bank.features.std(dim=0, correction=0)
        # rounding gives a constant feature a tiny deviation, which would blow it up
        constant = deviation <= 1e-6 * self._mean.abs().clamp(min=1e-6)
        self._deviation = torch.where(constant, 1, deviation)
        held_out = _held_out(bank.images, config.holdout, seed)
        self.lr, self.holdout_miou, self.diverged = self._choose(bank, held_out, config, seed)
        self._weights = self._fit(bank, [self.lr], config, seed)[0]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Logits (Q, K) for features (Q, C)."""
        return self._standard(features) @ self._weights

    def _standard(self, features: Tensor) -> Tensor:
        """Standardized features with a column of ones for the bias, (Q, C + 1)."""
        return F.pad((features - self._mean) / self._deviation, (0, 1), value=1.0)

    def _choose(
        self, bank: LabeledFeatures, held_out: Tensor, config: ProbeSettings, seed: int
    ) -> tuple[float, float, int]:
        """(learning rate, its mean IoU on the held-out images, number of learning rates that diverged)."""
        learning_rates = sorted(set(config.lr))
        heads = self._fit(bank.select(~held_out), learning_rates, config, seed)
        evaluated = bank.select(held_out)
        finite = [bool(head.isfinite().all()) for head in heads]
        if not any(finite):
            raise DataError(
                f"evaluate.segmentation.lr: all {len(learning_rates)} diverged; add smaller values than "
                f"{learning_rates[0]:g}"
            )
        features = self._standard(evaluated.features)
        results = [
            soft_miou(evaluated, (features @ head).argmax(dim=1)) if usable else -1.0
            for head, usable in zip(heads, finite, strict=True)
        ]
        best = max(range(len(learning_rates)), key=results.__getitem__)  # of equal results the first: the lowest rate
        return learning_rates[best], results[best], len(finite) - sum(finite)

    @torch.enable_grad()
    def _fit(
        self, bank: LabeledFeatures, learning_rates: Sequence[float], config: ProbeSettings, seed: int
    ) -> list[Tensor]:
        """Trains one head (C + 1, K) per learning rate, all from zero, independently, and on the same batches."""
        features, (count, classes) = self._standard(bank.features), bank.fractions.shape
        batch = min(config.batch_size, count)
        heads = [features.new_zeros(features.shape[1], classes, requires_grad=True) for _ in learning_rates]
        optimizer = torch.optim.SGD(
            [{"params": [head], "lr": lr * batch / _LR_BATCH} for head, lr in zip(heads, learning_rates, strict=True)],
            momentum=_MOMENTUM, weight_decay=config.weight_decay,
        )  # fmt: skip
        steps = config.epochs * (count // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(derive("place probe", seed))  # the text is part of the seed
        for _ in range(config.epochs):
            # whole batches only: the incomplete last one of an epoch is dropped
            order = torch.randperm(count, generator=generator)[: count // batch * batch].to(features.device)
            for rows in torch.split(order, batch):
                weights = bank.labeled[rows] / bank.labeled[rows].sum()
                losses = [
                    F.cross_entropy(features[rows] @ head, bank.fractions[rows], reduction="none") @ weights
                    for head in heads
                ]
                optimizer.zero_grad()
                torch.autograd.backward(losses)  # one pass for all heads, which share no parameters
                optimizer.step()
                schedule.step()
        return [head.detach() for head in heads]


class NearestSegmenter:
    """Nearest-neighbor segmentation with a memory bank (Balazevic et al., Hummingbird, 2023, arXiv 2306.01667).

    The `k` most similar positions by cosine vote with their class fractions, weighted by softmax(cosine /
    `temperature`). `k` is cut to the size of the bank.
    """

    def __init__(self, bank: LabeledFeatures, k: int, temperature: float) -> None:
        self._features, self._fractions = F.normalize(bank.features, dim=1), bank.fractions
        self.k, self.temperature = min(k, len(bank.fractions)), temperature

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Class fractions (Q, K), which sum to 1, for features (Q, C)."""
        found = []
        for rows in torch.split(F.normalize(features, dim=1), _QUERIES):
            cosines, nearest = (rows @ self._features.T).topk(self.k, dim=1)
            votes = (cosines / self.temperature).softmax(dim=1)
            found.append((votes[:, :, None] * self._fractions[nearest]).sum(dim=1))
        return torch.cat(found)


def soft_miou(evaluated: LabeledFeatures, predicted: Tensor) -> float:
    """Mean IoU of one predicted class (M,) per position, where positions count by their labeled fraction."""
    truth = (evaluated.fractions * evaluated.labeled[:, None]).double()  # (M, K)
    guess = F.one_hot(predicted, truth.shape[1]).double()
    sums = ((truth * guess).sum(dim=0), truth.sum(dim=0), (guess * evaluated.labeled[:, None]).sum(dim=0))
    # `mean_iou` takes whole counts: fractions as multiples of 2^-20
    pixels = (np.rint(one.cpu().numpy() * 2**20).astype(np.int64) for one in sums)
    return float(mean_iou(Overlap(*pixels)))


def _held_out(images: Tensor, fraction: float, seed: int) -> Tensor:
    """bool (M,): whether the image of a position is held out; at least one image is, and one is not."""
    # whole images, since positions of one image are alike: holding out some of them would flatter the probe
    numbers = torch.unique(images)
    if len(numbers) < 2:
        raise DataError(
            "evaluate.data: masks of a single training image are too few for a linear probe; give at least two"
        )
    count = min(max(1, round(fraction * len(numbers))), len(numbers) - 1)
    generator = torch.Generator().manual_seed(derive("place holdout", seed))
    chosen = torch.randperm(len(numbers), generator=generator)[:count].to(numbers.device)
    return torch.isin(images, numbers[chosen])
