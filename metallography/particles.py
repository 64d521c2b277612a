"""The particles of one class in one mask: found, counted, and measured one by one.

A *particle* is a set of pixels of one class that touch by a side or a corner (8-connected; grains:
by a side alone, 4-connected, so that a boundary one pixel wide separates them at any angle) and has
at least ``minimum_px`` pixels; smaller ones are taken for noise. One that touches the frame, or
pixels that nobody labelled, is cut.

They are found with OpenCV, not with scikit-image: its ``regionprops`` took 20 times as long (7,035
particles in 2000 x 2000 pixels), and its length is that of an ellipse, not of a rectangle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from config import ConfigError
from imaging.pixel_size import POSSIBLE, is_possible
from utils.files import replacing

Array = NDArray[Any]
Row = dict[str, Any]

MINIMUM_PX = 10
MEASURED = "measured"  # folder of what was measured of each image, for the next run
AT_ONCE = 1_000_000  # products of corners and directions that are held at once
SAME_AREA = 1e-9  # relative difference of areas that rounding alone makes


@dataclass(frozen=True)
class Particles:
    """The particles of one class in one mask, one entry of each array per particle.

    Length and width are the sides in px of the smallest-area rectangle of any direction around the
    particle's pixels, taken as unit squares, of several the longest; length >= width.
    """

    area: Array  # pixels, holes not counted
    length: Array
    width: Array
    x: Array  # centre of gravity in px; (0, 0) is the centre of the first pixel
    y: Array
    border: Array  # whether the frame, or what nobody labelled, cuts the particle
    corners: Array  # corners of the frame that it has, where the field is a rectangle

    @property
    def diameter(self) -> Array:
        """Diameter in px of the circle of equal area, sqrt(4 A / pi) (ISO 9276-6)."""
        return np.sqrt(4 * self.area / math.pi)

    @property
    def aspect(self) -> Array:
        """Length / width of the smallest rectangle, 1 or more."""
        return self.length / self.width

    @property
    def number(self) -> float:
        """Whole particles, half of the cut ones, and for a corner of the frame a quarter instead.

        The planimetric rule of Jeffries, for a rectangle that of Saltykov: all four corners
        together are one particle (ASTM E112).
        """
        at_sides = self.border & (self.corners == 0)
        return float((~self.border).sum() + at_sides.sum() / 2 + self.corners.sum() / 4)

    def whole(self) -> Particles:
        """Only the particles that the frame does not cut."""
        return Particles(*(values[~self.border] for values in vars(self).values()))

    def rows(self, um_per_px: float | None = None) -> list[Row]:
        """One dict per particle, in the unit of the scale; x and y stay in px."""
        u, s = unit_of(um_per_px), um_per_px or 1.0
        columns = {
            "x_px": self.x,
            "y_px": self.y,
            f"area_{u}2": self.area * s * s,
            f"diameter_{u}": self.diameter * s,
            f"length_{u}": self.length * s,
            f"width_{u}": self.width * s,
            "aspect_ratio": self.aspect,
            "cut_by_frame": self.border.astype(int),
        }
        lists = [values.tolist() for values in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def measured_key(mask: Array, num_classes: int, *terms: object) -> str:
    """A digest of all that decides what ``measure_mask`` finds in a mask, given these arguments.

    It takes in the code that measures, and the versions of the libraries by which it does.
    """
    own: list[object] = [
        f"{mask.dtype} {mask.shape}",
        hashlib.sha256(mask.tobytes()).hexdigest(),
        num_classes,
    ]
    own += [*terms, _code_digest(), cv2.__version__, np.__version__]
    return hashlib.sha256(json.dumps(own, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A NumPy number or array, or another sequence, for JSON."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else list(value)


@cache
def _code_digest() -> str:
    files = (Path(__file__).with_name(name) for name in ("measure.py", "particles.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


Measured = tuple[list[Row], list[Particles]]  # what ``measure_mask`` finds


def measured_once(path: Path, key: str, measure: Callable[[], Measured]) -> Measured:
    """What a file holds of this ``measured_key``; else measured, and stored there; UserError."""
    found = _load_measured(path, key)
    if found is not None:
        return found
    rows, particles = found = measure()
    about = np.frombuffer(json.dumps([key, rows]).encode(), np.uint8)
    arrays = {f"{name} {c}": a for c, own in enumerate(particles) for name, a in vars(own).items()}
    with replacing(path, "--out", durable=False) as temporary, temporary.open("wb") as file:
        np.savez(file, about=about, **arrays)
    return found


def _load_measured(path: Path, key: str) -> Measured | None:
    with suppress(Exception), np.load(path, allow_pickle=False) as stored:  # damaged in any way
        own, rows = json.loads(stored["about"].tobytes())
        if own == key:
            names = [each.name for each in fields(Particles)]
            columns = ([stored[f"{name} {c}"] for name in names] for c in range(len(rows)))
            return rows, [Particles(*found) for found in columns]
    return None


def unit_of(um_per_px: float | None) -> str:
    """'um' with a scale, 'px' without; ConfigError if nobody would believe the scale."""
    if um_per_px is None:
        return "px"
    if not is_possible(um_per_px):
        raise ConfigError(
            f"--um_per_px: found {um_per_px}; give the side of a pixel in micrometres, a number "
            f"from {POSSIBLE}, such as 0.1"
        )
    return "um"


def without_scale(row: Row) -> Row:
    """A row in pixels as a row in micrometres, whose lengths nobody knows (nan)."""
    kept = re.compile(r"[xy]_px|field_px|(found|true)_\d+_px")
    changed: Row = {}
    for name, value in row.items():
        length = re.fullmatch(r"(.*_)(?:px(2?)|Mpx)", name)
        if length is None or kept.fullmatch(name):
            changed[name] = value
        else:
            unit = "mm2" if name.endswith("Mpx") else f"um{length[2]}"
            changed[length[1] + unit] = math.nan
    return changed


def row_bands(height: int, rows: int = 256) -> list[slice]:
    """Cut a mask into bands of rows, where intermediate arrays of a whole one would be large."""
    return [slice(top, top + rows) for top in range(0, height, rows)]


def find_particles(
    binary: Array,
    minimum_px: int = MINIMUM_PX,
    connectivity: int = 8,
    ignored: Array | None = None,
) -> tuple[Particles, Array]:
    """Find the particles of a class in a mask (H, W), true where the class is.

    Pixels of one particle touch by a side (``connectivity`` 4) or also by a corner (8). ``ignored``
    (H, W) is true where nobody knows the class: what touches it there is cut. Also returns labels
    int32 (H, W): 1 + the particle's number, 0 outside and for noise.
    """
    pixels = np.ascontiguousarray(binary, np.uint8)
    count, labels, statistics, centres = cv2.connectedComponentsWithStats(
        pixels, connectivity=connectivity
    )
    area = statistics[:, cv2.CC_STAT_AREA].astype(np.int64)
    keep = area >= minimum_px
    keep[0] = False
    found = int(keep.sum())
    number = np.zeros(count, np.int32)
    number[keep] = np.arange(1, found + 1)
    for rows in row_bands(len(labels)):
        labels[rows] = number[labels[rows]]
    border = np.zeros(found + 1, bool)
    at_corners = labels[corners_of(labels.shape, ignored)]
    corners = np.bincount(at_corners, minlength=found + 1)
    border[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    if ignored is not None:
        near = cv2.dilate(np.ascontiguousarray(ignored, np.uint8), np.ones((3, 3), np.uint8))
        border[labels[near > 0]] = True
    length, width = _rectangles(pixels, labels, found, connectivity)
    x, y = centres[keep].T
    return Particles(area[keep], length, width, x, y, border[1:], corners[1:]), labels


def corners_of(shape: tuple[int, ...], ignored: Array | None) -> tuple[Array, Array]:
    """Rows and columns of the corner pixels of a field, (4,) each; (0,) if it is no rectangle."""
    top, left, bottom, right = 0, 0, shape[0] - 1, shape[1] - 1
    if ignored is not None:
        rows, columns = (np.flatnonzero(~ignored.all(axis=axis)) for axis in (1, 0))
        if not len(rows) or ignored[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any():
            return np.empty(0, np.intp), np.empty(0, np.intp)
        top, left, bottom, right = rows[0], columns[0], rows[-1], columns[-1]
    return np.array([top, top, bottom, bottom]), np.array([left, right, left, right])


def fill_holes(labels: Array, minimum_px: int, ignored: Array | None = None) -> None:
    """Fill holes of fewer than ``minimum_px`` pixels in labels (H, W) of ``find_particles``.

    A hole is a set of pixels of no particle that touch by a side or a corner, so that a thin
    slanting boundary is one long hole. Its pixels get the label of the nearest particle.
    """
    outside = labels == 0
    if ignored is not None:
        outside &= ~ignored
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(
        outside.view(np.uint8), connectivity=8
    )
    small = statistics[:, cv2.CC_STAT_AREA] < minimum_px
    small[0] = False
    if small.any() and labels.any():
        labels[:] = nearest_labels(labels, labels > 0, small[parts])


def nearest_labels(labels: Array, sources: Array, where: Array) -> Array:
    """Labels (H, W) in which the pixels ``where`` have the label of the nearest of ``sources``.

    Both are bool (H, W); some pixel must be a source. Of sources equally near, the first in reading
    order is taken: the middle row of an odd gap would else change sides from pixel to pixel.
    """
    _, index = cv2.distanceTransformWithLabels(
        (~sources).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    place = np.zeros(int(index.max()) + 1, np.int32)  # of each source, in reading order
    place[index[sources]] = np.flatnonzero(sources)
    nearest = place[index]
    height, width = labels.shape
    y, x = np.nonzero(where)
    # OpenCV's distances with labels are approximate; the neighbours' sources make them exact but
    # for a few pixels in 100,000, which are half a pixel off at most.
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    for _ in range(2):
        best = nearest[y, x]
        distance = (best // width - y) ** 2 + (best % width - x) ** 2
        for dy, dx in around:
            other = nearest[np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)]
            away = (other // width - y) ** 2 + (other % width - x) ** 2
            nearer = (away < distance) | ((away == distance) & (other < best))
            best, distance = np.where(nearer, other, best), np.where(nearer, away, distance)
        nearest[y, x] = best
    grown = labels.copy()
    grown[y, x] = labels.ravel()[nearest[y, x]]
    return grown


def _rectangles(pixels: Array, labels: Array, count: int, connectivity: int) -> tuple[Array, Array]:
    """Length and width of the smallest rectangle around each of the particles 1 ... count."""
    length, width = np.full((2, count), np.nan)
    outlines = _contours(pixels, labels) if connectivity == 8 else _ends_of_runs(labels, count)
    hulls: defaultdict[int, list[tuple[int, Array]]] = defaultdict(list)  # by number of points
    for number, points in outlines:
        hull = cv2.convexHull(points)[:, 0]
        hulls[len(hull)].append((number - 1, hull))
    for corners, found in hulls.items():
        step = max(1, AT_ONCE // corners**2)
        for start in range(0, len(found), step):
            numbers, some = zip(*found[start : start + step], strict=True)
            length[[*numbers]], width[[*numbers]] = smallest_rectangles(np.stack(some))
    return length, width


def smallest_rectangles(hulls: Array) -> tuple[Array, Array]:
    """Length and width (N,) of the smallest rectangles around unit squares, of several the longest.

    ``hulls`` (N, P, 2) are the corners, in turn, of the convex hulls of the squares' centres. A
    side of the smallest rectangle lies on one of the hull of the squares (Freeman and Shapira
    1975), which has the directions of these hulls' sides and those of the axes. OpenCV's
    ``minAreaRect`` takes any of rectangles of equal area, so that a mirrored particle has another
    length.
    """
    sides = np.roll(hulls, -1, axis=1) - hulls.astype(float)
    axis = np.broadcast_to([1.0, 0.0], (len(hulls), 1, 2))
    along = np.concatenate([sides, axis], axis=1)
    norm = np.hypot(along[..., 0], along[..., 1])
    along /= np.where(norm > 0, norm, 1)[..., None]
    along[norm == 0] = 1, 0  # a single point has no side
    across = np.stack([-along[..., 1], along[..., 0]], axis=-1)
    own = np.abs(along).sum(axis=-1)  # the extent of a unit square in either direction
    one, other = (np.ptp(hulls @ d.swapaxes(1, 2), axis=1) + own for d in (along, across))
    area, longer = one * other, np.maximum(one, other)
    least = area.min(axis=1, keepdims=True) * (1 + SAME_AREA)
    best = np.where(area <= least, longer, -1).argmax(axis=1)[:, None]
    length = np.take_along_axis(longer, best, axis=1)[:, 0]
    return length, np.take_along_axis(np.minimum(one, other), best, axis=1)[:, 0]


def _contours(pixels: Array, labels: Array) -> Iterator[tuple[int, Array]]:
    """Number and contour (points, 1, 2), as x and y, of each 8-connected particle."""
    # Not RETR_CCOMP, which tells holes apart but takes a time that grows with their square.
    contours, _ = cv2.findContours(pixels, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        column, row = contour[0, 0]
        number = labels[row, column]
        # Holes are followed the other way round, so that their area is positive.
        if number and cv2.contourArea(contour, oriented=True) <= 0:
            yield int(number), contour


def _ends_of_runs(labels: Array, count: int) -> Iterator[tuple[int, Array]]:
    """Number of each particle, and the ends (n, 2), as x and y, of its runs along the rows.

    They have the same hull as all its pixels. OpenCV's contours go on over corners, where
    4-connected particles end.
    """
    step = np.ones((len(labels), labels.shape[1] + 1), bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=step[:, 1:-1])
    inside = labels > 0
    ends = [np.argwhere(step[:, :-1] & inside), np.argwhere(step[:, 1:] & inside)]
    points = np.concatenate(ends).astype(np.int32)
    of = labels[points[:, 0], points[:, 1]]
    order = np.argsort(of, kind="stable")
    first = np.searchsorted(of[order], np.arange(1, count + 2))
    points = np.ascontiguousarray(points[order, ::-1])
    for i in range(count):
        yield i + 1, points[first[i] : first[i + 1]]
