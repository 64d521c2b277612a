"""Exit codes, error messages and command-line parsing of all commands.

Whatever the user can mend is a ``UserError``: a line per problem, exit code 2, no traceback.
Names of options are spelled in full everywhere, and ``-`` in them counts as ``_``. ``Parser`` is
argparse with that; the settings of a training, which are many, are taken apart by ``split_flags``,
because argparse stops at the first problem and there all are found together.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from utils import leave
from utils.entries import join_entries, split_entries

INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + number of the signal
AGAIN = (
    "The same command goes on from the last saved state, unless it says --overwrite or "
    "--resume never"
)


class UserError(ValueError):
    """Something the user can mend: each line names the file or setting, the value and the cure."""


class TrainingError(ValueError):
    """Numbers are not finite; the message says where, and what is kept."""


class Termination(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise ``Termination`` when SIGTERM arrives; in the main thread only, which has handlers.

    A command that has loaded no longer leaves at once when it is interrupted (``utils.leave``).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Termination

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    loading = signal.getsignal(signal.SIGINT)
    if loading is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if loading is leave:
            signal.signal(signal.SIGINT, leave)


def options_told(given: Mapping[str, object], default: Mapping[str, object]) -> str:
    """The options that have another value than their ``default``, as on a command line.

    Those without an entry in ``default`` are not told.
    """
    parts = []
    for name, value in given.items():
        if name not in default or value == default[name]:
            continue
        words = [str(value)]
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            words = [*map(str, value)]
            words = [",".join(words)] if name.startswith("class_") else words
        parts.append(shlex.join([f"--{name}", *([] if value is True else words)]))
    return " ".join(parts) or "all as by default"


def exit_code(
    work: Callable[[], int | None],
    again: str = AGAIN,
    smaller: str = "a smaller batch, --top_k or --image_size",
) -> int:
    """Do the work of a command; errors become a message and an exit code.

    Returns that of ``work`` (None: 0), 2 for a UserError or lack of memory, 1 for a TrainingError,
    130 when interrupted, 143 when terminated. ``again`` says what a restart does, ``smaller`` what
    to give when memory runs out.
    """
    if sys.unraisablehook is sys.__unraisablehook__:  # somebody else's stays
        sys.unraisablehook = unraisable
    try:
        with termination_as_interrupt():
            return work() or 0
    except UserError as error:
        return complain(str(error), 2)
    except TrainingError as error:
        return complain(str(error), 1)
    except Termination:
        return complain(f"Terminated. {again}.", TERMINATED)
    except KeyboardInterrupt:
        return complain(f"Interrupted. {again}.", INTERRUPTED)
    except Exception as error:
        if (what := lack_of_memory(error)) is None:
            raise
        return complain(f"Out of memory{f' ({what})' if what else ''}; give {smaller}", 2)


def unraisable(found: sys.UnraisableHookArgs) -> None:
    """Print what nobody can catch, as Python does, but for the end of a file half opened.

    An interrupt within ``ZipFile.__init__`` leaves an object without the attributes that its
    ``__del__`` looks at; nothing was opened that would have to be closed.
    """
    half = isinstance(found.exc_value, AttributeError)
    if not (half and getattr(found.object, "__qualname__", "") == "ZipFile.__del__"):
        sys.__unraisablehook__(found)


NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Insufficient memory|bad_alloc|"
    r"(?i:failed to allocate)|could not create a memory object|"
    r"STATUS_ALLOC_FAILED|DEVICE_ALLOCATION_FAILED"  # of CUDA's libraries
)


def lack_of_memory(error: BaseException) -> str | None:
    """What an error says of memory that ran out, perhaps nothing; None if it is another error.

    PyTorch's allocator on the CPU, its other devices and OpenCV each raise a type of their own.
    """
    text = str(error)
    named = NO_MEMORY.search(text)
    if not (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (named and not isinstance(error, OSError | UserError))
    ):
        return None
    lines = text.splitlines() or [""]  # that of a worker process holds its traceback
    line = next((line for line in lines if NO_MEMORY.search(line)), lines[0])
    return re.sub(r"^.*?\[enforce fail[^\]]*\] \S.*?\. |\.? Error code .*|\.$", "", line).strip()


def complain(text: str, code: int) -> int:
    """Print a message to stderr; returns the exit code."""
    print(text, file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """The options of a command; what cannot be read is one line and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse; options that are none end the program, a line each."""
        words = list(sys.argv[1:] if args is None else args)
        known = self._option_string_actions
        # Before argparse looks, to which the missing option or the stray value is the mistake.
        lines = [
            f"{self.prog}: {unknown_option(word.partition('=')[0], [*known])}\n"
            for word in words[: words.index("--") if "--" in words else None]
            if FLAG.fullmatch(word) and plain_flag(word).partition("=")[0] not in known
        ]
        lines += [f"{self.prog}: {line}\n" for line in _without_value(words)]
        if lines:
            self.exit(2, "".join(lines))
        return super().parse_args(words, namespace)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse, with ``-`` in names as ``_``; what is not known is left over."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        own = _joined([*map(plain_flag, words[:end])])
        return super().parse_known_args([*own, *words[end:]], namespace)

    def error(self, message: str) -> NoReturn:
        """Print the problem and leave."""
        number = re.search(r"invalid float value: '(.*)'$", message)
        message += decimal_point(number[1]) if number else ""
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _without_value(words: Sequence[str]) -> list[str]:
    """A line for each option with an empty word: a variable of a shell that is not set.

    A path of no letters would be the folder at hand.
    """
    lines, flag = [], ""
    for word in words:
        found = FLAG.fullmatch(word)
        flag = f"{found[1]}{found[2]}" if found else flag
        if (found and found[3] == "") or (not word and flag):
            lines.append(f"{flag}: no value found ('' was given); give one, or leave it out")
    return lines


def _joined(words: Sequence[str]) -> list[str]:
    """Words in which a flag has a list that begins with a negative number by ``=``.

    argparse would take ``-1,0`` for an option; whoever reads the value says what is wrong with it.
    """
    joined: list[str] = []
    for word in words:
        if re.match(r"-\d[^,]*,", word) and joined and FLAG.fullmatch(joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


FLAG = re.compile(r"(--?)([^\W\d][\w-]*)(?:=(.*))?", re.DOTALL)  # dashes, name, value


def plain_flag(word: str) -> str:
    """A word of a command line; a flag's with ``_`` for ``-`` in its name, which is that of Python.

    ``--mask-kind=a-b`` is ``--mask_kind=a-b``.
    """
    if not (flag := FLAG.fullmatch(word)):
        return word
    value = "" if flag[3] is None else f"={flag[3]}"
    return f"{flag[1]}{flag[2].replace('-', '_')}{value}"


def unknown_option(name: str, known: Sequence[str]) -> str:
    """A line on an option that is none of the known ones, with the nearest of them."""
    names = {word.lstrip("-"): word for word in known if word not in ("-h", "--help")}
    word = name.lstrip("-").lower().replace("-", "_")
    begun = [each for each in names if each.startswith(word)]  # abbreviations
    near = begun or difflib.get_close_matches(word, names, 1)
    cure = f"did you mean {names[near[0]]}?" if near else "--help lists the options"
    return f"unknown option {shorten(name)}; {cure}"


MANY, ONE, NONE = "many", "one", "none"  # words a flag takes; many: all up to the next flag


@dataclass
class Flags:
    """A parsed command line: the command's own flags, and the rest."""

    own: dict[str, list[str]] = field(default_factory=dict)  # words after each own flag
    rest: list[str] = field(default_factory=list)  # all other words, in order
    named: set[str] = field(default_factory=set)  # names of the flags among the rest

    def one(self, name: str, default: str = "") -> str:
        """The first word after an own flag."""
        return self.own[name][0] if self.own.get(name) else default

    def strangers(self) -> Iterator[tuple[str, str]]:
        """(dashes, name) of each flag in the rest, ('', word) of each word that is no flag's value.

        One word after an unknown flag counts as its value.
        """
        expected = False
        for word in self.rest:
            flag = FLAG.fullmatch(word)
            if flag or not expected:
                yield (flag[1], flag[2]) if flag else ("", word)
            expected = flag is not None and flag[3] is None


