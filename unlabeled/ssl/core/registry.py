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
        """Adds `name` as ``"module:Class"``. Raises ConfigError when the name is taken."""
        if name in self.targets and self.targets[name] != target:
            raise ConfigError(f"{self.field}: {name!r} is already {self.targets[name]}; give {target} another name")
        self.targets[name] = target

    def names(self) -> list[str]:
        """Every name: built in, registered, and from installed packages."""
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            self.register(point.name, point.value)
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
        module, _, attribute = self.targets[name].partition(":")
        try:
            loaded: type[Any] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if (origin := self.origin(name)) == "built in":  # a fault of this package, which needs its traceback
                raise
            raise ConfigError(f"{self.field}: {name!r} cannot be imported ({error}); install {origin} again") from error
        return loaded
