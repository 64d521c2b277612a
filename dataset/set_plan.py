"""Plan a set from a user's files: pair, name and cut the images, and choose the splits.

Nothing is written here; ``dataset/prepare.py`` is the program.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import IMAGE_SUFFIXES, SMALLEST_SIDE, parse_name
from dataset.mask_values import (
    IGNORED,
    MaskRule,
    Palette,
    Value,
    find_rule,
    has_colour,
    histogram_of,
    to_codes,
)
from dataset.set_draws import draw_groups, draw_single, draw_test_specimens
from dataset.source_files import count_pages, read_picture, read_pixels
from utils.imagefile import DataError, Pixels

SPLITS = {"train": "train_numf", "test": "test_numf", "unlabelled": "train_unlabelled"}
MAX_LINES = 30
REPEATS = 5
Box = tuple[slice, slice]
Boxes = tuple[Box, Box]  # the parts of an image and of its mask that are used
_SUFFIXES = [s for suffix in IMAGE_SUFFIXES for s in (suffix, suffix.upper())]


@dataclass(frozen=True)
class Settings:
    """What is asked for; see ``--help``."""

    images: Path
    masks: Path
    out: Path
    mask_pattern: str = ""
    mask_kind: str = "auto"
    palette: Palette = ()
    ignored: tuple[Value, ...] = ()
    ignored_as: int = IGNORED
    tolerance: int = 0
    num_classes: int = 0
    page: int = 0  # 0: not given, -1: each
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    trim: int = 0
    tile: int = 0
    overlap: int = 0
    pattern: re.Pattern[str] | None = None
    table: dict[str, dict[str, str]] | None = None
    test: float = 0.3
    seed: int = 0
    dry_run: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Source:
    """One image (a page of a file), with its mask if it has one, and where it comes from."""

    image: Path
    mask: Path | None
    page: int
    pages: int
    batch: str
    sample: str
    specimen: str
    split: str = ""
    keeps_name: bool = False


@dataclass(frozen=True)
class Tile:
    """One image of the set: a square (or all) of a source."""

    source: Source
    name: str
    top: int
    left: int
    counts: tuple[int, ...] = ()  # pixels of each class; empty without a mask


@dataclass
class Plan:
    """The set before it is written."""

    rule: MaskRule
    num_classes: int
    boxes: dict[Source, Boxes]
    splits: dict[str, list[Tile]]
    ignored: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- finding images


def find_sources(settings: Settings, problems: list[str], warnings: list[str]) -> list[Source]:
    """Pair images with masks and find out batch, sample and specimen of each."""
    files = [p for p in _files(settings.images) if p.suffix.lower() in IMAGE_SUFFIXES]
    masks = {_plain(p.name): p for p in _files(settings.masks)}
    if settings.masks.resolve() == settings.images.resolve():
        of = {p: _mask_of(settings, p, masks, []) for p in files}
        files = [p for p in files if p not in of.values()]
    if not files:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise DataError(f"{settings.images}: no image in it ({suffixes}); give another --images")
    stems = Counter(_plain(p.stem) for p in files)
    sources = []
    used: set[Path] = set()
    for path in files:
        if stems[_plain(path.stem)] > 1:
            problems.append(f"{path}: another image has this name too; rename or remove one")
        mask = _mask_of(settings, path, masks, problems)
        used |= {mask} if mask else set()
        source = _identify(settings, Source(path, mask, 1, 1, "", "", ""), problems)
        sources += _pages(settings, source, problems, warnings)
    same_folder = settings.masks.resolve() == settings.images.resolve()
    stray = [p for p in masks.values() if p.suffix.lower() in IMAGE_SUFFIXES and p not in used]
    if stray and not same_folder:
        warnings.append(f"{stray[0]}: {len(stray)} mask(s) without an image; not used")
    if not used:
        wanted = settings.mask_pattern.replace("{stem}", files[0].stem) or f"{files[0].stem}.*"
        problems.append(f"{settings.masks / wanted}: no image has a mask; give --mask-pattern")
    if settings.table is not None:
        known = {_plain(name) for p in files for name in (p.name, p.stem)}
        unknown = set(settings.table) - known
        if unknown:
            first = sorted(unknown)[0]
            warnings.append(f"--batch-from: {len(unknown)} row(s) without an image, as {first}")
    return sources


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from None


def _plain(name: str) -> str:
    """By which names find each other: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", name)


