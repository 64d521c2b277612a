"""Names of classes, as people write them in other programs, and class ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from utils.files import DataError
from utils.metrics import IGNORED

# Names that mean class 0 and no class, as labelme and QuPath have them, in lower case.
BACKGROUND = ("_background_", "background")
IGNORE = ("__ignore__", "ignore", "ignored", "ignore*")
UNNAMED = "object"  # the class of shapes without a name, where no shape has one
NUMBERED = re.compile(r"(?:class[ _-]?)?(\d{1,3})", re.IGNORECASE)
# What ImageJ's ROI Manager calls a region by its place, and adds to a name that is there already.
AUTOMATIC = re.compile(r"\d{3,}-\d{3,}(?:-\d{3,})?(?:-\d+)?")
COUNTER = re.compile(r"[-_ ]+\d+$")
OF_IMAGEJ = re.compile(r"-\d+$")  # its own, where several regions have one name


def base_name(name: str) -> str:
    """``carbide-12`` -> ``carbide``, what a region was called; '' for an automatic name."""
    name = name.strip()
    if NUMBERED.fullmatch(name):
        return name
    return "" if AUTOMATIC.fullmatch(name) else COUNTER.sub("", name)


def is_numbered(name: str) -> bool:
    """Whether a class is called by its id: ``2``, ``class 2``."""
    return NUMBERED.fullmatch(name.strip()) is not None


class Numbers(NamedTuple):
    """What the numbers behind names of regions mean in a set, all in lower case."""

    series: Collection[str] = ()  # what stands before numbers of which each is a class
    counted: Collection[str] = ()  # all names without their number
    shared: Collection[str] = ()  # names with a number that several regions of a file have


NO_NUMBERS = Numbers()


def numbers_of(files: Iterable[Iterable[str]]) -> Numbers:
    """What the numbers mean in the names of regions, those of each file.

    ``carbide-1`` and ``carbide-2``, each once, count regions of ``carbide``. Each number is a class
    where several regions of a file are called ``phase 1``, and several ``phase 2`` (ImageJ makes of
    them ``phase 2``, ``phase 2-1``, ``phase 2-2``), unless a region is called ``phase``: then its
    name was given once more to a region that had its number already.
    """
    names, shared = set[str](), set[str]()
    for file in files:
        count: Counter[str] = Counter()
        for name in (name.strip().casefold() for name in file):
            names.add(name)
            count.update({name, OF_IMAGEJ.sub("", name)} if not is_numbered(name) else ())
        shared |= {name for name, regions in count.items() if regions > 1 and _series(name)}
    several = Counter(map(_series, shared))
    series = {s for s, count in several.items() if count > 1 and s.rstrip("-_ ") not in names}
    return Numbers(series, {base_name(name) for name in names}, shared)


def class_of_region(name: str, known: Collection[str], numbers: Numbers = NO_NUMBERS) -> str:
    """The class that a region's name means: all of it, or its base name.

    All of it if it is one of those ``known`` (in lower case), or if each number is a class, see
    ``numbers_of``. Of ``carbide-3-1`` both numbers go where ``carbide`` is a class and
    ``carbide-3`` is none.
    """
    name = name.strip()
    if name.casefold() in known or _series(name) in numbers.series:
        return name
    base = base_name(name)
    if base.casefold() in known or _series(base) in numbers.series:
        return base
    both = base_name(base)
    classes = (known, numbers.counted, IGNORE, BACKGROUND)
    return both if both and any(both.casefold() in some for some in classes) else base


def _series(name: str) -> str:
    """``phase `` of ``phase 1``, in lower case; '' of a name without a number."""
    numbered = not AUTOMATIC.fullmatch(name) and not NUMBERED.fullmatch(name)
    return name.rstrip("0123456789").casefold() if numbered and COUNTER.search(name) else ""


def class_names(found: Iterable[str], given: Sequence[str] = ()) -> list[str]:
    """The name of each class, by id, from all names that occur in a set, or those ``given``.

    Class 0 is what nobody drew, or what is named background. If all names are numbers (``2``,
    ``class 2``), these are the ids; otherwise names are numbered from 1 in alphabetical order.
    Shapes without a name are class 1 if no shape has a name. Raises DataError: names and numbers,
    or names and none, are mixed, or a name is not among those given.
    """
    names = {name.strip() for name in found}
    names = {name for name in names if name.casefold() not in (*IGNORE, *BACKGROUND)}
    if given:
        for name in sorted(names):
            class_id(name, given)
        return list(given)
    if "" in names and len(names) > 1:
        others = ", ".join(sorted(names - {""})[:5])
        raise DataError(f"outlines without a class beside others ({others}); give each a class")
    numbers = {name: int(match[1]) for name in names if (match := NUMBERED.fullmatch(name))}
    if numbers and len(numbers) < len(names):
        word, number = min(names - set(numbers)), min(numbers)
        found_both = f"classes {word!r} and {number!r}"
        raise DataError(f"{found_both}: names and numbers are mixed; use one or the other")
    if numbers:
        highest = max(numbers.values())
        if highest >= IGNORED:
            raise DataError(f"class {highest} is no class id (0..{IGNORED - 1}); rename it")
        return [f"class {i}" for i in range(highest + 1)]
    by_name = {name.casefold(): name for name in sorted(names, reverse=True)}  # one spelling
    return ["background", *(by_name[name] or UNNAMED for name in sorted(by_name))]


def class_id(name: str, names: Sequence[str]) -> int:
    """The id of a class by its name; 255 for what is to be ignored. Raises DataError."""
    key = name.strip().casefold()
    if key in IGNORE:
        return IGNORED
    known = [known.strip().casefold() for known in names]
    if key in known:
        return known.index(key)
    if key in BACKGROUND:
        return 0
    if not key and known[1:] == [UNNAMED]:
        return 1
    match = NUMBERED.fullmatch(key)
    if match and int(match[1]) < len(names):
        return int(match[1])
    shown = ", ".join(names)
    raise DataError(f"class {name.strip() or '(none)'!r} is not one of {shown}; correct its name")
