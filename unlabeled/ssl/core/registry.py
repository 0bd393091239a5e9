"""Registries of what plugins can add (tasks, evaluators, data sources): from a name to a class."""

from __future__ import annotations

import importlib
from collections.abc import MutableMapping
from importlib.metadata import entry_points
from typing import Any

from unlabeled.ssl.core.errors import ConfigError, nearest


class Registry:
    """Mapping of names to ``"module:Class"``: built in, registered, or from an installed package; imported on demand.

    `field` and `noun` appear in error messages (``task``, ``a pretext task``). Installed packages add names through the
    entry-point group `group`. `targets` holds the built-in names, in the order in which they are listed.
    """

    def __init__(self, field: str, noun: str, *, group: str, targets: MutableMapping[str, str]) -> None:
        self.field, self.noun, self.group, self.targets = field, noun, group, targets

    def register(self, name: str, target: str) -> None:
        """Adds `name` with the target ``"module:Class"``. Raises ConfigError for another form and for a taken name."""
        if not isinstance(target, str) or not all(target.partition(":")):
            form = f"{target.__module__}:{target.__qualname__}" if isinstance(target, type) else "module:Class"
            raise ConfigError(f"{self.field}: {name!r} cannot be {target!r}; give text: {form!r}")
        self._add(name, target)

    def names(self) -> list[str]:
        """Every name: built in, registered, and from installed packages."""
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            self._add(point.name, point.value)
        return list(self.targets)

    def origin(self, name: str) -> str:
        """Where `name` comes from: "built in", a distribution with its version, or the module that registered it."""
        for point in entry_points(group=self.group, name=name):
            if point.dist is not None:
                return f"{point.dist.name} {point.dist.version}"
        module = self.targets[name].partition(":")[0]
        return "built in" if module.startswith("unlabeled.") else module

    def load(self, name: str) -> type[Any]:
        """The class registered as `name`, imported now.

        Raises ConfigError with similar names if it is unknown, and with the reason if a plugin cannot be imported.
        """
        names = self.names()
        if name not in names:
            raise ConfigError(f"{self.field}: {name!r} is not {self.noun}; {nearest(name, names)}")
        target = self.targets[name]
        module, _, attribute = target.partition(":")
        try:
            loaded: type[Any] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if (origin := self.origin(name)) == "built in":  # a bug in this package, which needs its traceback
                raise
            # an origin with a space is a distribution and its version, one without is a module
            remedy = f"install {origin} again" if " " in origin else f"register what can be imported, not {target!r}"
            raise ConfigError(f"{self.field}: {name!r} cannot be imported ({error}); {remedy}") from error
        if not (isinstance(loaded, type) and hasattr(loaded, "Config")):
            raise ConfigError(
                f"{self.field}: {name!r} is {target}, no class with a Config; name the class of {self.noun}"
            )
        return loaded

    def _add(self, name: str, target: str) -> None:
        # adding the same target twice is fine: `names` adds every entry point at each call
        if name in self.targets and self.targets[name] != target:
            raise ConfigError(f"{self.field}: {name!r} is already {self.targets[name]}; give {target} another name")
        self.targets[name] = target
