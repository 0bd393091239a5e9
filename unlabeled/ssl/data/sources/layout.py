"""Where the parts of a data set lie: paths as the user gave them, names of splits, and what is held out."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.source import SourceConfig, Split

TEST_NAMES = ("test", "val", "validation", "valid")
"""Names of a held-out part, the preferred first."""

_SPLIT = re.compile(r"(train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?)(?![a-z])")


class FilesConfig(SourceConfig):
    """Where training and held-out images are."""

    path: Path | None = None
    """What to read: a file, a pattern or a folder, depending on the source."""
    test_path: Path | None = None
    """Held-out images in the same form; null: the source's own test split, or a fraction of `path`."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of the images that is held out for testing if there is no test split. [fraction]"""


def given(path: Path | None, field: str, example: str) -> Path:
    """`path` with ``~`` expanded. Raises ConfigError when it was not given."""
    if path is None:
        raise ConfigError(f"{field}: not given; set {field}={example}")
    return path.expanduser()


def existing_folder(path: Path | None, field: str) -> Path:
    """`path` as a folder that exists. Raises ConfigError or DataError naming `field`."""
    folder = given(path, field, "FOLDER")
    if not folder.exists():
        raise DataError(f"{field}: {folder} does not exist; give an existing folder")
    if not folder.is_dir():
        raise DataError(f"{field}: {folder} is a file; give the folder that it lies in")
    return folder


def split_named(name: str) -> str | None:
    """The part that a file or folder is named for: ``train``, ``test`` or ``val``; None for any other name.

    >>> split_named("train-00000-of-00005.parquet"), split_named("Validation"), split_named("trains.parquet")
    ('train', 'val', None)
    """
    match = _SPLIT.match(name.lower())
    if match is None:
        return None
    return next(part for part in ("train", "test", "val") if match.group(1).startswith(part))


def test_name(names: Iterable[str]) -> str | None:
    """The one of `names` that is the test split: test before validation."""
    found = set(names)
    return next((name for name in TEST_NAMES if name in found), None)


def split_files(config: FilesConfig, ending: str) -> tuple[list[Path], list[Path] | None]:
    """Files that end in `ending` at ``data.path`` (one, a pattern or a folder): (training, test or None).

    Files that are named for a split (``train-0000.parquet``, ``test/0000.parquet``) belong to it; ``data.test_path``
    names the test files. Raises ConfigError or DataError where there are none.
    """
    root, files = _files_at(given(config.path, "data.path", "FILES"), "data.path", ending)
    parts: dict[str | None, list[Path]] = {}
    for file in files:
        parts.setdefault(_split_of(file, root), []).append(file)
    named_train, named_test = parts.get("train"), parts.get("test") or parts.get("val")
    if config.test_path is not None:
        _, test = _files_at(config.test_path.expanduser(), "data.test_path", ending)
        return named_train or [file for file in files if file not in test] or files, test
    if named_train and named_test:
        return named_train, named_test
    return files, None


def _files_at(path: Path, field: str, ending: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files in the order of their names."""
    kind = ending.removeprefix(".")
    if path.is_dir():
        files = sorted(file for file in path.rglob(f"*{ending}") if file.is_file() and not file.name.startswith("."))
        root = path
    elif path.exists():
        return path.parent, [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        root = path.parent
        if not files and not glob.has_magic(str(path)):
            raise DataError(f"{field}: {path} does not exist; give a {kind} file, a pattern or a folder")
    if not files:
        raise DataError(f"{field}: no {kind} files at {path}; give a file, a pattern or a folder of them")
    return root, files


def _split_of(file: Path, root: Path) -> str | None:
    """The split that a file is named for, by its own name or by the nearest folder's below `root`."""
    inner = file.relative_to(root).parts if file.is_relative_to(root) else (file.name,)
    return next((part for name in reversed(inner) if (part := split_named(name)) is not None), None)


def holdout(
    labels: torch.Tensor, fraction: float, split: Split, order: npt.NDArray[np.uint64] | None = None
) -> torch.Tensor:
    """Sorted indices, int64 (M,), of the train or test part when `fraction` of each class is held out.

    The images of a class that come first by `order` (N,) are held out; None: a fixed random order. An order that
    belongs to the images, such as a hash of their names, keeps them in their part when others are added.
    Each class of two or more has at least one image in both parts; a class of one image is trained on.
    """
    count = len(labels)
    keys = np.random.default_rng(0).permutation(count) if order is None else order
    classes, members = np.unique(labels.numpy(), return_inverse=True)
    by_class = np.lexsort((keys, members))
    sizes = np.bincount(members, minlength=len(classes))
    held = np.minimum(np.maximum(np.floor(sizes * fraction + 0.5), 1), sizes - 1).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(count) - starts[members[by_class]]
    chosen = by_class[(rank < held[members[by_class]]) == (split == "test")]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))
