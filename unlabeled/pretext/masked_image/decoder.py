"""The transformer decoder of masked autoencoders (MAE, arXiv 2111.06377): visible tokens in, patches out."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.ssl.backbones.masked.masking import Masking


class DecoderBlock(Block):  # type: ignore[misc]
    """timm's pre-norm block, which can leave out the results of leading tokens that nobody reads."""

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) → (B, N - first, D). The `first` leading tokens are keys and values only."""
        if first == 0:
            return super().forward(x)  # type: ignore[no-any-return]
        attention, dim = self.attn, x.shape[-1]
        y = self.norm1(x)
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q = F.linear(y[:, first:], weight[:dim], bias[:dim])
        k, v = F.linear(y, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        q, k, v = (part.view(*part.shape[:2], attention.num_heads, -1).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x[:, first:] + attention.proj(mixed)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TransformerDecoder(nn.Module):
    """Predicts a vector for each patch from the tokens of the visible ones.

    Inside, tokens stand in the order prefix, visible, masked: attention does not mind, and the last block and the
    prediction then run on the masked ones alone, which gives the same numbers as running them on all.
    """

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
        """`in_dim` channels of the encoder, `out_dim` numbers per patch, `grid` (gh, gw) that is usual."""
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
        # Fixed and made again from the grid: not part of checkpoints.
        self.register_buffer("positions", sincos_2d(dim, grid)[0], persistent=False)

    def forward(self, latent: Tensor, masking: Masking) -> Tensor:
        """Encoder tokens (B, P + K, in_dim) → predictions (B, L - K, out_dim) of the patches `ids_masked`."""
        x = self._sequence(latent, masking)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last(x, first=latent.shape[1])
        return self.pred(self.norm(x))  # type: ignore[no-any-return]

    def predict_all(self, latent: Tensor, masking: Masking) -> Tensor:
        """Encoder tokens (B, P + K, in_dim) → predictions of all patches in raster order (B, L, out_dim)."""
        x = self._sequence(latent, masking)
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x))
        return masking.restore(x[:, latent.shape[1] - masking.ids_keep.shape[1] :])

    def _sequence(self, latent: Tensor, masking: Masking) -> Tensor:
        """(B, P + K, in_dim) → (B, P + L, dim): prefix without positions, visible and masked tokens with theirs."""
        prefix = latent.shape[1] - masking.ids_keep.shape[1]
        positions = self._positions(masking.grid)
        visible = self.embed(latent).to(positions.dtype)
        kept = visible[:, prefix:] + F.embedding(masking.ids_keep, positions)
        masked = self.mask_token + F.embedding(masking.ids_masked, positions)
        return torch.cat([visible[:, :prefix], kept, masked], dim=1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        positions = self.positions
        assert isinstance(positions, Tensor)
        return positions if grid == self.grid else sincos_2d(self.dim, grid)[0].to(positions)
