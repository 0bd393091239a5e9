"""DINO and what it shares with its kin, trap by trap: crops, pairs, center, temperature, teacher, frozen prototypes."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import DINOLoss
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import unlabeled
from unlabeled.pretext.common.multi_crop import local_size
from unlabeled.pretext.registry import create_task
from unlabeled.pretext.self_distillation.dino import DINO, DINOConfig
from unlabeled.pretext.self_distillation.self_distillation import (
    TeacherStudent,
    assignment_metrics,
    by_crop,
    create_head,
    crop_major,
    cross_view_loss,
    directions,
    scores,
)
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.nn.batch_norm import synchronize

HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8}
PLAIN = {"jitter": 0.0, "gray": 0.0}


def vit(size: int | tuple[int, int] = 32, **arguments: Any) -> Backbone:
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    torch.manual_seed(1)
    return create_backbone("vit_tiny_patch16_224", size=size, **(small | arguments))


def resnet() -> Backbone:
    torch.manual_seed(1)
    return create_backbone("resnet18", size=32, channels=(8, 8, 16, 24), output_stride=8, zero_init_last=False)


def tiny(name: str = "dino", backbone: Backbone | None = None, **settings: Any) -> TeacherStudent:
    torch.manual_seed(0)
    fields = {"name": name, "locals": 3, "local_size": 16, "head": HEAD, **settings}
    task = create_task(fields, backbone or vit())
    assert isinstance(task, TeacherStudent)
    return task


def batch(images: int = 4, size: tuple[int, int] = (32, 32), local: int = 16, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"globals": (images, 2, 3, *size), "locals": (images, 3, 3, local, local)}
    return {k: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for k, shape in shapes.items()}


def teacher_logits(task: TeacherStudent, crops: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2, B, K), by the plain way: crop by crop through lightly's own forward."""
    backbone, head = task.teacher["backbone"], task.teacher["head"]
    with torch.no_grad():
        views = [backbone.pooled(task.backbone.normalize(crops["globals"][:, view])) for view in range(2)]
        return torch.stack([head(view) for view in views])


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [2, 3, 10])
def test_loss_is_that_of_the_formula_and_of_lightly(crops):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7).double(), torch.randn(crops, 5, 7).double().requires_grad_()
    assigned = (teacher / 0.04).softmax(-1)
    loss = cross_view_loss(assigned, (student / 0.1).log_softmax(-1))
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(crops):
            if s != t:
                total += -(assigned[t] * (student[s] / 0.1).log_softmax(-1)).sum(-1).mean()
                pairs += 1
    assert pairs == {2: 2, 3: 4, 10: 18}[crops]
    assert torch.allclose(loss, total / pairs, rtol=1e-12)
    theirs = DINOLoss(7).double()(list(teacher), list(student), teacher_temp=0.04)
    assert torch.allclose(loss, theirs, rtol=1e-6)
    mine, other = (torch.autograd.grad(one, student)[0] for one in (loss, theirs))
    assert torch.allclose(mine, other, atol=1e-7)


def test_pairs_of_the_same_crop_are_left_out():
    """With 2 large and 8 small crops, a large one is in one pair of 18 and a small one in two."""
    assigned = torch.full((2, 3, 4), 0.25)
    for crop in range(10):
        log_predicted = torch.zeros(10, 3, 4)
        log_predicted[crop] = -1
        assert cross_view_loss(assigned, log_predicted).item() == pytest.approx((1 if crop < 2 else 2) / 18)


def test_teacher_and_student_crops_are_crossed():
    assigned = F.one_hot(torch.tensor([[0], [1]]), 4).float()
    log_predicted = torch.full((2, 1, 4), -9.0)
    log_predicted[0, 0, 1] = log_predicted[1, 0, 0] = 0
    assert cross_view_loss(assigned, log_predicted).item() == 0
    assert cross_view_loss(assigned, log_predicted.flip(0)).item() == 9


def test_even_logits_give_the_logarithm_of_the_number_of_prototypes():
    task = tiny()
    for head in (task.head, task.teacher["head"]):
        head.last_layer.weight_g.data.zero_()
    output = task(batch())
    assert output.loss.item() == pytest.approx(math.log(24), rel=1e-6)
    assert output.logs["teacher_entropy"].item() == pytest.approx(1)
    assert output.logs["teacher_information"].item() == pytest.approx(0, abs=1e-6)


