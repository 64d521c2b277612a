"""The field: the part of an image that counts.

Outside lie what is cut off its edges, such as a data bar, what is transparent in the file, and what
a mask of the region of interest leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imaging.gray_range import EACH_IMAGE, Conversion, check_finite
from imaging.imagefile import (
    Pixels,
    check_size,
    decode,
    gray_or_rgb,
    read_image,
    read_mask,
)
from imaging.listing import Lookup
from imaging.pages import place_of
from utils.files import DataError

Array = NDArray[Any]
# Of an image, cut or not, in pixels: the network halves it three times, and the crops of
# pretraining must keep a position at a quarter of the resolution.
SMALLEST_SIDE = 16


class Crop(NamedTuple):
    """Pixels that are cut off the edges of every image of a set, such as a data bar."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __str__(self) -> str:
        """As on a command line: ``0,60,0,0``."""
        return ",".join(map(str, self))

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of what is left of a shape (H, W, ...), 0 where nothing is."""
        height, width = shape[0] - self.top - self.bottom, shape[1] - self.left - self.right
        return max(height, 0), max(width, 0)

    def of(self, pixels: Array) -> Array:
        """What is left of pixels (H, W, ...): a view. DataError if that is too little to use."""
        height, width = self.size(pixels.shape)
        if any(self) and min(height, width) < SMALLEST_SIDE:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(
                f"{size} pixels, of which --crop {self} leaves {width}x{height}; at least "
                f"{SMALLEST_SIDE} a side are needed"
            )
        return pixels[self.top : self.top + height, self.left : self.left + width]

    def back(self, pixels: Array, shape: tuple[int, ...], outside: object) -> Array:
        """Put what ``of`` left, (h, w, ...), back into (H, W, ...), with ``outside`` around it."""
        if pixels.shape[:2] == tuple(shape[:2]):
            return pixels
        whole = np.full((*shape[:2], *pixels.shape[2:]), outside, pixels.dtype)
        self.of(whole)[...] = pixels
        return whole

    def uncut(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width before the crop of what has the shape (H, W, ...) now."""
        return shape[0] + self.top + self.bottom, shape[1] + self.left + self.right

    def words(self) -> str:
        """For people: ``60 rows at the bottom``."""
        kinds = ("rows at the top", "rows at the bottom", "columns on the left")
        sides = zip(self, (*kinds, "columns on the right"), strict=True)
        return ", ".join(f"{number} {where}" for number, where in sides if number)


def read_crop(words: str) -> Crop:
    """The crop of a text ``top,bottom,left,right``; DataError, one line, for another text."""
    sides = re.fullmatch(r"(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})", words.replace(" ", ""))
    if sides is None:
        raise DataError(f"--crop {words!r}: give four numbers top,bottom,left,right")
    return Crop(*(int(number) for number in sides.groups()))


def transparent(path: str | Path, page: int = 1) -> Array | None:
    """Where a page of an image file is fully transparent, bool (H, W), upright; None if nowhere.

    Files that are transparent everywhere show that their writer did not mean it: None, too. Kinds
    of transparency that Pillow does not read count as none.
    """
    with suppress(Exception), Image.open(path) as file:
        if place := place_of(path, page):
            file.seek(place)
        check_size(path, *file.size)  # reading its pixels says that they are too many
        if "A" not in file.getbands() and "transparency" not in file.info:
            return None
        whole = ImageOps.exif_transpose(file)
        clear = np.asarray(whole.convert("RGBA").getchannel("A")) == 0
        if clear.any() and not clear.all():
            return np.asarray(clear)
    return None


def visible(path: str | Path, shape: Sequence[int], page: int = 1) -> Array | None:
    """Where an image (H, W, ...) is not fully transparent, bool (H, W); None: everywhere."""
    clear = transparent(path, page)
    return ~clear if clear is not None and clear.shape == tuple(shape[:2]) else None


def read_visible(
    path: str | Path, gray: Conversion = EACH_IMAGE, page: int = 1
) -> tuple[Pixels, Array | None]:
    """An image as ``read_image`` gives it, ``filled``, and where it is ``visible``; DataError."""
    clear = transparent(path, page)  # most images have no such pixel, and are decoded once
    if clear is None or clear.shape != (values := decode(path, page).values).shape[:2]:
        return read_image(path, gray, page), None
    inside = ~clear
    values = filled(values, inside)  # before its gray range is taken
    check_finite(path, values)
    return gray_or_rgb(gray.apply(values)), inside


