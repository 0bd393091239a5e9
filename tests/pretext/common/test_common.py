"""Patches, masks, positions and the decoder, each against arithmetic done another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unlabeled.pretext.common.checkpoint import load_mapped, require_fixed_table, resampled_positions
from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.mae import DecoderBlock, TransformerDecoder
from unlabeled.pretext.masked_image.masked_image import normalize_patches, patch_statistics, patchify, unpatchify
from unlabeled.ssl.backbones.masked.masking import random_masking
from unlabeled.ssl.core.errors import CheckpointError


def test_patch_order_is_row_column_channel():
    channel, y, x = torch.meshgrid(torch.arange(3), torch.arange(224), torch.arange(224), indexing="ij")
    patches = patchify((10000 * channel + 100 * y + x)[None], (16, 16))[0]
    assert patches.shape == (196, 768)
    for gy, gx, dy, dx, c in [(0, 0, 0, 0, 0), (3, 5, 2, 7, 1), (13, 13, 15, 15, 2), (0, 13, 15, 0, 2)]:
        value = patches[gy * 14 + gx, (dy * 16 + dx) * 3 + c].item()
        assert value == 10000 * c + 100 * (gy * 16 + dy) + gx * 16 + dx


@pytest.mark.parametrize("patch", [(4, 4), (2, 6)])
def test_patches_round_trip_and_can_be_picked(patch):
    images = torch.randn(2, 3, 8, 12)
    grid = (8 // patch[0], 12 // patch[1])
    patches = patchify(images, patch)
    assert torch.equal(unpatchify(patches, patch, grid), images)
    ids = torch.tensor([[3, 0, 1], [2, 3, 0]])
    assert torch.equal(patchify(images, patch, ids), patches[torch.arange(2)[:, None], ids])


@pytest.mark.parametrize(("a", "b"), [(1.0, 4.0), (-1e-3, 1e-3)])  # in the second, 1e-6 is about half of the variance
def test_normalized_patches_use_the_unbiased_variance(a, b):
    n = 12
    patch = torch.tensor([a, b]).repeat(n // 2)
    deviation = math.sqrt(((b - a) / 2) ** 2 * n / (n - 1) + 1e-6)
    expected = torch.tensor([-(b - a) / 2, (b - a) / 2]).repeat(n // 2) / deviation
    torch.testing.assert_close(normalize_patches(patch[None]), expected[None], atol=1e-6, rtol=0)
    assert torch.equal(normalize_patches(torch.full((2, 5, 48), 0.7)), torch.zeros(2, 5, 48))
    mean, spread = patch_statistics(patch[None])
    torch.testing.assert_close(normalize_patches(patch[None]) * spread + mean, patch[None])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_normalized_patches_leave_half_precision(half):
    torch.manual_seed(0)
    patch = 2.25 + 1e-3 * torch.randn(1, 768)
    exact = normalize_patches(patch.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (normalize_patches(patch) - exact).abs().max() < 1e-3
    stored = patch.to(half)  # rounded by whoever stored it; its statistics are still those of its own values
    assert normalize_patches(stored).dtype == torch.float32
    torch.testing.assert_close(
        normalize_patches(stored).double(), normalize_patches(stored.double()), atol=1e-3, rtol=0
    )


def test_positions_against_known_values():
    table = sincos_2d(8, (2, 3), prefix=1)
    assert table.shape == (1, 7, 8)
    assert table.dtype == torch.float32
    assert torch.equal(table[0, 0], torch.zeros(8))
    expected = [0.909297, 0.019999, -0.416147, 0.999800, 0.841471, 0.010000, 0.540302, 0.999950]  # row 1, column 2
    torch.testing.assert_close(table[0, 1 + 1 * 3 + 2], torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.equal(sincos_2d(8, (2, 3))[0], table[0, 1:])


def decoder(**kwargs) -> TransformerDecoder:
    torch.manual_seed(0)
    built = TransformerDecoder(24, 12, **{"dim": 16, "depth": 2, "heads": 4, "grid": (2, 3), **kwargs})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def reference_predictions(built: TransformerDecoder, latent, masking, grid, prefix: int):
    """The paper's way: mask tokens at their positions, positions in raster order, every block on everything."""
    tokens = built.embed(latent)
    raster = built.mask_token.repeat(latent.shape[0], grid[0] * grid[1], 1)
    for row in range(latent.shape[0]):
        for rank, position in enumerate(masking.ids_keep[row].tolist()):
            raster[row, position] = tokens[row, prefix + rank]
    x = torch.cat([tokens[:, :prefix], raster], 1) + sincos_2d(built.dim, grid, prefix)
    for block in built.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return built.pred(built.norm(x))[:, prefix:]


