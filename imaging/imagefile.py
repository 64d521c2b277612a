"""Image and mask files, decoded: the values that they hold, upright, and 8 bits made of them."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from imaging import tiff
from imaging.gray_range import EACH_IMAGE, Conversion, check_finite
from utils.files import DataError, special_kind

Array = NDArray[Any]
Pixels = NDArray[np.uint8]

CLASS_IDS = "pixel values must be class ids: export it as an 8-bit PNG of them"
MAX_PIXELS = 400_000_000  # 20000 x 20000: more is refused before memory is taken for it
PNG_MAGIC, JPEG_MAGIC, WEBP_MAGIC = b"\x89PNG", b"\xff\xd8\xff", b"RIFF"
# What a file begins with decides how it is read, whatever its name ends with.
DECODERS: dict[bytes, type[ImageFile]] = {
    PNG_MAGIC: PngImageFile,
    JPEG_MAGIC: JpegImageFile,
    WEBP_MAGIC: WebPImageFile,
    b"BM": BmpImageFile,
}
ORIENTATION = 274  # EXIF's tag, which is TIFF's
READING = 2  # to be raised where files that are not plain become other pixels than before
UPRIGHT = 1  # the value of it that turns nothing
TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored upside down",
    5: "mirrored and turned by 90 degrees",
    6: "turned by 90 degrees",
    7: "mirrored and turned by 270 degrees",
    8: "turned by 270 degrees",
}

_stderr = threading.Lock()  # one thread at a time silences file descriptor 2
_filters = threading.RLock()  # and one Python's warnings, whose filters all threads share
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is lower; check_size has the one that counts


class Picture(NamedTuple):
    """What a file holds."""

    values: Array  # (H, W), or (H, W, 3) RGB; any number type
    palette: Pixels | None  # (N, 3) colours by index, of a palette file
    orientation: int  # EXIF's, 1 to 8, already applied to the values
    lossy: bool  # packed by JPEG or the like, which changes values


def read_image(path: str | Path, gray: Conversion = EACH_IMAGE, page: int = 1) -> Pixels:
    """Read an image as uint8: (H, W) when it is gray, (H, W, 3) in RGB order when it has colour.

    Reads jpg, png, bmp, webp and tif: gray, RGB, palette, with or without transparency, which is
    dropped; 1 to 64 bits, whole numbers and floats. An image whose three channels are equal counts
    as gray. ``gray`` makes 8 bits of more (``imaging.gray_range``). An orientation noted in the
    file (EXIF) is applied. Raises DataError for a file that cannot be read, is cut short, holds
    another kind of pixels, a value that is not finite, or more than ``MAX_PIXELS``.
    """
    values = decode(path, page).values
    check_finite(path, values)
    return gray_or_rgb(gray.apply(values))


def read_mask(path: str | Path, page: int = 1) -> Pixels:
    """Read a mask as uint8 (H, W), pixel value = class id; a palette PNG keeps its indices.

    Raises DataError as ``read_image``, and for a JPEG, colours, fractions, and values above 255.
    """
    picture = decode(path, page, seen=False)
    ids = picture.values
    if picture.lossy:
        found = f"{path}: packed by JPEG or with loss, whatever its name; that changes class ids"
        raise DataError(f"{found}: export the mask as PNG")
    if has_colour(ids):
        with np.errstate(invalid="ignore"):  # of floats that are no number
            colours = len(np.unique(ids[..., :3].astype(np.int64) @ (2**32, 2**16, 1)))
        cure = "save one channel (8-bit gray or palette) with pixel value = class id"
        raise DataError(f"{path}: coloured mask ({colours} colours); {cure}")
    ids = ids[..., 0] if ids.ndim == 3 else ids
    if ids.dtype.kind == "f" and not (np.isfinite(ids).all() and (ids == np.rint(ids)).all()):
        raise DataError(f"{path}: fractions in a mask; {CLASS_IDS}")
    low, high = ids.min(), ids.max()
    if low < 0 or high > 255:
        value = high if high > 255 else low
        raise DataError(f"{path}: value {value} in a mask; {CLASS_IDS}")
    return np.array(ids, np.uint8, order="C")


def decode(path: str | Path, page: int = 1, seen: bool = True) -> Picture:
    """Decode a page (counted from 1) of a file, and turn it upright by its EXIF orientation.

    The values are those ``seen``: colours of a palette, and black where zero is white. Otherwise
    they are those stored, palettes by index: the ids of a mask. Raises DataError.
    """
    raw = read_bytes(path)
    read = _decode_tiff if raw.startswith(tiff.TIFF_MAGIC) else _decode_picture
    picture = read(path, raw, page, seen)
    return picture._replace(values=turned(picture.values, picture.orientation))


def turn_text(orientation: int) -> str:
    """What an orientation did to an image, in words for a message."""
    return f"{TURNS[orientation]}, as its EXIF orientation ({orientation}) says"


def has_more_bits(path: str | Path) -> bool:
    """Whether an image needs a range to become 8 bits; False for a file that cannot be read."""
    try:
        if special_kind(path):
            return False
        with open(path, "rb") as file:
            start = file.read(26)
            if start.startswith(tiff.TIFF_MAGIC):
                file.seek(0)
                return tiff.has_more_bits(file)
    except Exception:  # reading its pixels says what is wrong
        return False
    return start.startswith(PNG_MAGIC) and len(start) == 26 and start[24] == 16


def reading_of(path: str | Path, page: int = 1) -> dict[str, int]:
    """The version of reading, of files whose pixels depend on it; of all others nothing.

    These have an orientation, or are TIFF with tags that programs read in different ways, this one
    at first, too. No pixel is decoded.
    """
    plain = True
    with suppress(Exception), _filters, warnings.catch_warnings():  # decoding says what is wrong
        warnings.simplefilter("ignore")
        raw = b"" if special_kind(path) else _start_of(path)
        if raw.startswith(tiff.TIFF_MAGIC):
            with open(path, "rb") as file:
                plain = tiff.is_plain(file, page)
        else:
            decoder = next(kind for magic, kind in DECODERS.items() if raw.startswith(magic))
            with decoder(path) as picture:
                plain = _orientation(picture) == UPRIGHT
    return {} if plain else {"reading": READING}


def read_header(path: str | Path) -> tuple[int, int, int] | None:
    """Height, width and channels (1, or 3 at most) without decoding; None if they are not told."""
    with suppress(Exception):  # decoding says what is wrong
        raw = b"" if special_kind(path) else _start_of(path)
        if raw.startswith(tiff.TIFF_MAGIC):
            with open(path, "rb") as file:
                return tiff.read_header(file)
        decoder = next(kind for magic, kind in DECODERS.items() if raw.startswith(magic))
        with decoder(path) as picture:
            gray = picture.mode in ("1", "F", "I", "L", "LA", "La") or picture.mode[:4] == "I;16"
            return picture.height, picture.width, 1 if gray else 3
    return None


def _start_of(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def turned(pixels: Array, orientation: int) -> Array:
    """Pixels (H, W, ...) as an EXIF orientation wants them seen: a view of them."""
    if orientation in (5, 6, 7, 8):  # rows are columns
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def has_colour(pixels: Array) -> bool:
    """Whether the first three channels of (H, W, 3 or more) differ anywhere; False for (H, W)."""
    bands = (pixels[top : top + 256, ..., :3] for top in range(0, len(pixels), 256))
    return pixels.ndim == 3 and any((band != band[..., :1]).any() for band in bands)


def gray_or_rgb(pixels: Array) -> Pixels:
    """A copy of (H, W, ...): (H, W, 3) where it has colour, else (H, W); without transparency."""
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if has_colour(pixels) else pixels[..., 0]
    return np.array(pixels, np.uint8, order="C")  # Pillow's own arrays are read-only


def _decode_tiff(path: str | Path, raw: bytes, number: int, seen: bool) -> Picture:
    with decoding(path), silence():
        try:
            page = tiff.read_page(raw, number, partial(check_size, path))
            values = page.seen() if seen else page.values
        except tiff.Unread as error:
            raise DataError(f"{path}: {error}") from None
        except StopIteration:
            if number == 1:
                raise
            raise DataError(f"{path}: no page {number} in it; choose another --page") from None
        orientation = page.orientation if page.orientation in TURNS else UPRIGHT
        return Picture(values, page.palette, orientation, page.lossy)


def _decode_picture(path: str | Path, raw: bytes, page: int, seen: bool) -> Picture:
    """Decode what is no TIFF, by Pillow; 16 bits with colour by OpenCV, as Pillow keeps 8."""
    picture = open_picture(path, raw, page)
    values = _values(path, raw, picture, seen)
    if not seen and raw.startswith(PNG_MAGIC) and raw[24] in (2, 4) and raw[25] == 0:
        values = values // (255 // (2 ** raw[24] - 1))  # Pillow spreads few bits over 0..255
    palette = None
    if picture.mode in ("P", "PA"):
        palette = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    lossy = raw.startswith(JPEG_MAGIC) or (raw.startswith(WEBP_MAGIC) and b"VP8L" not in raw)
    return Picture(values, palette, _orientation(picture), lossy)


def _values(path: str | Path, raw: bytes, picture: ImageFile, seen: bool) -> Array:
    """The values of a picture, (H, W), or (H, W, 3) in RGB order."""
    if raw.startswith(PNG_MAGIC) and raw[24] == 16 and raw[25] != 0:
        with decoding(path), silence():
            pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise broken(path)
        return np.asarray(pixels[..., 2::-1] if pixels.ndim == 3 else pixels)
    plain = picture.mode in ("1", "F", "I", "L", "LA", "La", "RGB") or picture.mode[:4] == "I;16"
    with decoding(path):  # no convert() of what needs no change: it copies
        values = np.asarray(picture if plain or not seen else picture.convert("RGB"))
    if values.ndim == 3:
        return values[..., 0] if values.shape[2] == 2 else values[..., :3]  # no opacity
    return values


def _orientation(picture: ImageFile) -> int:
    """EXIF's orientation; 1 where there is none, or none that can be read."""
    try:
        with _filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = int(picture.getexif().get(ORIENTATION, UPRIGHT))
    except Exception:  # the pixels are sound
        return UPRIGHT
    return found if found in TURNS else UPRIGHT


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an image file; raises DataError, for a pipe or device without opening it."""
    if kind := special_kind(path):
        raise DataError(f"{path}: {kind}, not a file; give a file with an image")
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
    if not raw:
        raise DataError(f"{path}: empty file (0 bytes); copy it again")
    return raw


def open_picture(path: str | Path, raw: bytes, page: int = 1) -> ImageFile:
    """Decode the bytes of what is no TIFF with Pillow.

    Raises DataError for what is not an image, damaged, cut short, or above ``MAX_PIXELS``.
    """
    decoder = next((kind for magic, kind in DECODERS.items() if raw.startswith(magic)), None)
    if decoder is None:
        kinds = "jpg, png, bmp, tif or webp"
        raise DataError(f"{path}: not an image of type {kinds}; export it as one")
    with decoding(path):
        picture = decoder(io.BytesIO(raw))
        if page > 1:
            picture.seek(page - 1)
        check_size(path, *picture.size)
        ends = [tile[1][2:] for tile in picture.tile if tile[1] is not None]
        # Pillow would take what the file lacks for black; a WebP is decoded as a whole.
        whole = decoder is WebPImageFile or tuple(map(max, zip(*ends, strict=True))) == picture.size
        if not whole:
            raise broken(path)
        picture.load()
    return picture


@contextmanager
def decoding(path: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError of one line, and silence its warnings."""
    try:
        with _filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path}: does not fit into the memory; make the image smaller") from None
    except Exception:  # decoders meet broken files with any exception
        raise broken(path) from None


@contextmanager
def silence() -> Iterator[None]:
    """Let libtiff and libpng, which print to file descriptor 2 themselves, print nowhere."""
    with _stderr:
        try:
            kept = os.dup(2)
        except OSError:  # there is no such descriptor, so nothing is printed
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def check_size(path: str | Path, width: int, height: int) -> None:
    """Raise DataError if a file claims more than ``MAX_PIXELS``, or none."""
    if width * height > MAX_PIXELS:
        most = f"more than the {MAX_PIXELS // 1_000_000} million that can be read"
        cure = "cut it into smaller images, or copy it again if it is not so large"
        raise DataError(f"{path}: {width}x{height} pixels, {most}; {cure}")
    if min(width, height) < 1:
        raise broken(path)


def broken(path: str | Path) -> DataError:
    """The one line for a file that its decoder cannot make sense of."""
    return DataError(f"{path}: damaged or cut short, or not an image; copy or export it again")
