"""From the values of masks (gray levels, colours, class ids) to class ids, one rule for a set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.imagefile import DataError, Pixels
from utils.metrics import IGNORED

Array = NDArray[Any]
Value = tuple[int, ...]  # one gray level, or red, green, blue
Palette = tuple[tuple[int, Value], ...]  # class id (or IGNORED) and value

LARGEST = 2.0**53  # whole numbers of float masks; above it not all can be written
MOST_CLASSES = 32  # that are believed without a palette
KINDS = ("auto", "ids", "levels", "colours")


def parse_palette(text: str, option: str = "--palette") -> Palette:
    """Read ``0=0,0,0 1=255,0,0 ignore=255,255,255`` or, for gray levels, ``0=0 1=128 2=255``.

    Raises:
        DataError: one line for each entry that is wrong.
    """
    entries: list[tuple[int, Value]] = []
    problems = []
    for item in text.split():
        name, _, value = item.partition("=")
        try:
            label = IGNORED if name == "ignore" else int(name)
            levels = tuple(int(level) for level in value.split(","))
        except ValueError:
            label, levels = -1, ()
        if not 0 <= label <= IGNORED or len(levels) not in (1, 3):
            problems.append(f"{option}: {item!r} is not id=gray or id=red,green,blue; write 1=255")
        elif any(v == levels and i != label for i, v in entries):
            problems.append(f"{option}: {value} is given for two classes; give it once")
        else:
            entries.append((label, levels))
    if not problems and not entries:
        problems.append(f"{option}: empty; write such as 0=0 1=255")
    if not problems and len({len(levels) for _, levels in entries}) > 1:
        problems.append(f"{option}: gray levels and colours in one; write all as red,green,blue")
    if problems:
        raise DataError("\n".join(problems))
    return tuple(entries)


def parse_ignored(text: str) -> tuple[Value, ...]:
    """Read values that stand for 'no label': ``-1 255`` or ``255,255,255``. Raises DataError."""
    try:
        values = tuple(tuple(int(v) for v in item.split(",")) for item in text.split())
    except ValueError:
        values = ((),)
    if not all(len(value) in (1, 3) for value in values):
        raise DataError(f"--ignore: {text!r} is not values such as 255 or 255,255,255; correct it")
    return values


def to_codes(path: Path, pixels: Array, colours: bool) -> NDArray[np.int64]:
    """One whole number per pixel, (H, W): the gray level, or the colour packed by ``pack``.

    NaN counts as -1. Three equal channels are gray levels unless ``colours``.

    Raises:
        DataError: the values are not whole, or too large to be packed.
    """
    if pixels.dtype.kind == "f":
        whole = np.where(np.isnan(pixels), -1.0, pixels)
        broken = whole[(whole != np.round(whole)) | (np.abs(whole) > LARGEST)]
        if broken.size:
            value = f"{path}: value {broken.flat[0]:g} in a mask"
            raise DataError(f"{value}; values must be whole numbers: threshold or round it")
        pixels = whole
    values = pixels.astype(np.int64)
    if values.ndim == 2:
        if not colours:
            return values
        values = np.repeat(values[..., None], 3, axis=2)
    elif not colours and not has_colour(values):
        return values[..., 0]
    if values.min() < 0 or values.max() > 65535:
        value = values.min() if values.min() < 0 else values.max()
        raise DataError(f"{path}: value {value} among coloured masks; save it in colours too")
    return pack(values)


def has_colour(pixels: Array) -> bool:
    """Whether the three channels of (H, W, 3) differ anywhere; False for (H, W)."""
    return pixels.ndim == 3 and bool((pixels != pixels[..., :1]).any())


def pack(values: Array) -> NDArray[np.int64]:
    """Values (..., 3) of 16 bits, or (..., 1), to one number each."""
    if values.shape[-1] == 1:
        return np.asarray(values[..., 0], np.int64)
    red, green, blue = (values[..., i].astype(np.int64) for i in range(3))
    return np.asarray(red << 32 | green << 16 | blue)


def unpack(codes: Array, colours: bool) -> NDArray[np.int64]:
    """Codes (N,) to values (N, 3) of colours or (N, 1) of gray levels."""
    if not colours:
        return codes.astype(np.int64)[:, None]
    return np.stack([codes >> 32, codes >> 16 & 65535, codes & 65535], axis=1)


@dataclass(frozen=True)
class MaskRule:
    """Which value is which class: the nearest of ``values``, if it is within ``tolerance``.

    Attributes:
        colours: whether values are colours.
        values: (N, 3) or (N, 1).
        ids: (N,) class id of each, ``IGNORED`` for none.
        tolerance: largest difference in any channel.
        note: how the rule was found, for the report.
    """

    colours: bool
    values: NDArray[np.int64]
    ids: NDArray[np.int64]
    tolerance: int
    note: str

    @property
    def num_classes(self) -> int:
        """Highest class id + 1."""
        return int(max((i for i in self.ids if i != IGNORED), default=0)) + 1

    def apply(self, codes: NDArray[np.int64]) -> Pixels:
        """Class ids, uint8 (H, W), of a mask that has passed ``problem``."""
        distinct, where = np.unique(codes, return_inverse=True)
        return self._nearest(distinct)[0].astype(np.uint8)[where.reshape(codes.shape)]

    def problem(self, path: Path, histogram: Mapping[int, int]) -> str:
        """One line on the most frequent value of a mask that is no class, or ''."""
        codes = np.fromiter(histogram, np.int64, len(histogram))
        ids, distance = self._nearest(codes)
        strange = codes[distance > self.tolerance]
        if not strange.size:
            return ""
        code = max(strange.tolist(), key=lambda c: histogram[c])
        at = int(np.flatnonzero(codes == code)[0])
        more = f" and {strange.size - 1} more values" if strange.size > 1 else ""
        return (
            f"{path}: {self._text(code)} ({histogram[code]} pixels){more} is no class; add it to "
            f"--palette, or give --tolerance (class {_id_text(int(ids[at]))} is "
            f"{int(distance[at])} away)"
        )

    def lines(self) -> list[str]:
        """The rule as text: how it was found, and the palette that gives it again."""
        ids, values = self.ids.tolist(), self.values.tolist()
        pairs = (f"{_id_text(i)}={','.join(map(str, v))}" for i, v in zip(ids, values, strict=True))
        tolerance = f" --tolerance {self.tolerance}" if self.tolerance else ""
        return [self.note, f'the same as --palette "{" ".join(pairs)}"{tolerance}']

    def _text(self, code: int) -> str:
        values = unpack(np.array([code]), self.colours)[0].tolist()
        return f"{'colour' if self.colours else 'value'} {','.join(map(str, values))}"

    def _nearest(self, codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Class id of the nearest value, and its distance, of each code (N,)."""
        values = unpack(codes, self.colours)
        best = np.full(len(codes), np.iinfo(np.int64).max)
        ids = np.zeros(len(codes), np.int64)
        for value, label in zip(self.values, self.ids, strict=True):
            distance = np.abs(values - value).max(axis=1)
            ids = np.where(distance < best, label, ids)
            best = np.minimum(best, distance)
        return ids, best


