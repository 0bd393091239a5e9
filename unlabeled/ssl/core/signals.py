"""Signals that stop a run between two steps: SIGTERM, SIGINT, SIGUSR1."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after it wrote a checkpoint; the same command resumes it (EX_TEMPFAIL)."""

# by name, since Windows has no SIGUSR1; Slurm can send it ahead of a time limit
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")

logger = logging.getLogger(__name__)


class StopRequest:
    """Context manager in which the first signal sets `requested`; a second SIGINT interrupts immediately.

    The first signal is logged if `announce` is set, which one process of a run is enough for.
    """

    def __init__(self, *, announce: bool = False) -> None:
        self._announce = announce
        self.requested: str | None = None
        """Name of the last signal received, such as ``SIGTERM``; None before the first."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for name in STOP_SIGNALS:
                if (number := getattr(signal, name, None)) is not None:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:  # Ctrl-C twice: do not wait for the checkpoint
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if self.requested is None and self._announce:
            again = " again" if number == signal.SIGINT else ""
            logger.info("%s: stopping after this step, Ctrl-C%s to stop at once", name, again)
        self.requested = name
