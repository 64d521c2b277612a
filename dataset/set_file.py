"""``set.json``: what the maker of a set knew, so that no later command has to be told again.

``dataset/prepare.py`` writes it; a set that was laid out by hand may have one too. Every entry may
be missing. A flag beats the set, the set beats what a checkpoint says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import FIELDS, Config, ConfigError
from imaging.field import Crop, read_crop
from imaging.gray_range import GrayRange, conversion_of
from imaging.listing import SPLIT
from imaging.pixel_size import POSSIBLE, is_possible
from utils.commandline import MANY, NONE, ONE, did_you_mean, format_value, found, split_flags
from utils.files import DataError, replace_file, special_kind

NAME = "set.json"
SETTINGS = ("num_classes", "ignore_label", "class_names", "class_colours")  # of ``Config``
LARGEST = 64 * 2**20  # bytes of a file that is read
CURE = "correct it, or make the set again"

Gray = GrayRange | None


@dataclass(frozen=True)
class SetFile:
    """The contents of ``set.json``; what is not known is None or empty."""

    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    class_colours: tuple[str, ...] = ()
    ignore_label: int | None = None  # value of unlabelled mask pixels
    palette: str = ""  # which values of the user's masks became which class, as of --palette
    crop: Crop = Crop()  # what was cut off the user's images
    cropped_sizes: tuple[tuple[int, int], ...] = ()  # height, width of images after the crop
    gray_range: Gray = None  # which values became 0 and 255; None: all images had 8 bits
    um_per_px: float | Mapping[str, float] | None = None  # of all images, or by their names

    def settings(self) -> dict[str, Any]:
        """What it says of the settings of a run."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps for prediction, besides the settings of its run."""
        scales = self.scales()
        return {
            "crop": list(self.crop),
            "cropped_sizes": [list(size) for size in self.cropped_sizes],
            "um_per_px": [scales[0], scales[-1]] if scales else None,
        }

    def scales(self) -> list[float]:
        """The different micrometres per pixel of the set's images, in order."""
        if self.um_per_px is None:
            return []
        if isinstance(self.um_per_px, Mapping):
            return sorted(set(self.um_per_px.values()))
        return [self.um_per_px]

    def scale_of(self, name: str) -> float | None:
        """Micrometres per pixel of the image with this file name, None if that is not known."""
        return self.um_per_px.get(name) if isinstance(self.um_per_px, Mapping) else self.um_per_px

    def to_text(self) -> str:
        """The file's text: JSON, an entry a line."""
        known: dict[str, Any] = {"num_classes": self.num_classes}
        for name in ("class_names", "class_colours"):
            known |= {name: list(getattr(self, name))} if getattr(self, name) else {}
        known["ignore_label"] = self.ignore_label
        known |= {"palette": self.palette} if self.palette else {}
        if any(self.crop):
            known["crop"] = str(self.crop)
            known["cropped_sizes"] = [f"{w}x{h}" for h, w in self.cropped_sizes]
        known |= {"gray_range": self.gray_range.saved()} if self.gray_range else {}
        if self.um_per_px:
            known["um_per_px"] = self.um_per_px
        lines = (f"{json.dumps(n)}: {json.dumps(v, ensure_ascii=False)}" for n, v in known.items())
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    def write(self, folder: Path, flag: str = "--out") -> None:
        """Write it into a set's folder, as a whole; UserError if that cannot be done."""
        replace_file(folder / NAME, self.to_text(), flag)


