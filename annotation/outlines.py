"""Class maps as outlines for other programs: GeoJSON (QuPath) and regions of ImageJ.

Outlines run along the edges of pixels, so that reading them again (``annotation.files``) gives the
same class map, and areas measured in those programs are numbers of pixels. Class 0 is what lies
outside of all outlines.
"""

from __future__ import annotations

import io
import json
import zipfile
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
STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # right, down, left, up
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
    found: list[Outline] = []
    for label in np.unique(ids[ids > 0]).tolist():
        parts: defaultdict[int, list[Corners]] = defaultdict(list)
        for particle, ring in _rings(ids == label):
            parts[particle].append(ring)
        # Around a particle the ring turns to the right, around a hole to the left.
        for _, rings in sorted(parts.items()):
            ordered = sorted(rings, key=lambda ring: _area(ring) < 0)
            found.append(Outline(label, tuple(ordered)))
    return found


def _rings(mask: NDArray[np.bool_]) -> Iterator[tuple[int, Corners]]:
    """The rings around the particles of a mask, each with its particle's number."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    padded = np.pad(labels, 1)
    # Edges of pixels with the particle on their right: start (x, y), direction, particle.
    starts, directions, particles = [], [], []
    here, above = padded[1:, 1:], padded[:-1, 1:]
    left = padded[1:, :-1]
    for own, other, heading, shift in (
        (here, above, 0, (0, 0)),  # upper side: to the right
        (left, here, 1, (0, 0)),  # right side: down
        (above, here, 2, (1, 0)),  # lower side: to the left
        (here, left, 3, (0, 1)),  # left side: up
    ):
        y, x = np.nonzero((own > 0) & (own != other))
        starts.append(np.stack([x + shift[0], y + shift[1]], axis=1))
        directions.append(np.full(len(x), heading))
        particles.append(own[y, x])
    start, direction = np.concatenate(starts), np.concatenate(directions)
    particle = np.concatenate(particles).astype(np.int64)
    following = _following(start, direction, particle, mask.shape[1] + 2)
    turns = (direction[following] != direction).tolist()
    ends = (start + STEPS[direction]).tolist()
    owner, walk, seen = particle.tolist(), following.tolist(), bytearray(len(start))
    for first in range(len(walk)):
        if seen[first]:
            continue
        ring, edge = [], first
        while not seen[edge]:
            seen[edge] = 1
            if turns[edge]:
                ring.append(ends[edge])
            edge = walk[edge]
        yield owner[first], np.array(ring)


def _following(start: Corners, direction: Corners, particle: Corners, width: int) -> Corners:
    """The edge after each edge: of the two at a corner that four pixels share crosswise, one.

    Where both pixels of a particle meet there, the path turns left, from one to the other, so that
    what they enclose becomes a hole; where two particles meet, it turns right and stays.
    """
    ends = start + STEPS[direction]
    place, goal = start[:, 1] * width + start[:, 0], ends[:, 1] * width + ends[:, 0]
    key = (place * 4 + direction).astype(np.int64)
    order = np.argsort(key)
    ordered = key[order]

    def edge_to(turn: int) -> tuple[Corners, NDArray[np.bool_]]:
        wanted = goal * 4 + (direction + turn) % 4
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        found = order[at]
        return found, (ordered[at] == wanted) & (particle[found] == particle)

    following = np.full(len(start), -1)
    for turn in (1, 0, 3):  # right, straight on, left; a left one of the same particle wins
        edge, there = edge_to(turn)
        following = np.where(there, edge, following)
    return following


def _area(ring: Corners) -> float:
    """Twice the area within a ring, above 0 where it turns to the right (y points down)."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


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
