"""A process that is told to stop ends in time, in order or not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
from tiny_set import ROOT

from utils.commandline import AGAIN
from utils.ranks.stopping import Stopping

# A process whose Python does not see a signal, as if C code kept it.
BLIND = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from utils.ranks import stopping
stopping.GRACE, stopping.LONGEST = 0.2, 0.6
number = int(sys.argv[3])
signal.signal(number, lambda *words: None)

def keep_on():
    while True:
        time.sleep(0.05)

with stopping.Stopping(speaks=sys.argv[2] == "True"):
    os.kill(os.getpid(), number)
"""


def end_of(code: str, number: int, speaks: bool = True) -> tuple[int, str]:
    """Exit code and errors of such a process."""
    words = [sys.executable, "-c", BLIND + code, str(ROOT), str(speaks), str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
)
def test_a_block_that_goes_on_is_ended_with_a_line_of_one_process(
    number: int, code: int, word: str
) -> None:
    assert end_of("    keep_on()", number) == (code, f"{word}. {AGAIN}.\n")
    assert end_of("    keep_on()", number, speaks=False) == (code, "")


def test_what_follows_a_block_that_ended_has_a_limit_too() -> None:
    assert end_of("    time.sleep(0.1)\nkeep_on()", signal.SIGINT) == (1, "")


def test_an_end_in_order_is_left_alone() -> None:
    assert end_of("    time.sleep(0.1)\nsys.exit(7)", signal.SIGINT) == (7, "")


def test_other_signals_and_blocks_without_any_end_nothing() -> None:
    assert end_of("    time.sleep(1)\nsys.exit(7)", signal.SIGUSR1) == (7, "")
    with Stopping(speaks=True) as stopping:
        pass
    assert stopping.told == 0 and signal.set_wakeup_fd(-1) == -1


def test_another_thread_watches_nothing() -> None:
    found: list[int] = []

    def work() -> None:
        with Stopping(speaks=True) as stopping:
            found.append(stopping.told)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]
