"""Many linear classifiers trained at once: one matrix product for all heads with the same input.

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
"""Logits that `hold_out` computes at a time; bounds memory."""
_CACHE = 2**20
"""Weights that fit into a CPU's caches; a step updates more of them in chunks."""


@dataclass(frozen=True)
class Setting:
    """Training settings of a head."""

    lr: float
    """Peak learning rate for a batch of 256."""
    weight_decay: float


class GroupedSgd:
    """H linear softmax classifiers trained by SGD with momentum 0.9, each with its own learning rate and weight decay.

    The heads are blocks of rows of one float32 matrix (H C, D) and share nothing, so a head that diverges to inf or NaN
    does not affect the others; for that reason there is no gradient scaler. Biases are not decayed. Weights start from
    `start` (C, D), by default zero, and biases from zero. A step equals that of torch's SGD on the mean cross-entropy
    of each head.
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

        def per_row(values: list[float]) -> Tensor:
            """One value per head → one per row, (H C, 1)."""
            return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(classes)[:, None]

        self._learning_rates = per_row([setting.lr for setting in grid]) * lr_scale
        self._decays = per_row([setting.weight_decay for setting in grid])
        self._minus_one = torch.tensor([[-1.0]], device=device)
        self._product = matrix_product(device)
        self._chunks = self._split(grid, width, device)

    def step(self, features: Tensor, labels: Tensor, *, lr_factor: float) -> None:
        """One step on features (B, D) and labels (B,), with all learning rates multiplied by `lr_factor`."""
        features = features.contiguous()
        positions = labels * len(labels) + torch.arange(len(labels), device=labels.device)
        with torch.no_grad():
            for rows, decayed in self._chunks:
                self._step(rows, decayed, features, positions, lr_factor)

    def scores(self, features: Tensor) -> Tensor:
        """Logits (H, C, N) of features (N, D)."""
        with torch.no_grad():
            logits = self._product(self.weights, features.contiguous()) + self.biases
        return logits.view(-1, self.classes, len(features))

    def finite(self) -> Tensor:
        """Whether all weights of a head are finite, bool (H,)."""
        rows = self.weights.isfinite().all(dim=1) & self.biases.isfinite().all(dim=1)
        return rows.view(-1, self.classes).all(dim=1)

    def heads(self) -> tuple[Tensor, Tensor]:
        """Weights (H, C, D) and biases (H, C)."""
        return self.weights.view(-1, self.classes, self.weights.shape[1]), self.biases.view(-1, self.classes)

    def _split(self, grid: Sequence[Setting], width: int, device: torch.device) -> list[tuple[slice, bool]]:
        """Chunks of heads that are updated together: their rows, and whether any of them has weight decay."""
        heads = max(1, _CACHE // (self.classes * width)) if device.type == "cpu" else len(grid)
        return [
            (
                slice(first * self.classes, (first + heads) * self.classes),
                any(setting.weight_decay for setting in grid[first : first + heads]),
            )
            for first in range(0, len(grid), heads)
        ]

    def _step(self, rows: slice, decayed: bool, features: Tensor, positions: Tensor, lr_factor: float) -> None:
        """Updates the heads in `rows`; `positions` (B,): index of each image's true class in a flat (C B)."""
        weights, momentum, learning_rates = self.weights[rows], self._momentum[rows], self._learning_rates[rows]
        count = len(positions)
        logits = self._product(weights, features).add_(self.biases[rows]).view(-1, self.classes, count)
        # gradient of the cross-entropy: softmax minus one-hot, (heads, C, B)
        residual = logits.softmax(dim=1)
        flat = residual.view(len(residual), -1)
        flat.index_add_(1, positions, self._minus_one.expand(len(flat), count))
        residual = residual.view(-1, count).mul_(1 / count)  # (H C, B)
        # `_product` accepts a contiguous second operand or, as here, the transpose of one
        torch.add(self._product(residual, features.t()), momentum, alpha=_MOMENTUM, out=momentum)
        if decayed:
            momentum.addcmul_(weights, self._decays[rows])
        weights.addcmul_(momentum, learning_rates, value=-lr_factor)
        bias_momentum = self._bias_momentum[rows]
        torch.add(residual.sum(dim=1, keepdim=True), bias_momentum, alpha=_MOMENTUM, out=bias_momentum)
        self.biases[rows].addcmul_(bias_momentum, learning_rates, value=-lr_factor)


def hold_out(heads: GroupedSgd, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cross-entropy of each head on features (N, D) and labels (N,): float64 (H,) each."""
    hits = losses = torch.zeros((), dtype=torch.float64, device=features.device)
    rows = max(1, _LOGITS // len(heads.weights))
    for chunk, truth in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
        logits = heads.scores(chunk)  # (H, C, N)
        hits = hits + (logits.argmax(dim=1) == truth).double().sum(dim=1)
        targets = truth.expand(len(logits), -1)
        losses = losses + torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum(dim=1)
    return hits / len(labels), losses / len(labels)
