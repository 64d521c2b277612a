"""What the masks of a set mean: one rule for all of them, and class ids by it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from annotation.class_files import join_classes
from annotation.edges import small_parts
from annotation.files import Drawn, numbers_in, read_annotation, read_drawn
from annotation.names import (
    BACKGROUND,
    IGNORE,
    Numbers,
    class_id,
    class_names,
    class_of_region,
    is_numbered,
)
from dataset.check import Problems
from dataset.mask_values import (
    MOST_CLASSES,
    By,
    Codes,
    MaskRule,
    SetSettings,
    filling,
    find_rule,
    histogram_of,
    id_maps,
    looked_up,
    names_option,
    to_codes,
)
from dataset.source_files import Colours, PaletteCheck
from imaging.field import transparent
from imaging.imagefile import UPRIGHT, Array, Picture, Pixels, decode, has_colour
from imaging.listing import some_names
from imaging.pages import count_pages
from utils.files import DataError
from utils.metrics import IGNORED

if TYPE_CHECKING:
    from dataset.set_plan import Source

Histograms = dict[Path, Counter[int]]
MOST_BLURRED, MOST_SMALL = 0.002, 0.001  # of a JPEG's pixels: between levels, and in thin parts
MOST_THIN = 3  # classes of lines thinner than 3 pixels everywhere
FEWEST_NUMBERS = 8  # of particles, by which numbers of particles are known; fewer may be classes
MOST_LOOKED_AT = 300  # particles of a mask
KEPT = 2**28  # bytes of pixels that are kept, so that each of these masks is decoded once
AS_PARTICLES = "give --mask_kind particles (0 stays class 0, every number becomes class 1)"


class _Look(NamedTuple):
    """What is kept of a page of a mask, however large it is."""

    shape: tuple[int, ...]
    orientation: int
    lossy: bool  # whether its packing changes values
    palette: Colours
    values: Counter[int] | None  # pixels of each, as stored; None: colours, floats, or many values


class SetMasks:
    """The masks of a set: ``names`` of the classes where files name them, and the ``rule``.

    ``settings`` are those of ``dataset/prepare.py``; ``problems`` gets what is wrong, a line each,
    ``warnings`` what may have been meant otherwise, and ``notes`` how names were read. First
    ``look`` at every mask, then ``decide``, then ``ids``.
    """

    def __init__(self, settings: SetSettings, problems: Problems, sources: list[Source]) -> None:
        self.settings, self.problems = settings, problems
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.colours = settings.mask_kind == "colours"  # some mask has colours
        self.by_colour = False  # palette files give their colours, not their indices
        self.id_maps: set[Path] = set()  # masks of class ids beside masks of other values
        self.overlaps: Counter[Path] = Counter()  # pixels that two classes' files have
        self.nameless = ""  # why the classes of outlines have no ids
        self._looks: dict[tuple[Path, int], _Look] = {}
        self._pictures: dict[tuple[Path, int], Picture] = {}  # of the first masks, up to ``KEPT``
        self.names = self._find_names(sources)
        self.rule: MaskRule

    def look(self, source: Source) -> tuple[int, ...]:
        """The shape of a source's mask; notes whether it has colours. Raises DataError."""
        mask = self.pixels(source)
        if source.mask and not source.drawn:
            check_transparent(source.mask, mask, _page_of(source, source.mask))
        self.colours |= not source.drawn and has_colour(mask)
        return mask.shape

    def orientation(self, source: Source) -> int:
        """The orientation of a source's mask; outlines are drawn on the image as it is seen."""
        if source.mask is None or source.drawn:
            return UPRIGHT
        return self._look_at(source.mask, 1).orientation

    def decide(self, sources: list[Source]) -> bool:
        """Find the ``rule`` for all masks; False if there is none that can be read."""
        settings, problems = self.settings, self.problems
        named = [s for s in sources if s.drawn]
        masked = [s for s in sources if s.mask and not s.drawn]
        self._compare_palettes(masked)
        with problems.collect():
            rule = self._find_rule(masked) if masked else None
            if rule is None and (masked or not named):
                return False
            self.rule = rule or _rule_of_names(self.names)
            if self.rule.by is By.IDS:
                packed = dict.fromkeys(s.mask for s in masked if s.mask and self._lossy(s.mask))
                cure = "which changes class ids a little here and there: export it as PNG"
                problems.extend(f"{path}: packed by JPEG, {cure}" for path in packed)
            if settings.num_classes and self.num_classes > settings.num_classes:
                found = f"{self.num_classes} classes where --num_classes is {settings.num_classes}"
                cure = "correct it, or give --palette"
                problems.append(f"{settings.masks}: {found} ({self.rule.same_as()}); {cure}")
            if self.overlaps.total():
                found = f"{max(self.overlaps, key=lambda p: self.overlaps[p])}: "
                found += (
                    f"{self.overlaps.total()} pixels (all images) are in the files of two classes"
                )
                self.warnings.append(f"{found}; the class with fewer pixels was taken")
        return hasattr(self, "rule")

    @property
    def num_classes(self) -> int:
        """Highest class id that the masks may hold, + 1."""
        return max(self.rule.num_classes, len(self.names))

    def ids(self, source: Source) -> Pixels:
        """Class ids of a source's mask after cropping, uint8 (H, W); 255: no label."""
        if source.drawn or source.mask in self.id_maps:
            ids = source.mask_box.of(self.pixels(source))
            return np.array(ids if ids.ndim == 2 else ids[..., 0], np.uint8)
        return self.rule.apply(self._codes(source))

    def pixels(self, source: Source) -> Array:
        """The mask's own values; a mask of one page serves the page that it was paired with."""
        assert source.mask is not None
        if source.drawn and self.nameless:
            raise DataError(self.nameless)
        if source.parts:
            files = [(class_id(name, self.names), path) for name, path in source.parts]
            read = [
                (label, str(path), _stored(self._read(path, _page_of(source, path)), True))
                for label, path in files
            ]
            ids, overlaps = join_classes(read)
            classes = [one for one in read if one[0] != IGNORED]
            if len(classes) < len(read):  # below the others, as people were told to add it
                overlaps = join_classes(classes)[1] if classes else 0
            self.overlaps[source.mask] = overlaps
            return ids
        if source.drawn:
            told: list[str] = []
            particles = self.settings.mask_kind == "particles"
            ids = read_annotation(
                source.mask,
                source.size,
                self.names,
                page=source.slice,
                particles=particles,
                told=told,
            )
            self.warnings += [line for line in told if line not in self.warnings]
            return ids
        page = _page_of(source, source.mask)
        kind, palette = self.settings.mask_kind, self.settings.palette
        colours = kind == "colours" or any(len(value) == 3 for _, value in palette)
        plain = source.mask in self.id_maps
        return _stored(self._read(source.mask, page), (colours or self.by_colour) and not plain)

    def _read(self, path: Path, page: int) -> Picture:
        """A page of a mask as it is stored. Raises DataError."""
        at = path, page
        if at in self._pictures:
            return self._pictures[at]
        picture = decode(path, page, seen=False)
        if at not in self._looks:
            self._looks[at] = _look(picture)
            kept = sum(other.values.nbytes for other in self._pictures.values())
            if kept + picture.values.nbytes <= KEPT:
                self._pictures[at] = picture
        return picture

    def _look_at(self, path: Path, page: int) -> _Look:
        if (path, page) not in self._looks:
            self._read(path, page)
        return self._looks[path, page]

    def _lossy(self, path: Path) -> bool:
        """Whether a mask was packed in a way that changes values."""
        return self._look_at(path, 1).lossy

    def _find_names(self, sources: list[Source]) -> list[str]:
        """The class of each id, where outlines or files name them; else those that are given."""
        given = list(self.settings.class_names)
        drawn = [s for s in sources if s.drawn]
        found = {name for s in drawn for name, _ in s.parts}
        files: list[Drawn] = []
        for path in dict.fromkeys(s.mask for s in drawn if s.mask and not s.parts):
            with self.problems.collect():
                files.append(read_drawn(path))
        if not drawn:
            return given
        kind = self.settings.mask_kind
        try:
            of_files, self.notes, few = names_drawn(files, kind, given)
        except DataError as error:
            self.nameless = str(error)
            return given
        found |= of_files
        self.warnings += few
        pixels = next((s.mask for s in sources if s.mask and not s.drawn), None)
        if not found and not pixels:
            more = f", nor in {len(drawn) - 1} other(s)" if len(drawn) > 1 else ""
            cure = "draw the classes as outlines, and save the file again"
            self.nameless = f"{drawn[0].mask}: no outline in it{more}; {cure}"
            return given
        try:
            names = given or class_names(found)
        except DataError as error:
            self.nameless = f"{self.settings.masks}: {error}"
            return given
        if pixels and not given and kind != "particles":  # of these 1 is the class in both
            both = f"{drawn[0].mask} has outlines, {pixels} pixels"
            cure = f"say which class is which id: {names_option(names)}"
            self.nameless = f"{both}; {cure}"
        return names

    def _compare_palettes(self, masked: list[Source]) -> None:
        """Read palette files by colour where their indices have no one meaning in the set."""
        settings, seen, plain = self.settings, PaletteCheck(), []
        if settings.mask_kind == "colours" or any(len(v) == 3 for _, v in settings.palette):
            return  # they are read by colour anyway
        for source in masked:
            assert source.mask is not None
            with self.problems.collect():
                look = self._look_at(source.mask, _page_of(source, source.mask))
                if look.palette:
                    seen.add(source.mask, look.palette, self._values(source))
                else:
                    plain.append(source)
        if not seen.differing and not (seen.found and self.colours):
            return
        what = f"palettes differ ({seen.differing})" if seen.differing else "some masks in colours"
        if settings.mask_kind == "ids" or settings.palette:
            self.warnings.append(f"{what}: palette files are read by index, as asked")
            return
        other = "" if self.colours else "; --mask_kind ids takes their indices"
        self.warnings.append(f"{what}: palette files are read by colour{other}")
        for source in plain if not self.colours else ():
            if not set(self._values(source)) <= seen.grays:
                found = f"{source.mask}: gray, where other masks have palettes that differ"
                self.problems.append(f"{found}; save all masks alike, or give --mask_kind ids")
        self.by_colour = True
        self.colours |= seen.coloured

    def _values(self, source: Source) -> list[int]:
        """The values that occur in a whole mask, before palettes are read by colour."""
        assert source.mask is not None
        look = self._look_at(source.mask, _page_of(source, source.mask))
        found = np.unique(self.pixels(source)).tolist() if look.values is None else look.values
        return list(found)

    def _histogram(self, source: Source, codes: Callable[[], Codes]) -> Counter[int]:
        """Pixels of each code of a mask; ``codes`` reads them, where values were not counted."""
        assert source.mask is not None
        look = self._look_at(source.mask, _page_of(source, source.mask))
        as_stored = not (self.colours or look.palette or self.settings.mask_kind == "particles")
        if as_stored and look.values is not None and source.mask_box == (0, 0, *look.shape):
            return look.values
        return histogram_of(codes())

    def _codes(self, source: Source) -> Codes:
        """The used part of a mask, (H, W), see ``to_codes``; of numbered particles 0 and 1."""
        assert source.mask is not None
        codes = to_codes(source.mask, source.mask_box.of(self.pixels(source)), self.colours)
        return np.sign(codes) if self.settings.mask_kind == "particles" else codes

    def _find_rule(self, masked: list[Source]) -> MaskRule | None:
        """The rule for all masks of pixels; None if none can be read. Raises DataError."""
        settings = self.settings
        colours = self.colours and settings.mask_kind != "particles"
        free = settings.mask_kind == "auto" and not settings.palette and not colours
        histograms, numbered = Histograms(), dict[Path, bool]()
        few: dict[Path, int] = {}  # masks whose values may be numbers of particles, and how many
        for source in masked:
            assert source.mask is not None
            with self.problems.collect():
                codes = cache(partial(self._codes, source))
                own = self._histogram(source, codes)
                histograms[source.mask] = own + histograms.get(source.mask, Counter())
                found = numbers_particles(own, codes) if free else None
                if found is not None:
                    numbered[source.mask] = found
                may = settings.mask_kind in ("auto", "colours") and not settings.palette
                few[source.mask] = few_pieces(own, codes, colours) if may else 0
        masked = [source for source in masked if source.mask in histograms]  # those that are sound
        if not masked:
            return None
        if numbered and all(numbered.values()):
            name = next(iter(numbered))
            found_all = f"{name}: every value is one connected region, a numbered particle"
            raise DataError(f"{found_all}; {AS_PARTICLES}, or --mask_kind ids if they are classes")
        if few and all(few.values()):
            name, count = max(few.items(), key=lambda pair: pair[1])
            self.warnings.append(
                f"{name}: each of its {count} values but 0 is one connected region: read as "
                f"{count} classes; if they number particles of one phase, {AS_PARTICLES}"
            )
        self.id_maps = id_maps(histograms, colours, settings)
        others = [s for s in masked if s.mask not in self.id_maps]
        if self.id_maps:
            found_ids = f"{len(self.id_maps)} mask(s) of class ids (as {min(self.id_maps).name})"
            self.warnings.append(
                f"{found_ids} beside masks of other values: taken as the ids of the same classes"
            )
        total: Counter[int] = Counter()
        for path, own in histograms.items():
            total += own if path not in self.id_maps else Counter()
        known = lambda: self._filling(others, colours)  # noqa: E731
        rule = find_rule(total, colours, settings, known)
        return self._with_edges(others, histograms, rule, total)

    def _filling(self, masked: list[Source], colours: bool) -> set[int]:
        """The codes that fill areas in some mask."""
        sets = (filling(self._codes(s), colours, self.settings.tolerance) for s in masked)
        return set().union(*sets)

    def _with_edges(
        self, masked: list[Source], histograms: Histograms, rule: MaskRule, total: Counter[int]
    ) -> MaskRule:
        """The rule, with thin classes that are no edges; notes edges, and what is no class."""
        edged = [s for s in masked if s.mask and rule.has_edges(histograms[s.mask])]
        if not edged:
            return rule
        strange, edges = self._assign(edged, rule)
        alone = sum(strange.values(), Counter())
        by_itself = not self.settings.palette
        if (
            by_itself
            and 0 < len(alone) <= MOST_THIN
            and all(2 * n > total[c] for c, n in alone.items())
        ):
            # Lines thinner than 3 pixels everywhere, but not between the values beside them.
            known = self._filling(masked, rule.colours) | set(alone)
            rule = find_rule(total, rule.colours, self.settings, lambda: known)
            strange, edges = self._assign(edged, rule)
        lines = (rule.problem(path, own, self._lossy(path)) for path, own in strange.items())
        self.problems += [line for line in lines if line]
        if not edges.total():
            return rule
        off = rule.off_palette(total)
        if by_itself and not self.settings.tolerance and len(off) == 1 and not strange:
            value = rule.text_of(off[0])
            found = f"{min(edges)}: value {value} only on edges between others: an edge or a class?"
            cure = f"name the classes with --palette, with {value} or without ({rule.same_as()})"
            raise DataError(f"{found}; {cure}")
        share = edges.total() / total.total()
        self.warnings.append(
            f"smooth edges ({len(+edges)} mask(s), as {min(+edges).name}; {share:.2%} of all "
            "pixels): each pixel was given to the nearer of the classes drawn beside it; dots and "
            "lines under 3 pixels are uncertain: where there are many, export without smoothing"
        )
        return rule

    def _assign(self, edged: list[Source], rule: MaskRule) -> tuple[Histograms, Counter[Path]]:
        """Of each mask: the values that are no class, and the number of pixels on smooth edges."""
        strange, edges = Histograms(), Counter[Path]()
        for source in edged:
            assert source.mask is not None
            codes = self._codes(source)
            ids, edge, without = rule.assign(codes)
            edges[source.mask] += int(edge.sum())
            if without.any():
                strange[source.mask] = histogram_of(codes[without])
            elif edge.mean() > MOST_BLURRED and self._lossy(source.mask):
                small = int(small_parts(ids).sum())
                found = f"{small} pixels ({small / ids.size:.2%}) in parts thinner than 5 pixels"
                cure = "they may be blurred edges and no class: export it as PNG"
                if small > MOST_SMALL * ids.size:
                    line = f"{source.mask}: packed by JPEG, {found}; {cure}"
                    self.problems.append(f"{line}, or give a larger --tolerance")
        return strange, edges