def _mask_of(
    settings: Settings, image: Path, masks: dict[str, Path], problems: list[str]
) -> Path | None:
    stem = _plain(image.stem)
    if settings.mask_pattern:
        mask = masks.get(_plain(settings.mask_pattern).replace("{stem}", stem))
        return None if mask == image else mask
    found = [masks[n] for n in (stem + s for s in _SUFFIXES) if n in masks]
    found = [p for p in found if p != image]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        problems.append(f"{image}: {len(found)} masks ({names}); remove all but one")
    return found[0] if found else None


def _identify(settings: Settings, source: Source, problems: list[str]) -> Source:
    """Batch, sample and specimen from the table, the regular expression, or the name."""
    path = source.image
    if settings.table is not None:
        row = settings.table.get(_plain(path.name)) or settings.table.get(_plain(path.stem))
        if row is None:
            problems.append(f"{path}: not in the table of --batch-from; add a row for it")
            return source
        sample = row.get("sample") or path.stem
        specimen = row.get("specimen") or f"{row['batch']}_{sample}"
        return _named(source, row["batch"], sample, specimen, row.get("split", ""))
    if settings.pattern is not None:
        match = settings.pattern.search(path.name)
        if match is None:
            shown = settings.pattern.pattern
            problems.append(f"{path}: --batch-from {shown!r} does not match this name; correct it")
            return source
        named = {k: v or "" for k, v in match.groupdict().items()}
        plain = [match[i] or "" for i in range(1, settings.pattern.groups + 1)]
        batch = named.get("batch") or plain[0]
        sample = named.get("sample") or (plain[1] if len(plain) > 1 else "") or path.stem
        return _named(source, batch, sample, named.get("specimen") or f"{batch}_{sample}")
    batch, sample = parse_name(path.stem)
    return replace(_named(source, batch, sample, f"{batch}_{sample}"), keeps_name=True)


def _named(source: Source, batch: str, sample: str, specimen: str, split: str = "") -> Source:
    batch, sample = _field(batch), _field(sample)
    return replace(source, batch=batch, sample=sample, specimen=specimen, split=split)


def _field(text: str) -> str:
    """One field of a file name: no separator, and nothing that a file system refuses."""
    return re.sub(r"[\s_/\\:*?\"<>|]+", "-", text.strip()).strip("-.")


def _pages(
    settings: Settings, source: Source, problems: list[str], warnings: list[str]
) -> list[Source]:
    """The wanted pages of a file, as one source each."""
    try:
        pages = count_pages(source.image)
    except DataError as error:
        problems.append(str(error))
        return []
    source = replace(source, pages=pages)
    if settings.page < 0:
        return [replace(source, page=n + 1, keeps_name=False) for n in range(pages)]
    if pages > 1 and not settings.page:
        warnings.append(f"{source.image}: {pages} pages, the first is taken; --page chooses")
    if settings.page > pages:
        problems.append(
            f"{source.image}: no page {settings.page}, it has {pages}; choose another --page"
        )
        return []
    return [replace(source, page=settings.page or 1)]


# ---------------------------------------------------------------- planning the set


def make_plan(settings: Settings) -> Plan:
    """Read everything once, decide what is which class and which image goes where.

    Raises:
        DataError: all problems found, one line each (after 30 lines only their number).
    """
    problems: list[str] = []
    warnings: list[str] = []
    sources = find_sources(settings, problems, warnings)
    scan = _Scan(settings, problems)
    boxes = {s: b for s in sources if (b := scan.boxes(s)) is not None}
    histograms = {s: h for s in boxes if s.mask and (h := scan.histogram(s, boxes[s]))}
    rule = _find_rule(settings, scan.colours, histograms, problems)
    tiles = _cut(settings, scan.sizes, problems)
    if problems or rule is None:
        raise DataError("\n".join(at_most(problems)))
    known = max(settings.num_classes, rule.num_classes)
    if settings.ignored_as != IGNORED:
        known = max(known, settings.ignored_as + 1)
    if known < 2:
        warnings.append(
            f"one class in all masks ({rule.lines()[1]}): training needs 2; check the masks, or "
            "give --palette"
        )
    plan = Plan(rule, known, boxes, {}, warnings=warnings)
    plan.notes += [f"{count} image(s) of {note}" for note, count in sorted(scan.notes.items())]
    _split(settings, plan, _count(settings, plan, tiles))
    _annotate(settings, plan)
    return plan


