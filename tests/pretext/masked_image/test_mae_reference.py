"""MAE and the checkpoints of its authors: with and without a decoder, of another grid, of another network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.mae import MAE, MAEConfig
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CheckpointError


def tiny_task(**kwargs: object) -> MAE:
    torch.manual_seed(0)
    settings = {"size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **kwargs}
    config = MAEConfig.model_validate({"decoder": {"dim": 16, "depth": 2, "heads": 2}})
    return MAE(config, create_backbone("vit_tiny_patch16_224", **settings))


def reference(task: MAE) -> dict[str, Tensor]:
    """The task's tensors in the authors' layout, with values of their own."""
    torch.manual_seed(3)
    state = {f"{k.removeprefix('model.')}": torch.randn_like(v) for k, v in task.backbone.state_dict().items()}
    for name, value in task.decoder.state_dict().items():
        state["mask_token" if name == "mask_token" else f"decoder_{name}"] = torch.randn_like(value)
    return state | {
        "pos_embed": sincos_2d(32, (4, 4), prefix=1),
        "decoder_pos_embed": sincos_2d(16, (4, 4), prefix=1),
    }


def test_official_checkpoints_with_and_without_a_decoder():
    task = tiny_task()
    state = reference(task)
    assert task.load_reference({"model": state}) == ([], [])
    assert torch.equal(task.backbone.model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(task.decoder.pred.bias, state["decoder_pred.bias"])
    assert torch.equal(task.decoder.mask_token, state["mask_token"])

    encoder_only = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask"))}
    missing, unexpected = tiny_task().load_reference(encoder_only | {"head.weight": torch.zeros(2, 2)})
    assert unexpected == ["head.weight"]
    assert set(missing) == {name for name in state if name.startswith(("decoder", "mask"))} - {"decoder_pos_embed"}


def test_official_checkpoint_of_another_grid():
    state = reference(tiny_task())
    larger = tiny_task(size=(48, 32))
    assert larger.load_reference(state) == ([], [])
    torch.testing.assert_close(larger.backbone.model.pos_embed.data, sincos_2d(32, (6, 4), prefix=1))
    assert not larger.backbone.model.pos_embed.requires_grad


def test_official_norm_is_reported_where_the_backbone_pools_first():
    """Fine-tuning networks have their norm after pooling: the pretraining norm must not end up there."""
    state = reference(tiny_task())
    missing, unexpected = tiny_task(global_pool="avg").load_reference(state)
    assert missing == ["fc_norm.weight", "fc_norm.bias"]
    assert unexpected == ["norm.weight", "norm.bias"]


def test_official_checkpoint_that_does_not_fit():
    task = tiny_task()
    before = task.decoder.pred.weight.detach().clone()
    state = reference(task)
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.qkv.weight is \(3, 3\) in the file and \(96, 32\) here"):
        task.load_reference(state | {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="decoder_pos_embed is not the fixed"):
        task.load_reference(state | {"decoder_pos_embed": torch.zeros(1, 17, 16)})
    assert torch.equal(task.decoder.pred.weight, before)
