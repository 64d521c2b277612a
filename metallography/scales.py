"""How large a pixel of each image is: as given for all, from a table, from the set, or the file.

A scale that was given counts, whatever the file says, but a contradiction is told. So is more than
one magnification in a folder: a network knows its classes at the size at which it saw them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from imaging.listing import some_names
from imaging.pixel_size import POSSIBLE, SAME, is_possible, pixel_size
from metallography.items import Item
from utils.files import DataError, name_key
from utils.tables import read_csv

COLUMNS = ("file", "um_per_px")


class Given(NamedTuple):
    """Pixel sizes that a user gave, in micrometres."""

    um_per_px: float | None = None  # of images that tell none and are in no row
    rows: Mapping[str, float] = MappingProxyType({})  # of each image that was given one, by name


NOT_GIVEN = Given()
EARLIER = "the pixel size that an earlier run was told"


@dataclass
class Scales:
    """Micrometres per pixel by the images' names, None where that is not known."""

    of: dict[str, float | None] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)  # what the user should know
    given: Given = NOT_GIVEN  # now, or to an earlier run

    @property
    def known(self) -> list[float]:
        """The different ones, in order; those that differ by less than 1 % are one."""
        found: list[float] = []
        for um in sorted({um for um in self.of.values() if um is not None}):
            found += [] if found and same(found[-1], um) else [um]
        return found

    @property
    def differ(self) -> bool:
        """Whether images have several, or some have one and others none."""
        return len(self.known) + (None in self.of.values()) > 1


def same(one: float, other: float) -> bool:
    """Whether two scales are one: files hold rounded numbers."""
    return abs(one - other) <= SAME * max(one, other)


def find_scales(
    items: Sequence[Item],
    folder: Path,
    um_per_px: float | None = None,
    table: Path | None = None,
    of_set: Callable[[str], float | None] = lambda name: None,
    cure: str = "--resample UM brings all to one",
    missing: str = "; give --scales",
    before: Given = NOT_GIVEN,
    unusable: Callable[[Sequence[Item]], Collection[str]] = lambda items: (),
) -> Scales:
    """The scale of each image of a folder.

    ``cure`` is for several magnifications, ``missing`` for images without a scale beside others.
    ``unusable`` names the images that cannot be used, which have no scale and count for nothing,
    whatever their files say; it is asked only where a line on several images depends on it, as it
    reads all of them.

    Rows of ``table`` (a CSV file) count for their images, ``um_per_px`` for all others; then what
    ``of_set`` says of a file name, then what the file says. What an earlier run was given
    (``before``) counts where nothing is given now, and a line says so; of an image that was not
    there then what its file says counts first. With an ``um_per_px`` of 0 it is forgotten.
    DataError, a line each, for a wrong table.
    """
    if um_per_px == 0:
        um_per_px, before = None, NOT_GIVEN
    scales = Scales()
    rows = _for_items(read_scales(table), items, folder, table, scales) if table else {}
    old = before if um_per_px is None else NOT_GIVEN
    told: dict[str, float] = {}
    against: dict[str, dict[str, str]] = {"--um_per_px": {}, f"{table}": {}, EARLIER: {}}
    kept: dict[str, float] = {}
    for item in items:
        flag = f"{table}" if item.name in rows else EARLIER if um_per_px is None else "--um_per_px"
        given = rows.get(item.name, old.rows.get(item.name, um_per_px))
        known, where = of_set(item.path.name), "set.json"
        if known is None:
            known, where = _of_file(item, given, scales)
        if given is not None and known is not None and not same(given, known):
            against[flag][item.name] = f"{item.name} {known:.4g} µm ({where})"
        if given is None and known is None:
            given = old.um_per_px
        told |= {} if given is None else {item.name: given}
        kept |= {} if flag != EARLIER or given is None else {item.name: given}
        scales.of[item.name] = known if given is None else given
    scales.given = Given(um_per_px or old.um_per_px, {**old.rows, **told})
    gone = unusable(items) if scales.differ or any(against.values()) else ()
    scales.of = {name: um for name, um in scales.of.items() if name not in gone}
    for flag, found in against.items():
        names = [text for name, text in found.items() if name not in gone]
        used = {"--um_per_px": um_per_px, EARLIER: "that of the earlier run"}.get(flag, "the table")
        line = f"Warning: {flag} against {len(names)} image(s) that say otherwise: "
        scales.lines += [f"{line}{some_names(names)}; {used} is used"] if names else []
    scales.lines += _kept_line(kept) + _wiped_line(before, scales.of, rows, um_per_px)
    if um_per_px is not None and items and len(rows) == len(items):
        scales.lines.append(f"Warning: --um_per_px: of no effect, as {table} names every image")
    _tell(scales, cure, missing)
    return scales


def _kept_line(kept: Mapping[str, float]) -> list[str]:
    """A line on the images whose scale an earlier run was given, if there are some."""
    count = Counter(kept.values())
    shown = some_names(
        f"{um:.4g} µm ({number} image(s), as {_first(kept, um)})" for um, number in count.items()
    )
    line = f"Pixel size as an earlier run was told: {shown}"
    return [f"{line}; --um_per_px 0 takes what the files say"] * bool(kept)


def _wiped_line(
    before: Given,
    of: Mapping[str, float | None],
    rows: Mapping[str, float],
    um_per_px: float | None,
) -> list[str]:
    """A line on images for which --um_per_px now counts in the place of an earlier --scales."""
    if um_per_px is None:
        return []
    # What an earlier --um_per_px gave is kept for each image, too.
    by_flag = {um_per_px, before.um_per_px}
    wiped = [
        name
        for name, um in before.rows.items()
        if name in of and name not in rows and um not in by_flag
    ]
    line = f"Warning: pixel sizes of {len(wiped)} image(s) from an earlier --scales are not used"
    line += f" any more: {some_names(wiped)}; --um_per_px {um_per_px:g} counts for them now"
    return [f"{line}; to keep them give --scales again"] * bool(wiped)


