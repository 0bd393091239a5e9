"""``unlabeled doctor``: scans a data source for problems before you spend GPU hours on it."""

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

from unlabeled.ssl.config.schema import DataConfig, DoctorRun
from unlabeled.ssl.core.errors import UnlabeledError
from unlabeled.ssl.data.bad import BadImage
from unlabeled.ssl.data.decode import decode_rgb, read_bytes, read_header
from unlabeled.ssl.data.loader import RunLoader, start_worker
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import DecodeError, ImageSource, encoded, limited
from unlabeled.workflows.settings import compose_settings

SMALL = 32
"""Images with a side of fewer pixels are reported as small."""
EXTREME_ASPECT = 4.0
"""Images with a larger ratio of their sides are reported as extreme."""
IMBALANCE = 10.0
"""Classes are reported as unbalanced if the largest has more than this many times the images of the smallest."""
_SHOWN = 10
"""Broken images and classes listed in the terminal."""


@dataclass(frozen=True)
class Scanned:
    """What the scan found out about one image."""

    index: int
    size: tuple[int, int] | None
    """(height, width) after decoding, as views receive it; None if it cannot be decoded."""
    format: str
    mode: str
    digest: bytes
    """Hash of the encoded bytes, or of the pixels for sources that store arrays."""
    seconds: float
    """Time to read and decode the image."""
    name: str = ""
    """Name of a broken image."""
    reason: str = ""
    """Why it cannot be decoded."""


@dataclass
class DoctorReport:
    """Result of `examine`. Counts are numbers of images; sizes are (height, width) in pixels."""

    count: int
    """Images scanned."""
    total: int
    """Images in the training split."""
    bad: list[BadImage]
    """Images that cannot be decoded."""
    heights: tuple[int, float, int] | None
    """Smallest, median, largest; None if nothing can be decoded."""
    widths: tuple[int, float, int] | None
    sizes: list[tuple[tuple[int, int], int]]
    """The most frequent sizes and their counts."""
    formats: dict[str, int]
    modes: dict[str, int]
    """Stored channels, by the names that Pillow uses, such as RGB and L."""
    small: int
    """Images with a side under `SMALL` pixels."""
    extreme: int
    """Images with one side more than `EXTREME_ASPECT` times the other."""
    duplicates: list[tuple[str, str]]
    """(image, earlier image with the same bytes)."""
    images_per_second: float
    """Reading and decoding speed of one process."""
    classes: dict[str, int] | None = None
    """Class → images in the training split; None without labels."""
    held_out: bool = False
    """Whether labeled data also has a test split, which is not scanned."""
    warnings: list[str] = field(default_factory=list)
    """Problems to check, one line each."""


def doctor_config(overrides: Sequence[str]) -> DoctorRun:
    """Returns the validated settings of ``unlabeled doctor``. Raises ConfigError."""
    return compose_settings("doctor", overrides, DoctorRun)


def examine(run: DoctorRun) -> DoctorReport:
    """Reads and decodes the training split of `run.data`, or `run.limit` images of it.

    Raises ConfigError and DataError like `open_source`. Broken images are reported, not raised.
    """
    split = open_source(run.data, "train")
    source = limited(split, run.limit)
    scanned = list(_scan(source, run.workers))
    report = _summary(source, scanned, total=len(split))
    # labels are cheap, so classes are counted over the full split, whatever the limit
    labels = split.labels()
    if labels is not None and split.classes is not None:
        counts = torch.bincount(labels, minlength=len(split.classes)).tolist()
        report.classes = dict(zip(split.classes, counts, strict=True))
        report.held_out = _has_test_split(run.data)
    report.warnings = list(_warnings(report, run.data.max_bad_fraction))
    return report


def _has_test_split(data: DataConfig) -> bool:
    try:
        return len(open_source(data, "test")) > 0
    except UnlabeledError:
        return False


