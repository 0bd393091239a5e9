"""Which sub-network is trained in which step: walks through a list that holds small ones more often.

Source: alipay/POA (arXiv 2408.01031). There the list is shuffled by a generator that runs on; here the
order of each pass follows from its number, so that a resumed run goes on exactly and nothing has to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unlabeled.ssl.backbones.elastic.sizes import SubSize, multiplicities
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.seeds import derive


class SizeSampler:
    """Draws sizes without replacement, each as often in a pass as `multiplicities` says, and the whole network never.

    Attributes: `entries`, the list of one pass (572 for the published ViT), smallest first.
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
        """`sizes` as in `unlabeled.ssl.backbones.elastic.Elastic`, the last is the whole network's; `scale` and
        `by_width` as in `multiplicities`. `shared`: all ranks train the same size in a step; False: each walks by
        itself, as published.

        Raises ConfigError when there is no size but the whole network's.
        """
        times = multiplicities(sizes, scale, by_width=by_width)
        self.entries = [size for size, count in zip(sizes[:-1], times[:-1], strict=True) for _ in range(count)]
        if not self.entries:
            raise ConfigError("elastic: there is no size but the whole network's; give a smaller width or depth")
        self.seed = seed
        self.shared = shared
        self._orders: dict[tuple[int, int], list[int]] = {}

    def at(self, step: int, rank: int = 0) -> SubSize:
        """The size that process `rank` trains in optimizer step `step`, counted from 0."""
        walk, position = divmod(step, len(self.entries))
        return self.entries[self._order(walk, -1 if self.shared else rank)[position]]

    def _order(self, walk: int, walker: int) -> list[int]:
        """The entries' order in a pass, of which the last one asked for is kept."""
        if (walk, walker) not in self._orders:
            generator = torch.Generator().manual_seed(derive("sizes", self.seed, walk, walker))
            self._orders = {(walk, walker): torch.randperm(len(self.entries), generator=generator).tolist()}
        return self._orders[walk, walker]