def test_figures_of_the_assignments():
    sharp = F.one_hot(torch.arange(4), 16).float()
    found = assignment_metrics(sharp.view(2, 2, 16))
    assert found["teacher_entropy"].item() == 0
    assert found["teacher_information"].item() == pytest.approx(math.log(4) / math.log(16))
    alike = assignment_metrics(sharp[:1].expand(2, 4, 16))
    assert alike["teacher_information"].item() == pytest.approx(0, abs=1e-6)
    logs = tiny()(batch()).logs
    assert 0 < logs["teacher_entropy"] < 1
    assert 0 < logs["teacher_information"] < 1 - logs["teacher_entropy"] + 1e-6


@pytest.mark.parametrize("small", [True, False])
def test_task_equals_lightlys_loss_over_steps_of_student_and_center(small):
    """Three steps with lightly's DINOLoss alongside ours, each with its own center."""
    task, loss_fn = tiny(teacher_temperature_start=0.07), DINOLoss(24, center_momentum=0.9)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.5)
    for step in range(3):
        crops = batch(seed=step)
        if not small:
            del crops["locals"]
        views = [task.backbone.normalize(kind[:, v]) for kind in crops.values() for v in range(kind.shape[1])]
        student = [task.head(task.backbone.pooled(view)) for view in views]
        expected = loss_fn(list(teacher_logits(task, crops)), student, teacher_temp=0.07)
        output = task(crops)
        assert output.loss.item() == pytest.approx(expected.item(), rel=2e-5)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step((step + 1) / 4)
        assert torch.allclose(task.centers["head"].value, loss_fn.center[0], atol=1e-6)
    assert task.centers["head"].value.abs().max() > 1e-3


def test_features_are_the_students_directions_of_the_first_large_crop():
    task, crops = tiny(), batch()
    output = task(crops)
    pooled = task.backbone.pooled(task.backbone.normalize(crops["globals"][:, 0]))
    assert torch.allclose(output.features, F.normalize(task.head.layers(pooled), dim=1), atol=1e-5)
    assert torch.allclose(output.features.norm(dim=1), torch.ones(4))
    assert not output.features.requires_grad


