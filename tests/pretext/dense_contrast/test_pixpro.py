"""PixPro and PixContrast against the paper's definitions, trap by trap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.dense_contrast.pixcontrast import PixContrast, PixContrastConfig, contrast
from unlabeled.pretext.dense_contrast.pixel_pairs import PixelMLP, PixelPairs
from unlabeled.pretext.dense_contrast.pixpro import (
    PixelPropagation,
    PixPro,
    PixProConfig,
    agreement,
    consistency,
    reference_names,
)
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CheckpointError, ConfigError

WHOLE = (0.0, 0.0, 1.0, 1.0)
SMALL = {"hidden_dim": 12, "feature_dim": 8}


def backbone(size: int | tuple[int, int] = 32) -> Backbone:
    return create_backbone("resnet18", size=size, channels=(8, 8, 8, 16), stem_width=8, output_stride=8)


def pixpro(size: int | tuple[int, int] = 32, **settings) -> PixPro:
    torch.manual_seed(0)
    return PixPro(PixProConfig(**SMALL | settings), backbone(size))


def pixcontrast(**settings) -> PixContrast:
    torch.manual_seed(0)
    return PixContrast(PixContrastConfig(**SMALL | settings), backbone())


def batch(images: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    views = torch.randint(0, 256, (images, 2, 3, *size), dtype=torch.uint8)
    corners = torch.rand(images, 2, 4)
    corners[..., 2:] = corners[..., :2] + 0.3 + 0.4 * corners[..., 2:]
    return {"views": views, "boxes": corners}


def maps(batch: int, channels: int, *grid: int) -> Tensor:
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(2))


# --- pixel propagation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("gamma", [2.0, 1.0])
def test_propagation_is_the_sum_of_the_paper(layers: int, gamma: float):
    torch.manual_seed(4)
    module = PixelPropagation(6, layers, gamma).eval()
    x = maps(2, 6, 3, 4)
    found = module(x).flatten(2)
    values = module.value_transform(x).flatten(2)
    for image in range(2):
        cells = x[image].flatten(1)
        for i in range(12):
            total = torch.zeros(6)
            for j in range(12):
                similarity = max(F.cosine_similarity(cells[:, i], cells[:, j], dim=0).item(), 0.0) ** gamma
                total += similarity * values[image, :, j] / values[image, :, j].norm()
            assert torch.allclose(found[image, :, i], total, atol=1e-5)


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


def test_consistency_is_the_mean_over_pairs_then_over_images():
    first, second = maps(3, 5, 2, 3), maps(3, 5, 3, 2).flip(0)
    positive = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(5)) < 0.3
    for image, found in enumerate(consistency(first, second, positive)):
        cosines = [
            F.cosine_similarity(first[image].flatten(1)[:, i], second[image].flatten(1)[:, j], dim=0).item()
            for i, j in positive[image].nonzero().tolist()
        ]
        assert found.item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_contrast_sums_partners_inside_the_logarithm(temperature: float):
    first, second = maps(3, 5, 2, 3), maps(3, 5, 3, 2).flip(0)
    positive = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(6)) < 0.3
    assert not positive.any(2).all()
    for image, found in enumerate(contrast(first, second, positive, temperature)):
        terms = []
        for i in range(6):
            cell = first[image].flatten(1)[:, i : i + 1]
            scores = (F.cosine_similarity(cell, second[image].flatten(1), dim=0) / temperature).exp()
            if positive[image, i].any():
                terms.append(-math.log(scores[positive[image, i]].sum().item() / scores.sum().item()))
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


def test_a_image_whose_views_do_not_meet_counts_in_the_mean():
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
    maps_ = task.feature_map(task.backbone, task.images_of(views)[0])
    assert torch.allclose(features, task.projector(maps_).mean((2, 3)), atol=1e-6)
    assert features.shape == (3, 8)
    assert not features.requires_grad


# --- checkpoints and names -------------------------------------------------------------------------------------------


def reference(task: PixPro) -> dict[str, Tensor]:
    return {
        f"module.{name}": torch.rand_like(task.state_dict()[own].float()) for name, own in reference_names(task).items()
    }


def test_official_checkpoint_with_and_without_its_parts():
    task = pixpro(instance_weight=1.0)
    state = reference(task)
    assert {name.split(".")[1] for name in state} == {
        "encoder", "encoder_k", "projector", "projector_k", "value_transform", "projector_instance",
        "projector_instance_k", "predictor",
    }  # fmt: skip
    assert "module.value_transform.weight" in state
    assert "module.predictor.linear1.weight" in state
    assert task.load_reference({"model": state, "epoch": torch.tensor(100)}) == ([], [])
    assert torch.equal(task.backbone.model.bn1.running_mean, state["module.encoder.bn1.running_mean"])
    assert torch.equal(task.teacher["projector"].linear1.bias, state["module.projector_k.linear1.bias"])

    bare = pixpro()
    missing, unexpected = bare.load_reference(state)
    assert missing == []
    assert {name.split(".")[0] for name in unexpected} == {"predictor", "projector_instance", "projector_instance_k"}

    without = {name: tensor for name, tensor in state.items() if "_k." not in name and "instance" not in name}
    task = pixpro(instance_weight=1.0)
    missing, unexpected = task.load_reference(without)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"projector_instance"}
    assert torch.equal(task.teacher["backbone"].model.conv1.weight, state["module.encoder.conv1.weight"])
    assert torch.equal(task.teacher["backbone"].model.bn1.running_var, state["module.encoder.bn1.running_var"])


def test_official_checkpoint_that_does_not_fit():
    state = reference(pixpro())
    state["module.projector.linear1.weight"] = torch.zeros(3, 16, 1, 1)
    with pytest.raises(CheckpointError, match=r"projector.linear1.weight is \(3, 16, 1, 1\) in the file and \(12, 16"):
        pixpro().load_reference(state)
    with pytest.raises(CheckpointError, match="PixContrast has no reference checkpoint layout"):
        pixcontrast().load_reference(state)


def test_parameters_of_the_published_network():
    """33.02 M trained, 65.98 M in all."""
    with torch.device("meta"):
        task = PixPro(PixProConfig(), create_backbone("resnet50", size=224))
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in task.parameters())
    assert (trained / 1e6, whole / 1e6) == pytest.approx((33.02, 65.98), abs=0.005)
    assert isinstance(task.projector, PixelMLP)
    assert task.feature_map.grid == (7, 7)


def test_created_by_name():
    task = create_task({"name": "pixcontrast", "temperature": 0.2, **SMALL}, backbone())
    assert isinstance(task, PixContrast)
    assert isinstance(task, PixelPairs)
    assert task.synced_statistics
    with pytest.raises(ConfigError, match=r"task.gamma"):
        create_task({"name": "pixpro", "gamma": 0}, backbone())
