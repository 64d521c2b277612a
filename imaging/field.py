"""The field: the part of an image that counts. What is cut off its edges is no micrograph."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.files import DataError

Array = NDArray[Any]
SMALLEST_SIDE = 16  # of what is left, in pixels: the network halves an image three times


class Crop(NamedTuple):
    """Pixels that are cut off the edges of every image of a set, such as a data bar."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __str__(self) -> str:
        """As on a command line: ``0,60,0,0``."""
        return ",".join(map(str, self))

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of what is left of a shape (H, W, ...), 0 where nothing is."""
        height, width = shape[0] - self.top - self.bottom, shape[1] - self.left - self.right
        return max(height, 0), max(width, 0)

    def of(self, pixels: Array) -> Array:
        """What is left of pixels (H, W, ...): a view. DataError if that is too little to use."""
        height, width = self.size(pixels.shape)
        if any(self) and min(height, width) < SMALLEST_SIDE:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(
                f"{size} pixels, of which --crop {self} leaves {width}x{height}; at least "
                f"{SMALLEST_SIDE} a side are needed"
            )
        return pixels[self.top : self.top + height, self.left : self.left + width]

    def back(self, pixels: Array, shape: tuple[int, ...], outside: object) -> Array:
        """Put what ``of`` left, (h, w, ...), back into (H, W, ...), with ``outside`` around it."""
        if pixels.shape[:2] == tuple(shape[:2]):
            return pixels
        whole = np.full((*shape[:2], *pixels.shape[2:]), outside, pixels.dtype)
        self.of(whole)[...] = pixels
        return whole

    def words(self) -> str:
        """For people: ``60 rows at the bottom``."""
        kinds = ("rows at the top", "rows at the bottom", "columns on the left")
        sides = zip(self, (*kinds, "columns on the right"), strict=True)
        return ", ".join(f"{number} {where}" for number, where in sides if number)


def read_crop(words: str) -> Crop:
    """The crop of a text ``top,bottom,left,right``; DataError, one line, for another text."""
    sides = re.fullmatch(r"(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})", words.replace(" ", ""))
    if sides is None:
        raise DataError(f"--crop {words!r}: give four numbers top,bottom,left,right")
    return Crop(*(int(number) for number in sides.groups()))