def split_flags(argv: Sequence[str], kinds: dict[str, str]) -> Flags:
    """Parse ``--name value``, ``--name=value`` or ``-name value``; ``-`` in a name is ``_``.

    ``kinds`` gives the words that each own flag takes: ``MANY``, ``ONE`` or ``NONE``.
    """
    flags, mine = Flags(), ""  # mine: the own flag that takes the next words
    for word in argv:
        flag = FLAG.fullmatch(plain_flag(word))
        name = flag[2] if flag else ""
        if flag and name in kinds:
            flags.own[name] = [] if flag[3] is None else [flag[3]]
            mine = "" if kinds[name] == NONE or flag[3] is not None else name
        elif mine and not flag and (kinds[mine] == MANY or not flags.own[mine]):
            flags.own[mine].append(word)
        else:
            mine = ""
            flags.rest.append(word)
            flags.named |= {name} if flag else set()
    return flags


def value_problems(flags: Flags, kinds: dict[str, str]) -> list[str]:
    """A line for each own flag that lacks its value or has a needless one."""
    lines = []
    for name, words in flags.own.items():
        if kinds[name] == NONE and words:
            lines.append(f"--{name}: found {found(words[0])}; it takes no value")
        if kinds[name] != NONE and not any(words):
            lines.append(f"--{name}: no value found")
    return lines


