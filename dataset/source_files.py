"""Read images and masks before they are a set: any bit depth, float, several pages."""

from __future__ import annotations

import io
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from imaging import imagefile
from imaging.imagefile import Array, DataError, Pixels

Colour = tuple[int, int, int]
Colours = tuple[Colour, ...]

# Tags of a TIFF.
COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, COUNTS = 259, 262, 273, 277, 279
PREDICTOR, SAMPLE_FORMAT = 317, 339
NUMBERS = {1: "u", 2: "i", 3: "f"}
MOST_PACKED = 1100  # pixels a byte: deflate packs no tighter
LARGEST = 1e100  # of float values; what is computed from them, and one over it, stays finite


def count_pages(path: Path) -> int:
    """Number of pages of a TIFF; 1 for any other file. Raises DataError."""
    return max(1, len(imagefile.tiff_pages(imagefile.read_bytes(path))))


def read_picture(path: Path, page: int = 1) -> tuple[Pixels, str]:
    """Read an image as 8 bits: (H, W) gray or (H, W, 3) RGB, and a note on how it was converted.

    8 and 16 bits are read as in ``imaging.imagefile.read_image``. Float values are taken as 0..1,
    0..255 or 0..65535, the first of these that holds them; all other values, and those that would
    fill fewer than 64 of the 256 levels, are stretched from the smallest to the largest. NaN
    becomes the smallest value. Pages of a TIFF are counted from 1. Raises DataError.
    """
    if page > 1:
        pixels = read_pixels(path, page, colours=True)
    else:
        try:
            return imagefile.read_image(path), ""
        except DataError as error:
            try:
                pixels = read_pixels(path)
            except DataError:
                raise error from None
    if pixels.dtype.kind in "bu" and pixels.itemsize <= 2:
        return imagefile.gray_or_rgb(imagefile.to_8_bit(pixels)), ""
    pixels, note = _float_to_8_bit(path, pixels)
    return imagefile.gray_or_rgb(pixels), note


def read_pixels(path: Path, page: int = 1, colours: bool = False) -> Array:
    """Read the values as the file holds them: (H, W), or (H, W, 3) RGB; any dtype.

    Transparency and orientation are dropped as in ``imaging.imagefile``. A palette file gives its
    indices, or its colours if ``colours``. Raises DataError as ``read_picture``.
    """
    raw = imagefile.read_bytes(path)
    pages = imagefile.tiff_pages(raw) or [{}]
    if page > len(pages):
        raise DataError(f"{path}: no page {page}, it has {len(pages)}; choose another --page")
    tags, claimed = pages[page - 1], 0
    if tags:
        with imagefile.decoding(path):
            width, height = int(tags[imagefile.WIDTH]), int(tags[imagefile.HEIGHT])
            imagefile.check_size(path, width, height)
            claimed = width * height
            values = _plain_tiff(raw, tags)
        if values is not None:
            return values
    picture: ImageFile | None = None
    try:
        picture = imagefile.open_picture(path, raw, page)
    except DataError:
        if not raw.startswith(imagefile.TIFF_MAGIC) or page > 1:
            raise  # else a rare kind, if it is not damaged
    # OpenCV decodes the first page only, and takes the memory for what a file claims beforehand.
    for_opencv = picture is None or imagefile.is_deep_colour(raw, picture)
    if for_opencv and (page > 1 or claimed > len(raw) * MOST_PACKED):
        raise DataError(f"{path}: cut short or of a rare kind; copy it or export it as 8-bit PNG")
    palette = picture is not None and picture.mode in ("P", "PA")
    stored = imagefile.stored_values(path, raw, picture, colours or not palette)
    values = imagefile.few_bits(raw, stored)
    return values[..., :3] if values.ndim == 3 else values


