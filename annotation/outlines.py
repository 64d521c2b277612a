"""Class maps as outlines for other programs: GeoJSON (QuPath) and regions of ImageJ.

Outlines run along the edges of pixels, so that reading them again (``annotation.files``) gives the
same class map, and areas measured in those programs are numbers of pixels. Class 0 is what lies
outside of all outlines.
"""

from __future__ import annotations

import io
import json
import zipfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from roifile import ROI_TYPE, ImagejRoi

from imaging.imagefile import Pixels
from utils.files import DataError
from utils.metrics import IGNORED

Corners = NDArray[np.int64]  # (N, 2): x, y, corners of pixels
IGNORED_NAME = "Ignore*"  # as QuPath calls what is to be left out
_BAND = 2**20  # pixels whose sides are looked at at once
LONGEST_SIDE = 32767  # of an image in ImageJ's regions
EARLIEST = (1980, 1, 1, 0, 0, 0)  # of a file in an archive: the same bytes on any day
SUFFIX = {"geojson": ".geojson", "roi": ".zip"}  # of the kinds that are written


class Outline(NamedTuple):
    """One particle: pixels of one class that touch by their sides."""

    label: int
    rings: tuple[Corners, ...]  # the outer one first, then those of its holes


def outlines(ids: Pixels) -> list[Outline]:
    """The outlines of all classes but 0 of a class map (H, W), by class, from top to bottom.

    No ring crosses or touches itself, and the rings of a particle have at most points in common:
    the polygons are valid for every program.
    """
    present = np.zeros(256, np.bool_)
    for row in ids:
        present[row] = True
    found: list[Outline] = []
    for label in np.flatnonzero(present[1:]) + 1:
        parts: defaultdict[int, list[Corners]] = defaultdict(list)
        for particle, ring in _rings(ids == label):
            parts[particle].append(ring)
        found += (Outline(int(label), tuple(rings)) for rings in parts.values())
    return found


class _Sides(NamedTuple):
    """Straight lines of the sides of pixels, all in one direction, as long as they go, (N,) each.

    A place is the number of a corner of pixels, along the lines of the direction: see ``_sides``.
    """

    begin: Corners  # places, ascending
    end: Corners
    particle: Corners
    left: NDArray[np.bool_]  # the way round the particle turns left at the end, else right


