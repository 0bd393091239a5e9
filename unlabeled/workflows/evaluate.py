"""``unlabeled evaluate TARGET``: evaluates a run, a timm model or a weights file and writes a report."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from unlabeled.eval.comparison import summarize
from unlabeled.eval.features.recalibrate import batch_norms
from unlabeled.eval.results import Results
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.eval.size_curve import SizeCurve, read_curve
from unlabeled.pretext.registry import task_class, task_config
from unlabeled.report.images import read_images
from unlabeled.report.page import render_report
from unlabeled.report.summary import RunSummary, count_parameters, name_backbone, name_data, summarize_run
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.given import fill_adopted, record, require_given
from unlabeled.ssl.backbones.weights import load_backbone, load_weights
from unlabeled.ssl.config.composition import validate
from unlabeled.ssl.config.schema import BackboneConfig, DataConfig, EvaluateRun, PretrainConfig
from unlabeled.ssl.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NoLabelsError,
    UnlabeledError,
    first_line,
    nearest,
)
from unlabeled.ssl.data.registry import labeled, open_source
from unlabeled.ssl.data.source import ImageSource
from unlabeled.ssl.train.checkpoint import last_checkpoint
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.ssl.train.run_folder import read_config
from unlabeled.workflows.elastic_sizes import Alone, SizePlan, measure_sizes, plan_sizes
from unlabeled.workflows.export import with_sizes
from unlabeled.workflows.settings import compose_settings, settle_evaluation

# a target with one of these suffixes that does not exist is a mistyped path, not a mistyped timm name
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The backbone that ``TARGET`` refers to, and where it comes from."""

    backbone: Backbone
    title: str
    config: PretrainConfig | None = None
    """The settings of the run; None if the target is not a run."""
    folder: Path | None = None
    """The run folder; None if the target is not a run."""


