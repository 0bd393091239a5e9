"""Accuracy of a fine-tuned classifier on the test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from unlabeled.eval.base import Estimate, IntArray
from unlabeled.eval.features.extract import extract_features, is_main_process
from unlabeled.eval.intervals import wilson
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.renamed import OldNames
from unlabeled.ssl.task import PretextTask
from unlabeled.workflows.finetune.classifier import logits_of
from unlabeled.workflows.finetune.config import FinetuneConfig
from unlabeled.workflows.finetune.data import LabeledImages
from unlabeled.workflows.finetune.task import Finetune


@dataclass(frozen=True)
class Accuracy(OldNames, pictures="images"):
    """Test accuracy of one set of weights."""

    values: Mapping[str, Estimate]
    """``top1``, and ``top5`` with more than five classes, with 95 % Wilson intervals."""
    images: int
    """Number of test images, without skipped ones."""
    confusion: IntArray
    """(C, C): true class by predicted class."""
    skipped: tuple[str, ...] = ()
    """Images that could not be decoded."""


def measure_accuracy(backbone: Backbone, test: LabeledImages, config: FinetuneConfig, device: torch.device) -> Accuracy:
    """Measures the top-1 and top-5 accuracy of `backbone` on `test`, without changing its train or eval mode.

    Under torch.distributed, every process must call it. Raises DataError if outputs are not finite or no image can be
    decoded.
    """
    outputs = extract_features(
        backbone, test.source, outputs=logits_of, batch_size=config.evaluate.batch_size, workers=config.engine.workers,
        device=device, precision=config.engine.precision,
    )  # fmt: skip
    assert outputs.indices is not None, "extracted features have indices"
    return accuracy_of(outputs.features, test.labels.numpy()[outputs.indices], outputs.skipped)


def accuracy_of(logits: Any, labels: IntArray, skipped: tuple[str, ...] = ()) -> Accuracy:
    """Accuracy of `logits`, float (N, C), for `labels`, int64 (N,). Raises DataError if some are not finite."""
    # argmax of a row of NaN is 0, which would silently count as class 0
    broken = int((~np.isfinite(logits).all(axis=1)).sum())
    if broken:
        raise DataError(
            f"evaluate: the outputs for {broken} of {len(labels)} test images are NaN or infinite; lower optim.lr"
        )
    count, classes = logits.shape
    predicted = logits.argmax(axis=1)
    found = {"top1": float((predicted == labels).mean())}
    if classes > 5:
        found["top5"] = float(top_k_accuracy_score(labels, logits, k=5, labels=np.arange(classes)))
    return Accuracy(
        {name: Estimate(value, *wilson(value, count)) for name, value in found.items()},
        count,
        confusion_matrix(labels, predicted, labels=np.arange(classes)),
        skipped,
    )


class OnlineAccuracy:
    """Test accuracy every ``evaluate.every`` epochs, for a curve; never due if that is 0."""

    def __init__(self, config: FinetuneConfig, test: LabeledImages, steps_per_epoch: int) -> None:
        self._config, self._test = config, test
        every = config.evaluate.every
        self._every_steps = max(round(every * steps_per_epoch), 1) if every else None

    def due(self, step: int) -> bool:
        """Whether to measure after `step`."""
        return self._every_steps is not None and step % self._every_steps == 0

    def run(self, task: PretextTask, device: torch.device) -> dict[str, float]:
        """Returns ``test_top1`` (and ``test_top1_averaged`` for averaged weights) on the main process, {} elsewhere."""
        assert isinstance(task, Finetune), "used only by fine-tuning"
        found = {"test_top1": measure_accuracy(task.backbone, self._test, self._config, device)}
        if task.ema is not None:
            found["test_top1_averaged"] = measure_accuracy(task.encoder(), self._test, self._config, device)
        return {name: one.values["top1"].value for name, one in found.items()} if is_main_process() else {}
