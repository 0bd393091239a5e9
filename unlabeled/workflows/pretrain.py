"""``unlabeled pretrain``: from words to a backbone, its evaluation and its report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlabeled.eval.comparison import summarize
from unlabeled.eval.features.extract import evaluating
from unlabeled.eval.registry import check_sources, chosen_evaluators, evaluator_config, looks_at_sources
from unlabeled.eval.results import Results
from unlabeled.eval.runner import evaluate_backbone, online_knn
from unlabeled.pretext.registry import create_task, task_class, task_config
from unlabeled.report.images import read_images, save_images
from unlabeled.report.page import write_report
from unlabeled.report.summary import name_data, summarize_run
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.given import record
from unlabeled.ssl.backbones.weights import export_backbone, read_tensors
from unlabeled.ssl.config.composition import sweep
from unlabeled.ssl.config.schema import DataConfig, EvaluateConfig, PretrainConfig
from unlabeled.ssl.core.distributed import report_errors_once
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.files import writing
from unlabeled.ssl.core.renamed import OldNames
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.loader import LoadedBatch, ViewDataset, collate, seeded
from unlabeled.ssl.data.registry import labeled, open_source
from unlabeled.ssl.data.source import ImageSource, Split
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.accelerator import create_accelerator
from unlabeled.ssl.train.build import assemble, build_backbone
from unlabeled.ssl.train.loop import Training, train, whole_task
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.ssl.train.run_folder import Plan, claim_folder
from unlabeled.workflows.settings import compose_settings, settle_evaluation, tiny

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult(OldNames, evidence="results"):
    """What a run leaves behind."""

    backbone: Backbone
    """The pretrained network, as evaluation received it."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.jsonl``."""
    results: Results | None
    """kNN and linear probe against the baselines; None without labels, off the first rank, or when stopped."""
    out: Path
    weights: Path
    """``backbone.safetensors``, which plain timm loads."""
    report: Path | None
    stopped: str | None
    """The signal that stopped the run early; None when it is complete."""


def pretrain_config(
    overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None, backbone: Backbone | None = None
) -> PretrainConfig:
    """The validated configuration of a pretraining run, its task's own settings and debug mode included.

    `backbone`: the network that is given from Python, in place of one that the settings name.
    """
    config = compose_settings("pretrain", overrides, PretrainConfig, values)
    task_config(config.task)
    if backbone is not None:
        config = config.model_copy(update={"backbone": record(backbone)})
    config = config.model_copy(update={"evaluate": settle_evaluation(config.evaluate, overrides, values)})
    return shrink(config) if config.debug else config


def swept_configs(overrides: Sequence[str]) -> list[tuple[str, PretrainConfig]]:
    """``--multirun``: (label, configuration) of every combination of swept values; each has a folder in ``out``.

    All of them are read before the first one is run, so that a fault in the last costs nothing.
    """
    base = next((word.removeprefix("out=") for word in reversed(overrides) if word.startswith("out=")), "runs/sweep")
    combinations = sweep([word for word in overrides if not word.startswith("out=")])
    return [(label, pretrain_config([*swept, f"out='{Path(base) / label}'"])) for swept, label in combinations]


def shrink(config: PretrainConfig) -> PretrainConfig:
    """Tiny mode: two epochs of two steps on 64 images, no workers; everything else as it was asked for."""
    changes: dict[str, Any] = {"limit": 128}
    if "linear" in chosen_evaluators(config.evaluate):
        changes["linear"] = evaluator_config(config.evaluate, "linear").model_copy(update={"epochs": 2})
    evaluate = config.evaluate.model_copy(update=changes)
    return config.model_copy(update={**tiny(config), "evaluate": evaluate})


def pretrain_from(config: PretrainConfig, backbone: Backbone | None = None) -> PretrainResult:
    """Pretrains under a validated configuration, exports the backbone, evaluates it and writes the report.

    `backbone`: the network to train, where it is given from Python; it is the run's own from here on.
    """
    with report_errors_once():
        run = prepare(config, backbone)
    try:
        stopped = train(run)
    finally:
        run.monitor.close()
    task = whole_task(run)
    encoder = task.encoder()
    if run.accelerator.is_main_process:
        export_backbone(encoder, config.out, elastic=task.elastic())
    run.accelerator.wait_for_everyone()
    results, report = (None, None) if stopped else conclude(config, run, task)
    return PretrainResult(
        backbone=encoder,
        metrics=read_metrics(config.out / "metrics.jsonl"),
        results=results,
        out=config.out,
        weights=config.out / "backbone.safetensors",
        report=report,
        stopped=stopped,
    )


def prepare(config: PretrainConfig, backbone: Backbone | None = None) -> Training:
    """Builds everything a run needs and restores the newest checkpoint of its folder, if there is one.

    Raises ConfigError, DataError, CapabilityError or CheckpointError, in one line, before anything is written.
    """
    accelerator = create_accelerator(config.engine)
    checkpoint = claim_folder(config)
    source = open_source(config.data, "train")
    evaluated = data_for_evaluation(config)
    plan = Plan.of(config, len(source), accelerator.num_processes)
    task = build_task(config, backbone)
    views = type(task).views(task.config, task.backbone)
    online = OnlineEvaluation(config, evaluated, plan.steps_per_epoch)
    dataset = ViewDataset(source, views, config.engine.seed)
    return assemble(config, accelerator, checkpoint, plan, task=task, dataset=dataset, online=online)


