"""Near duplicates: planted copies are found and ordinary neighbors are not, whatever the features look like."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from eval_helpers import plain_values
from feature_helpers import broken, clouds, dataset, same
from PIL import Image
from torch import Tensor

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.duplicates import (
    DuplicatesConfig,
    DuplicatesEvaluator,
    find_pairs,
    side_by_side,
    threshold,
)
from unlabeled.ssl.core.errors import DataError

CAREFUL = DuplicatesConfig(chance=1e-4)


class Images:
    """Given images as a source of two classes in turn."""

    classes = ("even", "odd")

    def __init__(self, images: list[Tensor], split: str) -> None:
        self.images, self.split = images, split

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def labels(self) -> Tensor:
        return torch.arange(len(self)) % 2

    def describe(self, index: int) -> str:
        return f"{self.split}-{index}.png"


def smooth(count: int, seed: int) -> list[Tensor]:
    """Images of soft colored blots, uint8 (3, 32, 32)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255)
    return list(fine.to(torch.uint8))


def jpeg(image: Tensor, quality: int = 50) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def encoded(source: Images, offset: float, indices: np.ndarray | None = None) -> FeatureSplit:
    """Fixed random projections of the pixels, moved by `offset`."""
    basis = torch.randn(3 * 32 * 32, 24, generator=torch.Generator().manual_seed(9)) / 32
    indices = np.arange(len(source)) if indices is None else indices
    rows = torch.stack([source.read(int(index)) for index in indices]).flatten(1).float() / 255
    return FeatureSplit((rows @ basis + offset).numpy(), indices % 2, indices)


def evaluate_features(train: Images, test: Images, offset: float = 0.0, config: DuplicatesConfig = CAREFUL) -> dict:
    data = FeatureSet(encoded(train, offset), encoded(test, offset), Images.classes)
    return plain_values(DuplicatesEvaluator(config).run(EncodedDataset(data, None, (train, test))))


@pytest.mark.parametrize("offset", [0.0, 60.0])
def test_planted_copies_are_found_and_neighbors_are_not(offset: float) -> None:
    images = smooth(300, seed=1)
    train = Images([*images, jpeg(images[7]), images[8]], "train")
    test = Images([*smooth(50, seed=2), *(jpeg(images[n], 30 + 5 * n) for n in range(10)), images[20]], "test")
    if offset:
        rows = encoded(train, offset).features.astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1)
        assert (rows @ rows.T / lengths[:, None] / lengths).min() > 0.99, "no fixed cosine would do"
    found = evaluate_features(train, test, offset)
    # images 7 and 8 are in training twice, so the copies of both make two pairs each
    assert (found["share"], found["pairs"], found["exact"]) == (pytest.approx(11 / 61), 13, 1)
    assert (found["train_pairs"], found["train_exact"]) == (2, 1)
    assert found["train_share"] == pytest.approx(4 / 302)
    assert found["note"] == (
        "11 test images have a near duplicate in training; the closest pair is test-60.png and train-20.png"
    )
    clean = evaluate_features(Images(images, "train"), Images(smooth(50, seed=2), "test"), offset)
    assert [clean[key] for key in ("share", "pairs", "exact", "train_share", "train_pairs", "train_exact")] == [0] * 6
    assert "note" not in clean


def test_the_image_shows_the_closest_pairs_past_images_that_were_left_out() -> None:
    images = smooth(60, seed=1)
    train, test = Images(images, "train"), Images([*smooth(20, seed=2), images[30]], "test")
    left_out = FeatureSet(encoded(train, 0, np.arange(5, 60)), encoded(test, 0, np.arange(3, 21)), Images.classes)
    found = plain_values(
        DuplicatesEvaluator(DuplicatesConfig(shown=3)).run(EncodedDataset(left_out, None, (train, test)))
    )
    image = found["closest"]
    assert image.shape == (3, 2 * 32 + 2, 3 * 34 - 2)
    assert torch.equal(image[:, :32, :32], images[30])
    assert torch.equal(image[:, 34:, :32], images[30])
    assert (image[:, 32:34] == 255).all()
    assert any(torch.equal(image[:, :32, 34:66], other) for other in test.images[3:20])
    assert found["note"].endswith("test-20.png and train-30.png")