def test_logits_are_float32_under_autocast():
    head = create_head(32, DINOConfig(head=HEAD).head)
    units = directions(head, torch.randn(6, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert directions(head, torch.randn(6, 32)).dtype == torch.float32
        assert torch.equal(scores(head, units), scores(head, units.clone()).float())
        low = scores(head, units)
    assert torch.equal(low, head.last_layer(units))


# --- center, temperature, teacher ------------------------------------------------------------------------------------


def test_center_moves_after_use_by_the_mean_of_all_micro_steps():
    task = tiny()
    first, second = batch(seed=1), batch(seed=2)
    logits = torch.cat([teacher_logits(task, first), teacher_logits(task, second)], dim=1)
    before = task(first).loss
    assert task.centers["head"].value.abs().max() == 0
    assert torch.equal(task(first).loss, before)  # a forward pass moves nothing
    task.centers["head"].observed.clear()
    task(first), task(second)
    task.after_step(0.1)
    assert torch.allclose(task.centers["head"].value, 0.1 * logits.mean((0, 1))[None], atol=1e-6)
    assert not torch.equal(task(first).loss, before)


def test_evaluation_moves_no_center():
    task = tiny().eval()
    task(batch())
    task.after_step(0.1)
    assert task.centers["head"].value.abs().max() == 0


def test_temperature_rises_with_the_run():
    task = tiny()
    for progress, expected in ((0, 0.04), (0.15, 0.055), (0.3, 0.07), (1, 0.07)):
        task.progress.fill_(progress)
        assert task.temperature().item() == pytest.approx(expected)
    assert tiny(temperature_warmup=0).temperature().item() == pytest.approx(0.07)


def test_teacher_follows_backbone_and_head_and_keeps_its_own_statistics():
    task = tiny(backbone=resnet(), momentum=0.9)
    torch.manual_seed(3)
    old = {name: p.clone() for name, p in task.teacher.named_parameters()}
    for part in (task.backbone, task.head):
        for parameter in part.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    task(batch())
    statistics = {name: b.clone() for name, b in task.teacher.named_buffers() if "running" in name}
    assert any(not torch.equal(value, task.get_buffer(name)) for name, value in statistics.items())
    task.after_step(0.5)
    student = dict(task.named_parameters())
    for name, parameter in task.teacher.named_parameters():
        assert torch.allclose(parameter, 0.95 * old[name] + 0.05 * student[name], atol=1e-6), name
        assert not parameter.requires_grad
    assert {name.split(".")[0] for name in old} == {"backbone", "head"}
    for name, value in statistics.items():
        assert torch.equal(task.teacher.get_buffer(name), value)
    moved = {name: p.clone() for name, p in task.teacher.named_parameters()}
    task.after_step(1.0)
    assert all(torch.equal(moved[name], p) for name, p in task.teacher.named_parameters())


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_the_teacher_is_exported_unless_the_student_is_asked_for(name: str):
    task = tiny(name)
    assert task.encoder() is task.teacher["backbone"]
    student = tiny(name, export="student")
    assert student.encoder() is student.backbone


def test_teacher_starts_as_the_student_without_its_stochastic_depth():
    task = tiny(backbone=vit(drop_path_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5)).train()
    x = torch.randn(4, 3, 32, 32)
    student, teacher = task.backbone, task.teacher["backbone"]
    assert torch.equal(teacher.pooled(x), teacher.pooled(x))
    assert not torch.equal(student.pooled(x), student.pooled(x))
    assert torch.allclose(teacher.pooled(x), student.eval().pooled(x), atol=1e-6)


def test_what_a_resumed_run_needs_is_in_the_state():
    task = tiny()
    task(batch())
    task.after_step(0.2)
    other = tiny()
    other.load_state_dict(task.state_dict())
    assert other.temperature() == task.temperature()
    assert torch.equal(other(batch()).loss, task(batch()).loss)
    assert not torch.equal(other(batch()).loss, tiny()(batch()).loss)


# --- prototypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [True, False])
def test_frozen_prototypes_do_not_move_at_all(unit):
    """Neither by momentum and decay while they are frozen, nor by what an optimizer remembers of that time."""
    task = tiny(freeze_prototypes=0.5, head={**HEAD, "unit_prototypes": unit})
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.5)
    last = [p for p in task.head.last_layer.parameters() if p.requires_grad]
    assert len(last) == (1 if unit else 2)
    start = [p.clone() for p in last]
    for step in range(4):
        task(batch(seed=step)).loss.backward()
        assert all(p.grad.any() for p in last)
        task.before_step(step / 4)
        optimizer.step()
        optimizer.zero_grad()
        still = [torch.equal(a, b) for a, b in zip(start, last, strict=True)]
        assert still == [step < 2] * len(last)
        assert [p in optimizer.state for p in last] == [step >= 2] * len(last)
        task.after_step((step + 1) / 4)


def test_the_engine_freezes_prototypes_and_keeps_the_rest_moving(tmp_path: Path):
    unlabeled.pretrain(
        task={"name": "dino", "locals": 1, "head": HEAD, "freeze_prototypes": 0.5, "momentum": 0.5},
        backbone={"name": "resnet18", "size": 32, "kwargs": {"channels": [8, 8, 8, 8], "output_stride": 8}},
        data={"name": "shapes", "count": 16}, epochs=4, batch_size=8, schedule={"warmup_epochs": 0},
        optim={"lr": 0.1}, engine={"workers": 0, "device": "cpu", "checkpoint_steps": 2, "keep": 9},
        log={"progress": False, "tensorboard": False}, evaluate={"final": False}, out=tmp_path / "run",
    )  # fmt: skip
    states = [load_file(tmp_path / f"run/checkpoints/step_0000000{step}/model.safetensors") for step in (2, 4, 6)]
    for prefix in ("", "teacher."):
        first, second, third = (state[f"{prefix}head.last_layer.weight_v"] for state in states)
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
        assert not torch.equal(*(state[f"{prefix}head.layers.0.weight"] for state in states[:2]))
    assert states[0]["progress"].item() == 0.25


def test_decay_spares_lengths_norms_and_biases():
    groups = {g.name: g.decay for g in tiny(head={**HEAD, "unit_prototypes": False}).parameter_groups()}
    assert groups["head.last_layer.weight_v"]
    assert not groups["head.last_layer.weight_g"]
    assert not groups["head.layers.0.bias"]
    assert not groups["backbone.model.norm.weight"]
    assert groups["head.layers.0.weight"]
    assert not any(name.startswith("teacher") for name in groups)
    assert "head.last_layer.weight_g" not in {g.name for g in tiny().parameter_groups()}
    assert tiny().head.last_layer.weight_g.unique().tolist() == [1.0]


# --- crops -----------------------------------------------------------------------------------------------------------


def test_crops_go_through_the_network_by_size_and_crop_by_crop():
    crops = batch(images=2)
    rows = crop_major(crops["locals"])
    assert torch.equal(rows[2 * 1 + 1], crops["locals"][1, 1])
    assert torch.equal(by_crop(rows, 2), crops["locals"].transpose(0, 1))
    task, seen = tiny(backbone=resnet()), []
    task.backbone.model.conv1.register_forward_hook(lambda _m, args, _o: seen.append(tuple(args[0].shape)))
    task(crops)
    assert seen == [(4, 3, 32, 32), (6, 3, 16, 16)]


def test_views():
    settings = {"global_scale": (0.4, 1.0), "local_scale": (0.05, 0.2), "locals": 4}
    config = DINOConfig(**settings, first_colors=PLAIN, second_colors=PLAIN, local_colors=PLAIN)
    views = pickle.loads(pickle.dumps(DINO.views(config, vit(64, patch_size=16))))
    across = torch.arange(0, 250, 2, dtype=torch.uint8).expand(3, 125, 125)
    areas: dict[str, list[float]] = {"globals": [], "locals": []}
    torch.manual_seed(0)
    for _ in range(20):
        found = views(torch.stack([across[0], across[0].t(), across[0]]))
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
            "globals": ((2, 3, 64, 64), torch.uint8), "locals": ((4, 3, 32, 32), torch.uint8),
        }  # fmt: skip
        for name, crops in found.items():
            extents = [(crop[c].max() - crop[c].min()).item() / 248 for crop in crops for c in (0, 1)]
            areas[name] += [x * y for x, y in zip(extents[::2], extents[1::2], strict=True)]
    assert 0.35 < min(areas["globals"]) < 0.55
    assert 0.75 < max(areas["globals"]) <= 1
    assert 0.02 < min(areas["locals"]) < 0.1
    assert 0.12 < max(areas["locals"]) < 0.25


