"""ConvMAE: the task around the network. The authors' own numbers are in tests/golden/test_convmae.py."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.convmae import ConvMAE, ConvMAEConfig
from unlabeled.pretext.masked_image.masked_image import normalize_patches, patchify
from unlabeled.pretext.registry import create_task, task_config
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError

TINY = {"patch_size": (2, 2, 2), "dims": (8, 12, 16), "depths": (1, 1, 2), "num_heads": 2}
DECODER = {"dim": 16, "depth": 2, "heads": 2}


def tiny_backbone(size: object = 32, **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return create_backbone("convmae_small", size=size, **{**TINY, **kwargs})


def tiny_task(backbone: Backbone | None = None, **settings: object) -> ConvMAE:
    backbone = backbone or tiny_backbone()
    torch.manual_seed(1)
    task = create_task({"name": "convmae", "decoder": DECODER, **settings}, backbone)
    assert isinstance(task, ConvMAE)
    return task


def random_images(count: int = 4, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_mean_over_pixels_then_over_masked_cells(norm_pix):
    task = tiny_task(norm_pix=norm_pix)
    noise = torch.rand(4, 16)
    output = task({"image": random_images()}, noise=noise)

    images = task.backbone.normalize(random_images())
    masking = task.mask(images, noise)
    latent = task.encode(images, masking)
    assert latent.shape == (4, 4, 16)  # no class token
    predictions = task.decoder.predict_all(latent, masking)
    target = patchify(images, (8, 8))
    target = normalize_patches(target) if norm_pix else target
    removed = (~masking.visible.flatten(1)).float()
    loss = ((predictions - target) ** 2).mean(-1).mul(removed).sum() / removed.sum()
    torch.testing.assert_close(output.loss, loss)


def test_skips_join_the_tokens_before_the_last_norm(monkeypatch):
    """With a transformer that gives zero, what is left is the norm of both skips, at the kept cells in their order."""
    task = tiny_task()
    model = task.backbone.model
    monkeypatch.setattr(model, "transform", torch.zeros_like)
    model.norm.weight.data.normal_()
    seen: dict[str, Tensor] = {}
    model.blocks1[-1].register_forward_hook(lambda *call: seen.update(first=call[2]))
    model.blocks2[-1].register_forward_hook(lambda *call: seen.update(second=call[2]))
    task.config = task.config.model_copy(update={"execution": "dense"})
    images = task.backbone.normalize(random_images())
    masking = task.mask(images, torch.rand(4, 16))
    latent = task.encode(images, masking)

    skips = [
        F.conv2d(seen[name].permute(0, 3, 1, 2), skip.weight, skip.bias, stride=stride).flatten(2).transpose(1, 2)
        for name, skip, stride in (
            ("first", task.stage1_output_decode, 4),
            ("second", task.stage2_output_decode, 2),
        )
    ]
    expected = model.norm(sum(skips))  # (B, L, D)
    kept = expected.gather(1, masking.ids_keep[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(latent, kept)
    assert not torch.allclose(latent, expected.gather(1, masking.ids_restore[:, :4, None].expand(-1, -1, 16)))


def test_visible_cells_are_seen_but_not_scored():
    """Hidden pixels move the target only, visible pixels the prediction only."""
    task = tiny_task()
    images = task.backbone.normalize(random_images())
    noise = torch.rand(4, 16)
    visible = task.mask(images, noise).enlarged((8, 8))[:, None]
    seen: list[Tensor] = []
    task.decoder.register_forward_hook(lambda *call: seen.append(call[2]))
    for changed in (images, torch.where(visible, images, -images), torch.where(visible, -images, images)):
        task({"image": changed}, noise=noise)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    assert seen[0].shape == (4, 12, 192)


def test_both_executions_give_the_same_loss_and_gradients():
    gathered, dense = tiny_task().double(), tiny_task(execution="dense").double()
    noise = torch.rand(4, 16)
    losses = [task({"image": random_images().double()}, noise=noise).loss for task in (gathered, dense)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(gathered.named_parameters(), dense.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad - other.grad).abs().max() <= 1e-12 * max(1.0, float(other.grad.abs().max())), name


@pytest.mark.parametrize("fc_norm", [False, True])
def test_every_trainable_parameter_gets_a_gradient(fc_norm):
    task = tiny_task(tiny_backbone(fc_norm=fc_norm, num_classes=3))
    task({"image": random_images()}).loss.backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name.removeprefix("backbone.model.") for name, p in task.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "head.weight", "head.bias"} | (
        {"fc_norm.weight", "fc_norm.bias"} if fc_norm else set()
    )


@pytest.mark.parametrize("size", [(192, 192), (224, 320)])
def test_other_sizes_than_the_papers(size):
    task = tiny_task(tiny_backbone(size, patch_size=(4, 2, 2)))
    grid = (size[0] // 16, size[1] // 16)
    assert task.cell == (16, 16)
    assert task.decoder.positions.shape == (grid[0] * grid[1], 16)
    torch.testing.assert_close(task.backbone.model.pos_embed.data, sincos_2d(16, grid), atol=0, rtol=0)
    batch = {"image": random_images(1, size)}
    assert math.isfinite(task(batch).loss.item())
    assert task.mask(batch["image"]).ids_keep.shape[1] == grid[0] * grid[1] // 4
    assert task.visualize(batch)["reconstruction"].shape == (3, size[0] + 4, 3 * size[1] + 8)


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
    assert "aten::index_copy_" in recorded.names
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


def test_initial_weights():
    task = tiny_task(tiny_backbone(dims=(8, 12, 64), num_heads=4))
    model = task.backbone.model
    weight = model.patch_embed3.proj.weight.flatten(1)
    bound = math.sqrt(6 / sum(weight.shape))  # of the (64, 48) matrix, not of the convolution's fans
    assert 0.97 * bound < weight.abs().max() <= bound
    for layer in [layer for layer in task.modules() if isinstance(layer, nn.Linear)]:
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    others = [task.stage1_output_decode, model.patch_embed1.proj, model.patch_embed2.proj, model.blocks1[0].mlp.fc1]
    for layer in others:  # torch's own: uniform up to 1 / sqrt(inputs), for the bias too
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() > 0
    assert 0.01 < task.decoder.mask_token.std() < 0.04
    assert not model.pos_embed.requires_grad


def test_kept_weights_stay_as_they_are():
    backbone = tiny_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    task = tiny_task(backbone, init="keep")
    assert all(torch.equal(value, before[name]) for name, value in task.backbone.state_dict().items())
    assert backbone.model.pos_embed.requires_grad  # a learned table goes on being learned
    tiny_task(backbone, init="mae")
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.blocks1.0.attn.weight", "model.patch_embed4.weight", "model.pos_embed"} <= changed


def test_weight_decay_follows_the_paper():
    decayed = {named.name: named.decay for named in tiny_task().parameter_groups()}
    assert decayed["decoder.mask_token"]
    assert decayed["stage1_output_decode.weight"]
    assert decayed["backbone.model.blocks1.0.attn.weight"]
    assert not decayed["stage1_output_decode.bias"]
    assert not decayed["backbone.model.blocks1.0.norm1.weight"]
    assert "backbone.model.pos_embed" not in decayed


def test_the_skips_stay_behind():
    task = tiny_task()
    kwargs = {"num_classes": 0, "img_size": 32, **TINY}
    timm.create_model("convmae_small", **kwargs).load_state_dict(task.encoder().model.state_dict(), strict=True)
    assert not any("output_decode" in name for name in task.encoder().state_dict())


def test_the_papers_defaults():
    config = ConvMAEConfig()
    assert (config.mask_ratio, config.norm_pix, config.crop_scale) == (0.75, True, (0.2, 1.0))
    assert (config.decoder.dim, config.decoder.depth, config.decoder.heads) == (512, 8, 16)
    task = create_task({"name": "convmae", "init": "keep"}, create_backbone("convmae_base"))
    assert isinstance(task, ConvMAE)
    assert task.keep((14, 14)) == 49
    skips = [*task.stage1_output_decode.parameters(), *task.stage2_output_decode.parameters()]
    encoder = sum(parameter.numel() for parameter in [*task.backbone.parameters(), *skips])
    decoder = sum(parameter.numel() for parameter in task.decoder.parameters()) + 196 * 512  # with its fixed table
    assert round(encoder / 1e6, 2) == 88.93
    assert round((encoder + decoder) / 1e6, 2) == 115.04


def reference(task: ConvMAE) -> dict[str, Tensor]:
    """The task's tensors in the authors' layout, with values of their own."""
    torch.manual_seed(3)
    state = {name.removeprefix("backbone.model."): torch.randn_like(v) for name, v in task.state_dict().items()}
    state = {
        ("mask_token" if name == "decoder.mask_token" else name.replace("decoder.", "decoder_", 1)): value
        for name, value in state.items()
    }
    return state | {"pos_embed": sincos_2d(16, (4, 4)), "decoder_pos_embed": sincos_2d(16, (4, 4))}


def test_official_checkpoints_with_and_without_a_decoder():
    task = tiny_task()
    state = reference(task)
    assert {"blocks1.0.attn.weight", "stage2_output_decode.bias", "decoder_blocks.0.norm1.weight"} <= set(state)
    assert task.load_reference({"model": state}) == ([], [])
    assert torch.equal(task.backbone.model.patch_embed4.weight, state["patch_embed4.weight"])
    assert torch.equal(task.stage2_output_decode.bias, state["stage2_output_decode.bias"])
    assert torch.equal(task.decoder.mask_token, state["mask_token"])

    # the released files hold the trunk alone
    late = ("decoder", "mask", "stage")
    trunk = {name: value for name, value in state.items() if not name.startswith(late)}
    missing, unexpected = tiny_task().load_reference(trunk | {"head.weight": torch.zeros(2, 2)})
    assert unexpected == ["head.weight"]
    assert set(missing) == {name for name in state if name.startswith(late)} - {"decoder_pos_embed"}


def test_official_checkpoint_of_another_grid():
    state = reference(tiny_task())
    larger = tiny_task(tiny_backbone((48, 32)))
    assert larger.load_reference(state) == ([], [])
    torch.testing.assert_close(larger.backbone.model.pos_embed.data, sincos_2d(16, (6, 4)))
    assert not larger.backbone.model.pos_embed.requires_grad
    learned = state | {"pos_embed": torch.randn(1, 16, 16)}
    assert larger.load_reference(learned) == ([], [])
    assert larger.backbone.model.pos_embed.requires_grad


def test_official_checkpoint_that_does_not_fit():
    task = tiny_task()
    before = task.decoder.pred.weight.detach().clone()
    state = reference(task)
    with pytest.raises(CheckpointError, match=r"blocks1.0.attn.weight is \(3, 3\) in the file and \(8, 1, 5, 5\) here"):
        task.load_reference(state | {"blocks1.0.attn.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="pos_embed has 17 patches, no square"):
        task.load_reference(state | {"pos_embed": torch.zeros(1, 17, 16)})  # a class token's position too many
    with pytest.raises(CheckpointError, match="decoder_pos_embed is not the fixed"):
        task.load_reference(state | {"decoder_pos_embed": torch.zeros(1, 16, 16)})
    assert torch.equal(task.decoder.pred.weight, before)


def test_settings_and_backbones_that_are_refused():
    with pytest.raises(ConfigError, match=r"task.execution: 'sparse' is not possible; choose 'gathered' or 'dense'"):
        task_config({"name": "convmae", "execution": "sparse"})
    with pytest.raises(ConfigError, match=r"task.mask_ratio: 0.98 leaves 0 of 4x4 cells visible; set it between"):
        tiny_task(mask_ratio=0.98)
    with pytest.raises(CapabilityError, match="test_vit cannot do ConvMAE: it lacks masked_stages"):
        tiny_task(create_backbone("test_vit", size=32))
    with pytest.raises(
        CapabilityError,
        match=r"convmae_small cannot do MAE: it lacks token_dropping \(convolutions need",
    ):
        create_task({"name": "mae"}, tiny_backbone())


def test_a_handful_of_images_can_be_learned_by_heart():
    task = tiny_task(tiny_backbone(dims=(16, 24, 64), num_heads=4), decoder={"dim": 64, "depth": 1, "heads": 4})
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [127 + 120 * torch.sin(y * (0.2 + 0.1 * i) + x * (0.5 - 0.1 * i)) for i in range(4)]
    batch = {"image": torch.stack(waves)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)}
    noise = torch.rand(4, 16)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95))
    first = last = 0.0
    for step in range(300):
        loss = task(batch, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
        if step and last < 0.1:
            break
    assert first > 0.9
    assert last < 0.1
