"""Which slice of a stack an outline was drawn on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from utils.files import DataError

AXES = ("slice", "channel", "z", "t")
CURE = "save one file for each, named as its image (page 2 of s7.tif: s7-p2)"


class Plane(NamedTuple):
    """A place in a stack, counted from 1; 0 where a file tells none.

    Of a plain stack ImageJ tells the ``slice``, which is the page of the image's file. Of a stack
    of more axes it tells the others, and so does QuPath: which page that is depends on the image.
    """

    slice: int = 0
    channel: int = 0
    z: int = 0
    t: int = 0

    def __str__(self) -> str:
        told = zip(AXES, self, strict=True)
        return " ".join(f"{axis} {value}" for axis, value in told if value) or "no slice"


def check_one(planes: Iterable[Plane], where: object) -> None:
    """DataError if outlines of one image lie on several slices; ``where`` is their file."""
    found = sorted(set(planes))
    if any(len({value for value in axis if value}) > 1 for axis in zip(*found, strict=True)):
        raise DataError(f"{where}: outlines on several slices ({_some(found)}); {CURE}")


def slices_of(planes: Iterable[Plane], where: object) -> set[int]:
    """The pages of a stack that outlines lie on, none if they tell none; DataError if in doubt."""
    found = sorted(set(planes))
    own = {plane.slice for plane in found if plane.slice}
    if any(max(plane[1:]) > 1 for plane in found):
        what = "" if len(found) > 1 else "; which page that is the file does not tell"
        raise DataError(f"{where}: outlines on {_some(found)}{what}; {CURE}")
    if own and not all(plane.slice for plane in found):
        what = f"{where}: outlines without a slice beside others on {_some(found[1:])}"
        raise DataError(f"{what}; give each its slice (Properties..., Position), or {CURE}")
    return own


def _some(planes: list[Plane]) -> str:
    more = f" and {len(planes) - 5} more" if len(planes) > 5 else ""
    return ", ".join(map(str, planes[:5])) + more
