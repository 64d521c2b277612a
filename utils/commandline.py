"""A script's own flags, told apart from those of the settings that it passes on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
