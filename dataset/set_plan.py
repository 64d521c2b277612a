"""Plan a set from a user's files: pair, name and cut the images, and choose the splits."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from annotation.files import is_annotation, pages_in
from annotation.scribbles import unlabelled_value, value_round_strokes
from data import MOST_REPEATS
from dataset.batches import SPLITS, ProductionBatches
from dataset.check import TURNED_MASK, Problems, size_text, turned_images
from dataset.mask_values import SetSettings
from dataset.pairs import Pairs
from dataset.set_check import Counts
from dataset.set_draws import draw_groups, draw_single, draw_test_specimens
from dataset.set_masks import SetMasks
from imaging.data_bar import Bar, bar_lines, find_bars
from imaging.field import SMALLEST_SIDE, Crop, filled, transparent
from imaging.gray_range import EACH_IMAGE, Conversion, GrayPool, check_finite
from imaging.imagefile import UPRIGHT, Array, Pixels, decode, read_image, turn_text
from imaging.listing import some_names
from imaging.pages import count_pages, images_of, page_name
from imaging.pixel_size import SAME, pixel_size
from utils.files import DataError, name_key
from utils.metrics import IGNORED

EACH = -1  # of --page


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: Array) -> Array:
        """This part of an image or a mask, (H, W, ...)."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Source:
    """One image (a page of a file), with its mask if it has one, and where it comes from."""

    image: Path
    mask: Path | None  # the first of its masks where each class has a file
    keeps_name: bool  # in the set it has the file's name, unless it is tiled
    below: str = ""  # path below the folder of images
    page: int = 1
    pages: int = 1
    batch: str = ""
    sample: str = ""
    specimen: str = ""
    split: str = ""
    box: Box = Box(0, 0, 0, 0)  # the part of the image that is used
    mask_box: Box = Box(0, 0, 0, 0)
    parts: tuple[tuple[str, Path], ...] = ()  # class and mask, where each class has a file
    size: tuple[int, int] = (0, 0)  # (H, W) of the image
    slice: int = 0  # of the stack, whose outlines count; 0: all in the file

    @property
    def drawn(self) -> bool:
        """Whether the mask names its classes: outlines, or a file for each class."""
        return self.mask is not None and (bool(self.parts) or is_annotation(self.mask))


@dataclass(frozen=True)
class Tile:
    """One image of the set: the used part of a source, or a square of it."""

    source: Source
    name: str
    box: Box
    counts: Counts | None = None  # (256,) pixels of each class; None without a mask

    @property
    def annotated(self) -> bool:
        """Whether it has a mask that is to be used."""
        return self.counts is not None and self.source.split != "unlabelled"


