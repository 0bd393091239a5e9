"""SimMIM and the checkpoints of its authors: Swin of another window, the ViT in several networks, what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.masked_image.simmim import SimMIM, SimMIMConfig
from unlabeled.pretext.masked_image.simmim_names import reference_names
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CheckpointError

TABLE = "relative_position_bias_table"
SHARED = f"encoder.rel_pos_bias.{TABLE}"


def swin(window: int = 4, size: int = 32) -> SimMIM:
    torch.manual_seed(0)
    kwargs = {"patch_size": 2, "window_size": window, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    return SimMIM(SimMIMConfig(), create_backbone("swin_tiny_patch4_window7_224", size=size, **kwargs))


def vit(name: str = "vit_tiny_patch16_224", size: int = 32, **kwargs: object) -> SimMIM:
    torch.manual_seed(0)
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "token"}
    return SimMIM(SimMIMConfig(), create_backbone(name, size=size, **{**small, **kwargs}))


def beit(**kwargs: object) -> SimMIM:
    return vit("beit_base_patch16_224", **kwargs)


def shared(**kwargs: object) -> SimMIM:
    return beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, **kwargs)


def reference(task: SimMIM) -> dict[str, Tensor]:
    """The task's tensors in the authors' layout, with values of their own."""
    torch.manual_seed(3)
    own = task.state_dict()
    state = {name: torch.randn_like(own[position]) for name, position in reference_names(task).items()}
    for name in [name for name in state if name.endswith("qkv.bias") and task.backbone.name.startswith("vit")]:
        state[name.replace("qkv.bias", "q_bias")], _, state[name.replace("qkv.bias", "v_bias")] = state[name].chunk(3)
        del state[name]
    return state


def test_swin_with_its_buffers():
    task = swin()
    state = reference(task)
    buffers = {
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16),
    }
    assert task.load_reference({"model": state | buffers}) == ([], [])
    net = task.backbone.model
    merging = state["encoder.layers.0.downsample.reduction.weight"]
    assert torch.equal(net.layers[1].downsample.reduction.weight, merging)
    assert torch.equal(task.mask_token, state["encoder.mask_token"])
    assert torch.equal(task.decoder.weight, state["decoder.0.weight"])
    assert torch.equal(net.layers[0].blocks[0].attn.relative_position_bias_table,
                       state[f"encoder.layers.0.blocks.0.attn.{TABLE}"])  # fmt: skip


def test_swin_of_another_window():
    """As from 6 at 192 pixels to 7 at 224: the table is resampled, its center and its symmetry stay."""
    source, task = swin(window=4), swin(window=8)
    name = f"encoder.layers.0.blocks.0.attn.{TABLE}"
    state = reference(source)
    state[name] = (state[name] + state[name].flip(0)) / 2
    assert task.load_reference(state) == ([], [])
    before = state[name].view(7, 7, 2)
    after = task.backbone.model.layers[0].blocks[0].attn.relative_position_bias_table.detach().view(15, 15, 2)
    torch.testing.assert_close(after[7, 7], before[3, 3], atol=1e-3, rtol=0)
    torch.testing.assert_close(after, after.flip(0, 1), atol=1e-3, rtol=0)
    assert after.abs().max() <= 1.5 * before.abs().max()

    rows = torch.arange(-3.0, 4.0)[:, None, None].expand(7, 7, 2)  # of a table that rises from row to row only
    assert task.load_reference(state | {name: rows.reshape(49, 2)}) == ([], [])
    after = task.backbone.model.layers[0].blocks[0].attn.relative_position_bias_table.detach().view(15, 15, 2)
    torch.testing.assert_close(after, after[:, :1].expand_as(after))
    assert (after[1:, 0, 0] >= after[:-1, 0, 0]).all()
    assert (after[3:12, 0, 0] > after[2:11, 0, 0]).all()


def test_windows_are_cut_to_small_maps_and_then_not_shifted():
    net = swin(window=8).backbone.model
    assert net.layers[0].blocks[1].shift_size == (4, 4)
    assert net.layers[1].blocks[0].window_size == (8, 8)
    small = swin(window=8, size=16).backbone.model
    assert small.layers[0].blocks[1].shift_size == (0, 0)
    assert small.layers[1].blocks[0].window_size == (4, 4)


def test_vit_with_a_shared_table():
    task = shared(init_values=0.1)
    state = reference(task)
    assert SHARED in state
    assert "encoder.blocks.0.attn.q_bias" in state
    assert "encoder.blocks.0.gamma_1" in state
    assert task.load_reference(state) == ([], [])
    assert torch.equal(task.backbone.model.rel_pos_bias.relative_position_bias_table, state[SHARED])

    each = beit(init_values=0.1)  # as the authors fine-tune
    assert each.load_reference(state) == ([], [])
    for block in each.backbone.model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, state[SHARED])

    larger = shared(init_values=0.1, size=48)
    assert larger.load_reference(state) == ([], [])
    table = larger.backbone.model.rel_pos_bias.relative_position_bias_table
    assert table.shape == (11 * 11 + 3, 2)
    assert torch.equal(table[-3:], state[SHARED][-3:])  # class token's entries


def test_plain_vit_without_a_bias_of_keys():
    task = vit(init_values=0.1)
    state = reference(task)
    assert task.load_reference(state) == ([], [])
    bias = task.backbone.model.blocks[1].attn.qkv.bias
    assert torch.equal(bias[:32], state["encoder.blocks.1.attn.q_bias"])
    assert torch.equal(bias[32:64], torch.zeros(32))
    assert torch.equal(bias[64:], state["encoder.blocks.1.attn.v_bias"])
    assert torch.equal(task.backbone.model.blocks[0].ls2.gamma, state["encoder.blocks.0.gamma_2"])
    larger = vit(init_values=0.1, size=48)
    assert larger.load_reference(state) == ([], [])
    assert torch.equal(larger.backbone.model.pos_embed[:, 0], state["encoder.pos_embed"][:, 0])


def test_names_that_are_missing_or_too_many():
    state = reference(vit())
    missing, unexpected = vit(global_pool="avg").load_reference(state)  # its norm follows the pooling
    assert missing == ["encoder.fc_norm.weight", "encoder.fc_norm.bias"]
    assert unexpected == ["encoder.norm.weight", "encoder.norm.bias"]
    fewer = {name: tensor for name, tensor in state.items() if not name.startswith("decoder")}
    assert vit().load_reference(fewer) == (["decoder.0.weight", "decoder.0.bias"], [])
    assert vit(init_values=0.1).load_reference(reference(shared()))[1] == [SHARED]  # a plain ViT has no such table


def test_checkpoints_that_do_not_fit():
    task = swin()
    before = task.mask_token.detach().clone()
    state = reference(task)
    name = "encoder.layers.0.blocks.0.attn.qkv.weight"
    with pytest.raises(CheckpointError, match=r"qkv.weight is \(3, 3\) in the file and \(48, 16\) here"):
        task.load_reference(state | {name: torch.zeros(3, 3)})
    table = f"encoder.layers.0.blocks.0.attn.{TABLE}"
    with pytest.raises(CheckpointError, match=rf"{TABLE} is \(49, 5\) in the file and \(49, 2\) here"):
        task.load_reference(state | {table: torch.zeros(49, 5)})
    with pytest.raises(CheckpointError, match=rf"{TABLE} of 50 positions cannot be resampled to windows of \[4, 4\]"):
        task.load_reference(state | {table: torch.zeros(50, 2)})
    with pytest.raises(CheckpointError, match=r"encoder.mask_token is .* in the file"):
        SimMIM(SimMIMConfig(), create_backbone("test_resnet", size=32)).load_reference(state)
    with pytest.raises(CheckpointError, match="it holds none of"):
        task.load_reference({"cls_token": torch.zeros(1, 1, 16)})
    assert torch.equal(task.mask_token, before)
