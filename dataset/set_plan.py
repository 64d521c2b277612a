"""Plan a set from a user's files: pair, name and cut the images, and choose the splits.

Nothing is written here; ``dataset/prepare.py`` is the program.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import MOST_REPEATS, name_key, parse_name
from dataset.check import SMALLEST_SIDE, Problems, size_text
from dataset.mask_values import IGNORED, Codes, MaskRule, find_rule, histogram_of, to_codes
from dataset.set_check import Counts
from dataset.set_draws import draw_groups, draw_single, draw_test_specimens
from dataset.source_files import count_pages, read_picture, read_pixels
from utils.files import IMAGE_SUFFIXES, list_files
from utils.imagefile import Array, DataError, Pixels, has_colour

SPLITS = {"train": "train_numf", "test": "test_numf", "unlabelled": "train_unlabelled"}
EACH = -1  # of --page
_SUFFIXES = [s for suffix in IMAGE_SUFFIXES for s in (suffix, suffix.upper())]


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: Array) -> Array:
        """This part of an image or a mask, (H, W, ...)."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]

    def misfit(self, other: Box) -> int:
        """By how many pixels the sides of two rectangles differ at most."""
        return max(abs(self.height - other.height), abs(self.width - other.width))


@dataclass(frozen=True)
class Source:
    """One image (a page of a file), with its mask if it has one, and where it comes from.

    Attributes:
        keeps_name: the file's name is that of the image in the set, unless it is tiled.
        box, mask_box: the parts of image and mask that are used.
    """

    image: Path
    mask: Path | None
    page: int = 1
    pages: int = 1
    batch: str = ""
    sample: str = ""
    specimen: str = ""
    split: str = ""
    keeps_name: bool = False
    box: Box = Box(0, 0, 0, 0)
    mask_box: Box = Box(0, 0, 0, 0)


@dataclass(frozen=True)
class Tile:
    """One image of the set: a square (or all) of the part of a source that is used."""

    source: Source
    name: str
    box: Box
    counts: Counts | None = None  # (256,) pixels of each class; None without a mask

    @property
    def annotated(self) -> bool:
        """Whether it has a mask that is to be used."""
        return self.counts is not None and self.source.split != "unlabelled"


