"""iBOT, trap by trap: what is masked, who sees it, what is counted; what it shares with DINO is tested there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.loss import IBOTPatchLoss
from torch.nn import functional as F

from unlabeled.pretext.self_distillation.ibot import IBOT, IBOTConfig, masked_loss
from unlabeled.pretext.self_distillation.masked_patches import MaskedPatches, PatchMaskConfig, PatchMasker, at_masked
from unlabeled.pretext.self_distillation.self_distillation import directions, scores
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8}


def vit(size: int | tuple[int, int] = 32, **arguments: Any) -> Backbone:
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    return create_backbone("vit_tiny_patch16_224", size=size, **(small | arguments))


def swin() -> Backbone:
    small = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    return create_backbone("swin_tiny_patch4_window7_224", size=32, dynamic_img_size=True, **small)


def convnet() -> Backbone:
    return create_backbone("resnet18", size=32, channels=(8, 8, 16, 24), output_stride=8)


def tiny(backbone: Backbone | None = None, **settings: Any) -> IBOT:
    torch.manual_seed(0)
    fields = {"locals": 2, "local_size": 16, "head": HEAD, **settings}
    task = IBOT(IBOTConfig(**fields), backbone or vit())
    torch.nn.init.normal_(task.mask_token)
    return task


def batch(images: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"globals": (images, 2, 3, *size), "locals": (images, 2, 3, 16, 16)}
    return {k: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for k, shape in shapes.items()}


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_of_masked_patches_is_lightlys_and_that_of_the_formula():
    torch.manual_seed(0)
    teacher, student = torch.randn(4, 9, 7).double(), torch.randn(4, 9, 7).double().requires_grad_()
    masked = torch.rand(4, 9) < torch.tensor([0.3, 0.6, 0.0, 0.9])[:, None]
    assert masked[2].sum() == 0
    weights = (masked.double() / masked.sum(1, keepdim=True).clamp(min=1))[masked]
    found = MaskedPatches(~masked.view(4, 3, 3), masked.flatten().nonzero().flatten(), weights)
    targets, guesses = (teacher / 0.04).softmax(-1), (student / 0.1).log_softmax(-1)
    loss = masked_loss(at_masked(targets, found), at_masked(guesses, found), found)
    total = 0.0
    for crop in range(4):
        positions = masked[crop].nonzero().flatten().tolist()
        for position in positions:
            entropy = -(teacher[crop, position] / 0.04).softmax(0) @ (student[crop, position] / 0.1).log_softmax(0)
            total += entropy / len(positions) / 4
    assert torch.allclose(loss, total, rtol=1e-12)
    theirs = IBOTPatchLoss(7).double()(teacher[masked], student[masked], masked.view(4, 3, 3), teacher_temp=0.04)
    assert torch.allclose(loss, theirs, rtol=1e-6)
    mine, other = (torch.autograd.grad(one, student)[0] for one in (loss, theirs))
    assert torch.allclose(mine, other, atol=1e-8)
    assert mine[~masked].abs().max() == 0


@pytest.mark.parametrize("own", [True, False])
def test_forward_equals_a_slow_reference(own):
    """Crop by crop, patch by patch, through timm's own tokens."""
    task = tiny(patch_head={**HEAD, "prototypes": 12} if own else None, patch_weight=0.5)
    torch.manual_seed(4)
    crops, draw = batch(), task.draw(batch())
    for name, center in task.centers.items():
        center.center.copy_(0.02 * torch.randn(1, 12 if own and name == "patch_head" else 24))
    for parameter in task.teacher.parameters():
        parameter.data.mul_(1.1)
    output = task(crops, **draw)
    patch_head, patch_teacher = (
        parts["patch_head" if own else "head"] for parts in (dict(task.named_children()), task.teacher)
    )
    model, teacher, stem = task.backbone.model, task.teacher["backbone"].model, task.backbone.model.patch_embed
    assigned, predicted, patch_total = [], [], 0.0
    for view in range(2):
        images = task.backbone.normalize(crops["globals"][:, view])
        noise, ratio = draw["noise"][:, view], draw["ratio"][:, view]
        count = (ratio * 16).round().long()
        positions = [one.argsort(descending=True)[:most] for one, most in zip(noise, count, strict=True)]
        target = teacher.forward_features(images)
        assigned.append(((task.teacher["head"](target[:, 0]) - task.centers["head"].value) / 0.04).softmax(-1))

        def hide(
            _module: Any, _inputs: Any, tokens: torch.Tensor, positions: list[torch.Tensor] = positions
        ) -> torch.Tensor:
            tokens = tokens.clone()
            for image, where in enumerate(positions):
                grid = tokens[image].view(16, 32)  # (4, 4, 32) while sizes are dynamic
                grid[where] = task.mask_token[0, 0]
            return tokens

        handle = stem.register_forward_hook(hide)
        tokens = model.forward_features(images)
        handle.remove()
        predicted.append((task.head(tokens[:, 0]) / 0.1).log_softmax(-1))
        for image, where in enumerate(positions):
            for position in where.tolist():
                logits = patch_teacher(target[image, 1 + position][None]) - task.centers["patch_head"].value
                guess = (patch_head(tokens[image, 1 + position][None]) / 0.1).log_softmax(-1)
                patch_total += -((logits / 0.04).softmax(-1) * guess).sum() / len(where) / 6
    for view in range(2):
        pooled = model.forward_features(task.backbone.normalize(crops["locals"][:, view]))[:, 0]
        predicted.append((task.head(pooled) / 0.1).log_softmax(-1))
    pairs = [(t, s) for t in range(2) for s in range(4) if s != t]
    crop_total = sum(-(assigned[t] * predicted[s]).sum(-1).mean() for t, s in pairs) / len(pairs)
    assert output.logs["crop_loss"].item() == pytest.approx(crop_total.item(), rel=1e-4)
    assert output.logs["patch_loss"].item() == pytest.approx(patch_total.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx(crop_total.item() + 0.5 * patch_total.item(), rel=1e-4)


def test_center_of_patches_is_their_own_and_over_all_patches():
    task, crops = tiny(), batch()
    images = task.backbone.normalize(crops["globals"].transpose(0, 1).flatten(0, 1))
    head = task.teacher["head"]
    with torch.no_grad():
        tokens = task.teacher["backbone"].model.forward_features(images)
        logits = scores(head, directions(head, tokens))
    task(crops)
    assert task.centers["patch_head"].value.abs().max() == 0
    task.after_step(0.1)
    assert torch.allclose(task.centers["head"].value, 0.1 * logits[:, 0].mean(0), atol=1e-6)
    assert torch.allclose(task.centers["patch_head"].value, 0.1 * logits[:, 1:].mean((0, 1)), atol=1e-6)
    assert not torch.allclose(task.centers["head"].value, task.centers["patch_head"].value, atol=1e-4)


def test_nothing_masked_is_no_loss_of_patches():
    task, crops = tiny(), batch()
    draw = task.draw(crops)
    output = task(crops, noise=draw["noise"], ratio=torch.zeros(3, 2))
    output.loss.backward()
    assert output.logs["patch_loss"].item() == 0
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    assert task.mask_token.grad.abs().max() == 0


# --- what is masked --------------------------------------------------------------------------------------------------


def test_half_of_the_crops_are_masked_by_a_tenth_to_a_half():
    task = tiny()
    ratios = torch.stack([task.draw(batch(5))["ratio"] for _ in range(40)])  # (40, 5, 2)
    assert (ratios.flatten(1) > 0).sum(1).unique().tolist() == [5]
    drawn = ratios[ratios > 0]
    assert 0.1 <= drawn.min() < 0.15
    assert 0.45 < drawn.max() <= 0.5
    per_image = (ratios > 0).sum(-1).flatten()
    assert set(per_image.tolist()) == {0, 1, 2}  # the crops of an image are masked independently


def test_evenly_spread_ratios_come_one_from_each_part_of_the_range():
    task = tiny(mask_spread="even")
    drawn = task.draw(batch(5))["ratio"]
    ratios = drawn[drawn > 0].sort().values
    edges = torch.linspace(0.1, 0.5, 6)
    assert len(ratios) == 5
    assert ((edges[:-1] <= ratios) & (ratios <= edges[1:])).all()


def test_finer_patches_are_fractions_of_one_of_the_map():
    task = tiny(swin(), fine=2).eval()
    coarse = PatchMasker(PatchMaskConfig(), task.backbone, task="iBOT")
    images = torch.randn(2, 3, 32, 32)
    (rows, columns), (fewer, _) = (one.grid_of(task.backbone, (32, 32)) for one in (task.masker, coarse))
    assert rows == columns == 2 * fewer
    positions = task.masker.encode(task.backbone, images)[1].view(2, rows, columns, -1)
    expected = coarse.encode(task.backbone, images)[1].view(2, rows // 2, columns // 2, -1)
    assert all(torch.equal(positions[:, i::2, j::2], expected) for i in range(2) for j in range(2))
    with pytest.raises(ConfigError, match=r"task.fine: 3 gives 24x24 positions, more than the 16x16 patches of swin"):
        tiny(swin(), fine=3)


def test_masked_patches_are_those_with_the_largest_noise_crop_by_crop():
    task = tiny()
    noise = torch.rand(3, 2, 16)
    ratio = torch.tensor([[0.5, 0.0], [0.25, 0.1], [0.02, 0.4]])
    masked = task.masker.mask(task.backbone, noise, ratio, torch.zeros(6, 3, 32, 32))
    assert masked.visible.shape == (6, 4, 4)
    assert masked.indices.shape == masked.weights.shape == (8 + 4 + 2 + 1 + 6,)
    for image in range(3):
        for view in range(2):
            row, count = view * 3 + image, [[8, 0], [4, 2], [1, 6]][image][view]
            largest = noise[image, view].argsort(descending=True)[:count]
            assert sorted((~masked.visible[row]).flatten().nonzero().flatten().tolist()) == sorted(largest.tolist())
            of_crop = masked.indices // 16 == row
            assert (masked.indices[of_crop] % 16).tolist() == sorted(largest.tolist())
            assert masked.weights[of_crop].tolist() == pytest.approx([1 / max(count, 1)] * count)


@pytest.mark.parametrize(("make", "level", "cell"), [(vit, "token", 8), (swin, "token", 4), (convnet, "pixel", 8)])
def test_the_student_does_not_see_masked_pixels(make, level, cell):
    task = tiny(make()).eval()
    assert ("pixel" if task.masker.stem is None else "token") == level
    assert task.masker.grid_of(task.backbone, (32, 32)) == (32 // cell, 32 // cell)
    token = task.mask_token
    images, others = torch.randn(2, 2, 3, 32, 32)
    visible = torch.rand(2, 32 // cell, 32 // cell) < 0.6
    shown = visible.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]
    changed = torch.where(shown, images, others)
    for found, same in zip(
        task.masker.encode(task.backbone, images, visible, token),
        task.masker.encode(task.backbone, changed, visible, token),
        strict=True,
    ):
        assert torch.equal(found, same)
    assert not torch.allclose(
        task.masker.encode(task.backbone, images)[0], task.masker.encode(task.backbone, changed)[0], atol=1e-4
    )
    assert not torch.allclose(
        task.masker.encode(task.backbone, images, visible, token)[0],
        task.masker.encode(task.backbone, images)[0],
        atol=1e-4,
    )


@pytest.mark.parametrize("make", [vit, swin, convnet])
def test_one_pass_gives_pooled_features_and_normed_patches(make):
    task = tiny(make()).eval()
    images = torch.randn(2, 3, 32, 32)
    pooled, positions = task.masker.encode(task.backbone, images)
    assert torch.allclose(pooled, task.backbone.pooled(images), atol=1e-6)
    features = task.backbone.model.forward_features(images)
    expected = features[:, 1:] if make is vit else features.flatten(1, 2) if make is swin else features.flatten(2).mT
    assert torch.allclose(positions, expected, atol=1e-6)


def test_non_square_images():
    task = tiny(vit((32, 16)), local_size=16)
    crops = batch(size=(32, 16))
    output = task(crops)
    output.loss.backward()
    assert output.loss.isfinite()
    assert task.draw(crops)["noise"].shape == (3, 2, 8)
    views = IBOT.views(task.config, task.backbone)(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert views["globals"].shape == (2, 3, 32, 16)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_patches_share_the_head_where_they_can():
    assert "patch_head" not in dict(tiny().named_children())
    own = tiny(patch_head={**HEAD, "prototypes": 12})
    assert own.centers["patch_head"].value.shape == (1, 12)
    assert set(own.teacher) == {"backbone", "head", "patch_head"}
    wide = tiny(create_backbone("mobilenetv3_small_050", size=64), locals=0)
    assert wide.backbone.embed_dim != wide.backbone.stages[-1].channels
    assert wide.patch_head.layers[0].in_features == wide.backbone.stages[-1].channels


def test_the_prototypes_of_both_heads_are_frozen_and_both_teachers_follow():
    task = tiny(patch_head=HEAD, momentum=0.5, momentum_end=0.5, freeze_prototypes=0.5)
    task(batch()).loss.backward()
    task.before_step(0.4)
    assert [head.last_layer.weight_v.grad for head in (task.head, task.patch_head)] == [None, None]
    task(batch()).loss.backward()
    task.before_step(0.5)
    assert all(head.last_layer.weight_v.grad.any() for head in (task.head, task.patch_head))
    before = task.teacher["patch_head"].layers[0].weight.clone()
    task.patch_head.layers[0].weight.data.add_(1)
    task.after_step(0.1)
    assert torch.allclose(task.teacher["patch_head"].layers[0].weight, before + 0.5, atol=1e-6)


def test_batch_norms_of_a_head_flatten_positions():
    task = tiny(head={**HEAD, "batch_norm": True})
    features = torch.randn(4, 16, 32)  # as many positions as hidden channels: rows and channels could be mixed up
    expected = F.normalize(task.head.layers(features.view(64, 32)), dim=1)
    assert torch.equal(directions(task.head, features).view(64, 8), expected)


# --- messages and images -------------------------------------------------------------------------------------------


def test_what_cannot_be_raises_before_training():
    with pytest.raises(CapabilityError, match=r"convnext_atto cannot do iBOT: its last map has one position for 32x32"):
        tiny(create_backbone("convnext_atto", size=32, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)), locals=0)
    with pytest.raises(ValueError, match=r"mask_ratio \[0.5, 0.1\] begins above its end"):
        tiny(mask_ratio=(0.5, 0.1))


def test_patches_need_not_divide_the_image():
    task = tiny(create_backbone("resnet18", size=36, channels=(8, 8, 8, 8), output_stride=8), locals=0)
    assert task.masker.grid_of(task.backbone, (36, 36)) == (5, 5)
    output = task({"globals": torch.randint(0, 256, (2, 2, 3, 36, 36), dtype=torch.uint8)})
    output.loss.backward()
    assert task.mask_token.grad.abs().max() > 0


def test_sheet_shows_masked_patches_in_gray():
    task, crops = tiny(), batch()
    sheet = task.visualize(crops)["crops"]
    side = 32 * 3 + 2
    assert sheet.shape == (3, 3 * side + 2, 6 * side + 2)
    gray = 0
    for row in range(3):
        tiles = [
            sheet[:, 2 + row * side : (row + 1) * side, 2 + k * side : (k + 1) * side][:, ::3, ::3] for k in range(4)
        ]
        for view in range(2):
            assert torch.equal(tiles[view], crops["globals"][row, view])
            masked = (tiles[2 + view] != tiles[view]).any(0)
            assert (tiles[2 + view][:, masked] == 128).all()
            gray += masked.any().item()
    assert gray == 3