def build_task(config: PretrainConfig, backbone: Backbone | None = None) -> PretextTask:
    """The task around its backbone, initialized from ``engine.seed``, with the weights that were asked for."""
    torch.manual_seed(derive("weights", config.engine.seed))
    task = create_task(config.task, build_backbone(config.backbone, backbone))
    if config.reference is not None:
        missing, unexpected = task.load_reference(read_tensors(config.reference))
        logger.info(
            "task: read %s (missing: %s; not used: %s)", config.reference, missing or "none", unexpected or "none"
        )
    return task


def data_for_evaluation(config: PretrainConfig) -> tuple[ImageSource, ImageSource] | None:
    """`labeled_data` where it is needed while the run goes, or where the evaluation at its end may find a fault in it.

    Raises DataError for what the end would refuse.
    """
    evaluate = config.evaluate
    asked = evaluate.data is not None or looks_at_sources(evaluate)
    found = labeled_data(config) if evaluate.every or (evaluate.final and asked) else None
    if found is not None and evaluate.final:
        check_sources(evaluate, *found)
    return found


class OnlineEvaluation:
    """kNN on held-out labeled images every few epochs; never due when there are none."""

    def __init__(
        self, config: PretrainConfig, data: tuple[ImageSource, ImageSource] | None, steps_per_epoch: int
    ) -> None:
        self._config, self._data = config.evaluate, data
        self._masked = saw_masked_images_only(config)
        wanted = config.evaluate.every > 0 and data is not None
        self.every_steps = max(round(config.evaluate.every * steps_per_epoch), 1) if wanted else None

    def due(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0

    def run(self, task: PretextTask, device: torch.device) -> dict[str, float]:
        """``eval/knn_k20`` and its like on the main process; other ranks help to extract features."""
        assert self._data is not None, "run() without data"
        train, test = self._data
        values = online_knn(task.encoder(), train, test, self._config, device, masked_statistics=self._masked)
        return {f"eval/{name}": value for name, value in values.items()}


def saw_masked_images_only(config: PretrainConfig) -> bool:
    """Whether the run's task, or one of a mixture, collects batch-norm statistics on masked images only."""
    return task_class(config.task["name"]).masks_statistics(task_config(config.task))


def conclude(config: PretrainConfig, run: Training, task: PretextTask) -> tuple[Results | None, Path | None]:
    """Evaluates a finished run against its baselines and writes the report; (None, None) off the main process.

    `task` is the trained task, unsharded. Its images stay in ``images/`` of the run's folder, for later reports.
    """
    encoder, device = task.encoder(), run.accelerator.device
    if not config.evaluate.final:
        return None, None
    data = labeled_data(config)
    results = None
    if data is not None:
        logger.info("evaluating: %d labeled training images, %d for testing", len(data[0]), len(data[1]))
        results = evaluate_backbone(
            encoder, *data, config.evaluate, work=config.out, device=device, seed=config.engine.seed,
            workers=config.engine.workers, masked_statistics=saw_masked_images_only(config),
        )  # fmt: skip
    if not run.accelerator.is_main_process:
        return None, None
    rows = read_metrics(config.out / "metrics.jsonl")
    summary = summarize_run(config, encoder, device=str(device), rows=rows, date=date.today().isoformat())
    drawn = task_images(run, task)
    with writing("report"):
        save_images(config.out, drawn)
        report = write_report(config.out, summary, results, rows, read_images(config.out))
    if results is not None:
        logger.info("%s", summarize(results).text)
    logger.info("report: %s", report)
    return results, report


def task_images(run: Training, task: PretextTask, count: int = 8) -> dict[str, Tensor]:
    """What the task shows of the first images of the data, under fixed randomness."""
    views = type(task).views(task.config, task.backbone)
    dataset = ViewDataset(open_source(run.config.data, "train"), views, run.config.engine.seed)
    batch = collate([dataset[(0, index)] for index in range(min(count, len(dataset)))])
    assert isinstance(batch, LoadedBatch), "only a loader's worker returns an error"
    device = run.accelerator.device
    with evaluating(task), seeded(run.config.engine.seed):
        return task.visualize({name: tensor.to(device) for name, tensor in batch.tensors.items()})


def labeled_data(config: PretrainConfig) -> tuple[ImageSource, ImageSource] | None:
    """(train, test) sources with labels for evaluation; None, with the reason in the log, when there are none."""
    data = config.evaluate.data or labeled(config.data).model_copy(update={"limit": None})
    try:
        train, test = (labeled_split(data, split, config.evaluate) for split in ("train", "test"))
    except DataError as error:
        if config.evaluate.data is not None:
            raise
        logger.info("no evaluation: %s", error)
        return None
    return train, test


def labeled_split(data: DataConfig, split: Split, evaluate: EvaluateConfig) -> ImageSource:
    """One split with labels, of at most ``evaluate.limit`` images. Raises DataError when it has no labels."""
    limit = min((value for value in (data.limit, evaluate.limit) if value is not None), default=None)
    source = open_source(data.model_copy(update={"limit": limit}), split)
    if source.labels() is None:
        raise DataError(f"data: {name_data(data)} has no labels; give evaluate.data=... with labels")
    return source
