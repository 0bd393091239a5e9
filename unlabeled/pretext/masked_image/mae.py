"""MAE: a transformer encodes a quarter of the patches, and a small decoder predicts the pixels of the others.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377;
code of the authors: github.com/facebookresearch/mae. Shapes as in `unlabeled.ssl.task`; P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.masked_image.autoencoder import (
    AutoencoderConfig,
    PositionTable,
    init_linear,
    load_autoencoder,
    names_of_fixed,
    reinitializes,
    settle_positions,
)
from unlabeled.pretext.masked_image.masked_image import MaskedImageTask, cell_images, cell_targets, squared_error
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig


class MAEConfig(AutoencoderConfig):
    """Settings of MAE; the defaults are the paper's."""


class MAE(MaskedImageTask):
    """Encodes a quarter of the patches and reconstructs the pixels of the rest.

    Submodules: `backbone` (the encoder) and `decoder`.

    `load_reference` takes ``mae_pretrain_vit_*`` files (encoder) and ``*_full`` and ``mae_visualize_*`` files (with
    decoder).
    """

    Config: ClassVar[type[TaskConfig]] = MAEConfig
    paper = Paper("Masked Autoencoders Are Scalable Vision Learners", 2022, "https://arxiv.org/abs/2111.06377")
    good_for = (
        "vision transformers that you will fine-tune; one of the cheapest steps, since masked patches are not encoded"
    )
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "adamw",
            "lr": 1.5e-4,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 40},
    }
    """Masked autoencoder (He et al., CVPR 2022, arXiv 2111.06377): the published recipe."""
    requires: ClassVar[frozenset[str]] = frozenset({"token_dropping"})
    method: ClassVar[Method] = "mae"
    config: MAEConfig

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone that cannot drop tokens, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        encoder = TokenEncoder(backbone)
        grid = encoder.grid(backbone.input_size)
        self.cell = encoder.patch_size
        self.keep(grid)  # raises for a ratio that masks all patches or none
        values = self.cell[0] * self.cell[1] * encoder.channels
        self.decoder = TransformerDecoder(encoder.dim, values, grid=grid, **config.decoder.model_dump())
        reinitialize = reinitializes(config, backbone)
        if reinitialize:
            _init_encoder(encoder)
        settle_positions(config, backbone, self.positions(), reinitialize=reinitialize)
        for parameter in encoder.unreached():
            parameter.requires_grad_(False)

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean squared error on the masked patches of ``batch["image"]``; logs ``explained`` (see `squared_error`).

        A uint8 image (B, 3, H, W) is normalized; a float image is expected to be normalized already. `noise` (B, L) or
        `visible` (bool, B, gh, gw) determines the masks; if both are None, they are drawn.
        """
        # choose which patches to mask
        images = self.images_of(batch)  # (B, 3, H, W)
        masking = self.mask(images, noise, visible)  # K of L patches stay visible
        # encode the visible patches, predict the masked ones
        latent = self.encode(images, masking)  # (B, P + K, D)
        predictions = self.decoder(latent, masking)  # (B, L - K, ph * pw * 3)
        # compare with the pixels of the masked patches
        targets = cell_targets(images, self.cell, masking.ids_masked, norm_pix=self.config.norm_pix)
        return squared_error(predictions, targets)

    def encode(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, 3, H, W) → tokens of the prefix and the visible patches (B, P + K, D), after the last norm."""
        # not ``backbone(images)``: masked patches are dropped before the first block, so they cost nothing
        return TokenEncoder(self.backbone).encode(images, masking.ids_keep)[0]

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        predictions = self.decoder.predict_all(self.encode(images, masking), masking)  # (B, L, ph * pw * 3)
        return cell_images(predictions, images, self.cell, masking.grid, norm_pix=self.config.norm_pix)

    def positions(self) -> PositionTable | None:
        """The backbone's table of absolute position embeddings; None if it has none."""
        encoder = TokenEncoder(self.backbone)
        return None if encoder.absolute is None else PositionTable(encoder.absolute, encoder.absolute_grid)

    def fixed(self) -> set[str]:
        """See the base class: the position table, if it is the fixed one."""
        return names_of_fixed(self.backbone, self.positions())

    def require_size(self, size: tuple[int, int]) -> None:
        TokenEncoder(self.backbone).grid(size)  # raises for sizes that the backbone cannot split into patches
        super().require_size(size)

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """See the class and `load_autoencoder`."""
        found = load_autoencoder(self, state, self.positions(), file_prefix=1)  # one entry for the class token
        # the file's table may be the fixed one or a trained one: freeze or train it accordingly
        settle_positions(self.config, self.backbone, self.positions(), reinitialize=False)
        return found


