"""Images and masks resized and kept once in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imaging.gray_range import EACH_IMAGE, Conversion, check_finite, has_8_bits
from imaging.imagefile import UPRIGHT, Pixels, decode, gray_or_rgb, read_mask
from utils.files import DataError
from utils.metrics import IGNORED


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
    """Decoded images and masks, each file read once and kept with 8 bits a value.

    They are resized to ``image_size`` x ``image_size`` pixels (0: as they are). Unlabelled pixels,
    ``ignore_label`` in the mask files, become 255. ``gray`` makes 8 bits of images with more.
    """

    def __init__(
        self,
        image_size: int = 0,
        ignore_label: int | None = None,
        *,
        gray: Conversion = EACH_IMAGE,
    ) -> None:
        self.gray = gray
        self.deep: dict[Path, str] = {}  # images of more than 8 bits: their number type
        self.turned: dict[Path, int] = {}  # images that an EXIF orientation turned, and which one
        self.image_size, self.ignore_label = image_size, ignore_label
        # numpy, not torch: spawned worker processes get plain copies, where every tensor would
        # hold a file descriptor of shared memory.
        self._kept: dict[tuple[str, Path], tuple[Pixels, tuple[int, int]]] = {}

    def image(self, path: Path) -> Tensor:
        """uint8 (1, H, W) of a gray image or (3, H, W) of one with colour; raises DataError.

        The tensor is the store's own memory: do not change it in place.
        """
        return torch.from_numpy(self._load("image", path)[0])

    def mask(self, path: Path) -> Tensor:
        """uint8 (H, W) of class ids, the store's own memory as above; raises DataError."""
        return torch.from_numpy(self._load("mask", path)[0])

    def file_size(self, kind: str, path: Path) -> tuple[int, int]:
        """H, W in the file, before resizing; ``kind`` is 'image' or 'mask'; raises DataError."""
        return self._load(kind, path)[1]

    def _load(self, kind: str, path: Path) -> tuple[Pixels, tuple[int, int]]:
        key = (kind, path)
        if key not in self._kept:
            pixels = self._image(path) if kind == "image" else read_mask(path)
            size = (pixels.shape[0], pixels.shape[1])
            if kind == "mask" and self.ignore_label not in (None, IGNORED):
                if (pixels == IGNORED).any():  # in memory it would mean unlabelled
                    found = f"value {IGNORED}, but unlabelled pixels are {self.ignore_label}"
                    raise DataError(f"{path}: {found}; correct the mask or --ignore_label")
                pixels = np.where(pixels == self.ignore_label, np.uint8(IGNORED), pixels)
            if self.image_size:
                resize = resize_image if kind == "image" else resize_mask
                pixels = resize(pixels, self.image_size)
            if kind == "image":
                pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            self._kept[key] = np.ascontiguousarray(pixels), size
        return self._kept[key]

    def _image(self, path: Path) -> Pixels:
        """As ``read_image``; notes what it changed."""
        picture = decode(path)
        check_finite(path, picture.values)
        if not has_8_bits(picture.values):
            self.deep[path] = str(picture.values.dtype)
        if picture.orientation != UPRIGHT:
            self.turned[path] = picture.orientation
        return gray_or_rgb(self.gray.apply(picture.values))


def fingerprint(samples: Iterable[Any], store: ImageStore) -> str:
    """A short hash of the names and decoded pixels of samples (``data.Sample``)."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.name.encode(errors="backslashreplace"))
        mask = [] if sample.mask is None else [store.mask(sample.mask)]
        for pixels in (store.image(sample.image), *mask):
            digest.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
    return digest.hexdigest()[:16]
