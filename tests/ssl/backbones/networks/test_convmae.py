"""ConvMAE's network: the authors' block and sizes, timm's surface, and its run on visible cells only."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.masking import Masking, random_masking
from unlabeled.ssl.backbones.masked.stages import StageEncoder
from unlabeled.ssl.backbones.networks.convmae import ConvBlock, ConvViT, PatchConv, PatchEmbed
from unlabeled.ssl.backbones.weights import export_backbone, load_backbone, load_weights
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

TINY = {"patch_size": (2, 2, 2), "dims": (4, 6, 8), "depths": (2, 1, 2), "num_heads": 2}
SIZE = (24, 40)  # 3 x 5 cells


def tiny_backbone(size: tuple[int, int] = SIZE, **kwargs: object) -> Backbone:
    """With random values in norms and biases too, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(0)
    backbone = create_backbone("convmae_small", size=size, **{**TINY, **kwargs})
    for parameter in backbone.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return backbone


def masking(keep: int = 4, grid: tuple[int, int] = (3, 5), batch: int = 2) -> Masking:
    return random_masking(torch.rand(batch, grid[0] * grid[1]), keep, grid)


def images(size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def reference_block(block: ConvBlock, x: Tensor, visible: Tensor) -> Tensor:
    """The block on a whole map (B, C, H, W), by its formula: only the input of the 5 x 5 convolution is masked."""

    def norm(layer: nn.LayerNorm, value: Tensor) -> Tensor:
        mean, variance = value.mean(1, keepdim=True), value.var(1, keepdim=True, correction=0)
        value = (value - mean) / (variance + 1e-5).sqrt()
        return value * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    def point(layer: nn.Conv2d, value: Tensor) -> Tensor:
        return F.conv2d(value, layer.weight, layer.bias)

    y = point(block.conv1, norm(block.norm1, x)) * visible
    y = F.conv2d(y, block.attn.weight, block.attn.bias, padding=2, groups=x.shape[1])
    x = x + point(block.conv2, y)
    return x + point(block.mlp.fc2, F.gelu(point(block.mlp.fc1, norm(block.norm2, x))))


@pytest.mark.parametrize(("name", "millions"), [("small", 21.94), ("base", 84.61), ("large", 321.95)])
def test_sizes(name, millions):
    """Of the base network 84.61 without its skips are the authors' (their tables round to 88 with the skips)."""
    with torch.device("meta"):
        model = timm.create_model(f"convmae_{name}", num_classes=0)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_names_and_shapes_of_the_authors_files():
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in timm.create_model("convmae_base").state_dict().items()}
    expected = {
        "patch_embed1.proj.weight": (256, 3, 4, 4),
        "patch_embed3.norm.bias": (768,),
        "patch_embed4.weight": (768, 768),
        "pos_embed": (1, 196, 768),  # no entry for a class token
        "blocks1.1.conv1.weight": (256, 256, 1, 1),
        "blocks2.0.attn.weight": (384, 1, 5, 5),
        "blocks2.1.mlp.fc1.weight": (1536, 384, 1, 1),
        "blocks3.10.attn.qkv.bias": (2304,),
        "norm.weight": (768,),
        "head.weight": (1000, 768),
    }
    assert expected.items() <= state.items()
    assert "cls_token" not in state


def test_two_kinds_of_norms():
    """1e-5 in the convolution stages and all embeddings, 1e-6 in the transformer and after it."""
    model = tiny_backbone().model
    eps = {name: layer.eps for name, layer in model.named_modules() if isinstance(layer, nn.LayerNorm)}
    assert {name for name, value in eps.items() if value == 1e-6} == {
        name for name in eps if name == "norm" or name.startswith("blocks3")
    }
    assert set(eps.values()) == {1e-5, 1e-6}


def test_patch_convolution_is_the_frameworks():
    conv = PatchConv(3, 5, 4)
    x = images((8, 12))
    torch.testing.assert_close(conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Conv2d.forward(conv, x))
    embed = PatchEmbed(3, 5, 2, norm_eps=1e-5)
    expected = F.gelu(F.layer_norm(nn.Conv2d.forward(embed.proj, x).permute(0, 2, 3, 1), (5,)))
    torch.testing.assert_close(embed(x.permute(0, 2, 3, 1)), expected)


def test_maps_of_the_stages():
    backbone = tiny_backbone().eval()
    assert [tuple(stage) for stage in backbone.stages] == [(4, 2), (6, 4), (8, 8)]
    assert backbone.embed_dim == 8
    model, x = backbone.model, images()
    features, maps = model.forward_intermediates(x)
    assert [tuple(one.shape) for one in maps] == [(2, 4, 12, 20), (2, 6, 6, 10), (2, 8, 3, 5)]
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(features, model.norm(maps[-1].flatten(2).transpose(1, 2)))
    calls: list[object] = []
    model.blocks2.register_forward_hook(lambda *call: calls.append(call))
    model.blocks3[0].register_forward_hook(lambda *call: calls.append(call))
    chosen = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True, stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(chosen, maps[:2], strict=True))
    assert not calls
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), features)
    with pytest.raises(ValueError, match="output_fmt: 'NLC' is not possible"):
        model.forward_intermediates(x, output_fmt="NLC")
    extractor = timm.create_model("convmae_small", features_only=True, img_size=SIZE, **TINY)
    assert [tuple(one.shape[1:]) for one in extractor(x)] == [(4, 12, 20), (6, 6, 10), (8, 3, 5)]


