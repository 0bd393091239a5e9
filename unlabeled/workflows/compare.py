"""``unlabeled report A B C``: compares runs side by side, from their reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unlabeled.report.compare import read_runs, write_comparison
from unlabeled.ssl.core.errors import ConfigError

_NAMES = 80
"""Maximum length of the default folder name: file systems limit names to 255 bytes."""


def report_runs(overrides: Sequence[str]) -> Path:
    """Compares the runs in `overrides` and returns the path of the page.

    An override ``out=FOLDER`` sets the folder to write into; it defaults to ``reports/`` and the names of the runs.
    Raises ConfigError if no run is given, DataError for a run without a readable report.
    """
    # not parsed by hydra: a run is a plain path, which may contain "=" and other special characters
    names = [override for override in overrides if not override.startswith("out=")]
    if not names:
        raise ConfigError("report: no run is given; for example, write `unlabeled report runs/a runs/b`")
    runs = read_runs([Path(name).expanduser() for name in names])
    given = [override.removeprefix("out=") for override in overrides if override.startswith("out=")]
    joined = "_".join(run.label.replace("/", "-") for run in runs)[:_NAMES]
    return write_comparison(runs, Path(given[-1]).expanduser() if given else Path("reports") / joined)
