"""The Python functions: `unlabeled.pretrain`, `evaluate`, `finetune` and `export`, each the twin of a command.

Settings are the command's, as keywords: ``out="runs/x"``, ``epochs=100``, ``optim={"lr": 1e-3}`` or
``optim__lr=1e-3``. Values are taken as they are, whatever their text looks like. All raise a subclass of
`unlabeled.UnlabeledError`, in one line, for anything in the input that cannot work.
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
    """Pretrains `backbone` on `data` with `task`; the settings are those of ``unlabeled pretrain``.

    `data` is a folder of images, the name of a source, or a mapping such as ``{"name": "parquet", "path": ...}``.

    `backbone` is a timm name, a mapping such as ``{"name": "resnet18", "size": 64}``, or a network itself: an
    ``nn.Module`` with timm's surface, or an `unlabeled.Backbone`, which also says its size, mean and deviation. A
    network is taken as it is, frozen parameters and weights included: training begins from them, in a copy. The run's
    folder says how to load what comes out, and the same call with such a network goes on with the run.
    """
    own = given_backbone(backbone, settings)
    named = {"backbone": backbone} if own is None else {}
    config = pretrain_config(values={"task": task, "data": data_values(data), **named, **settings}, backbone=own)
    return pretrain_from(config, own)


def evaluate(
    target: str | Path | nn.Module,
    data: str | Path | Mapping[str, Any] | DataConfig | None = None,
    **settings: Any,
) -> Results:
    """The evaluators and the report of ``unlabeled evaluate``.

    `target` is a run folder, a timm model, a weights file or a network itself, as in `pretrain`; a run of a network
    that has no timm name needs it again: ``evaluate("runs/x", backbone=module)`` loads the run's weights into a copy.
    `data` as in `pretrain`; None: that of the run.
    """
    request = read_request(target, data, settings)
    config = evaluate_config(request.target, values=request.values, backbone=request.backbone)
    return evaluate_target(config, request.backbone)


def finetune(
    target: str | Path | nn.Module,
    data: str | Path | Mapping[str, Any] | DataConfig | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Trains a run, a timm model, a weights file or a network into a classifier: ``unlabeled finetune``.

    `target` and `data` as in `evaluate`. All that the classes depend on is trained, also what was frozen before;
    ``frozen=True`` trains the classifier alone. `unlabeled.create_classifier` builds the classifier of a network
    without a timm name again.
    """
    request = read_request(target, data, settings)
    config = finetune_config(request.target, values=request.values, backbone=request.backbone)
    return finetune_from(config, request.backbone)


def export(run: str | Path, out: str | Path, backbone: nn.Module | None = None, **settings: Any) -> list[Exported]:
    """Writes a run's network, or sizes of an elastic one, as files that timm loads: ``unlabeled export``.

    A run of a network that has no timm name needs it again, as `backbone`. Returns each file with Python that loads it.
    """
    folder = run_folder(run)
    own = given_backbone(backbone, settings, alongside=folder)
    return export_run(export_config(folder, values={"out": out, **settings}), own)


def load_backbone(path: str | Path, module: nn.Module | None = None) -> Backbone:
    """The backbone at `path`: a run's folder, or what `unlabeled.export` wrote.

    A network that has no timm name is built by the caller, as it was, and given as `module`; the weights are loaded
    into a copy of it.
    """
    return weights.load_backbone(path) if module is None else load_into(module, path)
