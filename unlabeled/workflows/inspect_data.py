"""A scan of a data source before anyone spends a GPU hour on it: what is there, what is broken, what is odd."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch.utils.data import Dataset

from unlabeled.ssl.config.schema import DoctorRun
from unlabeled.ssl.data.bad import BadImage
from unlabeled.ssl.data.decode import decode_rgb, read_bytes, read_header
from unlabeled.ssl.data.loader import RunLoader, start_worker
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import DecodeError, ImageSource, encoded, limited
from unlabeled.workflows.settings import compose_settings

SMALL = 32
"""Pixels of a side under which an image is reported as small."""
EXTREME_ASPECT = 4.0
IMBALANCE = 10.0
"""Largest over smallest class from which classes are reported as unbalanced."""
_SHOWN = 10


@dataclass(frozen=True)
class Scanned:
    """What one image turned out to be."""

    index: int
    size: tuple[int, int] | None
    """(height, width) as the views see it; None when it cannot be decoded."""
    format: str
    mode: str
    digest: bytes
    """Of the exact bytes of the file, or of the pixels where there is no file."""
    seconds: float
    """Time to read and decode."""
    name: str = ""
    """Of a broken image."""
    reason: str = ""


@dataclass
class DoctorReport:
    """Result of `examine`. Counts are of images; sizes are (height, width) in pixels."""

    count: int
    """Images scanned."""
    total: int
    """Images of the training split."""
    bad: list[BadImage]
    heights: tuple[int, float, int] | None
    """Smallest, median, largest; None when nothing can be decoded."""
    widths: tuple[int, float, int] | None
    sizes: list[tuple[tuple[int, int], int]]
    """The most frequent sizes and how often each is met."""
    formats: dict[str, int]
    modes: dict[str, int]
    """Channels as stored, by Pillow's names."""
    small: int
    extreme: int
    """Images more than `EXTREME_ASPECT` times as long as wide, or as wide as long."""
    duplicates: list[tuple[str, str]]
    """(image, the earlier image whose bytes it repeats)."""
    images_per_second: float
    """Read and decoded by one process."""
    classes: dict[str, int] | None = None
    """Images per class of the training split, or None without labels."""
    warnings: list[str] = field(default_factory=list)
    """What a person should look at, a line each."""


def doctor_config(overrides: Sequence[str]) -> DoctorRun:
    """The validated settings of ``unlabeled doctor``."""
    return compose_settings("doctor", overrides, DoctorRun)


def examine(run: DoctorRun) -> DoctorReport:
    """Reads and decodes the training split that `run.data` names, or `run.limit` images of it.

    Raises ConfigError and DataError as `open_source` does; broken images are reported, not raised.
    """
    whole = open_source(run.data, "train")
    source = limited(whole, run.limit)
    scanned = list(_scan(source, run.workers))
    report = _summary(source, scanned, total=len(whole))
    labels = whole.labels()
    if labels is not None and whole.classes is not None:
        counts = torch.bincount(labels, minlength=len(whole.classes)).tolist()
        report.classes = dict(zip(whole.classes, counts, strict=True))
    report.warnings = list(_warnings(report, run.data.max_bad_fraction))
    return report


