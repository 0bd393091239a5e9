"""Errors that a user can cause. Each message is one line: the field, the value, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnlabeledError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits with 2."""


class ConfigError(UnlabeledError):
    """A setting is unknown, of the wrong type, or impossible."""


class DataError(UnlabeledError):
    """Images are missing, unreadable, or do not fit what was asked for."""


class CapabilityError(UnlabeledError):
    """A backbone cannot do what a task needs of it."""


class MissingCapabilityError(CapabilityError):
    """A backbone lacks a capability that a task asks for by name."""


class DivergedError(UnlabeledError):
    """The loss or the gradients are not finite any more."""


class CheckpointError(UnlabeledError):
    """A checkpoint or run folder cannot be written, read, or belongs to something else."""


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, cut to `limit` characters; its kind where it has no message.

    Of an error of the operating system it is the bare reason, since the message around it names the file.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Phrase for an error message: the known names nearest to `name`, or all of them when none is near.

    >>> nearest("rotatoin", ["mae", "rotation"])
    "did you mean 'rotation'?"
    """
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"known: {shown}" if names else "none are known"
