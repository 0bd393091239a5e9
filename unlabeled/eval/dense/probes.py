"""Two ways to tell what a single place shows: a linear layer, and the nearest places of a memory bank.

Shapes: M training places, Q asked ones, C channels, K classes, H learning rates.
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
"""The batch for which the learning rates of the settings are meant."""
_QUERIES = 1024
"""Places compared with the bank at a time."""


@dataclass(frozen=True)
class LabeledFeatures:
    """Training places, all on one device."""

    features: Tensor
    """float32 (M, C)."""
    shares: Tensor
    """float32 (M, K): part of each class, rows sum to 1."""
    known: Tensor
    """float32 (M,): part of the place that is labeled at all, more than 0."""
    images: Tensor
    """int64 (M,): number of the image that each comes from."""

    def part(self, rows: Tensor) -> LabeledFeatures:
        """The places `rows`, a mask or numbers."""
        return LabeledFeatures(self.features[rows], self.shares[rows], self.known[rows], self.images[rows])


class ProbeSettings(Protocol):
    """What the linear probe reads of an evaluator's settings."""

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
    """One linear layer on standardized features, trained on soft labels.

    Its loss is the cross-entropy of the place's shares, weighted by the part that is known: that of all known pixels if
    each took the scores of its place. The learning rate is the one of highest mean IoU, counted in parts of places, on
    training images held out (ties: the lower); the layer is then trained anew on all of them.

    Attributes: `lr`, `holdout_miou`, `diverged` (number of rates that ended in a weight that is not finite).
    Raises DataError for a single image, and when all rates diverge.
    """

    def __init__(self, positions: LabeledFeatures, config: ProbeSettings, seed: int) -> None:
        self._mean = positions.features.mean(dim=0)
        deviation = positions.features.std(dim=0, correction=0)
        constant = deviation <= 1e-6 * self._mean.abs().clamp(min=1e-6)  # what rounding leaves of zero variance
        self._deviation = torch.where(constant, 1, deviation)
        held = _held_out(positions.images, config.holdout, seed)
        self.lr, self.holdout_miou, self.diverged = self._choose(positions, held, config, seed)
        self._weights = self._fit(positions, [self.lr], config, seed)[0]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Logits (Q, K) of features (Q, C)."""
        return self._standard(features) @ self._weights

    def _standard(self, features: Tensor) -> Tensor:
        """Standardized features with a column of ones, (Q, C + 1)."""
        return F.pad((features - self._mean) / self._deviation, (0, 1), value=1.0)

    def _choose(
        self, positions: LabeledFeatures, held: Tensor, config: ProbeSettings, seed: int
    ) -> tuple[float, float, int]:
        rates = sorted(set(config.lr))
        heads = self._fit(positions.part(~held), rates, config, seed)
        evaluated = positions.part(held)
        alive = [bool(head.isfinite().all()) for head in heads]
        if not any(alive):
            raise DataError(
                f"evaluate.segmentation.lr: all {len(rates)} diverged; add smaller values than {rates[0]:g}"
            )
        features = self._standard(evaluated.features)
        results = [
            soft_miou(evaluated, (features @ head).argmax(dim=1)) if good else -1.0
            for head, good in zip(heads, alive, strict=True)
        ]
        best = max(range(len(rates)), key=results.__getitem__)
        return rates[best], results[best], len(alive) - sum(alive)

    @torch.enable_grad()
    def _fit(
        self, positions: LabeledFeatures, rates: Sequence[float], config: ProbeSettings, seed: int
    ) -> list[Tensor]:
        """One head (C + 1, K) for each rate, all from zero and on the same batches; none reads a number of another."""
        features, (count, classes) = self._standard(positions.features), positions.shares.shape
        batch = min(config.batch_size, count)
        heads = [features.new_zeros(features.shape[1], classes, requires_grad=True) for _ in rates]
        optimizer = torch.optim.SGD(
            [{"params": [head], "lr": lr * batch / _LR_BATCH} for head, lr in zip(heads, rates, strict=True)],
            momentum=_MOMENTUM, weight_decay=config.weight_decay,
        )  # fmt: skip
        steps = config.epochs * (count // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(derive("place probe", seed))
        for _ in range(config.epochs):
            order = torch.randperm(count, generator=generator)[: count // batch * batch].to(features.device)
            for rows in torch.split(order, batch):
                weights = positions.known[rows] / positions.known[rows].sum()
                losses = [
                    F.cross_entropy(features[rows] @ head, positions.shares[rows], reduction="none") @ weights
                    for head in heads
                ]
                optimizer.zero_grad()
                torch.autograd.backward(losses)
                optimizer.step()
                schedule.step()
        return [head.detach() for head in heads]


class NearestSegmenter:
    """The labels of the nearest places of a memory bank (Balazevic et al., Hummingbird, 2023, arXiv 2306.01667).

    The `k` most similar by cosine vote with their shares of the classes, weighted by a softmax of cosine /
    `temperature`.
    """

    def __init__(self, positions: LabeledFeatures, k: int, temperature: float) -> None:
        self._bank, self._shares = F.normalize(positions.features, dim=1), positions.shares
        self.k, self.temperature = min(k, len(positions.shares)), temperature

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Shares of the classes (Q, K), which sum to 1, for features (Q, C)."""
        found = []
        for rows in torch.split(F.normalize(features, dim=1), _QUERIES):
            cosines, nearest = (rows @ self._bank.T).topk(self.k, dim=1)
            votes = (cosines / self.temperature).softmax(dim=1)
            found.append((votes[:, :, None] * self._shares[nearest]).sum(dim=1))
        return torch.cat(found)


def soft_miou(positions: LabeledFeatures, predicted: Tensor) -> float:
    """Mean IoU of one class (M,) for each place, where a place counts by what is known of it."""
    truth = (positions.shares * positions.known[:, None]).double()  # (M, K)
    guess = F.one_hot(predicted, truth.shape[1]).double()
    sums = ((truth * guess).sum(dim=0), truth.sum(dim=0), (guess * positions.known[:, None]).sum(dim=0))
    pixels = (np.rint(one.cpu().numpy() * 2**20).astype(np.int64) for one in sums)  # counts, as of pixels
    return float(mean_iou(Overlap(*pixels)))


def _held_out(images: Tensor, fraction: float, seed: int) -> Tensor:
    """bool (M,): whether a place's image is held out; at least one is, and one is not."""
    numbers = torch.unique(images)
    if len(numbers) < 2:
        raise DataError("evaluate.data: the masks of a single training image are too few for a linear probe")
    count = min(max(1, round(fraction * len(numbers))), len(numbers) - 1)
    generator = torch.Generator().manual_seed(derive("place holdout", seed))
    chosen = torch.randperm(len(numbers), generator=generator)[:count].to(numbers.device)
    return torch.isin(images, numbers[chosen])