def choice_problems(flag: str, word: str, known: Iterable[str]) -> list[str]:
    """A line if a word is not among the known ones, with the nearest of them."""
    names = list(known)
    legal = f"allowed: {', '.join(names)}{did_you_mean(word, names)}"
    return [] if word in names else [f"--{flag}: found {found(word)}; {legal}"]


def did_you_mean(word: object, names: Sequence[str]) -> str:
    """'; did you mean NAME?' with the nearest of the names, or ''."""
    near = difflib.get_close_matches(word.lower(), names, 1) if isinstance(word, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def decimal_point(word: object) -> str:
    """'; write 0.1' for a number with a decimal comma, or ''."""
    comma = isinstance(word, str) and re.fullmatch(r"\s*[+-]?\d*,\d+(e[+-]?\d+)?\s*", word, re.I)
    return f"; write {word.strip().replace(',', '.')}" if comma and isinstance(word, str) else ""


def found(value: object) -> str:
    """A wrong value as a message shows it."""
    return shorten(repr(value))


def shorten(text: str) -> str:
    """One line of at most 60 printable characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 60 else text[:57] + "..."


BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True)
BOOLEANS |= dict.fromkeys(("false", "0", "no", "off"), False)


def value_of(kind: str, words: Sequence[str]) -> Any:
    """Parse the words after a flag, such as ['8,16', '32']; ValueError if they are no value.

    ``kind`` is the annotated type: 'bool' (True without a word), 'str', 'int', 'float',
    'int | None' or a tuple such as 'tuple[int, ...]'; 'tuple[float, ...] | str' may be a word.
    """
    text = " ".join(words)
    plain = text.strip().lower()
    if kind.startswith("tuple") and kind.endswith(" | str") and plain[:1].isalpha():
        return () if plain == "none" else text
    if kind == "bool" and (plain in BOOLEANS or not words):
        return BOOLEANS[plain] if words else True
    if kind == "bool" or not words:
        raise ValueError
    if kind == "str":
        return text
    if kind == "tuple[str, ...]" and plain not in ("", "none"):
        # Entries separated by commas may hold blanks; without a comma each word is an entry.
        return split_entries(text) if "," in text else tuple(word.strip() for word in words)
    number = float if "float" in kind else int
    if kind.startswith("tuple"):
        entries = re.split(r"[,\s]+", plain.strip("()[], "))
        return () if plain == "none" else tuple(number(entry) for entry in entries if entry)
    return None if plain == "none" and kind.endswith("None") else number(plain)


def format_value(value: object) -> str:
    """A value as on a command line: ``32,64``, ``1e-4``, ``''`` for an empty one."""
    if isinstance(value, list | tuple):
        return join_entries(format_value(entry) for entry in value) or "''"
    if isinstance(value, float):
        power = f"{value:.0e}".replace("e-0", "e-")
        return power if 0 < value < 0.01 and float(power) == value else repr(value)
    return str(value) or "''"
