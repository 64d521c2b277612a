"""Image and mask files: decoded to 8 bits, resized, and kept once in memory."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils.losses import IGNORED

Pixels = NDArray[np.uint8]
PNG_MAGIC, TIFF_MAGICS = b"\x89PNG", (b"II*\0", b"MM\0*")


class DataError(ValueError):
    """Something is wrong with the user's files: one line each, 'file: what; cure'."""


def read_image(path: str | Path) -> Pixels:
    """Read an image as uint8: (H, W) when it is gray, (H, W, 3) in RGB order when it has colour.

    Reads jpg, png, bmp and tif (the first page) of 8 or 16 bits: gray, RGB, palette, 1-bit, with
    or without transparency, which is dropped. An image whose three channels are equal counts as
    gray. 16 bits become 8 as in ``to_8_bit``. An orientation noted in the file (EXIF) is ignored,
    in images and masks alike.

    Raises:
        DataError: the file cannot be read, is cut short, or holds another kind of pixels.
    """
    picture, raw = _open(path)
    if picture is None or _is_deep_colour(picture, raw):
        pixels = _decode_with_opencv(path, raw)
    elif picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
        pixels = np.asarray(picture)
    else:
        # Palettes, CMYK and the like become RGB; 1-bit and gray with transparency become gray.
        gray = picture.mode in ("1", "L", "LA", "La")
        pixels = np.asarray(picture.convert("L" if gray else "RGB"))
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 65535:
            raise DataError(f"{path}: pixels are {pixels.dtype}; save it with 8 or 16 bits")
        pixels = to_8_bit(pixels)
    if pixels.ndim == 3:
        pixels = pixels[..., :3]
        if (pixels == pixels[..., :1]).all():
            pixels = pixels[..., 0]
    return np.array(pixels, np.uint8, order="C")  # a copy: Pillow's arrays are read-only


def read_mask(path: str | Path) -> Pixels:
    """Read a mask as uint8 (H, W), pixel value = class id; a palette PNG keeps its indices.

    Raises:
        DataError: the file cannot be read, is coloured, or holds values above 255.
    """
    picture, raw = _open(path)
    if picture is None or _is_deep_colour(picture, raw):
        ids = _decode_with_opencv(path, raw)
    else:
        ids = np.asarray(picture)
        if picture.mode == "L" and raw.startswith(PNG_MAGIC) and raw[24] in (2, 4):
            ids = ids // (255 // (2 ** raw[24] - 1))  # Pillow spreads 2 and 4 bits over 0..255
    if ids.ndim == 3:
        ids = ids[..., : 1 if ids.shape[-1] == 2 else 3]  # without transparency
        if (ids != ids[..., :1]).any():
            colours = len(np.unique(ids.reshape(-1, 3), axis=0))
            raise DataError(
                f"{path}: coloured mask ({colours} colours); "
                "save one channel (8-bit gray or palette) with pixel value = class id"
            )
        ids = ids[..., 0]
    low, high = ids.min(), ids.max()
    if low < 0 or high > 255:
        value = high if high > 255 else low
        raise DataError(f"{path}: value {value} in a mask; pixel values must be class ids")
    return np.array(ids, np.uint8, order="C")


def to_8_bit(pixels: NDArray[Any]) -> Pixels:
    """Turn 16-bit values (any shape) into 8-bit ones, keeping their contrast.

    Cameras of 10 or 12 bits write 16-bit files, so the values are scaled by the smallest of 8, 10,
    12, 14 and 16 bits that holds the largest. If they then span fewer than 64 of the 256 levels,
    the range smallest..largest is stretched to 0..255 instead.
    """
    low, high = int(pixels.min()), int(pixels.max())
    full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    if low < high and (high - low) * 255 / full < 64:
        offset, scale = low, 255 / (high - low)
    else:
        offset, scale = 0, 255 / full
    return ((pixels.astype(np.float64) - offset) * scale + 0.5).astype(np.uint8)


def resize_image(image: Pixels, size: int) -> Pixels:
    """Resize (H, W) or (H, W, 3) to ``size x size``: area average down, bilinear up, per axis."""
    rows, columns = image.shape[:2]
    small = cv2.resize(image, (min(columns, size), min(rows, size)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR), np.uint8)