class _Scan(Dataset[Scanned]):
    """Scans the image at an index; as a dataset, so that a data loader's workers can share the work."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Scanned:
        begin = time.perf_counter()
        format_, mode, digest = "array", "RGB", b""
        try:
            content = encoded(self.source, index)
            if content is None:  # the source has arrays, not encoded files
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
        generator=torch.Generator(),  # else the loader draws a seed from the global generator
    )
    for batch in loader:
        yield from batch


# a function of the module, because workers have to pickle it
def _as_list(batch: list[Scanned]) -> list[Scanned]:
    return batch


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()  # 16 bytes: millions are kept in memory


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
    first: dict[bytes, int] = {}  # digest → index of the first image that has it
    pairs = ((item.index, first.setdefault(item.digest, item.index)) for item in good)
    return [(source.describe(index), source.describe(earlier)) for index, earlier in pairs if index != earlier]


def _warnings(report: DoctorReport, max_bad_fraction: float) -> Iterator[str]:
    if report.bad:
        too_many = len(report.bad) > max_bad_fraction * report.count
        replaced = "a run replaces them with other images"
        consequence = f"a run stops above data.max_bad_fraction={max_bad_fraction}" if too_many else replaced
        yield f"images that cannot be decoded: {len(report.bad)} of {report.count}; {consequence}"
    if report.small:
        yield f"images with a side under {SMALL} pixels: {report.small}; they are enlarged for training"
    if report.extreme:
        ratio = f"{EXTREME_ASPECT:g} times"
        yield f"images with one side over {ratio} the other: {report.extreme}; crops show only a small region of them"
    if report.duplicates:
        yield f"exact duplicates of another image: {len(report.duplicates)}; they are seen more often in training"
    if report.classes:
        yield from _class_warnings(report.classes)


def _class_warnings(classes: dict[str, int]) -> Iterator[str]:
    empty = [name for name, count in classes.items() if not count]
    if empty:
        yield f"{len(empty)} of {len(classes)} classes have no images: {', '.join(empty[:5])}"
    # the ratio is taken over classes that have images; empty ones are reported separately
    filled = {name: count for name, count in classes.items() if count}
    most, least = max(filled, key=filled.__getitem__), min(filled, key=filled.__getitem__)
    if filled[most] > IMBALANCE * filled[least]:
        yield f"classes are unbalanced: {most} has {filled[most]} images, {least} has {filled[least]}"
    if len(filled) == 1:
        yield f"there is only one class, {most}; evaluation needs at least two"


def render(report: DoctorReport) -> RenderableType:
    """Renders the report as tables for the terminal."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    scanned = f"{report.count}" if report.count == report.total else f"{report.count} of {report.total}"
    facts.add_row("images scanned", f"{scanned} (training split)" if report.held_out else scanned)
    for title, spread in (("height", report.heights), ("width", report.widths)):
        if spread is not None:
            facts.add_row(title, f"{spread[0]} .. {spread[2]} pixels, median {spread[1]:g}")
    facts.add_row("frequent sizes", ", ".join(f"{h} x {w} ({count})" for (h, w), count in report.sizes))
    facts.add_row("formats", _counts(report.formats))
    facts.add_row("channels", _counts(report.modes))
    facts.add_row("decoding", f"{report.images_per_second:,.0f} images/s per process")
    facts.add_row("cannot be decoded", str(len(report.bad)))
    facts.add_row("duplicates", str(len(report.duplicates)))
    if report.classes is not None:
        facts.add_row("classes", f"{len(report.classes)}: {escape(_counts(report.classes, limit=_SHOWN))}")
    blocks: list[RenderableType] = [facts]
    if report.bad:
        blocks += [Text(), _bad_table(report.bad)]
    blocks += [Text(f"warning: {line}", style="yellow") for line in report.warnings]
    if not report.warnings:
        blocks.append(Text("no problems found", style="green"))
    return Group(*blocks)


def _counts(counts: dict[str, int], limit: int = 8) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (", ..." if len(counts) > limit else "")


def _bad_table(bad: list[BadImage]) -> Table:
    table = Table(title=f"cannot be decoded (first {_SHOWN} of {len(bad)})" if len(bad) > _SHOWN else None)
    table.add_column("image", overflow="fold")
    table.add_column("reason")
    for image in bad[:_SHOWN]:
        table.add_row(escape(image.name), escape(image.reason))
    return table
