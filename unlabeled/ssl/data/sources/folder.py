"""Images in a folder at any depth; the name of the first sub-folder can be the label."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from unlabeled.ssl.core.errors import DataError, NoLabelsError
from unlabeled.ssl.data.decode import EXTENSIONS
from unlabeled.ssl.data.source import SourceConfig, Split
from unlabeled.ssl.data.sources.files import FileSource
from unlabeled.ssl.data.sources.layout import FilesConfig, existing_folder, holdout, test_name


class FolderConfig(FilesConfig):
    """A folder of images at any depth: jpg, png, webp, bmp, tiff, gif.

    Held-out images: sub-folders train and test (or val), ``data.test_path=FOLDER``, or with ``data.labels=true`` a
    fraction of each class.
    """

    path: Path | None = None
    """Folder of images, nested in any way."""
    labels: bool = False
    """Use the name of the first sub-folder as the label."""


class FolderSource(FileSource):
    """A folder of images at any depth: jpg, png, webp, bmp, tiff, gif; ``data.labels=true`` labels by sub-folder.

    Images are sorted by name. The splits follow the first rule that applies: `config.test_path` is the test split;
    sub-folders ``train`` and ``test`` (or ``val``, ``validation``) are the splits; with labels, `config.test_fraction`
    of each class is held out, chosen by a hash of the name; without labels all images are for training and there is no
    test split.
    """

    Config: ClassVar[type[SourceConfig]] = FolderConfig

    def __init__(self, config: FolderConfig, split: Split = "train") -> None:
        train_root, test_root = _roots(config)
        if split == "test" and test_root is None and not config.labels:
            raise DataError(
                f"data.path: {train_root} has no test split; make sub-folders train and test, "
                f"set data.test_path, or set data.labels=true to hold out a fraction"
            )
        self.root = test_root if split == "test" and test_root is not None else train_root
        self.classes: list[str] | None = None
        # the folder of test images may be inside that of the training images
        separate = test_root is not None and not os.path.samefile(test_root, self.root)
        names = _images(self.root, skip=test_root if separate else None)
        labels: torch.Tensor | None = None
        if config.labels:
            self.classes = _class_names(train_root, without=test_root)  # both splits number classes alike
            labels = _labels(names, self.classes, self.root)
            if test_root is None:
                kept = holdout(labels, config.test_fraction, split, _name_order(names))
                names, labels = [names[i] for i in kept.tolist()], labels[kept]
                if not names:
                    raise DataError(f"data.path: {self.root} has too few images per class to hold some out; add more")
        self._labels = labels
        # one block of bytes instead of a list: reference counts in a list make forked workers copy its memory
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends: npt.NDArray[np.int64] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def encoded(self, index: int) -> Path:
        """The file of image `index`."""
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return self.root / os.fsdecode(name)


class _Found(NamedTuple):
    images: list[str]
    """Paths relative to the root, with forward slashes."""
    files: int
    """Number of files, images or not."""


def _roots(config: FolderConfig) -> tuple[Path, Path | None]:
    """Folders of the training images and of the test images; None if there is no folder of test images."""
    root = existing_folder(config.path, "data.path")
    given_test = existing_folder(config.test_path, "data.test_path") if config.test_path is not None else None
    folders = {entry.name.lower(): Path(entry.path) for entry in os.scandir(root) if entry.is_dir()}
    named_test = test_name(folders)
    # a folder train alone may be a class, and so may a folder test
    if "train" in folders and (named_test is not None or given_test is not None):
        return folders["train"], given_test or folders[named_test or ""]
    return root, given_test


def _images(root: Path, skip: Path | None) -> list[str]:
    """Sorted paths of the images under `root`. Raises DataError if there are none."""
    found = _scan(root, skip)
    if not found.images:
        raise DataError(
            f"data: no images among {found.files} files in {root}; "
            f"add files that end in {', '.join(sorted(EXTENSIONS))}, or give another folder"
        )
    return found.images


def _scan(root: Path, skip: Path | None) -> _Found:
    """Walks `root` and everything below it, except for `skip` and names that begin with a dot."""
    # folders by device and inode, so that a cycle of symbolic links ends
    visited = {_identity(skip)} if skip is not None else set()
    images: list[str] = []
    files = 0
    # linked folders last: of two paths to a folder, the real one names its images
    folders, links = [""], list[str]()
    while folders or links:
        prefix = folders.pop() if folders else links.pop(0)
        identity = _identity(root / prefix)
        if identity in visited:
            continue
        visited.add(identity)
        inner: list[str] = []
        for entry in _entries(root / prefix):
            if entry.is_dir():
                (links if entry.is_symlink() else inner).append(f"{prefix}{entry.name}/")
            elif entry.is_file():
                files += 1
                if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    images.append(prefix + entry.name)
        folders.extend(reversed(inner))  # the last is taken first
    return _Found(sorted(images), files)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"data: {folder} cannot be listed ({error.strerror}); check its permissions") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _class_names(root: Path, without: Path | None) -> list[str]:
    folders = [entry for entry in _entries(root) if entry.is_dir()]
    names = [entry.name for entry in folders if without is None or not os.path.samefile(entry.path, without)]
    if not names:
        raise NoLabelsError(
            f"data.labels: {root} has no sub-folders to name classes; make one per class or set labels=false"
        )
    return names


def _labels(names: list[str], classes: list[str], root: Path) -> torch.Tensor:
    numbers = {name: label for label, name in enumerate(classes)}
    labels = torch.empty(len(names), dtype=torch.int64)
    for index, name in enumerate(names):
        first, _, rest = name.partition("/")
        if not rest:
            raise NoLabelsError(
                f"data.labels: {root / name} is in no sub-folder and has no label; move it into a class"
            )
        if first not in numbers:
            raise DataError(f"data.labels: class {first!r} of {root} is not among the training classes; remove it")
        labels[index] = numbers[first]
    return labels


def _name_order(names: list[str]) -> npt.NDArray[np.uint64]:
    """Keys (N,) for `holdout`: hashes of the names, so that an image stays in its split when others are added."""
    digests = b"".join(hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
