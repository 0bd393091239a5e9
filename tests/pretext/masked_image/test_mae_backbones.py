"""MAE on every family of transformers that can drop tokens: a loss, gradients, the paper's initial weights."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.mae import MAE
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "beit_base_patch16_224": TINY,
    "beitv2_base_patch16_224": TINY,
    "vit_relpos_small_patch16_224": TINY,
    "vit_srelpos_small_patch16_224": TINY,
    "convit_tiny": {**TINY, "embed_dim": 16, "local_up_to_layer": 1},
    "cait_xxs24_224": TINY,
    "tnt_s_patch16_224": {
        **{"embed_dim": 32, "depth": 2, "inner_dim": 8},
        **{"num_heads_inner": 2, "num_heads_outer": 2},
    },
    "naflexvit_base_patch16_gap": TINY,
    "naflexvit_base_patch16_parfac_gap": TINY,
    "qwen3_vit_88m": TINY,
    "deepseek_vit_412m": TINY,
    "gemma4_vit_167m": {**TINY, "head_dim": 16, "intermediate_size": 48},
    "hiera_tiny_224": {"embed_dim": 8, "stages": (1, 1, 1, 1)},
    "hiera_small_abswin_256": {"embed_dim": 8, "stages": (1, 1, 1, 1)},
}


def build(name: str, **settings: object) -> MAE:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    size = 64 if "hiera" in name else 56 if "deepseek" in name else 64
    task = create_task(
        {"name": "mae", "decoder": {"dim": 16, "depth": 1, "heads": 2}, **settings},
        create_backbone(name, size=size, **FAMILIES[name]),
    )
    assert isinstance(task, MAE)
    return task


def batch(task: MAE, count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = task.backbone.input_size
    return {"image": torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_reaches_every_trainable_parameter(name):
    task = build(name)
    output = task(batch(task))
    assert math.isfinite(output.loss.item())
    output.loss.backward()
    for label, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, label
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), label
    assert task.visualize(batch(task))["reconstruction"].shape[0] == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_of_a_batch_average_to_the_whole(name):
    task = build(name).double().eval()
    images, noise = batch(task)["image"], torch.rand(4, math.prod(task.decoder.grid))
    whole = task({"image": images}, noise=noise).loss
    halves = [task({"image": images[part]}, noise=noise[part]).loss for part in (slice(0, 2), slice(2, 4))]
    close = 1e-5 if "deepseek" in name else 1e-9  # its norms compute in float32
    torch.testing.assert_close(sum(halves) / 2, whole, atol=close, rtol=close)


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_never_waits_for_the_device(name):
    task = build(name)
    with _Recorded() as recorded:
        task(batch(task)).loss.backward()
    assert recorded.names & {"aten::sort", "aten::argsort"}
    waiting = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::item", "aten::is_nonzero"}
    assert not recorded.names & waiting


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_keeps_the_loss(name):
    task = build(name).eval()
    noise = torch.rand(4, math.prod(task.decoder.grid))
    exact = task(batch(task), noise=noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(batch(task), noise=noise).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projection_of_pixels_is_drawn_as_a_matrix(name):
    weight = TokenEncoder(build(name).backbone).projection.flatten(1)
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.95 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(("name", "prefix"), [("cait_xxs24_224", 0), ("convit_tiny", 0), ("tnt_s_patch16_224", 1)])
def test_a_table_for_each_patch_becomes_the_fixed_one(name, prefix):
    table = TokenEncoder(build(name).backbone).absolute
    assert table is not None
    torch.testing.assert_close(table.data, sincos_2d(32, (4, 4), prefix=prefix), atol=0, rtol=0)
    assert not table.requires_grad
    kept = TokenEncoder(build(name, positions="backbone").backbone).absolute
    assert kept is not None
    assert kept.requires_grad


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.partition("_")[0] not in {"cait", "convit", "tnt"}])
def test_other_tables_stay_and_are_trained(name):
    task = build(name)
    assert TokenEncoder(task.backbone).absolute is None
    tables = [p for label, p in task.backbone.named_parameters() if "pos" in label.split("model.", 1)[1].split(".")[0]]
    assert all(parameter.requires_grad for parameter in tables)


def test_local_heads_of_convit_begin_local():
    attention = build("convit_tiny").backbone.model.blocks[0].attn
    assert torch.equal(attention.v.weight, torch.eye(32))
    assert attention.pos_proj.weight[0, 2] == -1  # the first head looks away from nothing but distance


def test_hiera_predicts_one_vector_per_mask_unit():
    task = build("hiera_tiny_224")
    assert task.cell == (32, 32)
    assert task.decoder.grid == (2, 2)
    assert task.decoder.pred.out_features == 32 * 32 * 3
    tokens, prefix = TokenEncoder(task.backbone).encode(torch.randn(2, 3, 64, 64), torch.tensor([[3], [0]]))
    assert (tokens.shape, prefix) == ((2, 1, 64), 0)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("hiera_tiny_224", {"embed_dim": 8, "stages": (1, 1, 1, 1), "q_pool": 2}, "mask units end as 4 tokens each"),
        ("hiera_tiny_224", {"embed_dim": 8, "patch_drop_rate": 0.5}, "set patch_drop_rate to 0"),
        ("convit_tiny", {"depth": 1, "embed_dim": 16}, "its class token joins after more blocks than it has"),
        ("naflexvit_base_patch16_gap", {**TINY, "patch_drop_rate": 0.5}, "set pos_drop_rate and patch_drop_rate to 0"),
        ("qwen3_vit_88m", {**TINY, "encoder_pool": "merge", "out_features": 8}, "set encoder_pool to ''"),
        ("cait_xxs24_224", {**TINY, "pos_drop_rate": 0.1}, "set pos_drop_rate and patch_drop_rate to 0"),
    ],
)
def test_variants_that_cannot_are_refused_with_a_reason(name, kwargs, reason):
    with pytest.raises(CapabilityError, match=reason):
        create_task({"name": "mae"}, create_backbone(name, size=64, **kwargs))


def test_sizes_that_do_not_fit():
    task = build("hiera_tiny_224")
    with pytest.raises(ConfigError, match=r"backbone.size: hiera_tiny_224 is built for \[64, 64\] pixels"):
        task({"image": torch.zeros(1, 3, 96, 64, dtype=torch.uint8)})
    flexible = build("naflexvit_base_patch16_gap")
    assert math.isfinite(flexible({"image": torch.zeros(1, 3, 96, 64, dtype=torch.uint8)}).loss.item())