class _Scan(Dataset[Scanned]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Scanned:
        begin = time.perf_counter()
        format_, mode, digest = "array", "RGB", b""
        try:
            content = encoded(self.source, index)
            if content is None:
                image = self.source.read(index)
                digest = _digest(image.numpy().tobytes())
            else:
                name = self.source.describe(index)
                content = read_bytes(content, name) if isinstance(content, Path) else content
                digest = _digest(content)
                format_, mode = read_header(content, name)
                image = decode_rgb(content, name)
        except DecodeError as error:
            name = self.source.describe(index)
            reason = str(error).removeprefix(f"{name}: ")
            return Scanned(index, None, format_, mode, digest, 0.0, name, reason)
        height, width = image.shape[1:]
        return Scanned(index, (height, width), format_, mode, digest, time.perf_counter() - begin)


def _scan(source: ImageSource, workers: int) -> Iterator[Scanned]:
    loader = RunLoader(
        _Scan(source),
        batch_size=32,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    for batch in loader:
        yield from batch


def _as_list(batch: list[Scanned]) -> list[Scanned]:
    return batch


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _summary(source: ImageSource, scanned: Sequence[Scanned], total: int) -> DoctorReport:
    good = [item for item in scanned if item.size is not None]
    sizes = [item.size for item in good if item.size is not None]
    seconds = sum(item.seconds for item in good)
    return DoctorReport(
        count=len(scanned),
        total=total,
        bad=[BadImage(item.index, item.name, item.reason) for item in scanned if item.size is None],
        heights=_spread([height for height, _ in sizes]),
        widths=_spread([width for _, width in sizes]),
        sizes=Counter(sizes).most_common(3),
        formats=dict(Counter(item.format for item in good).most_common()),
        modes=dict(Counter(item.mode for item in good).most_common()),
        small=sum(min(size) < SMALL for size in sizes),
        extreme=sum(max(size) > EXTREME_ASPECT * min(size) for size in sizes),
        duplicates=_duplicates(source, good),
        images_per_second=len(good) / seconds if seconds else 0.0,
    )


def _spread(lengths: list[int]) -> tuple[int, float, int] | None:
    return (min(lengths), median(lengths), max(lengths)) if lengths else None


def _duplicates(source: ImageSource, good: Sequence[Scanned]) -> list[tuple[str, str]]:
    first: dict[bytes, int] = {}
    pairs = ((item.index, first.setdefault(item.digest, item.index)) for item in good)
    return [(source.describe(index), source.describe(earlier)) for index, earlier in pairs if index != earlier]


def _warnings(report: DoctorReport, max_bad_fraction: float) -> Iterator[str]:
    if report.bad:
        too_many = len(report.bad) > max_bad_fraction * report.count
        summary = f"a run stops above data.max_bad_fraction={max_bad_fraction}" if too_many else "a run replaces them"
        yield f"images that cannot be decoded: {len(report.bad)} of {report.count}; {summary}"
    if report.small:
        yield f"images with a side under {SMALL} pixels: {report.small}; views enlarge them"
    if report.extreme:
        yield f"images with one side over {EXTREME_ASPECT:g} times the other: {report.extreme}; crops lose much"
    if report.duplicates:
        yield f"images that repeat the bytes of another image: {len(report.duplicates)}; they count double"
    if report.classes:
        yield from _class_warnings(report.classes)


def _class_warnings(classes: dict[str, int]) -> Iterator[str]:
    empty = [name for name, count in classes.items() if not count]
    if empty:
        yield f"{len(empty)} of {len(classes)} classes have no images: {', '.join(empty[:5])}"
    filled = {name: count for name, count in classes.items() if count}
    most, least = max(filled, key=filled.__getitem__), min(filled, key=filled.__getitem__)
    if filled[most] > IMBALANCE * filled[least]:
        yield f"classes are unbalanced: {most} has {filled[most]} images, {least} has {filled[least]}"
    if len(filled) == 1:
        yield f"there is a single class, {most}; evaluation needs two"


def render(report: DoctorReport) -> RenderableType:
    """The report as tables for the terminal."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    scanned = f"{report.count}" if report.count == report.total else f"{report.count} of {report.total}"
    facts.add_row("images scanned", scanned)
    for title, spread in (("height", report.heights), ("width", report.widths)):
        if spread is not None:
            facts.add_row(title, f"{spread[0]} .. {spread[2]} pixels, median {spread[1]:g}")
    facts.add_row("frequent sizes", ", ".join(f"{h} x {w} ({count})" for (h, w), count in report.sizes))
    facts.add_row("formats", _counts(report.formats))
    facts.add_row("channels", _counts(report.modes))
    facts.add_row("decoding", f"{report.images_per_second:,.0f} pictures/s per process")
    facts.add_row("cannot be decoded", str(len(report.bad)))
    facts.add_row("repeated", str(len(report.duplicates)))
    if report.classes is not None:
        facts.add_row("classes", f"{len(report.classes)}: {escape(_counts(report.classes, limit=_SHOWN))}")
    parts: list[RenderableType] = [facts]
    if report.bad:
        parts += [Text(), _bad_table(report.bad)]
    parts += [Text(f"warning: {line}", style="yellow") for line in report.warnings]
    if not report.warnings:
        parts.append(Text("nothing to worry about", style="green"))
    return Group(*parts)


def _counts(counts: dict[str, int], limit: int = 8) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (", ..." if len(counts) > limit else "")


def _bad_table(bad: list[BadImage]) -> Table:
    table = Table(title=f"cannot be decoded (first {_SHOWN} of {len(bad)})" if len(bad) > _SHOWN else None)
    table.add_column("image", overflow="fold")
    table.add_column("why")
    for image in bad[:_SHOWN]:
        table.add_row(escape(image.name), escape(image.reason))
    return table
