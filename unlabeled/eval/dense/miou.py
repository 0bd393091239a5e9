"""Mean intersection over union (IoU) of a test set, with bootstrap intervals over its images.

Shapes: N images, K classes including the background.
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
    """Pixel counts of each class: diagonal and margins of a confusion matrix, each int64 (..., K)."""

    hits: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]


def overlap(truth: Tensor, predicted: Tensor, classes: int, ignore: int = 255) -> Overlap:
    """Pixel counts (B, K) of each image, for masks (B, h, w); pixels whose true value is `ignore` do not count."""
    labeled = truth != ignore
    # an offset for each image: one histogram counts all images of the batch
    image = torch.arange(len(truth), device=truth.device)[:, None, None] * classes

    def counted(values: Tensor, among: Tensor) -> npt.NDArray[np.int64]:
        found = torch.bincount((values.long() + image)[among], minlength=len(truth) * classes)
        return found.view(len(truth), classes).cpu().numpy().astype(np.int64)

    hits = counted(truth, labeled & (truth == predicted))
    return Overlap(hits, counted(truth, labeled), counted(predicted, labeled))


def joined(batches: list[Overlap]) -> Overlap:
    """Concatenates the counts of several batches."""
    return Overlap(*(np.concatenate(counts) for counts in zip(*batches, strict=True)))


def class_iou(counts: Overlap) -> Floats:
    """IoU of each class, (..., K); NaN for classes that occur neither in the truth nor in the prediction."""
    union = counts.truth + counts.predicted - counts.hits
    return np.where(union > 0, counts.hits / np.maximum(union, 1), np.nan)


def mean_iou(counts: Overlap) -> Floats:
    """Mean IoU over the classes that occur in truth or prediction, (...,); 0 if there are none."""
    found = class_iou(counts)
    present = ~np.isnan(found)
    mean: Floats = np.where(present, found, 0).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
    return mean


def pixel_accuracy(counts: Overlap) -> Floats:
    """Fraction of labeled pixels that are predicted correctly, (...,); 0 if none is labeled."""
    right: Floats = counts.hits.sum(axis=-1) / np.maximum(counts.truth.sum(axis=-1), 1)
    return right


def estimates(counts: Overlap, seed: int) -> tuple[Estimate, Estimate]:
    """Mean IoU and pixel accuracy of the test set from counts (N, K).

    The 95 % intervals are percentiles over 1000 bootstrap samples of the images.
    """
    total_counts = Overlap(*(one.sum(axis=0) for one in counts))
    random, total = np.random.default_rng(seed), len(counts.hits)
    stacked = np.concatenate(counts, axis=1)  # (N, 3K)
    rows = [
        np.bincount(random.integers(total, size=total), minlength=total).astype(np.float64) @ stacked
        for _ in range(_RESAMPLES)
    ]
    # multiplicities times counts, in float64 for BLAS: exact below 2^53
    resampled = Overlap(*np.split(np.rint(np.stack(rows)).astype(np.int64), 3, axis=1))
    miou, accuracy = (
        Estimate(float(measure(total_counts)), *map(float, np.quantile(measure(resampled), [0.025, 0.975])))
        for measure in (mean_iou, pixel_accuracy)
    )
    return miou, accuracy
