"""Sub-networks against the published form, written out: the input of a layer is scaled by alpha, queries, keys and
values are taken one by one, and so are the neighbors that Swin merges. Everything in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig, SubSize

PLAIN: dict[str, Any] = {"size": 32, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 4}
SWIN: dict[str, Any] = {
    "size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 1, 4, 1), "num_heads": (3, 6, 12, 24), "window_size": 2,
}  # fmt: skip


def build(name: str, arguments: dict[str, Any], width: int, depth: int | tuple[int, ...]) -> tuple[Any, Any, Elastic]:
    """A network of random values, one of its sub-networks, and what connects them."""
    torch.manual_seed(0)
    whole = create_backbone(name, **arguments).double().eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    elastic = Elastic(whole, ElasticConfig(candidates=((width, depth),)))
    return whole.model, elastic.take(whole, elastic.sizes[0]).model, elastic


def close(ours: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The first `outputs` outputs from the first inputs, scaled by alpha; the bias is not scaled."""
    inputs = x.shape[-1]
    alpha = weight.shape[1] / inputs
    result = (alpha * x) @ weight[:outputs, :inputs].T
    return result if bias is None else result + bias[:outputs]


def norm(x: Tensor, layer: Any) -> Tensor:
    width = x.shape[-1]
    return F.layer_norm(x, (width,), layer.weight[:width], layer.bias[:width], layer.eps)


