"""Where a run meets `unlabeled.eval`: kNN while it goes, the full evaluation and the report when it ends."""

from __future__ import annotations

import logging
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unlabeled.pretext.registry import task_class, task_config
from unlabeled.ssl.config.schema import DataConfig, EvaluateConfig, PretrainConfig
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.files import writing
from unlabeled.ssl.data.loader import LoadedBatch, ViewDataset, collate, seeded
from unlabeled.ssl.data.source import ImageSource, Split, open_source
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.monitor import read_metrics

if TYPE_CHECKING:
    from unlabeled.eval.results import Evidence
    from unlabeled.ssl.train.loop import Training

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

    def __init__(
        self, config: PretrainConfig, data: tuple[ImageSource, ImageSource] | None, steps_per_epoch: int
    ) -> None:
        self._config, self._data = config.evaluate, data
        self._masked = masked_statistics(config)
        wanted = config.evaluate.every > 0 and data is not None
        self.every_steps = max(round(config.evaluate.every * steps_per_epoch), 1) if wanted else None

    def due(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0

    def run(self, task: PretextTask, device: torch.device) -> dict[str, float]:
        """``eval/knn_k20`` and its like on the main process; other ranks help to extract features."""
        from unlabeled.eval.suite import online_knn

        assert self._data is not None, "run() without data"
        train, test = self._data
        values = online_knn(task.encoder(), train, test, self._config, device, masked_statistics=self._masked)
        return {f"eval/{name}": value for name, value in values.items()}


def masked_statistics(config: PretrainConfig) -> bool:
    """Whether the run's task, or one of a mixture, collects batch-norm statistics on masked pictures only."""
    return task_class(config.task["name"]).masks_statistics(task_config(config.task))


def conclude(config: PretrainConfig, run: Training, task: PretextTask) -> tuple[Evidence | None, Path | None]:
    """Evaluates a finished run against its baselines and writes the report; (None, None) off the main process.

    `task` is the trained task, unsharded. Its pictures stay in ``pictures/`` of the run's folder, for later reports.
    """
    from unlabeled.eval.comparison import judge
    from unlabeled.eval.suite import evaluate_backbone
    from unlabeled.report.page import write_report
    from unlabeled.report.pictures import read_pictures, save_pictures
    from unlabeled.report.summary import summarize_run

    encoder, device = task.encoder(), run.accelerator.device
    if not config.evaluate.final:
        return None, None
    data = labelled_data(config)
    evidence = None
    if data is not None:
        logger.info("evaluating: %d labelled training pictures, %d for testing", len(data[0]), len(data[1]))
        evidence = evaluate_backbone(
            encoder, *data, config.evaluate, work=config.out, device=device, seed=config.engine.seed,
            workers=config.engine.workers, masked_statistics=masked_statistics(config),
        )  # fmt: skip
    if not run.accelerator.is_main_process:
        return None, None
    rows = read_metrics(config.out / "metrics.jsonl")
    summary = summarize_run(config, encoder, device=str(device), rows=rows, date=date.today().isoformat())
    drawn = task_pictures(run, task)
    with writing("report"):
        save_pictures(config.out, drawn)
        report = write_report(config.out, summary, evidence, rows, read_pictures(config.out))
    if evidence is not None:
        logger.info("%s", judge(evidence).summary)
    logger.info("report: %s", report)
    return evidence, report


def task_pictures(run: Training, task: PretextTask, count: int = 8) -> dict[str, Tensor]:
    """What the task shows of the first pictures of the data, under fixed randomness."""
    from unlabeled.eval.features.extract import evaluating

    views = type(task).views(task.config, task.backbone)
    dataset = ViewDataset(open_source(run.config.data, "train"), views, run.config.engine.seed)
    batch = collate([dataset[(0, index)] for index in range(min(count, len(dataset)))])
    assert isinstance(batch, LoadedBatch), "only a loader's worker returns an error"
    device = run.accelerator.device
    with evaluating(task), seeded(run.config.engine.seed):
        return task.visualize({name: tensor.to(device) for name, tensor in batch.tensors.items()})