def at_most(lines: Iterable[str]) -> list[str]:
    """The first 30 different lines, and the number of the others."""
    kept = list(dict.fromkeys(lines))
    if len(kept) > MAX_LINES:
        kept[MAX_LINES:] = [f"and {len(kept) - MAX_LINES} more"]
    return kept


class _Scan:
    """Decodes every file once, so that all problems are found before anything is made."""

    def __init__(self, settings: Settings, problems: list[str]) -> None:
        self.settings, self.problems = settings, problems
        self.notes: Counter[str] = Counter()
        self.colours = settings.mask_kind == "colours"
        self.sizes: dict[Source, tuple[int, int]] = {}  # H, W of what is used

    def boxes(self, source: Source) -> Boxes | None:
        """The parts to use of image and mask; None if the image cannot be used."""
        try:
            pixels, note = read_picture(source.image, source.page)
            shape = pixels.shape
            if source.mask:
                mask = _mask_pixels(self.settings, source)
                self.colours = self.colours or has_colour(mask)
                shape = mask.shape
            boxes = _fit(self.settings, source, pixels.shape, shape)
        except DataError as error:
            self.problems.append(str(error))
            return None
        height, width = pixels[boxes[0]].shape[:2]
        if min(height, width) < SMALLEST_SIDE:
            text = f"{source.image}: {_size((height, width))} pixels are used"
            self.problems.append(f"{text}; at least {SMALLEST_SIDE} a side are needed")
            return None
        if note:
            self.notes[note] += 1
        self.sizes[source] = height, width
        return boxes

    def histogram(self, source: Source, boxes: Boxes) -> Counter[int] | None:
        """Code -> pixels of a mask; to be called when ``boxes`` has seen all images."""
        try:
            return histogram_of(_mask_codes(self.settings, source, boxes, self.colours))
        except DataError as error:
            self.problems.append(str(error))
            return None


def _find_rule(
    settings: Settings,
    colours: bool,
    histograms: dict[Source, Counter[int]],
    problems: list[str],
) -> MaskRule | None:
    total: Counter[int] = Counter()
    for histogram in histograms.values():
        total.update(histogram)
    if not total:
        return None
    try:
        rule = find_rule(
            total,
            colours=colours,
            kind=settings.mask_kind,
            palette=settings.palette,
            ignored=settings.ignored,
            tolerance=settings.tolerance,
            num_classes=settings.num_classes,
        )
    except DataError as error:
        problems.append(str(error).replace("masks:", f"{settings.masks}:"))
        return None
    wrong = (rule.problem(s.mask, h) for s, h in histograms.items() if s.mask)
    problems += [line for line in wrong if line]
    if settings.num_classes and rule.num_classes > settings.num_classes:
        problems.append(
            f"{settings.masks}: {rule.num_classes} classes where --num_classes is "
            f"{settings.num_classes} ({rule.lines()[1]}); correct it, or give --palette"
        )
    return rule


