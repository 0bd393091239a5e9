"""SimMIM against the authors' implementation: its two ViTs and its Swin, every result and every gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from unlabeled.pretext.masked_image.simmim import SimMIM, SimMIMConfig
from unlabeled.pretext.masked_image.simmim_names import reference_names
from unlabeled.ssl.backbones.backbone import Backbone

RESULT, GRADIENT, LOSS = 1e-5, 2e-5, 1e-5
PAIRS = ["simmim_vit", "simmim_vit_ape", "simmim_swin"]


def model(config: dict[str, Any]) -> nn.Module:
    common = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["in_channels"],
        "embed_dim": config["encoder_dim"],
        "mlp_ratio": config["mlp_ratio"],
        "norm_layer": partial(nn.LayerNorm, eps=config["norm_eps"]),
        "num_classes": 0,
        "drop_path_rate": 0.0,
    }
    if "stage_depths" in config:
        heads = tuple(config["stage_heads"])
        return SwinTransformer(
            depths=tuple(config["stage_depths"]), num_heads=heads, window_size=config["window_size"], **common
        )
    common |= {"depth": config["encoder_depth"], "num_heads": config["encoder_heads"], "global_pool": "token"}
    scale = 0.1 if config["layer_scale"] else None
    if config["absolute_position_embedding"]:
        return VisionTransformer(init_values=scale, **common)
    return Beit(
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=config["shared_relative_position_bias"],
        init_values=scale,
        **common,
    )


def build(pair) -> SimMIM:
    config = pair.config
    settings = {
        "mask_ratio": config["mask_ratio"],
        "mask_count": "official",
        "mask_unit": config["mask_patch_size"],
    }
    backbone = Backbone(model(config), size=(config["image_size"], config["image_size"]))
    task = SimMIM(SimMIMConfig.model_validate(settings), backbone)
    assert task.load_reference(pair.group("state")) == ([], [])
    assert task.mask_entry == "token"
    assert task.stride == config["encoder_stride"]
    return task


def noise_of(pair) -> Tensor:
    """Noise that hides the first cells of each recorded permutation: the first one has the largest."""
    permutation = pair["input/mask_permutation"]
    ranks = torch.arange(permutation.shape[1], 0, -1).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, ranks).float()


def patches(task: SimMIM) -> tuple[int, int]:
    """Patches along the sides of a cell of the mask."""
    return task.cell[0] // task.stem.patch[0], task.cell[1] // task.stem.patch[1]


def gradient(task: SimMIM, name: str) -> Tensor:
    """Of our parameter with the official name `name`, in the authors' shape."""
    own, parameters = reference_names(task), dict(task.named_parameters())
    if name in own:
        return parameters[own[name]].grad
    joined = parameters[own[name.replace("q_bias", "qkv.bias").replace("v_bias", "qkv.bias")]].grad
    return joined.chunk(3)[0 if name.endswith("q_bias") else 2]  # the file's network has no bias of keys


def watched(task: SimMIM) -> dict[str, nn.Module]:
    """Name of an expected result → the module whose output it is."""
    net = task.backbone.model
    if not isinstance(net, SwinTransformer):
        return {"tokens_after_block0": net.blocks[0]}
    first, last = net.layers[0].blocks, len(net.layers) - 1
    found = dict(zip(("tokens_after_first_block", "tokens_after_second_block"), first, strict=False))
    for index, layer in enumerate(net.layers):
        # the authors' stages end with the patch merging that begins timm's next stage
        found[f"stage{index}_output"] = layer if index == last else net.layers[index + 1].downsample
    return found


def check_mask(task: SimMIM, pair) -> None:
    masking = task.mask(pair["input/images"], noise_of(pair))
    for name in ("expect/mask", "input/mask"):
        pair.assert_close(name, ~masking.enlarged(patches(task)), 0)


def check_results(task: SimMIM, pair) -> None:
    images = pair["input/images"]
    masking = task.mask(images, noise_of(pair))
    net, seen = task.backbone.model, {}
    hooks = [
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
        for name, module in watched(task).items()
    ]
    with torch.no_grad():
        features, drawn = task.encode(images, masking), task.reconstruct(images, masking)
        grid = (images.shape[-2] // task.stem.patch[0], images.shape[-1] // task.stem.patch[1])
        seen["tokens_before_mask"] = task.stem.tokens(net.get_submodule(task.stem.name)(images), grid)
        if getattr(net, "rel_pos_bias", None) is not None:
            pair.assert_close("expect/relative_position_bias", net.rel_pos_bias(), RESULT)
    for hook in hooks:
        hook.remove()
    for name, result in seen.items():
        pair.assert_close(f"expect/{name}", result.flatten(1, 2) if result.ndim == 4 else result, RESULT)
    pair.assert_close("expect/encoder_output", features, RESULT)
    pair.assert_close("expect/reconstruction", drawn, RESULT)


def check_loss_and_gradients(task: SimMIM, pair) -> None:
    loss = task.train()({"image": pair["input/images"]}, noise=noise_of(pair)).loss
    loss.backward()
    expected = pair["expect/loss"].item()
    assert abs(loss.item() - expected) <= LOSS * max(1, abs(expected))
    assert abs(loss.item() - pair.meta["losses_float64"]["expect/loss"]) <= LOSS * max(1, abs(expected))
    names = [name for name in pair.tensors if name.startswith("grad/")]
    assert names
    for name in names:
        pair.assert_close(name, gradient(task, name.removeprefix("grad/")), GRADIENT)


@pytest.mark.parametrize("name", PAIRS)
def test_masks_results_loss_and_gradients(golden, name):
    pair = golden(name)
    task = build(pair)
    check_mask(task, pair)
    check_results(task, pair)
    check_loss_and_gradients(task, pair)
    assert pair.unused() == []


@pytest.mark.parametrize("name", PAIRS)
def test_in_double_precision(golden, name):
    pair = golden(name)
    loss = build(pair).double()({"image": pair["input/images"].double()}, noise=noise_of(pair)).loss
    # The state is float32 numbers; the arithmetic on them is exact to rounding here.
    assert loss.item() == pytest.approx(pair.meta["losses_float64"]["expect/loss"], abs=1e-6)