def test_colors_differ_between_crops():
    """By default: the first large crop is always blurred, the second at times turned around above 127."""
    views = DINO.views(DINOConfig(locals=0, first_colors={**PLAIN, "blur": 1}, second_colors=PLAIN), vit())
    noise = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    first, second = views(noise)["globals"].float()
    assert first.diff(dim=-1).abs().mean() < 0.9 * second.diff(dim=-1).abs().mean()
    config = DINOConfig()
    assert (config.first_colors.blur, config.second_colors.blur, config.local_colors.blur) == (1.0, 0.1, 0.5)
    assert (config.first_colors.solarize, config.second_colors.solarize, config.local_colors.solarize) == (0, 0.2, 0)
    assert "locals" not in views(noise)


@pytest.mark.parametrize(
    ("backbone", "settings", "expected"),
    [(lambda: create_backbone("vit_tiny_patch16_224", depth=1), {}, (96, 96)),
     (lambda: create_backbone("resnet18", size=224), {}, (96, 96)),
     (resnet, {}, (16, 16)),
     (lambda: vit((64, 32)), {}, (24, 16)),
     (vit, {"local_size": 24}, (24, 24)),
     (vit, {"local_size": (16, 24)}, (16, 24))],
)  # fmt: skip
def test_size_of_small_crops(backbone, settings, expected):
    assert local_size(DINOConfig(**settings), backbone()) == expected


def test_non_square_images():
    task = tiny(backbone=vit((32, 16)), local_size=(16, 8), local_colors={"blur": 0.0})
    views = DINO.views(task.config, task.backbone)
    found = views(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8))
    assert (found["globals"].shape[-2:], found["locals"].shape[-2:]) == ((32, 16), (16, 8))
    assert task({name: crops[None].expand(2, -1, -1, -1, -1) for name, crops in found.items()}).loss.isfinite()