def check_transparent(path: Path, mask: Pixels, page: int) -> None:
    """DataError if transparent pixels of a mask, (H, W) or (H, W, 3), hide several values.

    Programs leave the colour of what was erased, and make it transparent.
    """
    clear = transparent(path, page)
    if clear is None or clear.shape != mask.shape[:2]:
        return
    values = np.unique(mask[clear], axis=0)
    if len(values) > 1:
        shown = " and ".join(",".join(map(str, np.atleast_1d(value))) for value in values[:2])
        found = f"transparent pixels hide several values, such as {shown}"
        raise DataError(f"{path}: {found}; flatten the mask on one colour, and save it again")


def names_drawn(
    files: Sequence[Drawn], kind: str, given: Sequence[str] = ()
) -> tuple[set[str], list[str], list[str]]:
    """Names of classes in files of outlines, '' for shapes without one; notes; warnings.

    ``kind`` is that of ``--mask_kind``, ``given`` are the names that the user gave. Raises
    DataError where outlines are numbered that are no classes.
    """
    if kind == "particles":
        return ({""} if any(drawn.shapes for drawn in files) else set()), [], []
    numbers = numbers_in(files)
    known = {*given, *(s.name for drawn in files if not drawn.regions for s in drawn.shapes)}
    classes = [drawn.classes(known, numbers) for drawn in files]
    warnings = _perhaps_particles(files, classes, bool(given)) if kind == "auto" else []
    notes, doubts = _joined(files, classes, known, numbers)
    return {name for own in classes for name in own}, notes, warnings + doubts