def resize_mask(mask: Pixels, size: int) -> Pixels:
    """Resize class ids (H, W) to ``size x size`` by centre-aligned nearest."""
    picture = Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)
    return np.array(picture, np.uint8)


class ImageStore:
    """Decoded images and masks, each file read once and kept with 8 bits a pixel.

    Args:
        image_size: side in pixels to which everything is resized at loading; 0 = as they are.
        ignore_label: value of mask pixels that nobody labelled; in memory they become 255.
    """

    def __init__(self, image_size: int = 0, ignore_label: int | None = None) -> None:
        self.image_size, self.ignore_label = image_size, ignore_label
        # numpy, not torch: worker processes that are started afresh get plain copies this way,
        # where every tensor would hold a file descriptor of shared memory.
        self._pixels: dict[tuple[str, Path], Pixels] = {}
        self._file_sizes: dict[tuple[str, Path], tuple[int, int]] = {}

    def image(self, path: Path) -> Tensor:
        """uint8 (1, H, W) of a gray image or (3, H, W) of one with colour; raises DataError.

        The tensor is the store's own memory: do not change it in place.
        """
        return torch.from_numpy(self._load("image", path))

    def mask(self, path: Path) -> Tensor:
        """uint8 (H, W) of class ids, the store's own memory as above; raises DataError."""
        return torch.from_numpy(self._load("mask", path))

    def file_size(self, kind: str, path: Path) -> tuple[int, int]:
        """H, W in the file, before resizing; ``kind`` is 'image' or 'mask'; raises DataError."""
        self._load(kind, path)
        return self._file_sizes[kind, path]

    def _load(self, kind: str, path: Path) -> Pixels:
        key = (kind, path)
        if key not in self._pixels:
            pixels = read_image(path) if kind == "image" else read_mask(path)
            self._file_sizes[key] = pixels.shape[0], pixels.shape[1]
            if self.image_size:
                resize = resize_image if kind == "image" else resize_mask
                pixels = resize(pixels, self.image_size)
            if kind == "mask" and self.ignore_label is not None:
                pixels = np.where(pixels == self.ignore_label, np.uint8(IGNORED), pixels)
            if kind == "image":
                pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            self._pixels[key] = np.ascontiguousarray(pixels)
        return self._pixels[key]


def _open(path: str | Path) -> tuple[Image.Image | None, bytes]:
    """Decode with Pillow, which notices files that were cut short, and return the bytes too.

    None stands for a TIFF of a kind that Pillow does not know.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
    if not raw:
        raise DataError(f"{path}: empty file (0 bytes); copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is raised below, in one line
            picture = Image.open(io.BytesIO(raw))
            picture.load()
    except Exception as error:  # decoders meet broken files with any exception
        if isinstance(error, UnidentifiedImageError) and raw.startswith(TIFF_MAGICS):
            return None, raw
        raise _broken(path) from None
    return picture, raw


def _is_deep_colour(picture: Image.Image, raw: bytes) -> bool:
    """16 bits with colour or transparency, of which Pillow keeps the high byte only."""
    if raw.startswith(PNG_MAGIC):
        return raw[24] == 16 and raw[25] != 0
    bits = getattr(picture, "tag_v2", {}).get(258, (8,))  # 258: TIFF's bits per sample
    return picture.mode in ("RGB", "RGBA", "RGBX") and max(bits) > 8


def _decode_with_opencv(path: str | Path, raw: bytes) -> NDArray[Any]:
    """Decode what Pillow has no mode for, in RGB order."""
    log = getattr(cv2.utils, "logging", cv2)  # it moved into a module with OpenCV 5
    level = log.getLogLevel()
    log.setLogLevel(0)  # a broken file gets our line, not OpenCV's
    try:
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    finally:
        log.setLogLevel(level)
    if pixels is None:
        raise _broken(path)
    return np.asarray(pixels[..., 2::-1] if pixels.ndim == 3 else pixels)


def _broken(path: str | Path) -> DataError:
    return DataError(f"{path}: not an image, or cut short; copy or export it again")
