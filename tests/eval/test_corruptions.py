"""Corruptions of images: the authors' strengths, the same image each time, worse with each severity."""

from __future__ import annotations

import io
from typing import get_args

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource
from PIL import Image
from scipy import ndimage
from torch import Tensor

from unlabeled.eval.corruptions import CorruptedSource, CorruptionName, corrupt, strength
from unlabeled.eval.features.extract import EvalTransform

NAMES = get_args(CorruptionName)


def random_image(side: int = 32, width: int | None = None) -> Tensor:
    """Smooth colors with a sharp edge."""
    ramp = torch.linspace(0, 1, width or side).expand(side, -1)
    edge = (torch.arange(side) > side // 2).float()[:, None] * 0.5
    image = torch.stack([ramp, 1 - ramp, 0.2 * ramp]) * 0.5 + edge
    return (image.clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32), (48, 33), (8, 8), (224, 224)])
def test_a_image_keeps_its_shape_and_is_the_same_each_time(name: CorruptionName, shape: tuple[int, int]) -> None:
    image = random_image(*shape)
    before, state = image.clone(), torch.get_rng_state()
    found = corrupt(image, name, 5, seed=3)
    assert found.shape == image.shape
    assert found.dtype == torch.uint8
    assert torch.equal(found, corrupt(image, name, 5, seed=3))
    assert not torch.equal(found, image)
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [32, 96, 224])
def test_each_severity_is_worse(name: CorruptionName, side: int) -> None:
    image = random_image(side)
    if name in ("jpeg", "pixelate"):  # which smooth ramps survive
        image = (image.float() + 40 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(
            0, 255
        ).to(torch.uint8)  # fmt: skip
    errors = [float((corrupt(image, name, s, 0).float() - image.float()).square().mean()) for s in (1, 3, 5)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_strengths_are_the_authors_at_both_ends_and_between() -> None:
    assert [strength("gaussian_noise", s, 224) for s in (1, 5)] == pytest.approx([0.08, 0.38])
    assert [strength("gaussian_noise", s, 32) for s in (1, 5)] == pytest.approx([0.04, 0.10])
    assert [strength("jpeg", s, 224) for s in (1, 5)] == pytest.approx([25, 7])
    assert strength("gaussian_blur", 3, 32) == pytest.approx(0.7)
    assert 0.7 < strength("gaussian_blur", 3, 96) < 3
    assert strength("gaussian_blur", 5, 448) == pytest.approx(12), "as wide relative to the image as at 224"
    assert strength("contrast", 2, 1000) == strength("contrast", 2, 224)
    geometric_mean = (32 * 224) ** 0.5
    assert strength("brightness", 1, round(geometric_mean)) == pytest.approx((0.05 * 0.1) ** 0.5, rel=1e-2)


def test_noise_has_the_deviation_asked_for_and_another_one_for_another_seed() -> None:
    gray = torch.full((3, 224, 224), 128, dtype=torch.uint8)
    found = corrupt(gray, "gaussian_noise", 1, seed=0).float() / 255
    assert float(found.std()) == pytest.approx(0.08, rel=0.02)
    assert float(found.mean()) == pytest.approx(128 / 255, abs=2e-3)
    assert not torch.equal(corrupt(gray, "gaussian_noise", 1, 1), corrupt(gray, "gaussian_noise", 1, 0))


def test_blur_is_a_gaussian_filter() -> None:
    image = random_image(64)
    sigma = strength("gaussian_blur", 4, 64)
    expected = ndimage.gaussian_filter(image.numpy().astype(float), (0, sigma, sigma), mode="mirror")
    np.testing.assert_allclose(corrupt(image, "gaussian_blur", 4, 0).numpy(), expected, atol=1.5)


def test_jpeg_is_of_the_quality_asked_for() -> None:
    image = random_image(64)
    found = corrupt(image, "jpeg", 5, 0).float()
    written = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(
        written, "JPEG", quality=round(strength("jpeg", 5, 64)), subsampling="4:2:0"
    )
    expected = torch.from_numpy(np.array(Image.open(written))).permute(2, 0, 1).float()
    assert float((found - expected).abs().mean()) < 3
    assert float((found - image.float()).abs().mean()) > 1.5 * float((found - expected).abs().mean())


def test_brightness_adds_to_the_value_and_keeps_the_hue() -> None:
    image = torch.tensor([[60, 0, 250], [30, 0, 125], [0, 0, 50]], dtype=torch.uint8).view(3, 1, 3).expand(3, 32, 3)
    found = corrupt(image.contiguous(), "brightness", 5, 0)[:, 0].T.tolist()
    added = round(0.3 * 255)
    bright = 60 + added
    assert found[0] == pytest.approx([bright, bright / 2, 0], abs=1)
    assert found[1] == pytest.approx([added] * 3, abs=1), "black becomes gray"
    assert found[2] == pytest.approx([255, 127.5, 51], abs=1)


def test_contrast_pulls_to_the_mean_and_pixelate_makes_blocks() -> None:
    image = random_image(224)
    faint = corrupt(image, "contrast", 5, 0).float()
    mean = image.float().mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(faint, (image.float() - mean) * 0.05 + mean, atol=0.6, rtol=0)
    coarse = corrupt(image, "pixelate", 5, 0)
    assert len(torch.unique(coarse[0, 0])) <= 224 // 4
    blocks = coarse.view(3, 56, 4, 56, 4)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))


def test_a_corrupted_source_reads_the_images_asked_for_in_that_order() -> None:
    source = MemorySource(9, shape=(40, 40))
    corrupted = CorruptedSource(source, [7, 2], EvalTransform((32, 32)), "gaussian_noise", 3, seed=5)
    again = CorruptedSource(source, [2], EvalTransform((32, 32)), "gaussian_noise", 3, seed=5)
    assert len(corrupted) == 2
    assert corrupted.read(0).shape == (3, 32, 32)
    assert torch.equal(corrupted.read(1), again.read(0)), "an image's noise does not depend on its neighbors"
    assert corrupted.describe(0).startswith("train-7.png, gaussian_noise 3")
    assert not torch.equal(
        corrupted.read(0), CorruptedSource(source, [7], corrupted.prepare, "gaussian_noise", 3, seed=6).read(0)
    )
