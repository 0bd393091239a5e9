"""SparK: the loss, what it reaches, what it refuses. The authors' own numbers are in tests/golden/test_spark.py."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretext.masked_image.masked_image import cell_targets, normalize_patches, patchify, unpatchify
from unlabeled.pretext.masked_image.spark import Densify, LightDecoder, SparK, SparKConfig
from unlabeled.pretext.registry import create_task, task_config
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.masking import masking_of
from unlabeled.ssl.config.schema import PretrainConfig
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.train.optimizer import create_optimizer, set_learning_rates
from unlabeled.workflows.settings import compose_settings

RESNET = {"channels": (8, 8, 16, 24), "output_stride": 8}
CONVNEXT = {"patch_size": 1, "dims": (8, 12, 16, 32), "depths": (1, 1, 2, 1)}


def resnet(size: int | tuple[int, int] = 32, **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return create_backbone("resnet18", size=size, **{**RESNET, **kwargs})


def convnext(size: int | tuple[int, int] = 32, name: str = "convnext_atto", **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(name, size=size, **{**CONVNEXT, **kwargs})


def tiny_task(backbone: Backbone | None = None, **settings: object) -> SparK:
    backbone = backbone or resnet()
    torch.manual_seed(1)
    task = create_task({"name": "spark", "decoder": {"width": 32}, **settings}, backbone)
    assert isinstance(task, SparK)
    return task


def random_images(count: int = 4, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def test_loss_is_the_mean_over_pixels_then_over_masked_cells():
    task = tiny_task()
    noise = torch.rand(4, 16)
    images = task.backbone.normalize(random_images())
    masking = task.mask(images, noise)
    predictions = patchify(task.predict(images, masking), (8, 8))
    target = normalize_patches(patchify(images, (8, 8)))
    masked = (~masking.visible.flatten(1)).double()
    assert torch.equal(masked.sum(1), torch.full((4,), 10.0, dtype=torch.float64))  # 16 * 0.6 = 9.6
    loss = ((predictions - target) ** 2).mean(-1).mul(masked).sum() / (masked.sum() + 1e-8)
    output = task({"image": random_images()}, noise=noise)
    torch.testing.assert_close(output.loss.double(), loss)
    explained = 1 - loss / ((target**2).mean(-1).mul(masked).sum() / masked.sum())
    torch.testing.assert_close(output.logs["explained"].double(), explained, atol=1e-4, rtol=1e-4)
    assert not output.logs["explained"].requires_grad


def test_visible_cells_are_seen_but_not_scored():
    """The mask's polarity, in the loss and in the encoder: with an overlapping stem a leak would show."""
    task = tiny_task()
    images = task.backbone.normalize(random_images())
    noise = torch.rand(4, 16)
    shown = task.mask(images, noise).enlarged(task.cell)[:, None].expand_as(images)
    seen: list[Tensor] = []
    task.decoder.register_forward_hook(lambda *call: call[2].retain_grad() or seen.append(call[2]))
    for changed in (images, torch.where(shown, images, 1e4), torch.where(shown, -images, images)):
        task({"image": changed}, noise=noise).loss.backward()
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    assert not seen[0].grad[shown].any()
    assert seen[0].grad[~shown].all()


def test_a_perfect_prediction_has_no_loss_and_gives_the_image_back(monkeypatch):
    """Predictions have the target's pixel order."""
    task = tiny_task()
    images = task.backbone.normalize(random_images())
    target = unpatchify(normalize_patches(patchify(images, (8, 8))), (8, 8), (4, 4))
    monkeypatch.setattr(task.decoder, "forward", lambda _: target)
    assert task({"image": images}).loss.item() < 1e-12
    torch.testing.assert_close(task.reconstruct(images, task.mask(images)), images)


def test_mask_embeddings_stand_at_masked_positions_only():
    densify = Densify([8, 4], [8, 4], "layer")
    task = tiny_task(convnext(dims=(8, 8, 4, 8)), levels=2, decoder={"width": 8})
    images = task.backbone.normalize(random_images())
    masking = task.mask(images)
    maps = task.sparse.maps(images, masking, task.levels)
    filled: list[Tensor] = []
    for projection in densify.projs:
        projection.register_forward_pre_hook(lambda _, given: filled.append(given[0]))
    densify(maps)
    for level, (one, normed) in enumerate(zip(filled, [densify.norms[i](m) for i, m in enumerate(maps)], strict=True)):
        shown = masking.enlarged((2**level, 2**level))[:, None].expand_as(one)
        assert torch.equal(one[shown], normed.dense()[shown])
        token = densify.mask_tokens[level].expand_as(one)
        assert torch.equal(one[~shown], token[~shown])
        assert 0 < token.abs().max() <= 0.02


