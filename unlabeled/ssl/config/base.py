"""Base of all settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
