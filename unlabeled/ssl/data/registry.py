"""Data sources by name. To add a built-in source, add one line here, its file and its test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from unlabeled.ssl.config.messages import explain, in_short
from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.registry import Registry
from unlabeled.ssl.data.source import ImageSource, SourceClass, SourceConfig, Split, limited

SOURCES: dict[str, str] = {
    "folder": "unlabeled.ssl.data.sources.folder:FolderSource",
    "parquet": "unlabeled.ssl.data.sources.parquet:ParquetSource",
    "hf": "unlabeled.ssl.data.sources.hf:HuggingFaceSource",
    "tar": "unlabeled.ssl.data.sources.tar:TarSource",
    "torchvision": "unlabeled.ssl.data.sources.torchvision:TorchvisionSource",
    "digits": "unlabeled.ssl.data.sources.digits:DigitsSource",
    "shapes": "unlabeled.ssl.data.sources.shapes:ShapesSource",
    "voc": "unlabeled.ssl.data.sources.voc:VocSource",
}

GROUP = "unlabeled.sources"
"""Entry-point group through which installed packages add sources."""

REGISTRY = Registry("data", "a data source", group=GROUP, targets=SOURCES)

DataConfigT = TypeVar("DataConfigT", bound=DataConfig)


def register_source(name: str, target: str) -> None:
    """Adds the source `name` with the target ``"module:Class"``. Raises ConfigError if the name is taken."""
    REGISTRY.register(name, target)


def source_names() -> list[str]:
    """Names of all sources: built in, registered, and from installed packages (entry-point group `GROUP`)."""
    return REGISTRY.names()


def source_origin(name: str) -> str:
    """Where source `name` comes from: "built in", a distribution with its version, or the module that registered it."""
    return REGISTRY.origin(name)


def source_class(name: str) -> SourceClass:
    """The class of source `name`, imported now.

    Raises ConfigError with similar names if it is unknown, and with the reason if a plugin cannot be imported.
    """
    return cast(SourceClass, REGISTRY.load(name))


def source_config(data: DataConfig, field: str = "data") -> SourceConfig:
    """The settings in `data`, validated by the `Config` of the source that it names; messages call the section `field`.

    Raises ConfigError for an unknown name, a setting that the source does not have, or an impossible value.
    """
    cls = _named(data.name, field)
    try:
        return cls.Config.model_validate({"limit": data.limit, **(data.model_extra or {})})
    except ValidationError as error:
        raise ConfigError(_without_effect(error, data.name, field) or explain(error, cls.Config, field)) from None


def filled(data: DataConfigT, field: str = "data") -> DataConfigT:
    """`data` with the defaults of its source for all settings that are not given. Raises like `source_config`."""
    # so that config.yaml records every setting, even if a default changes later
    return data.model_copy(update=_values(source_config(data, field)))


def labeled(data: DataConfigT, field: str = "data") -> DataConfigT:
    """`data` with ``labels=True`` if its source has that setting; other sources always read labels."""
    has_setting = "labels" in _named(data.name, field).Config.model_fields
    return data.model_copy(update={"labels": True}) if has_setting else data


def tiny(data: DataConfigT, limit: int) -> DataConfigT:
    """`data` for tiny mode: at most `limit` images, and the settings that the source reduces for it."""
    return data.model_copy(update={"limit": limit, **source_class(data.name).Config.debug})


def open_source(data: DataConfig, split: Split = "train") -> ImageSource:
    """Opens one split of the data that `data` describes; ``data.limit`` applies to each split.

    Raises ConfigError for an unknown source or setting, and DataError for a missing path, an empty folder, or a split
    that the data does not have.
    """
    if not isinstance(data, DataConfig):
        given = "an unlabeled.DataConfig, such as DataConfig(name='folder', path=...)"
        raise ConfigError(f"data: {in_short(data)} is not possible; give {given}")
    config = source_config(data)
    return limited(source_class(data.name)(config, split), config.limit)


class Sources(Mapping[str, Mapping[str, Any]]):
    """Source → settings that ``data=NAME`` stands for. An unknown name raises ConfigError with similar names."""

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        _named(name, "data")
        return {"data": {"name": name}}

    def __contains__(self, name: object) -> bool:
        return name in source_names()

    def __iter__(self) -> Iterator[str]:
        return iter(source_names())

    def __len__(self) -> int:
        return len(source_names())


def _named(name: str, field: str) -> SourceClass:
    """Like `source_class`, with `field` in error messages and a hint if `name` is a path."""
    try:
        return source_class(name)
    except ConfigError as error:
        if name not in REGISTRY.targets and ("/" in name or Path(name).exists()):
            raise ConfigError(f"{field}: {name!r} is a path; write {field}=folder {field}.path={name}") from None
        raise ConfigError(field + str(error).removeprefix(REGISTRY.field)) from None


def _without_effect(error: ValidationError, name: str, field: str) -> str | None:
    """Message for a setting that only other sources have; None if the first error is a different one."""
    fault = error.errors()[0]
    setting = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] != "extra_forbidden" or len(fault["loc"]) > 1:
        return None
    owners = [other for other in source_names() if setting in _settings_of(other)]
    if not owners:
        return None
    return (
        f"{field}.{setting}: {str(fault['input'])[:80]} has no effect with {field}={name}, it is a setting of "
        f"{', '.join(owners)}; remove it"
    )


def _settings_of(name: str) -> Mapping[str, Any]:
    try:
        return source_class(name).Config.model_fields
    except (ConfigError, ImportError):  # a plugin that cannot be imported here
        return {}


def _values(config: SourceConfig) -> dict[str, Any]:
    """All settings in `config` by name, as Python objects."""
    # not model_dump, which would turn objects into text and sections into mappings
    return {name: getattr(config, name) for name in type(config).model_fields}
