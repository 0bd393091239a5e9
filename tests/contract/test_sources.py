"""What every source must keep to. A new source is tested here by what makes it some data; the rules are the kit's."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unlabeled.ssl.data.registry import SOURCES
from unlabeled.testing import (
    SOURCE_CHECKS,
    SourceCase,
    SourceCheck,
    compare_with_another,
    read_in_another_process,
    run_check,
)

COUNT = 12
CLASSES = ("cat", "dog")


def noise(seed: int, height: int = 12, width: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    noise(seed).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def folder(root: Path) -> dict[str, Any]:
    for index in range(COUNT):
        file = root / CLASSES[index % 2] / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(index))
    return {"path": root, "labels": True}


def parquet(root: Path) -> dict[str, Any]:
    table = pytest.importorskip("pyarrow")
    for split, seeds in (("train", range(8)), ("test", range(8, 12))):
        columns = {"image": [png(seed) for seed in seeds], "label": [seed % 2 for seed in seeds]}
        pytest.importorskip("pyarrow.parquet").write_table(table.table(columns), root / f"{split}.parquet")
    return {"path": root}


def hf(root: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [png(seed) for seed in range(COUNT)], "label": [CLASSES[seed % 2] for seed in range(COUNT)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(root / "saved"))
    return {"path": root / "saved"}


def tar(root: Path) -> dict[str, Any]:
    with tarfile.open(root / "a.tar", "w") as shard:
        for index in range(COUNT):
            for ending, content in (("png", png(index)), ("cls", CLASSES[index % 2].encode())):
                member = tarfile.TarInfo(f"{index:04d}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return {"path": root}


def torchvision(root: Path) -> dict[str, Any]:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, size in (("train", 8), ("t10k", 4)):
        images = np.random.default_rng(size).integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = np.arange(size, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, size, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, size) + labels.tobytes())
    return {"path": root, "dataset": "MNIST"}


def voc(root: Path) -> dict[str, Any]:
    for name in ("JPEGImages", "SegmentationClass", "Annotations"):
        (root / name).mkdir()
    for index in range(COUNT):
        noise(index).save(root / "JPEGImages" / f"{index}.jpg")
        mask = np.zeros((12, 16), np.uint8)
        mask[2:6, 3:9] = 8 if index % 2 else 12
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{index}.png")
        box = "<xmin>4</xmin><ymin>3</ymin><xmax>9</xmax><ymax>6</ymax>"
        one = f"<object><name>{'cat' if index % 2 else 'dog'}</name><bndbox>{box}</bndbox></object>"
        (root / "Annotations" / f"{index}.xml").write_text(f"<annotation>{one}</annotation>")
    return {"path": root}


DATA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": folder,
    "parquet": parquet,
    "hf": hf,
    "tar": tar,
    "torchvision": torchvision,
    "digits": lambda root: {},
    "shapes": lambda root: {"count": 32},
    "voc": voc,
}
"""Source → what writes it a little data and gives the settings that read it."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceCase]:
    return {name: SourceCase.of(name, write(tmp_path_factory.mktemp(name))) for name, write in DATA.items()}


def test_every_source_is_tried() -> None:
    assert set(DATA) == set(SOURCES)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("check", SOURCE_CHECKS, ids=[check.__name__ for check in SOURCE_CHECKS])
def test_contract(check: SourceCheck, name: str, cases: dict[str, SourceCase]) -> None:
    run_check(check, cases[name])


def test_another_process_reads_the_same(cases: dict[str, SourceCase]) -> None:
    found = read_in_another_process(list(cases.values()))
    for case, one in zip(cases.values(), found, strict=True):
        compare_with_another(case, one)
