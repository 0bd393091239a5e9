"""FCMAE: the loss, what it reaches, what it refuses. The authors' own numbers are in tests/golden/test_fcmae.py."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretext.masked_image.fcmae import FCMAE, ConvDecoder, FCMAEConfig, dense_layout
from unlabeled.pretext.masked_image.masked_image import normalize_patches, patchify, unpatchify
from unlabeled.pretext.registry import create_task, task_config
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.masking import masking_of
from unlabeled.ssl.backbones.masked.sparse import MaskedMap
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError

TINY = {"patch_size": 1, "dims": (8, 12, 16, 24), "depths": (1, 1, 2, 1)}


def tiny_backbone(size: int | tuple[int, int] = 32, name: str = "convnextv2_atto", **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(name, size=size, **({**TINY, **kwargs} if "convnext" in name else kwargs))


def tiny_task(backbone: Backbone | None = None, **settings: object) -> FCMAE:
    backbone = backbone or tiny_backbone()
    torch.manual_seed(1)
    task = create_task({"name": "fcmae", "decoder": {"dim": 16}, **settings}, backbone)
    assert isinstance(task, FCMAE)
    for module in task.modules():  # response norms begin as the identity: give them something to do
        if isinstance(module, GlobalResponseNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return task


def random_images(count: int = 4, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_mean_over_pixels_then_over_masked_cells(norm_pix):
    task = tiny_task(norm_pix=norm_pix)
    noise = torch.rand(4, 16)
    images = task.backbone.normalize(random_images())
    masking = task.mask(images, noise)
    predictions = task.decoder.predict_all(task.encode(images, masking), masking)
    target = patchify(images, (8, 8))
    target = normalize_patches(target) if norm_pix else target
    masked = (~masking.visible.flatten(1)).float()
    assert torch.equal(masked.sum(1), torch.full((4,), 10.0))  # 16 * 0.4 = 6.4 are kept
    loss = ((predictions - target) ** 2).mean(-1).mul(masked).sum() / masked.sum()
    output = task({"image": random_images()}, noise=noise)
    torch.testing.assert_close(output.loss, loss)
    explained = 1 - loss / ((target**2).mean(-1).mul(masked).sum() / masked.sum())
    torch.testing.assert_close(output.logs["explained"], explained, atol=1e-4, rtol=1e-4)
    assert not output.logs["explained"].requires_grad


def test_visible_cells_are_seen_but_not_scored():
    task = tiny_task()
    images = task.backbone.normalize(random_images())
    noise = torch.rand(4, 16)
    shown = task.mask(images, noise).enlarged(task.cell)[:, None]
    seen: list[Tensor] = []
    task.decoder.register_forward_hook(lambda *call: seen.append(call[2]))
    for changed in (images, torch.where(shown, images, 1e4), torch.where(shown, -images, images)):
        task({"image": changed}, noise=noise)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    assert seen[0].shape == (4, 10, 192)  # nothing is predicted for visible cells, so nothing can be scored there


def test_images_do_not_see_each_other():
    """Response norms take their statistics per image: the authors' sparse ones mix the batch."""
    task = tiny_task()
    images, noise = task.backbone.normalize(random_images()), torch.rand(4, 16)
    changed = torch.cat([images[:1], 3 * images[1:].flip(0)])
    with torch.no_grad():
        encoded = [task.encode(one, task.mask(one, noise)) for one in (images, changed)]
        alone = task.encode(images[:1], task.mask(images[:1], noise[:1]))
    assert torch.equal(encoded[0][0], encoded[1][0])
    assert not torch.allclose(encoded[0][1], encoded[1][1])
    torch.testing.assert_close(alone[0], encoded[0][0])


def test_predictions_have_the_order_row_column_channel():
    """An impulse in one number of the prediction is one pixel of one channel."""
    task = tiny_task(norm_pix=False)
    nn.init.zeros_(task.decoder.pred.weight)
    images = task.backbone.normalize(random_images(1))
    masking = task.mask(images)
    with torch.no_grad():
        task.decoder.pred.bias.zero_()[(2 * 8 + 5) * 3 + 1] = 1
        predicted = task.reconstruct(images, masking)
    impulse = torch.zeros(1, 3, 32, 32)
    impulse[:, 1, 2::8, 5::8] = 1
    assert torch.equal(predicted, impulse)