def _of_file(item: Item, given: float | None, scales: Scales) -> tuple[float | None, str]:
    """What the file says, and where; None if it does not, or nonsense (told unless ``given``)."""
    try:
        found = pixel_size(item.path)
        if found and not is_possible(found.um):
            size = f"{item.path}: a pixel of {found.um:g} µm ({found.where})"
            raise DataError(f"{size} counts as unknown; possible are {POSSIBLE}")
    except DataError as error:
        scales.lines += [] if given is not None else [f"Warning: {error}"]
        return None, ""
    return (found.um, found.where) if found else (None, "")


def _tell(scales: Scales, cure: str, missing: str) -> None:
    """Lines on images without a scale beside others, and on several magnifications."""
    without = [name for name, um in scales.of.items() if um is None]
    if scales.known and without:
        scales.lines.append(
            f"Warning: {len(without)} image(s) without a pixel size beside others that have one; "
            f"their lengths stay empty: {some_names(without)}{missing}"
        )
    if len(scales.known) > 1:
        count = Counter(
            next(known for known in scales.known if same(known, um))
            for um in scales.of.values()
            if um is not None
        )
        shown = [
            f"{um:.4g} µm per pixel ({count[um]} image(s), as {_first(scales.of, um)})"
            for um in scales.known
        ]
        scales.lines.append(
            f"Warning: {len(shown)} magnifications: {', '.join(shown)}; a network knows its "
            f"classes at the one of its training images: {cure}"
        )


def _first(scales: Mapping[str, float | None], um: float) -> str:
    """The name of the first image of a scale."""
    return next(name for name, each in scales.items() if each is not None and same(each, um))


def read_scales(path: Path) -> dict[str, float]:
    """Read a CSV file with the columns file and um_per_px: scales by name of the file.

    Names are paths below the folder of images, or file names, with or without suffix. Raises
    DataError, a line for each wrong row.
    """
    head, rows = read_csv(path, "--scales")
    if not set(COLUMNS) <= set(head):
        found = f"{path}: columns {','.join(head)}"
        raise DataError(f"{found}; the first line names them: {','.join(COLUMNS)}")
    problems, scales = list[str](), dict[str, float]()
    for number, values in rows:
        if any(values.values()):
            name, text = (values[column] for column in COLUMNS)
            problems += _add(scales, f"{path}: line {number}", name_key(name), text)
    if problems:
        raise DataError("\n".join(problems))
    return scales


def _add(scales: dict[str, float], line: str, name: str, text: str) -> list[str]:
    """Take a row; a line if it is wrong."""
    try:
        um = float(text.replace(",", "."))
    except ValueError:
        um = 0.0
    if not is_possible(um):
        return [f"{line}: um_per_px {text!r}; give micrometres per pixel, {POSSIBLE}"]
    if not name or name in scales:
        return [f"{line}: {f'{name} a second time; remove one' if name else 'no file named'}"]
    scales[name] = um
    return []


def _for_items(
    table: Mapping[str, float],
    items: Sequence[Item],
    folder: Path,
    path: Path | None,
    scales: Scales,
) -> dict[str, float]:
    """The scales of a table by the names of the images; a line on rows without an image.

    A row of a page counts before one of its file. DataError for two rows of one image.
    """
    top = folder if folder.is_dir() else folder.parent
    claims = _claims(items, top)
    rows, unused, problems = dict[str, float](), set(table), list[str]()
    for item in items:
        own = {name_key(n) for n in (item.own_path.relative_to(top).as_posix(), item.name)}
        keys = [key for key, level in _keys(item, top).items() if claims[key] == (level, item.path)]
        kinds = [[key for key in keys if key in own], [key for key in keys if key not in own]]
        for kind in kinds if item.own_path != item.path else [keys]:
            found = [key for key in kind if key in table]
            unused -= set(found)
            if len(found) > 1:
                both = " and ".join(f"{key},{table[key]:g}" for key in found)
                problems.append(f"{path}: rows {both} are of one image ({found[0]}); remove one")
            if found:
                rows.setdefault(item.name, table[found[0]])
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    several = sorted(key for key in unused if key in claims)
    without = sorted(unused - set(several))
    for names, what in (without, "without an image"), (several, "that may be of several images"):
        cure = "; give the file's path with its suffix" if names is several else ""
        line = f"Warning: {path}: {len(names)} row(s) {what}: {some_names(names)}{cure}"
        scales.lines += [line] if names else []
    return rows


def _keys(item: Item, top: Path) -> dict[str, int]:
    """What a row may call an image, and how exact that is: 0 its path, 4 its file's name alone."""
    below = item.path.relative_to(top)
    own, path = item.own_path.relative_to(top).as_posix(), below.as_posix()
    names = own, item.name, path, below.with_suffix("").as_posix(), item.path.name, item.path.stem
    keys: dict[str, int] = {}
    for name, level in zip(names, (0, 1, 0, 2, 3, 4), strict=True):
        keys[name_key(name)] = min(level, keys.get(name_key(name), level))
    return keys


def _claims(items: Sequence[Item], top: Path) -> dict[str, tuple[int, Path | None]]:
    """By key how exactly it names a file, and which one; None if it names several alike."""
    claims: dict[str, tuple[int, Path | None]] = {}
    for item in items:
        for key, level in _keys(item, top).items():
            known, path = claims.get(key, (level, item.path))
            if level < known:
                claims[key] = level, item.path
            elif level == known:
                claims[key] = level, item.path if path == item.path else None
    return claims
