"""SparK against the authors' implementation, on a ResNet and on a ConvNeXt: every tensor of the golden pairs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from unlabeled.pretext.masked_image.masked_image import cell_targets, patchify
from unlabeled.pretext.masked_image.spark import SparK, SparKConfig, reference_names
from unlabeled.ssl.backbones.backbone import Backbone


class Limits(NamedTuple):
    """Largest distances over the largest value; of a loss over max(1, |loss|)."""

    result: float
    gradient: float
    loss: float


LIMITS = {"resnet": Limits(1e-4, 3e-4, 5e-5), "convnext": Limits(1e-5, 2e-5, 1e-5)}
BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@pytest.fixture(scope="module", params=["spark_resnet", "spark_convnext"])
def pair(golden, request):
    return golden(request.param)


@pytest.fixture
def limits(pair) -> Limits:
    return LIMITS[pair.config["encoder"]]


def network(config) -> nn.Module:
    shape = {"num_classes": 0, "output_stride": config["total_stride"]}
    depths, channels = tuple(config["stage_depths"]), tuple(config["stage_channels"])
    if config["encoder"] == "resnet":
        block = BLOCKS[config["block"]]
        return with_stem(ResNet(block, depths, channels=channels, **shape), config["stem_channels"])
    scale = 1e-6 if config["layer_scale"] else None
    return ConvNeXt(depths=depths, dims=channels, ls_init_value=scale, norm_eps=config["layer_norm_eps"], **shape)


def with_stem(model: ResNet, channels: int) -> ResNet:
    """`model` with `channels` after its stem instead of 64, which timm gives every plain stem."""
    first = model.layer1[0]
    kernel, width = first.conv1.kernel_size, first.conv1.out_channels
    out = width * first.expansion
    model.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(channels)
    first.conv1 = nn.Conv2d(channels, width, kernel, padding=kernel[0] // 2, bias=False)
    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
    first.downsample = None if channels == out else shortcut
    return model


def build(pair) -> tuple[SparK, list[str]]:
    """The task with the pair's state, and the names that its state lacks."""
    config = pair.config
    settings = {
        "mask_ratio": config["mask_ratio"],
        "mask_count": "official",
        "levels": len(config["stage_channels"]),
        "decoder": {"width": config["decoder_width"]},
    }
    size = (config["image_size"], config["image_size"])
    task = SparK(SparKConfig.model_validate(settings), Backbone(network(config), size=size))
    missing, unexpected = task.load_reference(pair.group("state"))
    assert unexpected == []
    return task, missing


def check_loss(pair, name: str, loss: Tensor, limits: Limits) -> None:
    for expected in (pair[name].item(), pair.meta["losses_float64"][name]):
        assert abs(loss.item() - expected) <= limits.loss * max(1, abs(expected))


def test_state_is_what_the_task_holds(pair):
    task, missing = build(pair)
    final_norm = {"convnext": ["norm.weight", "norm.bias"], "resnet": []}[pair.config["encoder"]]
    assert missing == [f"sparse_encoder.sp_cnn.{name}" for name in final_norm]  # timm's, unused in pretraining
    norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {pair.config["batch_norm_momentum"]}
    assert {norm.eps for norm in norms} == {pair.config["batch_norm_eps"]}
    assert isinstance(task.densify.norms[0], nn.BatchNorm2d) == (pair.config["densify_norm"] == "bn")
    equal = task.densify.mask_tokens[0].shape[1] == pair.config["decoder_width"]
    assert isinstance(task.densify.projs[0], nn.Identity) == equal


@pytest.mark.parametrize("prefix", ["expect", "expect_eval"])
def test_encoder_features(pair, limits, prefix):
    task = build(pair)[0].train(prefix == "expect")
    images = pair["input/images"]
    masking = task.mask(images, pair["input/noise"])
    for name in ("expect/mask", "input/mask"):
        pair.assert_close(name, ~masking.visible, 0)
    with torch.no_grad():
        maps = task.sparse.maps(images, masking, task.levels)
    for stage, found in enumerate(reversed(maps)):
        pair.assert_close(f"{prefix}/stage{stage}_features", found.dense(), limits.result)


def test_densify_and_decoder(pair, limits):
    task = build(pair)[0].train()
    images = pair["input/images"]
    seen: dict[str, Tensor] = {}
    for level, (norm, projection) in enumerate(zip(task.densify.norms, task.densify.projs, strict=True)):
        norm.register_forward_hook(lambda *call, key=f"densify{level}_normed": seen.update({key: call[2].dense()}))
        projection.register_forward_hook(lambda *call, key=f"densify{level}_projected": seen.update({key: call[2]}))
    task.decoder.blocks[0].register_forward_hook(lambda *call: seen.update(decoder_block0=call[2]))
    with torch.no_grad():
        task.predict(images, task.mask(images, pair["input/noise"]))
    assert len(seen) == 2 * len(task.levels) + 1
    for name, value in seen.items():
        pair.assert_close(f"expect/{name}", value, limits.result)


@pytest.mark.parametrize("prefix", ["expect", "expect_eval"])
def test_reconstruction_and_loss(pair, limits, prefix):
    task = build(pair)[0].train(prefix == "expect")
    images, noise = pair["input/images"], pair["input/noise"]
    masking = task.mask(images, noise)
    with torch.no_grad():
        reconstruction = task.predict(images, masking)
        loss = build(pair)[0].train(prefix == "expect")({"image": images}, noise=noise).loss
    pair.assert_close(f"{prefix}/reconstruction", reconstruction, limits.result)
    target = cell_targets(images, task.cell, torch.arange(noise.shape[1]).expand_as(noise))
    pair.assert_close("expect/target_first_image", target[0], limits.result)
    errors = (patchify(reconstruction, task.cell) - target).square().mean(-1) * ~masking.visible.flatten(1)
    pair.assert_close(f"{prefix}/loss_per_patch", errors, limits.result)
    check_loss(pair, f"{prefix}/loss", loss, limits)


def test_gradients_and_running_statistics(pair, limits):
    task = build(pair)[0].train()
    names = reference_names(task.state_dict())
    task({"image": pair["input/images"]}, noise=pair["input/noise"]).loss.backward()
    parameters, buffers = dict(task.named_parameters()), dict(task.named_buffers())
    for name in pair.group("grad"):
        pair.assert_close(f"grad/{name}", parameters[names[name]].grad, limits.gradient)
    after = pair.group("after")
    assert set(after) == {name for name in names if name.endswith(("running_mean", "running_var"))}
    for name in after:
        pair.assert_close(f"after/{name}", buffers[names[name]], limits.result)


def test_no_tensor_was_left_out(pair):
    build(pair)
    levels = range(len(pair.config["stage_channels"]))
    known = {"loss", "reconstruction", "loss_per_patch"} | {f"stage{level}_features" for level in levels}
    assert set(pair.group("expect_eval")) == known
    known |= {f"densify{level}_{kind}" for level in levels for kind in ("normed", "projected")}
    assert set(pair.group("expect")) == known | {"mask", "decoder_block0", "target_first_image"}
    assert set(pair.group("input")) == {"images", "noise", "mask"}
    pair.group("grad"), pair.group("after")
    assert pair.unused() == []
