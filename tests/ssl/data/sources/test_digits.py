from __future__ import annotations

import pickle

import numpy as np
import torch
from sklearn.datasets import load_digits

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource, MaskSource


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
        gray = (test.read(index)[0].float() * 16 / 255).round().long()
        assert (gray.numpy().tobytes(), int(labels_of(test)[index])) in stored
    assert test.read(3).max() == 255
    assert test.describe(3) == "test digit 3"
    assert torch.equal(pickle.loads(pickle.dumps(test)).read(3), test.read(3))


def test_they_have_no_masks() -> None:
    assert not isinstance(open_source(DataConfig(name="digits", limit=7)), MaskSource)
