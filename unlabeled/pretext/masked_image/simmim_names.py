"""The layout of SimMIM's reference checkpoints (microsoft/SimMIM) and where its tensors stand in timm's networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from unlabeled.pretext.common.checkpoint import resampled_positions
from unlabeled.ssl.core.errors import CheckpointError, first_line

_DROPPED = ("relative_position_index", "attn_mask")
"""Buffers that follow from the sizes."""
_TABLE = "relative_position_bias_table"
_SHARED_TABLE = f"encoder.rel_pos_bias.{_TABLE}"


def reference_names(task: nn.Module) -> dict[str, str]:
    """Name in the authors' files → name in `task` (SimMIM), for every tensor of its state."""
    return {_reference_name(name): name for name in task.state_dict()}


def _reference_name(name: str) -> str:
    """Swin's downsampling ends a stage there and begins one in timm; the ViT's layer scales have short names there."""
    if not name.startswith("backbone.model."):
        return {"mask_token": "encoder.mask_token"}.get(name, name.replace("decoder.", "decoder.0."))
    inner = name.removeprefix("backbone.model.")
    inner = re.sub(r"^layers\.(\d+)\.downsample\.", lambda stage: f"layers.{int(stage[1]) - 1}.downsample.", inner)
    inner = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", inner)
    return f"encoder.{inner}"


def to_own_layout(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`tensors` under their official names, made to fit timm's `model`.

    Index tables are left out, query and value biases become the bias of one projection (that of the keys is 0) where
    the model has it so, a shared table of relative positions is given to each block with one of its own, and tables
    and absolute positions are resampled to the model's window and grid.

    Raises CheckpointError when a table cannot be resampled.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_DROPPED)}
    own = dict(model.named_parameters())
    for name in [name for name in found if name.endswith("attn.q_bias")]:
        block = name.removesuffix("q_bias")
        if f"{block}qkv.bias".removeprefix("encoder.") in own and f"{block}v_bias" in found:
            query, value = found.pop(name), found.pop(f"{block}v_bias")
            found[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    if _SHARED_TABLE in found and _SHARED_TABLE.removeprefix("encoder.") not in own:
        blocks = [name for name in own if re.fullmatch(rf"blocks\.\d+\.attn\.{_TABLE}", name)]
        if blocks:
            table = found.pop(_SHARED_TABLE)
            found |= {f"encoder.{name}": table for name in blocks}
    for name in [name for name in found if name.endswith(_TABLE) and name.removeprefix("encoder.") in own]:
        found[name] = _resampled_table(name, found[name], model)
    if "encoder.pos_embed" in found and "pos_embed" in own:
        grid = cast(Any, model).patch_embed.grid_size
        found["encoder.pos_embed"] = resampled_positions(found["encoder.pos_embed"], own["pos_embed"], grid)
    return found


def _resampled_table(name: str, stored: Tensor, model: nn.Module) -> Tensor:
    """Table (positions, heads) of a file for the window of the module of that name; as it is where it fits."""
    module = cast(Any, model.get_submodule(name.removeprefix("encoder.").rpartition(".")[0]))
    own = cast(Tensor, module.relative_position_bias_table)
    window = cast(tuple[int, int], module.window_size)
    if stored.ndim != 2 or stored.shape[1:] != own.shape[1:] or (stored.shape == own.shape and window[0] == window[1]):
        return stored  # where the heads differ the shapes are compared, and refused, when it is copied
    try:
        table: Tensor = resize_rel_pos_bias_table(stored, new_window_size=window, new_bias_shape=tuple(own.shape))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint: {name} of {stored.shape[0]} positions cannot be resampled to windows of {list(window)} "
            f"({first_line(error)}); set backbone.kwargs.window_size to the file's own"
        ) from error
    return table
