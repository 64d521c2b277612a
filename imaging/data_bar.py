"""Data bars: the strip with scale bar and text that microscopes print at an edge of an image.

A bar is a strip of one gray level, the paper, with or without print on it. Nobody's micrograph
has rows of one level: noise and texture are everywhere. Where a surface is saturated, its rows are
of one level too, but it does not end at once along the whole edge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from imaging.field import Crop
from imaging.listing import some_names

Array = NDArray[Any]

NEAR = 6  # gray levels: a pixel so near the paper's level is paper (JPEG blurs print)
CLEAN = 2  # gray levels: so near to it are the pixels of a row without print
# Of the pixels of a row of paper that are so near to its level, the share that is CLEAN, at least.
# Texture around that level is spread evenly there: 5 of 13 gray levels, 0.38.
PURE = 0.6
FLAT = 0.8  # share of such pixels in it, at least: JPEG leaves traces of print around it
INK = 40  # gray levels: print is so far from its paper, at least
BLURRED = 0.7  # share of what is no paper and may be nearer than ink, at most
MARGIN = 0.7  # share of paper in one of the last rows: print seldom touches the image
PRINTED = 0.30  # share of paper in a row with print, at least
OUTSIDE = 0.35  # share of the paper's level in the rows beyond the bar, at most
LARGEST = 0.35  # of the image's side
SMALLEST_PX = 6
FEWEST = 2  # rows without print, at least
RULE_PX = 4  # width of a frame or rule printed along the bar


class Bar(NamedTuple):
    """A data bar: at which edge (top, bottom, left, right), and its height or width in pixels."""

    edge: str
    pixels: int

    @property
    def words(self) -> str:
        """For people: ``60 rows at the bottom``."""
        return self.crop.words()

    @property
    def crop(self) -> Crop:
        """What cuts it off."""
        return Crop(**{self.edge: self.pixels})


def find_bars(image: Array) -> list[Bar]:
    """The data bars of an image, uint8 (H, W) or (H, W, 3), at most one at each edge."""
    gray = image if image.ndim == 2 else _gray(image)
    sides = {"bottom": gray[::-1], "top": gray, "right": gray[:, ::-1].T, "left": gray.T}
    bars = [Bar(edge, bar_height(rows)) for edge, rows in sides.items()]
    return [bar for bar in bars if bar.pixels]


def _gray(image: Array) -> Array:
    """The mean of the channels, rounded down: uint8 (H, W, c) to (H, W).

    Numpy's mean would take eight bytes a pixel. OpenCV rounds to the nearest number; with the half
    of what the remainders may be taken off, that is the number below.
    """
    channels = image.shape[2]
    weights = [*[1 / channels] * channels, -(channels - 1) / (2 * channels)]
    return np.asarray(cv2.transform(image, np.array([weights])))


def bar_lines(
    found: Mapping[Path, Sequence[Bar]], crop: Crop | None = None, uncut: Collection[Path] = ()
) -> list[str]:
    """Warnings on images with data bars, a line for each kind of bar, with the crop that cures it.

    ``crop`` is what was cut off already, of all but images that are ``uncut``.
    """
    alike: defaultdict[tuple[Crop, Crop], list[Path]] = defaultdict(list)
    for path, bars in found.items():
        if bars:
            own = dict(bars)
            cut = Crop() if path in uncut else crop or Crop()
            alike[Crop(**own), cut].append(path)
    lines = []
    for (bar, cut), paths in alike.items():
        cure = Crop(*(a + b for a, b in zip(bar, cut, strict=True)))
        names = some_names(path.name for path in paths)
        count = f"{len(paths)} image(s) with a data bar that is not cut off"
        lines.append(f"{count} ({bar.words()}): {names}; give --crop {cure}")
    return lines


def bar_height(rows: Array) -> int:
    """How many of the first rows of a gray picture, uint8 (H, W), are a data bar; 0: none."""
    most = int(len(rows) * LARGEST)
    if most < SMALLEST_PX or rows.shape[1] < 16:
        return 0
    for level in _levels(rows[: max(SMALLEST_PX, most // 8)]):
        height = _height(rows, level, most)
        if height:
            return height
    return 0


def _levels(first: Array) -> list[int]:
    """The gray levels that the first rows may have as paper: those that fill a whole row."""
    rows = np.ascontiguousarray(first).astype(np.int16)
    levels = np.median(rows, axis=1).astype(np.int16)
    whole = (np.abs(rows - levels[:, None]) <= CLEAN).mean(axis=1) >= FLAT
    found: list[int] = []
    for level in levels[whole].tolist():
        if all(abs(level - other) > NEAR for other in found):
            found.append(level)
    return found


def _height(rows: Array, level: int, most: int) -> int:
    """The height of a bar with this level as paper, up to ``most``; 0: there is none."""
    off = np.abs(rows[: most + 3 * RULE_PX].astype(np.int16) - level)
    near, exact = ((off <= most_off).mean(axis=1) for most_off in (NEAR, CLEAN))  # (rows,)
    paper = np.where(exact >= PURE * near, near, exact)  # rows of texture have little
    height = gap = 0
    for number, share in enumerate(paper.tolist()):
        if share >= PRINTED:
            height, gap = number + 1, 0
        elif (gap := gap + 1) > RULE_PX:
            break
    beyond = exact[height : height + 2 * RULE_PX]
    if not SMALLEST_PX <= height <= most or not len(beyond):
        return 0
    clean = exact[:height] >= FLAT
    ends_at_once = beyond.max() <= OUTSIDE and paper[height - RULE_PX - 1 : height].max() >= MARGIN
    enough = np.count_nonzero(clean) >= max(FEWEST, height // 8)
    if not (ends_at_once and enough and _has_texture(rows[height : height + 2 * RULE_PX])):
        return 0
    return height if _is_print(off[:height][~clean]) else 0


def _has_texture(rows: Array) -> bool:
    """Whether the rows beyond the bar are not of one level; of a frame some may be."""
    off = np.abs(rows.astype(np.int16) - np.median(rows, axis=1, keepdims=True))
    return bool(((off <= CLEAN).mean(axis=1) < FLAT).mean() >= 0.5)


def _is_print(off: Array) -> bool:
    """Whether rows (n, W), as distances from the paper's level, hold print and no texture."""
    if not off.size:
        return True
    between = np.count_nonzero((off > NEAR) & (off < INK))
    return bool(between <= BLURRED * np.count_nonzero(off > NEAR))
