"""Networks without a timm name, built again from their structure."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from own_networks import Scaled, TinyConv, Uncopyable
from torch import nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError


class Tied(TinyConv):
    """Two names for one parameter, and a table in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.block
        self.register_buffer("table", torch.arange(16.0), persistent=False)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return super().forward_head(features) + self.table


class Attends(TinyConv):
    """Draws with attention, whose reset has an underscore, and a method of its own that has the last word."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.scale = nn.Parameter(torch.ones(16))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 3)


def test_a_twin_has_the_structure_and_other_weights() -> None:
    torch.manual_seed(0)
    given = Backbone(Tied(), size=(16, 24), mean=(0.1, 0.2, 0.3))
    given.model.norm.running_mean.fill_(7)
    given.model.block = nn.Identity()  # as a task might change it: the structure was kept before
    twins = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        twins.append(given.twin())
    one, same, other = twins
    assert (one.name, one.custom, one.input_size, one.mean) == ("Tied", True, (16, 24), (0.1, 0.2, 0.3))
    assert one.model.again is one.model.block
    assert isinstance(one.model.block, nn.Conv2d)
    assert torch.equal(one.model.table, torch.arange(16.0))
    assert torch.equal(one.model.norm.running_mean, torch.zeros(8)), "drawn anew with its layer"
    assert torch.equal(one.model.stem.weight, same.model.stem.weight)
    assert not torch.equal(one.model.stem.weight, other.model.stem.weight)
    assert not torch.equal(one.model.stem.weight, given.model.stem.weight)


def test_what_no_layer_draws_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Scaled has no timm name, and no reset_parameters\(\) .* draws scale, "):
        Backbone(Scaled(), size=16).twin()
    assert torch.equal(Backbone(Attends(), size=16).twin().model.scale, torch.full((16,), 3.0))


def test_an_unfilled_one_takes_a_state_dict() -> None:
    given = Backbone(Scaled(), size=16)
    empty = given.unfilled()
    assert not empty.model.stem.weight.any()
    empty.load_state_dict(given.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(empty.eval().pooled(x), given.eval().pooled(x))
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in given.named_parameters()]


def test_the_structure_is_no_part_of_the_module_and_travels_with_it() -> None:
    given = Backbone(Tied(), size=16)
    assert {name.split(".")[0] for name in given.state_dict()} == {"model"}
    for again in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert again.twin().embed_dim == 16
    with pytest.raises(CapabilityError, match=r"Uncopyable cannot be copied \(cannot pickle 'generator' object\)"):
        Backbone(Uncopyable(), size=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"backbone.size: 0 is not possible; give pixels, one number or \(height, width\)"),
        ({"size": "big"}, r"backbone.size: 'big' is not possible"),
        ({"mean": (0.5,)}, r"backbone.mean: \(0.5,\) is not possible; give three numbers, one a channel"),
        ({"std": (0.5, 0, 1)}, r"backbone.std: .* give three positive numbers"),
        ({"size": 1}, r"backbone: OnlyLarge fails on an image of 3x1x1 \(too small\); give the size that it takes"),
    ],
)
def test_a_fault_of_the_constructor_is_one_line(arguments: dict[str, object], message: str) -> None:
    class OnlyLarge(TinyConv):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] < 4:
                raise ValueError("too small\nby far")
            return super().forward_features(x)

    with pytest.raises(ConfigError, match=message) as caught:
        Backbone(OnlyLarge(), **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
