"""Read images and masks as people have them: any bit depth, float, several pages.

``utils.imagefile`` reads what a finished set may hold; this module reads what comes before it.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from utils.imagefile import (
    PNG_MAGIC,
    DataError,
    Pixels,
    check_size,
    decoding,
    open_picture,
    read_bytes,
    read_image,
    silence,
    to_8_bit,
)

Array = NDArray[Any]
BIG_TIFF = (b"II+\0", b"MM\0+")
TIFF = (b"II*\0", b"MM\0*", *BIG_TIFF)
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
OFFSETS, SAMPLES, COUNTS, PREDICTOR, SAMPLE_FORMAT = 273, 277, 279, 317, 339
MOST_PACKED = 1100  # pixels a byte: deflate packs no tighter
LARGEST = 1e100  # of float values; what is computed from them, and one over it, stays finite
SMALLEST_SPAN = 64  # of 256 levels; below it the values are stretched, as in ``to_8_bit``


def count_pages(path: Path) -> int:
    """Number of pages of a TIFF; 1 for any other file. Raises DataError."""
    raw = read_bytes(path)
    return max(1, len(list(_directories(raw)))) if raw.startswith(TIFF) else 1


def read_picture(path: Path, page: int = 1) -> tuple[Pixels, str]:
    """Read an image as 8 bits: (H, W) gray or (H, W, 3) RGB, and a note on how it was converted.

    8 and 16 bits are read as in ``utils.imagefile.read_image``. Float values are taken as 0..1,
    0..255 or 0..65535, the first of these that holds them; all other values, and those that would
    fill fewer than 64 of the 256 levels, are stretched from the smallest to the largest. NaN
    becomes the smallest value.

    Args:
        path: the file.
        page: page of a TIFF, counted from 1.

    Raises:
        DataError: the file cannot be read, or has no such page.
    """
    if page == 1:
        try:
            return read_image(path), ""
        except DataError as error:
            try:
                pixels = read_pixels(path)
            except DataError:
                raise error from None
    else:
        pixels = read_pixels(path, page, colours=True)
    note = ""
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    elif pixels.dtype.kind == "u" and pixels.itemsize <= 2:
        pixels = pixels if pixels.dtype == np.uint8 else to_8_bit(pixels)
    else:
        pixels, note = _float_to_8_bit(path, pixels)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return np.array(pixels, np.uint8, order="C"), note


def read_pixels(path: Path, page: int = 1, colours: bool = False) -> Array:
    """Read the values as the file holds them: (H, W), or (H, W, 3) RGB; any dtype.

    Transparency is dropped, and an orientation noted in the file is ignored, as in
    ``utils.imagefile``. A palette file gives its indices, or its colours if ``colours``.

    Raises:
        DataError: the file cannot be read, or has no such page.
    """
    raw = read_bytes(path)
    if raw.startswith(TIFF):
        pages = list(_directories(raw))
        if page > max(1, len(pages)):
            raise DataError(f"{path}: no page {page}, it has {len(pages)}; choose another --page")
        if pages:
            with decoding(path):
                check_size(path, int(pages[page - 1][WIDTH]), int(pages[page - 1][HEIGHT]))
                plain = _plain_tiff(raw, pages[page - 1])
            if plain is not None:
                return plain
    elif page > 1:
        raise DataError(f"{path}: no page {page}, it has 1; only a TIFF has several")
    try:
        picture = open_picture(path, raw, page)
    except DataError:
        if not raw.startswith(TIFF) or page > 1:
            raise
        picture = None  # a rare kind, if it is not damaged
    if picture is None:
        return _with_opencv(path, raw, page)
    with decoding(path):
        return _from_pillow(path, raw, page, picture, colours)


def _from_pillow(path: Path, raw: bytes, page: int, picture: Any, colours: bool) -> Array:
    mode = picture.mode
    if mode in ("P", "PA") and not colours:
        indices = np.asarray(picture)
        return indices[..., 0] if indices.ndim == 3 else indices
    if raw.startswith(PNG_MAGIC):
        if raw[24] == 16 and raw[25] != 0:  # Pillow keeps the high byte of deep colours only
            return _with_opencv(path, raw, page)
        if mode == "L" and raw[24] in (2, 4):  # Pillow spreads them over 0..255
            return np.asarray(picture) // (255 // (2 ** raw[24] - 1))
    elif max(getattr(picture, "tag_v2", {}).get(BITS, (8,))) > 8 and mode.startswith("RGB"):
        return _with_opencv(path, raw, page)
    if mode in ("LA", "La"):
        return np.asarray(picture)[..., 0]
    if mode in ("1", "L", "I", "F") or mode.startswith("I;16"):
        return np.asarray(picture)
    return np.asarray(picture.convert("RGB"))


def _with_opencv(path: Path, raw: bytes, page: int) -> Array:
    """Decode what Pillow has no mode for, the first page only."""
    pixels = None
    with decoding(path), silence():
        if page == 1 and _is_plausible(raw):
            pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        what = "not an image, cut short, or of a rare kind"
        raise DataError(f"{path}: {what}; copy it again or export it as 8-bit PNG")
    return np.asarray(pixels[..., 2::-1] if pixels.ndim == 3 else pixels)


def _is_plausible(raw: bytes) -> bool:
    """Whether a TIFF can hold as many pixels as it claims: OpenCV takes the memory beforehand."""
    pages = list(_directories(raw)) if raw.startswith(TIFF) else []
    return not pages or int(pages[0][WIDTH]) * int(pages[0][HEIGHT]) <= len(raw) * MOST_PACKED


def _float_to_8_bit(path: Path, pixels: Array) -> tuple[Array, str]:
    with np.errstate(invalid="ignore"):  # of a NaN that signals
        values = pixels.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError(f"{path}: no finite value in it; export it again")
    if np.abs(finite).max() > LARGEST:
        raise DataError(f"{path}: values of {np.abs(finite).max():.0e} in it; export it again")
    low, high = float(finite.min()), float(finite.max())
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    full = next((f for f in (1.0, 255.0, 65535.0) if low >= 0 and high <= f), None)
    if full is not None and (high - low) * 255 / full >= SMALLEST_SPAN:
        note, offset, scale = f"0..{full:g} scaled to 0..255", 0.0, 255 / full
    else:
        note = "smallest..largest value of each image stretched to 0..255"
        offset, scale = low, 255 / (high - low) if high - low > 1 / LARGEST else 0.0
    return ((values - offset) * scale + 0.5).astype(np.uint8), f"{pixels.dtype} values: {note}"


# ---------------------------------------------------------------- TIFF of any number type


def _directories(raw: bytes) -> Iterator[dict[int, Any]]:
    """The tags of each page."""
    stream = io.BytesIO(raw)
    header = raw[:16] if raw.startswith(BIG_TIFF) else raw[:8]
    seen: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            directory = TiffImagePlugin.ImageFileDirectory_v2(header)
            while 0 < directory.next < len(raw) and directory.next not in seen:
                seen.add(directory.next)
                stream.seek(directory.next)
                directory.load(stream)
                tags = dict(directory)
                if WIDTH in tags and HEIGHT in tags:
                    yield tags | {-1: header[:2]}
        except Exception:  # whatever a broken file causes; reading it says so in one line
            return


def _plain_tiff(raw: bytes, tags: dict[int, Any]) -> Array | None:
    """Decode one page of one sample, not compressed or by deflate, of 8 to 64 bits.

    Pillow and OpenCV know neither 64-bit integers nor negative 8-bit ones. None: another kind.
    """
    bits, kind = tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (1,))[0]
    compression = tags.get(COMPRESSION, 1)
    if (
        len(bits) != 1
        or tags.get(SAMPLES, 1) != 1
        or tags.get(PHOTOMETRIC) != 1
        or tags.get(PREDICTOR, 1) != 1
        or compression not in (1, 8, 32946)
        or OFFSETS not in tags
        or COUNTS not in tags
    ):
        return None
    number = {1: "u", 2: "i", 3: "f"}.get(kind)
    if number is None or bits[0] not in ((16, 32, 64) if number == "f" else (8, 16, 32, 64)):
        return None
    height, width = int(tags[HEIGHT]), int(tags[WIDTH])
    order = "<" if tags[-1] == b"II" else ">"
    kind_of_number = np.dtype(f"{order}{number}{bits[0] // 8}")
    size = height * width * kind_of_number.itemsize
    if size > len(raw) * MOST_PACKED:
        return None
    data = bytearray()
    for offset, length in zip(tags[OFFSETS], tags[COUNTS], strict=False):
        strip = raw[offset : offset + length]
        if compression != 1:
            try:
                strip = zlib.decompressobj().decompress(strip, max(1, size - len(data)))
            except zlib.error:
                return None
        data += strip
    if len(data) < size:
        return None
    values = np.frombuffer(data, kind_of_number, height * width).reshape(height, width)
    return values.astype(kind_of_number.newbyteorder("="))
