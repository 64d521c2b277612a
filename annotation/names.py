"""Names of classes, as people write them in other programs, and class ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

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


def series_of_classes(names: Iterable[str]) -> set[str]:
    """What stands before the number in names of regions of which each number is a class.

    ``phase `` where several regions are called ``phase 1`` (ImageJ makes of them ``phase 1``,
    ``phase 1-1``, ``phase 1-2``): such a number counts no regions. ``carbide-1`` and ``carbide-2``,
    each once, count regions of ``carbide``.
    """
    count: Counter[str] = Counter()
    for name in (name.strip().casefold() for name in names):
        count.update({name, OF_IMAGEJ.sub("", name)} if not NUMBERED.fullmatch(name) else ())
    return {_series(name) for name, regions in count.items() if regions > 1} - {""}


def class_of_region(name: str, known: Collection[str], series: Collection[str] = ()) -> str:
    """The class that a region's name means: all of it, or its base name.

    All of it if it is one of those ``known`` (in lower case), or if it is of the ``series`` of
    which each number is a class, see ``series_of_classes``.
    """
    name = name.strip()
    whole = name.casefold() in known or _series(name) in series
    return name if whole else base_name(name)


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
