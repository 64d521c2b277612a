"""Images and masks resized and kept in memory, all of them or as many as it may take."""

from __future__ import annotations

import hashlib
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imaging.field import filled, resized_field, visible
from imaging.gray_range import EACH_IMAGE, Conversion, check_finite, has_8_bits
from imaging.imagefile import UPRIGHT, Pixels, decode, gray_or_rgb, read_header, read_mask
from imaging.index import Key, Seen, read_index, stamp_of, write_index
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
    """Decoded images and masks with 8 bits a value.

    They are resized to ``image_size`` x ``image_size`` pixels (0: as they are). Unlabelled pixels,
    ``ignore_label`` in the mask files, become 255. ``gray`` makes 8 bits of images with more.

    Each file is read once and kept. Where ``cache`` is given, at most so many bytes are kept: what
    was not used for the longest time makes room, and is read again when it is needed. A file that
    is then gone, or has other pixels, raises DataError. ``index`` is the file that keeps between
    starts what is known of a large set's files (``imaging.index``).

    ``deep`` has the images of more than 8 bits and their number type, ``turned`` those that an EXIF
    orientation turned, and which one; ``indexed`` the files known from an earlier start.
    """

    def __init__(
        self,
        image_size: int = 0,
        ignore_label: int | None = None,
        cache: int | None = None,
        index: Path | None = None,
        *,
        gray: Conversion = EACH_IMAGE,
    ) -> None:
        self.gray = gray
        self.image_size, self.ignore_label = image_size, ignore_label
        self.cache, self.processes = cache, 1  # copies of this store that share the cache
        self.lists: dict[object, list[Any]] = {}  # lists of files, for whoever takes them once
        self.digests: dict[tuple[Any, ...], Any] = {}  # by samples, see ``fingerprint``
        # What an earlier start knew of files that have not changed.
        self.deep: dict[Path, str] = {}
        self.turned: dict[Path, int] = {}
        self._seen: dict[Key, Seen] = {}
        known, self.hashes = read_index(index, self._terms())
        for key, seen in known.items():
            self._remember(key, seen)
        self.indexed = frozenset(known)
        self._index = index
        # numpy, not torch: spawned worker processes get plain copies, where every tensor would
        # hold a file descriptor of shared memory.
        self._kept: OrderedDict[Key, Pixels] = OrderedDict()  # the last used at the end
        self._bytes = 0  # of what is kept
        # Of every image that was read: None where it is visible everywhere, else where it is, an
        # eighth of a byte a pixel, so that the masks of many need no cache of their own.
        self._inside: dict[Path, Pixels | None] = {}
        self._lock = threading.Lock()  # a thread prepares batches while another one evaluates

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker process gets."""
        return {**vars(self), "_lock": None, "digests": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def keep_index(self) -> None:
        """Write what is known of the files for later starts."""
        if self._index is not None:
            write_index(self._index, self._terms(), self._seen, self.hashes)

    def _terms(self) -> tuple[Any, ...]:
        """How files become pixels: an index of other terms is none."""
        return self.image_size, self.ignore_label, str(self.gray.saved())

    def image(self, path: Path) -> Tensor:
        """uint8 (1, H, W) of a gray image or (3, H, W) of one with colour; raises DataError.

        The tensor is the store's own memory: do not change it in place.
        """
        return torch.from_numpy(self._load("image", path))

    def inside(self, path: Path) -> Tensor | None:
        """Where an image is not transparent, bool (H, W) as ``image`` gives it; None: everywhere.

        What is hidden there has the values of the nearest visible pixels (``field.filled``).
        """
        if path not in self._inside:
            self._load("image", path)
        if (bits := self._inside[path]) is None:
            return None
        height, width = self.shape(path)[1:]
        found = np.unpackbits(bits, count=height * width).reshape(height, width)
        return torch.from_numpy(found.astype(bool))

    @property
    def transparent(self) -> Path | None:
        """An image that was read and is transparent somewhere; None if there is none."""
        return next((path for path, inside in self._inside.items() if inside is not None), None)

    def mask(self, path: Path) -> Tensor:
        """uint8 (H, W) of class ids, the store's own memory as above; raises DataError."""
        return torch.from_numpy(self._load("mask", path))

    def file_size(self, kind: str, path: Path) -> tuple[int, int]:
        """H, W in the file, before resizing; ``kind`` is 'image' or 'mask'; raises DataError."""
        return self._look(kind, path).size

    def shape(self, path: Path) -> tuple[int, ...]:
        """The shape (1 or 3, H, W) of an image as ``image`` returns it; raises DataError."""
        return self._look("image", path).shape

    def ids(self, path: Path) -> tuple[int, ...]:
        """The values that occur in a mask as ``mask`` returns it; raises DataError."""
        return self._look("mask", path).ids

    def list_key(self, samples: Iterable[Any]) -> str:
        """A hash of the names and checksums of ``data.Sample``s; '' before all were read."""
        digest = hashlib.sha256()
        for sample in samples:
            files = [("image", sample.image), ("mask", sample.mask)][: 2 - (sample.mask is None)]
            if any(file not in self._seen for file in files):
                return ""
            parts = [(self._seen[file].shape, self._seen[file].checksum) for file in files]
            digest.update(f"{sample.name!a} {parts}\n".encode())
        return digest.hexdigest()

    def bytes_seen(self) -> int:
        """The memory that all files read so far would take."""
        return sum(int(np.prod(seen.shape)) for seen in self._seen.values())

    def bytes_expected(self, kind: str, path: Path) -> int:
        """The memory that a file will take at most, without decoding it; 0 if it does not tell."""
        if (kind, path) in self._seen:
            return int(np.prod(self._seen[kind, path].shape))
        height, width, channels = read_header(path) or (0, 0, 0)
        pixels = self.image_size**2 if self.image_size else height * width
        return pixels * (channels if kind == "image" else 1)

    def share(self, processes: int) -> None:
        """Let ``processes`` copies of this store together keep no more than ``cache``.

        A set that is kept as a whole stays as it is: forked processes share its memory.
        """
        if self.cache is not None and self._bytes < self.bytes_seen():
            self.processes = processes
            with self._lock:
                self._make_room()

    def _look(self, kind: str, path: Path) -> Seen:
        if (kind, path) not in self._seen:
            self._load(kind, path)
        return self._seen[kind, path]

    def _load(self, kind: str, path: Path) -> Pixels:
        key = (kind, path)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = self._read(key) if key not in self._seen else self._read_again(key)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pixels
                self._bytes += pixels.nbytes
            self._make_room()
        return pixels

    def _make_room(self) -> None:
        most = math.inf if self.cache is None else self.cache // self.processes
        while self._bytes > most:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def _read(self, key: Key) -> Pixels:
        """Decode and resize a file, and remember what it is like."""
        kind, path = key
        stamp = stamp_of(path)  # before it is read, or a change meanwhile would go unnoticed
        deep, orientation, inside = "", UPRIGHT, None
        if kind == "image":
            pixels, inside, deep, orientation = self._read_image(path)
        else:
            pixels = read_mask(path)
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
            inside = resized_field(inside, pixels.shape)
            self._inside[path] = None if inside is None else np.packbits(inside)
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        pixels = np.ascontiguousarray(pixels)
        ids = np.flatnonzero(np.bincount(pixels.ravel())).tolist() if kind == "mask" else ()
        checksum = zlib.crc32(pixels.data)
        seen = Seen(size, pixels.shape, checksum, tuple(ids), stamp, deep, orientation)
        self._remember(key, seen)
        return pixels

    def _read_again(self, key: Key) -> Pixels:
        """Read a file once more; DataError unless it has the pixels that it had."""
        before, found = self._seen[key], "it has other pixels"
        try:
            pixels = self._read(key)
            if self._seen[key].same_pixels(before):
                return pixels
            if self._index is not None:  # it may be wrong, too
                self._index.unlink(missing_ok=True)
        except DataError as error:
            found = str(error).removeprefix(f"{key[1]}: ").partition(";")[0]
        self._seen[key] = before
        raise DataError(
            f"{key[1]}: not as it was when the set was checked ({found}); put it back and give "
            "the same command, which goes on"
        )

    def _read_image(self, path: Path) -> tuple[Pixels, Pixels | None, str, int]:
        """An image, where it is visible, its number type if of over 8 bits, its orientation."""
        picture = decode(path)
        opaque = path in self._inside and self._inside[path] is None  # when it was read before
        inside = None if opaque else visible(path, picture.values.shape)
        values = filled(picture.values, inside)
        check_finite(path, values)
        deep = "" if has_8_bits(values) else str(values.dtype)
        return gray_or_rgb(self.gray.apply(values)), inside, deep, picture.orientation

    def _remember(self, key: Key, seen: Seen) -> None:
        self._seen[key] = seen
        if seen.deep:
            self.deep[key[1]] = seen.deep
        if seen.orientation != UPRIGHT:
            self.turned[key[1]] = seen.orientation