def test_heads():
    model = timm.create_model("convmae_small", img_size=SIZE, num_classes=3, **TINY).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 15, 8)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, tokens.mean(1))
    torch.testing.assert_close(model(images()), model.get_classifier()(pooled))
    model.reset_classifier(7)
    assert (model(images()).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(images()), tokens.amax(1))


def test_norm_after_pooling_for_fine_tuning():
    model = timm.create_model("convmae_small", img_size=SIZE, fc_norm=True, num_classes=3, **TINY).eval()
    names = set(model.state_dict())
    assert "fc_norm.weight" in names
    assert "norm.weight" not in names
    assert model.pos_embed.requires_grad
    model.fc_norm.bias.data.fill_(2.0)
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(pooled.mean(1), torch.full((2,), 2.0))


def test_the_linear_layer_before_the_transformer_counts():
    model = tiny_backbone().model
    before = model.forward_features(images())
    model.patch_embed4.weight.data.zero_()
    assert not torch.allclose(model.forward_features(images()), before, atol=1e-2)


def test_layers_for_rate_decay():
    model = timm.create_model("convmae_small", img_size=SIZE, num_classes=3, **TINY)
    groups = list(group_parameters(model, model.group_matcher()).values())
    assert {name.partition(".")[0] for name in groups[0]} == {
        *("patch_embed1", "patch_embed2", "patch_embed3", "patch_embed4", "blocks1", "blocks2", "pos_embed"),
    }
    assert all(name.startswith("blocks3.0.") for name in groups[1])
    assert {name for name in groups[-1] if not name.startswith("blocks3.1.")} >= {"head.weight"}
    assert model.no_weight_decay() == {"pos_embed"}


def test_stochastic_depth_drops_whole_images():
    torch.manual_seed(0)
    block = ConvBlock(4, 2.0, drop_path=0.5, norm_eps=1e-5).train()
    x = torch.randn(64, 3, 2, 2, 4)  # cells of 64 images
    same = (block(x, lambda conv, value: value) == x).flatten(1)
    assert 4 < same.all(1).sum() < 32  # a quarter skips both parts
    assert (same.all(1) | ~same.any(1)).all()


def test_sizes_that_are_refused():
    with pytest.raises(ConfigError, match=r"20, 24\] is no multiple of the cells of 8 pixels"):
        tiny_backbone((20, 24))
    with pytest.raises(ConfigError, match=r"dims: .* is not possible; give three numbers, one per stage"):
        tiny_backbone(dims=(4, 8))
    with pytest.raises(ConfigError, match="dims: 8 is no multiple of num_heads 3"):
        tiny_backbone(num_heads=3)


def test_capabilities():
    backbone = tiny_backbone()
    assert backbone.missing_reason("masked_stages") is None
    assert backbone.missing_reason("pooled") is None
    assert backbone.missing_reason("dense_map") is None
    assert backbone.missing_reason("token_dropping") == "convolutions need the whole grid"
    assert backbone.missing_reason("sparse_convs") is not None
    with pytest.raises(CapabilityError, match=r"convmae_small cannot do MAE: .* token_dropping \(convolutions need"):
        backbone.require({"token_dropping"}, task="MAE")
    plain = create_backbone("test_vit", size=32)
    with pytest.raises(CapabilityError, match=r"test_vit cannot do ConvMAE: it lacks masked_stages \(only convmae_"):
        plain.require({"masked_stages"}, task="ConvMAE")


