"""Image and mask files, decoded to 8 bits."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from utils.files import DataError, special_kind

Array = NDArray[Any]
Pixels = NDArray[np.uint8]

MAX_PIXELS = 400_000_000  # 20000 x 20000: more is refused before memory is taken for it
PNG_MAGIC, JPEG_MAGIC = b"\x89PNG", b"\xff\xd8\xff"
BIG_TIFF = (b"II+\0", b"MM\0+")  # with 64-bit offsets
TIFF_MAGIC = (b"II*\0", b"MM\0*", *BIG_TIFF)
# What a file begins with decides how it is read, whatever its name ends with.
DECODERS: dict[bytes, type[ImageFile]] = dict.fromkeys(TIFF_MAGIC, TiffImageFile)
DECODERS |= {PNG_MAGIC: PngImageFile, JPEG_MAGIC: JpegImageFile, b"BM": BmpImageFile}
DECODERS |= {b"RIFF": WebPImageFile}
WIDTH, HEIGHT, BITS, ORIENTATION = 256, 257, 258, 274  # tags of a TIFF
SMALLEST_SPAN = 64  # of 256 levels; values that would fill fewer are stretched

_stderr = threading.Lock()  # one thread at a time silences file descriptor 2
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is lower; check_size has the one that counts


def read_image(path: str | Path) -> Pixels:
    """Read an image as uint8: (H, W) when it is gray, (H, W, 3) in RGB order when it has colour.

    Reads jpg, png, bmp, webp and tif (the first page) of 8 or 16 bits: gray, RGB, palette, 1-bit,
    with or without transparency, which is dropped. An image whose three channels are equal counts
    as gray. 16 bits become 8 as in ``to_8_bit``. An orientation noted in the file (EXIF) is
    ignored, in images and masks alike. Raises DataError for a file that cannot be read, is cut
    short, holds another kind of pixels, or claims more than ``MAX_PIXELS``.
    """
    pixels = _first_page(path, read_bytes(path), colours=True)
    if pixels.dtype not in (np.bool_, np.uint8) and (
        pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 65535
    ):
        raise DataError(f"{path}: pixels are {pixels.dtype}; save it with 8 or 16 bits")
    return gray_or_rgb(to_8_bit(pixels))


def read_mask(path: str | Path) -> Pixels:
    """Read a mask as uint8 (H, W), pixel value = class id; a palette PNG keeps its indices.

    Raises DataError as ``read_image``, and for a JPEG, colours, fractions, and values above 255.
    """
    raw = read_bytes(path)
    ids = few_bits(raw, _first_page(path, raw, colours=False))
    if raw.startswith(JPEG_MAGIC):
        found = f"{path}: a JPEG, whatever its name; JPEG changes class ids"
        raise DataError(f"{found}: export the mask as PNG")
    if raw[:4] == b"RIFF" and raw[12:16] != b"VP8L" and b"VP8L" not in raw:
        found = f"{path}: a WebP with loss, which changes class ids"
        raise DataError(f"{found}; export the mask as PNG")
    if has_colour(ids):
        colours = len(np.unique(ids[..., :3].astype(np.int64) @ (2**32, 2**16, 1)))
        cure = "save one channel (8-bit gray or palette) with pixel value = class id"
        raise DataError(f"{path}: coloured mask ({colours} colours); {cure}")
    ids = ids[..., 0] if ids.ndim == 3 else ids
    if ids.dtype.kind == "f" and not (np.isfinite(ids).all() and (ids == np.rint(ids)).all()):
        raise DataError(f"{path}: fractions in a mask; pixel values must be class ids")
    low, high = ids.min(), ids.max()
    if low < 0 or high > 255:
        value = high if high > 255 else low
        raise DataError(f"{path}: value {value} in a mask; pixel values must be class ids")
    return np.array(ids, np.uint8, order="C")


def has_colour(pixels: Array) -> bool:
    """Whether the first three channels of (H, W, 3 or more) differ anywhere; False for (H, W)."""
    bands = (pixels[top : top + 256, ..., :3] for top in range(0, len(pixels), 256))
    return pixels.ndim == 3 and any((band != band[..., :1]).any() for band in bands)


def gray_or_rgb(pixels: Array) -> Pixels:
    """A copy of (H, W, ...): (H, W, 3) where it has colour, else (H, W); without transparency."""
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if has_colour(pixels) else pixels[..., 0]
    return np.array(pixels, np.uint8, order="C")  # Pillow's own arrays are read-only


def to_8_bit(pixels: Array) -> Pixels:
    """Turn values of 1 or 16 bits (any shape) into 8-bit ones, keeping their contrast.

    Cameras of 10 or 12 bits write 16-bit files, so the values are scaled by the smallest of 8, 10,
    12, 14 and 16 bits that holds the largest. If they then span fewer than 64 of the 256 levels,
    the range smallest..largest is stretched to 0..255 instead. 8 bits stay as they are.
    """
    if pixels.dtype in (np.bool_, np.uint8):
        return pixels * np.uint8(255) if pixels.dtype == np.bool_ else pixels
    low, high = int(pixels.min()), int(pixels.max())
    full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    offset, scale = 0, 255 / full
    if low < high and (high - low) * scale < SMALLEST_SPAN:
        offset, scale = low, 255 / (high - low)
    levels = np.maximum(np.arange(high + 1, dtype=np.float64) - offset, 0) * scale + 0.5
    table = levels.astype(np.uint8)
    result = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), 256):  # an index is made of eight bytes a pixel
        result[top : top + 256] = table[pixels[top : top + 256]]
    return result


def _first_page(path: str | Path, raw: bytes, colours: bool) -> Array:
    """The values of a file of 8 or 16 bits, see ``stored_values``; its bytes are given."""
    picture = open_picture(path, raw)  # Pillow notices files that were cut short
    if picture is None:
        with decoding(path):
            tags = tiff_pages(raw)[0]
            check_size(path, int(tags[WIDTH]), int(tags[HEIGHT]))
            bits = max(tags.get(BITS, (1,)))
        if bits > 16:
            raise DataError(f"{path}: pixels have {bits} bits; save it with 8 or 16 bits")
    return stored_values(path, raw, picture, colours)


def stored_values(path: str | Path, raw: bytes, picture: ImageFile | None, colours: bool) -> Array:
    """The values that a file holds: (H, W), or (H, W, 3 or more) in RGB order; any number type.

    ``picture`` is what ``open_picture`` made of the bytes. With ``colours``, a palette's indices
    become its colours, and CMYK and the like RGB. Raises DataError for what is damaged, cut short,
    or of a kind that OpenCV does not know either.
    """
    if picture is None or is_deep_colour(raw, picture):
        with decoding(path), silence():
            pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise broken(path)
        return np.asarray(pixels[..., 2::-1] if pixels.ndim == 3 else pixels)
    plain = picture.mode in ("1", "F", "I", "L", "LA", "La", "RGB") or picture.mode[:4] == "I;16"
    with decoding(path):  # no convert() of what needs no change: it copies
        values = np.asarray(picture if plain or not colours else picture.convert("RGB"))
    return values[..., 0] if values.ndim == 3 and values.shape[2] == 2 else values  # no opacity


def few_bits(raw: bytes, values: Array) -> Array:
    """Undo that Pillow spreads the levels of a gray PNG of 2 or 4 bits over 0..255."""
    if raw.startswith(PNG_MAGIC) and raw[24] in (2, 4) and raw[25] == 0:
        return values // (255 // (2 ** raw[24] - 1))
    return values


def is_deep_colour(raw: bytes, picture: ImageFile) -> bool:
    """16 bits with colour or transparency, of which Pillow keeps the high byte only."""
    if raw.startswith(PNG_MAGIC):
        return raw[24] == 16 and raw[25] != 0
    bits = getattr(picture, "tag_v2", {}).get(BITS, (8,))
    return picture.mode in ("RGB", "RGBA", "RGBX") and max(bits) > 8


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an image file, a TIFF's without its orientation; raises DataError.

    A pipe, socket or device is refused without opening it.
    """
    if kind := special_kind(path):
        raise DataError(f"{path}: {kind}, not a file; give a file with an image")
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
    if not raw:
        raise DataError(f"{path}: empty file (0 bytes); copy it again")
    if raw.startswith(TIFF_MAGIC):
        with decoding(path):
            raw = _upright(raw)
    return raw