def _count(settings: Settings, plan: Plan, tiles: list[Tile]) -> list[Tile]:
    """The tiles with their pixels of each class."""
    of: defaultdict[Source, list[Tile]] = defaultdict(list)
    for tile in tiles:
        of[tile.source].append(tile)
    counted = []
    for source, own in of.items():
        if not source.mask:
            counted += own
            continue
        ids = read_ids(settings, plan, source)
        for tile in own:
            counts = np.bincount(window(settings, tile, ids).ravel(), minlength=256)
            plan.ignored += int(counts[IGNORED])
            counted.append(replace(tile, counts=tuple(counts[: plan.num_classes].tolist())))
    return counted


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixel of each tile along a side: the tiles cover it, the last one ends with it."""
    step = tile - overlap
    return [*range(0, side - tile, step), side - tile]


def _cut(
    settings: Settings, sizes: dict[Source, tuple[int, int]], problems: list[str]
) -> list[Tile]:
    """Tiles of all sources, with their names."""
    same = Counter((s.batch, s.sample) for s in sizes)
    number: Counter[tuple[str, str]] = Counter()
    tiles = []
    for source, (height, width) in sizes.items():
        key = source.batch, source.sample
        number[key] += 1
        if source.keeps_name and not settings.tile:
            tiles.append(Tile(source, source.image.stem, 0, 0))
            continue
        sample = source.sample
        if source.pages > 1 and settings.page < 0:
            sample += f"-p{source.page}"
        if same[key] > (source.pages if settings.page < 0 else 1):
            sample += f"-{number[key]}"
        side = settings.tile
        if side and min(height, width) < side:
            text = f"{source.image}: {_size((height, width))} is smaller than --tile {side}"
            problems.append(f"{text}; give a smaller --tile")
            continue
        rows = tile_starts(height, side, settings.overlap) if side else [0]
        columns = tile_starts(width, side, settings.overlap) if side else [0]
        for r, top in enumerate(rows):
            for c, left in enumerate(columns):
                name = f"{source.batch}_{sample}_{r}_{c}"
                tiles.append(Tile(source, name, top, left))
    for name, count in Counter(t.name.casefold() for t in tiles).items():
        if count > 1:
            files = dict.fromkeys(t.source.image.name for t in tiles if t.name.casefold() == name)
            text = f"{settings.images}: {', '.join(files)} would all become {name}.png"
            problems.append(f"{text}; tell them apart by --batch-from")
    return tiles


def _split(settings: Settings, plan: Plan, tiles: list[Tile]) -> None:
    """Fill ``plan.splits``: whole specimens to the test set, images without masks apart."""
    test = _test_specimens(settings, [t for t in tiles if _is_annotated(t)])
    left_out = 0
    for tile in tiles:
        in_test = tile.source.specimen in test
        if in_test and not _is_annotated(tile):
            left_out += 1  # pretraining would see the test specimens
            continue
        split = "test" if in_test else "train" if _is_annotated(tile) else "unlabelled"
        plan.splits.setdefault(SPLITS[split], []).append(tile)
    if left_out:
        plan.notes.append(f"{left_out} image(s) without a mask left out: of a test specimen")
    if SPLITS["train"] not in plan.splits:
        raise DataError(f"{settings.images}: no annotated image is left to train on; lower --test")


def _is_annotated(tile: Tile) -> bool:
    return bool(tile.counts) and tile.source.split != "unlabelled"


def _test_specimens(settings: Settings, annotated: list[Tile]) -> set[Any]:
    """The specimens that the table gives to the test set; without any, a draw among the others."""
    given: defaultdict[str, set[str]] = defaultdict(set)
    for tile in annotated:
        given[tile.source.specimen].add(tile.source.split)
    both = [s for s, splits in given.items() if {"train", "test"} <= splits]
    if both:
        lines = (f"specimen {s}: in training and in test; give it to one split" for s in both)
        raise DataError("\n".join(at_most(lines)))
    test = {s for s, splits in given.items() if "test" in splits}
    if test or not settings.test:
        return test
    free = [t for t in annotated if "train" not in given[t.source.specimen]]
    owners = [t.source.specimen for t in free]
    if len(set(owners)) < 2:
        raise DataError(
            f"{settings.images}: {len(set(owners))} specimen(s) to draw a test set from "
            f"({', '.join(sorted(set(owners)))}), 2 are needed; tell images apart by --batch-from, "
            "or give --test 0"
        )
    counts = np.array([t.counts for t in free])
    return set(draw_test_specimens(owners, counts, settings.test, settings.seed))


def _annotate(settings: Settings, plan: Plan) -> None:
    """Add the sets of one and of five annotated images."""
    train = plan.splits[SPLITS["train"]]
    counts = np.array([t.counts for t in train])
    specimens = [t.source.specimen for t in train]
    for k, index in enumerate(draw_single(specimens, counts, settings.seed, REPEATS)):
        plan.splits[f"sup_num1_{k}"] = [train[index]]
    for k, group in enumerate(draw_groups(specimens, counts, settings.seed, 5, REPEATS)):
        plan.splits[f"sup_num5_{k}"] = [train[index] for index in group]
    for size in (1, 5):
        made = sum(name.startswith(f"sup_num{size}_") for name in plan.splits)
        if made < REPEATS:
            plan.warnings.append(
                f"{made} of {REPEATS} sets sup_num{size}_*: {len(train)} training image(s) "
                "give no more different ones"
            )


# ---------------------------------------------------------------- pixels


def _mask_pixels(settings: Settings, source: Source) -> NDArray[Any]:
    """The mask's own values; a mask of one page serves all pages of its image."""
    assert source.mask is not None
    pages = count_pages(source.mask)
    if pages not in (1, source.pages):
        text = f"{source.mask}: {pages} pages, its image has {source.pages}"
        raise DataError(f"{text}; save as many pages in both")
    colours = settings.mask_kind == "colours" or any(len(v) == 3 for _, v in settings.palette)
    return read_pixels(source.mask, source.page if pages > 1 else 1, colours)


