"""Settings as fields of a dataclass: their rules, conversion, page of help and table.

It knows no setting: those, with their meaning, stand in ``config.py``.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from utils.commandline import decimal_point, did_you_mean, format_value

COMPARISONS = {"at least": ge, "above": gt, "at most": le, "below": lt}
OR_WORD = " | str"  # in the type of a setting that takes numbers, or a word of its choices instead
Fields = Mapping[str, "dataclasses.Field[Any]"]


def between(low: float, high: float) -> dict[str, float]:
    """Inclusive bounds."""
    return {"at least": low, "at most": high}


@dataclass(frozen=True)
class Rules:
    """The meaning and the legal values of a setting."""

    group: str  # heading in --help
    help: str  # one sentence without a full stop
    decides: str = ""  # the stages whose result it decides
    unit: str = ""
    source: str = "published program"  # of the default
    published: str = ""  # its name in the published program, if different
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of each entry
    choices: Sequence[str] = ()  # all legal texts
    pattern: str = ""  # regular expression of the legal texts, if there are no choices
    allowed: str = ""  # the legal values in words, if limits and choices do not say it


def group(title: str, decides: str = "") -> Callable[..., Any]:
    """A maker of settings below a heading: dataclass fields with their ``Rules``.

    ``decides`` is that of settings that do not say otherwise.
    """

    def setting(default: Any, meaning: str, **own: Any) -> Any:
        rules = Rules(title, meaning, **{"decides": decides, **own})
        return dataclasses.field(default=default, metadata=vars(rules))

    return setting


def convert(kind: str, rules: Mapping[str, Any], value: Any) -> Any:
    """The value in its setting's type; ValueError, TypeError or OverflowError if illegal."""
    kind, word, _ = kind.partition(OR_WORD)
    if word and isinstance(value, str):
        kind = "str"
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple):
            raise TypeError
        entry = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(convert(entry, rules, each) for each in value)
    if kind == "str":
        text = os.fspath(value)
        pattern = rules["pattern"] or "|".join(rules["choices"])
        if not isinstance(text, str) or not re.fullmatch(pattern, text):
            raise ValueError
        return text
    if value is None and kind.endswith("None"):
        return None
    if isinstance(value, bool) != (kind == "bool"):
        raise TypeError
    if kind == "bool":
        return value
    if not isinstance(value, numbers.Real if kind == "float" else numbers.Integral):
        raise TypeError
    make: Any = float if kind == "float" else int
    number = make(value)
    inside = all(COMPARISONS[word](number, bound) for word, bound in rules["limits"].items())
    if not math.isfinite(number) or not inside:
        raise ValueError
    return number


def allowed_values(field: dataclasses.Field[Any]) -> str:
    """The legal values of a setting in words."""
    rules, (kind, word, _) = field.metadata, str(field.type).partition(OR_WORD)
    choices = ("True or False",) if kind == "bool" else rules["choices"]
    if rules["allowed"] or (choices and not word):
        return str(rules["allowed"] or ", ".join(choices))
    bounds = " and ".join(f"{word} {bound}" for word, bound in rules["limits"].items())
    number = "whole number" if "int" in kind else "number"
    if kind.startswith("tuple"):
        return f"{number}s, each {bounds}" + (f"; or {', '.join(choices)}" if word else "")
    return f"{'None or ' if kind.endswith('None') else ''}a {number} {bounds}"


def meant_value(field: dataclasses.Field[Any], value: object) -> str:
    """'; did you mean TEXT?' or '; write 0.1' of a wrong value that is near a legal one, or ''."""
    number = decimal_point(value) if str(field.type).startswith("float") else ""
    return did_you_mean(value, field.metadata["choices"]) + number


def settings_help(
    fields: Fields, defaults: Mapping[str, Any] | None = None, left_out: Collection[str] = ()
) -> str:
    """The settings by group for ``--help``, with a script's own ``defaults``."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 100)
    lines: list[str] = []
    for name, field in fields.items():
        rules, kind = field.metadata, str(field.type)
        if f"{rules['group']}:" not in lines:
            lines += ["", f"{rules['group']}:"]
        if name in left_out:
            continue
        sign = {"str": "TEXT", "bool": "BOOL", "tuple[str, ...]": "TEXT,.."}.get(kind, "N")
        sign = "N,N,.." if kind.startswith("tuple") and sign == "N" else sign
        unit = f"{rules['unit']}, " if rules["unit"] else ""
        default = format_value((defaults or {}).get(name, field.default))
        text = f"{rules['help']} [{unit}default {default}]"
        flag, margin = f"  --{name} {sign}".ljust(27), " " * 27
        if len(flag) > len(margin):
            lines.append(flag)
            flag = margin
        lines += textwrap.wrap(text, width, initial_indent=flag, subsequent_indent=margin)
    note = ["BOOL is True or False; the flag alone means True.",
            "-name works like --name, and - in a name like _."]  # fmt: skip
    return "\n".join([*lines[1:], "", *note, ""])


def settings_table(fields: Fields) -> str:
    """All settings as a Markdown table: setting, default, unit, meaning, source."""
    lines = ["| setting | default | unit | meaning | source |", "|---|---|---|---|---|"]
    for name, field in fields.items():
        rules, heading = field.metadata, f"| **{field.metadata['group']}** | | | | |"
        lines += [] if heading in lines else [heading]
        source = rules["source"] + (f", `{rules['published']}`" if rules["published"] else "")
        meaning = rules["help"].replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
        cells = [f"`{name}`", f"`{format_value(field.default)}`", rules["unit"], meaning, source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
