"""Images that cannot be decoded: lists them in the run folder and stops the run if there are too many."""

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
    """Its index in the source."""
    name: str
    """Its name, as the source describes it."""
    reason: str
    """Why it cannot be decoded."""


class BadImages:
    """The distinct broken images of a run, one JSON line each in the file `path`.

    If the file exists, because the run was resumed, new images are appended to it.
    """

    def __init__(self, path: Path, total: int, max_fraction: float, *, write: bool = True) -> None:
        """`total` images in the data, of which `max_fraction` may be broken. `write`: whether to write the file."""
        # only the main process writes; the other ranks send their images to it and count along
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
        """Records the images in `bad`; returns how many of them were not known yet."""
        # an image comes up again in every epoch
        new = {image.index: image for image in bad if image.index not in self._known}
        self._known.update(new)
        if new and self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(image)) + "\n" for image in new.values()))
        return len(new)

    def check(self) -> None:
        """Raises DataError if more than `max_fraction` of the data is broken."""
        if self.count > self.max_fraction * self.total:
            raise DataError(
                f"data: {self.count} of {self.total} images ({self.count / self.total:.1%}) cannot be decoded, more "
                f"than data.max_bad_fraction={self.max_fraction}; see {self.path}, then repair them or raise it"
            )


def _indices(path: Path) -> set[int]:
    """Indices in the lines of `path`. Removes an incomplete last line from the file."""
    # a kill during a write leaves one, and the next line would be appended to it
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return {json.loads(line)["index"] for line in complete.splitlines()}
