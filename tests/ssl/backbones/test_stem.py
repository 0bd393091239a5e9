"""Which first layers make one token of each patch, and how tokens are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.stem import Stem, find_stem, substituted

SIZE = (16, 24)


class Net(nn.Module):
    """A model with timm's methods: a stem and a convolution, with ways to spoil it."""

    def __init__(self, stem: nn.Module, *, twice: bool = False, bypass: bool = False) -> None:
        super().__init__()
        self.stem = stem
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.twice, self.bypass = twice, bypass

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.stem(x)
        tokens = tokens + self.stem(x) if self.twice else tokens
        tokens = tokens + x.mean() if self.bypass else tokens
        return self.body(tokens)

    def forward_intermediates(self, x: Tensor, **_: Any) -> list[Tensor]:
        return [self.forward_features(x)]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.table


class Turned(nn.Module):
    """Rows of a square grid become its columns: the right shape in the wrong order."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(2, 3)


def patches(kernel: int = 4, stride: int = 4, padding: int = 0, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(3, 8, kernel, stride, padding, dilation)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        (patches(), "stem"),
        (nn.Sequential(patches(), nn.GELU(), nn.Conv2d(8, 8, 1)), "stem"),
        (nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)), "stem"),
        (nn.Sequential(patches(), Positions()), "stem.0"),  # the token comes before positions
        (nn.Sequential(patches(), nn.BatchNorm2d(8)), "stem.0"),  # its statistics depend on masked patches
        (nn.Sequential(patches(), nn.GroupNorm(1, 8)), "stem.0"),
    ],
)
def test_the_outermost_layer_that_keeps_patches_apart(stem, name):
    assert find_stem(Net(stem), SIZE) == Stem(name, (4, 4), 8, "NCHW")


@pytest.mark.parametrize(
    "net",
    [
        Net(patches(kernel=5, padding=1)),
        Net(patches(kernel=4, stride=2)),
        Net(patches(kernel=2, dilation=2)),
        Net(nn.Sequential(nn.AvgPool2d(3, 1, 1), patches())),  # only the pooling overlaps
        Net(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 4, 4))),
        Net(patches(), twice=True),
        Net(patches(), bypass=True),
        Net(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 8, 2, 2))),  # a patch is not what its strides say
    ],
)
def test_no_stem_where_something_else_sees_a_patch(net):
    assert find_stem(net, SIZE) is None


def test_shapes_that_do_not_fit_or_only_seem_to():
    assert find_stem(Net(patches()), (18, 24)) is None
    turned = find_stem(Net(nn.Sequential(patches(), Turned())), (16, 16))
    assert turned is not None
    assert turned.name == "stem.0"
    assert find_stem(Net(nn.Conv2d(3, 8, (2, 4), (2, 4))), SIZE) == Stem("stem", (2, 4), 8, "NCHW")


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        (
            "vit_tiny_patch16_224",
            {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
            ("patch_embed", "NLC"),
        ),
        ("test_vit", {}, ("patch_embed", "NHWC")),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1)}, ("patch_embed", "NHWC")),
        ("test_convnext", {}, ("stem", "NCHW")),
        ("test_resnet", {}, None),
        ("test_efficientnet", {}, None),
        ("xcit_nano_12_p8_224", {"depth": 1}, None),
    ],
)
def test_stems_of_timm(name, kwargs, expected):
    stem = find_stem(create_backbone(name, size=64, **kwargs).model, (64, 64))
    assert (stem and (stem.name, stem.layout)) == expected


@pytest.mark.parametrize("layout", ["NLC", "NHWC", "NCHW"])
def test_a_token_replaces_masked_patches_only_inside_the_context(layout):
    shapes = {"NLC": (0, 2, 3, 1), "NHWC": (0, 2, 3, 1), "NCHW": (0, 1, 2, 3)}
    net = nn.Sequential()
    net.add_module("stem", nn.Identity())
    grid = torch.randn(2, 8, 4, 6)
    result = grid.permute(shapes[layout])
    result = result.flatten(1, 2) if layout == "NLC" else result
    visible = torch.rand(2, 4, 6) < 0.5
    token = nn.Parameter(torch.randn(1, 1, 8))
    stem = Stem("stem", (4, 4), 8, layout)
    with substituted(net, stem, visible, token):
        found = stem.tokens(net(result), (4, 6))
    expected = torch.where(visible[..., None], grid.permute(0, 2, 3, 1), token.view(8))
    assert torch.equal(found, expected)
    assert torch.equal(net(result), result)
    found.sum().backward()
    assert torch.equal(token.grad.view(8), torch.full((8,), float((~visible).sum())))


def test_the_hook_goes_away_when_the_network_fails():
    net = nn.Sequential()
    net.add_module("stem", nn.Identity())
    stem = Stem("stem", (4, 4), 8, "NCHW")
    with pytest.raises(ValueError, match="it broke"), substituted(net, stem, torch.ones(1, 2, 2) > 0, torch.ones(8)):
        raise ValueError("it broke")
    assert not net.stem._forward_hooks


def test_finding_a_stem_changes_nothing():
    net = Net(nn.Sequential(patches(), nn.BatchNorm2d(8))).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    find_stem(net, SIZE)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
