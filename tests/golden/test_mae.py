"""MAE against the authors' implementation: every result and every gradient of the golden pair."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from unlabeled.pretext.masked_image.mae import MAE, MAEConfig
from unlabeled.pretext.masked_image.masked_image import cell_targets, unpatchify
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import random_masking
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder

RESULT, GRADIENT, LOSS = 1e-5, 2e-5, 1e-5
NAMES = {"mask_token": "decoder.mask_token", "decoder_pred.bias": "decoder.pred.bias"}


@pytest.fixture(scope="module")
def pair(golden):
    return golden("mae")


def build(pair, norm_pix: bool) -> MAE:
    config = pair.config
    model = VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["in_channels"],
        embed_dim=config["encoder_dim"],
        depth=config["encoder_depth"],
        num_heads=config["encoder_heads"],
        mlp_ratio=config["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        num_classes=0,
    )
    settings = {
        "mask_ratio": config["mask_ratio"],
        "mask_count": "official",
        "norm_pix": norm_pix,
        "decoder": {
            "dim": config["decoder_dim"],
            "depth": config["decoder_depth"],
            "heads": config["decoder_heads"],
            "mlp_ratio": config["mlp_ratio"],
            "norm_eps": config["norm_eps"],
        },
    }
    size = (config["image_size"], config["image_size"])
    task = MAE(MAEConfig.model_validate(settings), Backbone(model, size=size))
    assert task.load_reference(pair.group("state")) == ([], [])
    return task


def parameter(task: MAE, reference: str) -> Tensor:
    return dict(task.named_parameters())[NAMES.get(reference, f"backbone.model.{reference}")]


def test_state_is_what_the_task_holds(pair):
    task = build(pair, norm_pix=True)
    state = pair.group("state")
    assert torch.equal(task.decoder.blocks[0].attn.qkv.weight, state["decoder_blocks.0.attn.qkv.weight"])
    torch.testing.assert_close(task.decoder.positions, state["decoder_pos_embed"][0, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(task.backbone.model.pos_embed.data, state["pos_embed"], atol=0, rtol=0)
    assert not task.backbone.model.pos_embed.requires_grad


def test_results(pair):
    task = build(pair, norm_pix=True)
    images, noise = pair["input/images"], pair["input/noise"]
    masking = random_masking(noise, pair["expect/ids_keep"].shape[1], task.decoder.grid)
    for name in ("ids_keep", "ids_restore"):
        pair.assert_close(f"expect/{name}", getattr(masking, name), 0)
    for name in ("expect/mask", "input/mask"):
        pair.assert_close(name, ~masking.visible.flatten(1), 0)

    seen: dict[str, Tensor] = {}
    task.backbone.model.blocks[0].register_forward_hook(lambda *call: seen.update(block0=call[2]))
    task.decoder.embed.register_forward_hook(lambda *call: seen.update(embedded=call[2]))
    with torch.no_grad():
        latent, prefix = TokenEncoder(task.backbone).encode(images, masking.ids_keep)
        predictions = task.decoder.predict_all(latent, masking)
    assert prefix == 1
    pair.assert_close("expect/tokens_after_block0", seen["block0"], RESULT)
    pair.assert_close("expect/latent", latent, RESULT)
    pair.assert_close("expect/decoder_input_visible", seen["embedded"], RESULT)
    pair.assert_close("expect/pred", predictions, RESULT)
    pair.assert_close("expect/pred_image", unpatchify(predictions, task.cell, task.decoder.grid), RESULT)

    everything = torch.arange(noise.shape[1]).expand_as(noise)
    pair.assert_close("expect/target_norm_pix", cell_targets(images, task.cell, everything), RESULT)
    pair.assert_close("expect/target_raw", cell_targets(images, task.cell, everything, norm_pix=False), RESULT)


@pytest.mark.parametrize(
    ("norm_pix", "loss_name", "gradients"),
    [(True, "expect/loss_norm_pix", "grad"), (False, "expect/loss_raw", "grad_raw")],
)
def test_loss_and_gradients(pair, norm_pix, loss_name, gradients):
    task = build(pair, norm_pix).train()
    loss = task({"image": pair["input/images"]}, noise=pair["input/noise"]).loss
    loss.backward()
    expected = pair[loss_name].item()
    assert abs(loss.item() - expected) <= LOSS * max(1, abs(expected))
    assert abs(loss.item() - pair.meta["losses_float64"][loss_name]) <= LOSS * max(1, abs(expected))
    names = [name for name in pair.tensors if name.startswith(f"{gradients}/")]
    assert names
    for name in names:
        pair.assert_close(name, parameter(task, name.partition("/")[2]).grad, GRADIENT)


def test_in_double_precision(pair):
    task = build(pair, norm_pix=True).double()
    loss = task({"image": pair["input/images"].double()}, noise=pair["input/noise"]).loss
    # The state and the tables are float32 numbers; the arithmetic on them is exact to rounding here.
    assert loss.item() == pytest.approx(pair.meta["losses_float64"]["expect/loss_norm_pix"], abs=1e-6)


def test_no_tensor_was_left_out(pair):
    build(pair, norm_pix=True)
    for prefix in ("grad", "grad_raw"):
        for name in pair.group(prefix):
            assert NAMES.get(name, f"backbone.model.{name}") in dict(build(pair, True).named_parameters())
    known = {"ids_keep", "ids_restore", "mask", "tokens_after_block0", "latent", "decoder_input_visible", "pred"}
    known |= {"pred_image", "target_norm_pix", "target_raw", "loss_norm_pix", "loss_raw"}
    assert set(pair.group("expect")) == known
    assert set(pair.group("input")) == {"images", "noise", "mask"}
    assert pair.unused() == []
