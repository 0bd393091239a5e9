"""Settings of the evaluators, one section each: ``evaluate.knn``, ``evaluate.linear``, ...

The order is that of `unlabeled.eval.registry.EVALUATORS`.
"""

from __future__ import annotations

from pydantic import Field

from unlabeled.ssl.section import Section


class KnnConfig(Section):
    """Weighted kNN through faiss, the protocol of DINO."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = Field(0.07, gt=0)


class LinearConfig(Section):
    """Linear probe on cached features: a grid trained in one pass, chosen on a split of the training set."""

    lr: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD with momentum, for standardised features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training set that chooses the head."""
