"""Names of what can be brought from outside (tasks, evaluators, sources) → the classes behind them."""

from __future__ import annotations

import importlib
from collections.abc import MutableMapping
from importlib.metadata import entry_points
from typing import Any

from unlabeled.ssl.core.errors import ConfigError, nearest


class Registry:
    """Name → ``"module:Class"``, imported when it is looked up: built in, registered, or from an installed package.

    `field` and `noun` are words of its messages (``task``, ``a pretext task``); `group` is the entry-point group in
    which installed packages name theirs; `targets` are the built-in ones, in the order in which they are listed.
    """

    def __init__(self, field: str, noun: str, *, group: str, targets: MutableMapping[str, str]) -> None:
        self.field, self.noun, self.group, self.targets = field, noun, group, targets

    def register(self, name: str, target: str) -> None:
        """Adds `name` as ``"module:Class"``. Raises ConfigError for another form, and for a name that is taken."""
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
        """Who brings `name`: "built in", a distribution and its version, or the module that registered it."""
        for point in entry_points(group=self.group, name=name):
            if point.dist is not None:
                return f"{point.dist.name} {point.dist.version}"
        module = self.targets[name].partition(":")[0]
        return "built in" if module.startswith("unlabeled.") else module

    def load(self, name: str) -> type[Any]:
        """The class of `name`.

        Raises ConfigError naming the nearest known names, or saying why one from outside cannot be imported.
        """
        names = self.names()
        if name not in names:
            raise ConfigError(f"{self.field}: {name!r} is not {self.noun}; {nearest(name, names)}")
        target = self.targets[name]
        module, _, attribute = target.partition(":")
        try:
            loaded: type[Any] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if (origin := self.origin(name)) == "built in":  # a fault of this package, which needs its traceback
                raise
            remedy = f"install {origin} again" if " " in origin else f"register what can be imported, not {target!r}"
            raise ConfigError(f"{self.field}: {name!r} cannot be imported ({error}); {remedy}") from error
        if not (isinstance(loaded, type) and hasattr(loaded, "Config")):
            raise ConfigError(
                f"{self.field}: {name!r} is {target}, no class with a Config; name the class of {self.noun}"
            )
        return loaded

    def _add(self, name: str, target: str) -> None:
        if name in self.targets and self.targets[name] != target:
            raise ConfigError(f"{self.field}: {name!r} is already {self.targets[name]}; give {target} another name")
        self.targets[name] = target
