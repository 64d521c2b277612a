"""Shapes drawn on an image, and which pixels they cover.

Coordinates are x to the right and y down, in pixels, and (0, 0) is the upper left corner of the
first pixel, so that the pixel in row r and column c is the square from (c, r) to (c + 1, r + 1).
**A pixel belongs to a shape if its centre (c + 0.5, r + 0.5) lies within.** A centre on an outline
belongs to the shape on its right or, on a horizontal line, below it: shapes that share an outline
cover each pixel once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annotation.planes import Plane
from utils.files import DataError
from utils.metrics import IGNORED

Points = NDArray[np.float64]  # (N, 2): x, y
Bits = NDArray[np.bool_]
FARTHEST = 1e7  # coordinate; what is computed from it stays exact enough
MOST_ROWS = 2**21  # that edges cross, counted at once: a ring of a few megabytes crosses billions
MOST_BANDS, MOST_ENTRIES = 4096, 2**26  # of rows, in which the edges of rings are looked up


class Patch(NamedTuple):
    """The pixels of a shape: a rectangle of the image, true where the shape is."""

    top: int
    left: int
    bits: Bits


@dataclass(frozen=True)
class Polygon:
    """What closed lines enclose: a centre is within if it lies inside an odd number of them."""

    rings: tuple[Points, ...]

    def patch(self, size: tuple[int, int]) -> Patch:
        """Its pixels in an image of ``size`` (H, W)."""
        top, left, height, width = _bounds(np.concatenate(self.rings), size)
        switches = np.zeros(height * (width + 1), np.int64)
        for ring in self.rings:
            switches += _crossings(ring, top, left, height, width)
        inside = switches.reshape(height, width + 1)[:, :width].cumsum(axis=1) % 2
        return Patch(top, left, inside.astype(np.bool_))


@dataclass(frozen=True)
class Stroke:
    """Lines of a width: centres no farther from them than half of it, and what a point lies in."""

    lines: tuple[Points, ...]
    width: float

    def patch(self, size: tuple[int, int]) -> Patch:
        """Its pixels in an image of ``size`` (H, W)."""
        half = self.width / 2
        every = np.concatenate(self.lines)
        box = np.concatenate([every - half - 1, every + half + 1])
        top, left, height, width = _bounds(box, size)
        bits = np.zeros((height, width), np.bool_)
        for line in self.lines:
            ends = line[1:] if len(line) > 1 else line
            for start, end in zip(line, ends, strict=False):
                part = np.stack([start, end])
                near = np.concatenate([part - half - 1, part + half + 1]) - (left, top)
                r, c, h, w = _bounds(near, (height, width))
                x, y = np.arange(c, c + w) + 0.5 + left, np.arange(r, r + h) + 0.5 + top
                bits[r : r + h, c : c + w] |= _distance(x[None], y[:, None], start, end) <= half
        for x0, y0 in (np.floor(every).astype(int) - (left, top)).tolist():
            if 0 <= x0 < width and 0 <= y0 < height:
                bits[y0, x0] = True
        return Patch(top, left, bits)


@dataclass(frozen=True)
class Ellipse:
    """The ellipse within a rectangle."""

    left: float
    top: float
    width: float
    height: float

    def patch(self, size: tuple[int, int]) -> Patch:
        """Its pixels in an image of ``size`` (H, W)."""
        corner = np.array([[self.left, self.top]])
        top, left, height, width = _bounds(
            np.concatenate([corner, corner + (self.width, self.height)]), size
        )
        x = (np.arange(left, left + width) + 0.5 - self.left) * 2 / max(self.width, 1e-9) - 1
        y = (np.arange(top, top + height) + 0.5 - self.top) * 2 / max(self.height, 1e-9) - 1
        return Patch(top, left, x[None] ** 2 + y[:, None] ** 2 <= 1)


@dataclass(frozen=True)
class Bitmap:
    """Pixels as they are, the upper left one in column ``left`` and row ``top``."""

    left: int
    top: int
    bits: Bits

    def patch(self, size: tuple[int, int]) -> Patch:
        """Its pixels in an image of ``size`` (H, W)."""
        top, left = max(0, self.top), max(0, self.left)
        rows = slice(top - self.top, max(top, size[0]) - self.top)
        return Patch(top, left, self.bits[rows, left - self.left : max(left, size[1]) - self.left])


class Shape(NamedTuple):
    """Something drawn: the name of its class ('' if it has none), and where it is."""

    name: str
    parts: tuple[Polygon | Stroke | Ellipse | Bitmap, ...]
    plane: Plane = Plane()  # of a stack


def points(values: ArrayLike, least: int = 1) -> Points:
    """Coordinates (N, 2) as floats; ValueError if they are not, or fewer than ``least``."""
    try:
        found: NDArray[Any] = np.asarray(values)
    except ValueError:
        raise ValueError("no list of x, y") from None
    if found.dtype.kind not in "iuf" or found.ndim != 2 or found.shape[1] < 2:
        raise ValueError("no list of x, y")
    found = found[:, :2].astype(np.float64)  # GeoJSON allows a height behind them
    if len(found) < least or not (np.abs(found) <= FARTHEST).all():
        raise ValueError("too few points, or not finite ones")
    return found


def paint(
    shapes: Iterable[tuple[int, Shape]],
    size: tuple[int, int],
    where: str,
    told: list[str] | None = None,
) -> NDArray[Any]:
    """Class ids of an image, uint8 (H, W), from shapes with their ids; 0 where there is no shape.

    Smaller parts lie on larger ones, and of equal ones the later lies on top: a pore drawn within
    a particle is seen, whichever was drawn first, and wherever else its shape has parts. Raises
    DataError for a shape that lies outside the image; ``where`` is the file for its message.
    ``told`` gets a line on shapes that cover no pixel.
    """
    height, width = size
    patches: list[tuple[int, int, Patch]] = []
    empty: list[str] = []
    for number, (label, shape) in enumerate(shapes, start=1):
        own = [part.patch(size) for part in shape.parts]
        areas = [int(patch.bits.sum()) for patch in own]
        if not any(areas):
            found = f"outline {number} ({shape.name or 'no class'})"
            if shape.parts and all(_outside(part, size) for part in shape.parts):
                found = f"{where}: {found} lies outside the image of {width}x{height} pixels"
                raise DataError(f"{found}; was it drawn on another image?")
            empty.append(found)
        patches += [(area, label, patch) for area, patch in zip(areas, own, strict=True)]
    if empty and told is not None:
        found = f"{where}: {len(empty)} outline(s) without any pixel's centre in them"
        told.append(f"{found}, the first is {empty[0]}: left out; draw them larger, or delete them")
    ids = np.zeros(size, np.uint8)
    # Stable: of equal ones the later is on top.
    for _, label, (top, left, bits) in sorted(patches, key=lambda one: -one[0]):
        ids[top : top + bits.shape[0], left : left + bits.shape[1]][bits] = label
    highest = ids.max(initial=0)
    assert highest <= IGNORED
    return ids


def _outside(part: Polygon | Stroke | Ellipse | Bitmap, size: tuple[int, int]) -> bool:
    """Whether the rectangle around a part has nothing in common with the image."""
    if isinstance(part, Bitmap):
        corners = np.array([[0, 0], part.bits.shape[::-1]]) + (part.left, part.top)
    elif isinstance(part, Ellipse):
        corners = np.array([[0, 0], [part.width, part.height]]) + (part.left, part.top)
    else:
        corners = np.concatenate(part.rings if isinstance(part, Polygon) else part.lines)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return bool((high < 0).any() or low[0] > size[1] or low[1] > size[0])


def _bounds(box: Points, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the pixels around points, within an image (H, W)."""
    low = np.floor(box.min(axis=0)).clip(0, (size[1], size[0])).astype(int)
    high = np.ceil(box.max(axis=0)).clip(0, (size[1], size[0])).astype(int)
    left, top = low.tolist()
    right, bottom = high.tolist()
    return top, left, max(0, bottom - top), max(0, right - left)


