"""Names that changed since version 0.1.0, where files or plugins may still use the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar


def with_renamed_keys(values: Any, names: Mapping[str, str]) -> Any:
    """`values` with keys renamed by `names` (old → new); if both are there, the new one counts.

    Anything but a mapping comes back unchanged: a damaged file is reported by whoever reads its parts.
    """
    if not isinstance(values, Mapping):
        return values
    kept = {key: value for key, value in values.items() if key not in names}
    return {names[key]: value for key, value in values.items() if key in names} | kept


def rename_attributes(cls: type, names: Mapping[str, str]) -> None:
    """Gives a subclass from an older package the attributes of `names` (old → new) that it sets by their old names."""
    for old, new in names.items():
        if old in vars(cls) and new not in vars(cls):
            setattr(cls, new, vars(cls)[old])


class OldNames:
    """Base of a class whose attributes were renamed: ``class Results(OldNames, evidence="results")``.

    The old names keep working; a type checker knows the new ones alone.
    """

    _renamed: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **names: str) -> None:
        super().__init_subclass__()
        cls._renamed = {**cls._renamed, **names}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self)._renamed:
                return getattr(self, type(self)._renamed[name])
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