def evaluate_config(
    target: str | Path,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> EvaluateRun:
    """Returns the validated settings of ``unlabeled evaluate TARGET``.

    `backbone`: a model passed from Python, either the target itself or the model for the target's weights. Raises
    ConfigError.
    """
    run = compose_settings("evaluate", overrides, EvaluateRun, {**(values or {}), "target": str(target)})
    also = ("knn", "linear") if run.sizes is not None else ()  # the metrics of the size curve
    run = run.model_copy(update={"evaluate": settle_evaluation(run.evaluate, overrides, values, also=also)})
    return run if backbone is None else run.model_copy(update={"backbone": record(backbone)})


def evaluate_target(run: EvaluateRun, backbone: Backbone | None = None) -> Results:
    """Evaluates `run.target`, and its sizes if requested; writes the report and returns the results.

    `backbone` is as in `evaluate_config`; the target's weights are loaded into it. Raises ConfigError for an unknown
    target or missing data, CheckpointError for weights that cannot be read or do not fit, DataError for data without
    labels.
    """
    target = resolve_target(run, backbone)
    plan = _size_plan(run, target)  # raises before anything is computed
    data = _data(run, target.config)
    device = torch.device("cuda" if run.device == "auto" and torch.cuda.is_available() else "cpu")
    train, test = _open_splits(run, target.config, data)
    # a run's features are cached in its folder, those of other targets next to their report
    work = target.folder or run.out or _report_folder(run, target)
    images = read_images(target.folder) if target.folder is not None else None
    results = evaluate_backbone(
        target.backbone, train, test, run.evaluate, work=work, device=device, seed=run.seed, workers=run.workers,
        masked_statistics=run.evaluate.recalibrate == "auto" and saw_masked_images_only(target),
    )  # fmt: skip
    assert results is not None, "only ranks other than the first get None"
    summary = _summary(run, target, data, str(device))
    sizes = measure_sizes(plan, run, (train, test), results, device) if plan is not None else _measured(target)
    report = render_report(
        _report_folder(run, target), summary, results, _metrics(target), images, sizes=sizes, captions=_captions(target)
    )
    log.info("%s Report: %s", summarize(results).text, report)
    return results


def resolve_target(run: EvaluateRun, given: Backbone | None = None) -> Target:
    """Builds the backbone that `run.target` refers to and loads its weights.

    The target is a run folder, a weights file or a timm name. `given`: the model, if it is passed from Python; the
    weights of the folder or file are loaded into it.
    """
    if run.backbone is not None:
        require_given(run.backbone, given)
    if given is not None and run.target == given.origin:
        return Target(given, given.name)  # the target is the model itself
    path = Path(run.target).expanduser()
    if os.path.isdir(path):  # Path.is_dir raises for text that cannot be a path
        return _from_folder(path, given)
    if os.path.isfile(path):
        return _from_file(path, run.backbone, given)
    check_exists(run.target, given)
    return _from_timm(run)


def check_exists(target: str, given: Backbone | None = None) -> None:
    """Raises ConfigError for a target that is no folder, file or timm model; only `given` may have another name."""
    path = Path(target).expanduser()
    if os.path.exists(path) or (given is not None and target == given.origin):
        return
    if given is not None:
        raise ConfigError(f"target: {target!r} does not exist; give a run folder or a weights file")
    if timm.is_model(target.partition(".")[0]) and path.suffix not in _WEIGHTS:
        return
    if path.suffix in _WEIGHTS or len(path.parts) > 1:
        raise ConfigError(f"target: {target!r} does not exist; give a run folder, a weights file or a timm model")
    near = nearest(target, timm.list_models())
    raise ConfigError(f"target: {target!r} is not a run folder, weights file or timm model; {near}")


def _from_folder(folder: Path, given: Backbone | None = None) -> Target:
    if not (folder / "backbone.safetensors").is_file() or not (folder / "backbone.json").is_file():
        raise CheckpointError(
            f"target: {folder} contains no backbone.safetensors with a backbone.json; give the folder of a finished run"
        )
    config = _read_config(folder / "config.yaml")
    backbone = load_backbone(folder) if given is None else fill_adopted(given, folder)
    return Target(backbone, folder.resolve().name, config, folder)


def _from_file(file: Path, config: BackboneConfig | None, given: Backbone | None) -> Target:
    backbone = given
    if backbone is None:
        # an exported file: backbone.json next to it describes how to build the backbone
        if config is None and file.suffix == ".safetensors" and file.with_suffix(".json").is_file():
            return Target(load_backbone(file), file.name)
        if config is None:
            raise ConfigError(f"backbone.name: not given; weights such as {file.name} need backbone.name=<timm name>")
        backbone = create_backbone(config.name, size=config.size, **config.kwargs)
    missing = load_weights(backbone, file).missing
    if missing:
        raise CheckpointError(
            f"target: {file} is missing {len(missing)} tensors of {backbone.name}, such as {missing[0]}; "
            "check backbone.name, backbone.size and backbone.kwargs"
        )
    return Target(backbone, f"{file.name} in {backbone.name}")


def _from_timm(run: EvaluateRun) -> Target:
    config = run.backbone or BackboneConfig()
    if run.pretrained:
        _check_published(run.target)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)  # for parameters that no weights are loaded into
            backbone = create_backbone(run.target, pretrained=run.pretrained, size=config.size, **config.kwargs)
    except UnlabeledError:
        raise
    except Exception as error:  # timm, huggingface_hub and the network stack raise types without a common base
        if not run.pretrained:
            raise ConfigError(
                f"backbone: timm cannot build {run.target} ({first_line(error)}); check backbone.kwargs"
            ) from error
        raise CheckpointError(
            f"target: the published weights of {run.target} cannot be loaded ({first_line(error)}); go online, give a "
            "weights file with backbone.name, or set pretrained=false"
        ) from error
    return Target(backbone, run.target if run.pretrained else f"{run.target}, random weights")


def _check_published(name: str) -> None:
    if not timm.is_model_pretrained(name):
        raise CheckpointError(
            f"target: timm has no published weights for {name}; set pretrained=false or give a weights file"
        )


def _size_plan(run: EvaluateRun, target: Target) -> SizePlan | None:
    """The sizes to measure; None if none are requested."""
    if run.sizes is None:
        if run.versus:
            raise ConfigError("versus: has no effect without sizes; set sizes=all or sizes=[[width,depth]]")
        return None
    if target.folder is None:
        raise ConfigError(f"sizes: {run.target} is not a run folder; only an elastic run has several sizes")
    versus = [_from_folder(folder) if folder.is_dir() else None for folder in run.versus]
    for folder, found in zip(run.versus, versus, strict=True):
        if found is None:
            raise ConfigError(f"versus: {folder} is not a folder; give folders of finished runs")
    alone = [Alone(one.title, one.folder, one.backbone) for one in versus if one is not None and one.folder is not None]
    return plan_sizes(run, target.folder, with_sizes(target.folder, target.backbone), alone)


