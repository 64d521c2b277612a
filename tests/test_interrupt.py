"""SIGTERM as an exception, and only for as long as it is wanted."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from utils.interrupt import Termination, termination_as_interrupt

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix knows them")


def test_sigterm_is_raised_as_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as error, termination_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert isinstance(error.value, Termination)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with termination_as_interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
