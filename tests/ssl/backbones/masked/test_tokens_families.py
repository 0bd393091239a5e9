"""Token dropping of each family is exact: equal to the whole network with the dropped tokens hidden from attention.

The reference is timm's own ``forward_features`` on all patches, run under a mode that takes the dropped keys out of
every softmax between tokens; no code of `unlabeled.ssl.backbones.masked.tokens` takes part in it. Float64, results and
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder, token_dropping_missing_reason

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NAFLEX = {**TINY, "pos_embed_grid_size": (4, 3)}
TNT = {**TINY, "inner_dim": 8, "num_heads_inner": 2, "num_heads_outer": 2, "num_heads": None}
HIERA = {"embed_dim": 8, "stages": (1, 2, 1, 1), "num_heads": 1}
CASES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": TINY,
    "vit_small_patch16_rope_mixed_ape_224": TINY,
    "eva02_tiny_patch14_224": TINY,
    "beit_base_patch16_224": TINY,  # a table in each block
    "beitv2_base_patch16_224": TINY,
    "beit_base_patch16_224:shared": {**TINY, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "beit_base_patch16_224:both": {**TINY, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    "beit_base_patch16_224:plain": {
        **TINY,
        **{"use_rel_pos_bias": False, "use_abs_pos_emb": True, "qkv_bias": False, "init_values": None},
        **{"swiglu_mlp": True, "scale_mlp": True, "global_pool": "token"},
    },
    "vit_relpos_small_patch16_224": TINY,  # a network of the distance in each block, no class token
    "vit_srelpos_small_patch16_224": TINY,  # one for all blocks
    "vit_relpos_base_patch16_clsgap_224": TINY,  # class token
    "vit_relpos_small_patch16_rpn_224": TINY,  # norm after attention
    "vit_relpos_small_patch16_224:table": {**TINY, "rel_pos_type": "bias", "qk_norm": True, "class_token": True},
    "vit_relpos_small_patch16_224:swin": {**TINY, "rel_pos_type": "mlp-swin"},
    "convit_tiny": {"embed_dim": 16, "depth": 3, "num_heads": 2, "local_up_to_layer": 2},
    "convit_tiny:no_positions": {
        **{"embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1},
        **{"use_pos_embed": False, "qkv_bias": True},
    },
    "cait_xxs24_224": TINY,
    "tnt_s_patch16_224": TNT,
    "naflexvit_base_patch16_gap": NAFLEX,  # registers, learned positions that are resampled
    "naflexvit_base_patch16_parfac_gap": NAFLEX,  # a table for rows and one for columns
    "naflexvit_base_patch16_map": {**NAFLEX, "pos_embed_grid_size": (3, 2)},
    "naflexvit_base_patch16_gap:conv": {**NAFLEX, "embed_proj_type": "conv", "class_token": True, "pre_norm": True},
    "naflexvit_base_patch16_gap:channels_first": {**NAFLEX, "patchify_channels_last": False},
    "naflexvit_base_patch16_gap:axial": {**NAFLEX, "rope_type": "axial", "pos_embed": "none", "swiglu_mlp": True},
    "naflexvit_base_patch16_gap:mixed": {**NAFLEX, "rope_type": "mixed"},
    "qwen3_vit_88m": TINY,  # absolute and rotary positions, no final norm
    "deepseek_vit_412m": TINY,  # rotary positions only
    "gemma4_vit_167m": {**TINY, "head_dim": 16, "intermediate_size": 48, "position_embedding_size": 40},
    "gemma4_vit_167m:grouped": {
        **{**TINY, "head_dim": 16, "intermediate_size": 48, "position_embedding_size": 40},
        **{"num_kv_heads": 1, "use_clipped_linears": True},
    },
    "hiera_tiny_224": HIERA,
    "hiera_small_abswin_256": HIERA,
    "hiera_tiny_224:joined": {**HIERA, "use_expand_proj": False, "init_values": 0.1, "mask_unit_attn": (True,) * 4},
}
SINGLE = {"deepseek_vit_412m": 1e-5}
"""Networks whose norms compute in float32 whatever the weights are, and the tolerance that is left then."""


def build(case: str) -> Backbone:
    """The tiny network of `case` on 3x2 cells (ConViT knows squares only), in float64, with no parameter at rest."""
    name = case.partition(":")[0]
    settings = {key: value for key, value in CASES[case].items() if value is not None}
    cell = 32 if "hiera" in name else 14 if "patch14" in name or "deepseek" in name else 16
    rows, columns = (3, 3) if "convit" in name else (3, 2)
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    backbone = create_backbone(name, size=(rows * cell, columns * cell), **settings).eval().double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


class MaskedPatches(TorchFunctionMode):
    """Takes the keys `hidden` (B, N patches) out of every softmax over tokens of the images."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.used = 0

    def keys(self, shape: torch.Size) -> Tensor | None:
        """Bool (B, 1, 1, keys) for scores of `shape`: prefix tokens are never hidden; None for other things."""
        prefix = shape[-1] - self.hidden.shape[1]
        if len(shape) != 4 or shape[0] != len(self.hidden) or prefix < 0 or prefix > 8:
            return None
        self.used += 1
        return F.pad(self.hidden, (prefix, 0))[:, None, None]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            keys = self.keys(torch.Size([*args[0].shape[:-1], args[1].shape[-2]]))
            if keys is not None:
                bias = kwargs.get("attn_mask")
                zero = args[0].new_zeros(1) if bias is None else bias
                kwargs["attn_mask"] = torch.where(keys, float("-inf"), zero)
                kwargs["attn_mask"] = kwargs["attn_mask"].expand(-1, -1, args[0].shape[-2], -1)
        if func in (Tensor.softmax, torch.softmax, F.softmax):
            keys = self.keys(args[0].shape)
            args = args if keys is None else (args[0].masked_fill(keys, float("-inf")), *args[1:])
        if func is F.dropout:  # of attention weights: CaiT adds a constant to them after the softmax
            keys = self.keys(args[0].shape)
            args = args if keys is None else (args[0].masked_fill(keys, 0.0), *args[1:])
        return func(*args, **kwargs)


