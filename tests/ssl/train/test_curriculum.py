"""Smaller images at the start of a run: the crop of the spectrum, the schedule, and who can take part."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.config.schema import CurriculumName, PretrainConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.curriculum import Curriculum, CurriculumPhase, create_curriculum, low_frequencies, plan_phases
from unlabeled.workflows.settings import compose_settings

VIT = {"size": 64, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
RESNET = {"channels": [4, 4, 4, 4], "stem_width": 4, "output_stride": 8}
SIZES = [
    ((32, 32), (24, 24)),
    ((32, 32), (23, 23)),
    ((31, 31), (16, 16)),
    ((31, 33), (15, 20)),
    ((24, 40), (16, 24)),
    ((224, 224), (160, 160)),
]
"""(full, smaller): even and odd, square and not."""


def wave(size: tuple[int, int], cycles: tuple[int, int], amplitude: float = 0.4) -> Tensor:
    """0.5 + amplitude cos(2 pi (cycles over the image) + 0.7) at the centers of pixels, float64 (h, w)."""
    rows, columns = (
        (torch.arange(count, dtype=torch.float64) + 0.5) * c / count for count, c in zip(size, cycles, strict=True)
    )
    return 0.5 + amplitude * (2 * math.pi * (rows[:, None] + columns) + 0.7).cos()


@pytest.mark.parametrize(("full", "size"), SIZES)
def test_waves_below_the_cut_off_keep_amplitude_and_phase_and_those_above_vanish(
    full: tuple[int, int], size: tuple[int, int]
) -> None:
    inside = [(size[0] - 1) // 2, (size[1] - 1) // 2]
    outside = [size[0] // 2 + 1, size[1] // 2 + 1]
    for cycles in [(0, 0), (1, 2), (3, -2), (inside[0], 0), (0, inside[1]), (inside[0], -inside[1])]:
        smaller = low_frequencies(wave(full, cycles), size)
        assert (smaller - wave(size, cycles)).abs().max() < 1e-5, cycles
    for cycles in [(outside[0], 0), (0, outside[1]), (outside[0], 1), (-2, outside[1])]:
        if all(abs(c) < n / 2 for c, n in zip(cycles, full, strict=True)):  # else it is another wave's sample
            smaller = low_frequencies(wave(full, cycles), size)
            assert (smaller - 0.5).abs().max() < 1e-5, cycles


def test_an_even_window_has_half_of_the_wave_at_its_edge() -> None:
    """[-12, 12) holds one of the two parts of a wave of 12 cycles."""
    edge = low_frequencies(wave((32, 32), (12, 1)), (24, 24))
    assert torch.allclose(edge, wave((24, 24), (12, 1), amplitude=0.2).float(), atol=1e-5)


def cropped(images: np.ndarray[Any, Any], side: int, axis: int) -> np.ndarray[Any, Any]:
    """The published steps along one axis, and a shift of phases from corners to centers of pixels."""
    whole = images.shape[axis]
    spectrum = np.fft.fftshift(np.fft.fft(images, axis=axis), axes=axis)
    first = whole // 2 - side // 2
    window = np.take(spectrum, range(first, first + side), axis=axis)
    turns = (np.arange(side) - side // 2) * (0.5 / side - 0.5 / whole)
    window = window * np.exp(2j * np.pi * np.expand_dims(turns, 0 if axis == -1 else 1))
    return np.fft.ifft(np.fft.ifftshift(window, axes=axis), axis=axis).real * side / whole


@pytest.mark.parametrize(("full", "size"), SIZES)
def test_crop_is_the_published_one_at_the_centers_of_pixels(full: tuple[int, int], size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *full, generator=torch.Generator().manual_seed(0))
    found = low_frequencies(images, size)
    assert found.dtype == torch.float32
    expected = cropped(cropped(images.double().numpy(), size[1], -1), size[0], -2)
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-6)
    assert torch.allclose(found.mean((-2, -1)), images.mean((-2, -1)), atol=1e-5)
    assert torch.allclose(low_frequencies(images, full), images, atol=3e-6)


@pytest.mark.parametrize(("full", "size"), [(32, 24), (32, 23), (31, 16)])
def test_turned_and_mirrored_images_have_turned_and_mirrored_crops(full: int, size: int) -> None:
    """Else the crop itself says how an image was turned, and rotation is solved without looking at it."""
    images = torch.rand(2, 3, full, full, generator=torch.Generator().manual_seed(2))
    small = low_frequencies(images, (size, size))
    for turn in (lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.mT):
        assert torch.allclose(low_frequencies(turn(images), (size, size)), turn(small), atol=3e-6)


def test_values_below_zero_stay_below_zero() -> None:
    """The magnitude in place of the real part would fold them up."""
    ink = torch.zeros(1, 32, 32)
    ink[:, 14:18] = 1.0  # an edge rings
    assert low_frequencies(ink, (16, 16)).min() < -0.005
    assert torch.allclose(low_frequencies(-ink, (16, 16)), -low_frequencies(ink, (16, 16)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_the_transform_runs_in_float32_under_autocast(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = low_frequencies(images.float(), (12, 12))
    with torch.autocast("cpu", torch.bfloat16):
        found = low_frequencies(images, (12, 12))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_published_schedules() -> None:
    """60, 20 and 20 % of the steps; and stages of equal compute, 2, 4 and 4 of ten."""
    plain = plan_phases("efficienttrain", 1000, (224, 224), (32, 32))
    assert plain == [
        CurriculumPhase(0, 600, (160, 160)),
        CurriculumPhase(600, 200, (192, 192)),
        CurriculumPhase(800, 200, (224, 224)),
    ]
    stages = plan_phases("efficienttrain++", 1000, (224, 224), (32, 32))
    assert [stage.size[0] for stage in stages] == [96, 160, 224]
    assert [stage.first for stage in stages] == [0, stages[0].steps, stages[0].steps + stages[1].steps]
    assert sum(stage.steps for stage in stages) == 1000
    share = 1000 / sum(n * (224 / size) ** 2 for n, size in ((2, 96), (4, 160), (4, 224)))  # of full size, per stage
    for stage, count in zip(stages, (2, 4, 4), strict=True):
        assert abs(stage.steps - count * share * (224 / stage.size[0]) ** 2) <= 1
    parts = [Curriculum("x", tuple(found), torch.nn.Identity()).compute for found in (plain, stages)]
    assert parts == pytest.approx([0.6 * (160 / 224) ** 2 + 0.2 * (192 / 224) ** 2 + 0.2, 10 * share / 1000], abs=1e-3)


@pytest.mark.parametrize("name", ["efficienttrain", "efficienttrain++"])
@pytest.mark.parametrize(("full", "step"), [((32, 32), (8, 8)), ((64, 96), (16, 8)), ((300, 224), (32, 32))])
def test_any_number_of_steps_is_divided_without_gaps_and_ends_at_full_size(
    name: CurriculumName, full: tuple[int, int], step: tuple[int, int]
) -> None:
    weights = {stage.size: stage.steps / 1e6 for stage in plan_phases(name, 1_000_000, full, step)}
    for total in [*range(1, 40), 997]:
        stages = plan_phases(name, total, full, step)
        assert [stage.first for stage in stages] == [sum(s.steps for s in stages[:n]) for n in range(len(stages))]
        assert sum(stage.steps for stage in stages) == total
        assert stages[-1].size == full
        assert all(stage.steps > 0 for stage in stages)
        assert all(abs(stage.steps - total * weights[stage.size]) <= 1.01 for stage in stages)
        areas = [h * w for h, w in (stage.size for stage in stages)]
        assert areas == sorted(set(areas))
        for size in (stage.size for stage in stages[:-1]):
            sides = zip(size, full, step, strict=True)
            assert all(side % multiple == 0 or side == whole for side, whole, multiple in sides)


def test_sides_shrink_each_for_itself() -> None:
    sizes = [stage.size for stage in plan_phases("efficienttrain", 100, (96, 160), (8, 16))]
    assert sizes == [(72, 112), (80, 144), (96, 160)]  # 68.6 x 114.3 and 82.3 x 137.1, rounded


def rotation() -> PretextTask:
    return create_task({"name": "rotation"}, create_backbone("resnet18", size=64, **RESNET))


def test_each_step_has_its_size_and_the_announcement_says_so() -> None:
    curriculum = create_curriculum("efficienttrain", rotation(), 10)
    assert curriculum is not None
    assert [curriculum.size(step) for step in range(10)] == [(48, 48)] * 6 + [(56, 56)] * 2 + [(64, 64)] * 2
    said = "efficienttrain: 48x48 in steps 1 to 6, 56x56 in steps 7 to 8, 64x64 in steps 9 to 10; about 69 %"
    assert str(curriculum).replace("%", " %").startswith(said)
    assert create_curriculum(None, rotation(), 10) is None


def test_images_of_full_size_shrink_and_everything_else_stays() -> None:
    curriculum = create_curriculum("efficienttrain", rotation(), 10)
    assert curriculum is not None
    generator = torch.Generator().manual_seed(0)
    batch = {
        "globals": torch.randint(0, 256, (2, 2, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "locals": torch.randint(0, 256, (2, 4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "mask": torch.ones(2, 1, 64, 64, dtype=torch.uint8),
        "boxes": torch.rand(2, 2, 4),
        "index": torch.arange(2),
    }
    smaller = curriculum.apply(batch, 0)
    assert smaller["globals"].shape == (2, 2, 3, 48, 48)
    assert smaller["globals"].dtype == torch.float32
    assert torch.equal(smaller["globals"], low_frequencies(batch["globals"], (48, 48)) / 255)
    assert torch.allclose(smaller["globals"].mean(), batch["globals"].float().mean() / 255, atol=1e-5)
    assert all(smaller[name] is batch[name] for name in batch.keys() - {"globals"})
    assert curriculum.apply(batch, 8) is batch, "the last stage sees what the loader gave"
    with pytest.raises(ConfigError, match=r"engine.curriculum: no images of the batch have the network's 64x64"):
        curriculum.apply({"locals": batch["locals"]}, 0)


@pytest.mark.parametrize("task", ["mae", "simmim"])
def test_masked_tasks_get_what_they_take_for_normalized(task: str) -> None:
    small = {"decoder": {"dim": 16, "depth": 1, "heads": 2}} if task == "mae" else {}
    backbone = create_backbone("vit_tiny_patch16_224", dynamic_img_size=True, **VIT)
    backbone.set_statistics((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    model = create_task({"name": task, **small}, backbone)
    curriculum = create_curriculum("efficienttrain", model, 10)
    assert curriculum is not None
    flat = torch.full((2, 3, 64, 64), 102, dtype=torch.uint8)
    images = model.images_of(curriculum.apply({"image": flat}, 0))  # type: ignore[operator]
    assert images.shape == (2, 3, 48, 48)
    expected = (0.4 - torch.tensor((0.4, 0.5, 0.6))) / torch.tensor((0.2, 0.3, 0.2))
    assert torch.allclose(images, expected.view(1, 3, 1, 1).expand_as(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_224", VIT, r"takes no images of 48x48 \(.*\); set backbone.kwargs.dynamic_img_size=true"),
        ("vit_relpos_small_patch16_224", VIT, r"takes no images of 48x48 .*; take a network for any size"),
        ("resnet18", {"size": 32}, r"no smaller size for images of 32x32 \(multiples of 32x32, 10 steps\)"),
    ],
)
def test_networks_that_cannot_say_what_to_change(name: str, arguments: dict[str, Any], message: str) -> None:
    task = create_task({"name": "rotation"}, create_backbone(name, **arguments))
    with pytest.raises(ConfigError, match=r"engine.curriculum: .*" + message):
        create_curriculum("efficienttrain", task, 10)


def test_a_task_can_refuse_small_images_or_all_but_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", dynamic_img_size=True, **(VIT | {"patch_size": 16}))
    decoder = {"dim": 16, "depth": 1, "heads": 2}
    masked = create_task({"name": "mae", "mask_ratio": 0.9, "decoder": decoder}, backbone)
    with pytest.raises(ConfigError, match=r"engine.curriculum: images of 32x32 do not fit: task.mask_ratio: 0.9 lea"):
        create_curriculum("efficienttrain++", masked, 100)
    task = rotation()
    monkeypatch.setattr(task, "size_step", lambda: None)
    with pytest.raises(ConfigError, match=r"engine.curriculum: Rotation needs images of the full size; set engine"):
        create_curriculum("efficienttrain", task, 10)


def test_one_step_is_at_full_size_and_too_few_for_a_curriculum() -> None:
    with pytest.raises(ConfigError, match=r"no smaller size for images of 64x64 \(multiples of 8x8, 1 steps\)"):
        create_curriculum("efficienttrain", rotation(), 1)


def test_sizes_are_multiples_of_what_backbone_and_task_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rotation().size_step() == (8, 8)
    assert create_backbone("resnet18", size=64, channels=[4, 4, 4, 4], stem_width=4).size_step() == (32, 32)
    vit = create_backbone("vit_tiny_patch16_224", dynamic_img_size=True, **VIT)
    assert create_task({"name": "simmim", "mask_unit": 16}, vit).size_step() == (16, 16)
    convnet = create_backbone("convnext_atto", size=128, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    assert create_task({"name": "spark", "mask_unit": 64, "decoder": {"width": 32}}, convnet).size_step() == (64, 64)
    monkeypatch.setattr(vit, "size_step", lambda: (8, 16))
    assert create_task({"name": "rotation"}, vit).size_step() == (16, 16), "squares stay squares"
    assert create_task({"name": "rotation", "angles": 2}, vit).size_step() == (8, 16)


def test_the_recipe_differs_from_the_plain_one_in_the_curriculum_alone() -> None:
    plain, curriculum = (
        compose_settings("pretrain", [f"recipe=cifar10/rotation_resnet18{name}", "data.path=cifar10"], PretrainConfig)
        for name in ("", "_efficienttrain")
    )
    assert plain.engine.curriculum is None
    assert curriculum == plain.model_copy(
        update={"engine": plain.engine.model_copy(update={"curriculum": "efficienttrain"})}
    )
    word = compose_settings("pretrain", ["task=rotation", "engine.curriculum=efficienttrain++"], PretrainConfig)
    assert word.engine.curriculum == "efficienttrain++"
