"""From the values of masks (gray levels, colours, class ids) to class ids, one rule for a set.

And what a user says of them: the settings of the commands that read masks.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotation.edges import assign_edges, flat
from dataset.batches import Rule
from dataset.check import Problems
from imaging.field import Crop, read_crop
from imaging.imagefile import Array, Pixels, has_colour
from utils.entries import join_entries
from utils.files import DataError
from utils.metrics import IGNORED

Codes = NDArray[Any]  # whole numbers, see ``to_codes``
Bits = NDArray[np.bool_]
Value = tuple[int, ...]  # one gray level, or red, green, blue
Palette = Sequence[tuple[int, Value]]  # class id (or IGNORED) and value

_BAND = 2**20  # pixels sorted or looked up at once: what is computed takes eight bytes a pixel
LARGEST = 2.0**53  # value of a float mask; above it float64 misses whole numbers
MOST_CLASSES = 32  # without a palette; more values are those of a picture
KINDS = ("auto", "ids", "levels", "colours", "particles")
COLOUR_WORDS = {(0, 0, 0): "black", (255, 255, 255): "white", (255, 0, 0): "red",
                (0, 255, 0): "green", (0, 0, 255): "blue", (255, 255, 0): "yellow",
                (0, 255, 255): "cyan", (255, 0, 255): "magenta"}  # fmt: skip


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


def holds_ids(palette: Palette) -> bool:
    """Whether the values of a palette are the ids of their classes."""
    return all(value == (label,) for label, value in palette if label != IGNORED)


def palette_text(palette: Palette) -> str:
    """The text of a palette, as ``parse_palette`` reads it."""
    return " ".join(
        f"{'ignore' if i == IGNORED else i}={','.join(map(str, value))}" for i, value in palette
    )


def colours_of(palette: Palette, num_classes: int) -> tuple[str, ...]:
    """The colours of class 0 ... in masks, six hexadecimal digits each; () if some have none."""
    values = dict(palette)
    if any(len(values.get(label, ())) != 3 for label in range(num_classes)):
        return ()
    deep = max(map(max, values.values())) > 255  # 16 bits a channel
    shown = {label: [v >> 8 if deep else v for v in value] for label, value in values.items()}
    return tuple(bytes(shown[label]).hex() for label in range(num_classes))


def named_line(palette: Palette, names: Sequence[str], counts: Sequence[float]) -> str:
    """Which name is on which value, where the order of the values is this program's choice.

    ``counts`` are the pixels of each class in all masks.
    """
    values, total = dict(palette), max(1, sum(counts))
    what = "colours" if any(len(v) == 3 for v in values.values()) else "gray levels"
    pairs = [
        f"{name} = {_shown(values[label])}, {count / total:.1%} of the labels"
        for label, (name, count) in enumerate(zip(names, counts, strict=True))
        if label in values
    ]
    order = f"Names in the order of the {what}, dark to bright: {'; '.join(pairs)}"
    cure = f'give --palette "{palette_text(palette)}", with the numbers changed'
    return f"{order}. If that is wrong, {cure}; if it is right, with these numbers"


def _shown(value: Value) -> str:
    """A value of a mask in words: a colour that has a name with its name."""
    if len(value) == 1:
        return str(value[0])
    nearest, word = min(COLOUR_WORDS.items(), key=lambda pair: _distance(pair[0], value))
    return f"{word if _distance(nearest, value) < 64 else 'colour'} ({_text(value)})"


def _distance(one: Value, other: Value) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def parse_ignored(text: str) -> tuple[Value, ...]:
    """Read values of unlabelled pixels: ``-1 255`` or ``255,255,255``. Raises DataError."""
    try:
        values = tuple(tuple(int(v) for v in item.split(",")) for item in text.split())
    except ValueError:
        values = ((),)
    if not all(len(value) in (1, 3) for value in values):
        raise DataError(f"--ignore: {text!r} is not values such as 255 or 255,255,255; correct it")
    return values


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a user's images and masks are read: options that two commands have, see ``reading_of``.

    Their meaning stands in the help of ``dataset/prepare.py``.
    """

    mask_pattern: str = ""
    mask_kind: str = "auto"
    palette: Palette = ()
    ignore: tuple[Value, ...] = ()
    tolerance: int = 0
    crop: Crop = Crop()
    trim: int = 0
    # Of these, the options that somebody gave, which may say what is the default.
    named: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, kw_only=True)
