"""Pairs of cells, views, teacher and maps: what PixPro and PixContrast share, trap by trap."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.views import RandomCrop, cell_centers
from unlabeled.pretext.dense_contrast.pixcontrast import PixContrast, PixContrastConfig
from unlabeled.pretext.dense_contrast.pixel_pairs import (
    PixelPairsConfig,
    PixelPairViews,
    cell_diagonals,
    cell_distances,
)
from unlabeled.pretext.dense_contrast.pixpro import PixPro, PixProConfig, consistency
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

WHOLE = (0.0, 0.0, 1.0, 1.0)
QUARTER = (0.0, 0.0, 0.5, 0.5)
SMALL = {"hidden_dim": 12, "feature_dim": 8}


def backbone(size: int | tuple[int, int] = 32) -> Backbone:
    return create_backbone("resnet18", size=size, channels=(8, 8, 8, 16), stem_width=8, output_stride=8)


def pixpro(size: int | tuple[int, int] = 32, **settings) -> PixPro:
    torch.manual_seed(0)
    return PixPro(PixProConfig(**SMALL | settings), backbone(size))


def pixcontrast(**settings) -> PixContrast:
    torch.manual_seed(0)
    return PixContrast(PixContrastConfig(**SMALL | settings), backbone())


def batch(random_images: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    views = torch.randint(0, 256, (random_images, 2, 3, *size), dtype=torch.uint8)
    corners = torch.rand(random_images, 2, 4)
    corners[..., 2:] = corners[..., :2] + 0.3 + 0.4 * corners[..., 2:]
    return {"views": views, "boxes": corners}


def near(first: tuple[float, ...], second: tuple[float, ...], grid: tuple[int, int], threshold: float = 0.7) -> Tensor:
    return cell_distances(torch.tensor([first]), torch.tensor([second]), grid, grid)[0] < threshold


def maps(batch: int, channels: int, *grid: int) -> Tensor:
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(2))


# --- which cells belong together -------------------------------------------------------------------------------------


def test_a_hand_made_grid():
    """The whole image and its upper left quarter on 2x2 cells."""
    boxes = torch.tensor([WHOLE, QUARTER])
    assert cell_diagonals(boxes, (2, 2)).tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.125)])
    distances = cell_distances(boxes[:1], boxes[1:], (2, 2), (2, 2))[0]
    # centers 0.25 and 0.75 against 0.125 and 0.375, in both axes
    offsets = [[(0.125, 0.125), (0.125, 0.125), (0.125, 0.125), (0.125, 0.125)]]
    offsets += [[(0.625, 0.125), (0.375, 0.125), (0.625, 0.125), (0.375, 0.125)]]
    offsets += [[(0.125, 0.625), (0.125, 0.625), (0.125, 0.375), (0.125, 0.375)]]
    offsets += [[(0.625, 0.625), (0.375, 0.625), (0.625, 0.375), (0.375, 0.375)]]
    expected = torch.tensor(offsets).norm(dim=-1) / math.sqrt(0.5)
    assert torch.allclose(distances, expected)
    assert distances.min().item() == pytest.approx(0.25)
    back = cell_distances(boxes[1:], boxes[:1], (2, 2), (2, 2))[0]
    assert torch.allclose(back, distances.t())  # one mask, transposed, serves both directions


def test_the_unit_is_the_coarser_cell_also_of_different_grids():
    boxes = torch.tensor([WHOLE, QUARTER])
    distances = cell_distances(boxes[:1], boxes[1:], (1, 2), (3, 1))
    assert distances.shape == (1, 2, 3)
    offset = torch.tensor([0.25, 0.5]) - torch.tensor([0.25, 0.5 / 6])
    assert distances[0, 0, 0].item() == pytest.approx(offset.norm().item() / math.hypot(0.5, 1.0))


def test_the_threshold_itself_is_too_far():
    side = cell_distances(torch.tensor([WHOLE]), torch.tensor([WHOLE]), (2, 2), (2, 2))[0, 0, 1].item()
    assert side == pytest.approx(math.sqrt(0.5))
    boxes = torch.tensor([[WHOLE, WHOLE]])
    assert torch.equal(pixpro(threshold=side).positive_pairs(boxes, (2, 2))[0], torch.eye(4, dtype=torch.bool))
    assert int(pixpro(threshold=side + 1e-6).positive_pairs(boxes, (2, 2)).sum()) == 12


def test_equal_square_crops_pair_each_cell_with_itself_only():
    for grid in ((3, 3), (7, 7)):
        square = (0.2, 0.1, 0.7, 0.6)
        assert torch.equal(near(square, square, grid), torch.eye(grid[0] * grid[1], dtype=torch.bool))


@pytest.mark.parametrize(("height", "neighbors"), [(0.51, 0), (0.511, 2 * 7 * 6)])
def test_in_longer_crops_the_neighbor_on_the_short_axis_is_near_too(height: float, neighbors: int):
    """From a ratio of 1.0203 on: 1 / hypot(1, 1.0203) = 0.7."""
    box = (0.0, 0.0, 0.5, height)
    assert int(near(box, box, (7, 7)).sum()) == 49 + neighbors


def test_centers_lie_inside_the_crop_at_equal_steps():
    centers = cell_centers(torch.tensor([0.3, 0.1, 0.9, 0.4]), (7, 7)).view(7, 7, 2)
    for position in range(7):
        assert centers[0, position, 0].item() == pytest.approx(0.3 + (position + 0.5) * 0.6 / 7)
        assert centers[position, 0, 1].item() == pytest.approx(0.1 + (position + 0.5) * 0.3 / 7)


def test_a_mirrored_view_is_met_at_its_mirrored_cells():
    """The loss term is -2 with a signed box, and near -2/7 (one column of seven) with sorted corners."""
    features = maps(2, 256, 7, 7)
    box, mirrored = (0.2, 0.2, 0.8, 0.8), (0.8, 0.2, 0.2, 0.8)
    signed, sorted_ = (near(box, other, (7, 7)).expand(2, -1, -1) for other in (mirrored, box))
    assert -2 * consistency(features, features.flip(3), signed).mean().item() == pytest.approx(-2.0, abs=1e-6)
    same_place = F.cosine_similarity(features, features.flip(3)).mean((1, 2))
    without = consistency(features, features.flip(3), sorted_)
    assert torch.allclose(without, same_place, atol=1e-6)
    assert -0.35 < -2 * without.mean().item() < -0.2


def test_crops_of_photographs_have_as_many_pairs_as_the_authors():
    """Simulated with the authors' mask on 500x375 pixels: 115 of 2401 pairs near, 71 % of cells paired."""
    torch.manual_seed(3)
    crop, photo = RandomCrop((1, 1), scale=(0.08, 1.0)), torch.zeros((), dtype=torch.uint8).expand(3, 375, 500)
    boxes = torch.stack([crop(photo).box for _ in range(1600)]).view(-1, 2, 4)
    positive = cell_distances(boxes[:, 0], boxes[:, 1], (7, 7), (7, 7)) < 0.7
    assert positive.sum((1, 2)).float().mean().item() == pytest.approx(115, abs=9)
    assert positive.any(2).float().mean().item() == pytest.approx(0.71, abs=0.03)
    assert 0.01 < 1 - positive.flatten(1).any(1).float().mean().item() < 0.045  # 2.1 to 2.7 % do not meet at all


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_keeps_batch_norm_statistics_of_its_own():
    """Each step moves them twice by a tenth, to the teacher's means of view 1, then of view 2; never the student's."""
    task, views = pixpro().train(), batch()
    with torch.no_grad():
        task.teacher["backbone"].model.conv1.weight.mul_(2)
    teacher = task.teacher["backbone"].model
    images = task.images_of(views)
    means = [teacher.conv1(image).mean((0, 2, 3)).detach() for image in images]
    task(views)
    expected = 0.9 * 0.1 * means[0] + 0.1 * means[1]
    assert torch.allclose(teacher.bn1.running_mean, expected, atol=1e-6)
    assert torch.allclose(task.backbone.model.bn1.running_mean, expected / 2, atol=1e-6)
    task.update_teacher(0.5)
    assert torch.allclose(teacher.bn1.running_mean, expected, atol=1e-6)
    assert torch.allclose(teacher.conv1.weight, 1.5 * task.backbone.model.conv1.weight, atol=1e-6)


