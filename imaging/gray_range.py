"""From many gray levels to 256: which value becomes black and which white.

A microscope writes 10 to 16 bits, whole numbers or floats, and its files do not say which values
are meant to be seen. One range for a whole set keeps its images comparable: it leaves out the
darkest and the brightest 0.1 % of the set's pixels, so that no hot pixel decides. Images of 8 bits
stay as they are, under every rule, and what holds 8-bit levels in another form becomes them again.
Where a network has seen 8-bit images, others are brought to the levels of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.files import DataError

Array = NDArray[Any]
Pixels = NDArray[np.uint8]
Levels = tuple[float, float]  # of 0..255

LEFT_OUT = 0.001  # of a set's pixels, at each end of their range
LARGEST = 1e100  # of the values; what is computed from them, and one over it, stays finite
SMALLEST_SPAN = 64  # of 256 levels; by depth, values that would fill fewer are stretched
# Forms in which 8-bit levels are stored with more bits: a level is one step of these.
STEPS = (257.0, 256.0, 1 / 255)
STEP_ERROR = 0.01  # of a step, by rounding
_KEPT_BITS = 17  # of the 52 after the binary point; whole numbers to 2 ** 18 stay what they are
_BAND = 256  # rows converted at once: what is computed takes eight bytes a pixel
_INT16, _UINT16 = np.iinfo(np.int16), np.iinfo(np.uint16)


@dataclass(frozen=True)
class GrayRange:
    """The values that become 0 and 255; those between keep their order, those beyond are cut."""

    low: float
    high: float

    def __post_init__(self) -> None:
        ends = (float(self.low), float(self.high))
        if not all(abs(end) <= LARGEST for end in ends) or self.low > self.high:  # nan too
            raise DataError(f"gray range {ends}: give two numbers, the smaller one first")

    def __str__(self) -> str:
        return f"{self.low:.6g}..{self.high:.6g} as 0..255"

    @classmethod
    def of(cls, images: Iterable[Array]) -> GrayRange | None:
        """The range of a set's images; None if all have 8 bits. See ``GrayPool``."""
        pool = GrayPool()
        for pixels in images:
            pool.add(pixels)
        return pool.range()

    def apply(self, pixels: Array) -> Pixels:
        """Values of any shape and number type to uint8; 8 bits and 1 bit as ``has_8_bits`` says.

        Raises DataError if a value is not finite.
        """
        if has_8_bits(pixels):
            return pixels * np.uint8(255) if pixels.dtype == np.bool_ else pixels.astype(np.uint8)
        if _counts_directly(pixels):
            start = -_INT16.min if pixels.dtype.kind == "i" else 0
            table = self._scaled(np.arange(2**16, dtype=np.float64) - start)
            return _by_band(pixels, lambda band: table[band.astype(np.int32) + start])
        check_finite("image", pixels)
        return _by_band(pixels, lambda band: self._scaled(band.astype(np.float64)))

    def at_levels(self, levels: Levels) -> GrayRange:
        """The range by which ``low`` and ``high`` become two levels instead of 0 and 255."""
        black, white = levels
        if black >= white or self.low >= self.high:
            return self
        value = (self.high - self.low) / (white - black)  # of one level
        return GrayRange(self.low - black * value, self.low + (255 - black) * value)

    def saved(self) -> list[float]:
        """For JSON and checkpoints; ``conversion_of`` reads it."""
        return [float(self.low), float(self.high)]

    def _scaled(self, values: Array) -> Pixels:
        if self.high - self.low < 1 / LARGEST:  # one value alone
            return (values > self.high) * np.uint8(255)
        levels = (values - self.low) * (255 / (self.high - self.low))
        return (np.clip(levels, 0, 255) + 0.5).astype(np.uint8)


