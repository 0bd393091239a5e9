from __future__ import annotations

import pickle

import torch

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource, MaskSource


def shapes(split: str = "train", **settings: object) -> MaskSource:
    source = open_source(DataConfig(name="shapes", **settings), split)
    assert isinstance(source, MaskSource)
    return source


def labels_of(source: ImageSource) -> torch.Tensor:
    labels = source.labels()
    assert labels is not None
    return labels


def test_shapes_are_the_same_every_time_and_differ_between_splits() -> None:
    train, again, test = shapes(), pickle.loads(pickle.dumps(shapes())), shapes("test")
    assert (len(train), len(test)) == (2048, 512)
    image = train.read(11)
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.uint8
    assert torch.equal(image, again.read(11))
    assert not torch.equal(image, test.read(11))
    assert not torch.equal(image, train.read(19))


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
        image, inside = source.read(index).float(), source.mask(index) > 0
        contrast.append((image[:, inside].mean(1) - image[:, ~inside].mean(1)).abs().mean())
    assert min(contrast) > 20


def moments(mask: torch.Tensor) -> torch.Tensor:
    """Shape descriptors that do not change with place, size and rotation: the histogram of distances to the center."""
    ys, xs = mask.nonzero().float().T
    distance = torch.hypot(ys - ys.mean(), xs - xs.mean())
    histogram = torch.histc(distance / distance.square().mean().sqrt(), bins=12, min=0, max=2)
    return histogram / histogram.sum()


def neighbors(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor) -> float:
    nearest = torch.cdist(test, train).topk(5, largest=False).indices
    votes = torch.nn.functional.one_hot(labels[nearest], 8).sum(1)
    return float((votes.argmax(1) == truth).float().mean())


def test_shape_tells_the_class_and_pixels_and_colors_do_not() -> None:
    train, test = shapes(count=800), shapes("test", count=800)
    images = [torch.stack([source.read(i) for i in range(len(source))]).float() / 255 for source in (train, test)]
    outlines = [torch.stack([moments(source.mask(i)) for i in range(len(source))]) for source in (train, test)]
    truth, labels = labels_of(test), labels_of(train)
    assert neighbors(outlines[0], labels, outlines[1], truth) > 0.9
    assert neighbors(images[0].flatten(1), labels, images[1].flatten(1), truth) < 0.3
    colors = [torch.cat([batch.mean((2, 3)), batch.std((2, 3))], 1) for batch in images]
    assert neighbors(colors[0], labels, colors[1], truth) < 0.3


def upright(source: MaskSource, label: int) -> torch.Tensor:
    """Mean of a class's masks, each shifted to its center: (64, 64)."""
    centered = []
    for index in range(label, len(source), 8):
        inside = (source.mask(index) > 0).float()
        ys, xs = inside.nonzero().float().T
        centered.append(torch.roll(inside, (32 - int(ys.mean()), 32 - int(xs.mean())), (0, 1)))
    return torch.stack(centered).mean(0)


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
