"""Tables of pictures through Hugging Face `datasets`: parquet files, saved data sets, and those of the Hub.

The table stays memory-mapped: a worker receives file names, not pictures. The picture column holds encoded bytes, or
``{bytes, path}``; it is decoded by `unlabeled.ssl.data.decode`, so that what is broken is reported like everywhere.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError, nearest
from unlabeled.ssl.data.decode import decode_rgb
from unlabeled.ssl.data.source import DecodeError, Split
from unlabeled.ssl.data.sources.layout import holdout, split_files, test_name

if TYPE_CHECKING:
    from datasets import Dataset

LABEL_NAMES = ("label", "labels", "fine_label", "class")
"""Names of a label column that is not marked as one, the preferred first."""


class TableSource:
    """Rows of a `datasets.Dataset`; subclasses say which tables are the training and the test split.

    Where there is no test table, `config.test_fraction` of each class is held out by a fixed shuffle; a table without
    labels is all for training. Labels that were found without being asked for are left out when some are missing.
    """

    def __init__(self, config: DataConfig, split: Split = "train") -> None:
        train, test = self._tables(config)
        self.origin = str(config.path or config.dataset)
        self.classes: list[str] | None = None
        self._labels: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        table = test if split == "test" and test is not None else train
        column = image_column(table, config, self.origin)
        label_column = _label_column(train, config, self.origin)
        if label_column is not None:
            self.classes, self._labels = _labels(train, table, label_column, config.label_column is not None)
        if test is None and self._labels is not None:
            self._rows = holdout(self._labels, config.test_fraction, split)
            self._labels = self._labels[self._rows]
        elif test is None and split == "test":
            raise DataError(
                f"data.path: {self.origin} has no test split and no labels to hold a part out by; "
                f"set data.test_path or data.label_column"
            )
        self._column = column
        self._pictures = _undecoded(table.select_columns([column]), column)
        if not len(self):
            raise DataError(f"data.path: the {split} split of {self.origin} is empty; give one with pictures")

    def _tables(self, config: DataConfig) -> tuple[Dataset, Dataset | None]:
        """The training table, and the test table when there is one."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._pictures) if self._rows is None else len(self._rows)

    def read(self, index: int) -> torch.Tensor:
        """Picture `index`, uint8 (3, H, W). Raises DecodeError."""
        return decode_rgb(self.encoded(index), name=self.describe(index))

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,); None when the table has none."""
        return self._labels

    def describe(self, index: int) -> str:
        """Row and file, such as ``row 7 of pictures.parquet``."""
        return f"row {self._row(index)} of {self.origin}"

    def encoded(self, index: int) -> bytes | Path:
        """The bytes in the table, or the file that it names. Raises DecodeError when it holds neither."""
        cell = self._pictures[self._row(index)][self._column]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(content, bytes):
            return content
        if isinstance(path, str):
            return Path(path)
        raise DecodeError(f"{self.describe(index)}: its cell {self._column!r} holds no encoded picture")

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])


class ParquetSource(TableSource):
    """Parquet files: one, a pattern such as ``data/*.parquet``, or all in a folder.

    Files that are named for a split (``train-0000.parquet``, ``test/0000.parquet``) belong to it.
    """

    def _tables(self, config: DataConfig) -> tuple[Dataset, Dataset | None]:
        datasets = _datasets(config)
        train, test = split_files(config, ".parquet")
        return _parquet(datasets, train), _parquet(datasets, test) if test is not None else None


class HuggingFaceSource(TableSource):
    """A data set saved by ``save_to_disk`` or any local one (`config.path`), or one of the Hub (`config.dataset`)."""

    def _tables(self, config: DataConfig) -> tuple[Dataset, Dataset | None]:
        datasets = _datasets(config)
        if (config.path is None) == (config.dataset is None):
            raise ConfigError("data.path: the hf source needs either data.path=FOLDER or data.dataset=NAME")
        loaded = _open_dataset(datasets, config.path, "data.path") if config.path else _from_hub(datasets, config)
        tables = loaded if isinstance(loaded, dict) else {"train": loaded}
        test_key = test_name(tables)
        train_key = "train" if "train" in tables else next(iter(tables))
        test = tables[test_key] if test_key is not None and test_key != train_key else None
        if config.test_path is not None:
            held = _open_dataset(datasets, config.test_path, "data.test_path")
            test = held[test_name(held) or next(iter(held))] if isinstance(held, dict) else held
        return tables[train_key], test


def image_column(table: Dataset, config: DataConfig, origin: str) -> str:
    """Name of the picture column: the one that was asked for, or the first of the type of pictures."""
    kinds: dict[str, str] = {name: _kind(feature) for name, feature in table.features.items()}
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())
    if config.image_column is not None:
        if config.image_column not in kinds:
            near = nearest(config.image_column, kinds)
            raise ConfigError(f"data.image_column: {origin} has no column {config.image_column!r}; {near}")
        return config.image_column
    # marked pictures before structs of bytes before bare bytes, which may be anything
    for kind in ("image", "struct", "binary"):
        for name, found in kinds.items():
            if found == kind:
                return name
    raise DataError(f"data.image_column: {origin} has no column of pictures; its columns are {listed}")


def _kind(feature: Any) -> str:
    if type(feature).__name__ == "Image":
        return "image"
    if isinstance(feature, dict):
        return "struct" if "bytes" in feature else "other"
    return "binary" if getattr(feature, "dtype", "") in ("binary", "large_binary") else "other"


def _undecoded(table: Dataset, column: str) -> Dataset:
    feature = table.features[column]
    if _kind(feature) != "image":
        return table
    return table.cast_column(column, type(feature)(decode=False))


def _label_column(table: Dataset, config: DataConfig, origin: str) -> str | None:
    names = table.column_names
    if config.label_column is not None:
        if config.label_column not in names:
            near = nearest(config.label_column, names)
            raise ConfigError(f"data.label_column: {origin} has no column {config.label_column!r}; {near}")
        return config.label_column
    marked = [name for name, feature in table.features.items() if type(feature).__name__ == "ClassLabel"]
    named = [name for name in LABEL_NAMES if getattr(table.features.get(name), "dtype", "") in _LABEL_TYPES]
    return next(iter(marked + named), None)


_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_LABEL_TYPES = frozenset(_INTEGERS | {"bool", "string", "large_string"})


def _labels(
    train: Dataset, table: Dataset, column: str, asked_for: bool
) -> tuple[list[str] | None, torch.Tensor | None]:
    """Class names and labels of `table`; both splits take their numbers from the values in `train`."""
    feature = table.features[column]
    if getattr(feature, "dtype", "") not in _LABEL_TYPES:
        raise DataError(f"data.label_column: {column!r} holds no class labels but {feature}; give another column")
    values = _values(table, column)
    names = getattr(feature, "names", None)
    missing = sum(value is None or (names is not None and value < 0) for value in values)
    if missing:
        if asked_for:
            raise DataError(f"data.label_column: {missing} of {len(values)} rows have no {column!r}; fill or drop them")
        return None, None
    if names is not None:
        return list(names), torch.tensor(values, dtype=torch.int64)
    known = sorted({value for value in _values(train, column) if value is not None})
    numbers = {value: label for label, value in enumerate(known)}
    unknown = next((value for value in values if value not in numbers), None)
    if unknown is not None:
        raise DataError(f"data.label_column: test label {unknown!r} is not among the {len(known)} training labels")
    return [str(value) for value in known], torch.tensor([numbers[value] for value in values], dtype=torch.int64)


def _values(table: Dataset, column: str) -> list[Any]:
    return list(table[:][column]) if table.num_columns == 1 else list(table.select_columns([column])[:][column])


def _datasets(config: DataConfig) -> Any:
    try:
        import datasets  # an extra
    except ImportError:
        raise ConfigError(
            f"data: {config.name!r} needs the package datasets; run pip install 'unlabeled[hf]'"
        ) from None
    return datasets


def _parquet(datasets: Any, files: list[Path]) -> Any:
    # not load_dataset("parquet"): that counts its uses on the Hub's server, and waits for it where there is no network
    return _loaded(datasets.Dataset.from_parquet, [glob.escape(str(file)) for file in files])


def _open_dataset(datasets: Any, path: Path, field: str) -> Any:
    folder = path.expanduser()
    if not folder.exists():
        raise DataError(f"{field}: {folder} does not exist; give a saved data set")
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return _loaded(datasets.load_from_disk if saved else datasets.load_dataset, str(folder))


def _from_hub(datasets: Any, config: DataConfig) -> Any:
    return _loaded(datasets.load_dataset, str(config.dataset))


def _loaded(load: Any, what: str | list[str]) -> Any:
    try:
        return load(what)
    except Exception as error:  # datasets raises dozens of kinds, from its own to pyarrow's and the network's
        name = what if isinstance(what, str) else what[0]
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"data: {name} cannot be opened as a data set ({reason}); check it") from error
