"""Base of all settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

from unlabeled.ssl.core.plain import plain

Arguments = Annotated[dict[str, Any], PlainSerializer(plain, when_used="json")]
"""Settings that are passed on, such as ``kwargs``: any object of Python, which a file names where it cannot hold it."""


class Section(BaseModel):
    """Unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
