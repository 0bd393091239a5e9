"""``unlabeled finetune TARGET``: trains a classifier and a baseline, measures their accuracy, and writes a report."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unlabeled.eval.encoded_dataset import random_twin
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.given import record
from unlabeled.ssl.backbones.weights import export_backbone
from unlabeled.ssl.config.composition import validate
from unlabeled.ssl.config.schema import DataConfig, EvaluateRun, PretrainConfig
from unlabeled.ssl.core.distributed import report_errors_once
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.files import writing
from unlabeled.ssl.core.renamed import OldNames
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.loader import ViewDataset
from unlabeled.ssl.data.registry import filled, labeled
from unlabeled.ssl.train.accelerator import create_accelerator
from unlabeled.ssl.train.build import assemble
from unlabeled.ssl.train.loop import Training, train, unsharded_task
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.ssl.train.run_folder import Plan, claim_folder, read_config
from unlabeled.workflows.evaluate import Target, check_exists, resolve_target
from unlabeled.workflows.finetune.accuracy import Accuracy, OnlineAccuracy, measure_accuracy
from unlabeled.workflows.finetune.classifier import create_classifier_backbone
from unlabeled.workflows.finetune.config import FinetuneConfig
from unlabeled.workflows.finetune.data import LabeledImages, open_labeled
from unlabeled.workflows.finetune.report import Facts, write_report
from unlabeled.workflows.finetune.task import Finetune, FinetuneTask
from unlabeled.workflows.settings import compose_settings, log_replaced, tiny

logger = logging.getLogger(__name__)

CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True)
class FinetuneResult(OldNames, network="backbone"):
    """The outcome of fine-tuning."""

    backbone: Backbone
    """``backbone.model`` is the classifier, with averaged weights if ``ema`` is set."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the logits."""
    accuracy: Accuracy | None
    """Accuracy of `backbone` on the test split after the last step; None if stopped."""
    baseline: Accuracy | None
    """Accuracy of the same model trained from random weights; None if it was not trained."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.jsonl``."""
    out: Path
    """The run folder."""
    weights: Path
    """``classifier.safetensors``, which timm can load."""
    report: Path | None
    """``report.html``; None on ranks other than the first, or if stopped."""
    stopped: str | None
    """Name of the signal that stopped the run early; None if it is complete."""


@dataclass(frozen=True)
class _Trained:
    """One trained model, complete or stopped."""

    backbone: Backbone
    accuracies: dict[str, Accuracy]
    """Set of weights → accuracy: averaged weights first if there are any, then those of the last step."""
    train: LabeledImages
    test: LabeledImages
    title: str
    pretrained: bool
    """Whether training started from trained weights."""
    steps: int
    seconds: float | None
    device: str
    main: bool
    stopped: str | None


