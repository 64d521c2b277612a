"""From the values of masks (gray levels, colours, class ids) to class ids, one rule for a set."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset.check import Problems
from imaging.imagefile import Array, DataError, Pixels, has_colour
from utils.metrics import IGNORED

Codes = NDArray[np.int64]
Value = tuple[int, ...]  # one gray level, or red, green, blue
Palette = Sequence[tuple[int, Value]]  # class id (or IGNORED) and value

LARGEST = 2.0**53  # value of a float mask; above it float64 misses whole numbers
MOST_CLASSES = 32  # without a palette; more values are those of a picture
KINDS = ("auto", "ids", "levels", "colours")


def parse_palette(text: str) -> Palette:
    """Read ``0=0,0,0 1=255,0,0 ignore=255,255,255`` or, for gray levels, ``0=0 1=128 2=255``.

    Raises DataError, a line for each entry that is wrong.
    """
    entries: list[tuple[int, Value]] = []
    problems = Problems()
    for item in text.split():
        name, _, value = item.partition("=")
        try:
            label = IGNORED if name == "ignore" else int(name)
            levels = tuple(int(level) for level in value.split(","))
        except ValueError:
            label, levels = -1, ()
        if not 0 <= label <= IGNORED or len(levels) not in (1, 3):
            problems.append(f"--palette: {item!r} is not id=gray or id=red,green,blue; write 1=255")
        elif any(v == levels and i != label for i, v in entries):
            problems.append(f"--palette: {value} is given for two classes; give it once")
        else:
            entries.append((label, levels))
    problems.refuse()
    if not entries:
        raise DataError("--palette: empty; write such as 0=0 1=255")
    if len({len(levels) for _, levels in entries}) > 1:
        raise DataError("--palette: gray levels and colours in one; write all as red,green,blue")
    return tuple(entries)


def parse_ignored(text: str) -> tuple[Value, ...]:
    """Read values of unlabelled pixels: ``-1 255`` or ``255,255,255``. Raises DataError."""
    try:
        values = tuple(tuple(int(v) for v in item.split(",")) for item in text.split())
    except ValueError:
        values = ((),)
    if not all(len(value) in (1, 3) for value in values):
        raise DataError(f"--ignore: {text!r} is not values such as 255 or 255,255,255; correct it")
    return values


def to_codes(path: Path, pixels: Array, colours: bool) -> Codes:
    """One whole number per pixel, (H, W): the gray level, or the colour as 48 bits.

    NaN counts as -1. Three equal channels are gray levels unless ``colours``. Raises DataError for
    values that are not whole, or not of 16 bits where colours are.
    """
    if pixels.dtype.kind == "f":
        whole = np.where(np.isnan(pixels), -1.0, pixels)
        broken = whole[(whole != np.round(whole)) | (np.abs(whole) > LARGEST)]
        if broken.size:
            value = f"{path}: value {broken.flat[0]:g} in a mask"
            raise DataError(f"{value}; values must be whole numbers: threshold or round it")
        pixels = whole
    values = pixels.astype(np.int64)
    if not colours and not has_colour(values):
        return values if values.ndim == 2 else values[..., 0]
    if values.min() < 0 or values.max() > 65535:
        value = values.min() if values.min() < 0 else values.max()
        raise DataError(f"{path}: value {value} among coloured masks; save it in colours too")
    red, green, blue = (values, values, values) if values.ndim == 2 else np.moveaxis(values, 2, 0)
    return np.asarray(red << 32 | green << 16 | blue)


def _values(codes: Codes, colours: bool) -> Codes:
    """Codes (N,) to colours (N, 3) or gray levels (N, 1)."""
    return codes[:, None] >> np.array([32, 16, 0]) & 65535 if colours else codes[:, None]


@dataclass(frozen=True)
class MaskRule:
    """Which value is which class: the nearest of the palette, if it is within ``tolerance``."""

    colours: bool  # values are (red, green, blue); else one gray level
    palette: Palette
    tolerance: int  # largest difference in any channel
    note: str  # how the rule was found, for the report

    @property
    def num_classes(self) -> int:
        """Highest class id + 1."""
        return max((i for i, _ in self.palette if i != IGNORED), default=0) + 1

    def apply(self, codes: Codes) -> Pixels:
        """Class ids, uint8 (H, W), of a mask that has passed ``problem``."""
        distinct, where = np.unique(codes, return_inverse=True)
        return self._nearest(distinct)[0].astype(np.uint8)[where.reshape(codes.shape)]

    def problem(self, path: Path, histogram: Mapping[int, int]) -> str:
        """One line on the most frequent value of a mask that is no class, or ''."""
        codes = np.fromiter(histogram, np.int64, len(histogram))
        ids, distance = self._nearest(codes)
        strange = np.flatnonzero(distance > self.tolerance).tolist()
        if not strange:
            return ""
        at = max(strange, key=lambda i: histogram[int(codes[i])])
        levels = _text(_values(codes[at : at + 1], self.colours)[0].tolist())
        value = f"{'colour' if self.colours else 'value'} {levels}"
        more = f" and {len(strange) - 1} more values" if len(strange) > 1 else ""
        found = f"{value} ({histogram[int(codes[at])]} pixels){more} is no class"
        nearest = f"class {_name(int(ids[at]))} is {distance[at]} away"
        return f"{path}: {found}; add it to --palette, or give --tolerance ({nearest})"

    def same_as(self) -> str:
        """The option that gives the same rule again."""
        palette = " ".join(f"{_name(i)}={_text(v)}" for i, v in self.palette)
        tolerance = f" --tolerance {self.tolerance}" if self.tolerance else ""
        return f'the same as --palette "{palette}"{tolerance}'

    def _nearest(self, codes: Codes) -> tuple[Codes, Codes]:
        """Class id of the nearest value, and its distance, of each code (N,)."""
        values = _values(codes, self.colours)
        best = np.full(len(codes), np.iinfo(np.int64).max)
        ids = np.zeros(len(codes), np.int64)
        for label, value in self.palette:
            distance = np.abs(values - value).max(axis=1)
            ids = np.where(distance < best, label, ids)
            best = np.minimum(best, distance)
        return ids, best


def _name(label: int) -> str:
    return "ignore" if label == IGNORED else str(label)


def _text(value: Iterable[int]) -> str:
    return ",".join(map(str, value))


def find_rule(histogram: Mapping[int, int], colours: bool, settings: Namespace) -> MaskRule:
    """Choose the rule for a whole set; DataError if its values cannot be told apart into classes.

    ``histogram`` has the number of pixels of each code over all masks; read of the ``settings`` are
    masks, mask_kind, palette, ignore, tolerance and num_classes.
    """
    kind, palette, tolerance = settings.mask_kind, settings.palette, settings.tolerance
    if colours and kind == "ids":
        cure = "give --palette or --mask-kind colours"
        raise DataError(f"{settings.masks}: coloured, not class ids; {cure}")
    skipped = [*_in_channels(((IGNORED, value) for value in settings.ignore), colours)]
    labelled = np.array([c for c in sorted(histogram) if colours or c != -1], np.int64)
    if len(labelled) < len(histogram):
        skipped.append((IGNORED, (-1,)))
    for _, value in skipped:
        far = np.abs(_values(labelled, colours) - value).max(axis=1) > tolerance
        labelled = labelled[far | (value[0] < 0)]  # -1 lies beside class 0 and is exact
    found = None
    if palette:
        found = _in_channels(palette, colours), "--palette"
        if not found[0]:
            raise DataError("--palette: colours only, but the masks are gray; give gray levels")
    elif not colours and kind != "levels" and not tolerance:
        found = _ids(labelled.tolist(), settings)
    entries, note = found or _levels(labelled, histogram, colours, settings)
    return MaskRule(colours, (*entries, *skipped), tolerance, note)


def _in_channels(entries: Iterable[tuple[int, Value]], colours: bool) -> Palette:
    """The entries as colours, or as gray levels without those whose channels differ."""
    if colours:
        return [(i, v * 3 if len(v) == 1 else v) for i, v in entries]
    return [(i, v[:1]) for i, v in entries if len(set(v)) == 1]


def _ids(values: list[int], settings: Namespace) -> tuple[Palette, str] | None:
    """Gray values (ascending) as class ids; None if they are levels of a picture."""
    labels = [v for v in values if v != IGNORED]
    if values and values[0] < 0:
        cure = f"give --ignore={values[0]} or --palette"
        raise DataError(f"{settings.masks}: value {values[0]} in them; {cure}")
    highest = max(labels, default=0)
    # Ids may miss a class, but gray levels of a picture lie far apart.
    likely = 2 * len(labels) if len(labels) <= MOST_CLASSES else -1
    limit = settings.num_classes - 1 if settings.num_classes else likely
    two_levels = labels == [0] and IGNORED in values
    if settings.mask_kind != "ids" and (not labels or highest > limit or two_levels):
        return None
    if highest >= IGNORED:
        value = f"{settings.masks}: value {highest}"
        raise DataError(f"{value} is no class id (0..254); give --mask-kind levels")
    also = f"; {IGNORED} taken as no label" if IGNORED in values else ""
    ids = [*labels, IGNORED] if also else labels
    return [(v, (v,)) for v in ids], f"values taken as class ids{also}"


def _levels(
    codes: Codes, histogram: Mapping[int, int], colours: bool, settings: Namespace
) -> tuple[Palette, str]:
    """Group almost equal values and number the groups from dark to bright."""
    what, tolerance = "colours" if colours else "gray levels", settings.tolerance
    order = np.argsort([-histogram[c] for c in codes.tolist()], kind="stable")
    left = _values(codes, colours)[order]
    centres: list[Value] = []
    while len(left) and len(centres) <= MOST_CLASSES:  # the most frequent first
        centres.append(tuple(left[0].tolist()))
        left = left[np.abs(left - left[0]).max(axis=1) > tolerance]
    if len(centres) > MOST_CLASSES:
        found = f"{len(codes)} {what}, more than {MOST_CLASSES} of them over {tolerance} apart"
        cure = "raise --tolerance or name the classes with --palette"
        raise DataError(f"{settings.masks}: {found}; {cure}")
    weights = (0.299, 0.587, 0.114) if colours else (1.0,)
    centres.sort(key=lambda v: (sum(w * x for w, x in zip(weights, v, strict=True)), v))
    near = f" ({len(codes)} values, grouped within {tolerance})" if tolerance else ""
    return list(enumerate(centres)), f"{what} numbered from dark to bright{near}"


def histogram_of(codes: Codes) -> Counter[int]:
    """Code -> number of pixels of a mask."""
    distinct, counts = np.unique(codes, return_counts=True)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))
