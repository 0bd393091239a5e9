"""Converts SimMIM's reference checkpoints (microsoft/SimMIM) to the layout of timm's models."""

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
"""Buffers that are computed from the sizes."""
_TABLE = "relative_position_bias_table"
_SHARED_TABLE = f"encoder.rel_pos_bias.{_TABLE}"


def reference_names(task: nn.Module) -> dict[str, str]:
    """Name in the authors' files → name in `task` (SimMIM), for every tensor of its state."""
    return {_reference_name(name): name for name in task.state_dict()}


def _reference_name(name: str) -> str:
    """Our name → the authors' name."""
    if not name.startswith("backbone.model."):
        return {"mask_token": "encoder.mask_token"}.get(name, name.replace("decoder.", "decoder.0."))
    inner = name.removeprefix("backbone.model.")
    # Swin's downsampling is the end of a stage in their code and the start of the next in timm
    inner = re.sub(r"^layers\.(\d+)\.downsample\.", lambda stage: f"layers.{int(stage[1]) - 1}.downsample.", inner)
    # layer scales of the ViT
    inner = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", inner)
    return f"encoder.{inner}"


def to_own_layout(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Makes the authors' `tensors` fit timm's `model`; names stay those of the authors.

    Raises CheckpointError if a table of relative positions cannot be resampled.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_DROPPED)}
    own = dict(model.named_parameters())
    # join the biases of queries and values into that of one projection, if the model has one; keys have no bias
    for name in [name for name in found if name.endswith("attn.q_bias")]:
        block = name.removesuffix("q_bias")
        if f"{block}qkv.bias".removeprefix("encoder.") in own and f"{block}v_bias" in found:
            query, value = found.pop(name), found.pop(f"{block}v_bias")
            found[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    # copy a shared table of relative positions into each block that has its own
    if _SHARED_TABLE in found and _SHARED_TABLE.removeprefix("encoder.") not in own:
        blocks = [name for name in own if re.fullmatch(rf"blocks\.\d+\.attn\.{_TABLE}", name)]
        if blocks:
            table = found.pop(_SHARED_TABLE)
            found |= {f"encoder.{name}": table for name in blocks}
    # resample position tables to the model's window and grid
    for name in [name for name in found if name.endswith(_TABLE) and name.removeprefix("encoder.") in own]:
        found[name] = _resampled_table(name, found[name], model)
    if "encoder.pos_embed" in found and "pos_embed" in own:
        grid = cast(Any, model).patch_embed.grid_size
        found["encoder.pos_embed"] = resampled_positions(found["encoder.pos_embed"], own["pos_embed"], grid)
    return found


def _resampled_table(name: str, stored: Tensor, model: nn.Module) -> Tensor:
    """Resamples a file's table (positions, heads) to the window of the module that `name` belongs to."""
    module = cast(Any, model.get_submodule(name.removeprefix("encoder.").rpartition(".")[0]))
    own = cast(Tensor, module.relative_position_bias_table)
    window = cast(tuple[int, int], module.window_size)
    if stored.ndim != 2 or stored.shape[1:] != own.shape[1:] or (stored.shape == own.shape and window[0] == window[1]):
        return stored  # if the number of heads differs, `load_mapped` raises with both shapes
    try:
        table: Tensor = resize_rel_pos_bias_table(stored, new_window_size=window, new_bias_shape=tuple(own.shape))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint: {name} of {stored.shape[0]} positions cannot be resampled to windows of {list(window)} "
            f"({first_line(error)}); set backbone.kwargs.window_size to the file's own"
        ) from error
    return table
