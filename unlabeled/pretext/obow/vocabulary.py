"""Visual words: a queue of teacher features, what an image says in them, and the classifier made of them.

Source: sections 3.1 and 3.2 of the paper and valeoai/obow. The codes of P places over K words would be the largest
tensor of a step, so they are made for a few images at a time, and never leave log space before they are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.pretext.common.precision import widened
from unlabeled.ssl.core.distributed import gather_across_ranks, rank, sum_over_ranks, world_size
from unlabeled.ssl.nn.batch_norm import SyncedBatchNorm1d

Pool = Literal["max", "mean"]
Source = Literal["local", "cell", "map"]

_STRIPPED = 5
"""Places along the shorter side from which on a map loses its border, where padding shows."""
_WINDOW = 3
"""Places along each side of the average that becomes a word."""


def inner_map(maps: Tensor) -> Tensor:
    """(B, C, H, W) → without one place on each side; as it is where fewer than 5 would be cut down."""
    return maps[:, :, 1:-1, 1:-1] if min(maps.shape[-2:]) >= _STRIPPED else maps


def window_of(maps: Tensor, source: Source) -> tuple[int, int]:
    """Places (rows, columns) of `maps` (B, C, H, W) that are averaged into a word."""
    height, width = maps.shape[-2:]
    if source == "map":
        return height, width
    side = _WINDOW if source == "local" and min(height, width) >= _WINDOW else 1
    return side, side


def pick_words(maps: Tensor, where: Tensor, window: tuple[int, int]) -> Tensor:
    """One local average of each map (B, C, H, W) → (B, C), at least float32.

    `where` (B,) in [0, 1) runs over all positions of the window in raster order. Only that window is averaged.
    """
    (height, width), device = maps.shape[-2:], maps.device
    rows, columns = height - window[0] + 1, width - window[1] + 1
    position = _positions(where, rows * columns)
    corner = position // columns * width + position % columns
    inside = torch.arange(window[0], device=device)[:, None] * width + torch.arange(window[1], device=device)
    index = corner[:, None] + inside.flatten()  # (B, window)
    taken = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1))
    return widened(taken).mean(-1)


def seed_words(maps: Tensor, where: Tensor, window: tuple[int, int], each: int) -> Tensor:
    """Many words out of the maps (B, C, H, W) of one batch: `each` local averages of every image (B * each, C),
    image by image, evenly spaced from `where` (B,) on; they repeat where a map has too few."""
    pooled = F.avg_pool2d(widened(maps), window, stride=1).flatten(2)  # (B, C, positions)
    steps = torch.arange(each, device=maps.device, dtype=where.dtype) / each
    position = _positions((where[:, None] + steps) % 1, pooled.shape[-1])  # (B, each)
    rows = pooled.gather(2, position[:, None].expand(-1, pooled.shape[1], -1)).transpose(1, 2)
    return rows.flatten(0, 1)


def _positions(where: Tensor, count: int) -> Tensor:
    """[0, 1) → integers in [0, count)."""
    return (where * count).long().clamp(max=count - 1)


def squared_distances(cells: Tensor, words: Tensor) -> Tensor:
    """Places (B, P, C) and words (K, C) → ||c - v||^2, (B, P, K), in the type of the words, outside autocast."""
    flat = cells.to(words.dtype).flatten(0, 1)
    with torch.autocast(words.device.type, enabled=False):
        crossed = torch.addmm(words.square().sum(1), flat, words.t(), alpha=-2)
    return crossed.add_(flat.square().sum(1, keepdim=True)).view(*cells.shape[:2], -1)


class Distances:
    """Squared distances of all places to all words, a few images at a time.

    Held when they fit into `memory` bytes at once, else computed anew in each of the two passes that need them.
    """

    def __init__(self, cells: Tensor, words: Tensor, memory: int) -> None:
        """Places (B, P, C) and words (K, C)."""
        per_image = cells.shape[1] * words.shape[0] * words.element_size()
        self.words = words
        self.parts = torch.split(cells, max(memory // per_image, 1))
        self._held = squared_distances(cells, words) if len(self.parts) == 1 else None

    def __iter__(self) -> Iterator[Tensor]:
        """(b, P, K) each."""
        for part in self.parts:
            yield squared_distances(part, self.words) if self._held is None else self._held

    def mean_nearest(self) -> Tensor:
        """Scalar: the mean over places and images of the distance to the nearest word, of this rank."""
        return torch.cat([one.amin(-1) for one in self]).mean()

    def bags(self, sharpness: Tensor | None, pool: Pool) -> Tensor:
        """(B, K), rows sum to 1: codes, softmax over words of -sharpness * distance, pooled over places.

        `sharpness` None: each place has its nearest word only.
        """
        pooled = [_hard_bags(one, pool) if sharpness is None else _log_bags(one, sharpness, pool) for one in self]
        return torch.cat(pooled).softmax(-1)


def _log_bags(distances: Tensor, sharpness: Tensor, pool: Pool) -> Tensor:
    """Distances (b, P, K) → log of the pooled codes (b, K)."""
    scores = distances * -sharpness
    scores -= scores.logsumexp(-1, keepdim=True)
    return scores.amax(1) if pool == "max" else scores.logsumexp(1)


def _hard_bags(distances: Tensor, pool: Pool) -> Tensor:
    """As `_log_bags`, up to a constant, for codes of one word."""
    nearest = distances.argmin(-1)
    counts = distances.new_zeros(len(distances), distances.shape[-1])
    counts.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=counts.dtype))
    return (counts.clamp(max=1) if pool == "max" else counts).log()


class News(NamedTuple):
    """What one forward pass found out, to be stored after the optimizer step."""

    rows: Tensor
    """New words (B, C) of this rank's images."""
    nearest: Tensor
    """Mean squared distance to the nearest word, over all ranks (1,)."""
    seeds: Tensor | None
    """The vocabulary that was used (K, C) where there was none yet."""