def read_set_file(folder: str | Path) -> SetFile | None:
    """What ``set.json`` in a set's folder says; None if there is none.

    Raises DataError, a line for each thing in it that cannot be so.
    """
    path = Path(folder) / NAME
    if not os.path.lexists(path):
        return None
    if kind := special_kind(path):
        raise DataError(f"{path}: {kind}, not a file; remove it")
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: larger than {LARGEST // 2**20} MB; {CURE}")
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=_each_once)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {CURE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise DataError(f"{path}: no JSON ({where}); {CURE}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; {CURE}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: found {found(values)}; it holds names with their values; {CURE}")
    return _checked(path, values)


def set_of(path: Path) -> SetFile | None:
    """The ``set.json`` of the set that a folder or file of images belongs to; None if of none.

    Those of a set lie in its own folders: raw images beside these are not cut, and have no scale.
    """
    real = path.resolve()
    for folder in [real, *real.parents][:4]:  # <set>/test_numf/img/a.png
        if os.path.lexists(folder / NAME):
            below = real.relative_to(folder).parts
            return read_set_file(folder) if not below or SPLIT.fullmatch(below[0]) else None
    return None


def scale_by_set(images: Path) -> Callable[[str], float | None]:
    """What the set of these images says of a pixel's size in µm, by an image's file name."""
    known = set_of(images)
    return known.scale_of if known else lambda name: None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands in it twice")
    return dict(pairs)


def _checked(path: Path, values: dict[str, Any]) -> SetFile:
    """The SetFile of the file's values; DataError, a line for each wrong one."""
    known = [each.name for each in dataclasses.fields(SetFile)]
    problems = [
        f"unknown entry {found(name)}{did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
        for name in values
        if name not in known
    ]
    clean: dict[str, Any] = {}
    settings = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    try:
        config = Config(**settings)  # its own rules
        clean |= {name: getattr(config, name) for name in settings}
    except ConfigError as error:
        problems += str(error).splitlines()
    readers = {"crop": _crop, "cropped_sizes": _sizes, "gray_range": _gray, "um_per_px": _scales}
    for name, read in readers.items():
        try:
            clean |= {name: read(values[name])} if values.get(name) is not None else {}
        except (DataError, ValueError, TypeError) as error:
            problems.append(f"{name}: found {found(values[name])}; {error}")
    if not isinstance(values.get("palette", ""), str):
        problems.append(f"palette: found {found(values['palette'])}; give it as text")
    clean["palette"] = values.get("palette", "")
    if problems:
        raise DataError("\n".join(f"{path}: {line}" for line in problems))
    return SetFile(**clean)


def _crop(value: object) -> Crop:
    if not isinstance(value, str):
        raise ValueError("give a text top,bottom,left,right")
    return read_crop(value)


def _sizes(value: object) -> tuple[tuple[int, int], ...]:
    """Height and width of each text ``WIDTHxHEIGHT``."""
    if not isinstance(value, list):
        raise ValueError('give a list such as ["1280x960"]')
    pairs = []
    for text in value:
        width, cross, height = str(text).partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise ValueError('give sizes such as ["1280x960"]')
        pairs.append((int(height), int(width)))
    return tuple(pairs)


def _gray(value: object) -> Gray:
    conversion = conversion_of(value)
    if not isinstance(conversion, GrayRange):
        raise ValueError("give two numbers, [low, high]")
    return conversion


def _scales(value: object) -> float | Mapping[str, float]:
    """One number for all images, or one for each name."""
    if not isinstance(value, dict):
        return _scale(value)
    return {name: _scale(each) for name, each in value.items()}


def _scale(value: object) -> float:
    if type(value) not in (int, float) or not is_possible(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"give micrometres per pixel, {POSSIBLE}, or one for each name")
    return float(value)  # type: ignore[arg-type]


class SetDefaults:
    """What the set of a command line says where neither a flag nor a script's default does.

    ``argv`` are the words (None: sys.argv), ``defaults`` a script's own settings; ``values`` are
    more defaults, for ``config.parse_config``. Raises DataError if ``set.json`` is wrong.
    """

    def __init__(self, argv: Sequence[str] | None, defaults: Mapping[str, Any]) -> None:
        words = sys.argv[1:] if argv is None else argv
        kinds = {n: MANY if str(f.type).startswith("tuple") else ONE for n, f in FIELDS.items()}
        flags = split_flags(words, kinds | {"h": NONE, "help": NONE})
        folder = flags.one("data_dir", str(defaults.get("data_dir", FIELDS["data_dir"].default)))
        self.flags = {*flags.own}  # settings that the command line names
        self.path, self.given = Path(folder) / NAME, self.flags | {*defaults}
        known = None if {"h", "help"} & flags.own.keys() else read_set_file(folder)
        self.says = known.settings() if known else {}
        classes = defaults.get("num_classes", self.says.get("num_classes"))
        with suppress(ValueError):  # which parse_config reports
            classes = int(flags.one("num_classes", str(classes)))
        self.values = {
            name: value
            for name, value in self.says.items()
            if name not in self.given and _fits(name, value, classes)
        }

    def lines(self, config: Config) -> list[str]:
        """What was taken from the set, and a warning for each value that differs from it."""
        taken = [
            f"{name} {format_value(value)}"
            for name, value in self.values.items()
            if value != FIELDS[name].default
        ]
        lines = [f"From {self.path}: {', '.join(taken)}"] if taken else []
        for name, value in self.says.items():
            own = getattr(config, name)
            if name in self.given and own != value:
                said = f"--{name} {format_value(own)} where {self.path} says {format_value(value)}"
                lines.append(f"Warning: {said}; {format_value(own)} is used")
        return lines


def _fits(name: str, value: Any, classes: object) -> bool:
    """Whether what a set says can be taken where a flag gives another number of classes."""
    if name == "num_classes" or not isinstance(classes, int):
        return True
    return bool(value >= classes) if name == "ignore_label" else len(value) == classes
