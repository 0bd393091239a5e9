"""PixPro against the authors' implementation, without and with its instance branch, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.teacher import cosine_momentum
from unlabeled.pretext.common.views import crop_box
from unlabeled.pretext.dense_contrast.pixel_pairs import cell_distances
from unlabeled.pretext.dense_contrast.pixpro import PixPro, PixProConfig, agreement, consistency, reference_names
from unlabeled.ssl.backbones.backbone import Backbone

RESULT, MOVED, GRADIENT, LOSS = 1e-4, 1e-6, 3e-4, 5e-5
"""Largest distances over the largest value; of losses over max(1, |loss|). MOVED: of parameters that the EMA moved."""
BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@pytest.fixture(scope="module", params=["pixpro", "pixpro_instance"])
def pair(golden, request):
    return golden(request.param)


def network(config) -> ResNet:
    """The authors' ResNet, which has another width after its stem than timm's."""
    block, stem = BLOCKS[config["block"]], config["stem_channels"]
    depths, top = tuple(config["stage_depths"]), config["encoder_dim"] // BLOCKS[config["block"]].expansion
    widths = tuple(top // 2 ** (len(depths) - 1 - stage) for stage in range(len(depths)))
    model = ResNet(block, depths, channels=widths, num_classes=0)
    first = model.layer1[0]
    kernel, out = first.conv1.kernel_size, widths[0] * block.expansion
    model.conv1 = nn.Conv2d(config["in_channels"], stem, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(stem)
    first.conv1 = nn.Conv2d(stem, widths[0], kernel, padding=kernel[0] // 2, bias=False)
    shortcut = nn.Sequential(nn.Conv2d(stem, out, 1, bias=False), nn.BatchNorm2d(out))
    first.downsample = None if stem == out else shortcut
    return model


def build(pair) -> PixPro:
    """The task with the state of the pair, in train mode."""
    config = pair.config
    assert config["clamp_min"] == 0
    backbone = Backbone(network(config), size=(config["view_size"], config["view_size"]))
    backbone.set_statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the pair's views are normalised already
    settings = PixProConfig(
        hidden_dim=config["hidden_dim"],
        feature_dim=config["feature_dim"],
        threshold=config["positive_distance"],
        momentum=config["base_momentum"],
        gamma=config["power"],
        transform_layers=config["value_transform_layers"],
        instance_weight=config["instance_loss_weight"],
    )
    task = PixPro(settings, backbone)
    assert task.load_reference({f"module.{name}": tensor for name, tensor in pair.group("state").items()}) == ([], [])
    return task.train()


def box(crop: list[int]) -> Tensor:
    top, left, height, width, rows, columns, flipped = crop
    found = crop_box(top, left, height, width, (rows, columns))
    return found[[2, 1, 0, 3]] if flipped else found


def batch(pair) -> dict[str, Tensor]:
    boxes = [torch.stack([box(view) for view in crops]) for crops in pair["input/crop_boxes"].tolist()]
    return {"views": torch.stack([pair["input/view1"], pair["input/view2"]], dim=1), "boxes": torch.stack(boxes)}


def momentum(pair) -> float:
    return cosine_momentum(pair.config["base_momentum"], 1.0, pair.config["step"] / pair.config["total_steps"])


def check_loss(pair, name: str, loss: Tensor) -> None:
    for expected in (pair[name].item(), pair.meta["losses_float64"].get(name, pair[name].item())):
        assert abs(loss.item() - expected) <= LOSS * max(1, abs(expected)), name


def test_settings_of_batch_norm_and_the_whole_state(pair):
    task = build(pair)
    norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {
        (pair.config["batch_norm_momentum"], pair.config["batch_norm_eps"])
    }
    state, ours = pair.group("state"), task.state_dict()
    assert set(reference_names(task)) == set(state)
    for reference, own in reference_names(task).items():
        assert torch.equal(ours[own], state[reference]), reference


def test_boxes_and_pairs(pair):
    boxes = batch(pair)["boxes"]
    for view in (0, 1):
        pair.assert_close(f"expect/coord{view + 1}", boxes[:, view], MOVED)
    grid = (pair.config["map_size"], pair.config["map_size"])
    pair.assert_close("expect/distance_1to2", cell_distances(boxes[:, 0], boxes[:, 1], grid, grid), RESULT)
    positive = build(pair).positive_pairs(boxes, grid)
    pair.assert_close("expect/positive_1to2", positive, 0)
    pair.assert_close("expect/positive_2to1", positive.transpose(1, 2), 0)


def test_the_student(pair):
    task = build(pair)
    with torch.no_grad():
        maps, projections = task.student_maps(task.images_of(batch(pair)))
        for view in (0, 1):
            pair.assert_close(f"expect/features_view{view + 1}", maps[view], RESULT)
            pair.assert_close(f"expect/projection_view{view + 1}", projections[view], RESULT)
            prediction = F.normalize(task.propagation(projections[view]), dim=1)
            pair.assert_close(f"expect/prediction_view{view + 1}", prediction, RESULT)
        pair.assert_close("expect/attention_view1", task.propagation.weights(projections[0]), RESULT)
        pair.assert_close("expect/propagated_view1", task.propagation(projections[0]), RESULT)


def test_the_teacher_after_its_update(pair):
    task = build(pair)
    pair.assert_close("expect/momentum", torch.tensor(momentum(pair)), MOVED)
    task.after_step(pair.config["step"] / pair.config["total_steps"])
    maps, keys = task.teacher_maps(task.images_of(batch(pair)))
    pair.assert_close("expect/key_features_view1", maps[0], RESULT)
    for view in (0, 1):
        pair.assert_close(f"expect/key_view{view + 1}", F.normalize(keys[view], dim=1), RESULT)


def test_similarities_and_the_terms_of_the_loss(pair):
    task = build(pair)
    positive = pair["expect/positive_1to2"].bool()
    predictions, keys = ([pair[f"expect/{name}_view{view}"] for view in (1, 2)] for name in ("prediction", "key"))
    similarity = torch.einsum("bcl,bcm->blm", predictions[0].flatten(2), keys[1].flatten(2))
    pair.assert_close("expect/similarity_1to2", similarity, RESULT)
    forth = consistency(predictions[0], keys[1], positive)
    back = consistency(predictions[1], keys[0], pair["expect/positive_2to1"].bool())
    pair.assert_close("expect/loss_per_image_1to2", forth, RESULT)
    check_loss(pair, "expect/loss_1to2", -2 * forth.mean())
    check_loss(pair, "expect/loss_2to1", -2 * back.mean())
    task.update_teacher(momentum(pair))
    output = task(batch(pair))
    pixel = -2 * forth.mean() - 2 * back.mean()
    assert output.logs["loss_pixel"].item() == pytest.approx(pixel.item(), abs=LOSS)
    check_loss(pair, "expect/loss", output.loss)


def test_the_instance_branch(pair):
    if not pair.config["instance_loss_weight"]:
        assert not any("instance" in name for name in pair.tensors)
        return
    task = build(pair)
    images = task.images_of(batch(pair))
    task.update_teacher(momentum(pair))
    with torch.no_grad():
        predictions = task.instance_predictions(task.student_maps(images)[0])
        keys = task.instance_keys(task.teacher_maps(images)[0])
    for view in (0, 1):
        pair.assert_close(f"expect/instance_prediction_view{view + 1}", predictions[view], RESULT)
        pair.assert_close(f"expect/instance_key_view{view + 1}", keys[view], RESULT)
    check_loss(pair, "expect/loss_instance", agreement(predictions, keys))


def test_gradients_and_values_after_the_step(pair):
    task = build(pair)
    names = reference_names(task)
    task.update_teacher(momentum(pair))
    task(batch(pair)).loss.backward()
    parameters, buffers = dict(task.named_parameters()), dict(task.named_buffers())
    for name in pair.group("grad"):
        pair.assert_close(f"grad/{name}", parameters[names[name]].grad, GRADIENT)
    for name in pair.group("after"):
        own = names[name]
        moved = own in parameters
        assert own.startswith("teacher.") or not moved
        pair.assert_close(f"after/{name}", (parameters if moved else buffers)[own], MOVED if moved else RESULT)


def test_no_tensor_was_left_out(pair):
    views = {f"{name}_view{view}" for view in (1, 2) for name in ("features", "projection", "prediction", "key")}
    both = {"coord1", "coord2", "loss_1to2", "loss_2to1", "positive_1to2", "positive_2to1", "momentum", "loss"}
    first = {"attention_view1", "propagated_view1", "key_features_view1"}
    forth = {"distance_1to2", "similarity_1to2", "loss_per_image_1to2"}
    known = views | both | first | forth
    if pair.config["instance_loss_weight"]:
        known |= {f"instance_{name}_view{view}" for view in (1, 2) for name in ("prediction", "key")}
        known |= {"loss_instance"}
    assert set(pair.group("expect")) == known
    assert set(pair.group("input")) == {"view1", "view2", "crop_boxes"}
    pair.group("state"), pair.group("grad"), pair.group("after")
    assert pair.unused() == []
