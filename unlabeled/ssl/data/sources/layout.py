"""What sources of files share: paths from the settings, names of splits, and held-out images."""

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
"""Names of a test split, the preferred first."""

# followed by anything but a letter: train-0000 and train_1 are splits, trains is not
_SPLIT = re.compile(r"(train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?)(?![a-z])")


class FilesConfig(SourceConfig):
    """Paths of training and held-out images."""

    path: Path | None = None
    """What to read: a file, a pattern or a folder, depending on the source."""
    test_path: Path | None = None
    """Held-out images in the same form; null: the source's own test split, or a fraction of `path`."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of the images that is held out for testing if there is no test split. [fraction]"""


def given(path: Path | None, field: str, example: str) -> Path:
    """`path` with ``~`` expanded. Raises ConfigError if it is None."""
    if path is None:
        raise ConfigError(f"{field}: not given; set {field}={example}")
    return path.expanduser()


def existing_folder(path: Path | None, field: str) -> Path:
    """`path` with ``~`` expanded. Raises ConfigError if it is None and DataError if it is not an existing folder."""
    folder = given(path, field, "FOLDER")
    if not folder.exists():
        raise DataError(f"{field}: {folder} does not exist; give an existing folder")
    if not folder.is_dir():
        raise DataError(f"{field}: {folder} is a file; give the folder that contains it")
    return folder


def split_named(name: str) -> str | None:
    """The split in the name of a file or folder: ``train``, ``test`` or ``val``; None for any other name.

    >>> split_named("train-00000-of-00005.parquet"), split_named("Validation"), split_named("trains.parquet")
    ('train', 'val', None)
    """
    match = _SPLIT.match(name.lower())
    if match is None:
        return None
    return next(split for split in ("train", "test", "val") if match.group(1).startswith(split))


def test_name(names: Iterable[str]) -> str | None:
    """The name of the test split among `names`, preferring test to validation; None if there is none."""
    found = set(names)
    return next((name for name in TEST_NAMES if name in found), None)


def split_files(config: FilesConfig, ending: str) -> tuple[list[Path], list[Path] | None]:
    """Training files and test files (None if there are none) with the extension `ending`.

    ``data.path`` is a file, a pattern or a folder. Files with a split in their name (``train-0000.parquet``,
    ``test/0000.parquet``) belong to it; ``data.test_path`` overrides the test files.

    Raises ConfigError if ``data.path`` is not set, and DataError if there are no files.
    """
    root, files = _files_at(given(config.path, "data.path", "FILES"), "data.path", ending)
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, root), []).append(file)
    named_train, named_test = by_split.get("train"), by_split.get("test") or by_split.get("val")
    if config.test_path is not None:
        _, test = _files_at(config.test_path.expanduser(), "data.test_path", ending)
        # test_path may be below path; if it is all of it, the same files serve for both
        return named_train or [file for file in files if file not in test] or files, test
    if named_train and named_test:
        return named_train, named_test
    return files, None  # a train- without a test- is just a name


def _files_at(path: Path, field: str, ending: str) -> tuple[Path, list[Path]]:
    """The folder that contains the files, and the sorted files."""
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
    """The split in the name of a file, or else of the nearest folder that contains it below `root`."""
    names = file.relative_to(root).parts if file.is_relative_to(root) else (file.name,)
    return next((split for name in reversed(names) if (split := split_named(name)) is not None), None)


def holdout(
    labels: torch.Tensor, fraction: float, split: Split, order: npt.NDArray[np.uint64] | None = None
) -> torch.Tensor:
    """Sorted indices, int64 (M,), of the train or test split if `fraction` of each class is held out.

    In each class, the images with the smallest keys in `order` (N,) are held out; None: a fixed random order. Keys that
    depend on the image alone, such as a hash of its name, keep it in its split when images are added. Each class of two
    or more images has at least one in both splits; a single image is used for training.
    """
    count = len(labels)
    keys = np.random.default_rng(0).permutation(count) if order is None else order
    classes, members = np.unique(labels.numpy(), return_inverse=True)
    by_class = np.lexsort((keys, members))  # the last key sorts first: by class, then by key
    sizes = np.bincount(members, minlength=len(classes))
    # floor(x + 0.5) and not round, which rounds halves to even numbers
    test_sizes = np.minimum(np.maximum(np.floor(sizes * fraction + 0.5), 1), sizes - 1).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(count) - starts[members[by_class]]  # within the class
    chosen = by_class[(rank < test_sizes[members[by_class]]) == (split == "test")]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))