@pytest.mark.parametrize(("prefix", "depth", "grid"), [(1, 2, (2, 3)), (0, 1, (2, 3)), (5, 3, (4, 2))])
@torch.no_grad()
def test_decoder_equals_the_plain_way(prefix, depth, grid):
    built = decoder(depth=depth)
    masking = random_masking(torch.rand(3, grid[0] * grid[1]), 2, grid)
    latent = torch.randn(3, prefix + 2, 24)
    expected = reference_predictions(built, latent, masking, grid, prefix)
    torch.testing.assert_close(built.predict_all(latent, masking), expected, atol=1e-5, rtol=1e-5)
    hidden = expected[torch.arange(3)[:, None], masking.ids_masked]
    torch.testing.assert_close(built(latent, masking), hidden, atol=1e-5, rtol=1e-5)


def test_skipping_results_changes_no_gradient():
    torch.manual_seed(0)
    block = DecoderBlock(16, 4, qkv_bias=True)
    x = torch.randn(2, 7, 16)
    gradients = []
    for result in (block(x)[:, 3:], block(x, first=3)):
        block.zero_grad()
        result.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for whole, part in zip(*gradients, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-5)


def test_stored_positions_become_those_of_another_grid():
    own = torch.randn(1, 1 + 12, 8)
    fixed = resampled_positions(sincos_2d(8, (4, 4), prefix=1), own, (3, 4))
    torch.testing.assert_close(fixed, sincos_2d(8, (3, 4), prefix=1))

    learned = torch.randn(1, 1 + 16, 8)
    resampled = resampled_positions(learned, own, (3, 4))
    assert torch.equal(resampled[:, 0], learned[:, 0])
    image = learned[:, 1:].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    bicubic = nn.functional.interpolate(image, size=(3, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(resampled[:, 1:], bicubic.permute(0, 2, 3, 1).reshape(1, 12, 8))

    square = resampled_positions(learned, torch.randn(1, 1 + 16, 8), (2, 8))  # as many patches, another shape
    assert not torch.equal(square, learned)

    same = torch.randn(1, 1 + 12, 8)
    assert torch.equal(resampled_positions(same, own, (3, 4)), same)
    assert torch.equal(resampled_positions(same, own[:, 1:], (3, 4)), same[:, 1:])  # class token without a position
    registers = torch.randn(1, 5 + 12, 8)
    kept = resampled_positions(same, registers, (3, 4))
    assert torch.equal(kept[:, 0], same[:, 0])
    assert torch.equal(kept[:, 1:5], registers[:, 1:5])


def test_stored_positions_that_do_not_fit():
    own = torch.randn(1, 1 + 12, 8)
    with pytest.raises(CheckpointError, match=r"pos_embed has 15 patches, no square"):
        resampled_positions(torch.randn(1, 16, 8), own, (3, 4))
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 17, 12\) in the file, of width 8 here"):
        resampled_positions(torch.randn(1, 17, 12), own, (3, 4))
    require_fixed_table("decoder_pos_embed", sincos_2d(8, (4, 4), prefix=1))
    with pytest.raises(CheckpointError, match="decoder_pos_embed is not the fixed"):
        require_fixed_table("decoder_pos_embed", sincos_2d(8, (4, 4), prefix=1) + 0.01)


def test_mapped_loading_is_all_or_nothing():
    layer = nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    names = {"w": "weight", "b": "bias"}
    with pytest.raises(CheckpointError, match=r"b is \(4,\) in the file and \(3,\) here"):
        load_mapped(layer, {"w": torch.ones(3, 2), "b": torch.ones(4)}, names)
    assert torch.equal(layer.weight, before)
    with pytest.raises(CheckpointError, match="holds none of w, b"):
        load_mapped(layer, {"x": torch.ones(1)}, names)
    assert load_mapped(layer, {"w": torch.ones(3, 2), "x": torch.ones(1)}, names) == (["b"], ["x"])
    assert torch.equal(layer.weight, torch.ones(3, 2))
