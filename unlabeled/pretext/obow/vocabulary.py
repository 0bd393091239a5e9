"""Visual words: a queue of teacher features, bags of words of images, and the classifier generated from words.

Source: sections 3.1 and 3.2 of the paper and valeoai/obow. The codes of P positions over K words would be the largest
tensor of a step, so they are computed for a few images at a time, and in log space until they are pooled.
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

_CROPPED = 5
"""Smallest shorter side of a map, in positions, whose border is removed; there, padding affects the features."""
_WINDOW = 3
"""Side of the window that is averaged into a word, in positions."""


def inner_map(maps: Tensor) -> Tensor:
    """Removes one position on each side of maps (B, C, H, W), unless they have fewer than 5 on the shorter side."""
    return maps[:, :, 1:-1, 1:-1] if min(maps.shape[-2:]) >= _CROPPED else maps


def window_of(maps: Tensor, source: Source) -> tuple[int, int]:
    """Window (rows, columns) of `maps` (B, C, H, W) that is averaged into a word."""
    height, width = maps.shape[-2:]
    if source == "map":
        return height, width
    side = _WINDOW if source == "local" and min(height, width) >= _WINDOW else 1
    return side, side


def pick_words(maps: Tensor, where: Tensor, window: tuple[int, int]) -> Tensor:
    """One local average of each map (B, C, H, W) → (B, C), in at least float32.

    `where` (B,) in [0, 1) selects the position of the window, in raster order.
    """
    # gathers the window and averages only that, rather than pooling the whole map
    (height, width), device = maps.shape[-2:], maps.device
    rows, columns = height - window[0] + 1, width - window[1] + 1
    position = _positions(where, rows * columns)
    corner = position // columns * width + position % columns
    inside = torch.arange(window[0], device=device)[:, None] * width + torch.arange(window[1], device=device)
    index = corner[:, None] + inside.flatten()  # (B, window)
    window_features = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1))  # (B, C, window)
    return widened(window_features).mean(-1)


def seed_words(maps: Tensor, where: Tensor, window: tuple[int, int], each: int) -> Tensor:
    """Many words from the maps (B, C, H, W) of one batch: `each` local averages of every image, (B * each, C).

    Image by image, evenly spaced and starting at `where` (B,); they repeat if a map has fewer positions than `each`.
    """
    pooled = F.avg_pool2d(widened(maps), window, stride=1).flatten(2)  # (B, C, positions)
    steps = torch.arange(each, device=maps.device, dtype=where.dtype) / each
    position = _positions((where[:, None] + steps) % 1, pooled.shape[-1])  # (B, each)
    seeds = pooled.gather(2, position[:, None].expand(-1, pooled.shape[1], -1)).transpose(1, 2)  # (B, each, C)
    return seeds.flatten(0, 1)


def _positions(where: Tensor, count: int) -> Tensor:
    """[0, 1) → integers in [0, count)."""
    return (where * count).long().clamp(max=count - 1)  # rounding could give `count` itself


def squared_distances(features: Tensor, words: Tensor) -> Tensor:
    """Features (B, P, C) and words (K, C) → squared distances (B, P, K), in the type of the words."""
    flat = features.to(words.dtype).flatten(0, 1)
    # |f - w|^2 = |w|^2 - 2 f.w + |f|^2, in place: this is the largest tensor of a step
    with torch.autocast(words.device.type, enabled=False):
        distances = torch.addmm(words.square().sum(1), flat, words.t(), alpha=-2)
    return distances.add_(flat.square().sum(1, keepdim=True)).view(*features.shape[:2], -1)


class Distances:
    """Squared distances of features at all positions to all words, computed for a few images at a time."""

    def __init__(self, features: Tensor, words: Tensor, memory: int) -> None:
        """Features (B, P, C), words (K, C), and the largest size of a table of distances in bytes."""
        per_image = features.shape[1] * words.shape[0] * words.element_size()
        self.words = words
        self.chunks = torch.split(features, max(memory // per_image, 1))
        # `mean_nearest` and `bags` both need the distances: keep them if they fit, else compute them twice
        self._kept = squared_distances(features, words) if len(self.chunks) == 1 else None

    def __iter__(self) -> Iterator[Tensor]:
        """Yields (b, P, K) for each chunk of b images."""
        for chunk in self.chunks:
            yield squared_distances(chunk, self.words) if self._kept is None else self._kept

    def mean_nearest(self) -> Tensor:
        """Mean distance to the nearest word over positions and images of this rank, a scalar."""
        return torch.cat([one.amin(-1) for one in self]).mean()

    def bags(self, sharpness: Tensor | None, pool: Pool) -> Tensor:
        """Bags of words (B, K) that sum to 1: softmax over words of -sharpness * distance, pooled over positions.

        `sharpness` None: each position is assigned to its nearest word only.
        """
        pooled = [_hard_bags(one, pool) if sharpness is None else _log_bags(one, sharpness, pool) for one in self]
        return torch.cat(pooled).softmax(-1)


def _log_bags(distances: Tensor, sharpness: Tensor, pool: Pool) -> Tensor:
    """Distances (b, P, K) → log of the pooled codes (b, K)."""
    scores = distances * -sharpness
    # log-softmax in place, as the table is large
    scores -= scores.logsumexp(-1, keepdim=True)
    return scores.amax(1) if pool == "max" else scores.logsumexp(1)


def _hard_bags(distances: Tensor, pool: Pool) -> Tensor:
    """As `_log_bags`, up to a constant, if each position is assigned to its nearest word only."""
    nearest = distances.argmin(-1)
    counts = distances.new_zeros(len(distances), distances.shape[-1])
    counts.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=counts.dtype))
    return (counts.clamp(max=1) if pool == "max" else counts).log()


class QueueUpdate(NamedTuple):
    """Results of one forward pass that are stored after the optimizer step."""

    words: Tensor
    """New words (B, C) of this rank's images."""
    nearest: Tensor
    """Mean squared distance to the nearest word over all ranks, (1,)."""
    seeds: Tensor | None
    """The initial words (K, C), if they were made from this batch."""