def dense(backbone: Backbone, x: Tensor, kept: Tensor) -> Tensor:
    """What the whole network gives for the prefix and for the patches `kept` (B, K), the others hidden."""
    encoder = TokenEncoder(backbone)
    gh, gw = encoder.grid(backbone.input_size)
    hidden = torch.ones(len(kept), gh * gw, dtype=torch.bool).scatter(1, kept, False)
    if "hiera" in backbone.name:  # timm itself can drop mask units; it gives them in raster order
        found = backbone.model.forward_features(x, mask=~hidden)
        return found.gather(1, kept.argsort(1).argsort(1)[..., None].expand(-1, -1, found.shape[-1]))
    with MaskedPatches(hidden) as mode:
        found = backbone.model.forward_features(x)
    assert mode.used >= 2  # two blocks
    found = found.flatten(1, -2)  # some give (B, gh, gw, D)
    patches = found[:, encoder.prefix :]
    patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
    return torch.cat([found[:, : encoder.prefix], patches], dim=1)


def images(backbone: Backbone) -> Tensor:
    return torch.randn(2, 3, *backbone.input_size, dtype=torch.float64)


def gradients(backbone: Backbone, loss: Tensor) -> dict[str, Tensor | None]:
    named = dict(backbone.model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keeping_all_patches_equals_timm_in_any_order(case):
    backbone = build(case)
    assert token_dropping_missing_reason(backbone) is None
    encoder, x = TokenEncoder(backbone), images(backbone)
    gh, gw = encoder.grid(backbone.input_size)
    assert gh * gw in (6, 9)
    expected = backbone.model.forward_features(x).flatten(1, -2)
    assert expected.shape == (2, encoder.prefix + gh * gw, encoder.dim)
    shuffled = torch.rand(2, gh * gw).argsort(dim=1)  # another order for each image
    tokens, prefix = encoder.encode(x, shuffled)
    chosen = expected[:, prefix:].gather(1, shuffled[..., None].expand(-1, -1, encoder.dim))
    close = SINGLE.get(case, 1e-10)
    torch.testing.assert_close(tokens[:, prefix:], chosen, atol=close, rtol=close)
    torch.testing.assert_close(tokens[:, :prefix], expected[:, :prefix], atol=close, rtol=close)


@pytest.mark.parametrize("case", CASES)
def test_dropping_equals_hiding_in_results_and_gradients(case):
    backbone = build(case)
    x, kept = images(backbone), torch.tensor([[4, 1], [0, 5]])
    expected = dense(backbone, x, kept)
    tokens, _ = TokenEncoder(backbone).encode(x, kept)
    close = SINGLE.get(case, 1e-10)
    torch.testing.assert_close(tokens, expected, atol=close, rtol=close)
    weights = torch.randn_like(tokens)
    theirs, ours = (gradients(backbone, (weights * found).sum()) for found in (expected, tokens))
    left = {id(parameter) for parameter in TokenEncoder(backbone).unreached()}
    for name, parameter in backbone.model.named_parameters():
        assert (ours[name] is None) == (id(parameter) in left), name
        if ours[name] is not None:
            torch.testing.assert_close(ours[name], theirs[name], atol=close, rtol=100 * close, msg=name)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_dropped_patches_cannot_leak(case):
    backbone = build(case)
    encoder, x, kept = TokenEncoder(backbone), images(backbone), torch.tensor([[4, 1], [0, 5]])
    gh, gw = encoder.grid(backbone.input_size)
    hidden = torch.ones(2, gh * gw, dtype=torch.bool).scatter(1, kept, False).view(2, 1, gh, gw)
    hidden = hidden.repeat_interleave(encoder.patch_size[0], 2).repeat_interleave(encoder.patch_size[1], 3)
    before, _ = encoder.encode(x, kept)
    assert torch.equal(before, encoder.encode(torch.where(hidden, float("nan"), x), kept)[0])
    assert not torch.allclose(before, encoder.encode(torch.where(hidden, x, x + 1), kept)[0])


@pytest.mark.parametrize("case", [case for case in CASES if "convit" not in case])  # ConViT cannot in timm either
def test_gradient_checkpointing_changes_nothing(case):
    backbone = build(case)
    x, kept = images(backbone), torch.tensor([[4, 1], [0, 5]])
    found = []
    for enabled in (False, True):
        backbone.model.set_grad_checkpointing(enabled)
        backbone.train()
        torch.manual_seed(0)
        found.append(gradients(backbone, TokenEncoder(backbone).encode(x, kept)[0].square().sum()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
