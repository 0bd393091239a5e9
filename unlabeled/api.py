"""The Python functions: `unlabeled.pretrain`, `evaluate`, `finetune` and `export`. Each corresponds to a command.

Pass the command's settings as keyword arguments: ``out="runs/x"``, ``epochs=100``, ``optim={"lr": 1e-3}`` or
``optim__lr=1e-3``. Values are not parsed: a string stays a string. For any input that cannot work, the functions raise
a subclass of `unlabeled.UnlabeledError` with a one-line message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from unlabeled.eval.results import Results
from unlabeled.ssl.backbones import weights
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.given import load_into
from unlabeled.ssl.config.schema import BackboneConfig, DataConfig
from unlabeled.workflows.evaluate import evaluate_config, evaluate_target
from unlabeled.workflows.export import Exported, export_config, export_run
from unlabeled.workflows.finetune.run import FinetuneResult, finetune_config, finetune_from
from unlabeled.workflows.pretrain import PretrainResult, pretrain_config, pretrain_from
from unlabeled.workflows.settings import data_values, given_backbone, read_request, run_folder


def pretrain(
    task: str | Mapping[str, Any],
    backbone: str | Mapping[str, Any] | BackboneConfig | nn.Module,
    data: str | Path | Mapping[str, Any] | DataConfig,
    **settings: Any,
) -> PretrainResult:
    """Pretrains `backbone` on `data` with the pretext task `task`, evaluates it and writes a report.

    `settings` are those of ``unlabeled pretrain``, such as ``out="runs/x"`` and ``epochs=100``. If the run folder
    ``out`` contains an unfinished run with the same settings, the call resumes it.

    `data` is a folder of images, the name of a source, or a mapping such as ``{"name": "parquet", "path": ...}``.

    `backbone` is a timm name, a mapping such as ``{"name": "resnet18", "size": 64}``, or a model: an ``nn.Module`` with
    timm's interface, or an `unlabeled.Backbone`, which also specifies the input size, mean and standard deviation. A
    model is copied with its weights and frozen parameters, and training starts from that copy. Pass an identical model
    to resume such a run; the run folder explains how to load the result.
    """
    # a model cannot be stored among the settings, so it takes a separate path
    own = given_backbone(backbone, settings)
    named = {"backbone": backbone} if own is None else {}
    config = pretrain_config(values={"task": task, "data": data_values(data), **named, **settings}, backbone=own)
    return pretrain_from(config, own)


def evaluate(
    target: str | Path | nn.Module,
    data: str | Path | Mapping[str, Any] | DataConfig | None = None,
    **settings: Any,
) -> Results:
    """Evaluates `target` on labeled data, writes the report and returns the results, like ``unlabeled evaluate``.

    `target` is a run folder, the name of a timm model, a weights file, or a model as in `pretrain`. If the run's
    backbone has no timm name, pass it again: ``evaluate("runs/x", backbone=module)`` loads the run's weights into a
    copy of ``module``. `data` is as in `pretrain`; None means the data of the run.
    """
    request = read_request(target, data, settings)
    config = evaluate_config(request.target, values=request.values, backbone=request.backbone)
    return evaluate_target(config, request.backbone)


def finetune(
    target: str | Path | nn.Module,
    data: str | Path | Mapping[str, Any] | DataConfig | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tunes `target` as an image classifier, like ``unlabeled finetune``.

    `target` and `data` are as in `evaluate`. All parameters that the class scores depend on are trained, including
    frozen ones; ``frozen=True`` trains only the classification head. If the backbone has no timm name, use
    `unlabeled.create_classifier` to rebuild the classifier and load its weights.
    """
    request = read_request(target, data, settings)
    config = finetune_config(request.target, values=request.values, backbone=request.backbone)
    return finetune_from(config, request.backbone)


def export(run: str | Path, out: str | Path, backbone: nn.Module | None = None, **settings: Any) -> list[Exported]:
    """Writes the backbone of a run, or sizes of an elastic run, as files that timm loads, like ``unlabeled export``.

    If the run's backbone has no timm name, pass it again as `backbone`. Returns each file with a line of Python that
    loads it.
    """
    folder = run_folder(run)
    # `alongside`: a bare module gets the input size and statistics that the run recorded
    own = given_backbone(backbone, settings, alongside=folder)
    return export_run(export_config(folder, values={"out": out, **settings}), own)


def load_backbone(path: str | Path, module: nn.Module | None = None) -> Backbone:
    """Loads the backbone at `path`: a run folder, or a file written by `unlabeled.export`.

    For a backbone without a timm name, pass an identically built `module`; the weights are loaded into a copy of it.
    """
    return weights.load_backbone(path) if module is None else load_into(module, path)
