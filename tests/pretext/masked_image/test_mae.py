"""MAE: the loss, what it reaches, what it refuses. The authors' own numbers are in tests/golden/test_mae.py."""

from __future__ import annotations

import math
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.mae import MAE, MAEConfig
from unlabeled.pretext.masked_image.masked_image import cell_targets, normalize_patches, patchify
from unlabeled.pretext.registry import create_task, task_config
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.task import PretextTask

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"dim": 16, "depth": 2, "heads": 2}


def tiny_backbone(name: str = "vit_tiny_patch16_224", size: object = 32, **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    patch = {} if "patch14" in name else {"patch_size": 8}
    return create_backbone(name, size=size, **{**TINY, **patch, **kwargs})


def tiny_task(backbone: Backbone | None = None, **settings: object) -> MAE:
    backbone = backbone or tiny_backbone()
    torch.manual_seed(1)
    task = create_task({"name": "mae", "decoder": DECODER, **settings}, backbone)
    assert isinstance(task, MAE)
    return task


def random_images(count: int = 4, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_mean_over_pixels_then_over_masked_patches(norm_pix):
    task = tiny_task(norm_pix=norm_pix)
    noise = torch.rand(4, 16)
    output = task({"image": random_images()}, noise=noise)

    images = task.backbone.normalize(random_images())
    masking = task.mask(images, noise)
    latent, prefix = TokenEncoder(task.backbone).encode(images, masking.ids_keep)
    assert latent.shape == (4, prefix + 4, 32)
    predictions = task.decoder.predict_all(latent, masking)
    target = patchify(images, (8, 8))
    target = normalize_patches(target) if norm_pix else target
    removed = (~masking.visible.flatten(1)).float()
    loss = ((predictions - target) ** 2).mean(-1).mul(removed).sum() / removed.sum()
    torch.testing.assert_close(output.loss, loss)
    explained = 1 - loss / ((target**2).mean(-1).mul(removed).sum() / removed.sum())
    torch.testing.assert_close(output.logs["explained"], explained, atol=1e-4, rtol=1e-4)
    assert not output.logs["explained"].requires_grad


def test_visible_patches_are_seen_but_not_scored():
    """Hidden pixels move the target only, visible pixels the prediction only."""
    task = tiny_task()
    images = task.backbone.normalize(random_images())
    noise = torch.rand(4, 16)
    visible = task.mask(images, noise).visible.view(4, 1, 4, 4)
    visible = visible.repeat_interleave(8, 2).repeat_interleave(8, 3)
    seen: list[Tensor] = []
    task.decoder.register_forward_hook(lambda *call: seen.append(call[2]))
    for changed in (images, torch.where(visible, images, -images), torch.where(visible, -images, images)):
        task({"image": changed}, noise=noise)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    assert seen[0].shape == (4, 12, 192)  # nothing is predicted for visible patches, so nothing can be scored there


def test_float_images_are_taken_as_normalized():
    task = tiny_task()
    noise = torch.rand(4, 16)
    raw = task({"image": random_images()}, noise=noise).loss
    assert torch.equal(raw, task({"image": task.backbone.normalize(random_images())}, noise=noise).loss)
    assert not torch.equal(raw, task({"image": random_images() / 255}, noise=noise).loss)


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


def test_halves_of_a_batch_average_to_the_whole():
    task = tiny_task()
    noise = torch.rand(4, 16)

    def gradient(*parts: slice) -> tuple[Tensor, Tensor]:
        task.zero_grad()
        loss = sum(task({"image": random_images()[part]}, noise=noise[part]).loss for part in parts) / len(parts)
        loss.backward()
        return loss.detach(), task.backbone.model.patch_embed.proj.weight.grad.clone()

    for whole, halves in zip(gradient(slice(0, 4)), gradient(slice(0, 2), slice(2, 4)), strict=True):
        torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_base_patch16_siglip_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("eva02_tiny_patch14_224", {"size": 56}),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(name, kwargs):
    task = tiny_task(tiny_backbone(name, **kwargs))
    loss = task({"image": random_images(2, task.backbone.input_size)}).loss
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())
    loss.backward()
    for label, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, label


def test_non_square_images():
    task = tiny_task(tiny_backbone(size=(224, 320), patch_size=16))
    batch = {"image": random_images(2, (224, 320))}
    assert TokenEncoder(task.backbone).grid((224, 320)) == (14, 20)
    assert task.decoder.positions.shape == (280, 16)
    assert math.isfinite(task(batch).loss.item())
    assert task.visualize(batch)["reconstruction"].shape == (3, 2 * 224 + 3 * 2, 3 * 320 + 4 * 2)


def test_other_sizes_in_one_run():
    task = tiny_task(tiny_backbone(dynamic_img_size=True))
    assert math.isfinite(task({"image": random_images(2, (48, 40))}).loss.item())


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
    assert "aten::argsort" in recorded.names or "aten::sort" in recorded.names
    waiting = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::item", "aten::is_nonzero"}
    assert not recorded.names & waiting


def test_bfloat16_keeps_targets_and_loss_in_float32():
    task = tiny_task()
    noise = torch.rand(4, 16)
    exact = task({"image": random_images()}, noise=noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task({"image": random_images()}, noise=noise).loss
        images = task.backbone.normalize(random_images())
        target = cell_targets(images, task.cell, torch.arange(16).expand(4, -1), norm_pix=task.config.norm_pix)
    assert loss.dtype == target.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = task({"image": torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)}).loss
    flat.backward()
    assert math.isfinite(flat.item())
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


def test_a_constant_image_has_the_target_zero():
    task = tiny_task()
    images = task.backbone.normalize(torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)[:, :1].expand(-1, 3, -1, -1))
    images = images[:, :1].expand(-1, 3, -1, -1)  # one value over all channels, after normalization
    assert torch.equal(cell_targets(images, task.cell, torch.arange(16)[None]), torch.zeros(1, 16, 192))


