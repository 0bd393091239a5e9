"""Settings of the evaluators, one section each: ``evaluate.knn``, ``evaluate.linear``, ...

The order is that of `unlabeled.eval.registry.EVALUATORS`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unlabeled.ssl.section import Section


class KnnConfig(Section):
    """Weighted kNN through faiss, the protocol of DINO."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = Field(0.07, gt=0)


class LinearConfig(Section):
    """Linear probe on frozen features: a grid trained in one pass, chosen on a split of the training set."""

    grid: Literal["dinov2"] | None = None
    """dinov2: the 52 heads of DINOv2 (arXiv 2304.07193): 13 learning rates, class tokens of the last 1 and 4 blocks,
    without and with the average of the patches, no decay, weights from N(0, 0.01). It stands for lr, weight_decay,
    blocks, pooling and init."""
    lr: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD with momentum, for standardised features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also part of the grid: features of the last so many blocks (of a network of stages: stages), final norm applied.
    (): the pooled features alone."""
    pooling: tuple[Literal["cls", "avg", "cls+avg"], ...] = ()
    """What is read of these blocks: their class tokens, the averages of their patches, or the class tokens and the
    average of the last block's patches. (): cls where the network has a class token, else avg."""
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also probe the first so many pooled features (Matryoshka representations), each with its own choice, in the same
    pass."""
    init: float = Field(0.0, ge=0)
    """Standard deviation of the first weights."""
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training set that chooses the head."""
    augment: bool = False
    """Train on random crops and flips, encoded anew in each epoch, and not on cached features. The hold-out is not
    augmented; raw pixels are not either."""
    augment_epochs: int = Field(10, ge=1)
    """Epochs with `augment`, instead of `epochs`; each is a pass of the network over the training set, and there are
    two trainings: for the choice and for the result."""
