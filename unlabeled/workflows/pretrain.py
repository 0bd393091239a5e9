"""``unlabeled pretrain``: from settings to a trained backbone, its evaluation and its report."""

from __future__ import annotations

import logging
import shlex
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
from unlabeled.ssl.core.errors import DataError, NoLabelsError
from unlabeled.ssl.core.files import writing
from unlabeled.ssl.core.renamed import OldNames
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.loader import LoadedBatch, ViewDataset, collate, seeded
from unlabeled.ssl.data.registry import labeled, open_source
from unlabeled.ssl.data.source import ImageSource, Split
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.accelerator import create_accelerator
from unlabeled.ssl.train.build import assemble, build_backbone
from unlabeled.ssl.train.loop import Training, train, unsharded_task
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.ssl.train.run_folder import Plan, claim_folder
from unlabeled.workflows.settings import compose_settings, log_replaced, settle_evaluation, tiny

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult(OldNames, evidence="results"):
    """The outcome of a pretraining run."""

    backbone: Backbone
    """The pretrained backbone, as it was evaluated and exported."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.jsonl``."""
    results: Results | None
    """The evaluation against the baselines; None without labels, on ranks other than the first, or if stopped."""
    out: Path
    """The run folder."""
    weights: Path
    """``backbone.safetensors``, which timm can load."""
    report: Path | None
    """``report.html``; None on ranks other than the first, without a final evaluation, or if stopped."""
    stopped: str | None
    """Name of the signal that stopped the run early; None if it is complete."""


def pretrain_config(
    overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None, backbone: Backbone | None = None
) -> PretrainConfig:
    """Returns the validated settings of a pretraining run, including those of its task, with debug mode applied.

    `backbone`: a model passed from Python, which replaces the one named in the settings. Raises ConfigError.
    """
    config = compose_settings("pretrain", overrides, PretrainConfig, values)
    task_config(config.task)  # only to report invalid settings of the task now
    if backbone is not None:
        config = config.model_copy(update={"backbone": record(backbone)})
    config = config.model_copy(update={"evaluate": settle_evaluation(config.evaluate, overrides, values)})
    if not config.debug:
        return config
    shrunk = shrink(config)
    log_replaced(config, shrunk, overrides, values)
    return shrunk


def swept_configs(overrides: Sequence[str]) -> list[tuple[str, PretrainConfig]]:
    """``--multirun``: (label, settings) of every combination of swept values; each has its own folder inside ``out``.

    All combinations are validated before the first one runs, so that an error in the last one costs nothing.
    """
    folders = [override.removeprefix("out=") for override in overrides if override.startswith("out=")]
    base = folders[-1] if folders else "runs/sweep"
    combinations = sweep([override for override in overrides if not override.startswith("out=")])
    # quoted, because labels contain characters with a meaning in hydra's grammar
    return [(label, pretrain_config([*swept, f"out='{Path(base) / label}'"])) for swept, label in combinations]


def shrink(config: PretrainConfig) -> PretrainConfig:
    """Applies debug mode: two epochs of two steps on 64 images, no workers; other settings stay as they are."""
    changes: dict[str, Any] = {"limit": 128}
    if "linear" in chosen_evaluators(config.evaluate):
        changes["linear"] = evaluator_config(config.evaluate, "linear").model_copy(update={"epochs": 2})
    evaluate = config.evaluate.model_copy(update=changes)
    return config.model_copy(update={**tiny(config), "evaluate": evaluate})


def pretrain_from(config: PretrainConfig, backbone: Backbone | None = None) -> PretrainResult:
    """Pretrains with validated settings, exports the backbone, evaluates it and writes the report.

    `backbone`: the model to train if it is passed from Python. It is trained in place.
    """
    with report_errors_once():  # the same input error occurs on every rank
        run = prepare(config, backbone)
    try:
        stopped = train(run)
    finally:
        run.monitor.close()
    task = unsharded_task(run)
    encoder = task.encoder()
    if run.accelerator.is_main_process:
        export_backbone(encoder, config.out, elastic=task.elastic())
    run.accelerator.wait_for_everyone()  # other ranks may read the exported file
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
    """Builds everything a run needs, and restores the newest checkpoint of its folder if there is one.

    Raises ConfigError, DataError, CapabilityError or CheckpointError before anything is written.
    """
    accelerator = create_accelerator(config.engine)
    checkpoint = claim_folder(config)
    source = open_source(config.data, "train")
    # open the data of the final evaluation now: an error in it should not surface after days of training
    evaluated = data_for_evaluation(config)
    plan = Plan.of(config, len(source), accelerator.num_processes)
    task = build_task(config, backbone)
    views = type(task).views(task.config, task.backbone)
    online = OnlineEvaluation(config, evaluated, plan.steps_per_epoch)
    dataset = ViewDataset(source, views, config.engine.seed)
    return assemble(config, accelerator, checkpoint, plan, task=task, dataset=dataset, online=online)


def build_task(config: PretrainConfig, backbone: Backbone | None = None) -> PretextTask:
    """Creates the task and its backbone, initialized from ``engine.seed``, and loads weights as set.

    `backbone`: as in `pretrain_from`.
    """
    # one seed for both, drawn in this order: it fixes the initial weights for all ranks
    torch.manual_seed(derive("weights", config.engine.seed))
    task = create_task(config.task, build_backbone(config.backbone, backbone))
    if config.reference is not None:
        missing, unexpected = task.load_reference(read_tensors(config.reference))
        logger.info(
            "task: loaded %s (missing: %s; unused: %s)", config.reference, missing or "none", unexpected or "none"
        )
    return task