def palette_of(path: Path, page: int = 1) -> Colours:
    """The colours of a palette file by index; () for a file without a palette, or a rare kind.

    Only the head of the file is looked at, no pixel is decoded.
    """
    raw = imagefile.read_bytes(path)
    decoder = next(
        (kind for magic, kind in imagefile.DECODERS.items() if raw.startswith(magic)), None
    )
    if decoder is None:
        return ()
    with suppress(Exception), warnings.catch_warnings():  # reading it says what is wrong with it
        warnings.simplefilter("ignore")
        picture = decoder(io.BytesIO(raw))
        if page > 1 and count_pages(path) > 1:
            picture.seek(page - 1)
        if picture.mode in ("P", "PA") and picture.palette is not None:
            stored = picture.palette
            one = Image.new("P", (1, 1))
            one.putpalette(stored.palette, stored.rawmode or stored.mode)
            levels = one.getpalette("RGB") or []
            return tuple(zip(levels[::3], levels[1::3], levels[2::3], strict=True))
    return ()


class PaletteCheck:
    """Whether the palette indices of several masks mean the same: one index, one colour.

    Only indices that occur in a mask count, so that palettes may differ in what no pixel has.
    """

    def __init__(self) -> None:
        self.differing = ""  # the first two files that differ, and in what
        self.found = False  # there is a palette file
        self._colours: dict[int, tuple[Colour, Path]] = {}  # of each index
        self._indices: dict[Colour, tuple[set[int], Path, Colours]] = {}

    def add(self, path: Path, colours: Colours, used: Iterable[int]) -> None:
        """Compare a mask's palette, of which it uses some indices, with those before."""
        self.found = True
        own: defaultdict[Colour, set[int]] = defaultdict(set)
        for index in (index for index in used if index < len(colours)):
            colour = colours[index]
            own[colour].add(index)
            known, other = self._colours.setdefault(index, (colour, path))
            if known != colour:
                self._differ(f"index {index} is {known} in {other.name}, {colour} in {path.name}")
        for colour, indices in own.items():
            numbers, other, whole = self._indices.setdefault(colour, (set(), path, colours))
            if numbers and not numbers & indices and whole != colours:
                each = f"{min(numbers)} in {other.name}, {min(indices)} in {path.name}"
                self._differ(f"colour {colour} has index {each}")
            numbers |= indices

    def _differ(self, what: str) -> None:
        self.differing = self.differing or what

    @property
    def grays(self) -> set[int]:
        """Gray levels among the colours that occur."""
        return {colour[0] for colour in self._indices if len(set(colour)) == 1}

    @property
    def coloured(self) -> bool:
        """Whether a colour that occurs is no gray level."""
        return any(len(set(colour)) > 1 for colour in self._indices)


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
    if full is not None and (high - low) * 255 / full >= imagefile.SMALLEST_SPAN:
        note, offset, scale = f"0..{full:g} scaled to 0..255", 0.0, 255 / full
    else:
        note = "smallest..largest value of each image stretched to 0..255"
        offset, scale = low, 255 / (high - low) if high - low > 1 / LARGEST else 0.0
    return ((values - offset) * scale + 0.5).astype(np.uint8), f"{pixels.dtype} values: {note}"


def _plain_tiff(raw: bytes, tags: dict[int, Any]) -> Array | None:
    """Decode a page of one 8 to 64-bit sample a pixel, plain or deflate; None: another kind."""
    # Pillow and OpenCV know neither 64-bit integers nor negative 8-bit ones.
    bits, compression = tags.get(imagefile.BITS, (1,)), tags.get(COMPRESSION, 1)
    number = NUMBERS.get(tags.get(SAMPLE_FORMAT, (1,))[0], "")
    if (
        len(bits) != 1
        or bits[0] not in ((16, 32, 64) if number == "f" else (8, 16, 32, 64))
        or not number
        or tags.get(SAMPLES, 1) != 1
        or tags.get(PHOTOMETRIC) != 1
        or tags.get(PREDICTOR, 1) != 1
        or compression not in (1, 8, 32946)
        or not tags.keys() >= {OFFSETS, COUNTS}
    ):
        return None
    height, width = int(tags[imagefile.HEIGHT]), int(tags[imagefile.WIDTH])
    kind = np.dtype(f"{'<' if raw.startswith(b'II') else '>'}{number}{bits[0] // 8}")
    size = height * width * kind.itemsize
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
    values = np.frombuffer(data, kind, height * width).reshape(height, width)
    return values.astype(kind.newbyteorder("="))
