"""Images that cannot be decoded: listed in the run folder, counted, and at some point too many."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from unlabeled.ssl.core.errors import DataError


@dataclass(frozen=True)
class BadImage:
    """One image that could not be decoded."""

    index: int
    """Its place in the source."""
    name: str
    """What the source calls it."""
    reason: str


class BadImages:
    """The distinct broken images of a run, one JSON line each in the file `path`.

    A file that is there already, of a run that is resumed, is read and continued. Only one process may write it: in a
    distributed run the others send theirs to the main one.
    """

    def __init__(self, path: Path, total: int, max_fraction: float, *, write: bool = True) -> None:
        """`write`: whether this process keeps the file; the others only count."""
        self.path = path
        self.write = write
        self.total = total
        self.max_fraction = max_fraction
        self._known = _indices(path) if path.exists() else set()

    @property
    def count(self) -> int:
        """Distinct broken images so far."""
        return len(self._known)

    def add(self, bad: Iterable[BadImage]) -> int:
        """Notes `bad`; returns how many of them were not known yet."""
        new = {image.index: image for image in bad if image.index not in self._known}
        self._known.update(new)
        if new and self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(image)) + "\n" for image in new.values()))
        return len(new)

    def check(self) -> None:
        """Raises DataError when more than `max_fraction` of the data is broken."""
        if self.count > self.max_fraction * self.total:
            raise DataError(
                f"data: {self.count} of {self.total} images ({self.count / self.total:.1%}) cannot be decoded, more "
                f"than data.max_bad_fraction={self.max_fraction}; look at {self.path}, then mend them or raise it"
            )


def _indices(path: Path) -> set[int]:
    """Indices in the complete lines of `path`; a last line that a kill cut short is taken off."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return {json.loads(line)["index"] for line in complete.splitlines()}
