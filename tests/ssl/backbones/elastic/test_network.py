"""What a sub-network shares with the whole network and what not: modes, rates, statistics, randomness, graphs."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig, SubSize
from unlabeled.ssl.backbones.weights import export_backbone, load_backbone
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.nn.batch_norm import SyncedBatchNorm2d, synchronize

VIT: dict[str, Any] = {"size": 32, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 4}
SWIN: dict[str, Any] = {
    "size": 32, "patch_size": 4, "embed_dim": 16, "depths": (1, 18), "num_heads": (2, 4), "window_size": 2,
    "drop_path_rate": 0.0,
}  # fmt: skip
CONVNEXT: dict[str, Any] = {"size": 32, "dims": (16, 32, 40, 48), "depths": (1, 1, 4, 1)}
RESNET: dict[str, Any] = {"size": 32, "channels": (16, 16, 32, 32), "layers": (1, 1, 4, 1)}


def build(name: str, arguments: dict[str, Any], **config: Any) -> tuple[Backbone, Elastic]:
    torch.manual_seed(0)
    backbone = create_backbone(name, **arguments)
    return backbone, Elastic(backbone, ElasticConfig(**config))


def images(backbone: Backbone, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *backbone.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "arguments", "block"), [
    ("vit_tiny_patch16_224", VIT, "model.blocks.1"),
    ("eva02_tiny_patch14_224", VIT, "model.blocks.1"),
    ("swin_tiny_patch4_window7_224", SWIN | {"depths": (1, 4)}, "model.layers.1.blocks.1"),
    ("convnext_atto", CONVNEXT, "model.stages.2.blocks.1"),
    ("resnet50", RESNET | {"size": 64, "channels": (64,) * 4, "norm_layer": "groupnorm"}, "model.layer3.1"),
])  # fmt: skip
def test_activation_checkpoints_recompute_the_sub_network_that_was_run(
    name: str, arguments: dict[str, Any], block: str
) -> None:
    backbone, elastic = build(name, arguments | {"drop_path_rate": 0.0})
    x = images(backbone)
    first, second = elastic.sizes[0], elastic.sizes[-2]
    assert first.width != second.width
    assert first.depth != second.depth
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    def gradients(*order: SubSize, checkpointing: bool) -> list[Tensor]:
        backbone.zero_grad()
        backbone.model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        losses = {}
        for size in order:
            taken = elastic.take(backbone, size)
            taken.get_submodule(block).register_forward_pre_hook(count)
            losses[size] = taken(x).square().mean()
        (losses[first] + 2 * losses[second]).backward()
        return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in backbone.parameters()]

    plain = gradients(first, second, checkpointing=False)
    assert runs == 2
    for order in ((first, second), (second, first)):
        torch.testing.assert_close(gradients(*order, checkpointing=True), plain, rtol=1e-5, atol=1e-7)
    assert runs == 2 + 2 * 4  # each run once more, in the backward pass
    assert any(grad.any() for grad in plain)


def test_swin_alternates_as_timm_builds_it() -> None:
    backbone, elastic = build("swin_tiny_patch4_window7_224", SWIN, depth=(1, 6))
    taken = elastic.take(backbone, elastic.sizes[0])
    shifts = [block.shift_size[0] for block in taken.model.layers[1].blocks]  # type: ignore[union-attr,index]
    assert shifts == [0, 1, 0, 1, 0, 1]
    alone = elastic.extract(backbone, elastic.sizes[0])
    torch.testing.assert_close(alone(images(backbone)), taken(images(backbone)))


def test_swin_keeps_the_published_shifts_and_does_not_extract_them() -> None:
    backbone, elastic = build("swin_tiny_patch4_window7_224", SWIN, depth=(1, 6), block_order="published")
    least = elastic.sizes[0]
    taken = elastic.take(backbone, least)
    blocks: Any = taken.model.layers[1].blocks  # type: ignore[union-attr,index]
    assert elastic.blocks(least)[1] == (0, 3, 6, 10, 13, 17)
    assert [block.shift_size[0] for block in blocks] == [0, 1, 0, 0, 1, 1]
    assert [block.attn_mask is not None for block in blocks] == [False, True, False, False, True, True]
    x = torch.randn(2, 4, 4, 16)
    masks = [block.attn_mask for block in backbone.model.layers[1].blocks]  # type: ignore[union-attr,index]
    assert blocks[5].attn_mask is masks[17]
    assert blocks[1](x).isfinite().all()
    with pytest.raises(
        ConfigError, match=r"elastic.block_order: published keeps blocks for 8x1-6 whose windows do not"
    ):
        elastic.extract(backbone, least)
    every = SubSize(8, (1, 18))
    torch.testing.assert_close(
        elastic.extract(backbone, every)(images(backbone)), elastic.take(backbone, every)(images(backbone))
    )


@pytest.mark.parametrize(("name", "arguments", "path"), [
    ("vit_tiny_patch16_224", VIT, "blocks.{}.drop_path2"),
    ("resnet50", RESNET, "layer3.{}.drop_path"),
])  # fmt: skip
def test_a_kept_block_keeps_its_rate_of_dropping(name: str, arguments: dict[str, Any], path: str) -> None:
    backbone, elastic = build(
        name, arguments | {"drop_path_rate": 0.3}, candidates=((16, 3 if arguments is VIT else 6),)
    )
    block, kept = path.rpartition(".")[0], elastic.blocks(elastic.sizes[0])
    numbers = next(numbers for numbers in kept if len(numbers) == 3)

    def rates(network: Backbone, numbers: tuple[int, ...]) -> list[float]:
        blocks = [dict(network.model.get_submodule(block.format(n)).named_modules()) for n in numbers]
        return [getattr(one.get(path.rpartition(".")[2]), "drop_prob", 0.0) for one in blocks]

    assert numbers == (0, 1, 3)
    expected = rates(backbone, numbers)
    assert len(set(expected)) == 3
    assert rates(elastic.take(backbone, elastic.sizes[0]), (0, 1, 2)) == expected
    for module in backbone.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.125
    assert 0.125 in rates(elastic.take(backbone, elastic.sizes[0]), (0, 1, 2))


def test_batch_norms_leave_the_statistics_of_the_whole_network_alone() -> None:
    backbone, elastic = build("resnetaa50d", RESNET)
    before = copy.deepcopy(backbone.state_dict())
    taken = elastic.take(backbone, elastic.sizes[0])
    taken(images(backbone, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert int(taken.model.bn1.num_batches_tracked) == 1  # type: ignore[union-attr,arg-type]
    inner: Any = taken.get_submodule("model.layer1.0.bn1")
    assert inner.running_mean.shape == (8,)
    assert inner.running_mean.any()
    backbone(images(backbone, 4))
    slices = elastic.extract(backbone, elastic.sizes[0]).get_submodule("model.layer1.0.bn1").running_mean
    whole: Any = backbone.get_submodule("model.layer1.0.bn1").running_mean
    assert torch.equal(slices, whole[:8])  # type: ignore[arg-type]


def test_batch_norms_that_are_synchronized_later_are_so_in_sub_networks() -> None:
    backbone, elastic = build("resnet50", RESNET)
    elastic.take(backbone, elastic.sizes[0])
    synchronize(backbone)
    norms = [part for part in elastic.take(backbone, elastic.sizes[0]).modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert all(type(norm) is SyncedBatchNorm2d for norm in norms)


@pytest.mark.parametrize(("name", "arguments"), [
    ("vit_tiny_patch16_224", VIT), ("swinv2_tiny_window8_256", SWIN), ("resnetaa50d", RESNET),
])  # fmt: skip
def test_random_state_is_left_alone(name: str, arguments: dict[str, Any]) -> None:
    backbone = create_backbone(name, **arguments)
    state, python = torch.get_rng_state(), random.getstate()
    elastic = Elastic(backbone, ElasticConfig())
    for size in elastic.sizes[:3]:
        elastic.take(backbone, size)
        elastic.extract(backbone, size)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


@pytest.mark.parametrize(("name", "arguments"), [
    ("eva02_base_patch14_224", VIT), ("beit_base_patch16_224", VIT), ("swinv2_tiny_window8_256", SWIN),
    ("resnetaa50d", RESNET),
])  # fmt: skip
def test_the_type_of_numbers_is_followed_and_nothing_is_lost(name: str, arguments: dict[str, Any]) -> None:
    backbone, elastic = build(name, arguments)
    backbone.eval()
    size, x = elastic.sizes[0], images(backbone)
    expected = elastic.take(backbone, size)(x)
    backbone.double()
    for network in (elastic.take(backbone, size), elastic.extract(backbone, size)):
        tensors = [*network.parameters(), *network.buffers()]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
        torch.testing.assert_close(network(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(elastic.take(backbone.float(), size)(x), expected)


def test_networks_can_be_copied_and_pickled_after_use() -> None:
    backbone, elastic = build("vit_tiny_patch16_224", VIT)
    x = images(backbone)
    features = elastic.take(backbone, elastic.sizes[0])(x)
    features.sum().backward()
    pickled = pickle.loads(pickle.dumps(backbone))
    for network, sizes in (copy.deepcopy((backbone, elastic)), (pickled, elastic)):
        assert network is not backbone
        torch.testing.assert_close(sizes.take(network, elastic.sizes[0])(x), features)


def test_a_twin_lends_its_parameters_as_well() -> None:
    backbone, elastic = build("vit_tiny_patch16_224", VIT)
    twin = backbone.twin()
    twin.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        features = elastic.take(twin, elastic.sizes[0])(images(backbone))
    assert not features.requires_grad
    torch.testing.assert_close(features, elastic.take(backbone, elastic.sizes[0])(images(backbone)))


def test_modes_hooks_and_statistics_of_images() -> None:
    backbone, elastic = build("vit_tiny_patch16_224", VIT)
    backbone.eval()
    backbone.model.get_submodule("blocks.3").train()
    backbone.set_statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    taken = elastic.take(backbone, elastic.sizes[0])
    modes = {name for name, part in taken.model.blocks.named_children() if part.training}  # type: ignore[union-attr]
    assert modes == {"1"}
    assert (taken.mean, taken.std) == (backbone.mean, backbone.std)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(taken.normalize(image), backbone.normalize(image))
    calls: list[Any] = []
    taken.model.register_forward_hook(lambda *args: calls.append(args))
    taken.train()
    assert not backbone.model.training
    again = elastic.take(backbone, elastic.sizes[0])
    assert not again.model._forward_hooks
    assert not again.training


def test_layers_of_parameters_are_those_of_the_whole_network() -> None:
    backbone, elastic = build("vit_tiny_patch16_224", VIT)
    layers = backbone.parameter_layers()
    taken = elastic.take(backbone, elastic.sizes[0])
    assert taken.depth == 2
    taken(images(backbone)).square().sum(0)[:3].sum().backward()
    assert backbone.parameter_layers() == layers
    reached = {layers[name] for name, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {0, 1, 4, 5}  # stem, the first and the last of four blocks, what follows them


def test_an_extracted_network_is_exported_and_loaded(tmp_path: Path) -> None:
    backbone, elastic = build("vit_tiny_patch16_224", VIT)
    alone = elastic.extract(backbone.eval(), elastic.sizes[0])
    export_backbone(alone, tmp_path)
    loaded = load_backbone(tmp_path).eval()
    assert (loaded.embed_dim, loaded.depth) == (16, 2)
    assert torch.equal(loaded(images(backbone)), alone(images(backbone)))


def test_norms_of_every_size_have_biases() -> None:
    """The published code passes a device where newer torch expects the bias, and has none."""
    backbone, elastic = build("vit_tiny_patch16_224", VIT)
    for size in elastic.sizes:
        norms = [part for part in elastic.take(backbone, size).modules() if isinstance(part, nn.LayerNorm)]
        assert len(norms) == 2 * size.depth + 1
        assert all(norm.bias is not None and norm.bias.shape == norm.weight.shape for norm in norms)
