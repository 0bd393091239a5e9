"""POA, trap by trap. Its losses by themselves are in test_poa_losses, its sub-networks in tests/core/test_elastic_*."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from unlabeled.pretext.self_distillation.poa import POA, POAConfig
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic import SubSize
from unlabeled.ssl.config.schema import OptimConfig
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.train.optimizer import parameter_groups

SMALL = {"locals": 2, "prototypes": [12, 20], "hidden": 16, "bottleneck": 8, "patches_from": 0.0}


def vit(**arguments: Any) -> Backbone:
    torch.manual_seed(0)
    size = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "init_values": 0.5}
    return create_backbone("vit_tiny_patch16_224", size=32, dynamic_img_size=True, **size | arguments)


def tiny(backbone: Backbone | None = None, **settings: Any) -> POA:
    config = POAConfig.model_validate(SMALL | settings)
    torch.manual_seed(1)
    return POA(config, backbone or vit()).train()


def batch(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"globals": (count, 2, 3, 32, 32), "locals": (count, 2, 3, 16, 16)}
    return {k: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for k, shape in shapes.items()}


# --- the loss --------------------------------------------------------------------------------------------------------


def sinkhorn(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Rows (n, K), as published: exponentials, divided in turns."""
    q = (logits / temperature).exp().t()
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).t()


def narrow(head: Any, width: int) -> Any:
    """A head for a sub-network: what its first layer sums over fewer inputs is scaled up."""
    part = copy.deepcopy(head)
    part.layers[0].weight.data = head.layers[0].weight[:, :width].detach() * head.layers[0].in_features / width
    return part


