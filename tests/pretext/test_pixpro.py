"""PixPro and PixContrast against the paper's definitions, trap by trap."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.pixel_pairs import (
    PixelMLP,
    PixelPairs,
    PixelPairsConfig,
    PixelPairViews,
    cell_diagonals,
    cell_distances,
)
from unlabeled.pretext.common.views import RandomCrop, cell_centres
from unlabeled.pretext.pixcontrast import PixContrast, PixContrastConfig, contrast
from unlabeled.pretext.pixpro import PixelPropagation, PixPro, PixProConfig, agreement, consistency, official_names
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbone import Backbone, create_backbone
from unlabeled.ssl.errors import CapabilityError, CheckpointError, ConfigError

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


def batch(pictures: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    views = torch.randint(0, 256, (pictures, 2, 3, *size), dtype=torch.uint8)
    corners = torch.rand(pictures, 2, 4)
    corners[..., 2:] = corners[..., :2] + 0.3 + 0.4 * corners[..., 2:]
    return {"views": views, "boxes": corners}


def near(first: tuple[float, ...], second: tuple[float, ...], grid: tuple[int, int], threshold: float = 0.7) -> Tensor:
    return cell_distances(torch.tensor([first]), torch.tensor([second]), grid, grid)[0] < threshold


def maps(batch: int, channels: int, *grid: int) -> Tensor:
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(2))


# --- which cells belong together -------------------------------------------------------------------------------------


def test_a_hand_made_grid():
    """The whole picture and its upper left quarter on 2x2 cells."""
    boxes = torch.tensor([WHOLE, QUARTER])
    assert cell_diagonals(boxes, (2, 2)).tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.125)])
    distances = cell_distances(boxes[:1], boxes[1:], (2, 2), (2, 2))[0]
    steps = [0.125, 0.375, 0.625]  # centres 0.25, 0.75 against 0.125, 0.375, in both axes
    expected = [
        [math.hypot(x, y) / math.sqrt(0.5) for y in (steps[0], 0.125) for x in (steps[0], 0.125)],
        [math.hypot(x, y) / math.sqrt(0.5) for y in (0.125, 0.125) for x in (0.625, 0.375)],
        [math.hypot(x, y) / math.sqrt(0.5) for y in (0.625, 0.375) for x in (0.125, 0.125)],
        [math.hypot(x, y) / math.sqrt(0.5) for y in (0.625, 0.375) for x in (0.625, 0.375)],
    ]
    assert torch.allclose(distances, torch.tensor(expected))
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


@pytest.mark.parametrize(("height", "neighbours"), [(0.51, 0), (0.511, 2 * 7 * 6)])
def test_in_longer_crops_the_neighbour_on_the_short_axis_is_near_too(height: float, neighbours: int):
    """From a ratio of 1.0203 on: 1 / hypot(1, 1.0203) = 0.7."""
    box = (0.0, 0.0, 0.5, height)
    assert int(near(box, box, (7, 7)).sum()) == 49 + neighbours


def test_centres_lie_inside_the_crop_at_equal_steps():
    centres = cell_centres(torch.tensor([0.3, 0.1, 0.9, 0.4]), (7, 7)).view(7, 7, 2)
    for place in range(7):
        assert centres[0, place, 0].item() == pytest.approx(0.3 + (place + 0.5) * 0.6 / 7)
        assert centres[place, 0, 1].item() == pytest.approx(0.1 + (place + 0.5) * 0.3 / 7)


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


# --- pixel propagation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("gamma", [2.0, 1.0])
def test_propagation_is_the_sum_of_the_paper(layers: int, gamma: float):
    torch.manual_seed(4)
    module = PixelPropagation(6, layers, gamma).eval()
    x = maps(2, 6, 3, 4)
    found = module(x).flatten(2)
    values = module.value_transform(x).flatten(2)
    for picture in range(2):
        cells = x[picture].flatten(1)
        for i in range(12):
            total = torch.zeros(6)
            for j in range(12):
                similarity = max(F.cosine_similarity(cells[:, i], cells[:, j], dim=0).item(), 0.0) ** gamma
                total += similarity * values[picture, :, j] / values[picture, :, j].norm()
            assert torch.allclose(found[picture, :, i], total, atol=1e-5)


def test_similarities_are_clamped_before_the_power():
    cell = maps(1, 5, 1, 1)
    weights = PixelPropagation(5, 0, 2.0).weights(torch.cat([cell, -cell], dim=3))
    assert torch.allclose(weights, torch.eye(2).expand(1, 2, 2))


def test_gradients_pass_through_the_similarities():
    module = PixelPropagation(4, 1, 2.0)
    nn.init.zeros_(module.value_transform.weight)  # what is summed up does not depend on the projections
    x = maps(1, 4, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    assert gradient.abs().max() > 1e-3
    module = PixelPropagation(4, 1, 2.0).double()
    assert torch.autograd.gradcheck(module, maps(1, 4, 2, 2).double().requires_grad_())


def test_a_power_below_one_is_taken_away_from_zero():
    module, x = PixelPropagation(4, 0, 0.5), torch.eye(4).view(1, 4, 2, 2).requires_grad_()  # similarities of 0
    weights = module.weights(x)
    assert torch.allclose(weights, 0.001 + 0.999 * torch.eye(4), atol=1e-5)
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert gradient.isfinite().all()


# --- losses ----------------------------------------------------------------------------------------------------------


def test_consistency_is_the_mean_over_pairs_then_over_pictures():
    first, second = maps(3, 5, 2, 3), maps(3, 5, 3, 2).flip(0)
    positive = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(5)) < 0.3
    for picture, found in enumerate(consistency(first, second, positive)):
        cosines = [
            F.cosine_similarity(first[picture].flatten(1)[:, i], second[picture].flatten(1)[:, j], dim=0).item()
            for i, j in positive[picture].nonzero().tolist()
        ]
        assert found.item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_contrast_sums_partners_inside_the_logarithm(temperature: float):
    first, second = maps(3, 5, 2, 3), maps(3, 5, 3, 2).flip(0)
    positive = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(6)) < 0.3
    assert not positive.any(2).all()
    for picture, found in enumerate(contrast(first, second, positive, temperature)):
        terms = []
        for i in range(6):
            cell = first[picture].flatten(1)[:, i : i + 1]
            scores = (F.cosine_similarity(cell, second[picture].flatten(1), dim=0) / temperature).exp()
            if positive[picture, i].any():
                terms.append(-math.log(scores[positive[picture, i]].sum().item() / scores.sum().item()))
        assert found.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_contrast_of_equal_cells_counts_them():
    ones = torch.ones(1, 4, 2, 2)
    positive = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]], dtype=torch.bool)
    expected = (math.log(2) + math.log(4) + 0) / 3
    assert contrast(ones, ones, positive, 0.3).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [pixpro, pixcontrast])
def test_views_that_do_not_meet_give_zero_and_finite_gradients(make):
    task, views = make().train(), batch(2)
    views["boxes"] = torch.tensor([[[0.0, 0.0, 0.2, 0.2], [0.7, 0.7, 1.0, 1.0]]]).repeat(2, 1, 1)
    loss = task(views).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_a_picture_whose_views_do_not_meet_counts_in_the_mean():
    for loss in (consistency, lambda q, k, positive: contrast(q, k, positive, 0.3)):
        features, positive = maps(2, 4, 2, 2), torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
        whole = loss(features, features.flip(1), positive)
        positive[1] = False
        assert loss(features, features.flip(1), positive).tolist() == [whole[0].item(), 0.0]


def test_the_loss_is_minus_four_where_everything_agrees():
    task = pixpro().eval()
    for module in (task.projector.linear2, task.teacher["projector"].linear2, task.propagation.value_transform):
        nn.init.zeros_(module.weight)
        nn.init.ones_(module.bias)
    output = task(batch() | {"boxes": torch.tensor(WHOLE).expand(3, 2, 4)})
    assert output.loss.item() == pytest.approx(-4.0, abs=1e-5)
    assert (output.logs["positives"].item(), output.logs["overlap"].item()) == pytest.approx((1 / 16, 1.0))


def test_exchanging_the_views_changes_nothing():
    for task in (pixpro(instance_weight=0.5), pixcontrast()):
        views = batch()
        exchanged = {name: tensor.flip(1) for name, tensor in views.items()}
        assert task(exchanged).loss.item() == pytest.approx(task(views).loss.item(), abs=1e-5)


def test_the_instance_loss_is_that_of_byol():
    task, views = pixpro(instance_weight=0.5).train(), batch()
    images = task.images_of(views)
    student, teacher = task.student_maps(images)[0], task.teacher_maps(images)[0]
    q = [task.predictor(task.instance_projector(one)).mean((2, 3)) for one in student]
    k = [task.teacher["instance_projector"](one).mean((2, 3)) for one in teacher]
    cosines = F.cosine_similarity(q[0], k[1]).mean() + F.cosine_similarity(q[1], k[0]).mean()
    assert agreement([F.normalize(one) for one in q], [F.normalize(one) for one in k]).item() == pytest.approx(
        -2 * cosines.item(), abs=1e-5
    )
    output = task(views)
    assert output.logs["loss_instance"].item() == pytest.approx(-2 * cosines.item(), abs=1e-5)
    expected = output.logs["loss_pixel"] + 0.5 * output.logs["loss_instance"]
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert not hasattr(pixpro(), "predictor")


@pytest.mark.parametrize("make", [pixpro, pixcontrast])
def test_features_are_the_pooled_projections_of_one_view(make):
    task = make().eval()
    views = batch()
    features = task(views).features
    maps_ = task.level(task.backbone, task.images_of(views)[0])
    assert torch.allclose(features, task.projector(maps_).mean((2, 3)), atol=1e-6)
    assert features.shape == (3, 8)
    assert not features.requires_grad


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
    with pytest.raises(CapabilityError, match=r"resnet18 cannot do PixPro: map -1 has 1x1 places at 32x32 pixels, .*"):
        PixPro(PixProConfig(), create_backbone("resnet18", size=32))
    with pytest.raises(
        CapabilityError, match=r"at least 3x3 are needed; set task.level=-3 \(4x4\), a smaller backbone"
    ):
        PixContrast(PixContrastConfig(), create_backbone("resnet18", size=32))
    with pytest.raises(ConfigError, match=r"task.level: resnet18 has no map 5; choose from -5 to 4"):
        pixpro(level=5)


def test_an_earlier_level_trains_no_later_layer():
    task = pixpro(level=-2)
    frozen = {
        name.split(".")[2] for name, p in task.named_parameters() if name.startswith("backbone") and not p.requires_grad
    }
    assert frozen == {"layer4"}
    images = task.images_of(batch())[0]
    assert torch.equal(task.eval().level(task.backbone, images), task.backbone.maps(images, [-2])[0])
    task(batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.parameters())


def test_transformers_give_their_last_map_after_the_final_norm():
    vit = create_backbone("vit_tiny_patch16_224", size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    task = PixPro(PixProConfig(**SMALL), vit).eval()
    nn.init.constant_(vit.model.norm.bias, 2.0)
    images = task.images_of(batch())[0]
    found = task.level(vit, images)
    tokens = vit.model.forward_features(images)[:, vit.model.num_prefix_tokens :]
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens, atol=1e-6)
    assert vit.model.norm.weight.requires_grad


def test_pictures_that_are_not_square():
    task = pixpro((32, 64))
    views = PixPro.views(task.config, task.backbone)(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8))
    assert views["views"].shape == (2, 3, 32, 64)
    assert task.level.grid == (4, 8)
    output = task({name: torch.stack([tensor, tensor]) for name, tensor in views.items()})
    assert output.loss.isfinite()


def test_views_carry_their_boxes():
    torch.manual_seed(7)
    across = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    picture = torch.stack([across, across.t(), across])
    plain = {"jitter": 0, "gray": 0, "blur": 0, "solarize": 0}
    config = PixelPairsConfig(first=plain, second=plain, flip=0.5, crop_scale=(0.2, 1.0))
    views = pickle.loads(pickle.dumps(PixelPairViews(config, (48, 48))))
    mirrored = 0
    for _ in range(8):
        found = views(picture)
        assert (found["views"].shape, found["views"].dtype) == ((2, 3, 48, 48), torch.uint8)
        for image, box in zip(found["views"], found["boxes"], strict=True):
            cells = image[:2].float().unflatten(1, (4, 12)).unflatten(3, (4, 12)).mean((2, 4)) / 255
            assert (cells.flatten(1).t() - cell_centres(box, (4, 4))).abs().max() < 0.01
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


def blurred(picture: Tensor, size: int, blur: bool | str) -> Tensor:
    """The whole picture as the first view sees it, blurred or not."""
    plain = {"jitter": 0, "gray": 0}
    config = PixelPairsConfig(first=plain, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, blur=blur)
    return PixelPairViews(config, (size, size))(picture)["views"][0]


@pytest.mark.parametrize(
    ("size", "blur", "expected"), [(64, "auto", False), (65, "auto", True), (64, True, True), (65, False, False)]
)
def test_small_views_are_not_blurred(size: int, blur: bool | str, expected: bool):
    torch.manual_seed(8)
    picture = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    assert torch.equal(blurred(picture, size, blur), picture) != expected


def test_the_blur_is_drawn_anew_each_time():
    torch.manual_seed(9)
    picture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    draws = []
    for seed in (1, 2, 1):  # the loader seeds each picture of each epoch
        torch.manual_seed(seed)
        draws.append(blurred(picture, 16, True))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_that_there_is_no_blur_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        pixpro()
    assert "task.blur: views of 32x32 pixels are not blurred; set task.blur=true" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        pixpro(blur=False)
    assert "task.blur" not in caplog.text


# --- pictures and checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pixpro, pixcontrast])
def test_visualize_gives_partners_the_same_colour(make):
    task = make()
    views = {"views": torch.zeros(2, 2, 3, 32, 32, dtype=torch.uint8), "boxes": torch.tensor([WHOLE]).repeat(2, 2, 1)}
    views["boxes"][0, 1] = torch.tensor([1.0, 0.0, 0.0, 1.0])  # mirrored
    views["boxes"][1] = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])  # side by side
    picture = task.visualize(views)["pairs"]
    side = 96
    assert picture.shape == (3, 2 * (side + 2) + 2, 2 * (side + 2) + 2)
    first, second = picture[:, 2 : 2 + side, 2 : 2 + side], picture[:, 2 : 2 + side, side + 4 : 2 * side + 4]
    assert torch.equal(first, second.flip(2))
    cells = first[:, 12::24, 12::24].flatten(1).t().unique(dim=0)
    assert len(cells) == 16
    below = picture[:, side + 4 : 2 * side + 4]
    colored = (
        below[:, 12::24, 2 : 2 + side][:, :, 12::24].sum(0) > 0,
        below[:, 12::24, side + 4 : -2][:, :, 12::24].sum(0) > 0,
    )
    assert not colored[0][:, 0].any()  # far from the other view's part
    assert not colored[1][:, 3].any()


def official(task: PixPro) -> dict[str, Tensor]:
    return {
        f"module.{name}": torch.rand_like(task.state_dict()[own].float()) for name, own in official_names(task).items()
    }


def test_official_checkpoint_with_and_without_its_parts():
    task = pixpro(instance_weight=1.0)
    state = official(task)
    assert {name.split(".")[1] for name in state} == {
        "encoder", "encoder_k", "projector", "projector_k", "value_transform", "projector_instance",
        "projector_instance_k", "predictor",
    }  # fmt: skip
    assert "module.value_transform.weight" in state
    assert "module.predictor.linear1.weight" in state
    assert task.load_official({"model": state, "epoch": torch.tensor(100)}) == ([], [])
    assert torch.equal(task.backbone.model.bn1.running_mean, state["module.encoder.bn1.running_mean"])
    assert torch.equal(task.teacher["projector"].linear1.bias, state["module.projector_k.linear1.bias"])

    bare = pixpro()
    missing, unexpected = bare.load_official(state)
    assert missing == []
    assert {name.split(".")[0] for name in unexpected} == {"predictor", "projector_instance", "projector_instance_k"}

    without = {name: tensor for name, tensor in state.items() if "_k." not in name and "instance" not in name}
    task = pixpro(instance_weight=1.0)
    missing, unexpected = task.load_official(without)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"projector_instance"}
    assert torch.equal(task.teacher["backbone"].model.conv1.weight, state["module.encoder.conv1.weight"])
    assert torch.equal(task.teacher["backbone"].model.bn1.running_var, state["module.encoder.bn1.running_var"])


def test_official_checkpoint_that_does_not_fit():
    state = official(pixpro())
    state["module.projector.linear1.weight"] = torch.zeros(3, 16, 1, 1)
    with pytest.raises(CheckpointError, match=r"projector.linear1.weight is \(3, 16, 1, 1\) in the file and \(12, 16"):
        pixpro().load_official(state)
    with pytest.raises(CheckpointError, match="PixContrast has no official checkpoint layout"):
        pixcontrast().load_official(state)


def test_parameters_of_the_published_network():
    """33.02 M trained, 65.98 M in all."""
    with torch.device("meta"):
        task = PixPro(PixProConfig(), create_backbone("resnet50", size=224))
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in task.parameters())
    assert (trained / 1e6, whole / 1e6) == pytest.approx((33.02, 65.98), abs=0.005)
    assert isinstance(task.projector, PixelMLP)
    assert task.level.grid == (7, 7)


def test_created_by_name():
    task = create_task({"name": "pixcontrast", "temperature": 0.2, **SMALL}, backbone())
    assert isinstance(task, PixContrast)
    assert isinstance(task, PixelPairs)
    assert task.synced_statistics
    with pytest.raises(ConfigError, match=r"task.gamma"):
        create_task({"name": "pixpro", "gamma": 0}, backbone())
