"""The masked form of every family of timm that has one: the same network, no leak, both executions alike."""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.masking import Masking, random_masking
from unlabeled.ssl.backbones.masked.sparse import SparseEncoder, convert
from unlabeled.ssl.backbones.masked.sparse.gathering import Cells
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap
from unlabeled.ssl.core.errors import CapabilityError

ARCHITECTURES = json.loads(
    resources.files("unlabeled.workflows.compatibility").joinpath("architectures.json").read_text()
)
SUPPORTED = [
    "byobnet",
    "convmixer",
    "convnext",
    "cspnet",
    "cspnext",
    "densenet",
    "dla",
    "dpn",
    "efficientnet",
    "fasternet",
    "fastvit",
    "focalnet",
    "ghostnet",
    "hardcorenas",
    "hgnet",
    "hrnet",
    "inception_next",
    "lcnetv2",
    "mambaout",
    "metaformer",
    "mobilenetv3",
    "nfnet",
    "nin",
    "rdnet",
    "regnet",
    "repghost",
    "repvit",
    "res2net",
    "resnest",
    "resnet",
    "resnetv2",
    "rexnet",
    "selecsls",
    "senet",
    "sknet",
    "starnet",
    "tresnet",
    "vgg",
    "vovnet",
    "xception_aligned",
]

XCEPTION = [
    *({"in_chs": 64, "out_chs": 32, "stride": 2}, {"in_chs": 32, "out_chs": 48, "stride": 2}),
    *({"in_chs": 48, "out_chs": 64, "stride": 2}, {"in_chs": 64, "out_chs": 64, "stride": 1}),
    *({"in_chs": 64, "out_chs": (64, 80, 80), "stride": 2},),
    *({"in_chs": 80, "out_chs": (96, 96, 128), "no_skip": True, "stride": 1},),
]
NARROWER = {
    "densenet": {"block_config": (2, 2, 2, 2), "growth_rate": 16},
    "rdnet": {"growth_rates": [16, 24, 32, 32, 32, 32, 48], "num_init_features": 16},
    "repvit": {"embed_dim": (16, 32, 48, 64), "depth": (1, 1, 4, 1)},
    "res2net": {"layers": (1, 2, 1, 1)},
    "tresnet": {"width_factor": 0.25, "layers": (2, 2, 3, 2)},
    "vgg": {"mlp_ratio": 0.01},
    "xception_aligned": {"block_cfg": XCEPTION},
}
"""The same layers as in the table, with fewer channels, where a network has many."""


def build(module: str) -> Backbone:
    entry = ARCHITECTURES[module]
    torch.manual_seed(0)
    kwargs = {**entry.get("kwargs", {}), **NARROWER.get(module, {})}
    return create_backbone(entry["name"], size=entry["size"], **kwargs)


@cache
def prepared(module: str) -> tuple[nn.Module, tuple[int, int], tuple[int, int]]:
    """The network in double precision with lively norms, its size, and one cell of its mask."""
    backbone = build(module)
    model = backbone.model.double()
    if module == "convmixer":
        model.blocks = model.blocks[:4]  # its 32 with norms over twelve places blow rounding up
    if module == "vgg":
        model.pre_logits = nn.Identity()  # 100 M parameters behind the last map
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "gamma" in name or "grn" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    stride = max(stage.stride for stage in backbone.stages)
    return model, (2 * stride, 3 * stride), (stride, stride)


def maps(model: nn.Module, images: Tensor, masking: Masking, cell, execution: str = "gathered") -> list[Tensor]:
    cells = Cells(masking, None if execution == "dense" else frozenset())
    x = MaskedMap(torch.where(masking.enlarged(cell)[:, None], images, 0.0), cells, cell, is_gathered=False)
    torch.manual_seed(1)  # the same drop paths
    found = model.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    assert all(isinstance(one, MaskedMap) for one in found)
    return [one.dense() for one in found]


def half_masked(images: int = 2) -> Masking:
    torch.manual_seed(2)
    return random_masking(torch.rand(images, 6), 3, (2, 3))


