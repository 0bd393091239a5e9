"""Many linear classifiers trained side by side: one matrix product for all heads that read the same features.

Shapes: H heads, C classes, D features, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlabeled.ssl.core.cpu import matrix_product

_MOMENTUM = 0.9
_LOGITS = 2**24
"""Numbers that the hold-out computes at a time."""
_CACHE = 2**20
"""Weights that a CPU's caches hold; a step takes more of them in parts."""


@dataclass(frozen=True)
class Setting:
    """What one head is trained with."""

    lr: float
    """Peak learning rate for a batch of 256."""
    weight_decay: float


class GroupedSgd:
    """H linear softmax classifiers trained side by side by SGD with momentum 0.9, each with its own rate and decay.

    The heads are blocks of rows in one float32 matrix (H C, D), so none reads a number of another: one that diverges to
    inf or NaN leaves the others as they are. There is no gradient scaler that they would share. Weight decay spares the
    biases. Every head starts from `start` (C, D), by default zero, and a bias of zero. A step is that of torch's SGD on
    the mean cross-entropy of each head.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        grid: Sequence[Setting],
        *,
        device: torch.device,
        lr_scale: float = 1.0,
        start: Tensor | None = None,
    ) -> None:
        self.classes = classes
        rows = len(grid) * classes
        self.weights = torch.zeros(rows, width, device=device)  # (H C, D)
        if start is not None:
            self.weights.copy_(start.repeat(len(grid), 1))
        self.biases = torch.zeros(rows, 1, device=device)
        self._momentum, self._bias_momentum = torch.zeros_like(self.weights), torch.zeros_like(self.biases)

        def of_rows(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(classes)[:, None]

        self._rates = of_rows([setting.lr for setting in grid]) * lr_scale
        self._decays = of_rows([setting.weight_decay for setting in grid])
        self._minus_one = torch.tensor([[-1.0]], device=device)
        self._product = matrix_product(device)
        self._parts = self._split(grid, width, device)

    def step(self, features: Tensor, labels: Tensor, *, rate: float) -> None:
        """One step on features (B, D) and labels (B,), with all learning rates multiplied by `rate`."""
        features = features.contiguous()
        positions = labels * len(labels) + torch.arange(len(labels), device=labels.device)
        with torch.no_grad():
            for part, decayed in self._parts:
                self._step(part, decayed, features, positions, rate)

    def scores(self, features: Tensor) -> Tensor:
        """Features (N, D) → logits (H, C, N)."""
        with torch.no_grad():
            logits = self._product(self.weights, features.contiguous()) + self.biases
        return logits.view(-1, self.classes, len(features))

    def finite(self) -> Tensor:
        """Which heads have finite weights, bool (H,)."""
        rows = self.weights.isfinite().all(dim=1) & self.biases.isfinite().all(dim=1)
        return rows.view(-1, self.classes).all(dim=1)

    def heads(self) -> tuple[Tensor, Tensor]:
        """Weights (H, C, D) and biases (H, C)."""
        return self.weights.view(-1, self.classes, self.weights.shape[1]), self.biases.view(-1, self.classes)

    def _split(self, grid: Sequence[Setting], width: int, device: torch.device) -> list[tuple[slice, bool]]:
        """Rows of the heads that are trained together, and whether any of them decays."""
        held = max(1, _CACHE // (self.classes * width)) if device.type == "cpu" else len(grid)
        starts = range(0, len(grid), held)
        return [
            (
                slice(first * self.classes, (first + held) * self.classes),
                any(setting.weight_decay for setting in grid[first : first + held]),
            )
            for first in starts
        ]

    def _step(self, part: slice, decayed: bool, features: Tensor, positions: Tensor, rate: float) -> None:
        """`positions` (B,): where in (C B) the true class of each image lies."""
        weights, momentum, rates = self.weights[part], self._momentum[part], self._rates[part]
        count = len(positions)
        logits = self._product(weights, features).add_(self.biases[part]).view(-1, self.classes, count)
        residual = logits.softmax(dim=1)  # gradient of the cross-entropy: softmax minus one-hot
        flat = residual.view(len(residual), -1)
        flat.index_add_(1, positions, self._minus_one.expand(len(flat), count))
        residual = residual.view(-1, count).mul_(1 / count)  # (H C, B)
        # the transpose of contiguous features is what both of its operands may be
        torch.add(self._product(residual, features.t()), momentum, alpha=_MOMENTUM, out=momentum)
        if decayed:
            momentum.addcmul_(weights, self._decays[part])
        weights.addcmul_(momentum, rates, value=-rate)
        of_bias = self._bias_momentum[part]
        torch.add(residual.sum(dim=1, keepdim=True), of_bias, alpha=_MOMENTUM, out=of_bias)
        self.biases[part].addcmul_(of_bias, rates, value=-rate)


def hold_out(heads: GroupedSgd, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cross-entropy of each head on features (N, D): float64 (H,) each."""
    hits = losses = torch.zeros((), dtype=torch.float64, device=features.device)
    rows = max(1, _LOGITS // len(heads.weights))
    for part, truth in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
        logits = heads.scores(part)  # (H, C, N)
        hits = hits + (logits.argmax(dim=1) == truth).double().sum(dim=1)
        targets = truth.expand(len(logits), -1)
        losses = losses + torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum(dim=1)
    return hits / len(labels), losses / len(labels)