def _perhaps_particles(
    files: Sequence[Drawn], classes: Sequence[Sequence[str]], given: bool
) -> list[str]:
    """A warning if every class of every file is one outline, DataError if all are numbers."""
    each = [_one_outline_each(d, own) for d, own in zip(files, classes, strict=True) if own]
    count = [found for found in each if found]
    if not count or len(count) < len(each):
        return []
    most, path = max((len(names), path) for names, path in count)
    names = set[str]().union(*(own for own, _ in count))
    numbers = all(map(is_numbered, names))
    if numbers and most >= FEWEST_NUMBERS:
        if given:
            return []
        found = f"{path}: every class is one outline, a numbered particle"
        raise DataError(f"{found}; {AS_PARTICLES}, or --mask_kind ids if they are classes")
    # People number particles, and name classes: grain1 to grain9 may be both.
    counted = most >= FEWEST_NUMBERS and all(name[-1:].isdigit() for name in names)
    if most < 2 or not (numbers or counted):
        return []
    return [
        f"{path}: each of its {most} classes but 0 is one outline: read as {most} "
        f"classes; if they number particles of one phase, {AS_PARTICLES}"
    ]


def _joined(
    files: Sequence[Drawn],
    classes: Sequence[Sequence[str]],
    known: Collection[str],
    numbers: Numbers,
) -> tuple[list[str], list[str]]:
    """A note on regions joined over their numbers; a warning where a number is of several."""
    joined: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for drawn, own in zip(files, classes, strict=True):
        for shape, name in zip(drawn.shapes, own, strict=True):
            if drawn.regions and name:
                raw = shape.name.strip()
                joined[name.casefold()].setdefault(raw.casefold(), raw)
    told = {n: f"{n} ({some_names(own.values())})" for n, own in joined.items() if len(own) > 1}
    lower, doubts = {name.strip().casefold() for name in known}, defaultdict[str, list[str]](list)
    for name in sorted(numbers.shared):
        meant = class_of_region(name, lower, numbers).casefold()
        if meant in told and meant != name:
            doubts[meant].append(name)
    sure = [line for name, line in told.items() if name not in doubts]
    cure = "where each is a class, give them all as --class_names"
    note = "regions whose names differ in their number alone are of one class"
    doubt = "regions whose names differ in their number alone were joined to one class"
    several = [f"{told[n]}, though several are called {some_names(s)}" for n, s in doubts.items()]
    return (
        [f"{note}: {', '.join(sure)}; {cure}"] if sure else [],
        [f"{doubt}: {line}; {cure}" for line in several],
    )