def data_for_evaluation(config: PretrainConfig) -> tuple[ImageSource, ImageSource] | None:
    """`labeled_data` if it is needed during training, or if the final evaluation could reject it; else None.

    Raises DataError if the final evaluation would, for instance because an evaluator needs masks that the data does
    not have.
    """
    found = labeled_data(config) if opened_early(config.evaluate) else None
    if found is not None and config.evaluate.final:
        check_sources(config.evaluate, *found)
    return found


def opened_early(evaluate: EvaluateConfig) -> bool:
    """Whether `data_for_evaluation` opens the data."""
    # otherwise the data is the run's own, opened anyway, and lack of labels only skips the evaluation
    asked = evaluate.data is not None or looks_at_sources(evaluate)
    return evaluate.every > 0 or (evaluate.final and asked)


class OnlineEvaluation:
    """kNN accuracy on held-out labeled images every ``evaluate.every`` epochs; never due without labeled data."""

    def __init__(
        self, config: PretrainConfig, data: tuple[ImageSource, ImageSource] | None, steps_per_epoch: int
    ) -> None:
        self._config, self._data = config.evaluate, data
        self._masked = saw_masked_images_only(config)
        wanted = config.evaluate.every > 0 and data is not None
        self.every_steps = max(round(config.evaluate.every * steps_per_epoch), 1) if wanted else None

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step`."""
        return self.every_steps is not None and step % self.every_steps == 0

    def run(self, task: PretextTask, device: torch.device) -> dict[str, float]:
        """Returns ``eval/knn/k20`` etc. on the main process; the other ranks help to extract features."""
        assert self._data is not None, "run() is called only when due"
        train, test = self._data
        values = online_knn(task.encoder(), train, test, self._config, device, masked_statistics=self._masked)
        return {f"eval/{name}": value for name, value in values.items()}


def saw_masked_images_only(config: PretrainConfig) -> bool:
    """Whether the run's task, or a task of its mixture, collects batch-norm statistics on masked images only."""
    return task_class(config.task["name"]).masks_statistics(task_config(config.task))


def conclude(config: PretrainConfig, run: Training, task: PretextTask) -> tuple[Results | None, Path | None]:
    """Evaluates a finished run against its baselines and writes the report.

    `task` is the trained task, unsharded. Its images are stored in the run's ``pictures/``, for later reports. Returns
    (results, path of the report), or (None, None) on ranks other than the first.
    """
    encoder, device = task.encoder(), run.accelerator.device
    if not config.evaluate.final:
        return None, None
    data = labeled_data(config, explain=not opened_early(config.evaluate))
    results = None
    if data is not None:
        logger.info("evaluating on %d labeled training images and %d test images", len(data[0]), len(data[1]))
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
        # read back, so that this report is identical to one that `unlabeled evaluate` writes later
        report = write_report(config.out, summary, results, rows, read_images(config.out), type(task).captions)
    if results is not None:
        logger.info("%s", summarize(results).text)
    logger.info("report: %s", report)
    return results, report


def task_images(run: Training, task: PretextTask, count: int = 8) -> dict[str, Tensor]:
    """The task's visualizations of the first `count` training images, with a fixed seed: name → uint8 (3, H, W)."""
    views = type(task).views(task.config, task.backbone)
    dataset = ViewDataset(open_source(run.config.data, "train"), views, run.config.engine.seed)
    batch = collate([dataset[(0, index)] for index in range(min(count, len(dataset)))])
    assert isinstance(batch, LoadedBatch), "only a worker process returns an error in place of a batch"
    device = run.accelerator.device
    with evaluating(task), seeded(run.config.engine.seed):
        return task.visualize({name: tensor.to(device) for name, tensor in batch.tensors.items()})


def labeled_data(config: PretrainConfig, *, explain: bool = True) -> tuple[ImageSource, ImageSource] | None:
    """Opens the labeled (train, test) sources for evaluation.

    Returns None, and with `explain` logs why, if the run's own data has no labels. Raises DataError if
    ``evaluate.data`` has none.
    """
    # data.limit shortens training; the evaluation has evaluate.limit
    data = config.evaluate.data or labeled(config.data).model_copy(update={"limit": None})
    try:
        train, test = (labeled_split(data, split, config.evaluate) for split in ("train", "test"))
    except DataError as error:
        if config.evaluate.data is not None:
            raise
        if explain:
            logger.info("no evaluation: %s", _how_to_measure(config, error))
        return None
    return train, test


def _how_to_measure(config: PretrainConfig, error: DataError) -> str:
    """Why there is no evaluation, and how to get one."""
    # without labels that the user asked for, nothing is wrong with the data, and the error's remedy does not apply
    if not isinstance(error, NoLabelsError) or getattr(config.data, "labels", False):
        return str(error)
    command = f"unlabeled evaluate {shlex.quote(str(config.out))} data=folder data.path=LABELED data.labels=true"
    return f"the images have no labels; to measure, run: {command}"


def labeled_split(data: DataConfig, split: Split, evaluate: EvaluateConfig) -> ImageSource:
    """Opens one labeled split of at most ``evaluate.limit`` images. Raises DataError if it has no labels."""
    limit = min((value for value in (data.limit, evaluate.limit) if value is not None), default=None)
    source = open_source(data.model_copy(update={"limit": limit}), split)
    if source.labels() is None:
        raise NoLabelsError(f"data: {name_data(data)} has no labels; give evaluate.data=... with labels")
    return source
