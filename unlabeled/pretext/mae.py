"""MAE: a transformer sees a quarter of the patches, a small decoder predicts the pixels of the rest.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377;
code of the authors: github.com/facebookresearch/mae. Shapes as in `unlabeled.pretext.base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.utils import make_grid

from unlabeled.pretext.base import Batch, PretextTask, StepOutput, TaskConfig, Views
from unlabeled.pretext.common.checkpoint import load_mapped, require_fixed_table, resampled_positions
from unlabeled.pretext.common.decoder import TransformerDecoder
from unlabeled.pretext.common.masking import CountRule, Masking, count_keep, random_masking
from unlabeled.pretext.common.patches import normalize_patches, patch_statistics, patchify, unpatchify, widened
from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.ssl.backbone import Backbone
from unlabeled.ssl.errors import ConfigError
from unlabeled.ssl.tokens import TokenEncoder

_PICTURES = 8
"""Rows of a visualisation."""


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


class MAEConfig(TaskConfig):
    """Settings of MAE; the defaults are the paper's."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Part of the patches that is hidden."""
    mask_count: CountRule = "exact"
    """How the number of visible patches is rounded down; see `count_keep`. official: as the authors' code does."""
    norm_pix: bool = True
    """Predict each patch normalised by its own mean and deviation; False: the pixels of the normalised picture."""
    decoder: DecoderConfig = DecoderConfig()
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    """Part of the picture's area that a crop covers, smallest and largest."""
    positions: Literal["sincos", "backbone"] = "sincos"
    """sincos: the backbone's table of absolute positions becomes the paper's fixed sine-cosine table and is not
    trained. backbone: it is trained as the backbone has it. A backbone without such a table (rotary positions only)
    keeps its own either way; the decoder's positions are always the fixed table."""
    init: Literal["auto", "mae", "keep"] = "auto"
    """mae: weights of the backbone are drawn anew as in the paper. keep: they and the positions stay as they are, and
    only the decoder is drawn. auto: keep for a backbone that starts from trained weights, else mae."""

    @model_validator(mode="after")
    def _ordered(self) -> MAEConfig:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)} begins above its end; give [smallest, largest]")
        return self


