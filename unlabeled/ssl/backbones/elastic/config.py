"""Which sizes of a network are wanted."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ElasticConfig(BaseModel):
    """The sizes that one network is to hold. The largest is always the network itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = Field(None, ge=1)
    """Smallest width; None: half of the network's, rounded up to one that is possible."""
    width_step: int | None = Field(None, ge=1)
    """Between widths; None: the smallest that is possible (channels of an attention head, say)."""
    depth: int | tuple[int, ...] | None = None
    """Smallest depth: blocks of all stages together, of which the deepest stage lacks some, or blocks of each stage.
    None: half, rounded up, of a network without stages and of each stage of more than three blocks."""
    candidates: tuple[tuple[int, int | tuple[int, ...]], ...] | None = None
    """Instead: a list of [width, depth]; fewer candidates serve small networks better."""
    block_order: Literal["alternating", "published"] = "alternating"
    """Of Swin. alternating: kept blocks alternate between plain and shifted windows as in any Swin. published: blocks
    are spread evenly and each keeps its shift; only sizes whose shifts happen to alternate can be extracted, since timm
    builds no others."""