class Vocabulary(nn.Module):
    """Queue of K words of C channels, the oldest replaced first, and the running mean distance to the nearest.

    Words begin as N(0, 1), cut off at zero unless `signed`, and the mean distance at 0.5, as published. With `fill`
    (our addition) all words come out of the first batch instead, and the mean distance begins at its own.
    """

    words: Tensor
    pointer: Tensor
    batches: Tensor
    distance: Tensor

    def __init__(self, words: int, channels: int, *, fill: bool, signed: bool, decay: float) -> None:
        super().__init__()
        self.fill = fill
        self.decay = decay
        first = torch.randn(words, channels)
        self.register_buffer("words", first if signed else first.clamp(min=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("batches", torch.zeros(1))
        self.register_buffer("distance", torch.full((1,), 0.5))
        self._ready = not fill

    @property
    def ready(self) -> bool:
        """Whether there are words. Reads a buffer, and so waits for the device, only until there are."""
        self._ready = self._ready or bool(self.batches > 0)
        return self._ready

    def read(self, maps: Tensor, where: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The words (K, C) to be used with `maps` (B, C, H, W), and again as seeds where they were made of these."""
        if self.ready:
            return self.words, None
        images = len(maps) * (world_size() if self.training else 1)
        seeds = seed_words(maps, where, window, -(-len(self.words) // images))
        seeds = (gather_across_ranks(seeds) if self.training else seeds)[: len(self.words)].to(self.words.dtype)
        return seeds, seeds

    def moved_distance(self, nearest: Tensor) -> Tensor:
        """The running mean distance (1,) after a batch whose own is `nearest`."""
        return self.distance.lerp(nearest, 1 - self.decay) if self.ready else nearest

    @torch.no_grad()
    def store(self, news: Sequence[News]) -> None:
        """Takes in what the micro-steps of one optimizer step brought, on all ranks, in the order of the images."""
        self.distance.copy_(self.moved_distance(torch.stack([one.nearest for one in news]).mean(0)))
        if news[0].seeds is not None:
            self.words.copy_(news[0].seeds)
        for one in news:
            self._write(gather_across_ranks(one.rows))
        self.batches += 1

    def _write(self, rows: Tensor) -> None:
        """(n, C) at the pointer, around the end of the queue; of more than K rows the last K stay."""
        count = len(self.words)
        begin = self.pointer + max(len(rows) - count, 0)
        kept = rows[-count:].to(self.words.dtype)
        self.words.index_copy_(0, (begin + torch.arange(len(kept), device=rows.device)) % count, kept)
        self.pointer.copy_((self.pointer + len(rows)) % count)


class WordHead(nn.Module):
    """Words (K, C) → one unit vector (K, D) each: norm, linear, batch norm over the words, ReLU, linear, norm.

    Source: section 3.3 of the paper; hidden width 2 D. In training each rank generates its share of the words where
    their number divides; statistics and gradients are those of all of them, and an average of gradients over ranks (as
    DDP takes it) is the gradient of one process that generates all.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 2 * dim, bias=False)
        self.bn = SyncedBatchNorm1d(2 * dim)
        self.last_layer = nn.Linear(2 * dim, dim)

    def forward(self, words: Tensor) -> Tensor:
        """(K, C) → (K, D), at least float32; with a gradient to the head's parameters only."""
        ranks = world_size() if self.training else 1
        shared = ranks > 1 and words.shape[0] % ranks == 0
        own = words.chunk(ranks)[rank()] if shared else words
        hidden = F.relu(self.bn(self.fc(F.normalize(own, dim=1))))
        weights = F.normalize(widened(self.last_layer(hidden)), dim=1)
        return gather_across_ranks(weights) if shared else weights


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over ranks that have equally many images, (1,)."""
    return sum_over_ranks(value.detach().clone().view(1)) / world_size()


def perplexity(bag: Tensor) -> Tensor:
    """(..., K) → exp of the entropy, with 1e-5 inside the logarithm as published: how many words are in use."""
    return torch.exp(-(bag * (bag + 1e-5).log()).sum(-1))


def information(bags: Tensor) -> Tensor:
    """Bags (B, K) → (H(mean bag) - mean H(bag)) / log K: what a bag says about its image, 0 when all are alike."""

    def entropy(bag: Tensor) -> Tensor:
        return -torch.xlogy(bag, bag).sum(-1)

    return (entropy(bags.mean(0)) - entropy(bags).mean()) / math.log(bags.shape[1])