class GrayPool:
    """Pixels of a set counted by their value, image by image, so that a set need not fit in memory.

    Floats are counted to 6 digits.
    """

    def __init__(self) -> None:
        # Of 16 bits with and without sign, by value; of all others, the values and their counts.
        self._direct = np.zeros(2**16 - _INT16.min, np.int64)
        self._values, self._counts = np.zeros(0), np.zeros(0, np.int64)
        self._levels = np.zeros(256, np.int64)  # of images with 8 bits
        self.kinds: set[str] = set()  # number types met, of more than 8 bits

    def add(self, pixels: Array) -> None:
        """Count an image's values, any shape; raises DataError if one is not finite."""
        if has_8_bits(pixels):
            for band in _bands(pixels):
                self._levels += np.bincount(band.ravel().astype(np.uint8), minlength=256)
            return
        self.kinds.add(pixels.dtype.name)
        if _counts_directly(pixels):
            for band in _bands(pixels):
                numbers = band.ravel().astype(np.int64) - _INT16.min
                self._direct += np.bincount(numbers, minlength=len(self._direct))
            return
        check_finite("image", pixels)
        self._merge(*np.unique(_rounded(pixels), return_counts=True))

    def range(self, levels: Levels | None = None) -> GrayRange | None:
        """The range without 0.1 % of the pixels at each end, and without one pixel at least.

        None if no image of more than 8 bits was added. The ends become ``levels``: those of
        the images with 8 bits, or 0 and 255 without any.
        """
        found = np.flatnonzero(self._direct)
        self._merge((found + _INT16.min).astype(np.float64), self._direct[found])
        self._direct[:] = 0
        if not len(self._values):
            return None
        if step := self._step():
            return GrayRange(0, 255 * step)
        low, high = _ends(self._counts)
        own = GrayRange(float(self._values[low]), float(self._values[high]))
        return own.at_levels(levels or self.levels() or (0, 255))

    def levels(self) -> Levels | None:
        """The ends of the images with 8 bits, without 0.1 % of the pixels; None without any."""
        if not self._levels.any():
            return None
        low, high = _ends(self._levels)
        return float(low), float(high)

    def _step(self) -> float:
        """The step by which 8-bit levels are stored; 0 if these are no 8-bit levels."""
        values, counts = self._values, self._counts
        for step in STEPS:
            level = values / step
            fits = (np.abs(level - np.rint(level)) <= STEP_ERROR) & (level >= 0) & (level <= 255.5)
            odd = counts[~fits].sum()
            several = np.count_nonzero(fits & (level > 0.5) & (level < 254.5)) > 1
            if several and odd <= max(LEFT_OUT * counts.sum(), 1):
                return step
        return 0.0

    def _merge(self, values: Array, counts: Array) -> None:
        both = np.concatenate([self._values, values])
        self._values, place = np.unique(both, return_inverse=True)
        weights = np.concatenate([self._counts, counts])
        self._counts = np.zeros(len(self._values), np.int64)
        np.add.at(self._counts, place, weights)


@dataclass(frozen=True)
class EachImage:
    """Every image by its own range, where its set has none.

    The ends of the range become ``levels``, those of the 8-bit images that a network has seen.
    """

    levels: Levels = (0.0, 255.0)

    def __str__(self) -> str:
        return "each image's own range as {:g}..{:g}".format(*self.levels)

    def apply(self, pixels: Array) -> Pixels:
        """As ``GrayRange.apply``, by the range of these pixels."""
        if has_8_bits(pixels):  # they need none
            return GrayRange(0, 255).apply(pixels)
        pool = GrayPool()
        pool.add(pixels)
        return (pool.range(self.levels) or GrayRange(0, 255)).apply(pixels)

    def saved(self) -> dict[str, list[float]]:
        """For JSON and checkpoints."""
        return {"levels": list(self.levels)}


@dataclass(frozen=True)
class ByDepth:
    """How this program converted 16 bits before sets had a range: for its checkpoints of then.

    Values are scaled by the smallest of 8, 10, 12, 14 and 16 bits that holds the image's largest.
    If they then span fewer than 64 of the 256 levels, the range smallest..largest is stretched to
    0..255 instead. Values that are no whole numbers of 0..65535 are converted as by ``EachImage``.
    """

    def __str__(self) -> str:
        return "by the bits of each image's largest value"

    def apply(self, pixels: Array) -> Pixels:
        """As ``GrayRange.apply``."""
        whole = pixels.dtype.kind in "iu" and not has_8_bits(pixels)
        if not whole or pixels.min() < 0 or pixels.max() > _UINT16.max:
            return EachImage().apply(pixels)
        low, high = int(pixels.min()), int(pixels.max())
        full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
        offset, scale = 0, 255 / full
        if low < high and (high - low) * scale < SMALLEST_SPAN:
            offset, scale = low, 255 / (high - low)
        levels = np.maximum(np.arange(high + 1, dtype=np.float64) - offset, 0) * scale + 0.5
        table = levels.astype(np.uint8)
        return _by_band(pixels, lambda band: table[band])

    def saved(self) -> None:
        """Checkpoints of then know nothing of it."""
        return None


