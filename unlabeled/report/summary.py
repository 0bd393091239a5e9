"""Facts about a run, as opposed to its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from unlabeled.eval.environment import versions
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.schema import DataConfig, PretrainConfig

DEBUG_NOTE = "Debug run of a few steps: the numbers mean nothing."


@dataclass(frozen=True)
class RunSummary:
    """Facts about one run; None where they are unknown, for instance for weights trained elsewhere."""

    title: str
    backbone: str
    """timm name, with the arguments that change it."""
    data: str
    """Name of the source, and its path or dataset."""
    parameters: int
    """Number of parameters of the backbone."""
    device: str
    seed: int
    config: str = ""
    """The resolved settings as YAML."""
    task: str | None = None
    input_size: tuple[int, int] | None = None
    """(h, w) in pixels."""
    epochs: float | None = None
    steps: int | None = None
    images: int | None = None
    """Images seen in training, counting repeats."""
    seconds: float | None = None
    """Wall-clock time of pretraining, summed over resumed runs."""
    date: str | None = None
    """When the run ended, formatted for people."""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    notes: tuple[str, ...] = ()
    """Warnings, shown with the summary."""


def summarize_run(
    config: PretrainConfig,
    backbone: Backbone,
    *,
    device: str,
    rows: Sequence[Mapping[str, Any]] = (),
    date: str | None = None,
    commit: str | None = None,
) -> RunSummary:
    """Summarizes a pretraining run from its settings and the rows of its ``metrics.jsonl``."""
    steps = max((int(row["step"]) for row in rows if "step" in row), default=None)
    return RunSummary(
        title=config.out.resolve().name,
        task=str(config.task["name"]),
        backbone=name_backbone(backbone),
        data=name_data(config.data),
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        parameters=count_parameters(backbone),
        input_size=backbone.input_size,
        epochs=config.epochs,
        steps=steps,
        images=None if steps is None else steps * config.batch_size,
        seconds=training_seconds(rows, config.batch_size),
        device=device,
        seed=config.engine.seed,
        date=date,
        commit=commit,
        notes=(DEBUG_NOTE,) if config.debug else (),
    )


def training_seconds(rows: Sequence[Mapping[str, Any]], batch_size: int) -> float | None:
    """Wall-clock seconds of the training steps in `rows` of ``metrics.jsonl``; None if no row has a speed.

    For a run that was killed and resumed, this counts the steps that led to its weights, not those that were lost.
    """
    before, total = 0, 0.0
    for row in rows:
        if row.get("images_per_s"):  # mean speed since the previous such row
            total += (int(row["step"]) - before) * batch_size / float(row["images_per_s"])
            before = int(row["step"])
    return total or None


def name_backbone(backbone: Backbone) -> str:
    """The timm name, followed by the arguments it was created with."""
    # num_classes and img_size are always set; the report shows the input size on its own line
    # tuples become lists, as in an exported file, so that a run and its evaluation write the same
    given = ", ".join(
        f"{key} {list(value) if isinstance(value, tuple) else value}"
        for key, value in backbone.kwargs.items()
        if key not in ("num_classes", "img_size")
    )
    return f"{backbone.name} ({given})" if given else backbone.name


def name_data(data: DataConfig) -> str:
    """The name of the source, and its dataset and path where it has them."""
    settings = data.model_extra or {}
    return " ".join(str(value) for value in (data.name, settings.get("dataset"), settings.get("path")) if value)


def count_parameters(backbone: Backbone) -> int:
    """Number of parameters of `backbone`."""
    return sum(parameter.numel() for parameter in backbone.parameters())
