"""Which sub-network is trained in which step: passes over a list that contains small sizes more often.

Source: alipay/POA (arXiv 2408.01031). There, one generator shuffles the list for all passes. Here, the order of each
pass depends on its number alone, so that a resumed run continues exactly and nothing needs to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unlabeled.ssl.backbones.elastic.sizes import SubSize, multiplicities
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.seeds import derive


class SizeSampler:
    """Draws sizes without replacement, each as often per pass as `multiplicities` says, and the full size never.

    Attributes: `entries`, the list for one pass (572 for the published ViT), smallest first.
    """

    def __init__(
        self,
        sizes: Sequence[SubSize],
        *,
        seed: int,
        scale: float = 3.0,
        by_width: bool = True,
        shared: bool = True,
    ) -> None:
        """`sizes` as in `unlabeled.ssl.backbones.elastic.Elastic`, the last is the full size; `scale` and `by_width` as
        in `multiplicities`. `shared`: all ranks train the same size in a step; False: each rank has its own order, as
        published.

        Raises ConfigError if there is no size but the full one.
        """
        # multiplicities are computed with the full size among them, as published, and that one is then left out
        times = multiplicities(sizes, scale, by_width=by_width)
        self.entries = [size for size, count in zip(sizes[:-1], times[:-1], strict=True) for _ in range(count)]
        if not self.entries:
            raise ConfigError("elastic: there is no size but the full one; give a smaller width or depth")
        self.seed = seed
        self.shared = shared
        self._orders: dict[tuple[int, int], list[int]] = {}

    def at(self, step: int, rank: int = 0) -> SubSize:
        """The size that process `rank` trains in optimizer step `step`, counted from 0."""
        number, position = divmod(step, len(self.entries))
        return self.entries[self._order(number, -1 if self.shared else rank)[position]]

    def _order(self, number: int, rank: int) -> list[int]:
        """The order of the entries in pass `number` of `rank` (-1: of all ranks)."""
        if (number, rank) not in self._orders:
            generator = torch.Generator().manual_seed(derive("sizes", self.seed, number, rank))
            # a new dict, not a new key: only the current pass is needed
            self._orders = {(number, rank): torch.randperm(len(self.entries), generator=generator).tolist()}
        return self._orders[number, rank]
