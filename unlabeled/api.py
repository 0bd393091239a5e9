"""The Python functions: ``unlabeled.pretrain(...)``, ``unlabeled.evaluate(...)`` and ``unlabeled.finetune(...)``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlabeled.eval.results import Evidence
from unlabeled.workflows.evaluate import evaluate_config, evaluate_target
from unlabeled.workflows.finetune.run import FinetuneResult, finetune_config, finetune_from
from unlabeled.workflows.pretrain import PretrainResult, pretrain_config, pretrain_from
from unlabeled.workflows.settings import data_values


def pretrain(
    task: str | Mapping[str, Any],
    backbone: str | Mapping[str, Any],
    data: str | Path | Mapping[str, Any],
    **settings: Any,
) -> PretrainResult:
    """Pretrains `backbone` on `data` with `task`; the settings are those of ``unlabeled pretrain``.

    `data` is a folder of pictures, the name of a source, or a mapping such as ``{"name": "parquet", "path": ...}``.
    Further settings as keywords: ``out="runs/x"``, ``epochs=100``, ``optim={"lr": 1e-3}`` or ``optim__lr=1e-3``.
    Raises a subclass of UnlabeledError, in one line, for anything in the input that cannot work.
    """
    values = {"task": task, "data": data_values(data), "backbone": backbone, **settings}
    return pretrain_from(pretrain_config(values=values))


def evaluate(target: str | Path, **settings: Any) -> Evidence:
    """kNN, linear probe and report of a run folder, a timm model or a weights file: ``unlabeled evaluate``.

    Settings as keywords, as in `pretrain`. Raises a subclass of UnlabeledError, in one line.
    """
    return evaluate_target(evaluate_config(target, values=settings))


def finetune(target: str | Path, data: str | Path | Mapping[str, Any] | None = None, **settings: Any) -> FinetuneResult:
    """Trains a run, a timm model or a weights file into a classifier: ``unlabeled finetune`` from Python.

    `data` as in `pretrain`; None: that of the run. Raises a subclass of UnlabeledError, in one line, for anything in
    the input that cannot work.
    """
    given = {} if data is None else {"data": data_values(data)}
    return finetune_from(finetune_config(target, values={**given, **settings}))
