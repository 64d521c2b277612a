"""A rank that is told to stop (Ctrl-C, SIGTERM) ends within seconds, whatever it is at.

Python raises ``KeyboardInterrupt`` between two of its own instructions. A rank can be for minutes
within one: a step of large images, a collective that waits for a rank that is gone; and Python's
tidying at the end takes seconds on a busy machine. ``torchrun`` kills after 30 s what is left.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading

from utils.commandline import AGAIN, INTERRUPTED, TERMINATED, Termination

GRACE = 3.0  # seconds from a signal until the process ends where it is
LONGEST = 5.0  # the same if it was just ending in order
STOPPED = {
    INTERRUPTED: f"Interrupted. {AGAIN}.",
    TERMINATED: f"Terminated. {AGAIN}.",
}  # by exit code


class Stopping:
    """Watches for signals within a block of the main thread; in another one it does nothing.

    ``speaks``: whether this process tells that it was stopped, where it cannot end in order.
    ``told`` is the exit code once a signal has come, 0 before.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.told = speaks, 0
        self.out = threading.Event()  # the block was left

    def __enter__(self) -> Stopping:
        self.watches = threading.current_thread() is threading.main_thread()
        if self.watches:
            heard, self.sent = socket.socketpair()
            self.sent.setblocking(False)
            # C code writes the number of each signal there, also while Python waits.
            number = self.sent.fileno()
            self.before = signal.set_wakeup_fd(number, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(heard,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """A process that was told to stop still ends in time."""
        self.out.set()
        if self.watches:
            signal.set_wakeup_fd(self.before)
            self.sent.close()  # which ends the thread

    def interrupt(self) -> KeyboardInterrupt:
        """What Python raises, or was about to."""
        return Termination() if self.told == TERMINATED else KeyboardInterrupt()

    def _watch(self, heard: socket.socket) -> None:
        codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
        with heard:
            while not self.told:
                if not (number := heard.recv(1)):
                    return
                self.told = codes.get(signal.Signals(number[0]), 0)
        nowhere = os.open(os.devnull, os.O_WRONLY)  # left open: a thread of C writes there,
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=nowhere)  # and needs no Python
        if not self.out.wait(GRACE):
            if self.speaks:
                print(STOPPED[self.told], file=sys.stderr, flush=True)
            os._exit(self.told)