@pytest.mark.parametrize("module", SUPPORTED)
@torch.no_grad()
def test_with_everything_visible_it_is_the_original_bit_for_bit(module):
    model, size, cell = prepared(module)
    masking = random_masking(torch.rand(2, 6), 6, (2, 3))
    images = torch.randn(2, 3, *size, dtype=torch.double)
    plain, masked, tokens = copy.deepcopy(model), convert(copy.deepcopy(model)), convert(copy.deepcopy(model))
    for training in (False, True):  # the pass in eval mode leaves the networks as they were
        for network in (plain, masked, tokens):
            network.train(training)
        torch.manual_seed(1)
        expected = plain.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
        for found, wanted in zip(maps(masked, images, masking, cell, "dense"), expected, strict=True):
            assert torch.equal(found, wanted)
        for found, wanted in zip(masked.state_dict().items(), plain.state_dict().items(), strict=True):
            assert found[0] == wanted[0]
            assert torch.equal(found[1], wanted[1]), found[0]  # running statistics
        # On rows the sums run in another order.
        for found, wanted in zip(maps(tokens, images, masking, cell), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("module", SUPPORTED)
@torch.no_grad()
def test_masked_places_are_zero_and_nothing_of_them_leaks(module):
    model, size, cell = prepared(module)
    masking = half_masked()
    shown = masking.enlarged(cell)[:, None]
    images = torch.randn(2, 3, *size, dtype=torch.double)
    noise = torch.where(shown, images, 10 * torch.randn_like(images))
    masked = convert(copy.deepcopy(model)).train()  # whose running statistics nothing reads
    for execution in ("dense", "gathered"):
        encoder = _encoder(masked, size, cell, execution)
        first, second = encoder(images, masking), encoder(noise, masking)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
            factor = (one.shape[-2] // 2, one.shape[-1] // 3)
            hidden = ~masking.enlarged(factor)[:, None].expand_as(one)
            assert not one[hidden].any()
            assert one[~hidden].abs().sum() > 0


def _encoder(model: nn.Module, size, cell, execution: str):
    """`SparseEncoder.maps` on a bare network: images enter as they are, with their masked pixels."""

    class Bare:
        def maps(self, x: Tensor, indices: list[int]) -> list[Tensor]:
            torch.manual_seed(1)
            found = model.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
            return list(found)

        def require(self, *_: object, **__: object) -> None:
            pass

    bare = Bare()
    bare.model = model
    encoder = SparseEncoder(bare, cell, execution)
    return lambda images, masking: [one.dense() for one in encoder.maps(images, masking, [])]


@pytest.mark.parametrize("module", SUPPORTED)
def test_rows_and_masked_maps_give_the_same_values_and_gradients(module):
    model, size, cell = prepared(module)
    masking = half_masked()
    images = torch.randn(2, 3, *size, dtype=torch.double)
    results = {}
    for execution in ("dense", "gathered"):
        network = convert(copy.deepcopy(model)).train()
        found = maps(network, images, masking, cell, execution)
        torch.manual_seed(3)
        sum((one * torch.randn(one.shape, dtype=one.dtype)).sum() for one in found).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results[execution] = (found, gradients, dict(network.named_buffers()))
    (maps_a, gradients_a, buffers_a), (maps_b, gradients_b, buffers_b) = results["dense"], results["gathered"]
    for one, other in zip(maps_a, maps_b, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert gradients_a.keys() == gradients_b.keys()
    for name, gradient in gradients_a.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (gradient - gradients_b[name]).abs().max() <= 1e-8 * scale, name
    for name, buffer in buffers_a.items():
        torch.testing.assert_close(buffer, buffers_b[name], atol=1e-8, rtol=1e-8)


def test_the_list_of_families_is_complete():
    """The measured matrix has FCMAE, which asks for the masked form alone, on these and no others."""
    modules = json.loads((Path(__file__).parents[4] / "docs" / "reference" / "matrix.json").read_text())["modules"]
    assert sorted(module for module, cells in modules.items() if cells["fcmae"][0] == "runs") == sorted(SUPPORTED)
    assert len(SUPPORTED) == 40


def test_a_family_without_a_masked_form_says_why():
    asked = ("swin_transformer", "vision_transformer", "inception_v3")
    reasons = {module: build(module).missing_reason("sparse_convs") or "" for module in asked}
    assert all(0 < len(reason) < 120 and "\n" not in reason for reason in reasons.values()), reasons
    assert reasons["swin_transformer"].endswith("attends to all places")
    assert reasons["vision_transformer"].endswith("attn: Attention attends to all places")
    assert "does not divide into" in reasons["inception_v3"]


def test_a_layer_without_a_rule_is_named_by_its_path():
    with pytest.raises(CapabilityError, match=r"cannot do sparse execution: it lacks sparse_convs \(stages\.2\.1"):
        SparseEncoder(build("mobilevit"), (32, 32))