def test_without_small_crops_any_vit_will_do():
    task = tiny(backbone=vit(dynamic_img_size=False), locals=0)
    crops = {"globals": batch()["globals"]}
    output = task(crops)
    output.loss.backward()
    assert output.loss.isfinite()
    assert set(task.visualize(crops)) == {"crops"}


def test_what_cannot_be_raises_before_training():
    said = r"of 32x32 pixels cannot take small crops of 16x16 .*; set backbone.kwargs.dynamic_img_size=true or task.loc"
    with pytest.raises(ConfigError, match=said):
        tiny(backbone=vit(dynamic_img_size=False))
    mixer = create_backbone("mixer_s32_224", size=64)
    with pytest.raises(ConfigError, match=r"cannot take small .*; set task.local_size=\[64, 64\] or task.locals=0"):
        tiny(backbone=mixer)
    with pytest.raises(ConfigError, match=r"task.local_size: crops of 4x4 are too small for a blur that reaches 6"):
        tiny(local_size=4)
    with pytest.raises(ConfigError, match=r"local_scale \[0.5, 0.2\] begins above its end; give \[smallest, largest\]"):
        tiny(local_scale=(0.5, 0.2))


def test_sheet_shows_each_crop_in_its_scale():
    task, crops = tiny(), batch(images=5)
    sheet = task.visualize(crops)["crops"]
    side = 32 * 3 + 2  # enlarged to 96 pixels, and a gap
    assert sheet.shape == (3, 4 * side + 2, 5 * side + 2)
    for row, column, crop in ((0, 1, crops["globals"][0, 1]), (3, 0, crops["globals"][3, 0])):
        tile = sheet[:, 2 + row * side : (row + 1) * side, 2 + column * side : (column + 1) * side]
        assert torch.equal(tile[:, ::3, ::3], crop)
    small = sheet[:, 2:side, 2 + 4 * side : 5 * side][:, ::3, ::3]
    assert torch.equal(small[:, 8:24, 8:24], crops["locals"][0, 2])
    assert (small[:, :8] == 255).all()


# --- ranks -----------------------------------------------------------------------------------------------------------


def two_steps(name: str, rows: slice, distributed: bool) -> dict[str, Any]:
    """Loss and gradients of a step, the centers after it, the loss of the next; with batch norms everywhere."""
    task = tiny(
        name, resnet(), center_momentum=0.5, momentum=0.5, freeze_prototypes=0.1, head={**HEAD, "batch_norm": True}
    )
    task = task.double()
    if distributed:
        synchronize(task)
    model = DistributedDataParallel(task, gradient_as_bucket_view=True) if distributed else task  # as the engine does
    results: dict[str, Any] = {}
    for step in range(2):
        crops = batch(seed=step)
        torch.manual_seed(step)
        draw = task.draw(crops)
        task.zero_grad()
        loss = model({k: v[rows] for k, v in crops.items()}, **{k: v[rows] for k, v in draw.items()}).loss
        loss.backward()
        mean = loss.detach().clone()
        if distributed:
            dist.all_reduce(mean)
            mean /= 2
        results[f"loss{step}"] = mean
        task.before_step(step / 4)
        results |= {f"{key}{step}": p.grad.clone() for key, p in task.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        task.after_step((step + 1) / 4)
        results |= {f"{key}{step}": value.clone() for key, value in task.named_buffers() if "center" in key}
        results |= {f"teacher.{key}{step}": p.detach().clone() for key, p in task.teacher.named_parameters()}
    return results


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name in ("dino", "ibot"):
        torch.save(two_steps(name, slice(2 * rank, 2 * rank + 2), distributed=True), f"{folder}/{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_over_steps_of_center_and_teacher(tmp_path: Path):
    mp.start_processes(_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="forkserver")
    for name in ("dino", "ibot"):
        expected = two_steps(name, slice(0, 4), distributed=False)
        assert sum("center" in key for key in expected) == (2 if name == "dino" else 4)
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            assert "head.last_layer.weight_v0" not in found
            assert "head.last_layer.weight_v1" in found
            for key, value in expected.items():
                assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-6), (name, key)
