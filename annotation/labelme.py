"""Read the JSON files of labelme, https://github.com/wkentaro/labelme."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from annotation.shapes import Bitmap, Ellipse, Polygon, Shape, Stroke, points, rectangle
from imaging.imagefile import MAX_PIXELS

LINES = ("line", "linestrip", "point", "points")


class _Masks:
    """The masks of a file, whose pixels are counted before memory is taken for them.

    A few kilobytes unpack to gigabytes, in one mask or in many.
    """

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size, self.pixels = size, 0  # (H, W) of the image, if it is told; of all masks so far

    def read(self, packed: str) -> NDArray[np.bool_]:
        """The pixels of a mask, bool (H, W); ValueError if they are more than can be."""
        picture = PngImageFile(io.BytesIO(base64.b64decode(packed)))
        width, height = picture.size
        if self.size is not None and (height > self.size[0] or width > self.size[1]):
            image = f"{self.size[1]}x{self.size[0]}"
            raise ValueError(f"a mask of {width}x{height} pixels on an image of {image}")
        self.pixels += width * height
        if self.pixels > MAX_PIXELS:
            most = f"more than the {MAX_PIXELS // 1_000_000} million that can be read"
            raise ValueError(f"{self.pixels} pixels in masks, {most}")
        return np.asarray(picture.convert("L")) > 0


def shapes_of(content: dict[str, Any]) -> list[Shape]:
    """The shapes of a file; a line is one pixel wide. Raises ValueError and the like."""
    masks = _Masks(size_of(content))
    return [_shape(entry, masks) for entry in content["shapes"]]


def size_of(content: dict[str, Any]) -> tuple[int, int] | None:
    """(H, W) of the image that was drawn on, if the file tells."""
    height, width = content.get("imageHeight"), content.get("imageWidth")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _shape(entry: dict[str, Any], masks: _Masks) -> Shape:
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
        left, top = np.rint(where[0]).astype(int).tolist()
        return Shape(name, (Bitmap(left, top, masks.read(entry["mask"])),))
    raise ValueError(f"shape type {kind}")