def reference(task: POA, crops: dict[str, torch.Tensor], draw: dict[str, torch.Tensor]) -> torch.Tensor:
    """Section 3.8 head by head, crop by crop and patch by patch, with an extracted network as elastic student."""
    large = [task.backbone.normalize(crops["globals"][:, view]) for view in range(2)]
    small = [task.backbone.normalize(crops["locals"][:, view]) for view in range(2)]
    size = task.size()
    alone = task.sizes.extract(task.backbone, size).double()
    count, positions = len(large[0]), 16
    counts = (draw["ratio"] * positions).round().long()
    masked_at = [
        [noise.argsort(descending=True)[:count] for noise, count in zip(draw["noise"][:, v], counts[:, v], strict=True)]
        for v in range(2)
    ]

    def tokens(network: Backbone, images: torch.Tensor, where: list[torch.Tensor] | None) -> torch.Tensor:
        def hide(_module: Any, _inputs: Any, found: torch.Tensor) -> torch.Tensor:
            found = found.clone()
            for image, chosen in enumerate(where or []):
                found[image].view(positions, -1)[chosen] = task.mask_token[0, 0, : found.shape[-1]]
            return found

        handle = network.model.patch_embed.register_forward_hook(hide)
        result = network.model.forward_features(images)
        handle.remove()
        return result

    total = 0.0
    teacher = task.teacher["backbone"]
    targets = [tokens(teacher, images, None) for images in large]
    for head, teaching in zip(task.heads, task.teacher["heads"], strict=True):
        assigned = sinkhorn(torch.cat([teaching(found[:, 0]) for found in targets]), 0.04).chunk(2)
        rows = [teaching(targets[v][b, 1 + masked_at[v][b]]) for v in range(2) for b in range(count)]
        assigned_patches = sinkhorn(torch.cat(rows), 0.04).split([len(row) for row in rows])
        predictions = {}
        for name, network, used in (("IS", task.backbone, head), ("ES", alone, narrow(head, size.width))):
            seen = [tokens(network, large[v], masked_at[v]) for v in range(2)]
            crop = [(used(found[:, 0]) / 0.1).log_softmax(-1) for found in seen]
            crop += [(used(network.pooled(images)) / 0.1).log_softmax(-1) for images in small]
            patches = [
                (used(seen[v][b, 1 + masked_at[v][b]]) / 0.1).log_softmax(-1) for v in range(2) for b in range(count)
            ]
            predictions[name] = crop, patches

        def entropy(target: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
            return -(target * guess).sum(-1).mean()

        for name, weight in (("IS", 0.8), ("ES", 0.2)):
            crop, patches = predictions[name]
            swapped = torch.stack([entropy(assigned[1 - v], crop[v]) for v in range(2)]).mean()
            local = sum(entropy(assigned[t], crop[v]) for t in range(2) for v in (2, 3))
            total += weight * (2 * swapped + local) / 6 / 2
            masked = [entropy(a, p) for a, p in zip(assigned_patches, patches, strict=True) if len(p)]
            total += weight * sum(masked) / (2 * count) / 2
        both = zip(predictions["IS"][0], predictions["ES"][0], strict=True)
        same = [entropy(whole.detach().exp(), part) for whole, part in both]
        total += 0.2 * ((same[0] + same[1]) / 2 + (same[2] + same[3]) / 2) / 2
    for network, weight in ((task.backbone, 0.1), (alone, 0.1)):
        for view in range(2):
            unit = F.normalize(tokens(network, large[view], masked_at[view])[:, 0], dim=1)
            distances = (unit[:, None] - unit[None]).square().sum(-1).add(4 * torch.eye(count)).sqrt()
            total += weight * -(distances.min(1).values + 1e-8).log().mean() / 2
    return total


@pytest.mark.parametrize("chunk", [None, 5])
def test_forward_equals_a_slow_reference(chunk: int | None) -> None:
    task = tiny(chunk=chunk).double()
    for parameter in task.teacher.parameters():
        parameter.data.mul_(1.1)
    torch.nn.init.normal_(task.mask_token)
    crops = batch()
    torch.manual_seed(4)
    draw = {name: value.double() for name, value in task.draw(crops).items()}
    assert 0 < (draw["ratio"] > 0).sum() < 6
    output = task(crops, **draw)
    assert output.loss.item() == pytest.approx(reference(task, crops, draw).item(), rel=1e-6)


def test_the_elastic_students_terms_reach_its_part_of_the_network_only() -> None:
    terms = {"cross_intact": 0, "cross_elastic": 1, "same_elastic": 1, "patch_intact": 0, "patch_elastic": 1}
    task = tiny(terms=terms, koleo_weight=0)
    while task.size() != SubSize(16, (2,)):
        task.after_step(0.0)
    task(batch()).loss.backward()
    attention, dropped = task.backbone.model.blocks[0].attn.qkv.weight.grad, task.backbone.model.blocks[1].mlp.fc1
    selected = torch.zeros(3, 32, 32, dtype=torch.bool)
    selected[:, :16, :16] = True
    assert attention.view(3, 32, 32)[~selected].abs().max() == 0
    assert attention.view(3, 32, 32)[selected].abs().min() > 0
    assert dropped.weight.grad.abs().max() == 0
    assert task.heads[0].layers[0].weight.grad[:, 16:].abs().max() == 0
    assert task.mask_token.grad[..., 16:].abs().max() == 0
    assert task.mask_token.grad[..., :16].abs().max() > 0


def test_both_students_see_the_same_masked_patches_and_the_teacher_none(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny()
    seen: list[tuple[str, torch.Tensor | None]] = []
    encode = task.masker.encode

    def watched(network: Backbone, images: torch.Tensor, visible: Any = None, token: Any = None) -> Any:
        name = "teacher" if network is task.teacher["backbone"] else "IS" if network is task.backbone else "ES"
        seen.append((name, visible))
        return encode(network, images, visible, token)

    monkeypatch.setattr(task.masker, "encode", watched)
    task(batch())
    masks = dict(seen)
    assert list(masks) == ["teacher", "IS", "ES"]
    assert masks["teacher"] is None
    assert masks["IS"] is masks["ES"]
    assert not masks["IS"].all()


def test_nothing_is_hidden_before_its_time() -> None:
    task, crops = tiny(patches_from=0.5), batch()
    assert task.draw(crops)["ratio"].abs().max() == 0
    output = task(crops)
    output.loss.backward()
    assert output.logs["patch_intact"] == output.logs["patch_elastic"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    task.after_step(0.5)
    assert task.draw(crops)["ratio"].max() > 0.1


def test_without_smaller_sizes_there_is_one_student() -> None:
    task = tiny(elastic={"width": 32, "depth": 4}, intact_weight=0.7, koleo_weight=0)
    output = task(batch())
    logs = output.logs
    assert not {"cross_elastic", "same_elastic", "patch_elastic"} & logs.keys()
    assert output.loss.item() == pytest.approx(0.7 * (logs["cross_intact"] + logs["patch_intact"]).item(), rel=1e-5)


# --- the walk through the sizes --------------------------------------------------------------------------------------


def test_each_step_has_a_size_and_a_resumed_run_goes_on_with_the_next() -> None:
    task = tiny()
    entries = len(task.sizes.sizes)
    assert entries == 9  # widths 16, 24, 32 by depths 2, 3, 4
    walked = []
    for _ in range(12):
        assert task.size() == task.size()
        walked.append(task.size())
        task.after_step(0.0)
    assert task.sizes.full not in walked
    torch.manual_seed(99)
    other = POA(task.config, vit())
    other.load_state_dict(task.state_dict())
    for _ in range(12):
        assert other.size() == task.size()
        other.after_step(0.0)
        task.after_step(0.0)
    assert len({tuple(walked), *(tuple(_walk(seed)) for seed in (5, 6))}) == 3


def _walk(seed: int) -> list[SubSize]:
    backbone = vit()
    torch.manual_seed(seed)
    task = POA(POAConfig.model_validate(SMALL), backbone)
    sizes = []
    for _ in range(12):
        sizes.append(task.size())
        task.after_step(0.0)
    return sizes


def test_optimizer_groups_are_those_of_the_whole_network_whatever_was_drawn() -> None:
    task = tiny()
    first = parameter_groups(task, OptimConfig(layer_decay=0.9))
    task(batch()).loss.backward()
    task.after_step(0.5)
    task(batch()).loss.backward()
    second = parameter_groups(task, OptimConfig(layer_decay=0.9))
    assert [(g["names"], g["lr_scale"], g["decays"]) for g in first] == [
        (g["names"], g["lr_scale"], g["decays"]) for g in second
    ]
    blocks = {name: g["lr_scale"] for g in first for name in g["names"] if name.endswith("norm1.weight")}
    assert list(blocks.values()) == pytest.approx([0.9**4, 0.9**3, 0.9**2, 0.9])


# --- what is exported, and what cannot be ----------------------------------------------------------------------------


def test_the_teacher_is_exported_with_its_sizes() -> None:
    task = tiny(elastic={"width": 16, "depth": 3})
    assert task.encoder() is task.teacher["backbone"]
    assert task.elastic() == task.config.elastic
    assert [str(size) for size in task.sizes.sizes][:2] == ["16x3", "16x4"]


def test_figures_watch_for_collapse() -> None:
    task = tiny()
    output = task(batch())
    assert output.features is not None
    assert output.features.shape == (3, 32)
    assert 0 <= output.logs["teacher_information"] <= 1


def test_stochastic_depth_may_be_the_same_in_each_block() -> None:
    task = tiny(vit(drop_path_rate=0.1), drop_path=0.3)
    assert {block.drop_path1.drop_prob for block in task.backbone.model.blocks} == {0.3}
    part = task.sizes.take(task.backbone, task.sizes.sizes[0])
    assert {block.drop_path2.drop_prob for block in part.model.blocks} == {0.3}
    teacher = task.teacher["backbone"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher.pooled(x), teacher.pooled(x))


def test_lengths_of_prototypes_are_learned_and_frozen_with_them() -> None:
    task = tiny(freeze_prototypes=0.5)
    task(batch()).loss.backward()
    lengths = [head.last_layer.weight_g for head in task.heads]
    assert all(length.requires_grad and length.grad is not None for length in lengths)
    task.before_step(0.4)
    assert all(parameter.grad is None for head in task.heads for parameter in head.last_layer.parameters())
    decays = {named.name: named.decay for named in task.parameter_groups()}
    assert not any(decays[f"heads.{i}.last_layer.weight_g"] for i in range(2))


@pytest.mark.parametrize(
    ("name", "arguments", "fine"),
    [
        ("swin_tiny_patch4_window7_224",
         {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 4), "num_heads": (2, 4)}, 2),
        ("convnext_atto", {"patch_size": 2, "dims": (16, 16, 16, 32), "depths": (1, 1, 4, 1)}, 1),
        ("resnet50", {"layers": (1, 1, 4, 1), "channels": (8, 8, 16, 32), "norm_layer": "layernorm2d"}, 2),
        ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}, 1),
    ],
)  # fmt: skip
def test_other_families(name: str, arguments: dict[str, Any], fine: int) -> None:
    task = tiny(create_backbone(name, size=64, **arguments), locals=0, fine=fine, elastic={"width": 8})
    crops = {"globals": torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)}
    output = task(crops)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    assert task.masker.grid_of(task.backbone, (64, 64)) == tuple(
        64 // task.backbone.stages[-1].stride * fine for _ in range(2)
    )


def test_what_cannot_be_is_said_in_one_line() -> None:
    with pytest.raises(CapabilityError, match=r"cannot do POA: it lacks elastic \(sub-networks are known for ViT"):
        tiny(create_backbone("mobilenetv3_small_050", size=64), locals=0)
    with pytest.raises(
        ConfigError, match=r"elastic.width: 20 is not possible in a backbone of width 32; give a multiple"
    ):
        tiny(elastic={"width": 20})
    batch_norms = create_backbone("resnet50", size=64, layers=(1, 1, 4, 1), channels=(8, 8, 16, 32))
    with pytest.raises(ConfigError, match=r"task.size_per_rank: true is not possible with resnet50, whose batch norms"):
        tiny(batch_norms, locals=0, size_per_rank=True)
    with pytest.raises(ValueError, match=r"prototypes \[1\] must be one number or more of at least 2"):
        tiny(prototypes=[1])