def test_only_after_step_moves_the_teacher():
    task = pixpro(instance_weight=1.0).train()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))

    def weights() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in task.teacher.parameters()]

    before = weights()
    task(batch()).loss.backward()
    task(batch())  # a second micro-step
    assert all(map(torch.equal, weights(), before))
    task.eval()
    state = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with torch.no_grad():
        task(batch())
    assert all(torch.equal(tensor, state[name]) for name, tensor in task.state_dict().items())
    task.after_step(1.0)
    assert all(torch.allclose(now, then) for now, then in zip(weights(), before, strict=True))  # momentum 1 at the end
    task.after_step(0.5)
    followed = [p for name in task.teacher for p in getattr(task, name).parameters()]
    for now, then, student in zip(weights(), before, followed, strict=True):
        assert torch.allclose(now, 0.995 * then + 0.005 * student, atol=1e-6)


def test_a_resumed_task_goes_on_with_the_same_momentum():
    first, second = pixpro(), pixpro()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    first.after_step(0.4)
    second.load_state_dict(first.state_dict())
    for task in (first, second):
        task.after_step(0.5)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_the_teacher_starts_equal_and_untrained():
    task = pixpro()
    assert torch.equal(
        task.teacher["backbone"].model.layer4[0].conv1.weight, task.backbone.model.layer4[0].conv1.weight
    )
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert not any(group.name.startswith("teacher") for group in task.parameter_groups())


