"""Errors that a user can cause. Each message is one line with the field, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnlabeledError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits with 2."""


class ConfigError(UnlabeledError):
    """A setting is unknown, has the wrong type, or has an impossible value."""


class DataError(UnlabeledError):
    """Images or labels are missing, unreadable, or do not fit the settings."""


class NoLabelsError(DataError):
    """The data has no labels, which evaluation needs."""


class CapabilityError(UnlabeledError):
    """A backbone cannot do what a task needs."""


class MissingCapabilityError(CapabilityError):
    """A backbone is missing a capability that a task lists in `requires`."""


class DivergedError(UnlabeledError):
    """The loss or the gradients are no longer finite."""


class CheckpointError(UnlabeledError):
    """A checkpoint or run folder cannot be written or read, or belongs to another run."""


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, cut after the last word within `limit` characters; the error's class name
    if it has no message.

    For an error of the operating system, only the reason, such as "No space left on device".
    """
    if isinstance(error, OSError) and error.strerror:  # str(error) would repeat the file that our message names
        return error.strerror
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= limit else lines[0][:limit].rsplit(maxsplit=1)[0] + " ..."


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Phrase for an error message: the known names most similar to `name`, or a list of them if none is similar.

    >>> nearest("rotatoin", ["mae", "rotation"])
    "did you mean 'rotation'?"
    """
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)  # 0.6: difflib's own default
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"known: {shown}" if names else "none are known"
