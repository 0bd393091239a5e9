from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource


def labels_of(source: ImageSource) -> torch.Tensor:
    labels = source.labels()
    assert labels is not None
    return labels


def write_mnist(root: Path, sizes: dict[str, int]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, size in sizes.items():
        images = np.full((size, 28, 28), 9, dtype=np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, size, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, size) + labels.tobytes())


def torchvision_source(root: Path, dataset: str, split: str = "train") -> ImageSource:
    return open_source(DataConfig(name="torchvision", dataset=dataset, path=root), split)


def test_torchvision_with_a_train_flag(tmp_path: Path) -> None:
    write_mnist(tmp_path, {"train": 30, "t10k": 10})
    train, test = (torchvision_source(tmp_path, "MNIST", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 10)
    assert labels_of(test).tolist() == list(range(10))
    assert train.classes is not None
    assert train.classes[3] == "3 - three"
    assert train.read(0).shape == (3, 28, 28)
    assert train.read(0).unique().tolist() == [9]
    assert train.describe(4) == "image 4 of MNIST"
    assert torch.equal(pickle.loads(pickle.dumps(train)).read(2), train.read(2))


def test_torchvision_with_a_split_name(tmp_path: Path) -> None:
    meta, images = tmp_path / "food-101" / "meta", tmp_path / "food-101" / "images"
    meta.mkdir(parents=True)
    for split, size in {"train": 3, "test": 2}.items():
        listed = {name: [f"{name}/{split}{index}" for index in range(size)] for name in ("pie", "soup")}
        (meta / f"{split}.json").write_text(json.dumps(listed))
        for name in (name for group in listed.values() for name in group):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 7)).save(images / f"{name}.jpg")
    test = torchvision_source(tmp_path, "Food101", "test")
    assert len(torchvision_source(tmp_path, "Food101")) == 6
    assert labels_of(test).tolist() == [0, 0, 1, 1]
    assert test.classes == ["pie", "soup"]
    assert test.read(0).shape == (3, 7, 9)
    (images / "pie" / "test0.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^image 0 of Food101: cannot be decoded \(cannot identify image file"):
        test.read(0)


def test_torchvision_without_splits_holds_some_out(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        for index in range(10):
            path = tmp_path / "eurosat" / "2750" / name / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (5, 5), (index, 0, 0)).save(path)
    train, test = (torchvision_source(tmp_path, "EuroSAT", split) for split in ("train", "test"))
    assert labels_of(train).bincount().tolist() == [8, 8]
    assert labels_of(test).bincount().tolist() == [2, 2]
    described = {source.describe(index) for source in (train, test) for index in range(len(source))}
    assert len(described) == 20


def test_torchvision_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.path: CIFAR10 is not complete in .*; download it there"):
        torchvision_source(tmp_path, "CIFAR10")
    with pytest.raises(ConfigError, match=r"^data\.dataset: 'CIFAR11' is not a class .* did you mean 'CIFAR10'"):
        torchvision_source(tmp_path, "CIFAR11")
    with pytest.raises(ConfigError, match=r"^data\.dataset: FakeData cannot be opened by its root alone"):
        torchvision_source(tmp_path, "FakeData")
    with pytest.raises(ConfigError, match=r"^data\.dataset: None is not possible; give a valid string"):
        open_source(DataConfig(name="torchvision", path=tmp_path, dataset=None))
    with pytest.raises(DataError, match=r"^data\.path: CIFAR10 is not complete in .*; download it there"):
        open_source(DataConfig(name="torchvision", path=tmp_path))
    with pytest.raises(DataError, match=r"^data\.path: .* does not exist"):
        torchvision_source(tmp_path / "nowhere", "CIFAR10")
