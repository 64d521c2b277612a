"""The building blocks: each module is one noun and imports nothing from the top level.

A command of this program imports this first: one that is interrupted (Ctrl-C) while it loads ends
with one line, as later, and not with the traceback of some library.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

_ROOT = Path(__file__).resolve().parents[1]
_COMMANDS = {_ROOT / f"{name}.py" for name in ("train", "train_defect", "predict", "reproduce")}
_COMMANDS |= {_ROOT / "segment.py", *_ROOT.glob("dataset/*.py"), *_ROOT.glob("benchmarks/*.py")}


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: it does nothing yet that could be harmed.

    No exception, because libraries that are being imported may catch it, or print it.
    """
    os.write(2, b"Interrupted.\n")
    os._exit(130)


def _leave_while_loading() -> None:
    """Have Ctrl-C ``leave`` in the commands, until ``utils.commandline.exit_code``."""
    started = getattr(sys.modules.get("__main__"), "__file__", None)
    if (
        started
        and Path(started).resolve() in _COMMANDS
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, leave)


_leave_while_loading()