def test_initial_weights():
    task = tiny_task(tiny_backbone(embed_dim=64, num_heads=4))
    model = task.backbone.model
    weight = model.patch_embed.proj.weight.flatten(1)
    bound = math.sqrt(6 / sum(weight.shape))  # of the (64, 192) matrix, not of the convolution's fans
    assert 0.97 * bound < weight.abs().max() <= bound
    qkv = model.blocks[0].attn.qkv.weight
    assert 0.97 * math.sqrt(6 / (64 + 192)) < qkv.abs().max() <= math.sqrt(6 / (64 + 192))
    for layer in [layer for layer in task.modules() if isinstance(layer, nn.Linear)]:
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    assert 0.01 < model.cls_token.std() < 0.03
    assert 0.01 < task.decoder.mask_token.std() < 0.04
    torch.testing.assert_close(model.pos_embed.data, sincos_2d(64, (4, 4), prefix=1), atol=0, rtol=0)
    assert not model.pos_embed.requires_grad


def test_kept_weights_stay_as_they_are():
    backbone = tiny_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    tiny_task(backbone, init="keep")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert backbone.model.pos_embed.requires_grad  # a learned table goes on being learned

    backbone.model.pos_embed.data.copy_(sincos_2d(32, (4, 4), prefix=1))
    tiny_task(backbone, init="keep")
    assert not backbone.model.pos_embed.requires_grad  # the fixed table stays fixed


def test_positions_of_the_backbone():
    backbone = tiny_backbone()
    before = backbone.model.pos_embed.detach().clone()
    tiny_task(backbone, positions="backbone")
    assert torch.equal(backbone.model.pos_embed, before)
    assert backbone.model.pos_embed.requires_grad

    rotary = tiny_backbone("vit_small_patch16_dinov3")
    assert TokenEncoder(rotary).absolute is None
    tiny_task(rotary)  # has no table to replace

    unembedded = tiny_task(tiny_backbone("deit3_small_patch16_224"))  # class token without a position
    torch.testing.assert_close(unembedded.backbone.model.pos_embed.data, sincos_2d(32, (4, 4)), atol=0, rtol=0)


def test_weight_decay_follows_the_paper():
    task = tiny_task()
    decayed = {named.name: named.decay for named in task.parameter_groups()}
    assert decayed["backbone.model.cls_token"]
    assert decayed["decoder.mask_token"]
    assert decayed["decoder.blocks.0.attn.qkv.weight"]
    assert not decayed["decoder.blocks.0.attn.qkv.bias"]
    assert not decayed["backbone.model.norm.weight"]
    assert "backbone.model.pos_embed" not in decayed
    layers = {named.name: named.layer for named in task.parameter_groups()}
    assert layers["backbone.model.cls_token"] == 0
    assert layers["decoder.pred.weight"] == task.backbone.depth + 1


def test_views_crop_and_flip_and_pickle():
    backbone = tiny_backbone(size=(32, 48))
    views = pickle.loads(pickle.dumps(MAE.views(MAEConfig(), backbone)))
    drawn = torch.zeros(3, 100, 90, dtype=torch.uint8)
    drawn[0] = torch.linspace(0, 255, 90).to(torch.uint8)
    crops = []
    for seed in range(16):
        torch.manual_seed(seed)
        crops.append(views(drawn)["image"])
        assert crops[-1].shape == (3, 32, 48)
        assert crops[-1].dtype == torch.uint8
    rising = [bool(crop[0, 16, -1] > crop[0, 16, 0]) for crop in crops]
    assert 0 < sum(rising) < 16  # about half are flipped
    spans = [abs(int(crop[0, 16, -1]) - int(crop[0, 16, 0])) for crop in crops]
    assert max(spans) > 1.2 * min(spans)
    torch.manual_seed(0)
    assert torch.equal(views(drawn)["image"], crops[0])


