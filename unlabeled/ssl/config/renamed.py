"""Settings whose names changed since version 0.1.0. The old names stay silent aliases, in overrides and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED: Mapping[str, str] = {
    "beside": "versus",
    "evaluate.corruption.pictures": "evaluate.corruption.images",
    "evaluate.invariance.pictures": "evaluate.invariance.images",
    "evaluate.layers.pictures": "evaluate.layers.images",
    "evaluate.objects.pictures": "evaluate.objects.images",
    "evaluate.recalibrate_pictures": "evaluate.recalibrate_images",
    "evaluate.spectrum.pictures": "evaluate.spectrum.images",
    "network": "model",
    "official": "reference",
    "recalibrate_pictures": "recalibrate_images",
}
"""Old dotted name → new one."""


def new_name(key: str) -> str:
    """A dotted key under its present name: ``network.drop_path`` → ``model.drop_path``."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        renamed = RENAMED.get(".".join(parts[:length]))
        if renamed is not None:
            return ".".join([renamed, *parts[length:]])
    return key


def with_new_names(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their present names; where an old and a new name meet, the new one counts.

    An old name comes from a file, and a new one from what the user typed on top of it, since overrides are renamed
    before they are merged.
    """
    found: dict[str, Any] = {}
    for key, value in sorted(values.items(), key=lambda item: f"{prefix}{item[0]}" not in RENAMED):  # old ones first
        renamed = RENAMED.get(f"{prefix}{key}")
        new = key if renamed is None else renamed.removeprefix(prefix)
        inner = with_new_names(value, f"{prefix}{new}.") if isinstance(value, Mapping) else value
        below = found.get(new)
        found[new] = {**below, **inner} if isinstance(below, Mapping) and isinstance(inner, Mapping) else inner
    return found