def filled(pixels: Array, inside: Array | None) -> Array:
    """Pixels (H, W, ...), those where ``inside`` (H, W) is False as the nearest one inside.

    For what is hidden below full transparency: its values mean nothing, and filters and networks
    look beyond the edge of what is visible. The nearest pixel makes no step there, which the mean
    would: a filter takes a step for a boundary.
    """
    if inside is None or inside.all() or not inside.any():
        return pixels
    # Here, as few images are transparent: 0.1 s.
    from scipy import ndimage  # type: ignore[import-untyped]

    places = ndimage.distance_transform_edt(
        ~inside, return_distances=False, return_indices=True
    )  # (2, H, W)
    found = pixels.copy()
    found[~inside] = pixels[tuple(places[:, ~inside])]
    return found


def resized_field(inside: Array | None, shape: Sequence[int]) -> Array | None:
    """``inside`` (H, W) for its image at the size (h, w, ...): at least half of a pixel is.

    All pixels of which some part is, where no pixel is half inside.
    """
    if inside is None or inside.shape == tuple(shape[:2]):
        return inside
    part = cv2.resize(inside.astype(np.float32), (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return np.asarray(part >= 0.5 if (part >= 0.5).any() else part > 0)


@dataclass(frozen=True)
class FieldRule:
    """Which part of each image of a folder is its field.

    ``crop`` is cut off all but images of ``cropped_sizes`` (height, width), from which it is cut
    already. ``roi`` is a folder of masks (PNG), named as the images (``imaging.listing.Lookup``):
    where they are 0 is outside. Images of fewer than ``least_side`` pixels a side cannot be used.
    """

    crop: Crop = Crop()
    cropped_sizes: frozenset[tuple[int, int]] = frozenset()
    roi: Path | None = None
    least_side: int = 0

    def crop_of(self, shape: tuple[int, ...]) -> Crop:
        """What is cut off an image (H, W, ...)."""
        return Crop() if (shape[0], shape[1]) in self.cropped_sizes else self.crop

    def part(self, image: Array, path: Path, page: int = 1) -> Array:
        """What the crop leaves of an image (H, W, ...), what is transparent there ``filled``.

        Outside a region of interest it is as it is: that is material beside the field.
        """
        crop, seen = self.crop_of(image.shape), visible(path, image.shape, page)
        return filled(crop.of(image), None if seen is None else crop.of(seen))

    def outside(self, path: Path, name: str, shape: tuple[int, ...], page: int = 1) -> Array | None:
        """Where an image (H, W, ...) is outside its field, bool (H, W); None if nowhere.

        DataError if the image is too small to use, nothing is inside, or the mask of its region of
        interest does not fit.
        """
        outside = np.zeros(shape[:2], bool)
        seen = visible(path, shape, page)
        if seen is not None:
            outside |= ~seen
        region = self._region(name)
        if region is not None:
            mask = read_mask(region)
            if mask.shape != outside.shape:
                sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image is {shape[1]}x{shape[0]}"
                raise DataError(f"{region}: {sizes}; a mask has the size of its image")
            outside |= mask == 0
        crop = self.crop_of(shape)
        try:
            kept = crop.of(outside).copy()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if min(kept.shape) < self.least_side:
            size = f"{shape[1]}x{shape[0]} pixels"
            raise DataError(f"{path}: {size}; at least {self.least_side} a side are needed")
        outside = crop.back(kept, shape, True)
        if outside.all():
            raise DataError(f"{path}: nothing of it is inside the field; correct its region")
        return outside if outside.any() else None

    def lacks_region(self, name: str) -> bool:
        """Whether there are regions of interest, but none for this image: all of it counts."""
        return self.roi is not None and self._region(name) is None

    def state(self, name: str) -> dict[str, object]:
        """What decides the field of an image, beside the image; empty if all of it counts."""
        region = self._region(name)
        found = {"crop": str(self.crop)} if any(self.crop) else {}
        if region is None:
            return dict(found)
        status = region.stat()
        return {**found, "roi": [status.st_size, status.st_mtime_ns]}

    def _region(self, name: str) -> Path | None:
        region = self._regions.find(Path(name), (".png",)) if self._regions else None
        return region if region and region.is_file() else None

    @cached_property
    def _regions(self) -> Lookup | None:
        return Lookup(self.roi) if self.roi else None


NO_RULE = FieldRule()
