"""What a report says about the run itself, apart from its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from unlabeled.eval.environment import versions
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.schema import DataConfig, PretrainConfig


@dataclass(frozen=True)
class RunSummary:
    """Facts of one run; None where they are not known, for instance of weights trained elsewhere."""

    title: str
    backbone: str
    """timm name, with what was changed of it."""
    data: str
    """In words: source and path or data set."""
    parameters: int
    """Of the backbone."""
    device: str
    seed: int
    config: str = ""
    """The resolved settings, YAML."""
    task: str | None = None
    input_size: tuple[int, int] | None = None
    """(h, w) in pixels."""
    epochs: float | None = None
    steps: int | None = None
    images: int | None = None
    """Images seen, repeats counted."""
    seconds: float | None = None
    """Wall clock of the pretraining, resumed or not."""
    date: str | None = None
    """When it ended, as people write it."""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=versions)


def summarize_run(
    config: PretrainConfig,
    backbone: Backbone,
    *,
    device: str,
    rows: Sequence[Mapping[str, Any]] = (),
    date: str | None = None,
    commit: str | None = None,
) -> RunSummary:
    """The summary of a pretraining run from its settings and the rows of its ``metrics.jsonl``."""
    task = str(config.task["name"])
    steps = max((int(row["step"]) for row in rows if "step" in row), default=None)
    return RunSummary(
        title=f"{task} on {config.data.name}: {backbone.name}",
        task=task,
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
    )


def training_seconds(rows: Sequence[Mapping[str, Any]], batch_size: int) -> float | None:
    """Wall clock of the steps behind `rows` of ``metrics.jsonl``, from their images per second; None without these.

    A run that was killed and resumed has the time of the steps that it consists of, not of those that were lost.
    """
    before, total = 0, 0.0
    for row in rows:
        if row.get("images_per_s"):
            total += (int(row["step"]) - before) * batch_size / float(row["images_per_s"])
            before = int(row["step"])
    return total or None


def name_backbone(backbone: Backbone) -> str:
    """The timm name and the arguments that were given beside it."""
    given = ", ".join(
        f"{key} {value}" for key, value in backbone.kwargs.items() if key not in ("num_classes", "img_size")
    )
    return f"{backbone.name} ({given})" if given else backbone.name


def name_data(data: DataConfig) -> str:
    """The kind of source and where it lies, by those of its settings that say so."""
    settings = data.model_extra or {}
    return " ".join(str(part) for part in (data.name, settings.get("dataset"), settings.get("path")) if part)


def count_parameters(backbone: Backbone) -> int:
    """Number of weights of the network."""
    return sum(parameter.numel() for parameter in backbone.parameters())