class SetSettings(Reading):
    """How a set is made of a user's files: options of ``dataset/prepare.py``."""

    images: Path
    masks: Path
    out: Path
    num_classes: int = 0
    ignored_as: int = IGNORED
    page: int = 0
    um_per_px: float | None = None
    class_names: tuple[str, ...] = ()
    class_colours: tuple[str, ...] = ()
    tile: int = 0
    overlap: int = 0
    batch_from: Rule = None
    test: float = 0.3
    seed: int = 0
    dry_run: bool = False
    overwrite: bool = False


def reading_of(given: Namespace, problems: Problems) -> Reading:
    """What parsed options say of reading, None and '' if not given; problems get a line each."""
    found = {name: getattr(given, name) for name in Reading.__dataclass_fields__ if name != "named"}
    found = {name: value for name, value in found.items() if value not in (None, "")}
    checks = (
        (
            "mask_pattern",
            lambda text: "{stem}" in text,
            "{stem} for the image's name",
        ),
        ("tolerance", lambda number: number >= 0, "0 or more"),
        ("trim", lambda number: number >= 0, "0 or more"),
    )
    for name, is_good, cure in checks:
        if name in found and not is_good(found[name]):
            problems.append(f"--{name} {found[name]!r}: give {cure}")
    parsers = {"palette": parse_palette, "ignore": parse_ignored, "crop": read_crop}
    for name, parse in parsers.items():
        with problems.collect():
            found |= {name: parse(found[name])} if name in found else {}
    return Reading(**found, named=frozenset(found))


def to_codes(path: Path, pixels: Array, colours: bool) -> Codes:
    """One whole number per pixel, (H, W): the gray level, or the colour as 48 bits.

    NaN counts as -1. Three equal channels are gray levels unless ``colours``. Gray levels of 8 and
    16 bits without a sign stay as they are stored, a view of ``pixels``; all others become int64.
    Raises DataError for values that are not whole, or not of 16 bits where colours are.
    """
    if pixels.dtype.kind == "f":
        pixels = _whole(path, pixels)
    if not colours and not has_colour(pixels):
        gray = pixels if pixels.ndim == 2 else pixels[..., 0]
        return gray if _is_short(gray) else gray.astype(np.int64, copy=False)
    if pixels.dtype.itemsize == 8:
        pixels = pixels.astype(np.int64, copy=False)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        value = low if low < 0 else high
        raise DataError(f"{path}: value {value} among coloured masks; save it in colours too")
    codes = np.empty(pixels.shape[:2], np.int64)
    for rows in _bands(codes):
        band = pixels[rows].astype(np.int64)
        red, green, blue = (band, band, band) if band.ndim == 2 else np.moveaxis(band, 2, 0)
        codes[rows] = red << 32 | green << 16 | blue
    return codes


def _whole(path: Path, pixels: Array) -> Codes:
    """Floats as int64; DataError for values that are not whole."""
    whole = np.empty(pixels.shape, np.int64)
    for rows in _bands(pixels):
        band = np.where(np.isnan(pixels[rows]), -1.0, pixels[rows])
        broken = band[(band != np.round(band)) | (np.abs(band) > LARGEST)]
        if broken.size:
            value = f"{path}: value {broken.flat[0]:g} in a mask"
            raise DataError(f"{value}; values must be whole numbers: threshold or round it")
        whole[rows] = band
    return whole


def values_of(codes: Codes, colours: bool) -> Codes:
    """Codes (N,) to colours (N, 3) or gray levels (N, 1)."""
    return codes[:, None] >> np.array([32, 16, 0]) & 65535 if colours else codes[:, None]


