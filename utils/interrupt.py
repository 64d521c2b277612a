"""Being told to stop: SIGTERM (a scheduler, a shutdown) ends a program as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + number of the signal


class Termination(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise ``Termination`` when SIGTERM arrives, where a handler can be set (main thread)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Termination

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