def _crossings(ring: Points, top: int, left: int, height: int, width: int) -> NDArray[np.int64]:
    """How often a ring is crossed before each centre of a patch, from the left: (H * (W + 1),).

    A row is crossed where its centres lie on an edge's upper end or below, and above its lower end.
    All is counted in the image's coordinates: in two patches' own, rounding would differ.
    """
    start, end = ring, np.roll(ring, -1, axis=0)
    down = start[:, 1] <= end[:, 1]
    # One direction for both shapes that share an edge, so that rounding is the same in them.
    upper, lower = (np.where(down[:, None], a, b) for a, b in ((start, end), (end, start)))
    ends = (np.ceil(e[:, 1] - 0.5) - top for e in (upper, lower))
    first, last = (end.clip(0, height).astype(int) for end in ends)
    crossed, counts = (last - first).cumsum(), list[NDArray[np.int64]]()
    ends_of = np.searchsorted(crossed, np.arange(MOST_ROWS, crossed[-1], MOST_ROWS))
    for part in np.split(np.arange(len(ring)), ends_of):
        rows_of = (last - first)[part]
        edge = np.repeat(part, rows_of)
        rows = np.arange(len(edge)) - np.repeat(rows_of.cumsum() - rows_of, rows_of) + first[edge]
        slope = (lower[edge, 0] - upper[edge, 0]) / (lower[edge, 1] - upper[edge, 1])
        x = upper[edge, 0] + (rows + top + 0.5 - upper[edge, 1]) * slope
        columns = (np.ceil(x - 0.5) - left).clip(0, width).astype(int)
        own = np.bincount(rows * (width + 1) + columns, minlength=height * (width + 1))
        counts = [own if not counts else counts[0] + own]
    return counts[0]


