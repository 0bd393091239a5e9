"""Base class of all settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

from unlabeled.ssl.core.plain import plain

Arguments = Annotated[dict[str, Any], PlainSerializer(plain, when_used="json")]
"""Settings that are passed on, such as ``kwargs``. Any Python object is allowed; files store the name of an object that
they cannot hold (see `plain`)."""


class Section(BaseModel):
    """A group of settings: unknown keys are refused, and values are immutable after validation."""

    # by default, pydantic does not validate defaults, and a wrong default would only show up far into a run
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
