"""Folders in the form of PASCAL VOC: splits, classes, labels, masks and boxes, whole and in part."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import DecodeError, MaskSource, annotated_boxes, limited
from unlabeled.ssl.data.sources.voc import VOC_CLASSES


def opened(root: Path, split="train", **settings):
    return open_source(DataConfig(name="voc", path=root, **settings), split)


def image(root: Path, stem: str, *, mask=None, objects=None) -> None:
    """An image of 12 x 8 pixels; `mask`: (8, 12) values; `objects`: (name, xmin, ymin, xmax, ymax) as VOC counts."""
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (9, 90, 200)).save(root / "JPEGImages" / f"{stem}.jpg")
    if mask is not None:
        image = Image.fromarray(np.asarray(mask, np.uint8))
        image.putpalette([value for value in range(256) for _ in range(3)])
        image.save(root / "SegmentationClass" / f"{stem}.png")
    if objects is not None:
        parts = "".join(
            f"<object><name>{name}</name><bndbox><xmax>{right}</xmax><xmin>{left}</xmin><ymin>{top}</ymin>"
            f"<ymax>{bottom}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
            for name, left, top, right, bottom in objects
        )
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{parts}</annotation>")


def lists(root: Path, folder="Segmentation", **splits) -> None:
    (root / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    for name, stems in splits.items():
        (root / "ImageSets" / folder / f"{name}.txt").write_text("".join(f"{stem} 1\n" for stem in stems))


def filled(value: int, *, edge: int = 255):
    mask = np.zeros((8, 12), np.uint8)
    mask[2:6, 3:9] = edge
    mask[3:5, 4:8] = value
    return mask


def whole(root: Path) -> Path:
    image(root, "a", mask=filled(15), objects=[("person", 4, 3, 9, 6), ("dog", 1, 1, 3, 2)])
    image(root, "b", mask=filled(12), objects=[("dog", 1, 1, 12, 8)])
    image(root, "c", mask=filled(8), objects=[("cat", 2, 2, 3, 3), ("cat", 5, 5, 6, 6), ("bus", 1, 1, 2, 3)])
    image(root, "d", objects=[("sheep", 1, 1, 2, 2)])
    lists(root, train=["c", "a"], val=["b"])
    lists(root, "Main", train=["a", "b", "c"], val=["d"])
    return root


def test_splits_labels_and_images_follow_the_lists(tmp_path):
    train, test = opened(whole(tmp_path)), opened(tmp_path, "test")
    assert [Path(train.describe(index)).stem for index in range(len(train))] == ["c", "a"]
    assert [Path(test.describe(index)).stem for index in range(len(test))] == ["b"]
    assert tuple(train.classes) == VOC_CLASSES
    assert [train.classes[label] for label in train.labels().tolist()] == ["cat", "person"]  # by area
    assert test.labels().tolist() == [VOC_CLASSES.index("dog")]
    assert train.read(0).shape == (3, 8, 12)
    assert len(opened(tmp_path, dataset="Main")) == 3
    assert pickle.loads(pickle.dumps(train)).labels().tolist() == train.labels().tolist()


def test_masks_keep_their_values_and_boxes_count_from_the_corner(tmp_path):
    train = opened(whole(tmp_path))
    assert isinstance(train, MaskSource)
    np.testing.assert_array_equal(train.mask(1), filled(15))
    assert train.mask(1).dtype == torch.uint8
    assert train.boxes(1).tolist() == [[3, 2, 9, 6], [0, 0, 3, 2]]
    part = limited(train, 1)
    index = int(part.indices[0])
    assert annotated_boxes(part, 0).tolist() == train.boxes(index).tolist()
    assert torch.equal(part.mask(0), train.mask(index))


def test_a_image_without_a_mask_is_unknown_everywhere(tmp_path):
    held = opened(whole(tmp_path), "test", dataset="Main")
    assert held.mask(0).shape == (8, 12)
    assert (held.mask(0) == 255).all()


def test_without_lists_a_part_is_held_out_by_name(tmp_path):
    for index in range(20):
        image(tmp_path, f"{index:03}", mask=filled(1 + index % 2))
    train, test = (opened(tmp_path, split, test_fraction=0.25) for split in ("train", "test"))
    names = [{source.describe(index) for index in range(len(source))} for source in (train, test)]
    assert (len(train), len(test)) == (15, 5)
    assert not names[0] & names[1]
    image(tmp_path, "new", mask=filled(1))
    again = opened(tmp_path, "test", test_fraction=0.25)
    assert len({again.describe(index) for index in range(len(again))} & names[1]) >= 4


def test_without_annotations_labels_are_those_of_the_masks(tmp_path):
    image(tmp_path, "a", mask=filled(2))
    image(tmp_path, "b", mask=filled(1))
    (tmp_path / "Annotations").rmdir()
    (tmp_path / "classes.txt").write_text("scratch\ndent\n")
    lists(tmp_path, train=["a", "b"], val=["a"])
    source = opened(tmp_path)
    assert source.classes == ["scratch", "dent"]
    assert source.labels().tolist() == [1, 0]
    assert source.boxes(0) is None


def test_images_without_objects_are_a_class_of_their_own(tmp_path):
    image(tmp_path, "a", mask=filled(255), objects=[])
    image(tmp_path, "b", objects=[("zebra", 1, 1, 4, 4)])
    image(tmp_path, "c", objects=[("ant", 1, 1, 4, 4)])
    lists(tmp_path, train=["b", "c"], val=["a"])
    train, test = opened(tmp_path), opened(tmp_path, "test")
    assert train.classes == test.classes == ["ant", "zebra", "no object"]
    assert (train.labels().tolist(), test.labels().tolist()) == ([1, 0], [2])
    assert test.boxes(0).shape == (0, 4)


def test_images_alone_can_be_pretrained_on(tmp_path):
    image(tmp_path, "a")
    image(tmp_path, "b")
    (tmp_path / "Annotations").rmdir()
    (tmp_path / "SegmentationClass").rmdir()
    lists(tmp_path, "Main", train=["a", "b"])
    with pytest.raises(DataError, match=r"val\.txt cannot be read"):
        opened(tmp_path)
    lists(tmp_path, "Main", val=["b"])
    source = opened(tmp_path)
    assert (len(source), source.labels(), source.classes) == (2, None, None)
    with pytest.raises(DataError, match="has no masks; put them into SegmentationClass"):
        source.mask(0)


def test_what_does_not_fit_is_said_in_one_line(tmp_path):
    image(tmp_path / "kit" / "VOC2012", "a")
    with pytest.raises(DataError, match=r"has no folder JPEGImages; give data\.path=.*VOC2012"):
        opened(tmp_path)
    root = whole(tmp_path / "good")
    with pytest.raises(ConfigError, match=r"^data\.test_path: .* has no effect with data=voc, .*; remove it$"):
        opened(root, test_path=tmp_path)
    with pytest.raises(DataError, match=r"data\.dataset: .* has no folder Layout"):
        opened(root, dataset="Layout")
    lists(root, train=["a", "missing"])
    with pytest.raises(DataError, match="1 names that JPEGImages lacks, such as missing"):
        opened(root)
    lists(root, train=[])
    with pytest.raises(DataError, match="has no names"):
        opened(root)
    lists(root, train=["a"])
    (root / "Annotations" / "b.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"b\.xml is not an annotation of VOC"):
        opened(root)
    (root / "Annotations" / "b.xml").write_text("<annotation/>")
    (root / "classes.txt").write_text("person\n")
    with pytest.raises(DataError, match=r"class 'dog' of a\.xml is not in classes\.txt"):
        opened(root)
    (root / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(DataError, match="has 2 names; give 1 to 254 different ones"):
        opened(root)


def test_masks_that_are_not_class_numbers(tmp_path):
    root = whole(tmp_path)
    source = opened(root)
    image(root, "a", mask=filled(21))
    with pytest.raises(DataError, match=r"a\.png .* has value 21, and there are 20 classes; write classes\.txt"):
        source.mask(1)
    Image.new("RGB", (12, 8)).save(root / "SegmentationClass" / "a.png")
    with pytest.raises(DataError, match="is of mode RGB; save class numbers"):
        source.mask(1)
    (root / "SegmentationClass" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DecodeError, match=r"a\.png: cannot be decoded"):
        source.mask(1)
