"""``unlabeled report A B C``: runs side by side, from their reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unlabeled.report.compare import read_runs, write_comparison
from unlabeled.ssl.core.errors import ConfigError

_NAMES = 80
"""Letters of the folder's default name."""


def report_runs(overrides: Sequence[str]) -> Path:
    """Compares the runs that `overrides` name (and with ``out=FOLDER`` writes there); returns the page.

    Raises, each in one line, ConfigError without a run and DataError for a run without a report that can be read.
    """
    names = [word for word in overrides if not word.startswith("out=")]
    if not names:
        raise ConfigError("report: no run is given; write unlabeled report runs/a runs/b")
    runs = read_runs([Path(name).expanduser() for name in names])
    given = [word.removeprefix("out=") for word in overrides if word.startswith("out=")]
    joined = "_".join(run.label.replace("/", "-") for run in runs)[:_NAMES]
    return write_comparison(runs, Path(given[-1]).expanduser() if given else Path("reports") / joined)
