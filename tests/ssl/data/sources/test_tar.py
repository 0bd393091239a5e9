"""Tar shards: what is found, its labels and splits, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import DecodeError, ImageSource


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 6), shade).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def labeled(path: Path, labels: list[str], start: int = 0) -> Path:
    members: dict[str, bytes] = {}
    for row, label in enumerate(labels):
        members |= {f"{row:04}.png": png(start + row), f"{row:04}.cls": label.encode()}
    return shard(path, members)


def opened(path: Path, split: str = "train", **settings: Any) -> ImageSource:
    return open_source(DataConfig(name="tar", path=path, **settings), split)


def shades(source: ImageSource) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def test_shards_in_the_order_of_names_with_their_labels(tmp_path: Path) -> None:
    labeled(tmp_path / "train-1.tar", ["10", "2"], start=50)
    labeled(tmp_path / "train-0.tar", ["2", "10", "9"])
    labeled(tmp_path / "test-0.tar", ["9"], start=90)
    train, test = pickle.loads(pickle.dumps(opened(tmp_path))), opened(tmp_path, "test")
    assert train.classes == test.classes == ["2", "9", "10"]
    assert train.labels().tolist() == [0, 2, 1, 2, 0]
    assert test.labels().tolist() == [1]
    assert shades(train) == [0, 1, 2, 50, 51]
    assert shades(test) == [90]
    assert train.read(0).shape == (3, 6, 4)
    assert train.describe(4) == f"0001.png in {tmp_path / 'train-1.tar'}"


def test_samples_are_told_by_folder_and_name_up_to_the_first_dot(tmp_path: Path) -> None:
    members = {
        "a/1.left.png": png(1), "a/1.right.PNG": png(2), "a/1.json": json.dumps({"label": "cat"}).encode(),
        "b/1.png": png(3), "b/1.json": json.dumps({"label": "ant", "x": [1]}).encode(), "notes.txt": b"no image",
    }  # fmt: skip
    source = opened(shard(tmp_path / "all.tar", members), test_fraction=0.01)
    assert source.classes == ["ant", "cat"]
    assert sorted(shades(source)) in ([1, 3], [2, 3])  # one of the two cats is held out
    assert len(opened(tmp_path / "all.tar", "test", test_fraction=0.01)) == 1


def test_without_labels_everything_is_for_training(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.tar", {"1.png": png(1), "2.png": png(2), "2.cls": b"cat"})
    source = opened(file)
    assert source.labels() is None
    assert source.classes is None
    assert shades(source) == [1, 2]
    with pytest.raises(DataError, match=r"no test shards and no labels to hold a part out by; set data\.test_path"):
        opened(file, "test")


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tar files at"):
        opened(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"nothing like it" * 100)
    with pytest.raises(DataError, match=r"broken\.tar is no plain tar file"):
        opened(tmp_path)
    with pytest.raises(DataError, match="no images in 1 shards"):
        opened(shard(tmp_path / "empty.tar", {"a.txt": b"x"}))
    labeled(tmp_path / "s" / "train.tar", ["a", "b"])
    labeled(tmp_path / "s" / "test.tar", ["c"])
    with pytest.raises(DataError, match="test class 'c' is not among the 2 training classes"):
        opened(tmp_path / "s", "test")


def test_a_corrupt_image_and_a_shard_cut_short_are_decode_errors(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.tar", {"1.png": png(1), "2.png": b"no png", "3.png": png(3)})
    source = opened(file)
    with pytest.raises(DecodeError, match=r"2\.png in .*x\.tar: is not an image"):
        source.read(1)
    file.write_bytes(file.read_bytes()[:1600])
    assert int(source.read(0)[0, 0, 0]) == 1
    with pytest.raises(DecodeError, match="the shard ends within it"):
        source.read(2)
    file.unlink()
    with pytest.raises(DecodeError, match="cannot be read"):
        source.read(0)