class MAEViews:
    """One random crop with a flip: picture, uint8 (3, H, W) → ``{"image": uint8 (3, h, w)}``."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        self.crop = v2.RandomResizedCrop(list(size), scale=scale, interpolation=bicubic, antialias=True)
        self.flip = v2.RandomHorizontalFlip(0.5)

    def __call__(self, picture: Tensor) -> dict[str, Tensor]:
        return {"image": self.flip(self.crop(picture))}


class MAE(PretextTask):
    """Masked autoencoder. Submodules: `backbone` (the encoder) and `decoder`."""

    Config: ClassVar[type[TaskConfig]] = MAEConfig
    requires: ClassVar[frozenset[str]] = frozenset({"token_dropping"})
    config: MAEConfig

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone that cannot drop tokens, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        encoder = TokenEncoder(backbone)
        grid = encoder.grid(backbone.input_size)
        self._keep(grid)
        self.patch = encoder.patch_size
        self.decoder = TransformerDecoder(
            encoder.dim, self.patch[0] * self.patch[1] * encoder.channels, grid=grid, **config.decoder.model_dump()
        )
        _init_weights(self.decoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        anew = config.init == "mae" or (config.init == "auto" and not backbone.trained)
        if anew:
            _init_encoder(backbone.model)
        self._settle_positions(overwrite=anew)
        for parameter in encoder.unreached():
            parameter.requires_grad_(False)

    @classmethod
    def views(cls, config: MAEConfig, backbone: Backbone) -> Views:
        return MAEViews(backbone.input_size, config.crop_scale)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, L), uniform in [0, 1): the patches with the smallest stay visible."""
        images = batch["image"]
        rows, columns = TokenEncoder(self.backbone).grid((images.shape[-2], images.shape[-1]))
        return {"noise": torch.rand(images.shape[0], rows * columns, device=images.device)}

    def forward(self, batch: Batch, *, noise: Tensor | None = None) -> StepOutput:
        """Mean squared error of the hidden patches of ``batch["image"]``, and the part of their variance explained.

        A uint8 picture (B, 3, H, W) is normalised here; a float one is taken as normalised already. `noise` (B, L)
        decides the masks (see `random_masking`); None: as `draw` gives it.
        """
        images = self._images(batch)
        masking, grid = self._mask(images, noise)
        latent, _ = TokenEncoder(self.backbone).encode(images, masking.ids_keep)
        predictions = self.decoder(latent, masking, grid)
        target = self.target(images, masking.ids_masked)
        loss = (predictions.to(target.dtype) - target).square().mean()
        return StepOutput(loss, {"explained": 1 - loss.detach() / (target.square().mean() + 1e-6)})

    @torch.no_grad()
    def visualize(self, batch: Batch, *, noise: Tensor | None = None) -> dict[str, Tensor]:
        """``reconstruction``: a row per picture (the first 8): original, masked, reconstruction; uint8 (3, H, W).

        Predictions stand at hidden patches only; with `norm_pix` they get back the true statistics of their patch.
        """
        images = self._images(batch)[:_PICTURES]
        masking, grid = self._mask(images, None if noise is None else noise[:_PICTURES])
        latent, _ = TokenEncoder(self.backbone).encode(images, masking.ids_keep)
        patches = patchify(images, self.patch)
        predictions = self.decoder.predict_all(latent, masking, grid).to(patches.dtype)
        if self.config.norm_pix:
            mean, deviation = patch_statistics(patches)
            predictions = predictions * deviation + mean
        visible = masking.visible[..., None]
        columns = [
            images,
            unpatchify(torch.where(visible, patches, 0.0), self.patch, grid),
            unpatchify(torch.where(visible, patches, predictions), self.patch, grid),
        ]
        tiles = torch.stack(columns, dim=1).flatten(0, 1)  # (3 B, C, H, W), row by row
        return {
            "reconstruction": make_grid(_to_uint8(tiles, self.backbone), nrow=len(columns), padding=2, pad_value=255)
        }

    def load_official(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads ``mae_pretrain_vit_*`` (encoder) or ``*_full`` and ``mae_visualize_*`` files (with decoder).

        Takes the dictionary of tensors or the file's ``{"model": ...}``. A table of positions of another grid becomes
        this grid's: made anew where it is the fixed table, resampled bicubically where it is not. Returns
        (missing, unexpected) names of the file's layout; without a decoder in the file its names are all missing.

        Raises CheckpointError, before anything is changed, when a tensor has another shape or none fits.
        """
        tensors = cast(Mapping[str, Tensor], state.get("model", state))
        names = {_official_name(name): name for name in self.state_dict()}
        changed = dict(tensors)
        encoder = TokenEncoder(self.backbone)
        if "pos_embed" in tensors and encoder.absolute is not None:
            changed["pos_embed"] = resampled_positions(tensors["pos_embed"], encoder.absolute, encoder.absolute_grid)
        if "decoder_pos_embed" in tensors:
            require_fixed_table("decoder_pos_embed", changed.pop("decoder_pos_embed"))
        result = load_mapped(self, changed, names)
        self._settle_positions(overwrite=False)
        return result

    def _images(self, batch: Batch) -> Tensor:
        """Normalised (B, 3, H, W); float pictures are taken as normalised already."""
        images = batch["image"]
        return images if images.is_floating_point() else self.backbone.normalize(images)

    def _mask(self, images: Tensor, noise: Tensor | None) -> tuple[Masking, tuple[int, int]]:
        grid = TokenEncoder(self.backbone).grid((images.shape[-2], images.shape[-1]))
        noise = self.draw({"image": images})["noise"] if noise is None else noise
        return random_masking(noise, self._keep(grid)), grid

    def _keep(self, grid: tuple[int, int]) -> int:
        patches, config = grid[0] * grid[1], self.config
        keep = count_keep(patches, config.mask_ratio, config.mask_count)
        if not 0 < keep < patches:
            raise ConfigError(
                f"task.mask_ratio: {config.mask_ratio} leaves {keep} of {grid[0]}x{grid[1]} patches visible; "
                f"set it between {1 / patches:.2g} and {1 - 1 / patches:.2g}, or use more pixels or smaller patches"
            )
        return keep

    def target(self, images: Tensor, ids: Tensor) -> Tensor:
        """What is to be predicted for the patches `ids` (B, M): at least float32 (B, M, ph * pw * C)."""
        patches = patchify(images, self.patch, ids)
        return normalize_patches(patches) if self.config.norm_pix else widened(patches)

    def _settle_positions(self, *, overwrite: bool) -> None:
        """Sets the fixed table if asked to, and trains absolute positions unless they are that table."""
        encoder = TokenEncoder(self.backbone)
        absolute = encoder.absolute
        if absolute is None or self.config.positions == "backbone":
            return
        dim, grid = absolute.shape[-1], encoder.absolute_grid
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


def _init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices with biases of 0, as section A.1 of the paper says; norms stay as they were built."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _init_encoder(model: nn.Module) -> None:
    """The same for the encoder; its patch projection is a matrix in the shape of a convolution."""
    _init_weights(model)
    projection = cast(Any, model).patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.data.view(projection.shape[0], -1))
    for name, parameter in model.named_parameters():
        if name in {"cls_token", "reg_token", "dist_token"}:
            nn.init.normal_(parameter, std=0.02)


def _official_name(name: str) -> str:
    """Name of one of this task's tensors in the authors' files."""
    if name.startswith("decoder."):
        return "mask_token" if name == "decoder.mask_token" else "decoder_" + name.removeprefix("decoder.")
    return name.removeprefix("backbone.model.")


def _to_uint8(images: Tensor, backbone: Backbone) -> Tensor:
    """Normalised pictures (B, C, H, W) → uint8 of the same shape."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