def _rings(mask: NDArray[np.bool_]) -> Iterator[tuple[int, Corners]]:
    """The rings around the particles of a mask, each with its particle's number.

    By that number, and of a particle the outer one first: around it the way turns to the right,
    around a hole to the left.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    labels = np.asarray(cv2.connectedComponents(padded, connectivity=4)[1], np.int32)
    # The particle is on the right of the way: below its upper sides, which go to the right.
    right, left = _sides(labels, 1, forward=True), _sides(labels, 0, forward=False)
    down, up = _sides(labels.T, 0, forward=True), _sides(labels.T, 1, forward=False)
    particle = right.particle
    corners, following, turns = _joined([right, down, left, up], labels.shape)
    # Every ring has a side that goes to the right; in this order, its first is the topmost.
    walk, seen = following.data, bytearray(len(following))
    order, starts = array("q"), array("q")
    for first in range(len(particle)):
        if seen[first]:
            continue
        starts.append(len(order))
        side = first
        while not seen[side]:
            seen[side] = 1
            order.append(side)
            side = walk[side]
    path = np.frombuffer(order, np.int64)
    owner, is_hole = particle[path[starts]], np.add.reduceat(turns[path], starts) < 0
    corners, stops = corners[path], [*starts[1:], len(path)]
    for ring in np.lexsort((is_hole, owner)).tolist():  # it keeps the order of equal ones
        yield int(owner[ring]), corners[starts[ring] : stops[ring]]


def _sides(labels: NDArray[np.int32], own: int, *, forward: bool) -> _Sides:
    """Sides between neighbouring lines of ``labels``, which have a border of 0.

    Of each two lines the first (``own`` 0) or the second (1) is that of the particle; ``forward``
    is along the line. The corner after ``place`` pixels between line n and the next has the number
    n * width + place. Where both pixels of a particle meet crosswise at an end, the way turns left,
    from one to the other, so that what they enclose becomes a hole; where two particles meet, it
    turns right and stays.
    """
    lines, width = labels.shape
    rows, parts = max(1, _BAND // width), list[_Sides]()
    for top in range(0, lines - 1, rows):
        block = np.ascontiguousarray(labels[top : top + rows + 1])
        both = block[:-1].ravel(), block[1:].ravel()
        mine, other = both[own], both[1 - own]
        side = np.where(mine != other, mine, 0)  # the border ends it at both ends of each line
        change = np.flatnonzero(side[1:] != side[:-1]) + 1
        start, stop = change[side[change] > 0], change[side[change - 1] > 0]
        particle = side[start]
        turns_left = other[stop if forward else start - 1] == particle
        begin, end = (start, stop) if forward else (stop, start)
        parts.append(_Sides(begin + top * width, end + top * width, particle, turns_left))
    return _Sides(*(np.concatenate(own_parts) for own_parts in zip(*parts, strict=True)))


def _joined(
    sides: Sequence[_Sides], shape: tuple[int, ...]
) -> tuple[Corners, Corners, NDArray[np.int8]]:
    """Of all sides, first those to the right, then down, left and up: where each ends, (N, 2);
    which one follows, (N,); and whether the way turns right (1) or left (-1) there.
    """
    firsts = np.cumsum([0, *(len(one.begin) for one in sides)])
    corners, following = np.empty((firsts[-1], 2), np.int64), np.empty(firsts[-1], np.int64)
    turns = np.concatenate([np.where(one.left, -1, 1).astype(np.int8) for one in sides])
    for heading, one in enumerate(sides):
        own = slice(firsts[heading], firsts[heading + 1])
        line, place = np.divmod(one.end, shape[1 - heading % 2])
        x, y = (place - 1, line) if heading % 2 == 0 else (line, place - 1)
        corners[own, 0], corners[own, 1] = x, y
        goal = (place - 1) * shape[heading % 2] + line + 1  # the place of that corner crosswise
        for turn in (1, -1):
            here, other = np.flatnonzero(turns[own] == turn), (heading + turn) % 4
            found = np.searchsorted(sides[other].begin, goal[here])
            following[firsts[heading] + here] = firsts[other] + found
    return corners, following, turns


def _name(label: int, names: Sequence[str]) -> str:
    return IGNORED_NAME if label == IGNORED else names[label]


def _colour(label: int, colours: Sequence[Sequence[int]]) -> list[int]:
    return [128, 128, 128] if label == IGNORED else [int(v) for v in colours[label]]


def packed(ids: Pixels, kind: str, names: Sequence[str], colours: Sequence[Sequence[int]]) -> bytes:
    """The outlines of a class map (H, W) as a file of a ``kind``, a key of ``SUFFIX``.

    DataError where it is larger than the ``kind`` can say.
    """
    if kind == "roi" and max(ids.shape) > LONGEST_SIDE:
        size = f"{ids.shape[1]}x{ids.shape[0]} pixels"
        raise DataError(f"{size}: ImageJ's regions reach {LONGEST_SIDE}; give --outlines geojson")
    found = outlines(ids)
    if kind == "roi":
        return to_rois(found, names, colours)
    return to_geojson(found, names, colours).encode()


def to_geojson(
    found: Iterable[Outline], names: Sequence[str], colours: Sequence[Sequence[int]]
) -> str:
    """A GeoJSON collection of annotations as QuPath reads it; colours are 0..255 RGB."""
    features = []
    for label, rings in found:
        closed = [[*ring.tolist(), ring[0].tolist()] for ring in rings]
        kind = {"name": _name(label, names), "color": _colour(label, colours)}
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": closed},
                "properties": {"objectType": "annotation", "classification": kind},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False)


def to_rois(
    found: Iterable[Outline], names: Sequence[str], colours: Sequence[Sequence[int]]
) -> bytes:
    """ImageJ's ``RoiSet.zip``: a region for each particle, its group is the class id."""
    packed = io.BytesIO()
    taken = {name.strip().casefold() for name in names}  # as they are compared in reading
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (label, rings) in enumerate(found, start=1):
            roi = _region(rings)
            roi.name, digits = f"{_name(label, names)}-{number}", 5
            while roi.name.strip().casefold() in taken:  # another class is called so
                roi.name, digits = f"{_name(label, names)}-{number:0{digits}}", digits + 1
            roi.group = label
            red, green, blue = _colour(label, colours)
            roi.stroke_color = bytes((255, red, green, blue))
            file_name = f"{number:05}.roi"  # a class may be called by what no file may be
            archive.writestr(zipfile.ZipInfo(file_name, EARLIEST), roi.tobytes())
    return packed.getvalue()


def _region(rings: Sequence[Corners]) -> ImagejRoi:
    """A traced region, or one put together of several rings if it has holes."""
    roi = ImagejRoi()
    (roi.left, roi.top), (roi.right, roi.bottom) = (
        f(rings[0], axis=0).tolist() for f in (np.min, np.max)
    )
    if len(rings) == 1:
        roi.roitype, roi.n_coordinates = ROI_TYPE.TRACED, len(rings[0])
        roi.integer_coordinates = (rings[0] - (roi.left, roi.top)).astype(np.int32)
        return roi
    path: list[float] = []
    for ring in rings:  # move to the first corner, lines to the others, close
        x, y = ring[0].tolist()
        path += [0, x, y]
        for x, y in ring[1:].tolist():
            path += [1, x, y]
        path.append(4)
    roi.roitype, roi.shape_roi_size = ROI_TYPE.RECT, len(path)
    roi.multi_coordinates = np.array(path, np.float32)
    return roi
