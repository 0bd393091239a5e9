"""FCMAE against the authors' implementation: every result and every gradient of the golden pair.

The authors' sparse response norm mixes all images of a batch (`expect`, `grad`, `grad_raw`); ours takes each image
by itself, as the paper has it (`expect_per_image`, `grad_per_image`). Both are checked: for the former the encoder's
response norms are exchanged for `BatchResponseNorm`.
"""

from __future__ import annotations

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from unlabeled.pretext.masked_image.fcmae import FCMAE, FCMAEConfig, dense_layout, reference_names
from unlabeled.pretext.masked_image.masked_image import cell_targets
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking
from unlabeled.ssl.backbones.masked.sparse import MaskedMap

RESULT, GRADIENT, LOSS = 1e-5, 2e-5, 1e-5


class BatchResponseNorm(GlobalResponseNorm):
    """Global response norm over the visible places of all images together."""

    def forward(self, x: MaskedMap) -> MaskedMap:
        gathered = x.as_shown(gathered=True)
        norm = torch.linalg.vector_norm(gathered, dim=(0, *self.spatial_dim), keepdim=True)
        relative = norm / (norm.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        return x.with_gathered(
            gathered + self.weight.view(self.wb_shape) * gathered * relative + self.bias.view(self.wb_shape)
        )


@pytest.fixture(scope="module")
def pair(golden):
    return golden("fcmae")


def build(pair, *, norm_pix: bool = True, over_batch: bool = False) -> FCMAE:
    config = pair.config
    assert config["patch_size"] == config["stem_stride"] * 8
    model = ConvNeXt(
        in_chans=config["in_channels"],
        depths=tuple(config["stage_depths"]),
        dims=tuple(config["stage_channels"]),
        kernel_sizes=config["depthwise_kernel"],
        patch_size=config["stem_stride"],
        norm_eps=config["layer_norm_eps"],
        use_grn=True,
        ls_init_value=None,
        num_classes=0,
    )
    settings = {
        "mask_ratio": config["mask_ratio"],
        "mask_count": "official",
        "norm_pix": norm_pix,
        "decoder": {"dim": config["decoder_dim"], "depth": config["decoder_depth"]},
    }
    size = (config["image_size"], config["image_size"])
    task = FCMAE(FCMAEConfig.model_validate(settings), Backbone(model, size=size))
    assert task.load_reference(pair.group("state")) == (["norm.weight", "norm.bias"], [])  # new in fine-tuning
    norms = [module for module in task.backbone.modules() if isinstance(module, GlobalResponseNorm)]
    assert {norm.eps for norm in norms} == {config["response_norm_eps"]}
    for norm in norms if over_batch else []:
        norm.__class__ = BatchResponseNorm
    return task


def inputs(pair, task: FCMAE) -> tuple[Tensor, Masking]:
    images = pair["input/images"]
    return images, task.mask(images, pair["input/noise"])


def test_conversion_to_dense_kernels(pair):
    sparse = dense_layout(pair.group("state"))
    decoder = {"proj.weight", "proj.bias", "mask_token", "pred.weight", "pred.bias"}
    found = {name: value for name, value in sparse.items() if name not in decoder and not name.startswith("decoder.")}
    expected = pair.group("state_dense")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_the_dense_layout_gives_the_same_network(pair):
    task = build(pair)
    again = build(pair)
    for parameter in again.parameters():
        nn.init.normal_(parameter)
    missing, unexpected = again.load_reference({"model": pair.group("state_dense")})
    assert unexpected == []
    assert {name for name in missing if not name.startswith("decoder.")} == {
        *("norm.weight", "norm.bias", "mask_token", "proj.weight", "proj.bias", "pred.weight", "pred.bias")
    }
    for name, value in task.backbone.state_dict().items():
        if ".head." not in name:
            assert torch.equal(again.backbone.state_dict()[name], value), name


def test_stem_and_stages_with_statistics_over_the_batch(pair):
    task = build(pair, over_batch=True)
    images, masking = inputs(pair, task)
    for name in ("expect/mask", "input/mask"):
        pair.assert_close(name, ~masking.visible, 0)
    outputs: list[MaskedMap] = []
    task.backbone.model.stem.register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad():
        maps = task.sparse.maps(images, masking, range(len(pair.config["stage_depths"])))
        latent = task.encode(images, masking)
    pair.assert_close("expect/stem_output", outputs[0].dense(), RESULT)
    for stage, found in enumerate(maps):
        pair.assert_close(f"expect/stage{stage}_features", found.dense(), RESULT)
    pair.assert_close("expect/encoder_output", dense_map(latent, masking), RESULT)


def test_decoder(pair):
    task = build(pair)
    images, masking = inputs(pair, task)
    encoded = pair["expect/encoder_output"].flatten(2).transpose(1, 2)
    latent = encoded.gather(1, masking.ids_keep[..., None].expand(-1, -1, encoded.shape[-1]))
    with torch.no_grad():
        pair.assert_close("expect/decoder_output", as_map(task.decoder.mixed(latent, masking), masking), RESULT)
        pair.assert_close("expect/pred", as_map(task.decoder.predict_all(latent, masking), masking), RESULT)
        masked = task.decoder(latent, masking)
        everything = task.decoder.predict_all(latent, masking)
    hidden = masking.ids_masked[..., None].expand(-1, -1, everything.shape[-1])
    torch.testing.assert_close(masked, everything.gather(1, hidden))
    target = cell_targets(images, task.cell, torch.arange(encoded.shape[1]).expand(len(images), -1))
    pair.assert_close("expect/target_norm_pix_first_image", target[0], RESULT)


def test_results_with_statistics_per_image(pair):
    task = build(pair)
    images, masking = inputs(pair, task)
    with torch.no_grad():
        latent = task.encode(images, masking)
        predictions = task.decoder.predict_all(latent, masking)
    pair.assert_close("expect_per_image/encoder_output", dense_map(latent, masking), RESULT)
    pair.assert_close("expect_per_image/pred", as_map(predictions, masking), RESULT)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_losses_of_single_images(pair, norm_pix):
    task = build(pair, norm_pix=norm_pix)
    expected = pair["expect_per_image/losses_norm_pix" if norm_pix else "expect_per_image/losses_raw"]
    for number, one in enumerate(expected):
        batch = {"image": pair["input/images"][number : number + 1]}
        loss = task(batch, noise=pair["input/noise"][number : number + 1]).loss
        assert abs(loss.item() - one.item()) <= LOSS * max(1, abs(one.item()))


@pytest.mark.parametrize(
    ("loss_name", "gradients", "norm_pix", "over_batch"),
    [
        ("expect/loss_norm_pix", "grad", True, True),
        ("expect/loss_raw", "grad_raw", False, True),
        ("expect_per_image/loss_norm_pix", "grad_per_image", True, False),
        ("expect_per_image/loss_raw", None, False, False),
    ],
)
def test_loss_and_gradients(pair, loss_name, gradients, norm_pix, over_batch):
    task = build(pair, norm_pix=norm_pix, over_batch=over_batch).train()
    loss = task({"image": pair["input/images"]}, noise=pair["input/noise"]).loss
    loss.backward()
    for expected in (pair[loss_name].item(), pair.meta["losses_float64"][loss_name]):
        assert abs(loss.item() - expected) <= LOSS * max(1, abs(expected))
    names, parameters = reference_names(task.state_dict()), dict(task.named_parameters())
    for name, expected in pair.group(gradients).items() if gradients else []:
        ((dense_name, gradient),) = dense_layout({name: expected}).items()  # gradients lie as their parameters do
        found = parameters[names[dense_name]].grad
        scale = gradient.abs().max()
        assert found.numel() == gradient.numel()
        assert (found - gradient.view_as(found)).abs().max() <= GRADIENT * scale, name


def test_no_tensor_was_left_out(pair):
    build(pair)
    stages = {f"stage{stage}_features" for stage in range(len(pair.config["stage_depths"]))}
    known = {"mask", "stem_output", "encoder_output", "decoder_output", "pred", "target_norm_pix_first_image"}
    assert set(pair.group("expect")) == known | stages | {"loss_norm_pix", "loss_raw"}
    known = {"encoder_output", "pred", "losses_norm_pix", "loss_norm_pix", "losses_raw", "loss_raw"}
    assert set(pair.group("expect_per_image")) == known
    assert set(pair.group("input")) == {"images", "noise", "mask"}
    for prefix in ("state_dense", "grad", "grad_raw", "grad_per_image"):
        assert pair.group(prefix)
    assert pair.unused() == []


def as_map(tokens: Tensor, masking: Masking) -> Tensor:
    """(B, L, D) in raster order → (B, D, gh, gw)."""
    return tokens.transpose(1, 2).unflatten(2, masking.grid)


def dense_map(latent: Tensor, masking: Masking) -> Tensor:
    """Features of the visible cells (B, K, C) → (B, C, gh, gw), zero elsewhere."""
    hidden = latent.new_zeros(len(latent), masking.ids_masked.shape[1], latent.shape[-1])
    return as_map(masking.restore(torch.cat([latent, hidden], 1)), masking)
