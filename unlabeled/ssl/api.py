"""The Python functions: ``unlabeled.pretrain(...)`` and ``unlabeled.evaluate(...)``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.weights import export_backbone
from unlabeled.ssl.config.composition import compose_config, pretrain_config, words_of
from unlabeled.ssl.config.schema import EvaluateRun, PretrainConfig
from unlabeled.ssl.core.distributed import told_once
from unlabeled.ssl.evidence import conclude
from unlabeled.ssl.train.build import prepare
from unlabeled.ssl.train.loop import train, whole_task
from unlabeled.ssl.train.monitor import read_metrics

if TYPE_CHECKING:
    from unlabeled.eval.results import Evidence


@dataclass(frozen=True)
class PretrainResult:
    """What a run leaves behind."""

    backbone: Backbone
    """The pretrained network, as evaluation received it."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.jsonl``."""
    evidence: Evidence | None
    """kNN and linear probe against the baselines; None without labels, off the first rank, or when stopped."""
    out: Path
    weights: Path
    """``backbone.safetensors``, which plain timm loads."""
    report: Path | None
    stopped: str | None
    """The signal that stopped the run early; None when it is complete."""


def pretrain(
    task: str | dict[str, Any], backbone: str | dict[str, Any], data: str | Path | dict[str, Any], **settings: Any
) -> PretrainResult:
    """Pretrains `backbone` on `data` with `task`; the settings are those of ``unlabeled pretrain``.

    `data` is a folder of pictures, the name of a source, or a mapping such as ``{"name": "parquet", "path": ...}``.
    Further settings as keywords: ``out="runs/x"``, ``epochs=100``, ``optim={"lr": 1e-3}`` or ``optim__lr=1e-3``.
    Raises a subclass of UnlabeledError, in one line, for anything in the input that cannot work.
    """
    from unlabeled.ssl.data.source import SOURCES

    if isinstance(data, Path) or (isinstance(data, str) and data not in SOURCES):
        data = {"name": "folder", "path": str(data)}
    return pretrain_from(pretrain_config(words_of({"task": task, "data": data, "backbone": backbone, **settings})))


def pretrain_from(config: PretrainConfig) -> PretrainResult:
    """Pretrains under a validated configuration, exports the backbone, evaluates it and writes the report."""
    with told_once():
        run = prepare(config)
    try:
        stopped = train(run)
    finally:
        run.monitor.close()
    task = whole_task(run)
    encoder = task.encoder()
    if run.accelerator.is_main_process:
        export_backbone(encoder, config.out, elastic=task.elastic())
    run.accelerator.wait_for_everyone()
    evidence, report = (None, None) if stopped else conclude(config, run, task)
    return PretrainResult(
        backbone=encoder,
        metrics=read_metrics(config.out / "metrics.jsonl"),
        evidence=evidence,
        out=config.out,
        weights=config.out / "backbone.safetensors",
        report=report,
        stopped=stopped,
    )


def evaluate(target: str | Path, **settings: Any) -> Evidence:
    """kNN, linear probe and report of a run folder, a timm model or a weights file: ``unlabeled evaluate``."""
    from unlabeled.eval.command import evaluate_target

    return evaluate_target(compose_config("evaluate", words_of({"target": str(target), **settings}), EvaluateRun))