def _planes(codes: Codes, colours: bool) -> Codes:
    """``values_of`` for a mask: codes (H, W) to (H, W, c), in few bytes."""
    if not colours:
        return codes[..., None]
    return np.stack([(codes >> bits & 65535).astype(np.uint16) for bits in (32, 16, 0)], axis=2)


def _is_short(codes: Codes) -> bool:
    """Whether there are so few possible values that a table of them all is small."""
    return codes.dtype.kind == "u" and codes.dtype.itemsize <= 2


def _bands(pixels: Array) -> Iterator[slice]:
    """Rows of an array (N, ...), some at a time."""
    step = max(1, _BAND * len(pixels) // max(pixels.size, 1))
    return (slice(top, min(top + step, len(pixels))) for top in range(0, len(pixels), step))


def _counted(codes: Codes) -> tuple[Codes, Codes]:
    """The different codes (ascending, int64) of an array of any shape, and how often each is."""
    if _is_short(codes):
        numbers = np.zeros(2 ** (8 * codes.dtype.itemsize), np.int64)
        for rows in _bands(codes):
            numbers += np.bincount(codes[rows].ravel(), minlength=len(numbers))
        distinct = np.flatnonzero(numbers)
        return distinct, numbers[distinct]
    pairs = [np.unique(codes[rows], return_counts=True) for rows in _bands(codes)]
    each = np.concatenate([np.zeros(0, np.int64), *(values for values, _ in pairs)])
    often = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in pairs)])
    distinct, where = np.unique(each, return_inverse=True)
    numbers = np.zeros(len(distinct), np.int64)
    np.add.at(numbers, where, often)
    return distinct, numbers


def looked_up(codes: Codes, known: Codes, entries: Codes) -> Codes:
    """The entry of each code, of the codes' shape; 0 where it is none of ``known`` (ascending)."""
    found = np.empty(codes.shape, entries.dtype)
    short = _is_short(codes)
    if short:
        table = np.zeros(2 ** (8 * codes.dtype.itemsize), entries.dtype)
        table[known] = entries
    for rows in _bands(codes):
        if short:
            found[rows] = table[codes[rows]]
        else:
            at = np.searchsorted(known, codes[rows]).clip(max=len(known) - 1)
            found[rows] = np.where(known[at] == codes[rows], entries[at], 0)
    return found


class By(Enum):
    """How the rule of a set was found."""

    PALETTE = "given by --palette"
    IDS = "values are class ids"
    PARTICLES = "values number particles"
    LEVELS = "levels or colours, numbered from dark to bright"
    NAMES = "files name their classes"