def test_levels_go_from_coarse_to_fine():
    task = tiny_task(convnext(64, patch_size=4))
    assert task.cell == (32, 32)
    assert task.levels == [3, 2, 1, 0]
    assert [tuple(token.shape) for token in task.densify.mask_tokens] == [(1, c, 1, 1) for c in (32, 16, 12, 8)]
    assert isinstance(task.densify.projs[0], nn.Identity)  # 32 channels on both sides
    widths = [tuple(projection.weight.shape) for projection in task.densify.projs[1:]]
    assert widths == [(16, 16, 3, 3), (8, 12, 3, 3), (4, 8, 3, 3)]
    assert [block.mix[3].out_channels for block in task.decoder.blocks] == [16, 8, 4, 2, 1]
    assert all(isinstance(norm, LayerNorm2d) and norm.eps == 1e-6 for norm in task.densify.norms)

    other = tiny_task(convnext(64, patch_size=4), decoder={"width": 64})
    assert other.densify.projs[0].weight.shape == (64, 32, 1, 1)


@pytest.mark.parametrize(
    ("backbone", "levels", "strides"),
    [
        (resnet(), 4, [8, 4, 2]),  # the deepest of the three maps of stride 8; no block takes a map of stride 1
        (convnext(), 4, [8, 4, 2]),
        (convnext(), 1, [8]),
        (resnet(64, output_stride=32), 4, [32, 16, 8, 4]),  # as published: without the stem's map of stride 2
    ],
)
def test_networks_of_any_power_of_two(backbone, levels, strides):
    task = tiny_task(copy.deepcopy(backbone), levels=levels)
    assert [backbone.stages[index].stride for index in task.levels] == strides
    assert task.levels[0] == len(backbone.stages) - 1
    assert len(task.decoder.blocks) == math.log2(strides[0])
    batch = {"image": random_images(2, backbone.input_size)}
    loss = task(batch).loss
    loss.backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_larger_cells():
    task = tiny_task(resnet(64), mask_unit=16)
    assert task.cell == (16, 16)
    batch = {"image": random_images(2, (64, 64))}
    assert task.draw(batch)["noise"].shape == (2, 16)
    images = task.backbone.normalize(batch["image"])
    assert cell_targets(images, task.cell, torch.tensor([[0], [5]])).shape == (2, 1, 768)
    assert math.isfinite(task(batch).loss.item())


def test_non_square_images():
    task = tiny_task(resnet((32, 56)))
    batch = {"image": random_images(2, (32, 56))}
    assert task.mask(task.images_of(batch)).grid == (4, 7)
    assert math.isfinite(task(batch).loss.item())
    assert task.visualize(batch)["reconstruction"].shape[0] == 3