@dataclass
class Plan:
    """The set before it is written; ``settings`` are the options of ``dataset/prepare.py``."""

    settings: Namespace
    rule: MaskRule
    num_classes: int
    splits: defaultdict[str, list[Tile]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def image(self, source: Source) -> Pixels:
        """A source's image after cropping, uint8 (H, W) or (H, W, 3)."""
        return source.box.of(read_picture(source.image, source.page)[0])

    def ids(self, source: Source) -> Pixels:
        """Class ids of its mask after cropping, uint8 (H, W); unlabelled as ``--ignored-as``."""
        ids = self.rule.apply(_codes(self.settings, source, self.rule.colours))
        return np.where(ids == IGNORED, self.settings.ignored_as, ids).astype(np.uint8)

    def counts(self, tiles: list[Tile]) -> Counts:
        """Pixels of each class in each tile, (N, C); all need masks."""
        return np.array([t.counts for t in tiles if t.counts is not None])[:, : self.num_classes]


def make_plan(settings: Namespace) -> Plan:
    """Read everything once, decide what is which class and which image goes where.

    Args:
        settings: the options of ``dataset/prepare.py``, see its ``read_settings``.

    Raises:
        DataError: all problems found, one line each (after 30 lines only their number).
    """
    problems, warnings = Problems(), list[str]()
    notes: Counter[str] = Counter()
    colours = settings.mask_kind == "colours"
    sources = []
    for source in find_sources(settings, problems, warnings):
        with problems.collect():
            image, note = read_picture(source.image, source.page)
            mask = _mask_pixels(settings, source) if source.mask else image
            colours = colours or (source.mask is not None and has_colour(mask))
            sources.append(_fit(settings, source, image.shape, mask.shape))
            notes[note] += 1
    rule = _find_rule(settings, sources, colours, problems)
    tiles = _cut(settings, sources, problems)
    problems.refuse()
    assert rule is not None  # without masks there is a problem
    num_classes = max(settings.num_classes, rule.num_classes)
    if settings.ignored_as != IGNORED:
        num_classes = max(num_classes, settings.ignored_as + 1)
    if num_classes < 2:
        warnings.append(
            f"one class in all masks ({rule.lines()[1]}): training needs 2; check the masks, or "
            "give --palette"
        )
    plan = Plan(settings, rule, num_classes, warnings=warnings)
    plan.notes += [f"{count} image(s) of {note}" for note, count in sorted(notes.items()) if note]
    _split(plan, _count(plan, tiles))
    _annotate(plan)
    return plan


# ---------------------------------------------------------------- finding images


def find_sources(settings: Namespace, problems: Problems, warnings: list[str]) -> list[Source]:
    """Pair images with masks and find out batch, sample and specimen of each."""
    files = list_files(settings.images, IMAGE_SUFFIXES)
    masks = {name_key(p.name): p for p in list_files(settings.masks)}
    masks_of = {p: _masks_of(settings, p, masks) for p in files}
    one_folder = settings.masks.resolve() == settings.images.resolve()
    if one_folder:
        taken = {found[0] for found in masks_of.values() if found}
        files = [p for p in files if p not in taken]
    if not files:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise DataError(f"{settings.images}: no image in it ({suffixes}); give another --images")
    stems = Counter(name_key(p.stem) for p in files)
    sources: list[Source] = []
    for path in files:
        found = masks_of[path]
        if stems[name_key(path.stem)] > 1:
            problems.append(f"{path}: another image has this name too; rename or remove one")
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            problems.append(f"{path}: {len(found)} masks ({names}); remove all but one")
        source = Source(path, found[0] if found else None)
        with problems.collect():
            source = _identify(settings, source)
        with problems.collect():
            sources += _pages(settings, source, warnings)
    used = {masks_of[path][0] for path in files if masks_of[path]}
    stray = [p for p in masks.values() if p.suffix.lower() in IMAGE_SUFFIXES and p not in used]
    if stray and not one_folder:
        warnings.append(f"{stray[0]}: {len(stray)} mask(s) without an image; not used")
    if not used:
        wanted = settings.mask_pattern.replace("{stem}", files[0].stem) or f"{files[0].stem}.*"
        problems.append(f"{settings.masks / wanted}: no image has a mask; give --mask-pattern")
    if isinstance(settings.batch_from, dict):
        known = {name_key(name) for p in files for name in (p.name, p.stem)}
        unknown = sorted(set(settings.batch_from) - known)
        if unknown:
            rows = f"{len(unknown)} row(s) without an image, as {unknown[0]}"
            warnings.append(f"--batch-from: {rows}")
    return sources


def _masks_of(settings: Namespace, image: Path, masks: dict[str, Path]) -> list[Path]:
    """The masks that an image could have, by name; ``masks`` has their paths."""
    stem = name_key(image.stem)
    names = [stem + suffix for suffix in _SUFFIXES]
    if settings.mask_pattern:
        names = [name_key(settings.mask_pattern).replace("{stem}", stem)]
    return [masks[name] for name in names if name in masks and masks[name] != image]


def _identify(settings: Namespace, source: Source) -> Source:
    """Batch, sample and specimen from the table, the regular expression, or the name."""
    path, given = source.image, settings.batch_from
    specimen = split = ""
    if isinstance(given, dict):
        row = given.get(name_key(path.name)) or given.get(name_key(path.stem))
        if row is None:
            raise DataError(f"{path}: not in the table of --batch-from; add a row for it")
        batch, sample = row["batch"], row.get("sample") or path.stem
        specimen, split = row.get("specimen", ""), row.get("split", "")
    elif given is not None:
        match = given.search(path.name)
        if match is None:
            shown = f"--batch-from {given.pattern!r}"
            raise DataError(f"{path}: {shown} does not match this name; correct it")
        named, plain = match.groupdict(), match.groups("")
        batch = named.get("batch") or plain[0]
        sample = named.get("sample") or "".join(plain[1:2]) or path.stem
        specimen = named.get("specimen") or ""
    else:
        batch, sample = parse_name(path.stem)
    return replace(
        source,
        batch=_field(batch),
        sample=_field(sample),
        specimen=specimen or f"{batch}_{sample}",
        split=split,
        keeps_name=given is None,
    )


def _field(text: str) -> str:
    """One field of a file name: no separator, and nothing that a file system refuses."""
    return re.sub(r"[\s_/\\:*?\"<>|]+", "-", text.strip()).strip("-.")


def _pages(settings: Namespace, source: Source, warnings: list[str]) -> list[Source]:
    """The wanted pages of a file, as one source each."""
    pages = count_pages(source.image)
    source = replace(source, pages=pages, page=max(settings.page, 1))
    if settings.page == EACH:
        return [replace(source, page=n + 1, keeps_name=False) for n in range(pages)]
    if pages > 1 and not settings.page:
        warnings.append(f"{source.image}: {pages} pages, the first is taken; --page chooses")
    if source.page > pages:
        raise DataError(
            f"{source.image}: no page {source.page}, it has {pages}; choose another --page"
        )
    return [source]


# ---------------------------------------------------------------- pixels


def _fit(
    settings: Namespace, source: Source, image: tuple[int, ...], mask: tuple[int, ...]
) -> Source:
    """The source with the parts of image and mask (their shapes are given) that are used.

    A mask that has the size of the cropped image is not cropped again. With ``trim``, what one of
    them has more at the bottom and on the right is cut off, up to so many pixels.
    """
    whole, whole_mask = (Box(0, 0, *shape[:2]) for shape in (image, mask))
    box, mask_box = _crop(settings, whole), _crop(settings, whole_mask)
    if whole_mask.misfit(box) <= settings.trim < whole_mask.misfit(whole):
        mask_box = whole_mask
    if box.misfit(mask_box) > settings.trim:
        cropped = " (cropped)" if any(settings.crop) else ""
        raise DataError(
            f"{source.mask}: {size_text(mask_box[2:])}, its image is {size_text(box[2:])}{cropped};"
            " a mask has the size of its image, before or after --crop; --trim cuts a few pixels"
        )
    height, width = min(box.height, mask_box.height), min(box.width, mask_box.width)
    if min(height, width) < SMALLEST_SIDE:
        text = f"{source.image}: {size_text((height, width))} pixels are used"
        raise DataError(f"{text}; at least {SMALLEST_SIDE} a side are needed")
    box, mask_box = (b._replace(height=height, width=width) for b in (box, mask_box))
    return replace(source, box=box, mask_box=mask_box)


def _crop(settings: Namespace, whole: Box) -> Box:
    top, bottom, left, right = settings.crop
    return Box(top, left, max(0, whole.height - top - bottom), max(0, whole.width - left - right))


def _mask_pixels(settings: Namespace, source: Source) -> Array:
    """The mask's own values; a mask of one page serves all pages of its image."""
    assert source.mask is not None
    pages = count_pages(source.mask)
    if pages not in (1, source.pages):
        text = f"{source.mask}: {pages} pages, its image has {source.pages}"
        raise DataError(f"{text}; save as many pages in both")
    colours = settings.mask_kind == "colours" or any(len(v) == 3 for _, v in settings.palette)
    return read_pixels(source.mask, source.page if pages > 1 else 1, colours)


def _codes(settings: Namespace, source: Source, colours: bool) -> Codes:
    """The used part of a source's mask, (H, W), see ``to_codes``."""
    assert source.mask is not None
    return to_codes(source.mask, source.mask_box.of(_mask_pixels(settings, source)), colours)


def _find_rule(
    settings: Namespace, sources: list[Source], colours: bool, problems: Problems
) -> MaskRule | None:
    """The rule for all masks; what is wrong with them is added to the problems."""
    histograms: list[tuple[Path, Counter[int]]] = []
    for source in sources:
        if source.mask:
            with problems.collect():
                codes = _codes(settings, source, colours)
                histograms.append((source.mask, histogram_of(codes)))
    total = sum((histogram for _, histogram in histograms), Counter())
    rule = None
    if total:
        with problems.collect():
            rule = find_rule(total, colours, settings)
    if rule is not None:
        found = (rule.problem(path, histogram) for path, histogram in histograms)
        problems += [line for line in found if line]
        if settings.num_classes and rule.num_classes > settings.num_classes:
            problems.append(
                f"{settings.masks}: {rule.num_classes} classes where --num_classes is "
                f"{settings.num_classes} ({rule.lines()[1]}); correct it, or give --palette"
            )
    return rule


# ---------------------------------------------------------------- tiles and splits


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixel of each tile along a side: the tiles cover it, the last one ends with it."""
    step = tile - overlap
    return [*range(0, side - tile, step), side - tile]


def _cut(settings: Namespace, sources: list[Source], problems: Problems) -> list[Tile]:
    """Tiles of all sources, with their names."""
    same = Counter((s.batch, s.sample) for s in sources)
    number: Counter[tuple[str, str]] = Counter()
    tiles: list[Tile] = []
    for source in sources:
        number[source.batch, source.sample] += 1
        each = settings.page == EACH
        sample = source.sample
        if source.pages > 1 and each:
            sample += f"-p{source.page}"
        if same[source.batch, source.sample] > (source.pages if each else 1):
            sample += f"-{number[source.batch, source.sample]}"
        height, width = source.box.height, source.box.width
        side = settings.tile
        if source.keeps_name and not side:
            tiles.append(Tile(source, source.image.stem, Box(0, 0, height, width)))
        elif side > min(height, width):
            text = f"{source.image}: {size_text(source.box[2:])} is smaller than --tile {side}"
            problems.append(f"{text}; give a smaller --tile")
        else:
            rows, columns = side or height, side or width
            for r, top in enumerate(tile_starts(height, rows, settings.overlap)):
                for c, left in enumerate(tile_starts(width, columns, settings.overlap)):
                    name = f"{source.batch}_{sample}_{r}_{c}"
                    tiles.append(Tile(source, name, Box(top, left, rows, columns)))
    by_name = defaultdict(list)
    for tile in tiles:
        by_name[tile.name.casefold()].append(tile)
    for name, own in by_name.items():
        if len(own) > 1:
            files = ", ".join(dict.fromkeys(t.source.image.name for t in own))
            text = f"{settings.images}: {files} would all become {name}.png"
            problems.append(f"{text}; tell them apart by --batch-from")
    return tiles


def _count(plan: Plan, tiles: list[Tile]) -> list[Tile]:
    """The tiles with their pixels of each class; those of a source follow one another."""
    counted = []
    for source, own in groupby(tiles, key=lambda tile: tile.source):
        ids = plan.ids(source) if source.mask else None
        for tile in own:
            if ids is not None:
                counts = np.bincount(tile.box.of(ids).ravel(), minlength=256)
                tile = replace(tile, counts=counts)
            counted.append(tile)
    return counted


def _split(plan: Plan, tiles: list[Tile]) -> None:
    """Fill ``plan.splits``: whole specimens to the test set, images without masks apart."""
    test = _test_specimens(plan, [t for t in tiles if t.annotated])
    left_out = 0
    for tile in tiles:
        in_test = tile.source.specimen in test
        if in_test and not tile.annotated:
            left_out += 1  # pretraining would see the test specimens
            continue
        split = "test" if in_test else "train" if tile.annotated else "unlabelled"
        plan.splits[SPLITS[split]].append(tile)
    if left_out:
        plan.notes.append(f"{left_out} image(s) without a mask left out: of a test specimen")
    if SPLITS["train"] not in plan.splits:
        where = plan.settings.images
        raise DataError(f"{where}: no annotated image is left to train on; lower --test")


def _test_specimens(plan: Plan, annotated: list[Tile]) -> set[Hashable]:
    """The specimens that the table gives to the test set; without any, a draw among the others."""
    given: defaultdict[str, set[str]] = defaultdict(set)
    for tile in annotated:
        given[tile.source.specimen].add(tile.source.split)
    both = (s for s, splits in given.items() if {"train", "test"} <= splits)
    wrong = (f"specimen {s}: in training and in test; give it to one split" for s in both)
    Problems(wrong).refuse()
    test: set[Hashable] = {s for s, splits in given.items() if "test" in splits}
    if test or not plan.settings.test:
        return test
    free = [t for t in annotated if "train" not in given[t.source.specimen]]
    owners = [t.source.specimen for t in free]
    names = sorted(set(owners))
    if len(names) < 2:
        raise DataError(
            f"{plan.settings.images}: {len(names)} specimen(s) to draw a test set from "
            f"({', '.join(names)}), 2 are needed; tell images apart by --batch-from, "
            "or give --test 0"
        )
    return draw_test_specimens(owners, plan.counts(free), plan.settings.test, plan.settings.seed)


def _annotate(plan: Plan) -> None:
    """Add the sets of one and of five annotated images."""
    train, seed = plan.splits[SPLITS["train"]], plan.settings.seed
    counts, specimens = plan.counts(train), [t.source.specimen for t in train]
    single = [[index] for index in draw_single(specimens, counts, seed, MOST_REPEATS)]
    five = draw_groups(specimens, counts, seed, 5, MOST_REPEATS)
    for size, groups in ((1, single), (5, five)):
        for k, group in enumerate(groups):
            plan.splits[f"sup_num{size}_{k}"] = [train[index] for index in group]
        if len(groups) < MOST_REPEATS:
            plan.warnings.append(
                f"{len(groups)} of {MOST_REPEATS} sets sup_num{size}_*: {len(train)} training "
                "image(s) give no more different ones"
            )
