"""Which sizes of a network are wanted."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ElasticConfig(BaseModel):
    """The sizes that one elastic network holds; the largest is always the network itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = Field(None, ge=1)
    """Smallest width; null: half of the network's, rounded up to a possible one. [channels]"""
    width_step: int | None = Field(None, ge=1)
    """Step between widths; null: the smallest possible, such as the channels of one attention head. [channels]"""
    depth: int | tuple[int, ...] | None = None
    """Smallest depth, in total (the deepest stage gives up blocks) or for each stage; null: half of the blocks, rounded
    up, of a network without stages and of each stage of more than three blocks. [blocks]"""
    candidates: tuple[tuple[int, int | tuple[int, ...]], ...] | None = None
    """Explicit list of [width, depth], in place of the settings above; fewer sizes train small networks better."""
    block_order: Literal["alternating", "published"] = "alternating"
    """For Swin. alternating: kept blocks alternate between plain and shifted windows as in any Swin. published: blocks
    are spread evenly and each keeps its shift; only sizes that happen to alternate can be exported."""