def test_batch_norms_take_their_statistics_of_visible_places():
    task = tiny_task().train()
    images = task.backbone.normalize(random_images())
    masking = task.mask(images)
    tokens = [one.tokens().flatten(0, 1) for one in copy.deepcopy(task).sparse.maps(images, masking, task.levels)]
    task({"image": images}, visible=masking.visible)
    for norm, seen in zip(task.densify.norms, tokens, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean(0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen.var(0), atol=1e-6, rtol=1e-4)
    assert SparK.masked_statistics


def test_two_masks_in_flight():
    """The mask travels with the features: two forward passes before a backward, recomputation included."""

    def gradient(*, apart: bool, recompute: bool) -> list[Tensor]:
        task = tiny_task(convnext())
        task.backbone.model.set_grad_checkpointing(recompute)
        noises = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(3))
        losses = []
        for noise in noises:
            losses.append(task({"image": random_images()}, noise=noise).loss)
            if apart:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        return [parameter.grad for parameter in task.parameters() if parameter.requires_grad]

    expected = gradient(apart=True, recompute=False)
    for found in (gradient(apart=False, recompute=False), gradient(apart=False, recompute=True)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_the_backbone_stays_the_network_that_it_was():
    backbone = resnet()
    plain = copy.deepcopy(backbone).eval()
    task = tiny_task(backbone)
    assert task.backbone.stages == plain.stages
    assert task.backbone.model.feature_info == plain.model.feature_info
    assert list(task.backbone.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(task.backbone.state_dict()[name], value), name  # no weights are drawn again
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(task.encoder().eval().pooled(x), plain.pooled(x))
    fresh = timm.create_model("resnet18", num_classes=0, **RESNET)
    fresh.load_state_dict(task.encoder().model.state_dict(), strict=True)


def test_parameters_that_the_loss_does_not_reach_are_frozen():
    task = tiny_task(convnext())
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.model.head.norm.weight", "backbone.model.head.norm.bias"}


def test_initial_weights():
    decoder = LightDecoder([64, 32, 16])
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
        if isinstance(module, nn.ConvTranspose2d):  # kaiming, fan-out as torch counts it: out, in, 4 x 4
            fan = module.weight.shape[0] * 16
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.1)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            assert not module.bias.any()


def test_weight_decay_follows_the_paper():
    task = tiny_task(convnext())
    decays = {named.name: named.decay for named in task.parameter_groups()}
    assert not any(decays[f"densify.mask_tokens.{level}"] for level in range(3))
    assert not decays["backbone.model.stages.0.blocks.0.gamma"]
    assert not decays["decoder.blocks.0.up.bias"]
    assert decays["decoder.blocks.0.up.weight"]
    assert decays["densify.projs.1.weight"]
    assert decays["backbone.model.stages.0.blocks.0.conv_dw.weight"]


def test_the_published_optimizer_adapts_the_rate_of_decayed_tensors_only():
    config = compose_settings("pretrain", ["task=spark"], PretrainConfig)
    assert (config.optim.weight_decay, config.optim.weight_decay_end, config.engine.clip) == (0.04, 0.2, 5.0)
    task = tiny_task()
    optimizer = create_optimizer(task, config.optim)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["max_grad_norm"] is None  # the engine clips
    set_learning_rates(optimizer, 1e-3, 0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    task({"image": random_images()}).loss.backward()
    weight, bias = task.decoder.proj.weight, task.decoder.blocks[0].up.bias
    before = weight.detach().clone(), bias.detach().clone()
    optimizer.step()
    adapted = (weight - before[0]).norm() / before[0].norm()
    assert adapted.item() == pytest.approx(1e-3, rel=1e-3)  # trust ratio: the step is a part of the weight's norm
    assert (bias - before[1]).abs().max().item() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    task = tiny_task()
    with _Recorded() as recorded:
        task({"image": random_images()}).loss.backward()
    assert "aten::convolution" in recorded.names
    waiting = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::item", "aten::is_nonzero"}
    assert not recorded.names & waiting


def test_bfloat16_keeps_targets_and_loss_in_float32():
    task = tiny_task()
    noise = torch.rand(4, 16)
    exact = task({"image": random_images()}, noise=noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task({"image": random_images()}, noise=noise).loss
        flat = task({"image": torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)}).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    flat.backward()
    assert math.isfinite(flat.item())
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.5}, "task.mask_ratio: 1.5 is not possible; give less than 1"),
        ({"decoder": {"widht": 18}}, "task.decoder.widht: there is no such setting .*did you mean 'width'"),
        ({"levels": 0}, "task.levels: 0 is not possible; give greater than or equal to 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        task_config({"name": "spark", **settings})
    assert "\n" not in str(caught.value)


def test_sizes_and_backbones_that_are_refused():
    with pytest.raises(ConfigError, match=r"task.mask_unit: 12 is no multiple of resnet18's total stride, 8; set it"):
        tiny_task(mask_unit=12)
    with pytest.raises(ConfigError, match=r"backbone.size: \[32, 32\] is no multiple of the mask's cells, \[24, 24\]"):
        tiny_task(mask_unit=24)
    with pytest.raises(ConfigError, match=r"task.decoder.width: 4 cannot be halved by 3 blocks; set it to 8 or more"):
        tiny_task(decoder={"width": 4})
    with pytest.raises(ConfigError, match=r"task.mask_ratio: 0.6 leaves 0 of 1x1 cells visible"):
        tiny_task(resnet(output_stride=32))
    with pytest.raises(CapabilityError, match="vit_tiny_patch16_224 cannot do SparK: it lacks sparse_convs"):
        tiny_task(create_backbone("vit_tiny_patch16_224", size=32, embed_dim=32, depth=1, num_heads=2))
    with pytest.raises(CapabilityError, match="inception_v3 cannot do SparK: it lacks sparse_convs"):
        tiny_task(create_backbone("inception_v3", size=96, device="meta"))  # convolves without padding
    with pytest.raises(CapabilityError, match="its total stride, 24, is no power of two"):
        tiny_task(convnext(96, patch_size=3))
    with pytest.raises(ConfigError, match=r"backbone.size: \[36, 32\] is no multiple of the mask's cells"):
        tiny_task()({"image": random_images(2, (36, 32))})


def test_the_papers_defaults_and_sizes():
    config = SparKConfig()
    assert (config.mask_ratio, config.crop_scale, config.decoder.width, config.levels) == (0.6, (0.67, 1.0), 768, 4)
    for name, total in (("resnet50", 52.92), ("convnext_base", 113.9)):
        with torch.device("meta"):
            task = create_task({"name": "spark"}, create_backbone(name, size=224))
        parameters = [p.numel() for p in task.parameters() if p.requires_grad]
        assert sum(parameters) / 1e6 == pytest.approx(total, abs=0.05 if total > 100 else 0.005)
        assert task.keep((7, 7)) == 20
        assert task.keep((12, 12)) == 58


def test_a_handful_of_images_can_be_learned_by_heart():
    task = tiny_task(resnet(channels=(16, 32, 48, 64)), decoder={"width": 64})
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [127 + 120 * torch.sin(y * (0.2 + 0.1 * i) + x * (0.5 - 0.1 * i)) for i in range(4)]
    batch = {"image": torch.stack(waves)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)}
    visible = torch.zeros(4, 4, 4, dtype=torch.bool)
    visible.view(4, 16)[:, [0, 3, 5, 10, 12, 15]] = True
    assert masking_of(visible).ids_keep.shape == (4, 6)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95))
    first = last = 0.0
    for step in range(100):
        loss = task(batch, visible=visible).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
        if step and last < 0.15:
            break
    assert first > 0.9
    assert last < 0.15, last