@pytest.mark.parametrize("dimension", [3, 8, 16])
def test_ordinary_images_are_taken_for_copies_by_the_chance_that_is_asked_for(dimension: int) -> None:
    """Two clouds of unlike density, turned into 40 features; in many dimensions it errs on the careful side."""
    generator = np.random.default_rng(dimension)
    basis = np.linalg.qr(generator.normal(size=(40, dimension + 1)))[0]

    def drawn(count: int) -> np.ndarray:
        rows = generator.normal(size=(count, dimension + 1)) * np.where(np.arange(count) % 2, 1, 0.3)[:, None]
        return ((rows + 3 * (np.arange(count)[:, None] % 2)) @ basis.T).astype(np.float32)

    found = find_pairs(drawn(3000), drawn(2000), 0.03)  # unit length takes one dimension away
    assert 0.01 < found.found.any(axis=1).mean() < 0.045


def test_the_threshold_is_its_formula() -> None:
    """Distances that grow as evenly spread points in m dimensions do on average: (r5 / r10)^m = 1/2."""
    for dimension in (2.0, 6.0):
        distances = np.tile(np.r_[0.1, 0.1, 0.1, 0.1, 0.5 ** (1 / dimension), 0.99, 0.99, 0.99, 0.99, 1], (30, 1))
        ratio = threshold(distances, 1e-3)
        assert 1 - (1 - ratio**dimension) ** 9 == pytest.approx(1e-3)
    even = np.ones((30, 10))
    assert threshold(even, 1e-3) == 0.7
    assert not find_pairs(np.eye(30, dtype=np.float32), np.eye(30, dtype=np.float32)[:, ::-1] - 2, 1e-3).found.any()


def test_equal_features_count_in_groups_of_any_size_and_a_image_is_not_its_own_copy() -> None:
    rows = clouds(60, 3).features
    rows[:25], rows[30], rows[40] = rows[0], rows[31], rows[31]
    found = find_pairs(rows, rows, 1e-4, own=np.arange(60))
    assert not (found.rows == np.arange(60)[:, None]).any()
    doubled = set(range(25)) | {30, 31, 40}
    assert set(np.flatnonzero(found.found.any(axis=1))) == doubled
    for row in (30, 31, 40):
        assert set(found.rows[row][found.found[row]]) == {30, 31, 40} - {row}
    values = plain_values(
        DuplicatesEvaluator(CAREFUL).run(dataset(FeatureSplit(rows[25:], np.arange(35) % 2), clouds(9, 2, seed=3)))
    )
    assert (values["train_pairs"], values["train_share"]) == (3, pytest.approx(3 / 35))


def test_a_part_of_the_training_images_can_stand_for_all() -> None:
    images = smooth(100, seed=1)
    train = Images([*images, *images], "train")
    found = evaluate_features(train, Images(smooth(9, seed=2), "test"), config=DuplicatesConfig(queries=30))
    assert found["train_share"] == 1
    assert 15 <= found["train_pairs"] == found["train_exact"] <= 30


def test_features_alone_few_images_and_features_without_variance() -> None:
    values = plain_values(DuplicatesEvaluator(CAREFUL).run(dataset(clouds(40, 3), clouds(9, 3, seed=1))))
    assert set(values) == {"share", "pairs", "ratio", "train_share", "train_pairs"}
    few = clouds(6, 3)
    values = plain_values(DuplicatesEvaluator(CAREFUL).run(dataset(few, few)))
    assert values["note"] == "6 training images are too few to compare distances; only equal features count"
    assert (values["share"], values["pairs"], values["train_pairs"]) == (1, 6, 0)
    for value in (0.0, 1e6):
        nothing = plain_values(DuplicatesEvaluator(CAREFUL).run(dataset(same(clouds(40, 3), value), clouds(9, 3))))
        assert nothing == {"note": "nearly all images have the same features, so duplicates cannot be detected"}
    with pytest.raises(DataError, match="1 of 9 test features are NaN"):
        plain_values(DuplicatesEvaluator(CAREFUL).run(dataset(clouds(40, 3), broken(clouds(9, 3)))))


def test_images_of_any_size_stand_side_by_side() -> None:
    images = [torch.zeros(3, 20, 40, dtype=torch.uint8), torch.zeros(3, 448, 224, dtype=torch.uint8)]
    canvas = side_by_side(images, images[::-1])
    assert canvas.shape == (3, 2 * 112 + 2, 2 * 56 + 2)
    assert int((canvas[0] == 0).sum()) == 2 * (20 * 40 + 112 * 56)