def find_rule(
    histogram: Mapping[int, int],
    *,
    colours: bool,
    kind: str = "auto",
    palette: Palette = (),
    ignored: Sequence[Value] = (),
    tolerance: int = 0,
    num_classes: int = 0,
) -> MaskRule:
    """Choose the rule for a whole set.

    Args:
        histogram: code -> number of pixels, over all masks.
        colours: whether codes are packed colours.
        kind: one of ``KINDS``.
        palette: taken as it is when there is one.
        ignored: values that stand for no label, besides -1.
        tolerance: values at most so far apart (in each channel) are one.
        num_classes: C if known, else 0.

    Raises:
        DataError: the values cannot be told apart into classes.
    """
    if colours and kind == "ids":
        raise DataError("masks: coloured, not class ids; give --palette or --mask-kind colours")
    width = 3 if colours else 1
    skipped = [v * width if len(v) == 1 else v for v in ignored]
    if not colours:  # a gray level given as a colour, and the usual mark of no label
        skipped = [v[:1] for v in skipped if len(set(v)) == 1]
    labelled = np.array(sorted(histogram), np.int64)
    if not colours and -1 in histogram:
        labelled = labelled[labelled != -1]
        skipped.append((-1,))
    if palette:
        entries = [(i, v * width if len(v) == 1 else v) for i, v in palette]
        if not colours:
            entries = [(i, v[:1]) for i, v in entries if len(set(v)) == 1]
        if not entries:
            raise DataError("--palette: colours only, but the masks are gray; give gray levels")
        return _rule(colours, [*entries, *((IGNORED, v) for v in skipped)], tolerance, "--palette")
    for value in skipped:
        far = np.abs(unpack(labelled, colours) - value).max(axis=1) > tolerance
        labelled = labelled[far | (value[0] < 0)]  # -1 lies beside class 0 and is exact
    if colours or kind == "levels" or tolerance:
        entries, note = _levels(labelled, histogram, colours, tolerance)
    else:
        entries, note = _ids_or_levels(labelled, histogram, kind, num_classes)
    return _rule(colours, [*entries, *((IGNORED, v) for v in skipped)], tolerance, note)