def test_joint_passes_differ_only_in_what_batch_norm_sees():
    apart, joint = pixpro(instance_weight=1.0), pixpro(instance_weight=1.0, joint_passes=True)
    for _ in range(3):
        apart(batch())
    joint.load_state_dict(apart.state_dict())
    assert apart.eval()(batch()).loss.item() == pytest.approx(joint.eval()(batch()).loss.item(), abs=1e-5)
    assert abs(apart.train()(batch()).loss.item() - joint.train()(batch()).loss.item()) > 1e-4
    passes = {int(value) for name, value in joint.state_dict().items() if name.endswith("num_batches_tracked")}
    assert passes == {3 * 2 + 1}  # two a step before, one now


# --- backbones and views ---------------------------------------------------------------------------------------------


def test_a_map_below_three_cells_is_refused_with_a_remedy():
    with pytest.raises(
        CapabilityError, match=r"resnet18 cannot do PixPro: map -1 has 1x1 positions at 32x32 pixels, .*"
    ):
        PixPro(PixProConfig(), create_backbone("resnet18", size=32))
    with pytest.raises(
        CapabilityError, match=r"at least 3x3 are needed; set task.level=-3 \(4x4\), a smaller backbone"
    ):
        PixContrast(PixContrastConfig(), create_backbone("resnet18", size=32))
    with pytest.raises(ConfigError, match=r"task.level: resnet18 has no map 5; choose from -5 to 4"):
        pixpro(level=5)


def test_a_curriculum_may_not_go_below_three_cells_either():
    task = pixpro(64)
    task.require_size((24, 24))
    with pytest.raises(ConfigError, match=r"task.level: map -1 of resnet18 has 3x2 positions for images of 24x16, at"):
        task.require_size((24, 16))


def test_an_earlier_level_trains_no_later_layer():
    task = pixpro(level=-2)
    frozen = {
        name.split(".")[2] for name, p in task.named_parameters() if name.startswith("backbone") and not p.requires_grad
    }
    assert frozen == {"layer4"}
    images = task.images_of(batch())[0]
    assert torch.equal(task.eval().feature_map(task.backbone, images), task.backbone.maps(images, [-2])[0])
    task(batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.parameters())


def test_transformers_give_their_last_map_after_the_final_norm():
    vit = create_backbone("vit_tiny_patch16_224", size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    task = PixPro(PixProConfig(**SMALL), vit).eval()
    nn.init.constant_(vit.model.norm.bias, 2.0)
    images = task.images_of(batch())[0]
    found = task.feature_map(vit, images)
    tokens = vit.model.forward_features(images)[:, vit.model.num_prefix_tokens :]
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens, atol=1e-6)
    assert vit.model.norm.weight.requires_grad


