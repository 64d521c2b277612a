"""Read regions of ImageJ and Fiji: one ``.roi``, or the ROI Manager's ``RoiSet.zip``."""

from __future__ import annotations

import io
import logging
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

import numpy as np
from roifile import ROI_OPTIONS, ROI_SUBTYPE, ROI_TYPE, ImagejRoi

from annotation.names import base_name
from annotation.planes import Plane
from annotation.shapes import Ellipse, Points, Polygon, Shape, Stroke, points, polygons, rectangle

HEADER = 64  # bytes of a region's first and of its second header
MOST_BYTES = 2**28  # of all regions in a file, unpacked
AREAS = (ROI_TYPE.POLYGON, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED)
LINES = (ROI_TYPE.LINE, ROI_TYPE.FREELINE, ROI_TYPE.POLYLINE, ROI_TYPE.ANGLE)
REMARKS = {ROI_SUBTYPE.TEXT: "text", ROI_SUBTYPE.IMAGE: "an image", ROI_SUBTYPE.ARROW: "an arrow"}


class _Refuse(logging.Handler):
    """What the library only logs is a region that it did not read in full: refuse it."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("damaged or of an unknown type")


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse what the library logs, while the block reads; elsewhere its log is its user's."""
    log, refuse = logging.getLogger("roifile"), _Refuse()
    log.addHandler(refuse)
    try:
        yield
    finally:
        log.removeHandler(refuse)


def shapes_of(raw: bytes) -> list[Shape]:
    """The shapes of a ``.roi`` or ``.zip`` file. Raises ValueError and the like.

    Their names are those of the regions, with their numbers (``annotation.names`` knows which of
    these count), or else their groups. Corners of areas lie on the corners of pixels, points and
    lines in their centres, as ImageJ has it.
    """
    if not raw.startswith(b"PK"):
        return _shapes(raw, "")
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = [e for e in archive.infolist() if e.filename.lower().endswith(".roi")]
        if sum(entry.file_size for entry in entries) > MOST_BYTES:
            raise ValueError("regions of more than 256 MB")
        if archive.namelist() and not entries:
            raise ValueError("no region in it")
        return [
            shape
            for entry in entries
            for shape in _shapes(archive.read(entry), PurePosixPath(entry.filename).stem)
        ]


def _require_whole(raw: bytes) -> None:
    """Refuse a region that is cut off: older versions of the library read what there is of it.

    A region tells where its second header stands, behind the coordinates, and this where the name
    and the properties are, in letters of two bytes. Old ones have no second header, 0. Coordinates
    need no look: with too few the library fails in all its versions.
    """
    if len(raw) < HEADER:
        raise ValueError("a region is too short")
    (second,) = struct.unpack_from(">i", raw, 60)
    if not second:
        return
    ends = [second + HEADER]
    if HEADER <= second <= len(raw) - HEADER:
        told = (struct.unpack_from(">2i", raw, second + at) for at in (16, 40))
        ends += [place + 2 * letters for place, letters in told if place > 0 and letters > 0]
    if second < HEADER or max(ends) > len(raw):
        raise ValueError("damaged or cut short")


@_refusing()
def _shapes(raw: bytes, file_name: str) -> list[Shape]:
    """A region; one of points on several slices as a shape for each."""
    _require_whole(raw)
    roi = ImagejRoi.frombytes(raw)
    name = (roi.name or file_name).strip()
    if what := REMARKS.get(roi.subtype):
        raise ValueError(f"{name or 'a region'!r} is {what} and no outline: delete it")
    if not base_name(name):
        name = str(roi.group) if roi.group else ""
    told = roi.position, roi.c_position, roi.z_position, roi.t_position
    plane = Plane(*(max(0, place) for place in told))
    if roi.position and plane[1:] == (0, roi.position, 0):  # told twice
        plane = Plane(roi.position)
    places = roi.counter_positions
    if roi.roitype == ROI_TYPE.POINT and places is not None and places.any():
        found = points(roi.coordinates())
        own = {int(place): found[places == place] for place in np.unique(places)}
        return [Shape(name, (_dots(at),), Plane(place)) for place, at in own.items()]
    return [Shape(name, _parts(roi, name), plane)]


def _dots(found: Points) -> Stroke:
    return Stroke(tuple(point[None] + 0.5 for point in found), 1.0)


def _parts(roi: ImagejRoi, name: str) -> tuple[Polygon | Stroke | Ellipse, ...]:
    if roi.composite and roi.roitype == ROI_TYPE.RECT:
        rings = (points(ring) for ring in roi.coordinates(multi=True))
        return polygons([ring for ring in rings if len(ring) > 2])
    curved = roi.roitype in (*AREAS, *LINES) and roi.options & ROI_OPTIONS.SPLINE_FIT
    if curved and roi.roitype != ROI_TYPE.LINE:
        cure = "in ImageJ first Edit > Selection > Interpolate"
        raise ValueError(f"{name or 'a region'!r} is a fitted spline: {cure}")
    return (_part(roi),)


def _part(roi: ImagejRoi) -> Polygon | Stroke | Ellipse:
    kind = roi.roitype
    box = float(roi.left), float(roi.top), float(roi.right - roi.left), float(roi.bottom - roi.top)
    if roi.subpixelrect:
        box = roi.xd, roi.yd, roi.widthd, roi.heightd
    corners = points([box[:2], (box[0] + box[2], box[1] + box[3])])
    if kind == ROI_TYPE.OVAL:
        return Ellipse(*box)
    if kind == ROI_TYPE.RECT:
        if roi.rounded_rect_arc_size:
            raise ValueError("a rectangle with rounded corners")
        return Polygon((rectangle(corners.tolist()),))
    if kind in AREAS:
        return Polygon((points(roi.coordinates(), least=3),))
    width = float(getattr(roi, "float_stroke_width", 0) or roi.stroke_width or 1)
    if kind == ROI_TYPE.LINE:
        return Stroke((points([(roi.x1, roi.y1), (roi.x2, roi.y2)]) + 0.5,), width)
    if kind in LINES:
        return Stroke((points(roi.coordinates()) + 0.5,), width)
    if kind == ROI_TYPE.POINT:
        return _dots(points(roi.coordinates()))
    raise ValueError(f"a region of type {kind.name.lower()}")
