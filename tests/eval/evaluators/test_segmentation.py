"""Segmentation: IoU against scikit-learn, labels against loops, probes against references, and geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_helpers import BlockSource, blocks, dataset, small_vit
from eval_helpers import plain_pairs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, jaccard_score

from unlabeled.eval.dense.dense_features import DenseFeatures, fine_level, masked_batches, position_labels, resized_mask
from unlabeled.eval.dense.miou import Overlap, class_iou, estimates, joined, mean_iou, overlap
from unlabeled.eval.dense.probes import LabeledFeatures, LinearSegmenter, NearestSegmenter, soft_miou
from unlabeled.eval.evaluators.segmentation import SegmentationConfig, SegmentationEvaluator, best_classes, per_position
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError, DataError

FAST = SegmentationConfig(epochs=10, batch_size=32, k=5)


def run(evaluated, config=FAST):
    return plain_pairs(SegmentationEvaluator(config).run(evaluated))


def test_iou_and_accuracy_are_those_of_scikit_learn_over_all_images():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (6, 9, 7), generator=generator).to(torch.uint8)
    guess = torch.randint(0, 5, (6, 9, 7), generator=generator)
    truth[truth == 3], guess[guess == 3] = 255, 0  # class 3 is nowhere
    labeled = truth != 255
    counts = joined([overlap(truth[:2], guess[:2], 6), overlap(truth[2:], guess[2:], 6)])
    found = class_iou(Overlap(*(one.sum(0) for one in counts)))
    expected = jaccard_score(truth[labeled], guess[labeled], average=None, labels=[0, 1, 2, 4])
    np.testing.assert_allclose(found[[0, 1, 2, 4]], expected)
    assert np.isnan(found[[3, 5]]).all()
    miou, accuracy = estimates(counts, seed=0)
    assert miou.value == pytest.approx(expected.mean())
    assert accuracy.value == pytest.approx(accuracy_score(truth[labeled], guess[labeled]))
    assert miou.low < miou.value < miou.high
    assert accuracy.low < accuracy.value < accuracy.high


def test_a_class_that_is_only_predicted_counts_as_zero():
    counts = overlap(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.tensor([[[0, 0], [0, 1]]]), 3)
    assert mean_iou(Overlap(*(one.sum(0) for one in counts))) == pytest.approx((0.75 + 0) / 2)


def test_equal_images_leave_nothing_to_chance_and_no_pixels_give_zero():
    truth = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8).repeat(4, 1, 1)
    miou, _ = estimates(overlap(truth, torch.zeros(4, 2, 2, dtype=torch.int64), 2), seed=1)
    assert (miou.value, miou.low, miou.high) == (0.125, 0.125, 0.125)
    assert mean_iou(Overlap(*(np.zeros(3, np.int64),) * 3)) == 0


@pytest.mark.parametrize("size", [(12, 20), (13, 17)])
def test_labels_of_positions_are_fractions_of_their_labeled_pixels(size):
    masks = torch.randint(0, 4, (2, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    masks[masks == 3] = 255
    masks[0, :3, :4] = 255  # the first position has no labeled pixel
    fractions, labeled_fraction = position_labels(masks, (4, 5), 3)
    for image in range(2):
        for row in range(4):
            for column in range(5):
                inside = [
                    int(masks[image, y, x])
                    for y in range(size[0])
                    for x in range(size[1])
                    if int((y + 0.5) * 4 / size[0]) == row and int((x + 0.5) * 5 / size[1]) == column
                ]
                labeled = [value for value in inside if value != 255]
                expected = [labeled.count(value) / max(len(labeled), 1) for value in range(3)]
                np.testing.assert_allclose(fractions[image, row, column], expected, atol=1e-6)
                assert float(labeled_fraction[image, row, column]) == pytest.approx(len(labeled) / len(inside))
    assert float(labeled_fraction[0, 0, 0]) == 0


def test_image_and_mask_stay_on_each_other_when_resized():
    """The values of a ramp from left to right and down show where each pixel of the mask came from."""
    ramp = torch.stack(
        [torch.arange(120).repeat(80, 1), torch.arange(80)[:, None].repeat(1, 120), torch.zeros(80, 120)]
    )
    source = BlockSource(torch.zeros(1, 10, 15))
    source.images = ramp[None].to(torch.uint8)
    source.masks = ((ramp[0] // 40).long() % 3)[None].to(torch.uint8)  # thirds: 0, 1, 2
    backbone = small_vit((32, 96))
    (batch,) = masked_batches(source, backbone.input_size, [0], dataset(source, source, backbone))
    assert batch.images.shape == (1, 3, 32, 96)
    across, down = batch.images[0, 0].float(), batch.images[0, 1].float()
    edges = (across[:, :-1] // 40 != across[:, 1:] // 40).float().sum()
    agree = (across // 40).long() == batch.masks[0].long()
    assert float((~agree).float().sum()) <= 2 * float(edges)
    assert float((across[:, 40] - (40.5 * 120 / 96 - 0.5)).abs().max()) < 1
    assert float((down[20] - (20.5 * 80 / 32 - 0.5)).abs().max()) < 1
    columns = resized_mask(torch.arange(120).repeat(80, 1).to(torch.uint8), (32, 96))[0]
    np.testing.assert_allclose(columns, np.floor((np.arange(96) + 0.5) * 120 / 96))


def positions_of(count, channels, classes, *, seed=0, images=10):
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    features = np.random.default_rng(5).normal(size=(classes, channels))[labels] + random.normal(size=(count, channels))
    rows, fractions = torch.from_numpy(features).float(), torch.eye(classes)[labels]
    return LabeledFeatures(rows, fractions, torch.ones(count), torch.arange(count) % images), labels


def test_the_linear_probe_is_as_good_as_logistic_regression_and_indifferent_to_scale():
    train, labels = positions_of(1500, 12, 4)
    test, truth = positions_of(1000, 12, 4, seed=1)
    reference = LogisticRegression(max_iter=1000).fit(train.features, labels).score(test.features, truth)
    assert 0.6 < reference < 0.99
    probe = LinearSegmenter(train, SegmentationConfig(), seed=0)
    guess = probe.scores(test.features).argmax(1)
    assert float((guess.numpy() == truth).mean()) == pytest.approx(reference, abs=0.02)
    scales, offsets = torch.logspace(-3, 3, 12), torch.linspace(-50, 50, 12)
    moved = LabeledFeatures((train.features * scales + offsets), train.fractions, train.labeled, train.images)
    again = LinearSegmenter(moved, SegmentationConfig(), seed=0).scores(test.features * scales + offsets).argmax(1)
    assert float((again == guess).float().mean()) > 0.98


def test_unknown_parts_weigh_nothing():
    """Wrong labels on positions with a tiny labeled fraction do not move the probe."""
    train, _ = positions_of(600, 8, 3)
    wrong, _ = positions_of(600, 8, 3, seed=2)
    mixed = LabeledFeatures(
        torch.cat([train.features, wrong.features]), torch.cat([train.fractions, wrong.fractions.roll(1, 1)]),
        torch.cat([train.labeled, torch.full((600,), 1e-4)]), torch.cat([train.images, wrong.images]),
    )  # fmt: skip
    test, truth = positions_of(500, 8, 3, seed=3)
    clean, dirty = (
        float((LinearSegmenter(one, SegmentationConfig(), 0).scores(test.features).argmax(1).numpy() == truth).mean())
        for one in (train, mixed)
    )
    assert dirty == pytest.approx(clean, abs=0.02)


def test_degenerate_features_of_places():
    train, _ = positions_of(60, 6, 3)
    train.features[:, 2] = 1e4 + 1 / 3  # zero variance
    probe = LinearSegmenter(train, FAST, 0)
    assert bool(probe.scores(train.features).isfinite().all())
    equal = LabeledFeatures(torch.zeros(60, 6), train.fractions, train.labeled, train.images)
    nearest = NearestSegmenter(equal, 100, 0.02)
    assert nearest.k == 60
    torch.testing.assert_close(nearest.scores(torch.zeros(3, 6)), train.fractions.mean(0).expand(3, -1))
    single = LabeledFeatures(train.features, train.fractions, train.labeled, torch.zeros(60, dtype=torch.int64))
    with pytest.raises(DataError, match="single training image are too few"):
        LinearSegmenter(single, FAST, 0)
    with pytest.raises(DataError, match=r"evaluate\.segmentation\.lr: all 1 diverged"):
        LinearSegmenter(train, SegmentationConfig(lr=(1e38,)), 0)
    survived = LinearSegmenter(train, SegmentationConfig(lr=(0.01, 1e38)), 0)
    assert (survived.lr, survived.diverged) == (0.01, 1)


def test_nearest_places_are_those_of_brute_force():
    train, _ = positions_of(50, 7, 3)
    soft = torch.softmax(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    bank = LabeledFeatures(train.features, soft, train.labeled, train.images)
    queries = positions_of(11, 7, 3, seed=4)[0].features
    found = NearestSegmenter(bank, 6, 0.1).scores(queries)
    for query, row in zip(queries.double(), found, strict=True):
        cosines = (bank.features.double() @ query) / bank.features.double().norm(dim=1) / query.norm()
        order = sorted(range(50), key=lambda number: -float(cosines[number]))[:6]
        weights = np.exp(np.array([float(cosines[number]) for number in order]) / 0.1)
        expected = (weights[:, None] / weights.sum() * soft[order].numpy()).sum(0)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_soft_iou_is_that_of_the_pixels_behind_it():
    masks = torch.randint(0, 3, (3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    masks[0, :2] = 255
    fractions, labeled_fraction = position_labels(masks, (2, 4), 3)
    guess = torch.randint(0, 3, (3, 2, 4), generator=torch.Generator().manual_seed(1))
    full = guess.repeat_interleave(4, 1).repeat_interleave(2, 2)
    positions = LabeledFeatures(torch.zeros(24, 1), fractions.view(24, 3), labeled_fraction.view(24), torch.zeros(24))
    expected = mean_iou(Overlap(*(one.sum(0) for one in overlap(masks, full, 3))))
    assert soft_miou(positions, guess.flatten()) == pytest.approx(float(expected), abs=1e-5)


def test_scores_keep_their_places_when_enlarged():
    maps = torch.randn(2, 4, 3, 5)
    guess = best_classes(per_position(maps), maps, (3, 5))
    assert torch.equal(guess, maps.argmax(1))


@pytest.mark.parametrize("pixels", [True, False])
def test_plain_blocks_are_told_apart_up_to_the_edges_of_places(pixels):
    """Colors determine the class; only the bilinear edges between positions can be wrong."""
    backbone = small_vit((32, 48))
    train, test = (BlockSource(blocks(24, (2, 3), seed), side=16) for seed in (0, 1))
    found = dict(run(dataset(train, test, backbone, pixels=pixels)))
    for summarize in ("probe", "knn"):
        assert found[f"{summarize}_accuracy"].value > 0.9
        assert found[f"{summarize}_miou"].value > 0.8
        assert found[f"{summarize}_miou"].low <= found[f"{summarize}_miou"].value <= found[f"{summarize}_miou"].high
        assert found[f"{summarize}_iou"].shape == (3,)
    assert found["positions"] == 24 * 24
    assert found["examples"].dtype == torch.uint8
    again = dict(run(dataset(train, test, backbone, pixels=pixels)))
    assert again["probe_miou"] == found["probe_miou"]
    assert again["knn_miou"] == found["knn_miou"]


def test_shuffled_masks_are_not_predictable():
    """The same images with the masks of others: nothing leaks from the test masks."""
    backbone = small_vit((32, 48))
    train, test = (BlockSource(blocks(24, (2, 3), seed), side=16) for seed in (0, 1))
    test.masks = test.masks.roll(1, 0)
    assert dict(run(dataset(train, test, backbone, pixels=True)))["probe_accuracy"].value < 0.6


def test_unknown_pixels_and_broken_images_are_left_out():
    backbone = small_vit((32, 48))
    plain = blocks(12, (2, 3), 1)
    hidden = plain.clone()
    hidden[:, 0] = 255
    train = BlockSource(blocks(12, (2, 3)), side=16, corrupt=3)
    found = dict(run(dataset(train, BlockSource(hidden, side=16), backbone)))
    assert found["positions"] == 11 * 24
    with pytest.raises(DataError, match="no test image has a labeled pixel"):
        run(dataset(train, BlockSource(torch.full((3, 2, 3), 255), side=16), backbone))


def test_the_bank_is_cut_evenly_and_k_with_it():
    backbone = small_vit((32, 48))
    train, test = (BlockSource(blocks(10, (2, 3), seed), side=16) for seed in (0, 1))
    config = SegmentationConfig(bank=25, k=40, epochs=2, batch_size=8)
    found = run(dataset(train, test, backbone), config)
    assert dict(found)["positions"] == 25
    assert ("note", "k = 40 needs more training positions than the 25 here; k = 25 is used instead") in found
    bank = SegmentationEvaluator(config)._bank(
        DenseFeatures(dataset(train, test, backbone), "segmentation"), train, dataset(train, test, backbone), 3
    )
    assert set(bank.images.tolist()) == set(range(10))
    assert int(torch.bincount(bank.images).max()) <= 3


def test_classes_of_the_test_source_in_another_order():
    backbone = small_vit((32, 48))
    train, test = (BlockSource(blocks(16, (2, 3), seed), side=16) for seed in (0, 1))
    plain = dict(run(dataset(train, test, backbone, pixels=True)))
    test.classes = ("blue", "red")
    test.masks = torch.tensor([0, 2, 1], dtype=torch.uint8)[test.masks.long()]
    assert dict(run(dataset(train, test, backbone, pixels=True)))["probe_miou"] == plain["probe_miou"]


def test_unusable_data_is_refused():
    backbone = small_vit((32, 48))
    good = BlockSource(blocks(4, (2, 3)), side=16)
    with pytest.raises(DataError, match="training masks show a single class"):
        run(dataset(BlockSource(torch.zeros(4, 2, 3), side=16), good, backbone))
    crooked = BlockSource(blocks(4, (2, 3)), side=16)
    crooked.masks = crooked.masks[:, :-1]
    with pytest.raises(DataError, match="image and mask of image 0 are 32x48 and 31x48 pixels"):
        run(dataset(crooked, good, backbone))
    beyond = BlockSource(blocks(4, (2, 3)), side=16)
    beyond.masks[beyond.masks == 2] = 9
    with pytest.raises(DataError, match="has value 9, which is not one of the classes"):
        run(dataset(beyond, good, backbone))
    bare = BlockSource(blocks(4, (2, 3)), side=16)
    hidden = type("Bare", (), {name: getattr(bare, name) for name in ("classes", "read", "labels", "describe")})()
    with pytest.raises(DataError, match="the data has no masks"):
        run(dataset(hidden, good, backbone))
    broken = small_vit((32, 48))
    next(broken.parameters()).data.fill_(float("nan"))
    with pytest.raises(DataError, match="the feature map is NaN or infinite"):
        run(dataset(good, good, broken))
    with pytest.raises(ConfigError, match=r"evaluate\.segmentation\.level: .* has no map 7"):
        run(dataset(good, good, backbone), SegmentationConfig(level=7))
    mapless = small_vit((32, 48))
    mapless.stages = []
    with pytest.raises(CapabilityError, match=r"remove segmentation from evaluate\.evaluators"):
        run(dataset(good, good, mapless))


@pytest.mark.parametrize(
    ("name", "size", "level"),
    [("resnet18", 224, 3), ("resnet18", 64, 2), ("resnet18", 512, 4), ("vit_tiny_patch16_224", 224, 11)],
)
def test_the_deepest_map_that_is_fine_enough(name, size, level):
    assert fine_level(create_backbone(name, size=size)) == level


def test_pixels_of_places_are_the_image_of_each():
    backbone = small_vit((32, 48))
    source = BlockSource(blocks(2, (4, 6)))
    images = torch.stack([source.read(index) for index in range(2)])
    pixels = DenseFeatures(dataset(source, source, backbone, pixels=True), "segmentation")(images)
    assert pixels.shape == (2, 3 * 64, 4, 6)
    normal = backbone.normalize(images)
    torch.testing.assert_close(pixels[1, :, 2, 5], normal[1, :, 16:24, 40:48].flatten())
