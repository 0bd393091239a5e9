"""Settings for the sizes of an elastic backbone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ElasticConfig(BaseModel):
    """Sizes of the sub-networks of an elastic backbone; the largest is always the full backbone itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = Field(None, ge=1)
    """Smallest width; null: half of the backbone's, rounded up to a possible one. [channels]"""
    width_step: int | None = Field(None, ge=1)
    """Step between widths; null: the smallest possible, such as the channels of one attention head. [channels]"""
    depth: int | tuple[int, ...] | None = None
    """Smallest depth, in total (the deepest stage gives up blocks) or per stage; null: half of the blocks, rounded
    up, of a backbone without stages and of each stage of more than three blocks. [blocks]"""
    candidates: tuple[tuple[int, int | tuple[int, ...]], ...] | None = None
    """Explicit list of [width, depth], in place of the settings above; fewer sizes train small sub-networks better."""
    block_order: Literal["alternating", "published"] = "alternating"
    """For Swin. alternating: kept blocks alternate between plain and shifted windows, as in any Swin. published:
    blocks are evenly spaced and each keeps its shift; only sizes that happen to alternate can be exported."""
