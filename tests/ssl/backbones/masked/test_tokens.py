"""Token dropping: equal to timm where all patches are kept, blind to the others, and refused where it is not exact."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder, gather_patches, token_dropping_missing_reason
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_clip_224": {},  # norm before the blocks, no patch bias
    "vit_base_patch16_siglip_224": {},  # no class token, attention pooling
    "vit_small_patch14_reg4_dinov2": {},  # registers without positions, LayerScale
    "vit_medium_patch16_gap_256": {},  # no class token, norm after pooling
    "vit_base_patch16_rpn_224": {},  # norm after attention
    "vit_base_patch16_xp_224": {},  # attention and MLP in parallel
    "vit_small_patch16_18x2_224": {},  # two attentions in parallel
    "vit_dpwee_patch16_reg1_gap_256": {},  # differential attention, parallel
    "vit_dlittle_patch16_reg1_gap_256": {},  # differential attention
    "aimv2_large_patch14_224": {},  # SwiGLU, RMS norms, norm in the patch embedding
    "beit3_base_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},  # class token without a position
    "vit_tiny_patch16_224:qk_norm": {"qk_norm": True, "init_values": 0.1},
    "vit_tiny_patch16_224:no_positions": {"pos_embed": "none"},
    "vit_tiny_patch16_224:oblong_patch": {"patch_size": (16, 8)},
    "eva_large_patch14_196": {},  # absolute positions only
    "eva02_tiny_patch14_224": {},  # absolute and rotary positions, SwiGLU
    "eva02_enormous_patch14_clip_224": {},  # post-norm blocks
    "vit_small_patch16_dinov3": {},  # rotary positions only, registers
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},  # a learned rotation for each block and head
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": (2, 1)},  # fewer keys and values than queries
}


def build(case: str, **kwargs: object) -> Backbone:
    """The tiny network of `case` on 3x2 patches, with every parameter moved away from its initial value."""
    name = case.partition(":")[0]
    settings = {**TINY, **MODELS.get(case, {}), **kwargs}
    probe = settings.get("patch_size", 14 if "patch14" in name else 16)
    patch = probe if isinstance(probe, tuple) else (probe, probe)
    torch.manual_seed(0)
    backbone = create_backbone(name, **{"size": (3 * patch[0], 2 * patch[1]), **settings}).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


def images(backbone: Backbone, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *backbone.input_size)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_all_patches_equal_timm_in_any_order(case):
    backbone = build(case)
    assert token_dropping_missing_reason(backbone) is None
    x = images(backbone)
    encoder = TokenEncoder(backbone)
    expected = backbone.model.forward_features(x)
    patches = expected.shape[1] - encoder.prefix
    assert encoder.grid(backbone.input_size) == (3, 2)
    assert patches == 6
    raster = torch.arange(patches).expand(2, -1)
    tokens, prefix = encoder.encode(x, raster)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)

    shuffled = torch.rand(2, patches).argsort(dim=1)  # another order for each image
    tokens, _ = encoder.encode(x, shuffled)
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(tokens[:, prefix:], expected[:, prefix:][rows, shuffled], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, :prefix], expected[:, :prefix], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
@torch.no_grad()
def test_dropped_patches_cannot_leak(case):
    backbone = build(case)
    encoder = TokenEncoder(backbone)
    x = images(backbone)
    kept = torch.tensor([[4, 1], [0, 5]])
    hidden = torch.ones(2, 6, dtype=torch.bool).scatter(1, kept, False)
    mask = (
        hidden.view(2, 1, 3, 2).repeat_interleave(encoder.patch_size[0], 2).repeat_interleave(encoder.patch_size[1], 3)
    )
    before, prefix = encoder.encode(x, kept)
    after, _ = encoder.encode(torch.where(mask, float("nan"), x), kept)
    assert torch.equal(before, after)
    assert before.shape == (2, prefix + 2, 32)
    changed, _ = encoder.encode(torch.where(mask, x, x + 1), kept)
    assert not torch.allclose(before, changed)


@torch.no_grad()
def test_other_sizes_where_the_network_takes_them():
    backbone = build("vit_tiny_patch16_224", size=(64, 64), dynamic_img_size=True)
    x = torch.randn(2, 3, 32, 80)
    encoder = TokenEncoder(backbone)
    assert encoder.grid((32, 80)) == (2, 5)
    tokens, _ = encoder.encode(x, torch.arange(10).expand(2, -1))
    torch.testing.assert_close(tokens, backbone.model.forward_features(x), atol=1e-5, rtol=1e-5)
    rotary = build("vit_small_patch16_dinov3", size=(64, 64), dynamic_img_size=True)
    tokens, _ = TokenEncoder(rotary).encode(x, torch.arange(10).expand(2, -1))
    torch.testing.assert_close(tokens, rotary.model.forward_features(x), atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    encoder = TokenEncoder(build("vit_tiny_patch16_224"))
    with pytest.raises(ConfigError, match=r"backbone.size: \[50, 32\] is no multiple .* set it to \[48, 32\]"):
        encoder.grid((50, 32))
    with pytest.raises(ConfigError, match=r"built for \[48, 32\] pixels, not \[32, 32\]"):
        encoder.grid((32, 32))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet10t", "convolutions need the whole grid"),
        ("convnext_atto", "convolutions need the whole grid"),
        ("swin_tiny_patch4_window7_224", "windows need the whole grid"),
        ("tnt_s_legacy_patch16_224", "stem mixes neighboring patches"),
        ("samvit_base_patch16_224", "windows need the whole grid"),
        ("vitamin_small_224", "stem mixes neighboring patches"),
        ("vit_small_r26_s32_224", "stem mixes neighboring patches"),
        ("mixer_s32_224", "weights for each place"),
        ("xcit_nano_12_p16_224", "neighboring patches interact"),
        ("vit_base_patch16_224:pos_drop", "set pos_drop_rate and patch_drop_rate to 0"),
        ("vit_base_patch16_224:patch_drop", "set pos_drop_rate and patch_drop_rate to 0"),
    ],
)
def test_what_cannot_drop_tokens_is_refused_with_a_reason(name, reason):
    name, _, option = name.partition(":")
    with torch.device("meta"):
        backbone = Backbone(timm.create_model(name, num_classes=0, **({f"{option}_rate": 0.1} if option else {})), name)
    with pytest.raises(CapabilityError, match=f"{name} cannot do MAE: it lacks token_dropping .*{reason}"):
        backbone.require({"token_dropping"}, task="MAE")


def test_subclasses_are_judged_by_what_they_compute():
    class Renamed(timm.models.VisionTransformer):
        pass

    class Shifted(timm.models.VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x).roll(1, dims=1)

    settings = {"img_size": 32, "num_classes": 0, **TINY}
    assert token_dropping_missing_reason(Backbone(Renamed(**settings), size=(32, 32))) is None
    assert "Shifted" in str(token_dropping_missing_reason(Backbone(Shifted(**settings), size=(32, 32))))


def test_foreign_parts_of_blocks_are_refused():
    backbone = build("vit_tiny_patch16_224")
    backbone.model.blocks[1].mlp.norm = nn.BatchNorm1d(128)
    assert "BatchNorm1d" in str(token_dropping_missing_reason(backbone))
    backbone.model.blocks[1] = nn.TransformerEncoderLayer(32, 2)
    assert "TransformerEncoderLayer" in str(token_dropping_missing_reason(backbone))


@pytest.mark.parametrize("case", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_gradients_reach_everything_but_the_head_and_survive_checkpointing(case):
    backbone = build(case, global_pool="avg").train()
    encoder = TokenEncoder(backbone)
    x, kept = images(backbone), torch.tensor([[4, 1], [0, 5]])

    def gradients() -> dict[str, Tensor | None]:
        backbone.zero_grad()
        encoder.encode(x, kept)[0].square().sum().backward()
        return {name: parameter.grad for name, parameter in backbone.named_parameters()}

    plain = gradients()
    left = {id(parameter) for parameter in encoder.unreached()}
    for name, parameter in backbone.named_parameters():
        assert (plain[name] is None) == (id(parameter) in left), name
    assert any("fc_norm" in name for name, gradient in plain.items() if gradient is None)
    backbone.model.set_grad_checkpointing(True)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_gather_reads_the_right_pixels():
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    got = gather_patches(x, torch.tensor([[5, 0], [2, 3]]), (2, 2))  # grid 2x3
    assert got.shape == (2, 2, 3, 2, 2)
    assert torch.equal(got[0, 0], x[0, :, 2:4, 4:6])
    assert torch.equal(got[0, 1], x[0, :, 0:2, 0:2])
    assert torch.equal(got[1, 0], x[1, :, 0:2, 4:6])
    assert torch.equal(got[1, 1], x[1, :, 2:4, 0:2])
