"""Base class of sources that read tables of images with Hugging Face `datasets`.

The table stays memory-mapped: a worker receives file names, not images. The image column contains encoded bytes or
``{bytes, path}``, which `unlabeled.ssl.data.decode` decodes, so that broken images are reported as in other sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unlabeled.ssl.core.errors import ConfigError, DataError, NoLabelsError, nearest
from unlabeled.ssl.data.decode import decode_rgb
from unlabeled.ssl.data.source import DecodeError, Split
from unlabeled.ssl.data.sources.layout import FilesConfig, holdout

if TYPE_CHECKING:
    from datasets import Dataset

LABEL_NAMES = ("label", "labels", "fine_label", "class")
"""Names of label columns in tables without a column of type ClassLabel, the preferred first."""


class TableConfig(FilesConfig):
    """Columns of a table of images."""

    image_column: str | None = None
    """Column of images; null: found by its type."""
    label_column: str | None = None
    """Column of labels; null: the first column of class labels, or one named label."""


class TableSource:
    """Rows of a `datasets.Dataset`; subclasses open the tables `train` and, if there is one, `test`.

    `origin` names the data in messages. Without a test table, `config.test_fraction` of each class is held out by a
    fixed shuffle; without labels, all rows are for training. If labels are incomplete, they are ignored, unless
    `config.label_column` asks for them.
    """

    def __init__(self, config: TableConfig, split: Split, *, train: Dataset, test: Dataset | None, origin: str) -> None:
        self.origin = origin
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
            raise NoLabelsError(
                f"data.path: {self.origin} has no test split and no labels to hold out a fraction by; "
                f"set data.test_path or data.label_column"
            )
        self._column = column
        self._images = _undecoded(table.select_columns([column]), column)
        if not len(self):
            raise DataError(f"data.path: the {split} split of {self.origin} is empty; give one with images")

    def __len__(self) -> int:
        return len(self._images) if self._rows is None else len(self._rows)

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, H, W). Raises DecodeError."""
        return decode_rgb(self.encoded(index), name=self.describe(index))

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,); None if the table has none."""
        return self._labels

    def describe(self, index: int) -> str:
        """Row and file, such as ``row 7 of images.parquet``."""
        return f"row {self._row(index)} of {self.origin}"

    def encoded(self, index: int) -> bytes | Path:
        """The bytes in the table, or the file that it names. Raises DecodeError if there is neither."""
        cell = self._images[self._row(index)][self._column]
        # a struct {bytes, path}, or a bare value
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(content, bytes):
            return content
        if isinstance(path, str):
            return Path(path)
        raise DecodeError(f"{self.describe(index)}: its cell {self._column!r} holds no encoded image")

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])


def image_column(table: Dataset, config: TableConfig, origin: str) -> str:
    """Name of the image column: `config.image_column`, or the first column whose type can hold images."""
    kinds: dict[str, str] = {name: _kind(feature) for name, feature in table.features.items()}
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())
    if config.image_column is not None:
        if config.image_column not in kinds:
            near = nearest(config.image_column, kinds)
            raise ConfigError(f"data.image_column: {origin} has no column {config.image_column!r}; {near}")
        return config.image_column
    # marked images before structs of bytes before bare bytes, which may be anything
    for kind in ("image", "struct", "binary"):
        for name, found in kinds.items():
            if found == kind:
                return name
    raise DataError(f"data.image_column: {origin} has no column of images; its columns are {listed}")


def _kind(feature: Any) -> str:
    if type(feature).__name__ == "Image":  # by name, since `datasets` is imported only when a table is opened
        return "image"
    if isinstance(feature, dict):
        return "struct" if "bytes" in feature else "other"
    return "binary" if getattr(feature, "dtype", "") in ("binary", "large_binary") else "other"


def _undecoded(table: Dataset, column: str) -> Dataset:
    feature = table.features[column]
    if _kind(feature) != "image":
        return table
    # else `datasets` would decode images itself, with errors of its own
    return table.cast_column(column, type(feature)(decode=False))


def _label_column(table: Dataset, config: TableConfig, origin: str) -> str | None:
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
    """Class names and labels of `table`, or (None, None) if some are missing and `asked_for` is false."""
    feature = table.features[column]
    if getattr(feature, "dtype", "") not in _LABEL_TYPES:
        raise DataError(f"data.label_column: {column!r} holds no class labels but {feature}; give another column")
    values = _values(table, column)
    names = getattr(feature, "names", None)  # of a ClassLabel
    # a ClassLabel has -1 for a missing label, other columns have null
    missing = sum(value is None or (names is not None and value < 0) for value in values)
    if missing:
        if asked_for:
            raise DataError(f"data.label_column: {missing} of {len(values)} rows have no {column!r}; fill or drop them")
        return None, None
    if names is not None:
        return list(names), torch.tensor(values, dtype=torch.int64)
    # the numbers come from the training table for both splits
    known = sorted({value for value in _values(train, column) if value is not None})
    numbers = {value: label for label, value in enumerate(known)}
    unknown = next((value for value in values if value not in numbers), None)
    if unknown is not None:
        raise DataError(f"data.label_column: test label {unknown!r} is not among the {len(known)} training labels")
    return [str(value) for value in known], torch.tensor([numbers[value] for value in values], dtype=torch.int64)


def _values(table: Dataset, column: str) -> list[Any]:
    # without the other columns, since [:] decodes every image
    return list(table[:][column]) if table.num_columns == 1 else list(table.select_columns([column])[:][column])


def datasets_package(source: str) -> Any:
    """Imports Hugging Face `datasets`. Raises ConfigError for `source` if it is not installed."""
    try:
        import datasets  # an optional dependency
    except ImportError:
        raise ConfigError(f"data: {source!r} needs the package datasets; run pip install 'unlabeled[hf]'") from None
    return datasets


def load_table(load: Any, what: str | list[str]) -> Any:
    """Calls `load`, a function of `datasets`, with `what`. Raises DataError if it fails."""
    try:
        return load(what)
    except Exception as error:  # its own errors, those of pyarrow, of the network, and more
        name = what if isinstance(what, str) else what[0]
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"data: {name} cannot be opened as a dataset ({reason}); check it") from error
