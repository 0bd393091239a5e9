"""Images in NumPy arrays: the contract, and what is particular to the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unlabeled import DataError, check_source
from unlabeled_extras.npy import NpyConfig, NpySource


def arrays(folder: Path, *shape: int, labels: bool = True) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        np.save(folder / f"{split}_images.npy", random.integers(0, 256, (count, *shape), dtype=np.uint8))
        if labels:
            np.save(folder / f"{split}_labels.npy", np.arange(count) % 3)
    return folder


@pytest.mark.parametrize("shape", [(8, 10), (8, 10, 3)], ids=["gray", "rgb"])
def test_contract(tmp_path: Path, shape: tuple[int, ...]) -> None:
    check_source(NpySource, {"path": arrays(tmp_path, *shape)})


def test_images_and_labels_are_those_of_the_arrays(tmp_path: Path) -> None:
    source = NpySource(NpyConfig(path=arrays(tmp_path, 8, 10, 3)), "test")
    stored = np.load(tmp_path / "test_images.npy")
    assert all(torch.equal(source.read(index), torch.from_numpy(stored[index]).permute(2, 0, 1)) for index in range(3))
    assert source.labels().tolist() == [0, 1, 2]
    assert source.classes == ["0", "1", "2"]
    assert source.describe(1) == f"image 1 of {tmp_path / 'test_images.npy'}"


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    source = NpySource(NpyConfig(path=arrays(tmp_path, 8, 10, labels=False)))
    assert (source.labels(), source.classes) == (None, None)


def test_what_is_missing_or_of_another_form_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data.path: .* has no train_images.npy; put it there, or give another f"):
        NpySource(NpyConfig(path=tmp_path))
    np.save(tmp_path / "train_images.npy", np.zeros((4, 8, 8)))
    with pytest.raises(DataError, match=r"train_images.npy is float64 \(4, 8, 8\); give uint8 \(N, H, W, 3\)$"):
        NpySource(NpyConfig(path=tmp_path))
