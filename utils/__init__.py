"""The building blocks: each module is one noun and imports nothing from the top level."""

import os
import signal
import threading
from types import FrameType

SAID = {signal.SIGINT: (b"Interrupted.\n", 130), signal.SIGTERM: (b"Terminated.\n", 143)}


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: it does nothing yet that could be harmed.

    No exception, because libraries that are being imported may catch it, or print it.
    """
    line, code = SAID[signal.Signals(number)]
    os.write(2, line)
    os._exit(code)


def leave_while_loading() -> None:
    """Have Ctrl-C and SIGTERM ``leave``, until ``utils.commandline.exit_code`` does the work.

    For a script that is run as a command, before the imports that take seconds: an interrupt then
    ends with one line, as later, and not with the traceback of some library. Handlers that
    somebody else installed stay.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is usual:
            signal.signal(number, leave)
