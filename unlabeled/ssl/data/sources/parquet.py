"""Parquet files with a column of encoded images."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, ClassVar

from unlabeled.ssl.data.source import SourceConfig, Split
from unlabeled.ssl.data.sources.layout import split_files
from unlabeled.ssl.data.sources.tables import TableConfig, TableSource, datasets_package, load_table


class ParquetConfig(TableConfig):
    """Parquet files: one, several by a pattern, or a folder.

    Needs ``pip install 'unlabeled[hf]'``.
    """

    path: Path | None = None
    """A parquet file, a pattern such as 'data/*.parquet', or a folder. Files named train-* and test-* (or val*) are the
    splits; otherwise a fraction of each class is held out."""


class ParquetSource(TableSource):
    """Parquet files, one or many; the image column is found by its type (``pip install 'unlabeled[hf]'``).

    `config.path` is a file, a pattern such as ``data/*.parquet``, or a folder. Files that are named for a split
    (``train-0000.parquet``, ``test/0000.parquet``) belong to it.
    """

    Config: ClassVar[type[SourceConfig]] = ParquetConfig

    def __init__(self, config: ParquetConfig, split: Split = "train") -> None:
        datasets = datasets_package("parquet")
        files, test_files = split_files(config, ".parquet")
        train, test = _opened(datasets, files), _opened(datasets, test_files) if test_files is not None else None
        super().__init__(config, split, train=train, test=test, origin=str(config.path))


def _opened(datasets: Any, files: list[Path]) -> Any:
    # not load_dataset("parquet"): that counts its uses on the Hub's server, and waits for it where there is no network
    return load_table(datasets.Dataset.from_parquet, [glob.escape(str(file)) for file in files])
