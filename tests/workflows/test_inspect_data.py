"""The doctor on a folder of everything, and what it warns of."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from unlabeled.ssl.config.schema import DataConfig, DoctorRun
from unlabeled.ssl.core.errors import DataError
from unlabeled.workflows.inspect_data import DoctorReport, examine, render


def save(path: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    for index in range(24):
        save(tmp_path / "many" / f"{index:02}.png", (48, 40), seed=index)
    save(tmp_path / "few" / "gray.jpg", (64, 64), mode="L")
    save(tmp_path / "few" / "wide.png", (300, 40), mode="RGBA")
    save(tmp_path / "other" / "tiny.bmp", (16, 20))
    save(tmp_path / "other" / "print.jpg", (50, 60), mode="CMYK")
    shutil.copy(tmp_path / "many" / "03.png", tmp_path / "other" / "again.png")
    (tmp_path / "other" / "empty.jpg").write_bytes(b"")
    (tmp_path / "other" / "[red]torn.jpg").write_bytes((tmp_path / "few" / "gray.jpg").read_bytes()[:900])
    return tmp_path


def shown(report: DoctorReport) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixed_folder(mixed_folder: Path, workers: int) -> None:
    data = DataConfig(name="folder", path=mixed_folder)
    report = examine(DoctorRun(data=data, workers=workers))
    assert (report.count, report.total) == (31, 31)
    assert report.formats == {"PNG": 26, "JPEG": 2, "BMP": 1}
    assert report.modes == {"RGB": 26, "L": 1, "RGBA": 1, "CMYK": 1}
    assert report.heights == (20, 40, 64)
    assert report.widths == (16, 48, 300)
    assert report.sizes[0] == ((40, 48), 25)
    assert (report.small, report.extreme) == (1, 1)
    names = [Path(image.name).name for image in report.bad]
    assert names == ["[red]torn.jpg", "empty.jpg"]
    assert report.bad[1].reason == "is empty (0 bytes)"
    pairs = [tuple(str(Path(name).relative_to(mixed_folder)) for name in pair) for pair in report.duplicates]
    assert pairs == [("other/again.png", "many/03.png")]
    assert report.images_per_second > 0
    assert report.classes is None
    assert [warning.split(";")[0] for warning in report.warnings] == [
        "images that cannot be decoded: 2 of 31",
        "images with a side under 32 pixels: 1",
        "images with one side over 4 times the other: 1",
        "exact duplicates of another image: 1",
    ]
    assert "a run stops above data.max_bad_fraction=0.05" in report.warnings[0]


def test_classes_and_their_balance(mixed_folder: Path) -> None:
    save(mixed_folder / "lone" / "1.png", (40, 40))
    (mixed_folder / "void").mkdir()
    data = DataConfig(name="folder", path=mixed_folder, labels=True, test_fraction=0.01)
    report = examine(DoctorRun(data=data, workers=0))
    assert report.classes == {"few": 1, "lone": 1, "many": 23, "other": 4, "void": 0}
    assert "1 of 5 classes have no images: void" in report.warnings
    assert report.held_out
    assert re.search(r"images scanned +29 \(training split\)", shown(report))
    assert "classes are unbalanced: many has 23 images, few has 1" in report.warnings


def test_a_limited_scan(mixed_folder: Path) -> None:
    data = DataConfig(name="folder", path=mixed_folder)
    report = examine(DoctorRun(data=data, limit=7, workers=0))
    assert (report.count, report.total) == (7, 31)
    assert not report.held_out
    assert "7 of 31" in shown(report)


def test_generated_images() -> None:
    report = examine(DoctorRun(data=DataConfig(name="shapes", count=16), workers=0))
    assert report.formats == {"array": 16}
    assert report.sizes == [((64, 64), 16)]
    assert report.classes is not None
    assert set(report.classes.values()) == {2}
    assert report.warnings == []
    assert "no problems found" in shown(report)


def test_a_single_class_and_all_broken(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / "only" / f"{index}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "only" / f"{index}.png").write_bytes(b"x%d" % index)
    report = examine(DoctorRun(data=DataConfig(name="folder", path=tmp_path, labels=True), workers=0))
    assert len(report.bad) == report.count == 4
    assert report.heights is None
    assert "there is only one class, only; evaluation needs at least two" in report.warnings
    assert "cannot be decoded" in shown(report)


def test_the_report_is_readable(mixed_folder: Path) -> None:
    text = shown(examine(DoctorRun(data=DataConfig(name="folder", path=mixed_folder), workers=0)))
    assert "20 .. 64 pixels, median 40" in text
    assert "PNG 26, JPEG 2, BMP 1" in text
    assert "40 x 48 (25)" in text
    assert "[red]torn.jpg" in text
    assert "warning: images that cannot be decoded: 2 of 31" in text


def test_data_that_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data: no images among 0 files in "):
        examine(DoctorRun(data=DataConfig(name="folder", path=tmp_path)))
