"""The run folder: whose it is, what lies in it, and how long the run will be.

``config.yaml`` (resolved) · ``metrics.jsonl`` · ``bad_images.jsonl`` · ``tensorboard/`` · ``checkpoints/step_*`` ·
``backbone.safetensors`` + ``backbone.json`` · ``images/`` (what the task sees) · ``report/``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unlabeled.ssl.backbones.given import require_same_module
from unlabeled.ssl.config.renamed import with_new_names
from unlabeled.ssl.config.schema import RunConfig
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.core.files import write_atomically, writing
from unlabeled.ssl.data.loader import require_batch
from unlabeled.ssl.data.registry import source_class
from unlabeled.ssl.train.checkpoint import last_checkpoint

_MAY_CHANGE = frozenset(
    {"out", "resume", "log", "evaluate", "engine.workers", "engine.keep", "engine.checkpoint_epochs"}
    | {"engine.checkpoint_steps", "engine.device", "data.max_bad_fraction"}
)
"""Settings that a resumed run may have otherwise than the run it goes on with."""
_ONCE_COMMON = frozenset(
    {"path", "test_path", "test_fraction", "labels", "dataset", "image_column", "label_column", "count"}
)
"""Settings that ``config.yaml`` once held for every source, before sources had settings of their own."""
_KINDS = frozenset({"task", "target"})
"""A setting of pretraining, and one of fine-tuning: without either it is no run's configuration."""


@dataclass(frozen=True)
class Plan:
    """How long a run is, in optimizer steps."""

    images: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig, images: int, world: int) -> Plan:
        """Raises ConfigError when a batch is larger than the data or cannot be split over processes."""
        batch = config.batch_size
        require_batch(batch, images, world, config.engine.accumulation)
        per_epoch = images // batch
        return cls(images, batch, per_epoch, max(round(config.epochs * per_epoch), 1))

    def epoch(self, step: int) -> float:
        """Epochs done after `step` optimizer steps."""
        return step / self.steps_per_epoch


def claim_folder(config: RunConfig) -> Path | None:
    """Checks that ``config.out`` is free or holds this very run; returns the checkpoint to resume from, if any.

    Raises CheckpointError for another run's folder, a folder of other things, or a checkpoint under resume=never.
    """
    out, record = config.out, config.out / "config.yaml"
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"out: {out} is a file; give a folder")
    if not record.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise CheckpointError(f"out: {out} is not empty and holds no run; choose another folder")
        return None
    written = read_config(record)
    require_same_module(out, written, getattr(config, "backbone", None))
    difference = _difference(written, config)
    if difference is not None:
        key, there, here = difference
        raise CheckpointError(
            f"out: {out} holds another run ({key}: {there} there, {here} here); "
            "choose another out=, or the same settings"
        )
    checkpoint = last_checkpoint(out / "checkpoints")
    if checkpoint is not None and config.resume == "never":
        raise CheckpointError(
            f"out: {out} already holds {checkpoint.name}; resume=auto goes on, another out= starts anew"
        )
    return checkpoint


def write_config(config: RunConfig) -> None:
    """Makes the run folder and writes its ``config.yaml``."""
    with writing(f"out: {config.out}"):
        config.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(config.out / "config.yaml", text)


def read_config(path: Path) -> dict[str, Any]:
    """A run's ``config.yaml``, its data as `current` has it. Raises CheckpointError when it is not one."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict) or not _KINDS & values.keys():
        raise CheckpointError(f"{path} is not a run's configuration; restore it or choose another folder")
    return current(values)


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, with those sections that say where images come from as their sources have them now.

    What was added since has its default; what an earlier version wrote into every run, and this source never read, is
    left out.
    """
    values = with_new_names(values)
    result = dict(values)
    if isinstance(data := values.get("data"), Mapping):
        result["data"] = _data_now(data)
    if isinstance(evaluate := values.get("evaluate"), Mapping) and isinstance(data := evaluate.get("data"), Mapping):
        result["evaluate"] = {**evaluate, "data": _data_now(data)}
    return result


def _data_now(data: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = source_class(str(data.get("name"))).Config
    except ConfigError:  # of a package that is not installed here; whoever opens the data is told so
        return dict(data)
    own = config.model_fields
    kept = {name: value for name, value in data.items() if name in own or name not in _ONCE_COMMON}
    return {**config.model_construct().model_dump(mode="json"), **kept}


def _difference(there: Mapping[str, Any], config: RunConfig) -> tuple[str, Any, Any] | None:
    """First setting that differs and may not: (name, value there, value here).

    A setting that did not exist yet when the run was started had what is its default now.
    """
    flat_here = _flatten(current(config.model_dump(mode="json")))
    defaults = _flatten(type(config).model_construct().model_dump(mode="json", exclude={"task"}))
    flat_there = {key: value for key, value in defaults.items() if key in flat_here} | _flatten(there)
    for key in [*flat_here, *(flat_there.keys() - flat_here.keys())]:
        parents = {key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)}
        if flat_there.get(key) != flat_here.get(key) and not parents & _MAY_CHANGE:
            return key, flat_there.get(key), flat_here.get(key)
    return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