def _data(run: EvaluateRun, config: PretrainConfig | None) -> DataConfig:
    """The labeled data to evaluate on.

    In order of precedence: the data of this command, the data that the run was evaluated on, and the run's own data
    with labels.
    """
    if run.data is not None:
        return run.data
    if run.evaluate.data is not None:
        return run.evaluate.data
    if config is None:
        raise ConfigError("data: not given; a target other than a run folder needs labeled data, such as data=digits")
    return config.evaluate.data or labeled(config.data)


def _open_splits(run: EvaluateRun, config: PretrainConfig | None, data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """The (training, test) splits of `data`. Raises DataError, which names the remedy if `data` is that of the run."""
    try:
        return open_source(data, "train"), open_source(data, "test")
    except NoLabelsError:
        given = run.data is not None or run.evaluate.data is not None
        if given or config is None or config.evaluate.data is not None or getattr(config.data, "labels", False):
            raise
        raise DataError(
            "data: the run's own data has no labels; give labeled images: "
            "data=folder data.path=LABELED data.labels=true"
        ) from None


def saw_masked_images_only(target: Target) -> bool:
    """Whether the task that trained the target collected batch-norm statistics on masked images only."""
    if target.config is None or not batch_norms(target.backbone):
        return False
    try:
        return task_class(target.config.task["name"]).masks_statistics(task_config(target.config.task))
    except (ConfigError, ImportError) as error:  # a plugin that is not installed here
        raise ConfigError(
            f"evaluate.recalibrate: auto needs the run's task ({first_line(error)}); set it to true or false"
        ) from error


def _read_config(file: Path) -> PretrainConfig | None:
    """The settings stored with a run's weights; None if there are none, as in an exported folder."""
    return validate(read_config(file), PretrainConfig) if file.is_file() else None


def _metrics(target: Target) -> list[dict[str, Any]]:
    return read_metrics(target.folder / "metrics.jsonl") if target.folder is not None else []


def _unfinished(target: Target) -> str | None:
    """Warns of a run that was stopped before its last step; None if it is complete, or has too few metrics to tell."""
    if target.config is None or target.folder is None:
        return None
    rows = [row for row in _metrics(target) if row.get("epoch")]
    checkpoint = last_checkpoint(target.folder / "checkpoints")
    if not rows:
        return None
    planned = max(round(target.config.epochs * round(rows[-1]["step"] / rows[-1]["epoch"])), 1)
    # a checkpoint may be newer than the last row; a finished run may have no checkpoint any more
    step = max(int(rows[-1]["step"]), int(checkpoint.name.partition("_")[2]) if checkpoint is not None else 0)
    if step >= planned:
        return None
    return (
        f"{target.folder} stopped at step {step} of {planned}: these are unfinished weights; repeat the pretrain "
        "command to finish it"
    )


def _captions(target: Target) -> Mapping[str, str]:
    if target.config is None:
        return {}
    try:
        return task_class(target.config.task["name"]).captions
    except (ConfigError, ImportError):  # a plugin that is not installed here
        return {}


def _measured(target: Target) -> SizeCurve | None:
    return read_curve(target.folder) if target.folder is not None else None


def _summary(run: EvaluateRun, target: Target, data: DataConfig, device: str) -> RunSummary:
    backbone, today = target.backbone, date.today().isoformat()
    if target.config is not None:
        summary = summarize_run(target.config, backbone, device=device, rows=_metrics(target), date=today)
        unfinished = _unfinished(target)
        if unfinished is not None:
            log.warning("%s", unfinished)
            summary = replace(summary, notes=(*summary.notes, unfinished))
        return replace(summary, title=target.title)
    return RunSummary(
        title=target.title,
        backbone=name_backbone(backbone),
        data=name_data(data),
        config=yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        parameters=count_parameters(backbone),
        input_size=backbone.input_size,
        device=device,
        seed=run.seed,
        date=today,
    )


def _report_folder(run: EvaluateRun, target: Target) -> Path:
    if run.out is not None:
        return run.out
    if target.folder is not None:
        return target.folder / "report"
    # a model passed from Python has its class as the target, which is not a name for a folder
    given = run.backbone is not None and run.target == run.backbone.module
    name = target.backbone.name if given else Path(run.target).name
    return Path("reports") / re.sub(r"[^\w.-]+", "_", name)
