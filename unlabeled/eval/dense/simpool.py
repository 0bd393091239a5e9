"""SimPool: attention pooling with the mean feature as query (Psomas et al., ICCV 2023, arXiv 2309.06891).

Shapes: B images, N positions, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPS = 1e-6


class SimPool(nn.Module):
    """Attention pooling in place of a class token: one head, without a value or an output projection.

    With u the mean over the positions of x and v = LayerNorm(x): a = softmax(W_q u · W_k v / sqrt(D)), and the result
    is (a · (v - min v + 1e-6)^gamma)^(1/gamma), elementwise, or a · v without `gamma`. The paper uses gamma 1.25 for
    transformers and 2 for ConvNets.

    The minimum is computed for each image, so the result for an image does not depend on its batch. The authors'
    implementation (github.com/billpsomas/simpool) uses the minimum of the batch; `reference=True` does the same.
    """

    def __init__(
        self, dim: int, *, gamma: float | None = 1.25, learned_beta: bool = False, reference: bool = False
    ) -> None:
        """`learned_beta` adds a trained scalar, initially 0, to `gamma`, which must then be given."""
        super().__init__()
        if learned_beta and gamma is None:
            raise ValueError("learned_beta: has no effect without gamma; give gamma, such as 1.25")
        self.dim, self.gamma, self.reference = dim, gamma, reference
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.beta = nn.Parameter(torch.zeros(())) if learned_beta else None

    @classmethod
    def untrained(cls, dim: int) -> SimPool:
        """SimPool with identity projections and a plain norm: attention by similarity to the mean, nothing trained."""
        with torch.random.fork_rng(devices=[]):  # the layers draw weights that are replaced below
            pool = cls(dim, gamma=None)
        nn.init.eye_(pool.query.weight)
        nn.init.eye_(pool.key.weight)
        return pool.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) without prefix tokens, or a map (B, D, H, W) → (B, D)."""
        positions = _positions(x)
        values = self.norm(positions)
        weights = self._weights(positions, values).unsqueeze(1)  # (B, 1, N)
        if self.gamma is None:
            return torch.squeeze(weights @ values, 1)
        with torch.autocast(x.device.type, enabled=False):  # powers of values near 1e-6 need float32
            values = values.float()
            # a power of a negative value is undefined: shift all values above 0
            least = values.amin() if self.reference else values.amin(dim=(1, 2), keepdim=True)
            power = self.gamma if self.beta is None else self.gamma + self.beta
            mixed: Tensor = weights.float() @ (values - least + _EPS).pow(power)
            return mixed.pow(1 / power).squeeze(1)

    def attention(self, x: Tensor) -> Tensor:
        """Attention weight of each position, (B, N), or (B, H, W) for a map; they sum to 1 for each image."""
        positions = _positions(x)
        weights = self._weights(positions, self.norm(positions))
        return weights.view(-1, *x.shape[2:]) if x.ndim == 4 else weights

    def _weights(self, positions: Tensor, values: Tensor) -> Tensor:
        query = self.query(positions.mean(dim=1, keepdim=True))  # (B, 1, D)
        logits: Tensor = (query @ self.key(values).transpose(1, 2)).squeeze(1) * self.dim**-0.5
        return logits.softmax(dim=1)


def _positions(x: Tensor) -> Tensor:
    """A map (B, D, H, W) as tokens (B, N, D); tokens are returned unchanged."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
