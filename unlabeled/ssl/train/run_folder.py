"""The run folder: which run it belongs to, its stored settings, and the length of the run.

``config.yaml`` (resolved) · ``metrics.jsonl`` · ``bad_images.jsonl`` · ``tensorboard/`` · ``checkpoints/step_*`` ·
``backbone.safetensors`` + ``backbone.json`` · ``pictures/`` (what the task sees) · ``report/``
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
from unlabeled.ssl.core.plain import whole
from unlabeled.ssl.data.loader import require_batch
from unlabeled.ssl.data.registry import source_class
from unlabeled.ssl.train.checkpoint import last_checkpoint

_MAY_CHANGE = frozenset(
    {"out", "resume", "log", "evaluate", "engine.workers", "engine.keep", "engine.checkpoint_epochs"}
    | {"engine.checkpoint_steps", "engine.device", "data.max_bad_fraction"}
)
"""Settings that may differ when a run is resumed."""
_ONCE_COMMON = frozenset(
    {"path", "test_path", "test_fraction", "labels", "dataset", "image_column", "label_column", "count"}
)
"""Settings that older versions wrote into ``config.yaml`` for every source, before sources had their own settings."""
_KINDS = frozenset({"task", "target"})
"""Settings that only pretraining and only fine-tuning has; a file with neither is not the configuration of a run."""


@dataclass(frozen=True)
class Plan:
    """How long a run is, in optimizer steps."""

    images: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig, images: int, world: int) -> Plan:
        """The plan for a run on `images` images with `world` processes.

        Raises ConfigError if a batch is larger than the data or cannot be split over processes and micro-steps.
        """
        batch = config.batch_size
        require_batch(batch, images, world, config.engine.accumulation)
        per_epoch = images // batch  # the last, incomplete batch of an epoch is dropped
        return cls(images, batch, per_epoch, max(round(config.epochs * per_epoch), 1))

    def epoch(self, step: int) -> float:
        """Completed epochs after `step` optimizer steps, as a fraction."""
        return step / self.steps_per_epoch


def claim_folder(config: RunConfig) -> Path | None:
    """Checks that ``config.out`` is free or holds this same run; returns the checkpoint to resume from, if any.

    Raises CheckpointError if the folder belongs to another run, contains other files, or has a checkpoint although
    resume=never.
    """
    out, record = config.out, config.out / "config.yaml"
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"out: {out} is a file; give a folder")
    if not record.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise CheckpointError(f"out: {out} is not empty and holds no run; choose another folder")
        return None
    written = read_config(record)
    # before the comparison, which could only say that two fingerprints differ
    require_same_module(out, written, getattr(config, "backbone", None))
    difference = _difference(written, config)
    if difference is not None:
        key, there, here = difference
        raise CheckpointError(
            f"out: {out} holds another run ({key}: {whole(there)} there, {whole(here)} here); "
            "choose another out=, or the same settings"
        )
    checkpoint = last_checkpoint(out / "checkpoints")
    if checkpoint is not None and config.resume == "never":
        raise CheckpointError(
            f"out: {out} already holds {checkpoint.name}; resume=auto continues it, another out= starts a new run"
        )
    return checkpoint


def write_config(config: RunConfig) -> None:
    """Creates the run folder and writes its ``config.yaml``."""
    with writing(f"out: {config.out}"):
        config.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(config.out / "config.yaml", text)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``, updated by `current`. Raises CheckpointError for any other file."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict) or not _KINDS & values.keys():
        raise CheckpointError(f"{path} is not a run's configuration; restore it or choose another folder")
    return current(values)


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings of a run in the form of this version.

    Settings have their present names. In the sections of data sources, new settings get their defaults, and settings
    that older versions wrote for every source are dropped if the source does not have them.
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
    except ConfigError:  # a plugin that is not installed here: opening the data raises, reading the settings must not
        return dict(data)
    own = config.model_fields
    kept = {name: value for name, value in data.items() if name in own or name not in _ONCE_COMMON}
    return {**config.model_construct().model_dump(mode="json"), **kept}


def _difference(there: Mapping[str, Any], config: RunConfig) -> tuple[str, Any, Any] | None:
    """First setting that differs and must not: (name, value there, value here); None if there is none."""
    flat_here = _flatten(current(config.model_dump(mode="json")))
    # a setting that did not exist when the run was started counts as its present default
    defaults = _flatten(type(config).model_construct().model_dump(mode="json", exclude={"task"}))
    flat_there = {key: value for key, value in defaults.items() if key in flat_here} | _flatten(there)
    for key in [*flat_here, *(flat_there.keys() - flat_here.keys())]:
        parents = {key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)}  # with the key itself
        if flat_there.get(key) != flat_here.get(key) and not parents & _MAY_CHANGE:
            return key, flat_there.get(key), flat_here.get(key)
    return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:  # an empty one is a value, which would vanish
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