def test_image_of_a_reconstruction():
    task = tiny_task()
    images, noise = random_images(10), torch.rand(10, 16)
    drawn = task.visualize({"image": images}, noise=noise)["reconstruction"]
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (3, 8 * 98 + 2, 3 * 98 + 2)  # the first eight, enlarged threefold, borders of two pixels
    tiles = (drawn[:, 100:196, left : left + 96] for left in (2, 100, 198))  # second row
    original, masked, rebuilt = (tile[:, 1::3, 1::3] for tile in tiles)
    visible = task.mask(task.backbone.normalize(images), noise).visible[1].view(1, 4, 4)
    visible = visible.repeat_interleave(8, 1).repeat_interleave(8, 2).expand(3, -1, -1)
    assert torch.equal(original, images[1])
    assert torch.equal(masked[visible], images[1][visible])
    assert torch.equal(rebuilt[visible], images[1][visible])
    assert masked[~visible].float().std() < 20  # one gray
    assert not torch.equal(rebuilt[~visible], images[1][~visible])


def test_a_perfect_prediction_gives_the_image_back(monkeypatch):
    task = tiny_task()
    images = random_images(2)
    target = normalize_patches(patchify(task.backbone.normalize(images), (8, 8)))
    monkeypatch.setattr(task.decoder, "predict_all", lambda *_: target)
    drawn = task.visualize({"image": images})["reconstruction"]
    assert torch.equal(drawn[:, 2:98, 2:98], drawn[:, 2:98, 198:294])


def test_the_encoder_is_a_plain_timm_model():
    task = tiny_task()
    kwargs = {"num_classes": 0, "img_size": 32, "patch_size": 8, **TINY}
    timm.create_model("vit_tiny_patch16_224", **kwargs).load_state_dict(task.encoder().model.state_dict(), strict=True)
    again = tiny_task(tiny_backbone())
    again.load_state_dict(task.state_dict())
    noise = torch.rand(4, 16)
    assert torch.equal(
        again({"image": random_images()}, noise=noise).loss, task({"image": random_images()}, noise=noise).loss
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.5}, "task.mask_ratio: 1.5 is not possible; give less than 1"),
        ({"decoder": {"dim": 18}}, "task.decoder: dim 18 is no multiple of 4, as its positions need; set dim=16"),
        ({"decoder": {"dim": 16, "heads": 3}}, "task.decoder: dim 16 is no multiple of heads 3"),
        ({"crop_scale": (0.9, 0.2)}, r"crop_scale \[0.9, 0.2\] begins above its end"),
        ({"mask_ration": 0.5}, "task.mask_ration: there is no such setting in task; did you mean 'mask_ratio'"),
        ({"positions": "rope"}, "task.positions: 'rope' is not possible; choose 'sincos' or 'backbone'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        task_config({"name": "mae", **settings})
    assert "\n" not in str(caught.value)


def test_sizes_and_backbones_that_are_refused():
    with pytest.raises(ConfigError, match=r"backbone.size: .*30.* multiple of vit_tiny_patch16_224's patch"):
        tiny_task(tiny_backbone(size=(30, 32)))
    with pytest.raises(ConfigError, match=r"task.mask_ratio: 0.98 leaves 0 of 4x4 cells visible; set it between"):
        tiny_task(mask_ratio=0.98)
    with pytest.raises(ConfigError, match=r"task.positions: sincos needs a width that is a multiple of 4, .* has 30"):
        tiny_task(tiny_backbone(embed_dim=30))
    assert tiny_task(tiny_backbone(embed_dim=30), init="keep").backbone.model.pos_embed.requires_grad
    with pytest.raises(CapabilityError, match="resnet10t cannot do MAE: it lacks token_dropping"):
        tiny_task(create_backbone("resnet10t"))


def test_the_papers_defaults():
    config = MAEConfig()
    assert (config.mask_ratio, config.norm_pix, config.crop_scale) == (0.75, True, (0.2, 1.0))
    assert (config.decoder.dim, config.decoder.depth, config.decoder.heads) == (512, 8, 16)
    torch.manual_seed(0)
    task: PretextTask = create_task({"name": "mae"}, create_backbone("vit_base_patch16_224", device="meta"))
    encoder = sum(parameter.numel() for parameter in task.backbone.parameters())
    decoder = sum(parameter.numel() for parameter in task.decoder.parameters()) + 197 * 512  # with its fixed table
    assert round(encoder / 1e6, 2) == 85.80
    assert round(decoder / 1e6, 2) == 26.11


def test_a_handful_of_images_can_be_learned_by_heart():
    task = tiny_task(decoder={"dim": 64, "depth": 1, "heads": 4}, backbone=tiny_backbone(embed_dim=64, num_heads=4))
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [127 + 120 * torch.sin(y * (0.2 + 0.1 * i) + x * (0.5 - 0.1 * i)) for i in range(4)]
    batch = {"image": torch.stack(waves)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)}
    noise = torch.rand(4, 16)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95))
    first = last = 0.0
    for step in range(400):
        loss = task(batch, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
        if step and last < 0.1:
            break
    assert first > 0.9
    assert last < 0.1
