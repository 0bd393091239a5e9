"""Tar shards in WebDataset's layout, read in random order.

Members of a shard with the same path up to the first dot of the name form a sample: ``0001.jpg`` with ``0001.cls``
(the class as text) or ``0001.json`` (with a field ``label``). Opening the source reads all headers once; images are
then read by their offset in the shard, so that shuffling and resuming are as exact as with single files.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from unlabeled.ssl.core.errors import DataError, NoLabelsError
from unlabeled.ssl.data.decode import EXTENSIONS, decode_rgb
from unlabeled.ssl.data.source import DecodeError, SourceConfig, Split
from unlabeled.ssl.data.sources.layout import FilesConfig, holdout, split_files


class TarConfig(FilesConfig):
    """Tar shards in WebDataset's layout: one, several by a pattern, or a folder.

    Labels: ``0001.cls`` (text) or ``0001.json`` (a field "label") next to ``0001.jpg``.
    """

    path: Path | None = None
    """A tar file, a pattern such as 'data/train-*.tar', or a folder. Shards named train-* and test-* (or val*) are the
    splits; otherwise a fraction of each class is held out."""


class TarSource:
    """Tar shards as WebDataset writes them, with labels from ``.cls`` or ``.json`` members.

    Images are ordered by shard name, then as in the shard. Shards with a split in their name belong to it, and
    `config.test_path` overrides the test shards; otherwise `config.test_fraction` of each class is held out. There are
    labels if every image has one.
    """

    Config: ClassVar[type[SourceConfig]] = TarConfig

    def __init__(self, config: TarConfig, split: Split = "train") -> None:
        train_files, test_files = split_files(config, ".tar")
        must_hold_out = test_files is None
        train = _read_index(train_files) if split == "train" or must_hold_out else None
        shards = train if train is not None else _read_index(test_files or [])
        self.classes: list[str] | None = None
        self._labels: torch.Tensor | None = None
        self._index = shards
        if shards.labels is not None:
            # both splits number the classes of the training shards
            known = shards.labels if train is not None else _read_index(train_files).labels
            if known is not None:
                self.classes, self._labels = _numbered(known, shards.labels)
        if not must_hold_out:
            return
        if self._labels is not None:
            kept = holdout(self._labels, config.test_fraction, split)
            self._index, self._labels = shards.take(kept.numpy()), self._labels[kept]
        elif split == "test":
            raise NoLabelsError(
                f"data.path: {config.path} has no test shards and no labels to hold out a fraction by; "
                "set data.test_path"
            )

    def __len__(self) -> int:
        return len(self._index.starts)

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, H, W). Raises DecodeError."""
        return decode_rgb(self.encoded(index), name=self.describe(index))

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,); None unless every image has one."""
        return self._labels

    def describe(self, index: int) -> str:
        """Member and shard, such as ``0001.jpg in train-0000.tar``."""
        return f"{self._index.name(index)} in {self._index.file(index)}"

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`. Raises DecodeError if the shard has become shorter or cannot be read."""
        size = int(self._index.sizes[index])
        try:
            # opened for each image: a source must be picklable, and workers must not share a file position
            with self._index.file(index).open("rb") as shard:
                shard.seek(int(self._index.starts[index]))
                content = shard.read(size)
        except OSError as error:
            raise DecodeError(f"{self.describe(index)}: cannot be read ({error.strerror})") from error
        if len(content) < size:
            raise DecodeError(f"{self.describe(index)}: the shard ends within it")
        return content


class _Index(NamedTuple):
    """Positions of N images in the shards."""

    # arrays rather than lists, whose reference counts make forked workers copy their memory
    files: tuple[Path, ...]
    shards: npt.NDArray[np.int32]
    """Index of the shard in `files`, (N,)."""
    starts: npt.NDArray[np.int64]
    """Offset of the first byte in the shard, (N,)."""
    sizes: npt.NDArray[np.int64]
    """Number of bytes, (N,)."""
    names: npt.NDArray[np.bytes_]
    """Names of the members, (N,)."""
    labels: npt.NDArray[np.str_] | None
    """Classes as text, (N,); None unless every image has one."""

    def file(self, index: int) -> Path:
        return self.files[int(self.shards[index])]

    def name(self, index: int) -> str:
        return bytes(self.names[index]).decode("utf-8", "replace")

    def take(self, kept: npt.NDArray[np.int64]) -> _Index:
        """The index of only the images `kept`, in that order."""
        labels = None if self.labels is None else self.labels[kept]
        return _Index(
            self.files, self.shards[kept], self.starts[kept], self.sizes[kept], self.names[kept], labels
        )  # fmt: skip


class _Member(NamedTuple):
    """One image in a shard."""

    shard: int
    start: int
    size: int
    name: str
    label: str | None


def _read_index(files: list[Path]) -> _Index:
    members = [member for number, file in enumerate(files) for member in _members(number, file)]
    if not members:
        raise DataError(f"data.path: no images in {len(files)} shards, the first of them {files[0]}")
    labels = [member.label for member in members]
    return _Index(
        tuple(files),
        np.array([member.shard for member in members], dtype=np.int32),
        np.array([member.start for member in members], dtype=np.int64),
        np.array([member.size for member in members], dtype=np.int64),
        np.array([os.fsencode(member.name) for member in members]),
        None if None in labels else np.array(labels, dtype=np.str_),
    )


def _members(number: int, file: Path) -> Iterator[_Member]:
    """The images of one shard with their labels, in the order of the shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as shard:  # "r:" refuses compressed files, which have no usable offsets
            for member in shard:
                if not member.isreg():
                    continue
                folder, name = os.path.split(member.name)
                key = f"{folder}/{name.partition('.')[0]}"
                ending = os.path.splitext(name)[1].lower()
                if ending in EXTENSIONS:
                    # a sample may have several images, such as 0001.left.jpg and 0001.right.jpg
                    images[f"{key}\0{name}"] = member
                elif ending in (".cls", ".json"):
                    content = shard.extractfile(member)
                    label = _label(ending, content.read() if content is not None else b"")
                    if label is not None:
                        labels[key] = label
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"data.path: {file} is not an uncompressed tar file ({error}); decompress it or give another file"
        ) from error
    except OSError as error:
        raise DataError(f"data.path: {file} cannot be read ({error.strerror or error})") from error
    # after the loop, since a label may follow its image
    for key, member in images.items():
        yield _Member(number, member.offset_data, member.size, member.name, labels.get(key.partition("\0")[0]))


def _label(ending: str, content: bytes) -> str | None:
    """The class in a ``.cls`` or ``.json`` member; None if there is none."""
    text = content.decode("utf-8", "replace").strip()
    if ending == ".cls":
        return text or None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    label = found.get("label") if isinstance(found, dict) else None
    return str(label) if isinstance(label, (str, int)) else None


def _numbered(known: npt.NDArray[np.str_], labels: npt.NDArray[np.str_]) -> tuple[list[str], torch.Tensor]:
    """Class names, and the label of each image."""
    # numbers in numeric order: 10 comes after 9, not after 1
    found = {str(name) for name in known}
    names = sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = next((str(name) for name in labels if str(name) not in numbers), None)
    if unknown is not None:
        raise DataError(f"data.test_path: test class {unknown!r} is not among the {len(names)} training classes")
    return names, torch.tensor([numbers[str(name)] for name in labels], dtype=torch.int64)
