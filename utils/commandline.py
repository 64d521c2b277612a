"""What all commands share: how they end, and a script's own flags beside the settings.

Whatever the user can mend is a ``UserError``: its message becomes one line, or one line per
problem, and the exit code 2. A traceback is a fault of this program.
"""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + number of the signal
AGAIN = "The same command goes on from the last saved epoch"
AGAIN_AFRESH = "Without --overwrite and --resume never, the same command goes on from there"


class UserError(ValueError):
    """Something the user can mend: each line names the file or setting, the value, the cure."""


class TrainingError(ValueError):
    """Numbers went wrong; the message says where and what is kept."""


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


def exit_code(
    work: Callable[[], int | None],
    again: str = AGAIN,
    smaller: str = "a smaller batch, --top_k or --image_size",
) -> int:
    """Do the work of a command; whatever ends it early becomes a message and an exit code.

    Args:
        work: what to do; it may return an exit code of its own.
        again: what the user is told about starting it again.
        smaller: what to give when memory runs out.

    Returns:
        That of ``work``, else 0; 2 for something the user can mend, 1 for numbers that went wrong,
        130 when interrupted, 143 when terminated.
    """
    from torch import OutOfMemoryError  # not above: --help needs no torch

    try:
        with termination_as_interrupt():
            return work() or 0
    except UserError as error:
        return complain(str(error), 2)
    except (OutOfMemoryError, MemoryError) as error:
        what = str(error).partition("\n")[0] or "the machine's"
        return complain(f"Out of memory: {what}; give {smaller}", 2)
    except TrainingError as error:
        return complain(str(error), 1)
    except Termination:
        return complain(f"Terminated. {again}.", TERMINATED)
    except KeyboardInterrupt:
        return complain(f"Interrupted. {again}.", INTERRUPTED)


def complain(text: str, code: int) -> int:
    """Print a message to stderr; returns the exit code."""
    print(text, file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """The options of a command; what cannot be read is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the problem and leave."""
        self.exit(2, f"{self.prog}: {message}; -h lists the options\n")


MANY = "many"  # takes all words up to the next flag
ONE = "one"
NONE = "none"


@dataclass
class Flags:
    """A command line taken apart.

    Attributes:
        own: words after each of the script's own flags.
        rest: all other words, in their order.
        named: names of the flags among the rest.
    """

    own: dict[str, list[str]] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def one(self, name: str, default: str = "") -> str:
        """The word after an own flag."""
        return self.own[name][0] if self.own.get(name) else default


def split_flags(argv: Sequence[str], kinds: dict[str, str]) -> Flags:
    """Take a command line apart: ``--name value``, ``--name=value`` or ``-name value``.

    Args:
        argv: the words after the script's name.
        kinds: name of each own flag -> how many words it takes: ``MANY``, ``ONE`` or ``NONE``.
    """
    flags = Flags()
    mine = ""  # the own flag that takes the next words
    for word in argv:
        flag = re.fullmatch(r"--?([^\W\d][\w-]*)(?:=(.*))?", word, re.DOTALL)
        name = flag[1] if flag else ""
        if flag and name in kinds:
            flags.own[name] = [] if flag[2] is None else [flag[2]]
            mine = "" if kinds[name] == NONE or flag[2] is not None else name
        elif mine and not flag and (kinds[mine] == MANY or not flags.own[mine]):
            flags.own[mine].append(word)
        else:
            mine = ""
            flags.rest.append(word)
            flags.named |= {name} if flag else set()
    return flags


def value_problems(flags: Flags, kinds: dict[str, str]) -> list[str]:
    """A line for each own flag that lacks its value, or has one and takes none."""
    lines = []
    for name, words in flags.own.items():
        if kinds[name] == NONE and words:
            lines.append(f"--{name}: found {words[0][:60]!r}; it takes no value")
        if kinds[name] != NONE and not any(words):
            lines.append(f"--{name}: no value found")
    return lines


def choice_problems(flag: str, found: str, known: Iterable[str]) -> list[str]:
    """A line if a word is not among the known ones, with the nearest that is."""
    names = list(known)
    if found in names:
        return []
    near = difflib.get_close_matches(found, names, 1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return [f"--{flag}: found {found[:60]!r}; allowed: {', '.join(names)}{guess}"]
