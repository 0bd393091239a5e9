"""Mean intersection over union of a test set, with an interval from its images.

Shapes: N images, K classes with the background.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unlabeled.eval.base import Estimate

_RESAMPLES = 1000
Floats = npt.NDArray[np.float64]


class Overlap(NamedTuple):
    """Pixels of each class, the diagonal and the margins of a confusion matrix: each int64 (..., K)."""

    hits: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]


def overlap(truth: Tensor, predicted: Tensor, classes: int, ignore: int = 255) -> Overlap:
    """Of each image by itself, (B, K), for masks (B, h, w); pixels whose truth is `ignore` count nowhere."""
    known = truth != ignore
    image = torch.arange(len(truth), device=truth.device)[:, None, None] * classes

    def counted(values: Tensor, among: Tensor) -> npt.NDArray[np.int64]:
        found = torch.bincount((values.long() + image)[among], minlength=len(truth) * classes)
        return found.view(len(truth), classes).cpu().numpy().astype(np.int64)

    return Overlap(counted(truth, known & (truth == predicted)), counted(truth, known), counted(predicted, known))


def joined(parts: list[Overlap]) -> Overlap:
    """All images of several batches."""
    return Overlap(*(np.concatenate(one) for one in zip(*parts, strict=True)))


def class_iou(counts: Overlap) -> Floats:
    """Intersection over union of each class, (..., K); NaN for a class that neither truth nor prediction has."""
    union = counts.truth + counts.predicted - counts.hits
    return np.where(union > 0, counts.hits / np.maximum(union, 1), np.nan)


def mean_iou(counts: Overlap) -> Floats:
    """Mean over the classes that truth or prediction have, (...,); 0 where there is none."""
    found = class_iou(counts)
    present = ~np.isnan(found)
    mean: Floats = np.where(present, found, 0).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
    return mean


def pixel_accuracy(counts: Overlap) -> Floats:
    """Part of the known pixels that are right, (...,); 0 where none is known."""
    right: Floats = counts.hits.sum(axis=-1) / np.maximum(counts.truth.sum(axis=-1), 1)
    return right


def estimates(counts: Overlap, seed: int) -> tuple[Estimate, Estimate]:
    """(mean IoU, pixel accuracy) of the whole test set from counts (N, K).

    The 95 % intervals are percentiles over test sets of as many images drawn with replacement.
    """
    whole = Overlap(*(one.sum(axis=0) for one in counts))
    random, total = np.random.default_rng(seed), len(counts.hits)
    stacked = np.concatenate(counts, axis=1)  # (N, 3K)
    rows = [
        np.bincount(random.integers(total, size=total), minlength=total).astype(np.float64) @ stacked
        for _ in range(_RESAMPLES)
    ]
    again = Overlap(*np.split(np.rint(np.stack(rows)).astype(np.int64), 3, axis=1))
    miou, accuracy = (
        Estimate(float(measure(whole)), *(float(limit) for limit in np.quantile(measure(again), [0.025, 0.975])))
        for measure in (mean_iou, pixel_accuracy)
    )
    return miou, accuracy
