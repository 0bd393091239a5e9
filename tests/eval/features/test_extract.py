"""Feature extraction: the transform, skipped images, modes, randomness, several processes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from eval_helpers import MemorySource, tiny_vit

from unlabeled.eval.features.extract import EvalTransform, extract_features, raw_pixels
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import DataError


def stripes(height: int, width: int) -> torch.Tensor:
    """Columns numbered by their red value, rows by their green value."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = torch.arange(width) * 255 // width
    image[1] = (torch.arange(height) * 255 // height)[:, None]
    return image


def test_a_image_of_the_input_size_is_left_as_it_is() -> None:
    image = stripes(32, 32)
    assert torch.equal(EvalTransform((32, 32))(image), image)


def test_a_small_image_is_resized_whole() -> None:
    shown = EvalTransform((32, 48))(stripes(16, 16))
    assert shown.shape == (3, 32, 48)
    assert shown[0, :, 0].max() < 16, "the first column must still be there"
    assert shown[0, :, -1].min() > 230, "the last column must still be there"


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (700, 256), (57, 300)])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_a_larger_image_is_resized_with_a_margin_and_cropped(shape: tuple[int, int], size: tuple[int, int]) -> None:
    shown = EvalTransform(size)(stripes(*shape))
    assert shown.shape == (3, *size)
    scale = max(size[0] * 256 / 224 / shape[0], size[1] * 256 / 224 / shape[1])
    left = 255 * (1 - size[1] / (shape[1] * scale)) / 2
    assert shown[0, :, 0].float().mean().item() == pytest.approx(left, abs=255 * 1.2 / size[1])
    assert shown[0, :, -1].float().mean().item() == pytest.approx(255 - left, abs=255 * 1.2 / size[1])


def test_the_shorter_side_of_an_imagenet_image_becomes_256() -> None:
    image = stripes(512, 512)
    reference = torch.nn.functional.interpolate(
        image[None].float(), size=(256, 256), mode="bicubic", antialias=True, align_corners=False
    )[0, :, 16:240, 16:240]
    shown = EvalTransform((224, 224))(image)
    assert (shown.float() - reference).abs().max() <= 1


def test_features_are_the_pooled_ones_in_order() -> None:
    backbone, source = tiny_vit(), MemorySource(10)
    split = extract_features(backbone, source, batch_size=3)
    with torch.inference_mode():
        images = torch.stack([source.read(index) for index in range(10)])
        expected = backbone.eval().pooled(backbone.normalize(images))
    assert split.features.dtype == np.float32
    np.testing.assert_allclose(split.features, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(split.labels, [0, 1, 2] * 3 + [0])
    np.testing.assert_array_equal(split.indices, range(10))


def test_a_image_larger_than_the_input_and_a_rectangle_work() -> None:
    backbone = create_backbone("resnet18", size=(32, 64))
    assert extract_features(backbone, MemorySource(3, shape=(90, 70))).features.shape == (3, 512)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_and_named(workers: int) -> None:
    split = extract_features(tiny_vit(), MemorySource(9, corrupt=(0, 4, 5)), batch_size=2, workers=workers)
    assert split.skipped == ("train-0.png", "train-4.png", "train-5.png")
    np.testing.assert_array_equal(split.indices, [1, 2, 3, 6, 7, 8])
    np.testing.assert_array_equal(split.labels, [1, 2, 0, 0, 1, 2])
    whole = extract_features(tiny_vit(), MemorySource(9))
    np.testing.assert_allclose(split.features, whole.features[split.indices], atol=1e-5)


@pytest.mark.parametrize("extract", [lambda s: extract_features(tiny_vit(), s), raw_pixels])
def test_nothing_but_corrupt_images_is_an_error(extract) -> None:
    with pytest.raises(DataError, match="none of the 3 images can be decoded"):
        extract(MemorySource(3, corrupt=range(3)))


def test_modes_and_random_state_are_left_as_they_were() -> None:
    backbone = create_backbone("resnet10t", size=32).train()
    frozen = next(part for part in backbone.modules() if isinstance(part, torch.nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    extract_features(backbone, MemorySource(4), workers=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert backbone.training
    assert not frozen.training
    assert sum(part.training for part in backbone.modules()) == sum(1 for _ in backbone.modules()) - 1
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_reduced_precision_stays_near_full_precision_and_returns_float32() -> None:
    full = extract_features(tiny_vit(), MemorySource(4)).features
    reduced = extract_features(tiny_vit(), MemorySource(4), precision="bf16").features
    assert reduced.dtype == np.float32
    assert 0 < np.abs(full - reduced).max() < 0.1


def test_a_source_without_labels_gives_minus_one() -> None:
    assert set(extract_features(tiny_vit(), MemorySource(3, classes=None)).labels) == {-1}


def test_raw_pixels_are_flattened_fractions() -> None:
    source = MemorySource(4, shape=(8, 6), corrupt=(0,))
    split = raw_pixels(source)
    np.testing.assert_array_equal(split.features, source._images[1:].flatten(1).float().numpy() / np.float32(255))
    assert raw_pixels(MemorySource(2, shape=(64, 40))).features.shape == (2, 3 * 32 * 32)
    assert raw_pixels(MemorySource(2, shape=(64, 20)), size=16).features.shape == (2, 3 * 16 * 16)


def _extract_in_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    backbone = tiny_vit()
    split = extract_features(backbone, MemorySource(7, corrupt=(1, 5)), batch_size=2, cache=Path(folder) / "cache")
    lone = extract_features(backbone, MemorySource(1), batch_size=2)
    again = MemorySource(7, corrupt=(1, 5))
    extract_features(backbone, again, batch_size=2, cache=Path(folder) / "cache")
    np.savez(
        f"{folder}/rank{rank}.npz",
        features=split.features, labels=split.labels, indices=split.indices, skipped=split.skipped,
        lone=lone.features, reads=again.reads,
    )  # fmt: skip
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


def test_two_processes_give_the_features_of_one(tmp_path: Path) -> None:
    mp.start_processes(_extract_in_process, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
    expected = extract_features(tiny_vit(), MemorySource(7, corrupt=(1, 5)))
    lone = extract_features(tiny_vit(), MemorySource(1))
    for rank in range(2):
        found = np.load(tmp_path / f"rank{rank}.npz")
        np.testing.assert_allclose(found["features"], expected.features, atol=1e-5)
        np.testing.assert_array_equal(found["labels"], expected.labels)
        np.testing.assert_array_equal(found["indices"], expected.indices)
        assert tuple(found["skipped"]) == expected.skipped == ("train-1.png", "train-5.png")
        np.testing.assert_allclose(found["lone"], lone.features, atol=1e-5)
        assert found["reads"] == 7, "only the identity of the data may read images the second time"