def test_images_that_are_not_square():
    task = pixpro((32, 64))
    views = PixPro.views(task.config, task.backbone)(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8))
    assert views["views"].shape == (2, 3, 32, 64)
    assert task.feature_map.grid == (4, 8)
    output = task({name: torch.stack([tensor, tensor]) for name, tensor in views.items()})
    assert output.loss.isfinite()


def test_views_carry_their_boxes():
    torch.manual_seed(7)
    across = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    drawn = torch.stack([across, across.t(), across])
    plain = {"jitter": 0, "gray": 0, "blur": 0, "solarize": 0}
    config = PixelPairsConfig(first=plain, second=plain, flip=0.5, crop_scale=(0.2, 1.0))
    views = pickle.loads(pickle.dumps(PixelPairViews(config, (48, 48))))
    mirrored = 0
    for _ in range(8):
        found = views(drawn)
        assert (found["views"].shape, found["views"].dtype) == ((2, 3, 48, 48), torch.uint8)
        for image, box in zip(found["views"], found["boxes"], strict=True):
            cells = image[:2].float().unflatten(1, (4, 12)).unflatten(3, (4, 12)).mean((2, 4)) / 255
            assert (cells.flatten(1).t() - cell_centers(box, (4, 4))).abs().max() < 0.01
            mirrored += int(box[0] > box[2])
    assert 0 < mirrored < 16


def test_the_first_view_is_always_blurred_and_the_second_solarized_at_times():
    config = PixelPairsConfig()
    assert (config.first.blur, config.second.blur) == (1.0, 0.1)
    assert (config.first.solarize, config.second.solarize) == (0.0, 0.2)
    assert PixelPairsConfig.model_validate({"first": {"gray": 0}}).first.blur == 1.0
    jitter = config.first
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (jitter.jitter, jitter.gray, jitter.sigma) == (0.8, 0.2, (0.1, 2.0))


def blurred(drawn: Tensor, size: int, blur: bool | str) -> Tensor:
    """The whole image as the first view sees it, blurred or not."""
    plain = {"jitter": 0, "gray": 0}
    config = PixelPairsConfig(first=plain, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, blur=blur)
    return PixelPairViews(config, (size, size))(drawn)["views"][0]


@pytest.mark.parametrize(
    ("size", "blur", "expected"), [(64, "auto", False), (65, "auto", True), (64, True, True), (65, False, False)]
)
def test_small_views_are_not_blurred(size: int, blur: bool | str, expected: bool):
    torch.manual_seed(8)
    drawn = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    assert torch.equal(blurred(drawn, size, blur), drawn) != expected


def test_the_blur_is_drawn_again_each_time():
    torch.manual_seed(9)
    drawn = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    draws = []
    for seed in (1, 2, 1):  # the loader seeds each image of each epoch
        torch.manual_seed(seed)
        draws.append(blurred(drawn, 16, True))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_log_reports_that_there_is_no_blur(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        pixpro()
    assert "task.blur: views of 32x32 pixels are not blurred; set task.blur=true" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        pixpro(blur=False)
    assert "task.blur" not in caplog.text


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pixpro, pixcontrast])
def test_visualize_gives_partners_the_same_color(make):
    task = make()
    views = {"views": torch.zeros(2, 2, 3, 32, 32, dtype=torch.uint8), "boxes": torch.tensor([WHOLE]).repeat(2, 2, 1)}
    views["boxes"][0, 1] = torch.tensor([1.0, 0.0, 0.0, 1.0])  # mirrored
    views["boxes"][1] = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])  # side by side
    drawn = task.visualize(views)["pairs"]
    side = 96
    assert drawn.shape == (3, 2 * (side + 2) + 2, 2 * (side + 2) + 2)
    first, second = drawn[:, 2 : 2 + side, 2 : 2 + side], drawn[:, 2 : 2 + side, side + 4 : 2 * side + 4]
    assert torch.equal(first, second.flip(2))
    cells = first[:, 12::24, 12::24].flatten(1).t().unique(dim=0)
    assert len(cells) == 16
    below = drawn[:, side + 4 : 2 * side + 4]
    colored = (
        below[:, 12::24, 2 : 2 + side][:, :, 12::24].sum(0) > 0,
        below[:, 12::24, side + 4 : -2][:, :, 12::24].sum(0) > 0,
    )
    assert not colored[0][:, 0].any()  # far from the other view's part
    assert not colored[1][:, 3].any()