_Found = tuple[list[tuple[int, Value]], str]


def _ids_or_levels(
    codes: NDArray[np.int64], histogram: Mapping[int, int], kind: str, num_classes: int
) -> _Found:
    """Gray values: class ids as they are, or levels counted from the darkest."""
    values = codes.tolist()
    labels = [v for v in values if v != IGNORED]
    if values and values[0] < 0:
        raise DataError(f"masks: value {values[0]} in them; give --ignore={values[0]} or --palette")
    highest = max(labels, default=0)
    # Ids may miss a class, but gray levels of a picture lie far apart.
    limit = num_classes - 1 if num_classes else 2 * len(labels)
    if not num_classes and len(labels) > MOST_CLASSES:
        limit = -1
    two_levels = labels == [0] and IGNORED in values
    if kind == "ids" or (labels and highest <= limit and not two_levels):
        if highest >= IGNORED:
            raise DataError(f"masks: value {highest} is no class id (0..254); --mask-kind levels")
        also = f"; {IGNORED} taken as no label" if IGNORED in values else ""
        entries: list[tuple[int, Value]] = [(v, (v,)) for v in labels]
        entries += [(IGNORED, (IGNORED,))] if also else []
        return entries, f"values taken as class ids{also}"
    return _levels(codes, histogram, False, 0)


def _levels(
    codes: NDArray[np.int64], histogram: Mapping[int, int], colours: bool, tolerance: int
) -> _Found:
    """Group almost equal values and number the groups from dark to bright."""
    what = "colours" if colours else "gray levels"
    left = unpack(codes, colours)
    order = np.argsort([-histogram[c] for c in codes.tolist()], kind="stable")
    left = left[order]
    centres: list[Value] = []
    while len(left) and len(centres) <= MOST_CLASSES:  # the most frequent first
        centres.append(tuple(left[0].tolist()))
        left = left[np.abs(left - left[0]).max(axis=1) > tolerance]
    if len(centres) > MOST_CLASSES:
        raise DataError(
            f"masks: {len(codes)} {what}, more than {MOST_CLASSES} of them over "
            f"{tolerance} apart; raise --tolerance or name the classes with --palette"
        )
    weights = (0.299, 0.587, 0.114) if colours else (1.0,)
    centres.sort(key=lambda v: (sum(w * x for w, x in zip(weights, v, strict=True)), v))
    near = f" ({len(codes)} values, grouped within {tolerance})" if tolerance else ""
    return list(enumerate(centres)), f"{what} numbered from dark to bright{near}"


def _rule(
    colours: bool, entries: Sequence[tuple[int, Value]], tolerance: int, note: str
) -> MaskRule:
    channels = 3 if colours else 1
    values = np.array([v for _, v in entries], np.int64).reshape(-1, channels)
    return MaskRule(colours, values, np.array([i for i, _ in entries], np.int64), tolerance, note)


def _id_text(label: int) -> str:
    return "ignore" if label == IGNORED else str(label)


def histogram_of(codes: NDArray[np.int64]) -> Counter[int]:
    """Code -> number of pixels of a mask."""
    distinct, counts = np.unique(codes, return_counts=True)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))