def finetune_config(
    target: str | Path,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> FinetuneConfig:
    """Returns the validated settings of ``unlabeled finetune TARGET``; the data defaults to that of the run.

    `backbone`: a model passed from Python, either the target itself or the model for the target's weights. Raises
    ConfigError.
    """
    config = compose_settings("finetune", overrides, FinetuneConfig, {**(values or {}), "target": str(target)})
    if backbone is not None:
        config = config.model_copy(update={"backbone": record(backbone)})
    folder = Path(target).expanduser()
    if os.path.isfile(folder / CLASSIFIER):  # Path.is_file raises for text that cannot be a path
        raise ConfigError(f"target: {folder} is a fine-tuning run; give {folder / CLASSIFIER} to fine-tune it further")
    check_exists(config.target, backbone)
    data = config.data if "data" in config.model_fields_set else _data_of(folder)
    config = config.model_copy(update={"data": filled(labeled(data))})
    if not config.debug:
        return config
    changes = tiny(config)
    # `tiny` returns a pretraining schedule: take its warmup only
    schedule = config.schedule.model_copy(update={"warmup_epochs": changes["schedule"].warmup_epochs})
    shrunk = config.model_copy(update={**changes, "schedule": schedule})
    log_replaced(config, shrunk, overrides, values)
    return shrunk


def _data_of(folder: Path) -> DataConfig:
    """The data that the run in `folder` was evaluated on, else its own data without a limit."""
    if not os.path.isfile(folder / "config.yaml"):
        raise ConfigError("data: not given; a target other than a run folder needs labeled data, such as data=digits")
    run = validate(read_config(folder / "config.yaml"), PretrainConfig)
    return run.evaluate.data or run.data.model_copy(update={"limit": None})


def finetune_from(config: FinetuneConfig, backbone: Backbone | None = None) -> FinetuneResult:
    """Fine-tunes with validated settings, trains the baseline, exports the classifier and writes the report.

    After an interruption, the same call resumes whichever of the two trainings was interrupted. `backbone` is as in
    `finetune_config`.
    """
    # asked before training: the log should say early that there will be no baseline
    wanted = config.baseline and (backbone is None or _can_be_random(backbone))
    own = _train(config, backbone)
    baseline = None
    if own.main and not own.stopped:
        export_backbone(own.backbone, config.out / CLASSIFIER, classes=own.train.classes)
    if wanted and own.pretrained and not own.stopped:
        logger.info("baseline: training the same model from random weights")
        baseline = _train(baseline_of(config), backbone)
    stopped = own.stopped or (baseline.stopped if baseline is not None else None)
    report = None
    if own.main and not stopped:
        with writing("report"):
            report, sentence = _report(config, own, baseline)
        logger.info("%s", sentence)
        logger.info("report: %s", report)
    return FinetuneResult(
        backbone=own.backbone,
        classes=own.train.classes,
        accuracy=next(iter(own.accuracies.values()), None),
        baseline=next(iter(baseline.accuracies.values()), None) if baseline is not None else None,
        metrics=read_metrics(config.out / "metrics.jsonl"),
        out=config.out,
        weights=config.out / CLASSIFIER,
        report=report,
        stopped=stopped,
    )


def baseline_of(config: FinetuneConfig) -> FinetuneConfig:
    """The settings of the baseline: the same from random weights, but without layer-wise decay of the learning rate.

    Layers that have not learned anything yet need the full learning rate.
    """
    optim = config.optim.model_copy(update={"layer_decay": None})
    return config.model_copy(update={"scratch": True, "optim": optim, "out": config.out / "scratch"})


def _can_be_random(backbone: Backbone) -> bool:
    """Whether `backbone` can be reinitialized for the baseline; logs the reason if not."""
    try:
        random_twin(backbone, seed=0)
    except ConfigError as error:
        logger.info("no baseline with random weights: %s", error)
        return False
    return True


def _train(config: FinetuneConfig, backbone: Backbone | None) -> _Trained:
    with report_errors_once():  # the same input error occurs on every rank
        wanted = EvaluateRun(
            target=config.target, backbone=config.backbone, pretrained=config.pretrained, seed=config.engine.seed
        )
        target = resolve_target(wanted, copy.deepcopy(backbone))  # a copy: the baseline starts from it, too
        data = open_labeled(config)
        run = prepare(config, target, data)
    begin = time.perf_counter()
    try:
        stopped = train(run)
    finally:
        run.monitor.close()
    seconds = time.perf_counter() - begin
    task = unsharded_task(run)
    assert isinstance(task, Finetune), "as prepared"
    return _Trained(
        backbone=task.encoder(),
        accuracies={} if stopped else _measure(task, data[1], config, run.accelerator.device),
        train=data[0],
        test=data[1],
        title=target.title,
        pretrained=target.backbone.trained and not config.scratch,
        steps=run.plan.total_steps,
        seconds=seconds if run.start_step == 0 else None,  # the earlier part of a resumed run was not timed
        device=str(run.accelerator.device),
        main=run.accelerator.is_main_process,
        stopped=stopped,
    )


def prepare(config: FinetuneConfig, target: Target, data: tuple[LabeledImages, LabeledImages]) -> Training:
    """Builds everything the engine needs, and restores the newest checkpoint of the folder if there is one."""
    accelerator = create_accelerator(config.engine)
    checkpoint = claim_folder(config)
    images, test = data
    plan = Plan.of(config, len(images), accelerator.num_processes)
    # images per process and micro-step; timm's Mixup mixes image i with image -i, so it needs an even number
    local = config.batch_size // accelerator.num_processes // config.engine.accumulation
    if local % 2 and config.augment is not None and (config.augment.mixup or config.augment.cutmix):
        raise ConfigError(
            f"batch_size: mixup needs an even number of images per process and micro-step, not {local}; give another "
            "batch_size, or set augment.mixup=0 augment.cutmix=0"
        )
    torch.manual_seed(derive("weights", config.engine.seed))
    backbone = create_classifier_backbone(
        target.backbone, len(images.classes), config.model, weights=not config.scratch
    )
    settings = FinetuneTask(
        classes=len(images.classes), augment=config.augment, smoothing=config.smoothing, frozen=config.frozen,
        ema=config.ema,
    )  # fmt: skip
    task = Finetune(settings, backbone)
    views = Finetune.views(settings, backbone)
    dataset = ViewDataset(images.source, views, config.engine.seed, labels=images.labels)
    online = OnlineAccuracy(config, test, plan.steps_per_epoch)
    return assemble(config, accelerator, checkpoint, plan, task=task, dataset=dataset, online=online)


def _measure(task: Finetune, test: LabeledImages, config: FinetuneConfig, device: torch.device) -> dict[str, Accuracy]:
    backbones = {"averaged weights": task.encoder()} if task.ema is not None else {}
    backbones["last step"] = task.backbone
    return {name: measure_accuracy(backbone, test, config, device) for name, backbone in backbones.items()}


def _report(config: FinetuneConfig, own: _Trained, baseline: _Trained | None) -> tuple[Path, str]:
    facts = Facts(
        title=own.title,
        pretrained=own.pretrained,
        backbone=own.backbone,
        train=own.train,
        test=own.test,
        steps=own.steps,
        seconds=own.seconds,
        device=own.device,
    )
    alongside = baseline.accuracies if baseline is not None else None
    return write_report(config, facts, own.accuracies, alongside)
