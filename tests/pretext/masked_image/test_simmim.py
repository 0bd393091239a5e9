"""SimMIM: the loss, what it reaches, what it refuses. The authors' own numbers are in tests/golden/test_simmim.py."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from unlabeled.pretext.masked_image.simmim import SimMIM, masked_l1
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.masking import masking_of

VIT = ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2})
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "drop_path_rate": 0.0},
)
CONVNEXT = ("convnext_atto", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)})
RESNET = ("test_resnet", {})
TOKENS, ALL = [VIT, SWIN, CONVNEXT], [VIT, SWIN, CONVNEXT, RESNET]


def backbone_of(which: tuple[str, dict] = VIT, size: object = 32, **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(which[0], size=size, **{**which[1], **kwargs})


def tiny_task(which: tuple[str, dict] | Backbone = VIT, size: object = 32, **settings: object) -> SimMIM:
    backbone = which if isinstance(which, Backbone) else backbone_of(which, size)
    torch.manual_seed(1)
    task = create_task({"name": "simmim", **settings}, backbone)
    assert isinstance(task, SimMIM)
    return task


def random_images(count: int = 4, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def spots(grid: tuple[int, int], *masked: tuple[int, int]) -> Tensor:
    """Visible map (1, gh, gw) with the cells `masked` off."""
    visible = torch.ones(1, *grid, dtype=torch.bool)
    for row, column in masked:
        visible[0, row, column] = False
    return visible


def test_an_error_of_one_at_masked_pixels_is_a_loss_of_one():
    images, masked = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8) < 0.4
    for error in (1.0, 3.0):  # linear in the error, and whatever stands at visible pixels does not count
        predicted = torch.where(masked, images - error, torch.full_like(images, 1e6))
        assert masked_l1(predicted, images, masked).item() == pytest.approx(error, rel=1e-5)
    few = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    few[..., 0, 0] = True
    exact = masked_l1(torch.zeros(1, 3, 8, 8).double(), torch.ones(1, 3, 8, 8).double(), few)
    assert exact.item() == pytest.approx(1 / (1 + 1e-5), rel=1e-12)  # the count has 1e-5 added


def test_loss_against_a_slow_reference():
    task = tiny_task(SWIN)
    noise = torch.rand(4, 16)
    output = task({"image": random_images()}, noise=noise)
    images = task.backbone.normalize(random_images())
    masking = task.mask(images, noise)
    predicted = task.reconstruct(images, masking)
    total, blank, count = 0.0, 0.0, 0
    for drawn in range(4):
        for row in range(4):
            for column in range(4):
                if not masking.visible[drawn, row, column]:
                    cell = (drawn, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                    total += (images[cell] - predicted[cell]).abs().double().sum().item()
                    blank += images[cell].abs().double().sum().item()
                    count += 64
    assert count == 4 * 10 * 64
    assert output.loss.item() == pytest.approx(total / count / 3, rel=1e-5)
    assert output.logs["explained"].item() == pytest.approx(1 - total / blank, abs=1e-5)


@pytest.mark.parametrize(("size", "masked"), [(192, (22, 36)), (224, (30, 49))])
def test_published_masks(size, masked):
    """22 of 36 cells at 192 pixels, 30 of 49 at 224; cells of 32 pixels though the patch has 16."""
    backbone = backbone_of(VIT, size, patch_size=16)
    task = tiny_task(backbone)
    masking = task.mask(torch.zeros(2, 3, size, size))
    assert task.cell == (32, 32)
    assert [int((~one).sum()) for one in masking.visible] == [masked[0], masked[0]]
    assert masking.visible[0].numel() == masked[1]
    seen: list[Tensor] = []
    task.backbone.model.pos_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task.backbone.model.pos_embed.data.zero_()
    with torch.no_grad():
        task.encode(torch.randn(2, 3, size, size), masking)
    replaced = (seen[0][:, 1:] == task.mask_token).all(-1).view(2, size // 16, size // 16)
    assert torch.equal(replaced, ~masking.enlarged((2, 2)))  # every aligned group of 2x2 patches is as one


def test_the_token_enters_after_the_norm_of_the_embedding_and_before_positions():
    for which in (VIT, SWIN):
        task = tiny_task(which)
        net = task.backbone.model
        seen: list[Tensor] = []
        first = net.blocks[0] if which is VIT else net.layers[0]
        first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        images = task.backbone.normalize(random_images())
        masking = task.mask(images)
        with torch.no_grad():
            task.encode(images, masking)
            tokens = net.patch_embed(images)
        patch = task.stem.patch[0]
        masked = ~masking.enlarged((task.cell[0] // patch, task.cell[1] // patch))
        masked = masked.flatten(1)[..., None] if which is VIT else masked[..., None]
        expected = torch.where(masked, task.mask_token.view(-1), tokens)
        if which is VIT:
            prefix = (net.cls_token + net.pos_embed[:, :1]).expand(4, -1, -1)
            expected = torch.cat([prefix, expected + net.pos_embed[:, 1:]], dim=1)
        else:
            assert isinstance(net.patch_embed.norm, torch.nn.LayerNorm)
        assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("which", ALL, ids=lambda which: which[0])
@pytest.mark.parametrize("training", [True, False])
def test_masked_pixels_are_never_seen(which, training):
    """Bitwise, in both modes: batch norm must not tell of them either. Visible ones are seen."""
    task = tiny_task(which).train(training)
    images, noise = task.backbone.normalize(random_images()), torch.rand(4, 16)
    masking = task.mask(images, noise)
    masked = task.masked_pixels(masking)
    with torch.no_grad():
        before = task.encode(images, masking)
        assert torch.equal(task.encode(torch.where(masked, 100 * torch.randn_like(images), images), masking), before)
        assert not torch.equal(task.encode(torch.where(masked, images, -images), masking), before)


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda which: which[0])
def test_the_mask_lies_right_on_a_image_that_is_not_square(which):
    """Hand-made asymmetric mask on 4x6 cells: the gradient at the prediction has exactly its pixels."""
    task = tiny_task(which, size=(32, 48), mask_unit=8)
    visible = spots((4, 6), (0, 1), (0, 4), (2, 0), (3, 5))
    images = torch.randn(1, 3, 32, 48)
    shuffled: list[Tensor] = []

    def keep(_module: object, _inputs: object, result: Tensor) -> None:
        result.retain_grad()
        shuffled.append(result)

    hook = task.decoder.register_forward_hook(keep)
    task({"image": images}, visible=visible).loss.backward()
    hook.remove()
    support = F.pixel_shuffle(shuffled[0].grad, task.stride)[0, :, :32, :48] != 0
    expected = torch.zeros(32, 48, dtype=torch.bool)
    for row, column in ((0, 1), (0, 4), (2, 0), (3, 5)):
        expected[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
    assert torch.equal(support, expected.expand(3, -1, -1))
    assert torch.equal(task.masked_pixels(masking_of(visible))[0, 0], expected)
    assert task.visualize({"image": random_images(2, (32, 48))})["reconstruction"].shape == (3, 2 * 98 + 2, 3 * 146 + 2)


def test_the_order_of_the_predictions():
    """Channel c*s*s + dy*s + dx of the head is color c of the pixel dy down and dx right."""
    task = tiny_task()
    stride = task.stride
    torch.nn.init.zeros_(task.decoder.weight)
    task.decoder.bias.data = torch.arange(3.0 * stride**2)
    drawn = task.reconstruct(torch.randn(1, 3, 32, 32), masking_of(spots((4, 4), (1, 1))))[0]
    for channel, row, column in ((0, 0, 1), (1, 3, 2), (2, 9, 30)):
        assert drawn[channel, row, column] == channel * stride**2 + (row % stride) * stride + column % stride


@pytest.mark.parametrize("which", [VIT, SWIN, RESNET], ids=lambda which: which[0])
def test_two_forwards_before_one_backward(which):
    """Each keeps its own mask, and nothing of it stays behind."""
    task = tiny_task(which).eval()  # so that batch norm does not mix the order in
    batch = {"image": random_images()}
    noises = [torch.rand(4, 16), torch.rand(4, 16)]

    def gradients(loss: Tensor) -> list[Tensor]:
        task.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in task.parameters() if parameter.grad is not None]

    apart = [gradients(task(batch, noise=noise).loss) for noise in noises]
    together = gradients(sum(task(batch, noise=noise).loss for noise in noises))
    for first, second, both in zip(*apart, together, strict=True):
        torch.testing.assert_close(both, first + second, atol=1e-6, rtol=1e-4)
    assert not any(module._forward_hooks for module in task.modules())
    assert all(name.startswith("backbone.") for name, _ in task.named_buffers())  # the mask is kept nowhere


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("which", TOKENS, ids=lambda which: which[0])
def test_activation_checkpointing_keeps_the_mask(which, whole):
    task = tiny_task(which)
    batch, noise = {"image": random_images()}, torch.rand(4, 16)
    results = []
    for again in (False, True):
        task.zero_grad()
        if again and not whole:
            task.backbone.model.set_grad_checkpointing(True)
        loss = (
            checkpoint(lambda: task(batch, noise=noise).loss, use_reentrant=False)
            if again and whole
            else task(batch, noise=noise).loss
        )
        task(batch, noise=torch.rand(4, 16))  # another mask in between
        loss.backward()
        results.append([loss] + [p.grad.clone() for p in task.parameters() if p.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_compiled_and_not_are_the_same():
    """A compiled network must neither lose the substitution nor keep that of an earlier mask."""
    task = tiny_task(VIT).eval()
    batch, noises = {"image": random_images()}, torch.rand(3, 4, 16)
    plain = [task(batch, noise=noise).loss for noise in noises]
    pooled = task.backbone(task.backbone.normalize(random_images()))
    try:
        encoder = torch.compile(task.backbone, backend="eager")
        torch.testing.assert_close(encoder(task.backbone.normalize(random_images())), pooled)
        task.compile(backend="eager")
        torch.testing.assert_close([task(batch, noise=noise).loss for noise in noises], plain)
        torch.testing.assert_close(encoder(task.backbone.normalize(random_images())), pooled)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("which", "entry", "size"), [(SWIN, "token", 32), (CONVNEXT, "token", 32), (RESNET, "pixel", 32)]
)
def test_the_log_reports_how_masked_cells_enter(which, entry, size, caplog):
    with caplog.at_level(logging.INFO):
        task = tiny_task(which, size)
    assert task.mask_entry == entry
    said = [record.message for record in caplog.records if record.name.endswith("simmim")]
    assert len(said) == 1
    assert ("color in the image" if entry == "pixel" else f"token after {task.stem.name}") in said[0]
    assert task.mask_token.shape == ((1, 3, 1, 1) if entry == "pixel" else (1, 1, task.stem.dim))
    assert "stem" not in dict(task.named_children())


def test_networks_whose_maps_are_smaller_than_their_stride_says():
    """Without padding positions are missing at the border: the map is resized, the image cut if too large."""
    for which, size in ((("inception_v3", {}), (128, 96)), (("convmixer_768_32", {}), (64, 64))):
        task = tiny_task(which, size=size)
        images = torch.randn(1, 3, *size)
        masking = task.mask(images)
        with torch.no_grad():
            features, drawn = task.encode(images, masking), task.reconstruct(images, masking)
        assert features.shape[-2] != math.ceil(size[0] / task.stride)
        assert drawn.shape == images.shape


def test_a_step_never_waits_for_the_device():
    class Recorded(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    task = tiny_task()
    with Recorded() as recorded:
        task({"image": random_images()}).loss.backward()
    assert "aten::where" in recorded.names
    waiting = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::item", "aten::is_nonzero"}
    assert not recorded.names & waiting


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda which: which[0])
def test_bfloat16_keeps_the_loss_in_float32(which):
    task = tiny_task(which).eval()
    noise = torch.rand(4, 16)
    exact = task({"image": random_images()}, noise=noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = task({"image": random_images()}, noise=noise)
        predicted = task.reconstruct(task.backbone.normalize(random_images()), task.mask(random_images(), noise))
    assert output.loss.dtype == predicted.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_masks_come_from_the_global_generator():
    task = tiny_task()
    batch = {"image": random_images()}
    torch.manual_seed(7)
    first, second = task(batch).loss, task(batch).loss
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(task(batch).loss, first)
    torch.manual_seed(8)  # another rank
    assert not torch.equal(task(batch).loss, first)
    visible = task.mask(torch.zeros(4, 3, 32, 32)).visible
    assert len({tuple(one.flatten().tolist()) for one in visible}) > 1  # each image by itself


def test_it_learns_a_fixed_task():
    task = tiny_task()
    batch, noise = {"image": F.interpolate(torch.randn(4, 3, 2, 2), size=32, mode="bilinear")}, torch.rand(4, 16)
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    first = task(batch, noise=noise).loss.item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = task(batch, noise=noise).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_initial_values_and_decay():
    backbone = backbone_of(SWIN)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    task = tiny_task(backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert 0.01 < task.mask_token.std() < 0.03
    assert task.decoder.weight.abs().max() <= 1 / math.sqrt(task.decoder.in_channels)
    assert task.decoder.weight.shape == (3 * 4 * 4, 32, 1, 1)

    swin = {named.name: named.decay for named in task.parameter_groups()}
    assert swin["backbone.model.layers.0.blocks.0.attn.relative_position_bias_table"]
    assert swin["decoder.weight"]
    assert not swin["mask_token"]
    assert not swin["decoder.bias"]
    vit = {named.name: named for named in tiny_task(VIT).parameter_groups()}
    assert not vit["backbone.model.cls_token"].decay
    assert not vit["backbone.model.pos_embed"].decay
    assert vit["backbone.model.patch_embed.proj.weight"].decay
    assert vit["mask_token"].layer == vit["decoder.weight"].layer == 3


def test_the_final_norm_is_trained_and_what_follows_it_is_not():
    task = tiny_task(("swin_tiny_patch4_window7_224", {**SWIN[1], "num_classes": 5}))
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.model.head.fc.weight", "backbone.model.head.fc.bias"}
    assert task.backbone.model.norm.weight.requires_grad
