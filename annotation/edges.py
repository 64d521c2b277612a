"""Smooth edges of masks: pixels whose value lies between those of the classes beside them.

Image programs draw smooth lines, resizing mixes neighbours and JPEG blurs. By its value alone, the
edge between black (0) and white (255) would become a rim of the gray class (128). Here the pixels
at an edge get the class of one of their neighbours that are drawn for sure.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

WIDEST = 5  # pixels from a pixel of an edge to what is drawn on both sides of it
MOST_STRAY = 0.1  # of the pixels on edges: others whose value does not lie between those beside
ROUNDING = 2  # levels by which a mixture of two colours may miss the line between them
Bits = NDArray[np.bool_]
Indices = NDArray[np.int64]


def flat(values: NDArray[Any], tolerance: int) -> Bits:
    """Centres (H, W) of 3x3 pixels whose values (H, W, c) differ by no more than ``tolerance``."""
    square, same = np.ones((3, 3), np.uint8), np.ones(values.shape[:2], np.bool_)
    for channel in np.moveaxis(values, 2, 0):
        own = np.pad(channel.astype(np.float64), 1, mode="edge")
        span = cv2.dilate(own, square) - cv2.erode(own, square)
        same &= span[1:-1, 1:-1] <= tolerance
    return same


def solid(nearest: Indices, within: Bits) -> Bits:
    """Pixels (H, W) of squares of 3x3 pixels that have one level: no edge, and no thin line.

    ``nearest`` is the number of each pixel's level, ``within`` whether it is near enough to count.
    Outside the image everything goes on as at its border.
    """
    own = np.pad(np.where(within, nearest, -1).astype(np.float32), 1, mode="edge")
    square = np.ones((3, 3), np.uint8)
    centres = (cv2.erode(own, square) == cv2.dilate(own, square)) & (own >= 0)
    return np.asarray(cv2.dilate(centres.astype(np.uint8), square)[1:-1, 1:-1], np.bool_) & within


def small_parts(given: NDArray[Any]) -> Bits:
    """Pixels (H, W) of parts of a level too thin for a square of 5x5 pixels, or far from one.

    So thin a part of a blurred mask may be the rim between two others, whatever its level.
    """
    own = np.pad(given.astype(np.float32), 2, mode="edge")
    square = np.ones((5, 5), np.uint8)
    centres = (cv2.erode(own, square) == cv2.dilate(own, square))[2:-2, 2:-2]
    small = np.ones(given.shape, np.bool_)
    for level in np.unique(given).tolist():
        here = given == level
        near = cv2.dilate((centres & here).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        small[here & near] = False
    return small


def assign_edges(
    values: NDArray[Any], nearest: Indices, within: Bits, levels: NDArray[Any], tolerance: int
) -> tuple[Indices, Bits]:
    """The level (number, (H, W)) that each pixel belongs to, and the pixels that belong to none.

    Args:
        values: (H, W, c), c = 1 (gray) or 3 (colours).
        nearest: (H, W), number of the level nearest in value.
        within: (H, W), whether that is within the tolerance.
        levels: (L, c), the values of the classes.
        tolerance: largest difference in any channel.

    A pixel is of an edge if its value lies between two levels that are drawn within 5 pixels of it
    (or fewer: the fewest that will do); it gets the nearer of these levels. A thin line within the
    tolerance of its level stays what it is unless it could be the edge between two others. A patch
    of 3x3 pixels of one value that is no level is no edge. Gaps and tips too thin to reach their
    level get the nearest level, if they are a tenth of the edges at most.
    """
    result = nearest.copy()
    patches = (flat(values, tolerance) & ~within).astype(np.uint8)
    strange = cv2.dilate(patches, np.ones((3, 3), np.uint8)).astype(np.bool_) & ~within
    sure = solid(nearest, within)

    def settle(pixels: Bits) -> Bits:
        """Give those that lie on an edge their level; the others."""
        rows, columns = np.nonzero(pixels)
        drawn = np.where(sure, nearest, -1)
        found = _between(values[rows, columns], rows, columns, drawn, levels, tolerance)
        explained, others = found >= 0, np.zeros_like(pixels)
        result[rows[explained], columns[explained]] = found[explained]
        others[rows[~explained], columns[~explained]] = True
        return others

    # First thin lines, then what has no level: it may lie beside a thin line that is one. A line
    # is brighter or darker than both of its sides; on a slope lies the rim of something small.
    lines = settle(within & ~sure)
    slope = _on_slope(values, tolerance)
    sure |= lines & ~slope
    still = settle(~within & ~strange | lines & slope) & ~within
    edges = ~within & ~strange & ~still
    stray = still.sum() > MOST_STRAY * edges.sum()
    return result, strange | still if stray else strange


def _on_slope(values: NDArray[Any], tolerance: int) -> Bits:
    """Pixels (H, W) that have brighter and darker ones in one channel among their 8 neighbours."""
    square, found = np.ones((3, 3), np.uint8), np.zeros(values.shape[:2], np.bool_)
    for channel in np.moveaxis(values, 2, 0):
        own = np.pad(channel.astype(np.float64), 1, mode="edge")
        brighter = (cv2.dilate(own, square) - own)[1:-1, 1:-1] > tolerance
        found |= brighter & ((own - cv2.erode(own, square))[1:-1, 1:-1] > tolerance)
    return found


def _between(
    values: NDArray[Any],
    rows: Indices,
    columns: Indices,
    drawn: Indices,
    levels: NDArray[Any],
    tolerance: int,
) -> Indices:
    """For pixels with values (N, c): the nearer of two levels drawn beside them, or -1.

    ``drawn`` (H, W) is the number of the level that a pixel surely has, or -1.
    """
    found = np.full(len(rows), -1)
    used = np.unique(drawn[drawn >= 0])
    used = used[levels[used].min(axis=1, initial=0) >= 0]  # below 0 are no levels of a picture
    if len(used) < 2 or not len(rows):
        return found
    own = levels[used].astype(np.float64)  # (K, c)
    distance = np.abs(values[:, None] - own[None]).max(axis=2)  # (N, K)
    pairs = [(i, j) for i in range(len(used)) for j in range(i)]
    lies = {
        pair: _on_line(values, own[pair[0]], own[pair[1]], max(tolerance, ROUNDING))
        for pair in pairs
    }
    for reach in range(1, WIDEST + 1):
        square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
        near = np.stack(
            [
                cv2.dilate((drawn == k).astype(np.uint8), square)[rows, columns] > 0
                for k in used.tolist()
            ],
            axis=1,
        )  # (N, K)
        ends = np.zeros_like(near)  # levels that the value lies between
        for (i, j), between in lies.items():
            both = near[:, i] & near[:, j] & between
            ends[both, i] = ends[both, j] = True
        new = (found < 0) & ends.any(axis=1)
        best = np.where(ends, distance, np.inf).argmin(axis=1)
        found[new] = used[best[new]]
    return found


def _on_line(values: NDArray[Any], one: NDArray[Any], other: NDArray[Any], width: int) -> Bits:
    """Whether values (N, c) lie between two levels (c,), but for ``width`` in each channel."""
    span = other - one
    along = np.clip((values - one) @ span / max(1.0, float(span @ span)), 0, 1)
    return np.asarray(np.abs(values - one - along[:, None] * span).max(axis=1) <= width)