def open_picture(path: str | Path, raw: bytes, page: int = 1) -> ImageFile | None:
    """Decode what ``read_bytes`` returned with Pillow; None for a TIFF that it has no mode for.

    Raises DataError for what is not an image, damaged, cut short, or above ``MAX_PIXELS``.
    """
    decoder = next((kind for magic, kind in DECODERS.items() if raw.startswith(magic)), None)
    if decoder is None:
        kinds = "jpg, png, bmp, tif or webp"
        raise DataError(f"{path}: not an image of type {kinds}; export it as one")
    with decoding(path), silence() if raw.startswith(TIFF_MAGIC) else nullcontext():
        try:
            picture = decoder(io.BytesIO(raw))
            if page > 1:
                picture.seek(page - 1)
        except SyntaxError:  # the kind of pixels is unknown
            if not raw.startswith(TIFF_MAGIC):
                raise
            return None
        check_size(path, *picture.size)
        ends = [tile[1][2:] for tile in picture.tile if tile[1] is not None]
        # A WebP is decoded as a whole.
        if (
            decoder is not WebPImageFile
            and tuple(map(max, zip(*ends, strict=True))) != picture.size
        ):
            raise broken(path)  # Pillow would take what the file lacks for black
        picture.load()
    return picture


@contextmanager
def decoding(path: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError of one line, and silence its warnings."""
    try:
        with warnings.catch_warnings():
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


def tiff_pages(raw: bytes) -> list[dict[int, Any]]:
    """The tags of each page of a TIFF, as far as they can be read; of any other file none."""
    return [tags for tags in _directories(raw).values() if WIDTH in tags and HEIGHT in tags]


def _directories(raw: bytes) -> dict[int, dict[int, Any]]:
    """Where the directories of a TIFF begin, and their tags."""
    stream, found = io.BytesIO(raw), dict[int, dict[int, Any]]()
    # Whatever a damaged file causes: reading its pixels says so in one line.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        directory = ImageFileDirectory_v2(raw[:16] if raw.startswith(BIG_TIFF) else raw[:8])
        while 0 < directory.next < len(raw) - 8 and directory.next not in found:
            start = directory.next
            found[start] = {}
            stream.seek(start)
            directory.load(stream)
            found[start] = dict(directory)
    return found


def _upright(raw: bytes) -> bytes:
    """The bytes of a TIFF without its orientation, which Pillow and OpenCV would apply."""
    order = "<" if raw.startswith(b"II") else ">"
    # The count of entries, and within each of them: its length, and where its value stands.
    count, step, value = ("Q", 20, 12) if raw.startswith(BIG_TIFF) else ("H", 12, 8)
    edited = bytearray(raw)
    for start in _directories(raw):
        first = start + struct.calcsize(count)
        end = first + struct.unpack_from(order + count, raw, start)[0] * step
        for place in range(first, min(end, len(raw) - step), step):
            if struct.unpack_from(f"{order}H", raw, place)[0] == ORIENTATION:
                struct.pack_into(f"{order}H", edited, place + value, 1)
    return bytes(edited)


def broken(path: str | Path) -> DataError:
    """The one line for a file that its decoder cannot make sense of."""
    return DataError(f"{path}: damaged or cut short, or not an image; copy or export it again")