@dataclass(frozen=True)
class MaskRule:
    """Which value is which class: the nearest of the palette, if it is within ``tolerance``."""

    colours: bool  # values are (red, green, blue); else one gray level
    palette: Palette
    tolerance: int  # largest difference in any channel
    by: By
    note: str  # how the rule was found, for the report
    names: tuple[str, ...] = ()  # of the classes, where files name them

    @property
    def num_classes(self) -> int:
        """Highest class id + 1."""
        return max((i for i, _ in self.palette if i != IGNORED), default=0) + 1

    def apply(self, codes: Codes) -> Pixels:
        """Class ids, uint8 (H, W), of a mask without ``strange`` pixels."""
        return self.assign(codes)[0]

    def assign(self, codes: Codes) -> tuple[Pixels, Bits, Bits]:
        """Class ids, uint8 (H, W); which pixels are of smooth edges; which have no class at all.

        An edge is given to what is drawn beside it, see ``annotation.edges``. Masks without a value
        that is none of the palette have no smooth edges.
        """
        distinct, _ = _counted(codes)
        entry, distance = self._nearest(distinct)
        labels, near = np.array([i for i, _ in self.palette], np.uint8), distance <= self.tolerance
        if not self.tolerance and near.all():
            none = np.zeros(codes.shape, np.bool_)
            return looked_up(codes, distinct, labels[entry]), none, none.copy()
        nearest = looked_up(codes, distinct, entry.astype(np.int32))
        within = looked_up(codes, distinct, near)
        levels = np.array([value for _, value in self.palette], np.int64)
        values = _planes(codes, self.colours)
        given, strange = assign_edges(values, nearest, within, levels, self.tolerance)
        return labels[given], (given != nearest) | ~within & ~strange, strange

    def off_palette(self, histogram: Mapping[int, int]) -> list[int]:
        """The codes that are no value of the palette."""
        codes = np.fromiter(histogram, np.int64, len(histogram))
        return [int(code) for code in codes[self._nearest(codes)[1] > 0]]

    def text_of(self, code: int) -> str:
        """A gray level or a colour as people write it."""
        return _text(values_of(np.array([code]), self.colours)[0].tolist())

    def has_edges(self, histogram: Mapping[int, int]) -> bool:
        """Whether a mask has values that are none of the palette, or near ones."""
        _, distance = self._nearest(np.fromiter(histogram, np.int64, len(histogram)))
        return bool(self.tolerance or distance.any())

    def problem(self, path: Path, histogram: Mapping[int, int], lossy: bool = False) -> str:
        """One line on the most frequent of a mask's values that are no class, or ''.

        ``lossy``: whether the file's packing changed values, which a better export cures first.
        """
        codes = np.fromiter(histogram, np.int64, len(histogram))
        entry, distance = self._nearest(codes)
        strange = np.flatnonzero(distance > self.tolerance).tolist()
        if not strange:
            return ""
        at = max(strange, key=lambda i: histogram[int(codes[i])])
        value = f"{'colour' if self.colours else 'value'} {self.text_of(int(codes[at]))}"
        more = f" and {len(strange) - 1} more values" if len(strange) > 1 else ""
        found = f"{value} ({histogram[int(codes[at])]} pixels){more} is no class"
        nearest = f"class {_name(self.palette[entry[at]][0])} is {distance[at]} away"
        cure = "packed by JPEG, which blurs edges: export it as PNG, or " if lossy else ""
        return f"{path}: {found}; {cure}add it to --palette, or give --tolerance ({nearest})"

    @property
    def option(self) -> str:
        """The option that gives the same rule again."""
        if self.names:
            return names_option(self.names)
        tolerance = f" --tolerance {self.tolerance}" if self.tolerance else ""
        return f'--palette "{palette_text(self.palette)}"{tolerance}'

    def same_as(self) -> str:
        """The same in words, for people who want to give it."""
        return f"the same as {self.option}"

    @property
    def told(self) -> str:
        """How values were read, and the option that reads them so again."""
        given = self.by is By.PALETTE
        return f"read by {self.option}" if given else f"{self.note}; {self.same_as()}"

    def _nearest(self, codes: Codes) -> tuple[Codes, Codes]:
        """The entry of the palette nearest to each code (N,), and its distance."""
        values = values_of(codes, self.colours)
        best = np.full(len(codes), np.iinfo(np.int64).max)
        entry = np.zeros(len(codes), np.int64)
        for number, (_, value) in enumerate(self.palette):
            distance = np.abs(values - value).max(axis=1)
            entry = np.where(distance < best, number, entry)
            best = np.minimum(best, distance)
        return entry, best


def names_option(names: Sequence[str]) -> str:
    """The option that gives these names, as it is written in a shell."""
    text = join_entries(names)
    return f"--class_names {shlex.quote(text)}" if '"' in text else f'--class_names "{text}"'


def refuse_unused(reading: Reading, rules: Sequence[MaskRule], masks: Path) -> None:
    """DataError for what says of values in ``masks`` where every mask names its classes."""
    of_values = ("palette", "ignore", "tolerance")
    given = [f"--{name}" for name in of_values if getattr(reading, name)]
    if given and rules and all(rule.by is By.NAMES for rule in rules):
        found = f"{' and '.join(given)}: of no effect on {masks}: outlines, and files of one class"
        cure = "draw a large shape called ignore below the others where nobody labelled"
        if "{class}" in reading.mask_pattern:
            cure = 'add a file of the class "ignore" that is white everywhere, if nobody labelled '
            cure += "the rest"
        unlabelled = f", and {cure}" if given != ["--tolerance"] else ""
        raise DataError(f"{found} each, have no values; leave it out{unlabelled}")


