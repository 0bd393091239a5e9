"""Linear probe: one linear classifier on frozen, cached features, its settings chosen without the test split.

All settings of a grid are trained in one pass (as DINOv2's probe does, Oquab et al. 2023, 2304.07193): the heads see
the same batches, their weights lie side by side in one matrix, and a step is two matrix products whatever their number.

Shapes: N pictures, B of a batch, D features plus one column of ones (the bias), H heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unlabeled.eval.base import FloatArray, IntArray, Measure, Value, check_features
from unlabeled.eval.evaluators.knn import best_classes
from unlabeled.eval.settings import LinearConfig
from unlabeled.eval.subject import Subject
from unlabeled.ssl.errors import ConfigError, DataError

_MOMENTUM = 0.9
_LR_BATCH = 256
"""The batch for which the learning rates of the settings are meant."""
_ROWS = 8192
"""Pictures classified at a time."""


@dataclass(frozen=True)
class Setting:
    """What one head is trained with."""

    lr: float
    """Peak learning rate for a batch of 256."""
    weight_decay: float


class LinearEvaluator:
    """Accuracy of a linear classifier on standardised features.

    Every (lr, weight decay) of the grid is trained on the training split less a stratified hold-out; the hold-out
    chooses one setting (ties: lower loss), which is then trained anew on the whole training split and meets the test
    split once. Features are standardised with the training split's mean and deviation.

    Yields ``top1``, ``top5`` (more than five classes) and ``holdout_top1`` as fractions, ``lr``, ``weight_decay``,
    ``diverged`` (number of heads with a non-finite weight), ``predictions`` int64 (N,), ``confusion`` int64 (C, C) of
    true class by predicted class, and a ``note`` when the chosen lr lies at the edge of the grid.
    """

    name: ClassVar = "linear"
    title: ClassVar = "Linear probe"
    needs: ClassVar = "features"

    def __init__(self, config: LinearConfig) -> None:
        for field, values, least in (("lr", config.lr, math.ulp(0.0)), ("weight_decay", config.weight_decay, 0.0)):
            if not values or not all(math.isfinite(value) and value >= least for value in values):
                rule = "positive numbers" if field == "lr" else "numbers from 0"
                raise ConfigError(f"evaluate.linear.{field}: {list(values)} is not possible; give {rule}")
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        labels = {"top1": "linear probe", "top5": "linear probe, top 5"}
        return Measure(labels[key]) if key in labels else None

    def run(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        data, device, seed = subject.features, subject.device, subject.seed
        check_features(data)
        classes = len(data.classes)
        mean, deviation = statistics(data.train.features)
        train = _prepared(data.train.features, mean, deviation, device)
        labels = torch.from_numpy(data.train.labels).to(device)
        grid = [Setting(lr, decay) for decay in self.config.weight_decay for lr in self.config.lr]
        chosen, accuracy, diverged = self._choose(train, labels, data.train.labels, grid, classes, seed)
        final = self._fit(train, labels, [grid[chosen]], classes, seed)
        test = _prepared(data.test.features, mean, deviation, device)
        guesses = best_classes(_logits(final, test)[0].softmax(dim=1).cpu().numpy(), 5)
        hits = guesses == data.test.labels[:, None]
        yield "top1", float(hits[:, 0].mean())
        if classes > 5:
            yield "top5", float(hits.any(axis=1).mean())
        yield "holdout_top1", accuracy
        yield "lr", grid[chosen].lr
        yield "weight_decay", grid[chosen].weight_decay
        yield "diverged", diverged
        yield "predictions", guesses[:, 0]
        yield "confusion", confusion_matrix(data.test.labels, guesses[:, 0], classes)
        if len(set(self.config.lr)) > 2 and grid[chosen].lr in (min(self.config.lr), max(self.config.lr)):
            yield (
                "note",
                f"the chosen lr {grid[chosen].lr:g} is at the edge of the grid; evaluate.linear.lr may be too narrow",
            )

    def _choose(
        self, train: Tensor, labels: Tensor, on_host: IntArray, grid: list[Setting], classes: int, seed: int
    ) -> tuple[int, float, int]:
        """(index of the best setting, its hold-out accuracy, number of heads that diverged)."""
        kept, held = stratified_split(on_host, self.config.holdout, seed)
        rows, held_rows = (torch.from_numpy(part).to(train.device) for part in (kept, held))
        weights = self._fit(train[rows], labels[rows], grid, classes, seed)
        alive = weights.isfinite().all(dim=2).all(dim=1)
        if not bool(alive.any()):
            raise DataError(
                f"evaluate.linear.lr: all {len(grid)} heads diverged; add smaller values than {min(self.config.lr):g}"
            )
        logits = _logits(weights, train[held_rows])
        target = labels[held_rows]
        accuracy = (logits.argmax(dim=2) == target).double().mean(dim=1).where(alive, -1.0)
        loss = torch.stack([torch.nn.functional.cross_entropy(head, target) for head in logits])
        ranking = [
            (float(a), -float(v) if math.isfinite(v) else -math.inf) for a, v in zip(accuracy, loss, strict=True)
        ]
        best = max(range(len(grid)), key=ranking.__getitem__)
        return best, ranking[best][0], int((~alive).sum())

    def _fit(self, features: Tensor, labels: Tensor, grid: list[Setting], classes: int, seed: int) -> Tensor:
        """Trains one head per setting from zero; returns the weights, float32 (H, D + 1, C), bias last."""
        count = len(features)
        batch = min(self.config.batch_size, count)
        trainer = GroupedSgd(features.shape[1], classes, grid, device=features.device, lr_scale=batch / _LR_BATCH)
        generator = torch.Generator().manual_seed(seed)
        per_epoch = count // batch
        steps = self.config.epochs * per_epoch
        for epoch in range(self.config.epochs):
            order = torch.randperm(count, generator=generator)[: per_epoch * batch].to(features.device)
            for position, rows in enumerate(torch.split(order, batch)):
                progress = (epoch * per_epoch + position) / steps
                trainer.step(features[rows], labels[rows], rate=(1 + math.cos(math.pi * progress)) / 2)
        return trainer.heads()


class GroupedSgd:
    """H linear softmax classifiers trained side by side by SGD with momentum 0.9, each with its own rate and decay.

    The heads are blocks of columns in one float32 matrix (D, H C), so none reads a number of another: one that
    diverges to inf or NaN leaves the others as they are. Weight decay spares the last row, the bias.
    """

    def __init__(
        self, width: int, classes: int, grid: list[Setting], *, device: torch.device, lr_scale: float = 1.0
    ) -> None:
        self.classes = classes
        self.weights = torch.zeros(width, len(grid) * classes, device=device)
        self.momentum = torch.zeros_like(self.weights)
        rates = torch.tensor([setting.lr for setting in grid], dtype=torch.float32, device=device) * lr_scale
        decays = torch.tensor([setting.weight_decay for setting in grid], dtype=torch.float32, device=device)
        self.rates = rates.repeat_interleave(classes)  # (H C,)
        self.decays = decays.repeat_interleave(classes).repeat(width, 1)  # (D, H C)
        self.decays[-1] = 0

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, *, rate: float) -> None:
        """One step on features (B, D) and labels (B,), with all learning rates multiplied by `rate`."""
        count = len(features)
        logits = (features @ self.weights).view(count, -1, self.classes)
        residual = logits.softmax(dim=2)  # gradient of the cross-entropy: softmax minus one-hot
        residual[torch.arange(count, device=labels.device), :, labels] -= 1
        gradient = features.T @ residual.view(count, -1) / count
        gradient.addcmul_(self.decays, self.weights)
        self.momentum.mul_(_MOMENTUM).add_(gradient)
        self.weights.sub_(self.momentum * (self.rates * rate))

    def heads(self) -> Tensor:
        """Weights of each head, (H, D, C)."""
        return self.weights.view(len(self.weights), -1, self.classes).transpose(0, 1)


def _prepared(features: FloatArray, mean: FloatArray, deviation: FloatArray, device: torch.device) -> Tensor:
    """Standardised features with a column of ones, float32 (N, D + 1)."""
    rows = torch.from_numpy((features - mean) / deviation).to(device)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _logits(heads: Tensor, features: Tensor) -> Tensor:
    """(H, D, C), (N, D) → (H, N, C)."""
    return torch.cat([torch.einsum("nd,hdc->hnc", rows, heads) for rows in torch.split(features, _ROWS)], dim=1)


def statistics(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of each feature, float32 (D,); 1 for a feature that never changes."""
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = features.std(axis=0, dtype=np.float64)
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-6)  # what rounding leaves of zero variance
    return mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32)


def stratified_split(labels: IntArray, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Ascending indices (kept, held out): about `fraction` of each class held out, and at least one kept.

    Classes with a single picture are kept. Raises DataError when nothing can be held out.
    """
    generator = np.random.default_rng(seed)
    held: list[IntArray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        raise DataError(f"evaluate.data: {len(labels)} training pictures, one a class, are too few for a linear probe")
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def confusion_matrix(truth: IntArray, predicted: IntArray, classes: int) -> npt.NDArray[np.int64]:
    """int64 (C, C): pictures of each true class (row) by predicted class (column)."""
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)
