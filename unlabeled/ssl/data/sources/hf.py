"""Hugging Face data sets: saved ones, local ones, and those of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.source import SourceConfig, Split
from unlabeled.ssl.data.sources.layout import test_name
from unlabeled.ssl.data.sources.tables import TableConfig, TableSource, datasets_package, load_table

if TYPE_CHECKING:
    from datasets import Dataset


class HuggingFaceConfig(TableConfig):
    """A Hugging Face data set, on disk or on the Hub.

    Needs ``pip install 'unlabeled[hf]'``.
    """

    path: Path | None = None
    """Folder written by save_to_disk, or a local data set."""
    dataset: str | None = None
    """Name of a data set on the Hub, in place of `path`."""


class HuggingFaceSource(TableSource):
    """A Hugging Face data set on disk, or ``data.dataset=NAME`` of the Hub (``pip install 'unlabeled[hf]'``)."""

    Config: ClassVar[type[SourceConfig]] = HuggingFaceConfig

    def __init__(self, config: HuggingFaceConfig, split: Split = "train") -> None:
        train, test = _tables(config)
        super().__init__(config, split, train=train, test=test, origin=str(config.path or config.dataset))


def _tables(config: HuggingFaceConfig) -> tuple[Dataset, Dataset | None]:
    """The training table, and the test table when there is one."""
    datasets = datasets_package("hf")
    if (config.path is None) == (config.dataset is None):
        raise ConfigError("data.path: the hf source needs either data.path=FOLDER or data.dataset=NAME")
    if config.path is not None:
        loaded = _open_dataset(datasets, config.path, "data.path")
    else:
        loaded = load_table(datasets.load_dataset, str(config.dataset))
    tables = loaded if isinstance(loaded, dict) else {"train": loaded}
    test_key = test_name(tables)
    train_key = "train" if "train" in tables else next(iter(tables))
    test = tables[test_key] if test_key is not None and test_key != train_key else None
    if config.test_path is not None:
        held = _open_dataset(datasets, config.test_path, "data.test_path")
        test = held[test_name(held) or next(iter(held))] if isinstance(held, dict) else held
    return tables[train_key], test


def _open_dataset(datasets: Any, path: Path, field: str) -> Any:
    folder = path.expanduser()
    if not folder.exists():
        raise DataError(f"{field}: {folder} does not exist; give a saved data set")
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return load_table(datasets.load_from_disk if saved else datasets.load_dataset, str(folder))