def channels(value: Value) -> Value:
    """A value as a colour, so that gray levels and colours compare."""
    return value * 3 if len(value) == 1 else value


def without_ignored(known: str, reading: Reading) -> str:
    """A palette without the values that ``--ignore`` of the user says have no label."""
    gone = {channels(value) for value in reading.ignore}
    left = [e for e in parse_palette(known) if channels(e[1]) not in gone] if known else []
    return palette_text(left) if any(label != IGNORED for label, _ in left) else ""


def _name(label: int) -> str:
    return "ignore" if label == IGNORED else str(label)


def _text(value: Iterable[int]) -> str:
    return ",".join(map(str, value))


def find_rule(
    histogram: Mapping[int, int],
    colours: bool,
    settings: SetSettings,
    drawn: Callable[[], Collection[int]] | None = None,
) -> MaskRule:
    """Choose the rule for a whole set; DataError if its values cannot be told apart into classes.

    ``histogram`` has the number of pixels of each code over all masks; read of the ``settings`` are
    masks, mask_kind, palette, ignore, tolerance and num_classes. ``drawn`` gives the codes that
    fill areas somewhere: where levels or colours are looked for, the others are smooth edges.
    """
    kind, palette, tolerance = settings.mask_kind, settings.palette, settings.tolerance
    if colours and kind == "ids":
        cure = "give --palette or --mask_kind colours"
        raise DataError(f"{settings.masks}: coloured, not class ids; {cure}")
    skipped = [*_in_channels(_as_ignored(settings), colours)]
    labelled = np.array([c for c in sorted(histogram) if colours or c != -1], np.int64)
    if len(labelled) < len(histogram):
        skipped.append((IGNORED, (-1,)))
    for _, value in skipped:
        far = np.abs(values_of(labelled, colours) - value).max(axis=1) > tolerance
        labelled = labelled[far | (value[0] < 0)]  # -1 lies beside class 0 and is exact
    found = None
    if palette:
        found = _in_channels(palette, colours), By.PALETTE, "--palette"
        if not found[0]:
            raise DataError("--palette: colours only, but the masks are gray; give gray levels")
    elif not colours and kind != "levels" and not tolerance:
        found = _ids(labelled.tolist(), settings)
    if found is None and drawn is not None and len(labelled) > 2:  # of two values both are taken
        filling = np.array(sorted(set(labelled.tolist()) & set(drawn())), np.int64)
        labelled = filling if len(filling) > 1 else labelled
    entries, by, note = found or _levels(labelled, histogram, colours, settings)
    return MaskRule(colours, (*entries, *skipped), tolerance, by, note)


def _in_channels(entries: Iterable[tuple[int, Value]], colours: bool) -> Palette:
    """The entries as colours, or as gray levels without those whose channels differ."""
    if colours:
        return [(i, v * 3 if len(v) == 1 else v) for i, v in entries]
    return [(i, v[:1]) for i, v in entries if len(set(v)) == 1]


def _ids(values: list[int], settings: SetSettings) -> tuple[Palette, By, str] | None:
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
    if settings.mask_kind == "particles":
        note = "numbered particles: 0 is class 0, every number class 1"
        return [(0, (0,)), (1, (1,))], By.PARTICLES, note
    if settings.mask_kind != "ids" and (not labels or highest > limit or two_levels):
        return None
    if highest >= IGNORED:
        value = f"{settings.masks}: value {highest}"
        raise DataError(f"{value} is no class id (0..254); give --mask_kind levels")
    also = f"; {IGNORED} taken as no label" if IGNORED in values else ""
    ids = [*labels, IGNORED] if also else labels
    return [(v, (v,)) for v in ids], By.IDS, f"values taken as class ids{also}"