def projections(attention: Any, x: Tensor, width: int) -> list[Tensor]:
    """Queries, keys and values, each from its own third of the joint matrix or from its own layer."""
    if getattr(attention, "qkv", None) is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [scaled_linear(x, layer.weight, layer.bias, width) for layer in layers]
    if getattr(attention, "q_bias", None) is not None:
        biases = [attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias]
    else:
        biases = [None] * 3 if attention.qkv.bias is None else list(attention.qkv.bias.chunk(3))
    return [scaled_linear(x, attention.qkv.weight.chunk(3)[n], biases[n], width) for n in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax attention, head by head; bias (heads, N, N)."""
    size = q.shape[-1] // heads
    results = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[..., part] @ k[..., part].transpose(-1, -2) * size**-0.5
        results.append((logits if bias is None else logits + bias[head]).softmax(-1) @ v[..., part])
    return torch.cat(results, -1)


def attention(module: Any, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    width = x.shape[-1]
    result = attend(*projections(module, x, width), heads, bias)
    if isinstance(getattr(module, "norm", None), nn.LayerNorm):
        result = norm(result, module.norm)
    return scaled_linear(result, module.proj.weight, module.proj.bias, width)


def mlp(module: Any, x: Tensor, hidden: int) -> Tensor:
    inner = F.gelu(scaled_linear(x, module.fc1.weight, module.fc1.bias, hidden))
    return scaled_linear(inner, module.fc2.weight, module.fc2.bias, x.shape[-1])


@pytest.mark.parametrize(("width", "depth"), [(8, 2), (8, 4), (24, 3), (32, 2)])
def test_vit(width: int, depth: int) -> None:
    whole, part, _ = build("vit_small_patch14_reg4_dinov2", PLAIN, width, depth)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = F.conv2d(images, whole.patch_embed.proj.weight, whole.patch_embed.proj.bias, stride=16)
    x = x.flatten(2).transpose(1, 2)[..., :width] + whole.pos_embed[..., :width]
    tokens = [token[..., :width].expand(2, -1, -1) for token in (whole.cls_token, whole.reg_token)]
    x = torch.cat([*tokens, x], 1)
    for number in {2: (0, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}[depth]:
        block = whole.blocks[number]
        x = x + block.ls1.gamma[:width] * attention(block.attn, norm(x, block.norm1), width // 8)
        x = x + block.ls2.gamma[:width] * mlp(block.mlp, norm(x, block.norm2), 4 * width)
    assert whole.norm.bias is not None
    assert whole.blocks[0].norm1.bias is not None
    expected = norm(x, whole.norm)[:, 0]
    features = part.forward_head(part.forward_features(images), pre_logits=True)
    close(features, expected)
    parameters = list(whole.parameters())
    ours, theirs = (
        torch.autograd.grad(result.square().sum(), parameters, materialize_grads=True)
        for result in (features, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_packed_gated_unit() -> None:
    whole, part, _ = build("vit_giant_patch14_dinov2", PLAIN | {"mlp_ratio": 4}, 16, 2)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    layers = whole.blocks[3].mlp
    weights, biases = layers.fc1.weight.chunk(2), layers.fc1.bias.chunk(2)
    gate, value = (scaled_linear(x, weights[n], biases[n], 32) for n in range(2))
    close(part.blocks[1].mlp(x), scaled_linear(F.silu(gate) * value, layers.fc2.weight, layers.fc2.bias, 16))


@pytest.mark.parametrize(("name", "heads"), [("vit_base_patch16_siglip_224", 2), ("vit_pe_core_tiny_patch16_384", 4)])
def test_attention_pooling(name: str, heads: int) -> None:
    whole, part, _ = build(name, PLAIN, 16, 2)
    assert whole.attn_pool.num_heads == 2 * heads
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    pool = whole.attn_pool
    q = scaled_linear(pool.latent[0, :, :16], pool.q.weight, pool.q.bias, 16).expand(2, -1, -1)
    k, v = (scaled_linear(x, pool.kv.weight.chunk(2)[n], pool.kv.bias.chunk(2)[n], 16) for n in range(2))
    pooled = scaled_linear(attend(q, k, v, heads), pool.proj.weight, pool.proj.bias, 16)
    pooled = pooled + mlp(pool.mlp, norm(pooled, pool.norm), 64)
    close(part.attn_pool(x), pooled[:, 0])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "eva02_base_patch14_224", "beit_base_patch16_224"])
def test_attention_with_biases_and_norms_of_its_own(name: str) -> None:
    whole, part, _ = build(name, PLAIN, 16, 3)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    layers = whole.blocks[1].attn
    bias = layers._get_rel_pos_bias()[0, :2] if name.startswith("beit") else None
    close(part.blocks[1].attn(x), attention(layers, x, 2, bias))


def test_separate_gated_unit() -> None:
    whole, part, _ = build("eva02_base_patch14_224", PLAIN, 16, 2)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    layers = whole.blocks[3].mlp
    hidden = part.blocks[1].mlp.fc2.in_features
    assert hidden == int(16 * 4 * 2 / 3)
    gate, value = (scaled_linear(x, layer.weight, layer.bias, hidden) for layer in (layers.fc1_g, layers.fc1_x))
    inner = norm(F.silu(gate) * value, layers.norm)
    close(part.blocks[1].mlp(x), scaled_linear(inner, layers.fc2.weight, layers.fc2.bias, 16))


def test_relative_positions_of_each_head() -> None:
    whole, part, _ = build("vit_relpos_small_patch16_224", PLAIN, 16, 2)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    layers = whole.blocks[3].attn
    close(part.blocks[1].attn(x), attention(layers, x, 2, layers.rel_pos.get_bias()[0, :2]))


def merged(x: Tensor, layer: Any, *, norm_first: bool) -> Tensor:
    """Swin's merging of 2 x 2 places, neighbor by neighbor, each with the first columns of its own quarter."""
    width, full = x.shape[-1], layer.dim
    neighbors = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    if norm_first:
        joint = torch.cat(neighbors, -1)
        mean, deviation = joint.mean(-1, keepdim=True), (joint.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        weights, biases = layer.norm.weight.split(full), layer.norm.bias.split(full)
        neighbors = [
            (one - mean) / deviation * weights[n][:width] + biases[n][:width] for n, one in enumerate(neighbors)
        ]
    columns = layer.reduction.weight.split(full, 1)
    outputs = torch.zeros(1, dtype=x.dtype)
    for n, one in enumerate(neighbors):
        outputs = outputs + (full / width * one) @ columns[n][: 2 * width, :width].T
    return outputs if norm_first else norm(outputs, layer.norm)


def test_swin() -> None:
    whole, part, _ = build("swin_tiny_patch4_window7_224", SWIN, 16, (2, 1, 3, 1))
    for stage, heads in ((0, 2), (2, 8)):
        windows = torch.randn(6, 4, 8 * heads, dtype=torch.float64)
        layers = whole.layers[stage].blocks[0].attn
        table = layers.relative_position_bias_table[:, :heads]
        bias = table[layers.relative_position_index.flatten()].view(4, 4, heads).permute(2, 0, 1)
        close(part.layers[stage].blocks[0].attn(windows), attention(layers, windows, heads, bias))
    x = torch.randn(2, 4, 4, 32, dtype=torch.float64)
    close(part.layers[2].downsample(x), merged(x, whole.layers[2].downsample, norm_first=True))


def test_swin_v2() -> None:
    whole, part, _ = build("swinv2_tiny_window8_256", SWIN, 16, (2, 1, 3, 1))
    windows = torch.randn(6, 4, 16, dtype=torch.float64)
    layers = whole.layers[0].blocks[0].attn
    q, k, v = projections(layers, windows, 16)
    table = 16 * layers.cpb_mlp(layers.relative_coords_table).view(-1, 3).sigmoid()
    results = []
    for head in range(2):
        part_of_head = slice(8 * head, 8 * head + 8)
        cosine = F.normalize(q[..., part_of_head], dim=-1) @ F.normalize(k[..., part_of_head], dim=-1).mT
        bias = table[layers.relative_position_index.flatten(), head].view(4, 4)
        results.append((cosine * layers.logit_scale[head].exp() + bias).softmax(-1) @ v[..., part_of_head])
    expected = scaled_linear(torch.cat(results, -1), layers.proj.weight, layers.proj.bias, 16)
    close(part.layers[0].blocks[0].attn(windows), expected)
    x = torch.randn(2, 4, 4, 32, dtype=torch.float64)
    close(part.layers[2].downsample(x), merged(x, whole.layers[2].downsample, norm_first=False))


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_convnext(name: str) -> None:
    sizes = {"size": 32, "dims": (16, 32, 40, 48), "depths": (1, 1, 4, 1), "conv_mlp": False}
    whole, part, _ = build(name, sizes, 8, (1, 1, 2, 1))
    x = torch.randn(2, 20, 4, 4, dtype=torch.float64)
    block = whole.stages[2].blocks[3]
    inner = torch.stack([
        F.conv2d(x[:, channel : channel + 1], block.conv_dw.weight[channel : channel + 1], padding=3)[:, 0]
        + block.conv_dw.bias[channel] for channel in range(20)
    ], -1)  # fmt: skip
    inner = F.gelu(scaled_linear(norm(inner, block.norm), block.mlp.fc1.weight, block.mlp.fc1.bias, 80))
    if name.startswith("convnextv2"):
        size = inner.square().sum((1, 2), keepdim=True).sqrt()
        share = size / (size.mean(-1, keepdim=True) + 1e-6)
        inner = inner + block.mlp.grn.bias[:80] + block.mlp.grn.weight[:80] * inner * share
    inner = scaled_linear(inner, block.mlp.fc2.weight, block.mlp.fc2.bias, 20)
    inner = inner if block.gamma is None else inner * block.gamma[:20]
    close(part.stages[2].blocks[1](x), x + inner.permute(0, 3, 1, 2))

    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    layer = whole.stages[2].downsample
    normed = norm(x.permute(0, 2, 3, 1), layer[0]).permute(0, 3, 1, 2)
    expected = F.conv2d(2 * normed, layer[1].weight[:20, :16], layer[1].bias[:20], stride=2)
    close(part.stages[2].downsample(x), expected)


@pytest.mark.parametrize("norms", ["groupnorm", "batchnorm2d"])
def test_resnet(norms: str) -> None:
    """Neither the input nor the output of a block is sliced, so alpha stands before its second and third layer."""
    sizes = {"size": 64, "channels": (64, 64, 64, 64), "layers": (1, 1, 4, 1), "norm_layer": norms, "base_width": 96}
    whole, part, _ = build("resnet50", sizes, 64, (1, 1, 2, 1))
    x = torch.randn(3, 256, 4, 4, dtype=torch.float64)
    block, alpha = whole.layer3[3].train(), 96 / 64

    def normed(x: Tensor, layer: Any) -> Tensor:
        width = x.shape[1]
        weight, bias = layer.weight[:width], layer.bias[:width]
        if norms == "groupnorm":
            return F.group_norm(x, 32, weight, bias, layer.eps)
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)

    inner = F.conv2d(x, block.conv1.weight[:64]).clone()
    inner = F.conv2d(alpha * normed(inner, block.bn1).relu(), block.conv2.weight[:64, :64], padding=1)
    inner = F.conv2d(alpha * normed(inner, block.bn2).relu(), block.conv3.weight[:, :64])
    close(part.layer3[1].train()(x.clone()), (x + normed(inner, block.bn3)).relu())


def test_a_prefix_of_the_stacked_matrix_would_be_queries_alone() -> None:
    whole, part, _ = build("vit_tiny_patch16_224", PLAIN, 16, 2)
    wrong, right = whole.blocks[0].attn.qkv.weight[:48, :16], part.blocks[0].attn.qkv.weight
    torch.testing.assert_close(right[:16], 2 * wrong[:16])
    assert not torch.isclose(right[16:], 2 * wrong[16:]).any()


def test_the_published_small_of_a_large_vit_is_timms_vit_small() -> None:
    torch.manual_seed(0)
    large = create_backbone("vit_large_patch16_224", size=32, init_values=1e-5).eval()
    with torch.no_grad():
        for block in large.model.blocks:  # type: ignore[union-attr]
            block.ls1.gamma.fill_(0.5)
            block.ls2.gamma.fill_(0.5)
    elastic = Elastic(large, ElasticConfig(candidates=((384, 12),)))
    size = SubSize(384, (12,))
    alone = elastic.extract(large, size)
    assert round(sum(parameter.numel() for parameter in alone.parameters()) / 1e6, 2) == 21.6
    small = create_backbone("vit_small_patch16_224", size=32, init_values=1e-5, num_classes=0)
    report = small.model.load_state_dict(alone.model.state_dict(), strict=True)
    assert report.missing_keys == report.unexpected_keys == []
    assert "norm.bias" in small.model.state_dict()
    images = torch.randn(2, 3, 32, 32)
    expected = elastic.take(large, size)(images)
    torch.testing.assert_close(small.eval()(images), expected, rtol=1e-5, atol=1e-5)


def test_the_whole_network_is_its_own_largest() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", **PLAIN)
    elastic = Elastic(backbone, ElasticConfig(depth=3))
    assert elastic.take(backbone, elastic.full) is backbone
    alone: Backbone = elastic.extract(backbone, elastic.full)
    assert alone is not backbone
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(alone(images), backbone(images))
