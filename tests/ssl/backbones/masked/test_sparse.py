"""Rules of the masked form one by one: against arithmetic on the visible places alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, LayerNorm2d, ScaledStdConv2d, SEModule
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.masked.masking import Masking, random_masking
from unlabeled.ssl.backbones.masked.sparse import SparseEncoder, convert
from unlabeled.ssl.backbones.masked.sparse.gathering import Cells, gather_tokens, scatter_tokens
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap, NoRuleError

GRID, FACTOR, CHANNELS = (2, 3), (2, 4), 8
EXECUTIONS = ["gathered", "dense"]


def masking(keep: int = 3, images: int = 3) -> Masking:
    torch.manual_seed(4)
    return random_masking(torch.rand(images, 6), keep, GRID)


def masked(execution: str, tensor: Tensor | None = None, keep: int = 3) -> MaskedMap:
    cells = Cells(masking(keep), None if execution == "dense" else frozenset())
    if tensor is None:
        torch.manual_seed(5)
        tensor = torch.randn(3, CHANNELS, GRID[0] * FACTOR[0], GRID[1] * FACTOR[1], dtype=torch.double)
    return MaskedMap.from_dense(tensor, cells, FACTOR)


def lively(module: nn.Module) -> nn.Module:
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn_like(parameter))
    return convert(module)


def test_rows_stand_cell_by_cell_and_go_back_to_their_places():
    positions = torch.arange(3 * 4 * 12.0).view(3, 1, 4, 12)
    cells = Cells(masking())
    tokens = gather_tokens(positions, cells, FACTOR)
    assert tokens.shape == (3, 3 * 8, 1)
    first = int(cells.masking.ids_keep[1, 0])
    top, left = first // 3 * FACTOR[0], first % 3 * FACTOR[1]
    assert torch.equal(tokens[1, :8, 0], positions[1, 0, top : top + 2, left : left + 4].flatten())
    shown = cells.masking.enlarged(FACTOR)[:, None]
    assert torch.equal(scatter_tokens(tokens, cells, FACTOR), torch.where(shown, positions, 0.0))


def test_gradients_of_moving_rows():
    cells = Cells(masking())
    dense = torch.randn(3, 2, 4, 12, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, cells, FACTOR), dense)
    tokens = torch.randn(3, 24, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter_tokens(x, cells, FACTOR), tokens)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("keep", [2, 4])
def test_batch_norm_counts_visible_places_only(execution, keep):
    x = masked(execution, keep=keep)
    norm = lively(BatchNormAct2d(CHANNELS, act_layer=nn.ReLU)).train()
    tokens = x.tokens().flatten(0, 1)
    found = norm(x)
    wanted = F.batch_norm(tokens, None, None, norm.weight, norm.bias, True, 0.0, norm.eps).relu()
    torch.testing.assert_close(found.tokens().flatten(0, 1), wanted)  # with the activation inside
    torch.testing.assert_close(norm.running_mean, 0.1 * tokens.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * tokens.var(0))
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_layer_norm_leaves_masked_places_at_zero(execution):
    x = masked(execution)
    norm = lively(LayerNorm2d(CHANNELS))
    found = norm(x)
    torch.testing.assert_close(found.tokens(), F.layer_norm(x.tokens(), (CHANNELS,), norm.weight, norm.bias, norm.eps))
    hidden = ~x.cells.active(FACTOR).expand(found.shape)
    assert not found.dense()[hidden].any()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_squeeze_and_excite_averages_over_visible_places(execution):
    x = masked(execution)
    gate = lively(SEModule(CHANNELS, rd_channels=4))
    mean = x.tokens().mean(1)[:, :, None, None]
    scale = gate.fc2(gate.act(gate.fc1(mean))).sigmoid().flatten(1)[:, None]
    torch.testing.assert_close(gate(x).tokens(), x.tokens() * scale)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_response_norm_is_of_each_image_and_of_visible_places(execution):
    x = masked(execution)
    norm = lively(GlobalResponseNorm(CHANNELS, channels_last=False))
    found = norm(x).tokens()
    energy = x.tokens().square().sum(1).sqrt()
    relative = energy / (energy.mean(1, keepdim=True) + 1e-6)
    wanted = norm.weight * x.tokens() * relative[:, None] + norm.bias + x.tokens()
    torch.testing.assert_close(found, wanted)
    other = x.dense().clone()
    other[1] *= 3
    assert torch.equal(norm(masked(execution, other)).tokens()[0], found[0])


def test_response_norm_survives_large_activations_in_half_precision():
    norm = convert(GlobalResponseNorm(CHANNELS, channels_last=False)).half()
    with torch.no_grad():
        norm.weight.fill_(1)
    x = masked("gathered", 300 * torch.ones(3, CHANNELS, 4, 12, dtype=torch.half))
    assert torch.equal(norm(x).tokens(), 600 * torch.ones(3, 24, CHANNELS, dtype=torch.half))


def test_an_average_pool_counts_masked_places_in_its_divisor():
    pool = convert(nn.AvgPool2d(3, 1, 1))
    visible = torch.zeros(1, 2, 2, dtype=torch.bool)
    visible[0, 0, 0] = True
    cells = Cells(random_masking((~visible).flatten(1).float(), 1, (2, 2)))
    x = MaskedMap.from_dense(torch.ones(1, 1, 4, 4), cells, (2, 2))
    assert pool(x).dense()[0, 0, 0, 0] == pytest.approx(4 / 9)  # two by two ones among nine


def test_in_a_max_pool_the_zeros_of_masked_places_beat_negative_values():
    pool = convert(nn.MaxPool2d(3, 1, 1))
    visible = torch.tensor([[[True, False], [False, False]]])
    cells = Cells(random_masking((~visible).flatten(1).float(), 1, (2, 2)))
    x = MaskedMap.from_dense(-torch.ones(1, 1, 4, 4), cells, (2, 2))
    assert pool(x).dense()[0, 0, :2, :2].tolist() == [[-1, 0], [0, 0]]


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (2, 2, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1)])
def test_convolutions_see_zeros_at_masked_places(kernel, stride, padding):
    layer = lively(nn.Conv2d(CHANNELS, 5, kernel, stride, padding))
    x = masked("gathered")
    full = F.conv2d(x.dense(), layer.weight, layer.bias, stride, padding)
    factor = (FACTOR[0] // stride, FACTOR[1] // stride)
    wanted = torch.where(x.cells.active(factor), full, 0.0)
    for execution in EXECUTIONS:
        found = layer(masked(execution))
        assert found.factor == factor
        torch.testing.assert_close(found.dense(), wanted)


def test_weights_stay_standardized():
    layer = lively(ScaledStdConv2d(CHANNELS, 5, 1))
    plain = copy.deepcopy(layer)
    x = masked("gathered")
    wanted = torch.where(x.cells.active(FACTOR), plain(x.dense()), 0.0)
    torch.testing.assert_close(layer(x).dense(), wanted)


def test_a_converted_network_is_the_same_for_whole_images():
    backbone = create_backbone("convnextv2_atto", size=64, dims=(8, 16, 16, 16), depths=(1, 1, 1, 1))
    names = list(backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    before = backbone(images)
    SparseEncoder(backbone, (32, 32))
    assert torch.equal(backbone(images), before)
    assert list(backbone.state_dict()) == names
    kinds = [type(module) for module in backbone.model.modules()]
    SparseEncoder(backbone, (32, 32))
    assert [type(module) for module in backbone.model.modules()] == kinds  # converting twice changes nothing
    assert torch.equal(copy.deepcopy(backbone)(images), before)


def test_activation_checkpointing_keeps_the_mask_of_each_forward_pass():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = create_backbone("convnextv2_atto", size=64, dims=(8, 16, 16, 16), depths=(2, 2, 2, 2)).double()
        backbone.model.set_grad_checkpointing(checkpointing)
        backbone.model.train()
        encoder = SparseEncoder(backbone, (32, 32))
        torch.manual_seed(1)
        images = torch.randn(2, 3, 64, 64, dtype=torch.double)
        masks = [random_masking(torch.rand(2, 4), keep, (2, 2)) for keep in (1, 3)]
        both = [encoder.maps(images, one, [-1])[0].dense() for one in masks]  # two masks before one backward pass
        sum((one * (1 + number)).square().sum() for number, one in enumerate(both)).backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_half_precision_runs():
    backbone = create_backbone("resnet18", size=64, channels=[8, 8, 8, 8])
    encoder = SparseEncoder(backbone, (32, 32))
    mask = random_masking(torch.rand(2, 4), 2, (2, 2))
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.maps(images, mask, [-1])[0].dense()
    full = encoder.maps(images, mask, [-1])[0].dense()
    assert torch.isfinite(half).all()
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda x: x.flatten(2), "flatten puts its places into another order"),
        (lambda x: x[:, :, ::2], "taking a part of the places of a map has no masked form"),
        (lambda x: x.mean(2), r"mean over axes \[2\] has no masked form"),
        (lambda x: torch.fft.fft(x), "fft_fft has no masked form"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), r"interpolation \(bilinear\) mixes cells"),
        (lambda x: F.pad(x, (1, 1)) * 2, "a padded map is for a spatial layer only"),
        (lambda x: convert(nn.MultiheadAttention(8, 2))(x, x, x), "MultiheadAttention|another order|no masked form"),
        (lambda x: convert(nn.Conv2d(8, 8, 3).double())(x), "its map of 2x10 does not divide into 2x3 cells"),
    ],
)
def test_what_would_mix_places_is_refused(act, reason):
    with pytest.raises(NoRuleError, match=reason):
        act(masked("gathered"))