def _levels(
    codes: Codes, histogram: Mapping[int, int], colours: bool, settings: SetSettings
) -> tuple[Palette, By, str]:
    """Group almost equal values and number the groups from dark to bright."""
    what, tolerance = "colours" if colours else "gray levels", settings.tolerance
    order = np.argsort([-histogram[c] for c in codes.tolist()], kind="stable")
    left = values_of(codes, colours)[order]
    centres: list[Value] = []
    while len(left) and len(centres) <= MOST_CLASSES:  # the most frequent first
        centres.append(tuple(left[0].tolist()))
        left = left[np.abs(left - left[0]).max(axis=1) > tolerance]
    if len(centres) > MOST_CLASSES:
        found = f"{len(codes)} {what}, more than {MOST_CLASSES} of them over {tolerance} apart"
        cure = "raise --tolerance or name the classes with --palette"
        particles = "" if colours else "; numbered particles: --mask_kind particles"
        raise DataError(f"{settings.masks}: {found}; {cure}{particles}")
    weights = (0.299, 0.587, 0.114) if colours else (1.0,)
    centres.sort(key=lambda v: (sum(w * x for w, x in zip(weights, v, strict=True)), v))
    near = f" ({len(codes)} values, grouped within {tolerance})" if tolerance else ""
    return list(enumerate(centres)), By.LEVELS, f"{what} numbered from dark to bright{near}"


def filling(codes: Codes, colours: bool, tolerance: int) -> set[int]:
    """The codes of a mask (H, W) that fill a square of 3x3 pixels somewhere."""
    found = set[int]()
    for rows in _bands(codes):
        top = max(rows.start - 1, 0)  # the squares reach one row farther
        centres = flat(_planes(codes[top : rows.stop + 1], colours), tolerance)
        inside = centres[rows.start - top :][: rows.stop - rows.start]
        found.update(_counted(codes[rows][inside])[0].tolist())
    return found


def histogram_of(codes: Codes) -> Counter[int]:
    """Code (ascending) -> number of pixels of a mask."""
    distinct, counts = _counted(codes)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def id_maps(
    histograms: Mapping[Path, Mapping[int, int]], colours: bool, settings: SetSettings
) -> set[Path]:
    """The masks that hold class ids where the others hold gray levels or colours.

    A predicted class map that was corrected comes back beside the masks that were drawn first. Such
    a mask has grays below the number of classes of the others, and some that these do not have.
    """
    if settings.mask_kind == "particles" or settings.tolerance:
        return set()
    grays: dict[Path, set[int]] = {}
    for path, own in histograms.items():
        values = values_of(np.fromiter(own, np.int64, len(own)), colours)
        if (values == values[:, :1]).all():
            grays[path] = set(values[:, 0].tolist()) - {IGNORED, -1}
    low = {path for path, own in grays.items() if max(own, default=0) < MOST_CLASSES}
    known: set[int] = set().union(*(own for path, own in histograms.items() if path not in low))
    ignored = {_code(value, colours) for _, value in _in_channels(_as_ignored(settings), colours)}
    classes = len(known - ignored)
    if settings.palette:
        known = {_code(value, colours) for _, value in _in_channels(settings.palette, colours)}
        classes = max((label for label, _ in settings.palette if label != IGNORED), default=0) + 1
    if max(known, default=0) < MOST_CLASSES:  # these are class ids themselves
        return set()
    return {
        path
        for path in low
        if not known.issuperset(histograms[path]) and max(grays[path], default=0) < classes
    }


def _as_ignored(settings: SetSettings) -> list[tuple[int, Value]]:
    return [(IGNORED, value) for value in settings.ignore]


def _code(value: Value, colours: bool) -> int:
    """The code of a gray level or a colour, see ``to_codes``."""
    return value[0] << 32 | value[1] << 16 | value[2] if colours else value[0]