class Vocabulary(nn.Module):
    """Queue of K words of C channels, the oldest replaced first, and the running mean distance to the nearest word.

    Words are drawn from N(0, 1), clipped at zero unless `signed`, and the mean distance starts at 0.5, as published.
    With `fill` (not in the paper), all words come from the first batch, and the mean distance starts at its value.
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
        """Whether the words are set; with `fill`, they are not before the first batch."""
        # reading a buffer waits for the device, so do it only until the words are set
        self._ready = self._ready or bool(self.batches > 0)
        return self._ready

    def read(self, maps: Tensor, where: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The words (K, C) to use with `maps` (B, C, H, W), and the same as seeds if they were made from `maps`."""
        if self.ready:
            return self.words, None
        images = len(maps) * (world_size() if self.training else 1)  # in eval mode, ranks do not communicate
        seeds = seed_words(maps, where, window, -(-len(self.words) // images))
        seeds = (gather_across_ranks(seeds) if self.training else seeds)[: len(self.words)].to(self.words.dtype)
        return seeds, seeds

    def moved_distance(self, nearest: Tensor) -> Tensor:
        """The running mean distance (1,) after a batch with mean distance `nearest`."""
        return self.distance.lerp(nearest, 1 - self.decay) if self.ready else nearest

    @torch.no_grad()
    def store(self, updates: Sequence[QueueUpdate]) -> None:
        """Stores the updates of all micro-steps of one optimizer step, from all ranks, in the order of the images."""
        # the distance first: `moved_distance` must still see whether the words were set
        self.distance.copy_(self.moved_distance(torch.stack([one.nearest for one in updates]).mean(0)))
        if updates[0].seeds is not None:
            self.words.copy_(updates[0].seeds)
        for one in updates:
            self._write(gather_across_ranks(one.words))
        self.batches += 1

    def _write(self, new: Tensor) -> None:
        """Writes `new` words (n, C) at the pointer, wrapping around; of more than K words, the last K are kept."""
        count = len(self.words)
        begin = self.pointer + max(len(new) - count, 0)
        kept = new[-count:].to(self.words.dtype)
        self.words.index_copy_(0, (begin + torch.arange(len(kept), device=new.device)) % count, kept)
        self.pointer.copy_((self.pointer + len(new)) % count)


class WordHead(nn.Module):
    """Generates one classifier weight (a unit vector of D channels) for each word.

    Normalization, linear, batch norm over the words, ReLU, linear, normalization; the hidden width is 2 D. Source:
    section 3.3 of the paper.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 2 * dim, bias=False)
        self.bn = SyncedBatchNorm1d(2 * dim)
        self.last_layer = nn.Linear(2 * dim, dim)

    def forward(self, words: Tensor) -> Tensor:
        """Words (K, C) → weights (K, D), in at least float32; gradients reach the head's parameters only."""
        # in training, each rank generates a share of the weights, if K is divisible by the number of ranks; the batch
        # norm is synchronized, and DDP's average of gradients equals the gradient of one process that generates all
        ranks = world_size() if self.training else 1
        shared = ranks > 1 and words.shape[0] % ranks == 0
        own = words.chunk(ranks)[rank()] if shared else words
        hidden = F.relu(self.bn(self.fc(F.normalize(own, dim=1))))
        weights = F.normalize(widened(self.last_layer(hidden)), dim=1)
        return gather_across_ranks(weights) if shared else weights


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over ranks, (1,); all ranks have equally many images."""
    return sum_over_ranks(value.detach().clone().view(1)) / world_size()


def perplexity(bag: Tensor) -> Tensor:
    """Bags (..., K) → exp of their entropy (...): the number of words in use."""
    # 1e-5 as published
    return torch.exp(-(bag * (bag + 1e-5).log()).sum(-1))


def information(bags: Tensor) -> Tensor:
    """Bags (B, K) → (H(mean bag) - mean H(bag)) / log K: how much bags differ between images, 0 if they are equal."""

    def entropy(bag: Tensor) -> Tensor:
        return -torch.xlogy(bag, bag).sum(-1)

    return (entropy(bags.mean(0)) - entropy(bags).mean()) / math.log(bags.shape[1])