def test_a_perfect_prediction_has_no_loss_and_gives_the_image_back(monkeypatch):
    task = tiny_task()
    images = task.backbone.normalize(random_images())
    masking = task.mask(images)
    target = normalize_patches(patchify(images, (8, 8)))
    monkeypatch.setattr(task.decoder, "predict_all", lambda *_: target)
    monkeypatch.setattr(task.decoder, "forward", lambda _, mask: target[torch.arange(4)[:, None], mask.ids_masked])
    assert task({"image": images}, visible=masking.visible).loss.item() < 1e-12
    torch.testing.assert_close(task.reconstruct(images, masking), images)
    assert torch.equal(unpatchify(patchify(images, (8, 8)), (8, 8), (4, 4)), images)


def test_visible_cells_come_from_the_mask_not_from_their_values():
    task = tiny_task()
    for parameter in (task.backbone.model.stem[0].bias, task.backbone.model.stem[1].bias):
        nn.init.zeros_(parameter)
    images = torch.zeros(2, 3, 32, 32)  # after the stem every feature is 0
    masking = task.mask(images)
    latent = task.encode(images, masking)
    assert latent.shape == (2, 6, 24)
    assert latent.any()  # later biases
    assert math.isfinite(task({"image": images}, visible=masking.visible).loss.item())


def test_nothing_stands_at_masked_positions_after_the_stem():
    task = tiny_task()
    nn.init.ones_(task.backbone.model.stem[1].bias)
    seen: list[MaskedMap] = []
    task.backbone.model.stem.register_forward_hook(lambda *call: seen.append(call[2]))
    images = task.backbone.normalize(random_images())
    masking = task.mask(images)
    task.encode(images, masking)
    shown = masking.enlarged(task.cell)[:, None].expand(-1, 8, -1, -1)  # stride 1
    assert not seen[0].dense()[~shown].any()
    assert seen[0].dense()[shown].all()


def test_one_image_alone():
    task = tiny_task()
    task({"image": random_images(1)}).loss.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


def test_response_norm_of_large_values_in_half_precision():
    decoder = ConvDecoder(8, 12, dim=16)
    (norm,) = [module for module in decoder.modules() if isinstance(module, GlobalResponseNorm)]
    nn.init.ones_(norm.weight)
    large = torch.full((1, 14, 14, 64), 300.0)  # the sum of squares is past the largest half-precision number
    found = norm.half()(large.half())
    torch.testing.assert_close(found.float(), norm.float()(large), atol=1, rtol=1e-3)


