"""Digits, shapes and torchvision's data sets."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.source import SOURCES, ImageSource, MaskSource, open_source

CONFIGS = Path(__file__).parents[4] / "configs" / "data"


def shapes(split: str = "train", **settings: object) -> MaskSource:
    source = open_source(DataConfig(name="shapes", **settings), split)
    assert isinstance(source, MaskSource)
    return source


def labels_of(source: ImageSource) -> torch.Tensor:
    labels = source.labels()
    assert labels is not None
    return labels


def test_digits_are_the_ones_of_scikit_learn() -> None:
    train, test = (open_source(DataConfig(name="digits"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1346, 451)
    assert train.classes == [str(digit) for digit in range(10)]
    for source, share in ((train, 0.75), (test, 0.25)):
        assert source.read(0).shape == (3, 8, 8)
        counts = labels_of(source).bincount(minlength=10)
        assert (counts - share * np.bincount(load_digits().target)).abs().max() <= 0.5
    stored = {(row.astype(int).tobytes(), label) for row, label in zip(*load_digits(return_X_y=True), strict=True)}
    for index in range(0, 450, 7):
        grey = (test.read(index)[0].float() * 16 / 255).round().long()
        assert (grey.numpy().tobytes(), int(labels_of(test)[index])) in stored
    assert test.read(3).max() == 255
    assert test.describe(3) == "test digit 3"
    assert torch.equal(pickle.loads(pickle.dumps(test)).read(3), test.read(3))


def test_shapes_are_the_same_every_time_and_differ_between_splits() -> None:
    train, again, test = shapes(), pickle.loads(pickle.dumps(shapes())), shapes("test")
    assert (len(train), len(test)) == (2048, 512)
    picture = train.read(11)
    assert picture.shape == (3, 64, 64)
    assert picture.dtype == torch.uint8
    assert torch.equal(picture, again.read(11))
    assert not torch.equal(picture, test.read(11))
    assert not torch.equal(picture, train.read(19))


def test_shapes_are_balanced() -> None:
    assert labels_of(shapes(count=400)).bincount().tolist() == [50] * 8
    assert len(shapes("test", count=400)) == 100
    assert len(shapes("test", count=1)) == 1


def test_masks_show_one_object_of_the_label() -> None:
    source = shapes(count=64)
    for index in range(64):
        mask = source.mask(index)
        assert mask.shape == (64, 64)
        assert mask.dtype == torch.uint8
        assert mask.unique().tolist() == [0, int(labels_of(source)[index]) + 1]
        assert 0.02 < (mask > 0).float().mean() < 0.4
        # whole objects: none touches the border
        assert not mask[0].any()
        assert not mask[-1].any()
        assert not mask[:, 0].any()
        assert not mask[:, -1].any()


def test_masks_lie_where_the_object_is() -> None:
    source = shapes(count=64)
    contrast = []
    for index in range(64):
        picture, inside = source.read(index).float(), source.mask(index) > 0
        contrast.append((picture[:, inside].mean(1) - picture[:, ~inside].mean(1)).abs().mean())
    assert min(contrast) > 20


def moments(mask: torch.Tensor) -> torch.Tensor:
    """Shape descriptors that do not change with place, size and rotation: the histogram of distances to the centre."""
    ys, xs = mask.nonzero().float().T
    distance = torch.hypot(ys - ys.mean(), xs - xs.mean())
    histogram = torch.histc(distance / distance.square().mean().sqrt(), bins=12, min=0, max=2)
    return histogram / histogram.sum()


def neighbours(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor) -> float:
    nearest = torch.cdist(test, train).topk(5, largest=False).indices
    votes = torch.nn.functional.one_hot(labels[nearest], 8).sum(1)
    return float((votes.argmax(1) == truth).float().mean())


def test_shape_tells_the_class_and_pixels_and_colours_do_not() -> None:
    train, test = shapes(count=800), shapes("test", count=800)
    pictures = [torch.stack([source.read(i) for i in range(len(source))]).float() / 255 for source in (train, test)]
    outlines = [torch.stack([moments(source.mask(i)) for i in range(len(source))]) for source in (train, test)]
    truth, labels = labels_of(test), labels_of(train)
    assert neighbours(outlines[0], labels, outlines[1], truth) > 0.9
    assert neighbours(pictures[0].flatten(1), labels, pictures[1].flatten(1), truth) < 0.3
    colours = [torch.cat([batch.mean((2, 3)), batch.std((2, 3))], 1) for batch in pictures]
    assert neighbours(colours[0], labels, colours[1], truth) < 0.3


def upright(source: MaskSource, label: int) -> torch.Tensor:
    """Mean of a class's masks, each shifted to its centre: (64, 64)."""
    centred = []
    for index in range(label, len(source), 8):
        inside = (source.mask(index) > 0).float()
        ys, xs = inside.nonzero().float().T
        centred.append(torch.roll(inside, (32 - int(ys.mean()), 32 - int(xs.mean())), (0, 1)))
    return torch.stack(centred).mean(0)


def test_every_shape_has_an_up_direction_and_no_shape_is_another_one_rotated() -> None:
    source = shapes(count=320)
    means = [upright(source, label) for label in range(8)]
    for mean in means:
        turned = [torch.rot90(mean, turns) for turns in (1, 2, 3)]
        assert min(float((mean - turn).abs().sum() / mean.sum()) for turn in turned) > 0.15


def test_light_does_not_tell_what_is_up() -> None:
    source = shapes(count=400)
    rows = torch.stack([source.read(index).float().mean((0, 2)) for index in range(400)])
    difference = rows[:, :16].mean(1) - rows[:, -16:].mean(1)
    assert difference.mean().abs() < 3 * difference.std() / 20


def test_a_limited_source_keeps_its_masks() -> None:
    whole, part = shapes(count=40), shapes(count=40, limit=7)
    assert len(part) == 7
    for index in range(7):
        number = int(part.describe(index).split()[2])
        assert torch.equal(part.mask(index), whole.mask(number))
        assert torch.equal(part.read(index), whole.read(number))
        assert labels_of(part)[index] == labels_of(whole)[number]
    assert not isinstance(open_source(DataConfig(name="digits", limit=7)), MaskSource)


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
    assert train.describe(4) == "picture 4 of MNIST"
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
    with pytest.raises(DataError, match=r"^picture 0 of Food101: cannot be decoded \(cannot identify image file"):
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
    with pytest.raises(ConfigError, match=r"^data\.dataset: not given; set data\.dataset=CIFAR10"):
        open_source(DataConfig(name="torchvision", path=tmp_path))
    with pytest.raises(DataError, match=r"^data\.path: .* does not exist"):
        torchvision_source(tmp_path / "nowhere", "CIFAR10")


def test_each_source_has_a_configuration() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(SOURCES)
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# ")
        values = dict(line.split(": ") for line in text.splitlines() if not line.startswith("#"))
        assert DataConfig.model_validate(values).name == path.stem
