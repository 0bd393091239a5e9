"""The first signal is logged once; Ctrl-C after it interrupts."""

from __future__ import annotations

import signal

import pytest

from unlabeled.ssl.core.signals import StopRequest


@pytest.mark.parametrize("announce", [True, False])
def test_the_first_signal_is_logged_once(caplog: pytest.LogCaptureFixture, announce: bool) -> None:
    caplog.set_level("INFO")
    with StopRequest(announce=announce) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert caplog.messages == ["SIGINT: stopping after this step, Ctrl-C again to stop at once"] * announce