def test_visible_cells_give_what_the_formula_gives():
    """Against a reference on whole maps, in which garbage flows at hidden places but never reaches visible ones."""
    model, mask = tiny_backbone().double().model, masking()
    x = images().double()
    stages = StageEncoder(Backbone(model, size=SIZE)).encode(x, mask)
    maps = x
    for number, side, found in ((1, 4, stages.first), (2, 2, stages.second)):
        embed = getattr(model, f"patch_embed{number}")
        maps = nn.Conv2d.forward(embed.proj, maps).permute(0, 2, 3, 1)
        maps = embed.act(embed.norm(maps)).permute(0, 3, 1, 2)
        for block in getattr(model, f"blocks{number}"):
            maps = reference_block(block, maps, mask.enlarged((side, side))[:, None])
        for image in range(2):
            for position, cell in enumerate(mask.ids_keep[image].tolist()):
                top, left = cell // 5 * side, cell % 5 * side
                expected = maps[image, :, top : top + side, left : left + side].permute(1, 2, 0)
                torch.testing.assert_close(found[image, position], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("patch_size", [(2, 2, 2), (1, 2, 2), (2, 2, 1), (4, 2, 1)])
def test_gathered_and_dense_execution_agree(dtype, tolerance, patch_size):
    cell = patch_size[0] * patch_size[1] * patch_size[2]
    size = (3 * cell, 5 * cell)
    backbone = tiny_backbone(size, patch_size=patch_size).to(dtype)
    mask, x = masking(), images(size).to(dtype)
    results, gradients = {}, {}
    for execution in ("gathered", "dense"):
        given = x.clone().requires_grad_()
        stages = StageEncoder(backbone).encode(given, mask, execution)
        backbone.zero_grad()
        (stages.first.sin().sum() + stages.second.cos().sum() + stages.tokens.square().sum()).backward()
        results[execution] = stages
        gradients[execution] = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        gradients[execution]["x"] = given.grad
    for gathered, dense in zip(results["gathered"], results["dense"], strict=True):
        torch.testing.assert_close(gathered, dense, atol=tolerance, rtol=tolerance)
    assert len(gradients["gathered"]) > 50
    for name, gathered in gradients["gathered"].items():
        dense = gradients["dense"][name]
        assert (gathered - dense).abs().max() <= tolerance * max(1.0, float(dense.abs().max())), name


@pytest.mark.parametrize("execution", ["gathered", "dense"])
def test_hidden_pixels_never_reach_visible_cells(execution):
    encoder, mask, x = StageEncoder(tiny_backbone()), masking(), images()
    visible = mask.enlarged((8, 8))[:, None]
    first = encoder.encode(x, mask, execution)
    hidden = float("nan") if execution == "gathered" else 1e4  # a product with zero keeps what is not a number
    second = encoder.encode(torch.where(visible, x, hidden), mask, execution)
    third = encoder.encode(torch.where(visible, x + 1, x), mask, execution)
    for one, other, moved in zip(first, second, third, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, moved)


@pytest.mark.parametrize("execution", ["gathered", "dense"])
def test_everything_visible_is_the_plain_network(execution):
    backbone = tiny_backbone().double().eval()
    mask, x = masking(keep=15), images().double()
    stages = StageEncoder(backbone).encode(x, mask, execution)
    tokens = backbone.model.norm(mask.restore(stages.tokens))
    torch.testing.assert_close(tokens, backbone.model.forward_features(x), atol=1e-12, rtol=0)
    maps = backbone.maps(x, [0, 1])
    for found, whole, side in zip(stages[:2], maps, (4, 2), strict=True):
        cells = mask.restore(found.flatten(2)).view(2, 3, 5, side, side, -1)
        rebuilt = cells.permute(0, 5, 1, 3, 2, 4).reshape(whole.shape)
        torch.testing.assert_close(rebuilt, whole, atol=1e-12, rtol=0)


def test_visible_cells_see_their_visible_neighbors():
    """The 5 x 5 convolutions reach over the border of a cell: another neighbor, other places."""
    encoder, x = StageEncoder(tiny_backbone()), images()
    both = encoder.encode(x, random_masking(torch.tensor([[0.1, 0.2, *[0.5] * 13]] * 2), 2, (3, 5)))
    apart = encoder.encode(x, random_masking(torch.tensor([[0.1, *[0.5] * 13, 0.2]] * 2), 2, (3, 5)))
    assert not torch.allclose(both.first[:, 0], apart.first[:, 0])


@pytest.mark.parametrize("execution", ["gathered", "dense"])
def test_activations_computed_anew_give_the_same_gradients(execution):
    backbone, mask = tiny_backbone().double().train(), masking()
    found = []
    for enabled in (False, True):
        backbone.model.set_grad_checkpointing(enabled)
        backbone.zero_grad()
        StageEncoder(backbone).encode(images().double(), mask, execution).tokens.sin().sum().backward()
        backbone.pooled(images().double()).sin().sum().backward()
        found.append([p.grad.clone() for p in backbone.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-12, rtol=1e-10)


def test_other_sizes_than_its_own():
    backbone = tiny_backbone().eval()
    assert backbone.map(images((32, 16))).shape == (2, 8, 4, 2)
    assert StageEncoder(backbone).encode(images((32, 16)), masking(3, (4, 2))).tokens.shape == (2, 3, 8)
    with pytest.raises(ValueError, match=r"\[20, 16\] is no multiple of the cells of 8 pixels"):
        backbone.map(images((20, 16)))


def test_exports(tmp_path):
    backbone = tiny_backbone((24, 24)).eval()
    path = export_backbone(backbone, tmp_path)
    again = load_backbone(tmp_path).eval()
    assert torch.equal(again.pooled(images((24, 24))), backbone.pooled(images((24, 24))))
    assert type(again.model) is ConvViT
    other = tiny_backbone((32, 24))
    report = load_weights(other, path)
    assert (report.missing, report.unexpected, report.reshaped) == ([], [], ["pos_embed"])
    torch.testing.assert_close(other.model.pos_embed[0], backbone.model.positions((4, 3)))
