"""What the masked autoencoders share: a transformer decoder that predicts the pixels of hidden cells, and their loss.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377;
code of the authors: github.com/facebookresearch/mae. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unlabeled.pretext.common.checkpoint import load_mapped, require_fixed_table, resampled_positions
from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.decoder import TransformerDecoder
from unlabeled.pretext.masked_image.masked_image import CellRegression, MaskedImageConfig
from unlabeled.ssl.backbones.masked.masking import Masking
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import Batch, StepOutput, TaskConfig


class DecoderConfig(TaskConfig):
    """The decoder, thrown away after pretraining. Source of the defaults: section 4.1 of the paper."""

    dim: int = Field(512, ge=4)
    """Channels."""
    depth: int = Field(8, ge=1)
    """Blocks. Fewer are faster and cost little after fine-tuning, but much in a linear probe (table 1a)."""
    heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> DecoderConfig:
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is no multiple of 4, as its positions need; set dim={self.dim // 4 * 4}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}; change one of them")
        return self


class AutoencoderConfig(MaskedImageConfig):
    """Settings of a masked autoencoder; the defaults are the paper's."""

    norm_pix: bool = True
    """Predict each patch normalised by its own mean and deviation; False: the pixels of the normalised picture."""
    decoder: DecoderConfig = DecoderConfig()
    positions: Literal["sincos", "backbone"] = "sincos"
    """sincos: the backbone's table of absolute positions becomes the paper's fixed sine-cosine table and is not
    trained. backbone: it is trained as the backbone has it. A backbone without such a table (rotary positions only)
    keeps its own either way, and so do relative positions and tables that are resampled or finer than a patch; the
    decoder's positions are always the fixed table."""
    init: Literal["auto", "mae", "keep"] = "auto"
    """mae: weights of the backbone are drawn anew as in the paper. keep: they and the positions stay as they are, and
    only the decoder is drawn. auto: keep for a backbone that starts from trained weights, else mae."""


class MaskedAutoencoder(CellRegression):
    """Encodes visible cells and decodes hidden ones. A subclass builds its `decoder` and implements `latent`."""

    Config: ClassVar[type[TaskConfig]] = AutoencoderConfig
    official_prefix: ClassVar[int] = 1
    """Entries before those of the cells in the position tables of the authors' files."""
    config: AutoencoderConfig
    decoder: TransformerDecoder

    def latent(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalised (B, C, H, W) and its mask → tokens of the visible cells, (B, P + K, D), after the last norm."""
        raise NotImplementedError

    def absolute(self) -> tuple[nn.Parameter, tuple[int, int]] | None:
        """The backbone's table of absolute positions, (1, P + L, D), and its grid; None where it has none."""
        raise NotImplementedError

    def fixed(self) -> set[str]:
        """The table of positions, where it is the fixed one."""
        found = self.absolute()
        named = self.backbone.named_parameters()
        return {name for name, one in named if found is not None and one is found[0] and not one.requires_grad}

    @property
    def anew(self) -> bool:
        """Whether the backbone's weights are drawn here."""
        return self.config.init == "mae" or (self.config.init == "auto" and not self.backbone.trained)

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean squared error of the hidden patches of ``batch["image"]``, and the part of their variance explained.

        A uint8 picture (B, 3, H, W) is normalised here; a float one is taken as normalised already. `noise` (B, L) or
        `visible` (bool, B, gh, gw) decides the masks; None: as `draw` gives it.
        """
        images = self.images_of(batch)
        masking = self.mask(images, noise, visible)
        predictions = self.decoder(self.latent(images, masking), masking)
        return self.score(predictions, images, masking)

    @property
    def norm_pix(self) -> bool:
        return self.config.norm_pix

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        return self.pictures_of(self.decoder.predict_all(self.latent(images, masking), masking), images, masking)

    def load_official(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads the authors' files, with or without a decoder in them.

        Takes the dictionary of tensors or the file's ``{"model": ...}``. A table of positions of another grid becomes
        this grid's: made anew where it is the fixed table, resampled bicubically where it is not. Returns
        (missing, unexpected) names of the file's layout; without a decoder in the file its names are all missing.

        Raises CheckpointError, before anything is changed, when a tensor has another shape or none fits.
        """
        tensors = cast(Mapping[str, Tensor], state.get("model", state))
        names = {_official_name(name): name for name in self.state_dict()}
        changed = dict(tensors)
        absolute, prefix = self.absolute(), self.official_prefix
        if "pos_embed" in tensors and absolute is not None:
            changed["pos_embed"] = resampled_positions(tensors["pos_embed"], *absolute, file_prefix=prefix)
        if "decoder_pos_embed" in tensors:
            require_fixed_table("decoder_pos_embed", changed.pop("decoder_pos_embed"), file_prefix=prefix)
        result = load_mapped(self, changed, names)
        self._settle_positions(overwrite=False)
        return result

    def _build_decoder(self, dim: int, channels: int, grid: tuple[int, int]) -> None:
        """`dim` channels of a token, `channels` of a picture, `grid` of the usual picture."""
        values = self.cell[0] * self.cell[1] * channels
        self.decoder = TransformerDecoder(dim, values, grid=grid, **self.config.decoder.model_dump())
        init_linear(self.decoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def _settle_positions(self, *, overwrite: bool) -> None:
        """Sets the fixed table if asked to, and trains absolute positions unless they are that table."""
        found = self.absolute()
        if found is None or self.config.positions == "backbone":
            return
        absolute, grid = found
        dim = absolute.shape[-1]
        if dim % 4 and not overwrite:
            return
        if dim % 4:
            raise ConfigError(
                f"task.positions: sincos needs a width that is a multiple of 4, {self.backbone.name} has {dim}; "
                "set task.positions=backbone"
            )
        table = sincos_2d(dim, grid, absolute.shape[1] - grid[0] * grid[1]).to(absolute)
        if overwrite:
            absolute.data.copy_(table)
        absolute.requires_grad_(not (overwrite or torch.allclose(absolute.detach(), table, atol=1e-4)))


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform matrices with biases of 0, as section A.1 of the paper says; norms stay as they were built."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_projection(convolution: nn.Conv2d) -> None:
    """The same for a patch projection, a matrix in the shape of a convolution; its bias stays as it was built."""
    nn.init.xavier_uniform_(convolution.weight.data.view(convolution.out_channels, -1))


def _official_name(name: str) -> str:
    """Name of one of a task's tensors in the authors' files."""
    if name.startswith("decoder."):
        return "mask_token" if name == "decoder.mask_token" else "decoder_" + name.removeprefix("decoder.")
    return name.removeprefix("backbone.model.")
