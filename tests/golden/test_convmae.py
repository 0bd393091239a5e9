"""ConvMAE against the authors' implementation: every result and every gradient of the golden pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unlabeled.pretext.masked_image.convmae import ConvMAE, ConvMAEConfig
from unlabeled.pretext.masked_image.masked_image import cell_targets
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, random_masking
from unlabeled.ssl.backbones.masked.sparse.gathering import Cells, gather_tokens
from unlabeled.ssl.backbones.networks.convmae import ConvViT

RESULT, GRADIENT, LOSS = 1e-5, 2e-5, 1e-5
NAMES = {"mask_token": "decoder.mask_token", "decoder_pred.bias": "decoder.pred.bias"}
BOTH = pytest.mark.parametrize("execution", ["gathered", "dense"])


@pytest.fixture(scope="module")
def pair(golden):
    return golden("convmae")


def build(pair, norm_pix: bool, execution: str = "gathered") -> ConvMAE:
    config = pair.config
    assert config["depthwise_kernel"] == 5
    model = ConvViT(
        img_size=config["image_size"],
        patch_size=config["stage_patch_sizes"],
        in_chans=config["in_channels"],
        num_classes=0,
        dims=config["stage_dims"],
        depths=config["stage_depths"],
        num_heads=config["encoder_heads"],
        mlp_ratio=config["stage_mlp_ratios"],
        norm_eps=config["norm_eps"],
        conv_norm_eps=config["conv_stage_norm_eps"],
    )
    settings = {
        "mask_ratio": config["mask_ratio"],
        "mask_count": "official",
        "norm_pix": norm_pix,
        "execution": execution,
        "decoder": {
            "dim": config["decoder_dim"],
            "depth": config["decoder_depth"],
            "heads": config["decoder_heads"],
            "mlp_ratio": config["stage_mlp_ratios"][0],
            "norm_eps": config["norm_eps"],
        },
    }
    size = (config["image_size"], config["image_size"])
    task = ConvMAE(ConvMAEConfig.model_validate(settings), Backbone(model, size=size))
    assert task.load_reference(pair.group("state")) == ([], [])
    return task


def parameter(task: ConvMAE, reference: str) -> Tensor:
    own = dict(task.named_parameters())
    return own[next(name for name in (NAMES.get(reference), reference, f"backbone.model.{reference}") if name in own)]


def test_state_is_what_the_task_holds(pair):
    task = build(pair, norm_pix=True)
    state, model = pair.group("state"), task.backbone.model
    assert task.cell == (pair.config["total_patch_size"],) * 2
    assert torch.equal(model.blocks1[0].attn.weight, state["blocks1.0.attn.weight"])
    assert torch.equal(task.stage1_output_decode.weight, state["stage1_output_decode.weight"])
    torch.testing.assert_close(task.decoder.positions, state["decoder_pos_embed"][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.pos_embed.data, state["pos_embed"], atol=0, rtol=0)
    assert not model.pos_embed.requires_grad


def record(task: ConvMAE) -> dict[str, Tensor]:
    """Outputs of the modules that the golden pair names, filled by a forward pass."""
    model, view = task.backbone.model, {}
    modules: dict[str, nn.Module] = {
        "patch_embed1": model.patch_embed1,
        "stage1_output": model.blocks1[-1],
        "stage1_projected": task.stage1_output_decode,
        "stage2_output": model.blocks2[-1],
        "stage2_projected": task.stage2_output_decode,
        "patch_embed3": model.patch_embed3,
        "stage3_tokens": model.blocks3[-1],
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda *call, name=name: view.update({name: call[2]}))
    return view


def rows_of(found: Tensor, masking: Masking) -> Tensor:
    """Visible cells (B, K, c, c, C) or a whole map (B, H, W, C) → rows (B, K * c * c, C)."""
    if found.ndim == 5:
        return found.flatten(1, 3)
    factor = (found.shape[1] // masking.grid[0], found.shape[2] // masking.grid[1])
    return gather_tokens(found.permute(0, 3, 1, 2), Cells(masking), factor)


@BOTH
def test_results(pair, execution):
    task = build(pair, norm_pix=True, execution=execution)
    images, noise = pair["input/images"], pair["input/noise"]
    masking = random_masking(noise, pair["expect/ids_keep"].shape[1], task.decoder.grid)
    for name in ("ids_keep", "ids_restore"):
        pair.assert_close(f"expect/{name}", getattr(masking, name), 0)
    for name in ("expect/mask", "input/mask"):
        pair.assert_close(name, ~masking.visible.flatten(1), 0)
    for name in ("mask_stage1", "mask_stage2"):
        side = pair[f"expect/{name}"].shape[1] // masking.grid[0]
        pair.assert_close(f"expect/{name}", ~Cells(masking).active((side, side))[:, 0], 0)

    view = record(task)
    with torch.no_grad():
        latent = task.encode(images, masking)
        predictions = task.decoder.predict_all(latent, masking)
    pair.assert_close("expect/stage3_tokens", view.pop("stage3_tokens"), RESULT)
    for name, found in view.items():  # the authors compute hidden places too, and never use them
        expected = pair[f"expect/{name}"]
        distance = (rows_of(found, masking) - rows_of(expected.permute(0, 2, 3, 1), masking)).abs().max()
        assert distance <= RESULT * expected.abs().max(), f"{name}: off by {distance:.3e}"
    pair.assert_close("expect/latent", latent, RESULT)
    pair.assert_close("expect/pred", predictions, RESULT)

    everything = torch.arange(noise.shape[1]).expand_as(noise)
    pair.assert_close("expect/target_norm_pix", cell_targets(images, task.cell, everything), RESULT)
    pair.assert_close("expect/target_raw", cell_targets(images, task.cell, everything, norm_pix=False), RESULT)


@BOTH
@pytest.mark.parametrize(
    ("norm_pix", "loss_name", "gradients"),
    [(True, "expect/loss_norm_pix", "grad"), (False, "expect/loss_raw", "grad_raw")],
)
def test_loss_and_gradients(pair, norm_pix, loss_name, gradients, execution):
    task = build(pair, norm_pix, execution).train()
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
    task = build(pair, norm_pix=True)
    for prefix in ("grad", "grad_raw"):
        assert all(parameter(task, name).requires_grad for name in pair.group(prefix))
    known = {"ids_keep", "ids_restore", "mask", "mask_stage1", "mask_stage2", "patch_embed1", "patch_embed3"}
    known |= {f"stage{stage}_{what}" for stage in (1, 2) for what in ("output", "projected")}
    known |= {"stage3_tokens", "latent", "pred", "target_norm_pix", "target_raw", "loss_norm_pix", "loss_raw"}
    assert set(pair.group("expect")) == known
    assert set(pair.group("input")) == {"images", "noise", "mask"}
    assert pair.unused() == []