Conversion = GrayRange | EachImage | ByDepth
EACH_IMAGE, BY_DEPTH = EachImage(), ByDepth()


def conversion_of(saved: object) -> Conversion:
    """The inverse of ``saved()``: [low, high], {"levels": [0, 255]}, None if older than ranges.

    Raises DataError for anything else.
    """
    if saved is None:
        return BY_DEPTH
    each = isinstance(saved, Mapping) and list(saved) == ["levels"]
    found = saved["levels"] if each else saved  # type: ignore[index]
    numbers = list(found) if isinstance(found, list | tuple) else []
    if len(numbers) != 2 or any(type(number) not in (int, float) for number in numbers):
        raise DataError(f"gray_range: found {saved!r}; it holds two numbers, [low, high]")
    both = GrayRange(float(numbers[0]), float(numbers[1]))
    return EachImage((both.low, both.high)) if each else both


def _ends(counts: Array) -> tuple[int, int]:
    """Where the first and last value lie when the outermost pixels are left out; counts > 0."""
    below = np.cumsum(counts)  # pixels of this value or a smaller one
    total = int(below[-1])
    left_out = min(max(LEFT_OUT * total, 1), (total - 1) // 2)
    low = np.searchsorted(below, left_out, side="right")
    high = np.searchsorted(below, total - left_out, side="left")
    return int(low), int(high)


def has_8_bits(pixels: Array) -> bool:
    """Whether values need no range: uint8, which stays as it is, and bool, whose True is 255."""
    return pixels.dtype in (np.bool_, np.uint8)


def check_finite(name: object, pixels: Array) -> None:
    """Raise DataError, its line begins with ``name``, for nan, infinity and above ``LARGEST``."""
    if pixels.dtype.kind != "f":
        return
    largest = min(LARGEST, float(np.finfo(pixels.dtype).max))
    for band in _bands(pixels):
        with np.errstate(invalid="ignore"):  # of a nan that signals
            wrong = ~(np.abs(band) <= largest)
        if wrong.any():
            cure = "give such pixels a value, and export it again"
            raise DataError(f"{name}: value {band[wrong][0]:g} in its pixels; {cure}")


def _counts_directly(pixels: Array) -> bool:
    """Whole numbers of at most 16 bits."""
    return pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2


def _rounded(pixels: Array) -> Array:
    """Values as float64 (N,), rounded to ``_KEPT_BITS``, so that few different ones remain.

    More bits are kept where the values differ by little of their size.
    """
    values = pixels.astype(np.float64).ravel()
    low, high = float(values.min()), float(values.max())
    largest, span = max(abs(low), abs(high)), high - low
    more = max(0, int(math.log2(largest / span)) - 1) if span else 0
    dropped = max(1, 52 - _KEPT_BITS - more)
    bits = values.view(np.int64)  # sign and magnitude
    return (((bits + (1 << (dropped - 1))) >> dropped) << dropped).view(np.float64)


def _bands(pixels: Array) -> Iterable[Array]:
    """Views of an array of any shape, some rows each."""
    rows = pixels if pixels.ndim > 1 else pixels.reshape(1, -1)
    return (rows[top : top + _BAND] for top in range(0, len(rows), _BAND))


def _by_band(pixels: Array, convert: Any) -> Pixels:
    result = np.empty(pixels.shape, np.uint8)
    flat = result if pixels.ndim > 1 else result.reshape(1, -1)
    for source, target in zip(_bands(pixels), _bands(flat), strict=True):
        target[...] = convert(source)
    return result