def test_initial_weights_keep_the_signal():
    """The authors' second initialization, with a deviation of 1, makes the features of a tiny network grow to 1000."""
    torch.manual_seed(0)
    backbone = create_backbone("convnextv2_atto", size=64)
    task = FCMAE(FCMAEConfig(), backbone)
    images = torch.randn(4, 3, 64, 64)
    masking = task.mask(images)
    with torch.no_grad():
        for one in task.sparse.maps(images, masking, range(4)):
            assert 0.1 < one.tokens().std() < 10
        assert task({"image": images}).loss.item() == pytest.approx(1, abs=0.05)
    for module in task.decoder.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()
    assert task.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "backbone",
    [tiny_backbone(), tiny_backbone((32, 56)), tiny_backbone(96, patch_size=3), tiny_backbone(96, "resnet10t")],
)
def test_any_network_with_a_masked_form(backbone):
    task = tiny_task(copy.deepcopy(backbone))
    batch = {"image": random_images(2, backbone.input_size)}
    stride = backbone.stages[-1].stride
    assert task.cell == (stride, stride)
    assert task.mask(task.images_of(batch)).grid == tuple(pixels // stride for pixels in backbone.input_size)
    task(batch).loss.backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert task.visualize(batch)["reconstruction"].dtype == torch.uint8


def test_the_backbone_stays_the_network_that_it_was():
    backbone = tiny_backbone()
    plain = copy.deepcopy(backbone).eval()
    task = FCMAE(FCMAEConfig.model_validate({"decoder": {"dim": 16}}), backbone)
    for name, value in plain.state_dict().items():
        assert torch.equal(task.backbone.state_dict()[name], value), name
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(task.encoder().eval().pooled(x), plain.pooled(x))
    fresh = timm.create_model("convnextv2_atto", num_classes=0, **TINY)
    fresh.load_state_dict(task.encoder().model.state_dict(), strict=True)
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.model.head.norm.weight", "backbone.model.head.norm.bias"}  # new in fine-tuning


def test_weight_decay_follows_the_paper():
    task = tiny_task()
    decays = {named.name: named.decay for named in task.parameter_groups()}
    assert decays["decoder.mask_token"]
    for name in ("weight", "bias"):
        assert decays[f"backbone.model.stages.0.blocks.0.mlp.grn.{name}"]
        assert decays[f"decoder.blocks.0.mlp.grn.{name}"]
        assert not decays[f"backbone.model.stages.0.blocks.0.norm.{name}"]
    assert decays["decoder.pred.weight"]
    assert not decays["decoder.pred.bias"]


def test_a_step_never_waits_for_the_device():
    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    task = tiny_task()
    with Recorded():
        task({"image": random_images()}).loss.backward()
    assert "aten::convolution" in names
    waiting = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::item", "aten::is_nonzero"}
    assert not names & waiting


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
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


def test_sparse_kernels_number_their_positions_with_the_row_running_fastest():
    kernel = torch.zeros(49, 3)
    kernel[6 * 7 + 0] = 1  # column 6, row 0: three to the right of the center and three above it
    weight = dense_layout({"encoder.stages.0.0.dwconv.kernel": kernel})["stages.0.0.dwconv.weight"]
    assert weight.shape == (3, 1, 7, 7)
    image = torch.zeros(1, 3, 16, 16)
    image[..., 5, 9] = 1
    moved = F.conv2d(image, weight, padding=3, groups=3)
    assert moved[..., 8, 6].all()  # the position three rows below and three columns left reads it
    assert moved.sum() == 3

    full = torch.zeros(4, 5, 2)
    full[1 * 2 + 0, 4, 1] = 1  # column 1, row 0, from channel 4 to channel 1
    weight = dense_layout({"encoder.downsample_layers.1.1.kernel": full})["downsample_layers.1.1.weight"]
    assert weight.shape == (2, 5, 2, 2)
    assert weight[1, 4, 0, 1] == weight.sum() == 1


def test_official_checkpoint_that_does_not_fit():
    task = tiny_task()
    before = task.decoder.pred.weight.detach().clone()
    state = {"pred.weight": torch.zeros(192, 16, 1, 1), "proj.weight": torch.zeros(16, 20, 1, 1)}
    with pytest.raises(CheckpointError, match=r"proj.weight is \(16, 20\) in the file and \(16, 24\) here"):
        task.load_reference(state)
    assert torch.equal(task.decoder.pred.weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.5}, "task.mask_ratio: 1.5 is not possible; give less than 1"),
        ({"decoder": {"dept": 2}}, "task.decoder.dept: there is no such setting .*did you mean 'depth'"),
        ({"norm_pics": True}, "task.norm_pics: there is no such setting in task; did you mean 'norm_pix'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        task_config({"name": "fcmae", **settings})
    assert "\n" not in str(caught.value)


def test_sizes_and_backbones_that_are_refused():
    with pytest.raises(ConfigError, match=r"task.mask_ratio: 0.6 leaves 0 of 1x1 cells visible; it cannot be masked"):
        tiny_task(tiny_backbone(32, patch_size=4))
    with pytest.raises(CapabilityError, match="vit_tiny_patch16_224 cannot do FCMAE: it lacks sparse_convs"):
        tiny_task(create_backbone("vit_tiny_patch16_224", size=32, embed_dim=32, depth=1, num_heads=2))
    with pytest.raises(ConfigError, match=r"backbone.size: \[36, 32\] is no multiple of the mask's cells, \[8, 8\]"):
        tiny_task()({"image": random_images(2, (36, 32))})


def test_the_papers_defaults_and_sizes():
    config = FCMAEConfig()
    assert (config.mask_ratio, config.norm_pix, config.crop_scale) == (0.6, True, (0.2, 1.0))
    assert (config.decoder.dim, config.decoder.depth) == (512, 1)
    with torch.device("meta"):
        task = create_task({"name": "fcmae"}, create_backbone("convnextv2_base", size=224))
    assert task.keep((7, 7)) == 19
    shapes = {name: tuple(value.shape) for name, value in task.decoder.state_dict().items()}
    assert shapes["proj.weight"] == (512, 1024)
    assert shapes["blocks.0.mlp.grn.weight"] == (2048,)
    assert shapes["pred.weight"] == (3072, 512)
    assert not any(name.startswith("norm") for name in shapes)  # no final norm


def test_a_handful_of_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    backbone = tiny_backbone(dims=(16, 24, 32, 48))
    task = FCMAE(FCMAEConfig.model_validate({"decoder": {"dim": 64}}), backbone)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [127 + 120 * torch.sin(y * (0.2 + 0.1 * i) + x * (0.5 - 0.1 * i)) for i in range(4)]
    batch = {"image": torch.stack(waves)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)}
    visible = torch.zeros(4, 4, 4, dtype=torch.bool)
    visible.view(4, 16)[:, [0, 3, 5, 10, 12, 15]] = True
    assert masking_of(visible).ids_keep.shape == (4, 6)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95))
    first = last = 0.0
    for step in range(150):
        loss = task(batch, visible=visible).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
        if step and last < 0.15:
            break
    assert first > 0.9
    assert last < 0.15, last
