"""Files that are complete or as they were: written beside their place, flushed to disk, and moved there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from unlabeled.ssl.core.errors import CheckpointError, first_line


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file `path` by one of `text` in one move."""
    replace_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces the file `path` by what `write` puts into the file it is given: a reader sees the old or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Sends what was written to a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns a failing disk into one line that names what was being written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{what} could not be written ({first_line(error)}); make room or choose another out="
        ) from None
