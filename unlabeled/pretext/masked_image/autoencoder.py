"""Code that MAE and ConvMAE share: settings, initial weights, position tables, reference checkpoints.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377;
code of the authors: github.com/facebookresearch/mae. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unlabeled.pretext.common.checkpoint import load_mapped, require_fixed_table, resampled_positions
from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.masked_image import MaskedImageConfig
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import TaskConfig


class TransformerDecoderConfig(TaskConfig):
    """The decoder, which is discarded after pretraining; the defaults are those of section 4.1 of the paper."""

    dim: int = Field(512, ge=4)
    """Width of the decoder. [channels]"""
    depth: int = Field(8, ge=1)
    """Transformer blocks. Fewer are faster and hardly matter for fine-tuning, but cost accuracy in a linear probe
    (table 1a). [blocks]"""
    heads: int = Field(16, ge=1)
    """Attention heads of each block; they must divide `dim`. [heads]"""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of the hidden layer of each block's MLP, as a multiple of `dim`."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the decoder's layer norms."""

    @model_validator(mode="after")
    def _divides(self) -> TransformerDecoderConfig:
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is no multiple of 4, as its positions need; set dim={self.dim // 4 * 4}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}; change one of them")
        return self


class AutoencoderConfig(MaskedImageConfig):
    """Settings of a masked autoencoder; the defaults are the paper's."""

    norm_pix: bool = True
    """Predict each patch after normalizing it by its own mean and deviation; false: predict the pixels of the
    normalized image."""
    decoder: TransformerDecoderConfig = TransformerDecoderConfig()
    """The decoder, which is discarded after pretraining."""
    positions: Literal["sincos", "backbone"] = "sincos"
    """Position embeddings of the backbone. sincos: replace its table of absolute positions by the paper's fixed
    sine-cosine table. backbone: train its own. Relative and rotary positions, and tables that are resampled or finer
    than a patch, always stay as they are; the decoder always uses the fixed table."""
    init: Literal["auto", "mae", "keep"] = "auto"
    """Initial weights. mae: redraw the backbone as in the paper. keep: leave the backbone and its positions as they
    are, and draw only the decoder. auto: keep if the backbone starts from trained weights, else mae."""


class PositionTable(NamedTuple):
    """A backbone's table of absolute position embeddings."""

    values: nn.Parameter
    """(1, P + L, D): P entries before those of the L patches."""
    grid: tuple[int, int]
    """The grid (gh, gw) of the patches."""


def reinitializes(config: AutoencoderConfig, backbone: Backbone) -> bool:
    """Whether the task draws the initial weights of the backbone."""
    return config.init == "mae" or (config.init == "auto" and not backbone.trained)


def settle_positions(
    config: AutoencoderConfig, backbone: Backbone, table: PositionTable | None, *, reinitialize: bool
) -> None:
    """Writes the fixed sine-cosine table into `table` if `reinitialize`, and freezes `table` if it is the fixed one.

    Raises ConfigError for a width that the fixed table cannot have.
    """
    if table is None or config.positions == "backbone":
        return
    values, (rows, columns) = table
    dim = values.shape[-1]
    if dim % 4 and not reinitialize:  # cannot be the fixed table, so it is trained
        return
    if dim % 4:
        raise ConfigError(
            f"task.positions: sincos needs a width that is a multiple of 4, {backbone.name} has {dim}; "
            "set task.positions=backbone"
        )
    fixed = sincos_2d(dim, table.grid, values.shape[1] - rows * columns).to(values)
    if reinitialize:
        values.data.copy_(fixed)
    # a table that came with trained weights may be the fixed one too, and then stays fixed
    values.requires_grad_(not (reinitialize or torch.allclose(values.detach(), fixed, atol=1e-4)))


def names_of_fixed(backbone: Backbone, table: PositionTable | None) -> set[str]:
    """Name of the position table, relative to `backbone`, if it is fixed; else the empty set."""
    named = backbone.named_parameters()
    return {name for name, one in named if table is not None and one is table.values and not one.requires_grad}


def load_autoencoder(
    task: nn.Module, state: Mapping[str, Tensor], table: PositionTable | None, *, file_prefix: int
) -> tuple[list[str], list[str]]:
    """Loads a reference checkpoint into `task`, with or without a decoder in it.

    Takes the dictionary of tensors or the file's ``{"model": ...}``. A position table of another grid is recomputed if
    it is the fixed table, else resampled bicubically; in the file's tables, `file_prefix` entries precede those of the
    patches. Returns (missing, unexpected) names as in the file; if it has no decoder, the decoder's names are missing.

    Raises CheckpointError if a shape differs or no tensor fits; nothing is changed in that case.
    """
    tensors = cast(Mapping[str, Tensor], state.get("model", state))
    names = {_reference_name(name): name for name in task.state_dict()}
    changed = dict(tensors)
    if "pos_embed" in tensors and table is not None:
        changed["pos_embed"] = resampled_positions(tensors["pos_embed"], *table, file_prefix=file_prefix)
    if "decoder_pos_embed" in tensors:  # our decoder computes its table from the grid, so there is nothing to load
        require_fixed_table("decoder_pos_embed", changed.pop("decoder_pos_embed"), file_prefix=file_prefix)
    return load_mapped(task, changed, names)


def init_linear(module: nn.Module) -> None:
    """Draws the weights of all linear layers Xavier-uniformly with biases of 0 (section A.1 of the paper)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_projection(convolution: nn.Conv2d) -> None:
    """Draws the weight of a patch projection Xavier-uniformly; its bias keeps its initial value."""
    # the fan-in and fan-out are those of the matrix that the convolution stands for, not of a convolution
    nn.init.xavier_uniform_(convolution.weight.data.view(convolution.out_channels, -1))


def _reference_name(name: str) -> str:
    """Our name of a tensor → its name in the authors' files."""
    if name.startswith("decoder."):
        return "mask_token" if name == "decoder.mask_token" else "decoder_" + name.removeprefix("decoder.")
    return name.removeprefix("backbone.model.")
