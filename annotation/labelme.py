"""Read the JSON files of labelme, https://github.com/wkentaro/labelme."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL.PngImagePlugin import PngImageFile

from annotation.shapes import Bitmap, Ellipse, Polygon, Shape, Stroke, points, rectangle

LINES = ("line", "linestrip", "point", "points")


def shapes_of(content: dict[str, Any]) -> list[Shape]:
    """The shapes of a file; a line is one pixel wide. Raises ValueError and the like."""
    return [_shape(entry) for entry in content["shapes"]]


def size_of(content: dict[str, Any]) -> tuple[int, int] | None:
    """(H, W) of the image that was drawn on, if the file tells."""
    height, width = content.get("imageHeight"), content.get("imageWidth")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _shape(entry: dict[str, Any]) -> Shape:
    kind, name = entry.get("shape_type") or "polygon", str(entry["label"])
    where = points(entry["points"])
    if kind == "polygon" or (kind == "rectangle" and len(where) != 2):  # such as its 4 corners
        return Shape(name, (Polygon((points(where, least=3),)),))
    if kind == "rectangle":
        return Shape(name, (Polygon((rectangle(where.tolist()),)),))
    if kind == "circle":  # its centre, and a point on it
        radius = float(np.hypot(*(where[1] - where[0])))
        left, top = (where[0] - radius).tolist()
        return Shape(name, (Ellipse(left, top, 2 * radius, 2 * radius),))
    if kind in LINES:
        single = kind in ("point", "points")
        lines = tuple(point[None] for point in where) if single else (where,)
        return Shape(name, (Stroke(lines, 1.0),))
    if kind == "mask":  # its pixels, from the first point on
        picture = PngImageFile(io.BytesIO(base64.b64decode(entry["mask"])))
        left, top = np.rint(where[0]).astype(int).tolist()
        return Shape(name, (Bitmap(left, top, np.asarray(picture.convert("L")) > 0),))
    raise ValueError(f"shape type {kind}")
