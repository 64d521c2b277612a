"""Whether one picture is another, or is cut out of it: found by the pixels, whatever the names.

A network's agreement with labels that it learnt is a fit, not a score, under any file name. Tiles
that overlap in part, as neighbours of one micrograph do, are not cut out of one another.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
PROBE = 24  # pixels in a row by which a place is found


def parts_of(small: Iterable[Pixels], large: Iterable[Pixels]) -> dict[int, int]:
    """For each picture of ``small`` that lies whole in one of ``large``: its number and that one's.

    Pictures are uint8, (H, W) or (H, W, 3); gray ones may be saved as colours. Equal pixels count,
    neither turned nor mirrored; of several wholes the first is named. A picture of a single gray
    level is part of none. ``large`` may be thousands: one after the other is read, none is kept.
    """
    grays = enumerate(map(as_gray, small))
    left = {n: Part(gray) for n, gray in grays if gray.min(initial=255) != gray.max(initial=0)}
    found: dict[int, int] = {}
    for which, pixels in enumerate(large if left else ()):
        whole = Whole(as_gray(pixels))
        found |= {number: which for number, part in left.items() if part.lies_in(whole)}
        left = {number: part for number, part in left.items() if number not in found}
        if not left:
            break
    return dict(sorted(found.items()))


def as_gray(pixels: Pixels) -> Pixels:
    """Gray levels (H, W) of a picture; of colours the green channel, which decides nothing else."""
    return np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[..., 1])


class Whole:
    """A picture (H, W) that others may lie in; what each of them asks is worked out once."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    @cached_property
    def digest(self) -> int:
        """A checksum of its pixels: others have another one, but for rare chances."""
        return zlib.crc32(self.pixels.data)

    @cached_property
    def text(self) -> bytes:
        """Its rows, one after the other."""
        return self.pixels.tobytes()


class Part(Whole):
    """A picture (h, w) that is looked for in others."""

    def lies_in(self, whole: Whole) -> bool:
        """Whether its pixels lie side by side somewhere in another picture."""
        (height, width), (rows, columns) = self.pixels.shape, whole.pixels.shape
        if height > rows or width > columns:
            return False
        if self.pixels.shape == whole.pixels.shape:  # as in most sets, so this has to be fast
            return self.digest == whole.digest and bool((self.pixels == whole.pixels).all())
        return any(
            (whole.pixels[top : top + height, left : left + width] == self.pixels).all()
            for top, left in self._places(whole)
        )

    @cached_property
    def probe(self) -> tuple[int, int, bytes]:
        """Row, column and values of the most uneven of its pixels in a row."""
        width = self.pixels.shape[1]
        length = min(PROBE, width)
        starts = range(0, width - length + 1, length)
        rough = [(self.pixels[:, s : s + length].std(axis=1), s) for s in starts]
        _, row, start = max((float(std.max()), int(std.argmax()), s) for std, s in rough)
        return row, start, self.pixels[row, start : start + length].tobytes()

    def _places(self, whole: Whole) -> Iterator[tuple[int, int]]:
        """Where in another picture it may begin: where its probe is found."""
        (height, width), (rows, columns) = self.pixels.shape, whole.pixels.shape
        row, start, probe = self.probe
        at = whole.text.find(probe)
        while at >= 0:
            top, left = at // columns - row, at % columns - start
            if 0 <= top <= rows - height and 0 <= left <= columns - width:
                yield top, left
            at = whole.text.find(probe, at + 1)
