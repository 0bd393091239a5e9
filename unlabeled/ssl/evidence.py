"""Where a run meets `unlabeled.eval`: kNN while it goes, the full evaluation and the report when it ends."""

from __future__ import annotations

import logging

import torch

from unlabeled.ssl.backbone import Backbone
from unlabeled.ssl.data.source import ImageSource, Split, open_source
from unlabeled.ssl.errors import DataError
from unlabeled.ssl.schema import DataConfig, EvaluateConfig, PretrainConfig

logger = logging.getLogger(__name__)


def labelled_data(config: PretrainConfig) -> tuple[ImageSource, ImageSource] | None:
    """(train, test) sources with labels for evaluation; None, with the reason in the log, when there are none."""
    data = config.evaluate.data or config.data.model_copy(update={"labels": True, "limit": None})
    try:
        train, test = (labelled_split(data, split, config.evaluate) for split in ("train", "test"))
    except DataError as error:
        if config.evaluate.data is not None:
            raise
        logger.info("no evaluation: %s", error)
        return None
    return train, test


def labelled_split(data: DataConfig, split: Split, evaluate: EvaluateConfig) -> ImageSource:
    """One split with labels, of at most ``evaluate.limit`` pictures. Raises DataError when it has no labels."""
    limit = min((value for value in (data.limit, evaluate.limit) if value is not None), default=None)
    source = open_source(data.model_copy(update={"limit": limit}), split)
    if source.labels() is None:
        raise DataError(f"data: {data.name} {data.path or ''} has no labels; give evaluate.data=... with labels")
    return source


class OnlineEvaluation:
    """kNN on held-out labelled pictures every few epochs; never due when there are none."""

    def __init__(self, config: PretrainConfig, data: tuple[ImageSource, ImageSource] | None, steps_per_epoch: int) -> None:
        self._config, self._data = config.evaluate, data
        wanted = config.evaluate.every > 0 and data is not None
        self.every_steps = max(round(config.evaluate.every * steps_per_epoch), 1) if wanted else None

    def due(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0

    def run(self, backbone: Backbone, device: torch.device) -> dict[str, float]:
        """``eval/knn_k20`` and its like on the main process; other ranks help to extract features."""
        from unlabeled.eval.suite import online_knn

        assert self._data is not None, "run() without data"
        train, test = self._data
        return {f"eval/{name}": value for name, value in online_knn(backbone, train, test, self._config, device).items()}


def conclude(run, seconds):
    return None, None
