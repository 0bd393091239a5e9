"""Two crops of one image, and what SimCLR, BYOL and VICReg do with them alike."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretext.common.views import Colors
from unlabeled.pretext.registry import create_task, task_config
from unlabeled.pretext.two_views.two_views import TwoViewTask
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

TASKS = ["byol", "simclr", "vicreg"]
PLAIN = {"jitter": 0.0, "gray": 0.0, "solarize": 0.0}


def make(name: str, size: int | tuple[int, int] = 32, **settings) -> TwoViewTask:
    torch.manual_seed(0)
    task = create_task({"name": name, "hidden": 24, "dim": 12, **settings}, create_backbone("test_resnet", size=size))
    assert isinstance(task, TwoViewTask)
    return task


def batch_of(count: int = 4, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"views": torch.randint(0, 256, (count, 2, 3, *size), generator=generator, dtype=torch.uint8)}


def views_of(task: TwoViewTask, image: Tensor) -> Tensor:
    return type(task).views(task.config, task.backbone)(image)["views"]


@pytest.mark.parametrize("size", [32, (32, 64)])
@pytest.mark.parametrize("name", TASKS)
def test_views_are_two_different_crops_of_the_backbones_size(name, size):
    task = make(name, size)
    views = pickle.loads(pickle.dumps(type(task).views(task.config, task.backbone)))
    for shape in ((40, 57), (9, 8), (200, 100)):
        found = views(torch.randint(0, 256, (3, *shape), dtype=torch.uint8))["views"]
        assert (found.shape, found.dtype) == ((2, 3, *task.backbone.input_size), torch.uint8)
        assert not torch.equal(found[0], found[1])
    assert task(batch_of(size=task.backbone.input_size)).loss.isfinite()


@pytest.mark.parametrize(("blur", "size", "sharp"), [("auto", 64, True), ("auto", 96, False), (True, 64, False)])
def test_views_of_up_to_64_pixels_stay_sharp_by_themselves(blur, size, sharp):
    colors = {**PLAIN, "blur": 1.0, "sigma": (1.0, 2.0)}
    task = make("byol", size, blur=blur, crop_scale=(1, 1), flip=0, first=colors, second=colors)
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    assert all(torch.equal(view, image) == sharp for view in views_of(task, image))


def test_blur_can_be_switched_off_at_any_size():
    task = make("byol", 96, blur=False, crop_scale=(1, 1), flip=0, first=PLAIN, second=PLAIN)
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    assert all(torch.equal(view, image) for view in views_of(task, image))


def test_each_view_has_its_own_colors():
    task = make("vicreg", crop_scale=(1, 1), flip=0, first=PLAIN, second={**PLAIN, "solarize": 1.0})
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    first, second = views_of(task, image)
    assert torch.equal(first, image)
    assert torch.equal(second, torch.where(image < 128, image, 255 - image))


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("simclr", (0.8, 0.8, 0.8, 0.2, 0.5, 0.0), (0.8, 0.8, 0.8, 0.2, 0.5, 0.0)),
        ("byol", (0.4, 0.4, 0.2, 0.1, 1.0, 0.0), (0.4, 0.4, 0.2, 0.1, 0.1, 0.2)),
        ("vicreg", (0.4, 0.4, 0.2, 0.1, 1.0, 0.0), (0.4, 0.4, 0.2, 0.1, 0.1, 0.2)),
    ],
)
def test_colors_are_the_papers_and_keep_their_defaults_next_to_a_changed_one(name, first, second):
    fields = ("brightness", "contrast", "saturation", "hue", "blur", "solarize")
    for change in ({}, {"first": {"gray": 0.0}, "second": {"gray": 0.0}}):
        config = task_config({"name": name, **change})
        assert tuple(getattr(config.first, field) for field in fields) == first
        assert tuple(getattr(config.second, field) for field in fields) == second
        assert (config.first.jitter, config.first.gray) == (0.8, 0.0 if change else 0.2)
        Colors(config.first)


@pytest.mark.parametrize("name", TASKS)
def test_a_single_image_is_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=r"batch_size: \w+ got 1 image; give at least 2 to each process"):
        make(name)(batch_of(1))


@pytest.mark.parametrize("name", TASKS)
def test_impossible_settings_are_refused(name):
    with pytest.raises(ConfigError, match=r"crop_scale \[0.9, 0.5\] begins above its end"):
        task_config({"name": name, "crop_scale": [0.9, 0.5]})
    with pytest.raises(CapabilityError, match=r"it lacks pooled"):
        create_task({"name": name}, create_backbone("test_vit", size=32, global_pool=""))


@pytest.mark.parametrize("name", TASKS)
def test_features_are_detached_and_the_similarity_is_the_mean_cosine(name):
    task = make(name)
    output = task(batch_of())
    assert output.features is not None
    assert (output.features.shape, output.features.requires_grad) == ((4, 12), False)
    first, second = torch.randn(5, 3), torch.randn(5, 3)
    logged = task.output(output.loss, first, second).logs["similarity"]
    assert logged == pytest.approx(F.cosine_similarity(first, second).mean().item())


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_computed_in_float32_under_autocast(name):
    task, seen = make(name), []
    loss = task.negative_cosine if name == "byol" else task.loss
    loss.register_forward_pre_hook(
        lambda _, inputs: seen.extend((x.dtype, torch.is_autocast_enabled("cpu")) for x in inputs)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert task(batch_of()).loss.dtype == torch.float32
    assert set(seen) == {(torch.float32, False)}


@pytest.mark.parametrize("name", TASKS)
def test_constant_images_give_a_finite_loss_and_finite_gradients(name):
    task = make(name)
    output = task({"views": torch.full((4, 2, 3, 32, 32), 128, dtype=torch.uint8)})
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_the_image_of_views_shows_the_nearest_second_view_in_its_frame(monkeypatch: pytest.MonkeyPatch):
    task = make("simclr")
    batch = batch_of(3)
    directions = [torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])]  # second views of 1 and 2 exchanged
    monkeypatch.setattr(task, "embed", lambda images: directions.pop(0))
    modes = [module.training for module in task.modules()]
    image = task.visualize(batch)["views"]
    assert [module.training for module in task.modules()] == modes
    side = 96 + 2
    assert image.shape == (3, 3 * side + 2, 3 * side + 2)
    tiles = image[:, 2:, 2:].unfold(1, 96, side).unfold(2, 96, side).permute(1, 2, 0, 3, 4)  # (rows, columns, 3, ...)
    middle = slice(9, 87, 3)
    for row, found in enumerate((0, 2, 1)):
        shown = [batch["views"][row, 0], batch["views"][row, 1], batch["views"][found, 1]]
        for tile, view in zip(tiles[row], shown, strict=True):
            assert torch.equal(tile[:, middle, middle], view[:, 3:29, 3:29])
    green, red, again = (tiles[row, 2, :, 0, 0].tolist() for row in range(3))
    assert green != red == again
