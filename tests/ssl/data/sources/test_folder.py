"""Folders of images: what is found, in which order, with which labels and splits, and what is refused."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource, Subset, limited
from unlabeled.ssl.data.sources.layout import holdout, split_named


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(path, "PNG")


def opened(path: Path, split: str = "train", **settings: object) -> ImageSource:
    return open_source(DataConfig(name="folder", path=path, **settings), split)


def names(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(source.describe(index), root) for index in range(len(source))]


def labeled(root: Path, sizes: dict[str, int], order: int = 1) -> Path:
    for name, size in list(sizes.items())[::order]:
        for index in range(size)[::order]:
            image(root / name / f"{index:03}.png", shade=index)
    return root


def test_any_nesting_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ["b/2.png", "b/10.PNG", "a/deep/er/x.Jpg", "z.jpeg", "ä.webp"]:
        image(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    image(tmp_path / ".hidden" / "x.png")
    image(tmp_path / "b" / "._2.png")
    source = opened(tmp_path)
    assert names(source, tmp_path) == ["a/deep/er/x.Jpg", "b/10.PNG", "b/2.png", "z.jpeg", "ä.webp"]
    assert source.labels() is None
    assert source.classes is None
    assert source.read(0).shape == (3, 4, 4)


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    image(tmp_path / "data" / "real" / "1.png")
    image(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "real" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "same_again").symlink_to(tmp_path / "data" / "real")
    (tmp_path / "data" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert names(opened(tmp_path / "data"), tmp_path / "data") == ["a_link/2.png", "real/1.png"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    image(tmp_path / name)
    source = opened(tmp_path)
    assert source.read(0).shape == (3, 4, 4)
    assert source.describe(0).endswith("caf\ufffd.png")


def test_pipes_are_no_images(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert len(opened(tmp_path)) == 1


def test_labels_are_the_first_sub_folders(tmp_path: Path) -> None:
    image(tmp_path / "dog" / "x" / "1.png")
    image(tmp_path / "dog" / "2.png")
    image(tmp_path / "cat" / "y" / "dog" / "1.png")
    image(tmp_path / "cat" / "2.png")
    train = opened(tmp_path, labels=True, test_fraction=0.5)
    test = opened(tmp_path, "test", labels=True, test_fraction=0.5)
    assert train.classes == test.classes == ["cat", "dog"]
    for source in (train, test):
        labels = source.labels()
        assert labels is not None
        assert labels.dtype == torch.int64
        assert labels.tolist() == [0, 1]
    everything = names(train, tmp_path) + names(test, tmp_path)
    assert sorted(everything) == ["cat/2.png", "cat/y/dog/1.png", "dog/2.png", "dog/x/1.png"]


@pytest.mark.parametrize("held", ["test", "val", "validation", "Test"])
def test_folders_named_for_splits(tmp_path: Path, held: str) -> None:
    labeled(tmp_path / "train", {"a": 3, "b": 2})
    labeled(tmp_path / held, {"b": 4})
    assert len(opened(tmp_path)) == 5
    assert len(opened(tmp_path, "test")) == 4
    test = opened(tmp_path, "test", labels=True)
    assert test.classes == ["a", "b"]
    labels = test.labels()
    assert labels is not None
    assert labels.tolist() == [1] * 4


def test_a_test_folder_is_preferred_to_a_validation_folder(tmp_path: Path) -> None:
    for name, size in {"train": 3, "val": 2, "test": 1}.items():
        labeled(tmp_path / name, {"a": size})
    assert len(opened(tmp_path, "test")) == 1


def test_test_path_is_the_test_split_and_is_not_trained_on(tmp_path: Path) -> None:
    labeled(tmp_path, {"a": 3, "b": 3})
    labeled(tmp_path / "held", {"a": 1, "b": 1})
    settings = {"test_path": tmp_path / "held", "labels": True}
    assert len(opened(tmp_path, "test", **settings)) == 2
    train = opened(tmp_path, **settings)
    assert len(train) == 6
    assert train.classes == ["a", "b"]


def test_without_labels_everything_is_for_training(tmp_path: Path) -> None:
    labeled(tmp_path, {"a": 10, "b": 5})
    assert len(opened(tmp_path)) == 15


def test_hold_out_is_stratified_stable_and_independent_of_creation_order(tmp_path: Path) -> None:
    sizes = {"a": 40, "b": 10, "c": 5, "d": 1}
    forward, backward = labeled(tmp_path / "f", sizes), labeled(tmp_path / "b", sizes, order=-1)
    parts = {split: names(opened(forward, split, labels=True), forward) for split in ("train", "test")}
    assert parts["test"] == names(opened(backward, "test", labels=True), backward)
    assert not set(parts["train"]) & set(parts["test"])
    assert len(parts["train"]) + len(parts["test"]) == 56
    per_class = [sum(name.startswith(letter) for name in parts["test"]) for letter in "abcd"]
    assert per_class == [8, 2, 1, 0]
    # a fixed hold-out: a change would move training images into people's test sets
    assert [name for name in parts["test"] if name.startswith("b")] == ["b/001.png", "b/007.png"]


def test_hold_out_keeps_most_images_in_their_part_when_others_are_added(tmp_path: Path) -> None:
    before = names(opened(labeled(tmp_path, {"a": 100}), "test", labels=True), tmp_path)
    image(tmp_path / "a" / "new.png")
    after = names(opened(tmp_path, "test", labels=True), tmp_path)
    assert len(set(before) & set(after)) >= 19


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_holdout_parts_are_complete_and_never_empty_a_class(fraction: float) -> None:
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 6, 200))
    train, test = (holdout(labels, fraction, split) for split in ("train", "test"))
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(200))
    sizes = labels.bincount()
    held = labels[test].bincount(minlength=6)
    assert ((held >= 1) & (held <= sizes - 1)).all()
    assert torch.equal(held, (sizes * fraction + 0.5).floor().clamp(1).minimum(sizes - 1).long())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"),
        ("training-0.parquet", "train"),
        ("Test_01.parquet", "test"),
        ("valid.parquet", "val"),
        ("validation-00000-of-00001.parquet", "val"),
        ("values.parquet", None),
        ("trainer", None),
        ("0000.parquet", None),
    ],
)
def test_names_of_splits(name: str, part: str | None) -> None:
    assert split_named(name) == part


def test_sources_pickle(tmp_path: Path) -> None:
    source = opened(labeled(tmp_path, {"a": 5, "b": 5}), labels=True)
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy, tmp_path) == names(source, tmp_path)
    assert torch.equal(copy.read(3), source.read(3))


def test_limit_is_a_prefix_of_one_shuffle(tmp_path: Path) -> None:
    labeled(tmp_path, {"a": 20, "b": 20})
    small, large = (opened(tmp_path, limit=limit) for limit in (5, 12))
    assert len(small) == 5
    assert names(large, tmp_path)[:5] == names(small, tmp_path)
    assert names(small, tmp_path) != names(opened(tmp_path), tmp_path)[:5]
    assert len(opened(tmp_path, limit=1000)) == 40
    copy = pickle.loads(pickle.dumps(small))
    assert names(copy, tmp_path) == names(small, tmp_path)


def test_limit_keeps_labels_with_their_images(tmp_path: Path) -> None:
    whole = opened(labeled(tmp_path, {"a": 20, "b": 20}), labels=True)
    part = limited(whole, 10)
    assert isinstance(part, Subset)
    assert part.classes == ["a", "b"]
    labels = part.labels()
    assert labels is not None
    folders = [name.split("/")[0] for name in names(part, tmp_path)]
    assert folders == [part.classes[label] for label in labels.tolist()]


def test_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path: not given; set data\.path=FOLDER$"):
        open_source(DataConfig(name="folder"))


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data: 'foldr' is not a data source; did you mean 'folder'\?$"):
        open_source(DataConfig(name="foldr", path=tmp_path))


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"^data\.path: .*/nowhere does not exist; give an existing folder$"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^data\.test_path: .*/nowhere does not exist"):
        opened(tmp_path, test_path=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^data\.path: .*a\.png is a file; give the folder that it lies in$"):
        opened(tmp_path / "a.png")


def test_empty_folders_say_what_was_looked_at(tmp_path: Path) -> None:
    for name in ("a.txt", "b.mp4", "sub/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"^data: no images in .*: 3 files were looked at, those read end in .*\.jpg"):
        opened(tmp_path)


def test_labels_need_sub_folders(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"^data\.labels: .* has no sub-folders to name classes"):
        opened(tmp_path, labels=True)
    image(tmp_path / "cat" / "b.png")
    with pytest.raises(DataError, match=r"^data\.labels: .*a\.png lies in no sub-folder and has no label"):
        opened(tmp_path, labels=True)


def test_unknown_test_classes_are_refused(tmp_path: Path) -> None:
    labeled(tmp_path / "train", {"a": 1, "b": 1})
    labeled(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match=r"class 'c' of .* is not among the training classes"):
        opened(tmp_path, "test", labels=True)


def test_a_missing_test_split_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"^data\.path: .* has no test split; make sub-folders train and test"):
        opened(tmp_path, "test")
    image(tmp_path / "one" / "only" / "a.png")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="too few images a class to hold some out"):
        opened(tmp_path, "test", labels=True)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "locked" / "a.png")
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"locked cannot be listed \(Permission denied\)"):
        opened(tmp_path)