class TransformerDecoder(nn.Module):
    """Predicts the pixels of the masked patches from the encoder's tokens of the visible ones."""

    # tokens are in the order prefix, visible, masked: attention does not depend on it, and the last block and the
    # prediction can then run on the masked tokens alone, with the same results

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        grid: tuple[int, int],
    ) -> None:
        """`in_dim`: channels of the encoder; `out_dim`: values to predict per patch; `grid`: the usual (gh, gw)."""
        super().__init__()
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.dim = dim
        self.grid = grid
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, out_dim)
        # not in checkpoints, because it is computed from the grid
        self.register_buffer("positions", sincos_2d(dim, grid)[0], persistent=False)
        init_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, masking: Masking) -> Tensor:
        """Encoder tokens (B, P + K, in_dim) → predictions (B, L - K, out_dim) of the patches `ids_masked`."""
        x = self._filled(latent, masking)  # (B, P + L, dim): prefix, visible, masked
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        # visible patches are not predicted, so the last block needs them as keys and values only
        x = last(x, first=latent.shape[1])  # (B, L - K, dim)
        return self.pred(self.norm(x))  # type: ignore[no-any-return]

    def predict_all(self, latent: Tensor, masking: Masking) -> Tensor:
        """Encoder tokens (B, P + K, in_dim) → predictions of all patches in raster order (B, L, out_dim)."""
        # for `visualize`; training predicts the masked patches only
        x = self._filled(latent, masking)
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x))
        return masking.restore(x[:, latent.shape[1] - masking.ids_keep.shape[1] :])

    def _filled(self, latent: Tensor, masking: Masking) -> Tensor:
        """(B, P + K, in_dim) → (B, P + L, dim): prefix, visible and masked tokens; all but prefix with positions."""
        prefix = latent.shape[1] - masking.ids_keep.shape[1]
        positions = cast(Tensor, self.positions)  # (L, dim)
        if masking.grid != self.grid:  # images of another size, from a curriculum
            positions = sincos_2d(self.dim, masking.grid)[0].to(positions)
        visible = self.embed(latent).to(positions.dtype)  # autocast returns half precision, positions are float32
        kept = visible[:, prefix:] + F.embedding(masking.ids_keep, positions)  # (B, K, dim)
        masked = self.mask_token + F.embedding(masking.ids_masked, positions)  # (B, L - K, dim)
        return torch.cat([visible[:, :prefix], kept, masked], dim=1)


class DecoderBlock(Block):  # type: ignore[misc]
    """timm's pre-norm block, with the option to compute no output for leading tokens."""

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) → (B, N - first, D). The `first` leading tokens serve as keys and values only."""
        if first == 0:
            return super().forward(x)  # type: ignore[no-any-return]
        attention, dim = self.attn, x.shape[-1]
        y = self.norm1(x)
        # split the joint projection: queries of the last tokens, keys and values of all
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q = F.linear(y[:, first:], weight[:dim], bias[:dim])  # (B, N - first, D)
        k, v = F.linear(y, weight[dim:], bias[dim:]).chunk(2, dim=-1)  # (B, N, D) each
        q, k, v = (one.view(*one.shape[:2], attention.num_heads, -1).transpose(1, 2) for one in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x[:, first:] + attention.proj(mixed)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _init_encoder(encoder: TokenEncoder) -> None:
    """Draws matrices as in the decoder, and class and register tokens from a normal distribution of deviation 0.02."""
    model = encoder.backbone.model
    init_linear(model)
    # the patch projection is stored as a convolution but initialized as a matrix
    nn.init.xavier_uniform_(encoder.projection.data.view(encoder.projection.shape[0], -1))
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in {"cls_token", "reg_token", "dist_token"}:
            nn.init.normal_(parameter, std=0.02)
    for layer in model.modules():
        if hasattr(layer, "local_init"):  # ConViT's heads start as convolutions by design: restore that
            cast(Any, layer).local_init()
