"""``unlabeled report A B C``: compares runs side by side, from their reports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from unlabeled.report.compare import Run, read_runs, reported, write_comparison
from unlabeled.report.document import clean
from unlabeled.ssl.core.errors import ConfigError

_NAMES = 80
"""Longer default folder names are cut, because file systems limit names to 255 bytes, and end with a hash."""


def report_runs(overrides: Sequence[str]) -> Path:
    """Compares the runs in `overrides` and returns the path of the page.

    An override ``out=FOLDER`` sets the folder to write into; it defaults to ``reports/`` and the name of the sweep, or
    the names of the runs.
    Raises ConfigError if no run is given, DataError for a run without a readable report.
    """
    # not parsed by hydra: a run is a plain path, which may contain "=" and other special characters
    names = [override for override in overrides if not override.startswith("out=")]
    if not names:
        raise ConfigError("report: no run is given; for example, write `unlabeled report runs/a runs/b`")
    runs = read_runs([Path(name).expanduser() for name in names])
    given = [override.removeprefix("out=") for override in overrides if override.startswith("out=")]
    sweep = _sweep(runs)
    out = Path(given[-1]).expanduser() if given else Path("reports") / (sweep or _joined(runs))
    return write_comparison(runs, out, title=f"{sweep}: {len(runs)} runs" if sweep is not None else None)


def _sweep(runs: Sequence[Run]) -> str | None:
    """The name of the folder that holds exactly these runs; None if there is none, or if it is the general ``runs``."""
    folders = {run.folder for run in runs}
    parents = {folder.parent for folder in folders}
    if len(folders) < 2 or len(parents) > 1:
        return None
    parent = parents.pop()
    # a part of a sweep must not overwrite the comparison of all of it
    return clean(parent.name) if parent.name not in ("", "runs") and reported(parent) == folders else None


def _joined(runs: Sequence[Run]) -> str:
    name = "_".join(run.label.replace("/", "-") for run in runs)
    if len(name) <= _NAMES:
        return name
    ending = hashlib.sha256(name.encode()).hexdigest()[:8]  # names that differ after the cut stay different
    return f"{name[: _NAMES - 9]}_{ending}"