def _distance(x: NDArray[Any], y: NDArray[Any], start: Points, end: Points) -> Points:
    """Distance of points from the line between two points."""
    (x0, y0), (dx, dy) = start, end - start
    length = dx * dx + dy * dy
    along = ((x - x0) * dx + (y - y0) * dy) / length if length else np.zeros(())
    along = np.clip(along, 0, 1)
    return np.asarray(np.hypot(x - x0 - along * dx, y - y0 - along * dy))


def rectangle(corners: Sequence[Sequence[float]]) -> Points:
    """The ring around a rectangle, from two opposite corners."""
    (x0, y0), (x1, y1) = points(corners, least=2)[:2].tolist()
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def polygons(rings: Sequence[Points]) -> tuple[Polygon, ...]:
    """Rings that cross none of the others as polygons, each an outer ring with its own holes.

    Together they cover what all rings cover as one polygon. A ring within a hole is an outer one.
    """
    if not rings:
        return ()
    edges, boxes = _Edges(rings), np.array([[*r.min(axis=0), *r.max(axis=0)] for r in rings])
    areas = np.array([abs(_area(ring)) for ring in rings])
    around: list[list[int]] = []  # of each ring those that enclose it
    for number, ring in enumerate(rings):
        near, own = edges.around(_within(ring)), boxes[number]
        low, high = boxes[near, :2] <= own[:2], boxes[near, 2:] >= own[2:]
        same = areas[near] == areas[number]  # of two equal rings the earlier is around the later
        larger = (areas[near] > areas[number]) | same & (near < number)
        around.append(near[low.all(axis=1) & high.all(axis=1) & larger].tolist())
    found: dict[int, list[Points]] = {i: [rings[i]] for i, o in enumerate(around) if len(o) % 2 < 1}
    for number, outer in enumerate(around):
        if len(outer) % 2:  # a hole of the ring that is nearest around it
            nearest = max(outer, key=lambda i: len(around[i]))
            if nearest not in found:  # some cross: they cannot be told apart
                return (Polygon(tuple(rings)),)
            found[nearest].append(rings[number])
    return tuple(Polygon(tuple(own)) for own in found.values())


def _area(ring: Points) -> float:
    """The area within a ring, below 0 where it turns to the left (y points down)."""
    (x, y), (next_x, next_y) = ring.T, np.roll(ring, -1, axis=0).T
    return float((x * next_y - y * next_x).sum()) / 2


def _crossed(ring: Points, y: float) -> Points:
    """Where a ring crosses a height that none of its corners has: x, ascending."""
    end = np.roll(ring, -1, axis=0)
    at = (ring[:, 1] < y) != (end[:, 1] < y)
    (x0, y0), (x1, y1) = ring[at].T, end[at].T
    return np.sort(x0 + (y - y0) / (y1 - y0) * (x1 - x0))


def _within(ring: Points) -> tuple[float, float]:
    """A point within a ring; one of its corners if it encloses nothing."""
    heights = np.unique(ring[:, 1])
    if len(heights) > 1:
        steps = np.diff(heights)
        y = float(heights[steps.argmax()] + steps.max() / 2)
        x = _crossed(ring, y)
        gap = int((x[1::2] - x[::2]).argmax()) * 2
        return float(x[gap] + x[gap + 1]) / 2, y
    return float(ring[0, 0]), float(ring[0, 1])


class _Edges:
    """The edges of many rings in bands of rows, to find the rings around a point."""

    def __init__(self, rings: Sequence[Points]) -> None:
        self.ring = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
        self.start = np.concatenate(rings)
        self.end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
        heights = np.stack([self.start[:, 1], self.end[:, 1]])
        self.top = heights.min()
        self.bands = max(1, min(MOST_BANDS, MOST_ENTRIES // len(self.ring)))
        self.band = max(float(heights.max() - self.top), 1.0) / self.bands
        first, last = (self._band(y) for y in (heights.min(axis=0), heights.max(axis=0)))
        count = last - first + 1
        edge = np.repeat(np.arange(len(self.ring)), count)
        bands = np.arange(len(edge)) - np.repeat(count.cumsum() - count, count) + first[edge]
        self.edges = edge[np.argsort(bands, kind="stable")]
        self.starts = np.bincount(bands, minlength=self.bands).cumsum()

    def around(self, point: tuple[float, float]) -> NDArray[np.int64]:
        """The numbers of the rings that enclose a point."""
        x, y = point
        band = int(self._band(np.array(y)))
        near = self.edges[self.starts[band - 1] if band else 0 : self.starts[band]]
        near = near[(self.start[near, 1] <= y) != (self.end[near, 1] <= y)]
        (x0, y0), (x1, y1) = self.start[near].T, self.end[near].T
        beyond = self.ring[near[x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x]]
        rings, crossed = np.unique(beyond, return_counts=True)
        return np.asarray(rings[crossed % 2 == 1], np.int64)

    def _band(self, y: NDArray[Any]) -> NDArray[np.int64]:
        return np.asarray(np.clip((y - self.top) // self.band, 0, self.bands - 1), np.int64)