class Plan:
    """The set before it is written: ``splits`` has the images of each folder.

    ``of_a_job``: for ``segment.py``, whose tiles need no names, which has no splits of few images,
    and which finds scales itself; ``no_images`` are files below the images that are none.
    ``notes`` and ``warnings`` are lines of the report; of a job they leave out ``without_mask``,
    the images without a mask. Raises DataError of all problems found, a line each.
    """

    def __init__(
        self, settings: SetSettings, *, of_a_job: bool = False, no_images: Collection[Path] = ()
    ) -> None:
        self.settings, self.problems = settings, Problems()
        self.of_a_job, self.no_images = of_a_job, no_images
        self.splits: defaultdict[str, list[Tile]] = defaultdict(list)
        self.scribbled: dict[Path, int] = {}  # masks of strokes, and the value round them
        self.warnings: list[str] = []
        self.notes: list[str] = []
        pool, turned, bars = GrayPool(), dict[Path, int](), dict[Path, list[Bar]]()
        self.scales: dict[Path, float] = {}  # micrometres per pixel of the images that tell it
        paired, sources = self._sources(), list[Source]()
        self.masks = SetMasks(settings, self.problems, paired)
        for source in paired:
            with self.problems.collect():
                image, _, orientation, _ = decode(source.image, source.page)
                check_finite(source.image, image)
                source = replace(source, size=(image.shape[0], image.shape[1]))
                shape = self.masks.look(source) if source.mask else image.shape
                sources.append(self._fit(source, image.shape, shape, orientation))
                image = self._seen(sources[-1], image)
                pool.add(image)
                bars[source.image] = find_bars(EACH_IMAGE.apply(image))
                if not self.of_a_job:
                    self._note_scale(source.image)
                if source.mask and orientation not in (UPRIGHT, self.masks.orientation(source)):
                    turned[source.image] = orientation
        self.gray: Conversion = pool.range() or EACH_IMAGE  # of images with more than 8 bits
        kinds = ", ".join(sorted(pool.kinds))
        self.notes += [f"{kinds} images: {self.gray}, one range for the set"] if kinds else []
        self.warnings += [*turned_images(turned), *bar_lines(bars, settings.crop)]
        decided = self.masks.decide(sources)
        tiles = self._cut(sources)
        self.problems.refuse()
        assert decided  # without masks there is a problem
        self.notes += self.masks.notes
        self.warnings += self.masks.warnings
        self.rule = rule = self.masks.rule
        self.num_classes = max(settings.num_classes, self.masks.num_classes)
        if settings.ignored_as != IGNORED:
            self.num_classes = max(self.num_classes, settings.ignored_as + 1)
        if self.num_classes < 2:
            found = f"one class in all masks ({rule.same_as()}): training needs 2"
            self.warnings.append(f"{found}; check the masks, or give --palette")
        self._split(list(self._count(tiles)))
        if not of_a_job:
            self._annotate()

    def _note_scale(self, image: Path) -> None:
        """Note the size of an image's pixels: as given, else as the file says."""
        given, found = self.settings.um_per_px, None
        try:
            found = pixel_size(image)
        except DataError as error:
            self.warnings += [] if given else [str(error)]
        if given and found and abs(found.um - given) > SAME * max(found.um, given):
            said = f"--um_per_px {given:g} against {found.um:.4g} µm ({found.where})"
            self.warnings.append(f"{image}: {said}; {given:g} is used")
        um = given or (found.um if found else None)
        self.scales |= {} if um is None else {image: float(f"{um:.6g}")}

    def image(self, source: Source) -> Pixels:
        """A source's image after cropping, uint8 (H, W) or (H, W, 3); see ``filled``."""
        return self._seen(source, read_image(source.image, self.gray, source.page))

    def clear(self, source: Source) -> Array | None:
        """Where a source's image is transparent after cropping, bool (H, W); None: nowhere."""
        clear = transparent(source.image, source.page)
        return None if clear is None else source.box.of(clear)

    def _seen(self, source: Source, pixels: Array) -> Array:
        """Pixels (H, W, ...) of a source after cropping, without what is hidden there."""
        clear, part = self.clear(source), source.box.of(pixels)
        return filled(part, None if clear is None or clear.shape != part.shape[:2] else ~clear)

    def ids(self, source: Source) -> Pixels:
        """Class ids of its mask after cropping, uint8 (H, W); unlabelled as ``--ignored_as``.

        What is transparent in the image is outside the field: 255.
        """
        ids = self.masks.ids(source)
        ids = np.where(ids == IGNORED, self.settings.ignored_as, ids).astype(np.uint8)
        clear = self.clear(source)
        if clear is not None and clear.shape == ids.shape:
            ids[clear] = IGNORED
        return ids

    def counts(self, tiles: list[Tile]) -> Counts:
        """Pixels of each class in each tile, (N, C); all need masks."""
        return np.array([t.counts for t in tiles if t.counts is not None])[:, : self.num_classes]

    def _sources(self) -> list[Source]:
        """Pair images with masks and find out batch, sample and specimen of each."""
        settings, problems = self.settings, self.problems
        folders = settings.images, settings.masks, settings.mask_pattern, settings.out
        pairs = Pairs(*folders, self.no_images)
        self.notes += pairs.notes
        self.warnings += pairs.warnings + (pairs.first_alone() if not settings.page else [])
        self.without_mask = pairs.without_mask
        if self.without_mask and not self.of_a_job:
            alone = f"{len(self.without_mask)} image(s) without a mask, taken as unlabelled"
            told = self.warnings if pairs.one_folder else self.notes
            told.append(f"{alone}: {some_names(self.without_mask)}")
        stems = Counter(name_key(path.stem) for path in pairs.masks)
        places = Counter((path.parent, name_key(path.stem)) for path in pairs.masks)
        batches = ProductionBatches(settings.batch_from, pairs.masks, settings.images)
        sources: list[Source] = []
        for path, found in pairs.masks.items():
            stem, below = name_key(path.stem), batches.below(path)
            if places[path.parent, stem] > 1:
                problems.append(f"{path}: another image has this name too; rename or remove one")
            elif stems[stem] > 1 and settings.batch_from is None:
                found_too = "another image has this name too, in another folder"
                problems.append(f"{path}: {found_too}; rename one, or give --batch_from")
            source = Source(path, found[0] if found else None, settings.batch_from is None, below)
            if pairs.classes:
                source = replace(source, parts=tuple((pairs.classes[p], p) for p in found))
            with problems.collect():
                source = _identified(source, batches.of(path))
            with problems.collect():
                sources += self._pages(source, pairs.of_page.get(path, {}), pairs.classes)
        problems += pairs.check()
        self.warnings += batches.lines()
        return sources

    def _pages(
        self, source: Source, masks: Mapping[int, Sequence[Path]], classes: Mapping[Path, str]
    ) -> list[Source]:
        """The wanted pages of a file, as one source each; ``masks`` are those of single pages.

        ``classes`` has the class of each file where each class has one.

        A mask of one page with the name of the file is that of the page that is chosen, or of the
        first of them all.
        """
        pages, wanted = count_pages(source.image), self.settings.page
        source = replace(source, pages=pages, page=max(wanted, 1))
        numbers = [source.page]
        if wanted == EACH:
            numbers, others = images_of(source.image)
            if others:
                what = "previews, or of another size or kind than the others"
                self.warnings.append(f"{source.image}: left out, {what}: {', '.join(others)}")
            source = replace(source, keeps_name=False)
        elif pages > 1 and not wanted:
            found = f"{source.image}: {pages} pages, the first is taken"
            self.warnings.append(f"{found}; --page chooses")
        if source.page > pages:
            found = f"{source.image}: no page {source.page}, it has {pages}"
            raise DataError(f"{found}; choose another --page")
        self.warnings += [
            f"{own[0]}: not used, page {number} is not taken; give --page each"
            for number, own in masks.items()
            if number not in numbers
        ]
        in_one = source.mask and source.drawn and not source.parts and pages > 1
        if slices := pages_in(source.mask) if in_one and source.mask else set():
            return self._by_slice(source, numbers, slices, masks)
        alone = source.mask is not None and count_pages(source.mask) == 1 < len(numbers)
        if alone and numbers[0] not in masks:
            found = f"{source.mask}: one page, taken for page {numbers[0]} of {source.image.name}"
            label = f"_{source.parts[0][0]}" if source.parts else ""
            other = f"{page_name(source.image.stem, numbers[1])}{label}.png"
            self.notes.append(f"{found}; a mask of page {numbers[1]} is called {other}")
        return [
            self._page(source, n, masks, classes, bare=alone and n != numbers[0]) for n in numbers
        ]

    def _by_slice(
        self,
        source: Source,
        numbers: Sequence[int],
        slices: set[int],
        masks: Mapping[int, Sequence[Path]],
    ) -> list[Source]:
        """The pages of a stack, each with what was drawn on its slice, and else without a mask."""
        image, taken, others = source.image, slices & {*numbers}, slices - {*numbers}
        found = f"{source.mask}: outlines on slice {', '.join(map(str, sorted(others)))}"
        if others and max(others) > source.pages:
            raise DataError(f"{found}, {image.name} has {source.pages}; was it drawn on another?")
        if not taken:
            cure = f"give --page {min(others)}, or each"
            raise DataError(f"{found}, of {image.name} page {numbers[0]} is taken; {cure}")
        self.warnings += [f"{found} not used, give --page each"] if others else []
        own = [
            self._page(source, number, masks, {}, bare=number not in slices) for number in numbers
        ]
        return [s if s.mask != source.mask else replace(s, slice=s.page) for s in own]

    def _page(
        self,
        source: Source,
        number: int,
        masks: Mapping[int, Sequence[Path]],
        classes: Mapping[Path, str],
        *,
        bare: bool,
    ) -> Source:
        """A page, with the mask of its own if there is one, and without the file's if ``bare``."""
        if number in masks:
            own = masks[number][0]
            if count_pages(own) > 1:
                found = f"{own}: {count_pages(own)} pages in a mask of page {number}"
                raise DataError(f"{found}; save that page alone")
            whole = source.mask is not None and not bare and self.settings.page in (EACH, 0)
            if whole:
                raise DataError(f"{own} and {source.mask}: both are of page {number}; remove one")
            parts = tuple((classes[path], path) for path in masks[number] if path in classes)
            return replace(source, page=number, mask=masks[number][0], parts=parts)
        source = replace(source, page=number)
        return replace(source, mask=None, parts=()) if bare else source

    def _fit(
        self, source: Source, image: tuple[int, ...], mask: tuple[int, ...], orientation: int
    ) -> Source:
        """The source with its boxes, from the shapes of image and mask.

        A mask that has the size of the cropped image is not cropped again. What one of them has
        more at the bottom and on the right is cut off, up to ``--trim`` pixels.
        """
        settings = self.settings
        top, bottom, left, right = settings.crop
        crop = f"{Crop(*settings.crop)} (top,bottom,left,right)"
        box, mask_box = (
            Box(top, left, max(0, shape[0] - top - bottom), max(0, shape[1] - left - right))
            for shape in (image, mask)
        )
        if _misfit(mask, box[2:]) <= settings.trim < _misfit(mask, image):
            mask_box = Box(0, 0, *mask[:2])
        if _misfit(box[2:], mask_box[2:]) > settings.trim:
            found = f"{size_text(mask_box[2:])}, its image is {size_text(box[2:])}"
            found += f" after --crop {crop}" if any(settings.crop) else ""
            rule = (
                "a mask has the size of its image, before or after --crop; --trim cuts a few pixels"
            )
            if orientation != UPRIGHT:
                found, rule = f"{found}, {turn_text(orientation)}", TURNED_MASK
            raise DataError(f"{source.mask}: {found}; {rule}")
        height, width = min(box.height, mask_box.height), min(box.width, mask_box.width)
        if min(height, width) < SMALLEST_SIDE:
            found = f"{source.image}: {size_text((height, width))} pixels are used"
            found += f", --crop {crop} leaves no more" if any(settings.crop) else ""
            raise DataError(f"{found}; at least {SMALLEST_SIDE} a side are needed")
        box, mask_box = (b._replace(height=height, width=width) for b in (box, mask_box))
        return replace(source, box=box, mask_box=mask_box)

    def _cut(self, sources: list[Source]) -> list[Tile]:
        """Tiles of all sources, with their names."""
        settings = self.settings
        each, side = settings.page == EACH, settings.tile
        if self.of_a_job:
            sources = [replace(s, batch="", sample=s.below.replace("/", "_")) for s in sources]
        same = Counter((s.batch, s.sample) for s in sources)
        number: Counter[tuple[str, str]] = Counter()
        tiles: list[Tile] = []
        for source in sources:
            key, sample = (source.batch, source.sample), source.sample
            number[key] += 1
            if source.pages > 1 and each:
                sample = page_name(sample, source.page)
            if same[key] > (source.pages if each else 1):
                sample += f"-{number[key]}"
            height, width = source.box[2:]
            if source.keeps_name and not side:
                tiles.append(Tile(source, source.image.stem, Box(0, 0, height, width)))
            elif side > min(height, width):
                size = size_text((height, width))
                found = f"{source.image}: {size} is smaller than --tile {side}"
                self.problems.append(f"{found}; give a smaller --tile")
            else:
                rows, columns = side or height, side or width
                for r, top in enumerate(tile_starts(height, rows, settings.overlap)):
                    for c, left in enumerate(tile_starts(width, columns, settings.overlap)):
                        name = f"{source.batch}_{sample}_{r}_{c}"
                        tiles.append(Tile(source, name, Box(top, left, rows, columns)))
        tiles = [*self._with_material(tiles)]
        by_name = defaultdict(list)
        for tile in tiles:
            by_name[tile.name.casefold()].append(tile.source.image.name)
        for name, files in by_name.items():
            if len(files) > 1 and not self.of_a_job:  # which has names of its own
                text = f"{', '.join(dict.fromkeys(files))} would all become {name}.png"
                self.problems.append(f"{settings.images}: {text}; tell them apart by --batch_from")
        return tiles

    def _with_material(self, tiles: list[Tile]) -> Iterator[Tile]:
        """The tiles without those of which nothing is visible, which are noted."""
        empty = 0
        for source, own in groupby(tiles, key=lambda tile: tile.source):
            clear = self.clear(source) if self.settings.tile else None
            for tile in own:
                if clear is not None and tile.box.of(clear).all():
                    empty += 1
                else:
                    yield tile
        if empty:
            self.notes.append(f"{empty} tile(s) left out, which are transparent everywhere")

    def _count(self, tiles: list[Tile]) -> Iterator[Tile]:
        """The tiles with their pixels of each class; those of a source follow one another."""
        for source, own in groupby(tiles, key=lambda tile: tile.source):
            if source.mask is None:
                yield from own
                continue
            ids = self.ids(source)
            if value_round_strokes(ids) not in (None, self.settings.ignored_as):
                value = unlabelled_value(ids, self.image(source))
                if value is not None:
                    self.scribbled[source.mask] = value
            for tile in own:
                counts = np.bincount(tile.box.of(ids).ravel(), minlength=256)
                yield replace(tile, counts=counts)

    def _split(self, tiles: list[Tile]) -> None:
        """Fill ``splits``: whole specimens to the test set, images without masks apart."""
        test = self._test_specimens([t for t in tiles if t.annotated])
        left_out = 0
        for tile in tiles:
            in_test = tile.source.specimen in test
            if in_test and not tile.annotated:
                left_out += 1  # pretraining would see the test specimens
                continue
            split = "test" if in_test else "train" if tile.annotated else "unlabelled"
            self.splits[SPLITS[split]].append(tile)
        if left_out:
            self.notes.append(f"{left_out} image(s) without a mask left out: of a test specimen")
        if SPLITS["train"] not in self.splits:
            found = "no annotated image is left to train on"
            raise DataError(f"{self.settings.images}: {found}; lower --test")

    def _test_specimens(self, annotated: list[Tile]) -> set[Hashable]:
        """The specimens that the table gives to the test set; if none, a draw of the others."""
        given: defaultdict[str, set[str]] = defaultdict(set)
        for tile in annotated:
            given[tile.source.specimen].add(tile.source.split)
        both = (s for s, splits in given.items() if {"train", "test"} <= splits)
        wrong = (f"specimen {s}: in training and in test; give it to one split" for s in both)
        Problems(wrong).refuse()
        test: set[Hashable] = {s for s, splits in given.items() if "test" in splits}
        share, seed = self.settings.test, self.settings.seed
        if test or not share:
            return test
        free = [t for t in annotated if "train" not in given[t.source.specimen]]
        owners = [t.source.specimen for t in free]
        names = sorted(set(owners))
        if len(names) < 2:
            found = f"{len(names)} specimen(s) to draw a test set from ({', '.join(names)})"
            cure = "2 are needed; tell images apart by --batch_from, or give --test 0"
            raise DataError(f"{self.settings.images}: {found}, {cure}")
        return draw_test_specimens(owners, self.counts(free), share, seed)

    def _annotate(self) -> None:
        """Add the sets of one and of five annotated images."""
        train, seed = self.splits[SPLITS["train"]], self.settings.seed
        counts, specimens = self.counts(train), [t.source.specimen for t in train]
        single = [[index] for index in draw_single(specimens, counts, seed, MOST_REPEATS)]
        five = draw_groups(specimens, counts, seed, 5, MOST_REPEATS)
        for size, groups in ((1, single), (5, five)):
            for k, group in enumerate(groups):
                self.splits[f"sup_num{size}_{k}"] = [train[index] for index in group]
            if len(groups) < MOST_REPEATS:
                found = f"{len(groups)} of {MOST_REPEATS} sets sup_num{size}_*"
                reason = f"{len(train)} training image(s) give no more different ones"
                self.warnings.append(f"{found}: {reason}")


def _identified(source: Source, row: Mapping[str, str]) -> Source:
    """A source with its batch, sample, specimen and split; what is missing is its own."""
    batch, sample = row["batch"], row.get("sample") or source.image.stem
    specimen, split = row.get("specimen") or f"{batch}_{sample}", row.get("split", "")
    batch, sample = _field(batch), _field(sample)
    return replace(source, batch=batch, sample=sample, specimen=specimen, split=split)


def _field(text: str) -> str:
    """One field of a file name: no separator, and nothing that a file system refuses."""
    return re.sub(r"[\s_/\\:*?\"<>|]+", "-", text.strip()).strip("-.")


def _misfit(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """By how many pixels the sides of two shapes (H, W, ...) differ at most."""
    return max(abs(one[0] - other[0]), abs(one[1] - other[1]))


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixel of each tile along a side: the tiles cover it, the last one ends with it."""
    step = tile - overlap
    return [*range(0, side - tile, step), side - tile]
