"""Atomic file writes: written under a temporary name, flushed to disk, then renamed over the old file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from unlabeled.ssl.core.errors import CheckpointError, first_line


def write_atomically(path: Path, text: str) -> None:
    """Replaces the content of the file `path` with `text`, in UTF-8; a crash leaves the old file or the new one."""
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces the file `path` with what `write` writes to the temporary path that it receives.

    A reader sees either the old file or the new one, never a mixture.
    """
    # in the same folder, since a rename is atomic only within a file system; with the process id against collisions
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        flush(partial)  # before the rename: else a power failure can leave an empty file under the final name
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Forces the content of a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns an OSError inside the context into a CheckpointError that names `what` was being written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{what} could not be written ({first_line(error)}); make room or choose another out="
        ) from None