def _fit(
    settings: Settings, source: Source, image: tuple[int, ...], mask: tuple[int, ...]
) -> Boxes:
    """Crop image and mask (their shapes are given) to one size.

    A mask that has the size of the cropped image is not cropped again. With ``trim``, what one of
    them has more at the bottom and on the right is cut off, up to so many pixels.
    """
    cut = _crop(settings, image)
    cut_mask = _crop(settings, mask)
    whole_mask = slice(0, mask[0]), slice(0, mask[1])
    fits_cut = _difference(_extent(whole_mask), _extent(cut)) <= settings.trim
    if fits_cut and _difference(mask[:2], image[:2]) > settings.trim:
        cut_mask = whole_mask
    sides, mask_sides = _extent(cut), _extent(cut_mask)
    if _difference(sides, mask_sides) > settings.trim:
        cropped = " (cropped)" if any(settings.crop) else ""
        raise DataError(
            f"{source.mask}: {_size(mask_sides)}, its image is {_size(sides)}{cropped}; "
            "a mask has the size of its image, before or after --crop; --trim cuts a few pixels"
        )
    height, width = (min(a, b) for a, b in zip(sides, mask_sides, strict=True))
    return _shrink(cut, height, width), _shrink(cut_mask, height, width)


def _crop(settings: Settings, shape: tuple[int, ...]) -> Box:
    top, bottom, left, right = settings.crop
    return slice(top, max(top, shape[0] - bottom)), slice(left, max(left, shape[1] - right))


def _difference(sides: tuple[int, ...], others: tuple[int, ...]) -> int:
    return max(abs(a - b) for a, b in zip(sides, others, strict=True))


def _extent(box: Box) -> tuple[int, int]:
    return box[0].stop - box[0].start, box[1].stop - box[1].start


def _shrink(box: Box, height: int, width: int) -> Box:
    rows, columns = box
    return slice(rows.start, rows.start + height), slice(columns.start, columns.start + width)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _mask_codes(
    settings: Settings, source: Source, boxes: Boxes, colours: bool
) -> NDArray[np.int64]:
    assert source.mask is not None
    return to_codes(source.mask, _mask_pixels(settings, source)[boxes[1]], colours)


def read_ids(settings: Settings, plan: Plan, source: Source) -> Pixels:
    """Class ids of a source's mask after cropping, uint8 (H, W); 255 where there is no label."""
    rule = plan.rule
    ids = rule.apply(_mask_codes(settings, source, plan.boxes[source], rule.colours))
    return np.where(ids == IGNORED, settings.ignored_as, ids).astype(np.uint8)


def read_cropped(plan: Plan, source: Source) -> Pixels:
    """A source's image after cropping, uint8 (H, W) or (H, W, 3)."""
    return read_picture(source.image, source.page)[0][plan.boxes[source][0]]


def window(settings: Settings, tile: Tile, pixels: Pixels) -> Pixels:
    """The tile's part of a cropped image or mask."""
    side = settings.tile
    if not side:
        return pixels
    return pixels[tile.top : tile.top + side, tile.left : tile.left + side]
