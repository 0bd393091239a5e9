"""Accuracies against counting by hand, and degenerate outputs."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from unlabeled.eval.intervals import wilson
from unlabeled.ssl.core.errors import DataError
from unlabeled.workflows.finetune.accuracy import accuracy_of


def test_against_counting() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 8)).astype(np.float32), random.integers(0, 8, 200)
    found = accuracy_of(logits, labels)
    ranks = (logits > logits[np.arange(200), labels][:, None]).sum(axis=1)
    assert found.values["top1"].value == accuracy_score(labels, logits.argmax(1)) == (ranks == 0).mean()
    assert found.values["top5"].value == (ranks < 5).mean()
    for one in found.values.values():
        assert (one.low, one.high) == wilson(one.value, 200)
    expected = np.zeros((8, 8), int)
    for truth, guess in zip(labels, logits.argmax(1), strict=True):
        expected[truth, guess] += 1
    assert np.array_equal(found.confusion, expected)


def test_few_classes_have_no_top5_and_absent_ones_a_row_of_zeros() -> None:
    found = accuracy_of(np.eye(3, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 0]))
    assert found.values.keys() == {"top1"}
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    absent = accuracy_of(np.random.default_rng(0).normal(size=(4, 9)), np.array([0, 0, 1, 1]))
    assert 0 <= absent.values["top5"].value <= 1


def test_outputs_that_are_not_finite_are_told() -> None:
    logits = np.zeros((4, 3), np.float32)
    logits[1, 2], logits[3, 0] = np.nan, np.inf
    with pytest.raises(DataError, match=r"outputs for 2 of 4 test images are NaN or infinite; lower optim.lr"):
        accuracy_of(logits, np.zeros(4, int))