def fingerprint(samples: Iterable[Any], store: ImageStore) -> str:
    """A short hash of the names and decoded pixels of samples (``data.Sample``).

    The store keeps the hash of each folder's samples, so that no pixel is hashed twice, and between
    starts that of the whole list.
    """
    samples = list(samples)
    key = store.list_key(samples)
    if key not in store.hashes:
        found = _hash(samples, store)
        store.hashes[key := store.list_key(samples)] = found
    return store.hashes[key]


def _hash(samples: Iterable[Any], store: ImageStore) -> str:
    digest = hashlib.sha256()
    read: tuple[Any, ...] = ()
    for _, group in groupby(samples, key=lambda sample: sample.image.parent):
        new = tuple(group)
        read += new
        for sample in () if read in store.digests else new:
            _add(digest, sample, store)
        digest = store.digests.setdefault(read, digest).copy()
    return digest.hexdigest()[:16]


def _add(digest: Any, sample: Any, store: ImageStore) -> None:
    digest.update(sample.name.encode(errors="backslashreplace"))
    mask = [] if sample.mask is None else [store.mask(sample.mask)]
    for pixels in (store.image(sample.image), *mask):
        digest.update(f"{tuple(pixels.shape)}".encode())
        digest.update(pixels.numpy().ravel().data)


class Hashing:
    """``fingerprint`` of a folder's samples, taken while they are read for the first time.

    ``before`` are the samples of the folders before it. Where the store keeps few images, hashing
    them later would read them all once more.
    """

    def __init__(self, store: ImageStore, before: Sequence[Any] = ()) -> None:
        self._store, self._read = store, list(before)
        start = store.digests.get(tuple(before)) if before else hashlib.sha256()
        self._digest = None if start is None else start.copy()

    def add(self, sample: Any) -> None:
        """Hash the next sample; one that cannot be read, or is not read now, ends it."""
        if self._digest is None or ("image", sample.image) in self._store.indexed:
            self._digest = None
            return
        try:
            _add(self._digest, sample, self._store)
        except DataError:  # of a mask that nobody asked for yet
            self._digest = None
        self._read.append(sample)

    def keep(self) -> None:
        """Let the store know the hash, after the last sample of the folder."""
        if self._digest is not None and self._read:
            self._store.digests.setdefault(tuple(self._read), self._digest)
