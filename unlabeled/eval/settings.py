"""Settings of the evaluators, one section each: ``evaluate.knn``, ``evaluate.linear``, ...

The order is that of `unlabeled.eval.registry.EVALUATORS`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from unlabeled.ssl.section import Section


def _listed(value: Any) -> Any:
    """One number as a list of one."""
    return (value,) if isinstance(value, (int, float)) else value


class KnnConfig(Section):
    """Weighted kNN, the protocol of DINO."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)] = (0.07,)
    """One or several; the headline is 0.07, or the first where that is not among them."""
    search: Literal["exact", "reduced", "ivf", "hnsw"] = "exact"
    """exact: float32 · reduced: 8-bit products first, the same neighbours proven, faster where the processor has such
    instructions · ivf, hnsw: approximate, with their recall measured."""
    effort: int = Field(64, ge=1)
    """Of an approximate search: lists that ivf visits, breadth of the search through hnsw (at least k)."""
    memory_gb: float = Field(4.0, gt=0)
    """Of training features and what is made of them in memory at a time, in 1e9 bytes."""
    shots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also with so many training pictures of each class alone."""
    shot_draws: int = Field(5, ge=2)
    """Draws of these pictures, which give the mean and its interval."""


class LinearConfig(Section):
    """Linear probe on cached features: a grid trained in one pass, chosen on a split of the training set."""

    lr: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD with momentum, for standardised features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training set that chooses the head."""
