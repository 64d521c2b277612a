"""Whether one picture is another, or is cut out of it: found by the pixels, whatever the names.

A network's agreement with labels that it learnt is a fit, not a score, under any file name. Tiles
that overlap in part, as neighbours of one micrograph do, are not cut out of one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
PROBE = 24  # pixels in a row by which a place is found


def parts_of(small: Sequence[Pixels], large: Sequence[Pixels]) -> dict[int, int]:
    """For each picture of ``small`` that lies whole in one of ``large``: its number and that one's.

    Pictures are uint8, (H, W) or (H, W, 3); gray ones may be saved as colours. Equal pixels count,
    neither turned nor mirrored. A picture of a single gray level is part of none.
    """
    wholes = [as_gray(pixels) for pixels in large]
    found = {}
    for number, pixels in enumerate(small):
        part = as_gray(pixels)
        if part.min(initial=255) == part.max(initial=0):
            continue
        hits = (which for which, whole in enumerate(wholes) if is_part(part, whole))
        if (first := next(hits, None)) is not None:
            found[number] = first
    return found


def as_gray(pixels: Pixels) -> Pixels:
    """Gray levels (H, W) of a picture; of colours the green channel, which decides nothing else."""
    return np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[..., 1])


def is_part(part: Pixels, whole: Pixels) -> bool:
    """Whether the pixels (h, w) lie side by side somewhere in (H, W)."""
    (height, width), (rows, columns) = part.shape, whole.shape
    if height > rows or width > columns:
        return False
    if part.shape == whole.shape:
        return bool((part == whole).all())
    return any(
        (whole[top : top + height, left : left + width] == part).all()
        for top, left in _places(part, whole)
    )


def _places(part: Pixels, whole: Pixels) -> Iterator[tuple[int, int]]:
    """Where the part may begin: where the most uneven of its pixels in a row are found."""
    (height, width), (rows, columns) = part.shape, whole.shape
    length = min(PROBE, width)
    starts = range(0, width - length + 1, length)
    rough = [(part[:, s : s + length].std(axis=1), s) for s in starts]
    _, row, start = max((float(std.max()), int(std.argmax()), s) for std, s in rough)
    probe, text = part[row, start : start + length].tobytes(), whole.tobytes()
    at = text.find(probe)
    while at >= 0:
        top, left = at // columns - row, at % columns - start
        if 0 <= top <= rows - height and 0 <= left <= columns - width:
            yield top, left
        at = text.find(probe, at + 1)