def _one_outline_each(drawn: Drawn, classes: Sequence[str]) -> tuple[set[str], Path] | None:
    """The classes of a file, in lower case; None if one has two outlines, or no name."""
    both = zip(classes, drawn.shapes, strict=True)
    found = Counter((name.strip().casefold(), shape.plane) for name, shape in both)
    names = {name for name, _ in found} - {*IGNORE, *BACKGROUND}
    if "" in names or any(number > 1 for (name, _), number in found.items() if name in names):
        return None
    return names, drawn.path


def numbers_particles(found: Collection[int], codes: Callable[[], Codes]) -> bool | None:
    """Whether each number of a mask is one particle, all of its pixels touching.

    ``found`` are the codes in it, ``codes`` gives those of its pixels (H, W), if they are needed.
    None if there are too few numbers to say. Classes come in several pieces, numbered particles in
    one each, but for a few that an edge or a hand has cut.
    """
    numbers = sorted(code for code in found if code > 0)
    if len(numbers) < FEWEST_NUMBERS:
        return None
    numbers = numbers[:: max(1, len(numbers) // MOST_LOOKED_AT)]
    return bool(_in_one_piece(codes(), numbers) >= 0.9 * len(numbers))


def few_pieces(found: Collection[int], codes: Callable[[], Codes], colours: bool) -> int:
    """How many values of a mask may number so many particles: each is one region alone.

    Arguments are those of ``numbers_particles``. 0 if some value is in several pieces, if there is
    one value beside 0, or if there are so many that they are no classes (``numbers_particles``
    knows these). 0 (black) and, of gray levels, 255 (no label) are no numbers.
    """
    numbers = sorted(code for code in found if code > 0 and (colours or code != IGNORED))
    most = MOST_CLASSES if colours else FEWEST_NUMBERS - 1
    if not 2 <= len(numbers) <= most or 0 not in found:
        return 0
    return len(numbers) if _in_one_piece(codes(), numbers) == len(numbers) else 0


def _in_one_piece(codes: Codes, numbers: Sequence[int]) -> int:
    """How many of the numbers (ascending) are one connected region of a mask each."""
    own = looked_up(codes, np.array(numbers), np.arange(1, len(numbers) + 1, dtype=np.int32))
    whole = 0
    for number, box in enumerate(ndimage.find_objects(own), start=1):
        alone = (own[box] == number).astype(np.uint8)
        whole += cv2.connectedComponents(alone, connectivity=8)[0] == 2
    return whole


def _page_of(source: Source, mask: Path) -> int:
    """Which page of a mask's file is of the source's page; DataError if that cannot be told."""
    pages = count_pages(mask)
    if pages not in (1, source.pages):
        found = f"{mask}: {pages} pages, its image has {source.pages}"
        raise DataError(f"{found}; save as many pages in both")
    return source.page if pages > 1 else 1


def _look(picture: Picture) -> _Look:
    values, palette = picture.values, () if picture.palette is None else picture.palette.tolist()
    counts = None
    if values.ndim == 2 and values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        found = histogram_of(values)
        counts = found if len(found) <= 256 else None  # of a large set all are kept
    colours = tuple((r, g, b) for r, g, b in palette)
    return _Look(values.shape, picture.orientation, picture.lossy, colours, counts)


def _stored(picture: Picture, colours: bool) -> Array:
    """The values of a mask as ``read_pixels`` gives them."""
    if colours and picture.palette is not None:
        return picture.palette[picture.values]
    return picture.values


def _rule_of_names(names: list[str]) -> MaskRule:
    """The rule of a set in which every mask names its classes."""
    palette = [(label, (label,)) for label in range(len(names))]
    named = ", ".join(f"{label} {name}" for label, name in enumerate(names))
    return MaskRule(False, palette, 0, By.NAMES, f"classes by name: {named}", tuple(names))
