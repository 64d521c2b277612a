"""A folder of images: found, predicted, measured, compared with true masks, and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from imaging.data_bar import Bar, bar_lines, find_bars
from imaging.drawing import grays_of, is_intact, overlay, save_picture
from imaging.field import NO_RULE, FieldRule
from imaging.imagefile import read_header, read_mask, reading_of
from imaging.index import Stamp, stamp_of
from imaging.listing import some_names
from metallography import measure
from metallography.items import (
    BARS,
    KNOWN_SCALE,
    RECORD,
    SET_ASIDE,
    TABLES,
    ClassMap,
    Decision,
    Item,
    Noted,
    Record,
    Results,
    decide,
    digest_of,
    is_readable,
    looks_of,
    noted_of,
    read_truth,
    strange_ids,
)
from metallography.particles import (
    MEASURED,
    MINIMUM_PX,
    Array,
    Row,
    measured_key,
    measured_once,
    row_bands,
    unit_of,
    without_scale,
)
from metallography.segmenter import Certainty, PredictedBands, Predictor, check_number
from utils.files import Behind, DataError, leads_out, refuse_links, replacing, writing
from utils.log import progress, to_terminal
from utils.metrics import IGNORED, Counts, SegmentationScores
from utils.ranks import group
from utils.tables import growing_csv

AHEAD = 2**24  # pixels of the largest images that are read ahead and written behind


def count_confusion(truth: Array, prediction: Array, num_classes: int) -> Counts:
    """Pixels by true (row) and predicted class, (C, C), counted band by band."""
    scores = SegmentationScores(num_classes)
    for rows in row_bands(len(truth)):
        scores.add(torch.from_numpy(prediction[rows]), torch.from_numpy(truth[rows]))
    return scores.counts().sum(axis=0)


@contextmanager
def _growing_array(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[Array], None]]:
    """A .npy of float16 (H, W, C) that takes some rows at a time, so that few are in memory."""
    with (
        replacing(path, "--out", durable=False) as temporary,
        temporary.open("wb") as file,
    ):
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

        def add(rows: Array) -> None:
            file.write(np.ascontiguousarray(rows, "<f2").data)

        yield add


class Done(NamedTuple):
    """An image that was measured."""

    item: Item
    size: tuple[int, int]  # height and width
    counts: Counts | None  # confusion matrix (C, C), true class as the row; None without a truth


@dataclass
class Folder:
    """Predicts and measures the images of a folder: call ``run``.

    UserError if a value is out of range, or ``out`` cannot be used (see ``Record``).
    """

    segmenter: Predictor
    items: Sequence[Item]
    out: Path  # the folder of the results
    um_per_px: float | None = None  # how to measure, see measure.measure_mask
    min_px: int = MINIMUM_PX
    grain_classes: Sequence[int] = ()
    connectivity: int | None = None
    boundary_classes: Sequence[int] | None = None
    boundary_px: float = measure.BOUNDARY_PX  # see measure.compare_class
    probabilities: bool = False  # write these too
    particles: bool = False
    overwrite: bool = False  # predict again what is done
    replaceable: bool = False  # predictions made with other settings may be replaced
    images: Path | None = None  # the folder of the images, resolved, for the record
    replaces: Sequence[str] = ()  # names of more files that are written here than ``run`` does
    left_out: Sequence[str] = ()  # lines on files that are no images, for the summary
    field: FieldRule = NO_RULE  # which part of each image counts
    scales: Mapping[str, float | None] | None = None  # by name; of others um_per_px
    forget_scales: bool = False  # the user wants no scale that an earlier run knew
    resample: float = 0.0  # um per pixel at which the network sees the images; 0: as they are
    notes: Sequence[str] = ()  # more lines for the summary: crop, scales
    program: str = "predict.py"  # the command that measures
    head: Sequence[tuple[str, str]] = ()  # what and its words: of the sample, of the options
    warned: Sequence[str] = ()  # more warnings, for the summary and for the page
    pools_all: bool = True  # batches.csv, too, where no batch is known
    poor: Sequence[str] = ()  # names of classes that were mostly wrong where they were checked
    in_no_mask: Sequence[int] = ()  # classes of which nobody gave a label
    rare_cure: str = (  # of a class that is predicted nowhere
        "annotate an image with more of it, or train (train.py) with --class_weight balanced, or a "
        "larger number for it"
    )

    def __post_init__(self) -> None:
        segmenter = self.segmenter
        classes = range(segmenter.num_classes)
        measure.check_terms(len(classes), *self.terms())
        self.scales = self.scales or {}
        for um in self.scales.values():
            unit_of(um)
        self.bars: dict[Path, list[Bar]] = {}  # data bars that nobody cut
        self.lost_scale = False  # whether an earlier run knew the scale of an image, and this not
        check_number("boundary_px", self.boundary_px, least=0)
        names = ("resize", "tta", "tile", "overlap")
        settings = {"weights": segmenter.digest} | {n: getattr(segmenter, n) for n in names}
        path = self.out / RECORD
        settings |= {"images": str(self.images)} if self.images else {}
        how = self.overwrite, self.replaceable
        self.record = group.by_writer(lambda: Record(path, settings, *how, self._replaced()))
        self.rows: list[Row] = []  # of measure_class, for each image and class
        self.compared: list[Row] = []  # of compare_class, likewise
        self.diameters: list[list[Array]] = [[] for _ in classes]  # of whole particles
        self.done: list[Done] = []
        self.predicted = self.skipped = 0  # images predicted now, and done already
        self.corrected = 0  # images whose class maps are somebody's work
        self.aside: list[str] = []  # images whose class maps were moved to ``SET_ASIDE``
        self.bad: list[str] = []  # a line for each file that could not be used
        self.behind: Behind | None = None  # what writes pictures; None: at once
        self.ahead: Future[tuple[Stamp, Array] | None] | None = None  # the next item's pixels

    def scale_of(self, item: Item) -> float | None:
        """Micrometres per pixel of an image; None if that is not known."""
        return (self.scales or {}).get(item.name, self.um_per_px)

    @property
    def unit_scale(self) -> float | None:
        """A scale of which the tables have the unit: None if lengths are in pixels."""
        known = (um for um in map(self.scale_of, self.items) if um is not None)
        return next(known, self.um_per_px)

    @property
    def with_particles(self) -> list[int]:
        """Classes whose pieces are particles: not class 0, the matrix, unless it is of grains.

        Pieces of the matrix are islands between other phases; their sizes mean nothing.
        """
        return [c for c in range(self.segmenter.num_classes) if c or c in self.grain_classes]

    @property
    def smallest_diameter(self) -> float:
        """Diameter of the smallest particle that counts, in the unit of the tables.

        Of several scales that of the coarsest: in its images smaller ones are missing.
        """
        known = [um for item in self.items if (um := self.scale_of(item)) is not None]
        return math.sqrt(4 * self.min_px / math.pi) * max(known, default=1.0)

    def bar_lines(self) -> list[str]:
        """Warnings on data bars that nobody cut."""
        whole = [item.own_path for item, size, _ in self.done if not any(self.field.crop_of(size))]
        return bar_lines(self.bars, self.field.crop, whole)

    def title_of(self, item: Item) -> str:
        """What an image is called in pictures of several."""
        return item.name

    def table_rows(self) -> list[Row]:
        """The rows of ``measurements.csv``, with what else is known of each image."""
        return self.rows

    def size_words(self) -> str:
        """At which size images are predicted."""
        side = self.segmenter.resize
        return f"resized to {side}x{side}" if side else "at their own size"

    def terms(self, um_per_px: float | None = None) -> measure.Terms:
        """How to measure an image: the last arguments of ``measure.measure_mask``."""
        own = (self.min_px, self.grain_classes, self.connectivity, self.boundary_classes)
        return um_per_px, *own

    def run(self) -> None:
        """Predict what is not done yet, and measure all; UserError if that cannot be written."""
        with ExitStack() as stack:
            stack.enter_context(writing(self.out, "--out"))
            stack.callback(self._tell_aside)
            own = self.record.readable or self.replaceable
            for name in TABLES if own else ():  # of an earlier run, perhaps at another scale
                (self.out / name).unlink(missing_ok=True)
            table = growing_csv(self.out / "particles.csv", "image")
            add = stack.enter_context(table if self.particles else nullcontext(lambda rows: None))
            bar = stack.enter_context(progress(len(self.items), "images"))
            items = stack.enter_context(closing(self.each(self.items)))
            for item in items:
                try:
                    add(self.measure(item, self.class_ids(item)))
                except DataError as error:
                    self.bad.append(str(error))
                bar.update(1)

    def predict_shared(self) -> None:
        """Predict what is not done, each rank its share of the images; ``run`` then measures.

        Rank 0 notes what is done in the order of the images, as one process does.
        """
        step = 8 * group.size()  # images from one note to the next
        for start in range(0, len(self.items) if group.size() > 1 else 0, step):
            some, self.record.held = self.items[start : start + step], []
            for item in self.each(group.share(some)):
                with suppress(DataError):  # which ``run`` reports
                    self.class_ids(item)
            found = {
                row["name"]: row for own in group.gather_objects(self.record.held) for row in own
            }
            self.record.held = None if group.writes() else []
            for item in some:
                if item.name in found:
                    self.record.add(found[item.name])
        self.lost_scale = any(group.gather_objects(self.lost_scale))
        self.aside = [name for own in group.gather_objects(self.aside) for name in own]
        self.predicted = sum(group.gather_objects(self.predicted))
        self.skipped = -self.predicted  # ``run`` finds them done

    def each(self, items: Sequence[Item]) -> Generator[Item, None, None]:
        """The items in turn, while one thread reads the next image and one writes results.

        An image of more than ``AHEAD`` pixels has the memory to itself.
        """
        with ThreadPoolExecutor(1) as thread, Behind() as self.behind:
            coming = [thread.submit(self.read_ahead, item) for item in items[:1]]
            for number, item in enumerate(items):
                self.ahead = coming.pop()
                coming = [thread.submit(self.read_ahead, i) for i in items[number + 1 :][:1]]
                yield item
        self.behind = self.ahead = None

    def read_ahead(self, item: Item) -> tuple[Stamp, Array] | None:
        """The pixels of an item that is not done yet, and the stamp of its file before."""
        if self.is_done(item):
            return None
        with suppress(DataError):  # which reading in turn reports
            stamp, header = stamp_of(item.path), read_header(item.path)
            if header and header[0] * header[1] <= AHEAD:
                return stamp, item.read(self.segmenter.gray)
        return None

    def read(self, item: Item, stamp: Stamp) -> Array:
        """An item's pixels, read ahead or now; ``stamp`` is its file's."""
        coming, self.ahead = self.ahead, None
        found = coming.result() if coming else None
        return found[1] if found and found[0] == stamp else item.read(self.segmenter.gray)

    def write(self, image: Array, job: Callable[[], object]) -> None:
        """Write an image's results behind, or at once."""
        if self.behind is None:
            job()
            return
        self.behind.do(job)
        if image.shape[0] * image.shape[1] > AHEAD:
            self.behind.catch_up()

    def file(self, kind: str, item: Item, suffix: str = ".png") -> Path:
        """Where a result of an image goes."""
        return self.out / kind / f"{item.name}{suffix}"

    def is_done(self, item: Item) -> bool:
        """Whether an image was predicted, by this run if all is overwritten."""
        return "bytes" in self.record.done.get(item.name, {})

    def _replaced(self) -> Iterator[Path]:
        """The files that a run replaces, or takes away."""
        kinds = [("classes", ".png"), ("gray", ".png"), ("overlay", ".png"), (MEASURED, ".npz")]
        kinds += [("probabilities", ".npy")] if self.probabilities else []
        for kind, suffix in kinds:
            yield from (self.file(kind, item, suffix) for item in self.items)
        yield from (self.out / name for name in (*TABLES, *self.replaces))

    def class_ids(self, item: Item) -> Array:
        """The class ids of an image: from its file where they still count, else predicted."""
        stamp, scale = stamp_of(item.path), self.scale_of(item)
        noted = noted_of(self.record.done.get(item.name, {}))
        self._remember_bars(item, noted.bars)
        lost = self._lost_scale(noted, scale)
        decides = self._decides(item, stamp, noted)
        looks = looks_of(self.segmenter.class_names, self.segmenter.colours, scale)
        mask, left = self.results_of(item, noted, decides, looks)
        digest = "" if mask is None else digest_of(mask)
        corrected, written = left.map is ClassMap.CORRECTED, dict(noted.written)
        if mask is not None and decide(left) is Decision.REFUSE:
            raise self._refusal(item, mask)
        if mask is not None and corrected and (not left.same or written.get("outdated") == digest):
            mask, written["outdated"] = self._outdated(item, mask), digest
            left = left._replace(complete=all(path.exists() for path in self._files(item)))
        if mask is not None and decide(left) is Decision.SKIP:
            self.skipped, self.corrected = self.skipped + 1, self.corrected + corrected
            return mask
        image = self.read(item, stamp)
        left = left._replace(size_fits=mask is not None and mask.shape == image.shape[:2])
        decision = decide(left)
        if mask is not None and decision is Decision.REFUSE:
            raise self._refusal(item, mask, image)
        new = mask is None or decision is Decision.PREDICT
        self.corrected += corrected and not new
        if mask is None or new:
            mask = self.predict(item, image)
        elif corrected and self.probabilities and not self._probabilities(item).exists():
            self.predict(item, image)  # for these alone
        self.skipped += not new
        self.predicted += new
        bars = self.bars.get(item.own_path, [])
        entry = decides | looks
        entry |= {BARS: [list(bar) for bar in bars]} if bars else {}
        written.pop("writing", None)
        entry |= lost | written | {"drawn": digest_of(mask) if new or not corrected else digest}
        if new:
            entry["map"] = entry["drawn"]
            self.set_aside(item, {*noted.own, entry["map"]})
        self.write(image, partial(self.keep, item, image, mask, entry, new))
        return mask

    def _files(self, item: Item) -> list[Path]:
        """The files of an image's results, its class map first."""
        pictures = [self.file(kind, item) for kind in ("classes", "gray", "overlay")]
        return [*pictures, *([self._probabilities(item)] if self.probabilities else [])]

    def _probabilities(self, item: Item) -> Path:
        return self.file("probabilities", item, ".npy")

    def _decides(self, item: Item, stamp: Stamp, noted: Noted) -> Row:
        """What decides a prediction, as the record has it; says so if tags were read otherwise."""
        size, changed = stamp
        decides: Row = {"name": item.name, "bytes": size, "changed": changed}
        decides |= self.field.state(item.name)
        decides |= {"resample": self.resample} if self.resample else {}
        whole = decides | reading_of(item.path, item.page)
        if decides.items() <= noted.decides.items() and not whole.items() <= noted.decides.items():
            to_terminal(f"{item.path}: predicted when its orientation or tags were read otherwise; "
                        "made anew")  # fmt: skip
        return whole

    def results_of(
        self, item: Item, noted: Noted, decides: Row, looks: Row
    ) -> tuple[Array | None, Results]:
        """The class map that is there, and what is to be known of it and of the other files.

        A prediction serves that was made of what ``decides`` now, its pictures if ``looks``, too,
        are those of now.
        """
        files, classes = self._files(item), self.segmenter.num_classes
        if not self.is_done(item):  # of what --overwrite begins anew nothing is kept
            return None, Results(noted=False, same=False, map=ClassMap.MISSING)
        mask = read_mask(files[0]) if is_intact(files[0]) else None
        digest = "" if mask is None else digest_of(mask)
        kind = ClassMap.PREDICTED if digest in noted.own else ClassMap.CORRECTED
        kind = kind if noted.own else ClassMap.UNKNOWN
        kind = ClassMap.MISSING if mask is None else kind
        wrong = mask is not None and bool(strange_ids(mask, classes).size)
        same = decides == {n: v for n, v in noted.decides.items() if n not in looks}
        complete, drawn = all(path.exists() for path in files), noted.decides == decides | looks
        drawn &= noted.written.get("drawn", noted.written.get("map", digest)) == digest
        damaged = []
        if kind is not ClassMap.CORRECTED and same and complete:
            damaged = [path for path in files if not is_readable(path, classes)]
            damaged += files[:1] if wrong else []
        if damaged:
            to_terminal(f"{damaged[0]}: damaged; the results of {item.name} are made anew")
        return mask, Results(True, same, kind, not wrong, True, complete, bool(damaged), drawn)

    def _refusal(self, item: Item, mask: Array, image: Array | None = None) -> DataError:
        """Why a corrected class map cannot be measured: by its classes, or its ``image``'s size."""
        said = f"{self.file('classes', item)}: corrected since it was predicted"
        if image is None:
            wrong, last = (
                strange_ids(mask, self.segmenter.num_classes),
                self.segmenter.num_classes - 1,
            )
            what = f"it holds class {wrong[0]}, and the model has 0 to {last}"
            return DataError(f"{said}: {what}; correct it, or move it away")
        return DataError(
            f"{said}, {mask.shape[1]}x{mask.shape[0]}, and its image is "
            f"{image.shape[1]}x{image.shape[0]}; move it away to have the image predicted, or save "
            "it in that size"
        )

    def _outdated(self, item: Item, mask: Array) -> Array:
        """A correction that is older than its image, within what counts of that now; says so."""
        path = self.file("classes", item)
        to_terminal(f"Warning: {path}: corrected since it was predicted, so it is kept, "
                    f"though {item.path}, or what of it counts, has changed")  # fmt: skip
        found = self.within_field(item, mask, path)
        self._drop_probabilities(item)
        return found

    def keep(self, item: Item, image: Array, mask: Array, entry: Row, new: bool) -> None:
        """Write an image's pictures, the class map if it is ``new``; then note that it is done.

        Drawn again at another scale, too, because the scale bar changes.
        """
        if new:
            if item.name in self.record.done:  # a kill must not make a map somebody's correction
                self.record.add(self.record.done[item.name] | {"writing": entry["map"]})
                if not self.probabilities:
                    self._drop_probabilities(item)
            save_picture(self.file("classes", item), mask, "--out")
        save_picture(self.file("gray", item), grays_of(self.segmenter.mapping)[mask], "--out")
        names, colours = self.segmenter.class_names, self.segmenter.colours
        drawn = overlay(image, mask, names, colours, entry["um_per_px"])
        save_picture(self.file("overlay", item), drawn, "--out")
        self.record.add(entry)

    def _drop_probabilities(self, item: Item) -> None:
        """Remove those of an earlier prediction."""
        path = self._probabilities(item)
        if not leads_out(path, self.out):
            path.unlink(missing_ok=True)

    def set_aside(self, item: Item, own: Collection[str]) -> None:
        """Move an image's class map to ``SET_ASIDE`` unless it has a digest of this program's."""
        path, place = self.file("classes", item), self.file(SET_ASIDE, item)
        if self.replaceable or path.is_symlink() or not is_intact(path):
            return
        with suppress(DataError):  # of a picture that is no class map
            if digest_of(read_mask(path)) in own:
                return
        number = 1
        while place.exists():
            number += 1
            place = self.file(SET_ASIDE, item, f"~{number}.png")
        refuse_links(path)
        refuse_links(place)
        with writing(place, "--out"):
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        self.aside.append(item.name)

    def _tell_aside(self) -> None:
        """Say which class maps were moved."""
        if self.aside:
            what = f"{len(self.aside)} class map(s) that are not as this program wrote them"
            names = some_names(self.aside)
            to_terminal(f"Warning: {what} were moved to {self.out / SET_ASIDE}: {names}")

    def _lost_scale(self, noted: Noted, scale: float | None) -> Row:
        """What to note of the scale that an earlier run knew, where this one knows none."""
        lost = scale is None and noted.known_scale is not None and not self.forget_scales
        self.lost_scale |= lost
        return {KNOWN_SCALE: noted.known_scale} if lost else {}

    def _remember_bars(self, item: Item, found: Sequence[Sequence[Any]]) -> None:
        """Note the data bars that an earlier run found in an image."""
        with suppress(TypeError):
            self.bars[item.own_path] = [Bar(*bar) for bar in found]

    def measured(self, item: Item) -> Array:
        """The class map (H, W) of an image that was measured, as it was; DataError.

        That of its file, but 255 outside the field of now where it is a correction older than that.
        """
        path = self.file("classes", item)
        mask = read_mask(path)
        outdated = noted_of(self.record.done.get(item.name, {})).written.get("outdated")
        return self.within_field(item, mask, path) if outdated == digest_of(mask) else mask

    def within_field(self, item: Item, mask: Array, path: Path) -> Array:
        """A corrected class map, 255 where nothing counts; DataError where it has no class."""
        crop = self.field.crop_of(mask.shape)
        counts = np.zeros(mask.shape, bool)
        crop.of(counts)[:] = True
        outside = self.field.outside(item.path, item.name, mask.shape, item.page)
        counts &= True if outside is None else ~outside
        if (mask[counts] == IGNORED).any():
            what = f"{path}: corrected since it was predicted, and more of its image counts now"
            raise DataError(f"{what}; correct it there, too, or move it away")
        return np.where(counts, mask, np.uint8(IGNORED))

    def predict(self, item: Item, image: Array) -> Array:
        """Predict an image, see ``predict_field``."""
        return self.predict_field(item, image)[0]

    def predict_field(self, item: Item, image: Array) -> tuple[Array, Certainty | None]:
        """Class ids (H, W) of an image, and how sure the predictor is of what counts in it.

        Writes its probabilities, too, if they are asked for: float16 (H, W, C). Outside the field
        the ids are 255 and probabilities nan.
        """
        shape = image.shape[:2]
        outside = self.field.outside(item.path, item.name, shape, item.page)
        crop = self.field.crop_of(shape)
        inside = None if outside is None else ~crop.of(outside)
        part = self.field.part(image, item.path, item.page)
        mask = np.full(shape, IGNORED, np.uint8)
        self.bars[item.own_path] = find_bars(part)
        own, scale = crop.of(mask), self.scale_of(item)
        factor = scale / self.resample if self.resample and scale else 1.0
        with ExitStack() as stack:
            path, classes = self._probabilities(item), self.segmenter.num_classes
            add = _growing_array(path, (*shape, classes)) if self.probabilities else None
            write = stack.enter_context(add) if add else None
            if write:
                write(np.full((crop.top, shape[1], classes), np.nan))
            bands = PredictedBands(self.segmenter.bands(part, inside, factor))
            for top, band in bands:
                rows = slice(top, top + band.shape[1])
                own[rows] = band.argmax(axis=0)
                if write:
                    values = np.moveaxis(band, 0, 2)
                    if inside is not None:
                        values = np.where(inside[rows, :, None], values, np.nan)
                    sides = ((0, 0), (crop.left, crop.right), (0, 0))
                    write(np.pad(values, sides, constant_values=np.nan))
            if write:
                write(np.full((crop.bottom, shape[1], classes), np.nan))
        if outside is not None:
            mask[outside] = IGNORED
        return mask, bands.certainty

    def measure(self, item: Item, mask: Array) -> list[Row]:
        """Measure a mask, and compare it with the true one; returns its rows of particles.csv."""
        names, scale = self.segmenter.class_names, self.scale_of(item)
        in_um = self.unit_scale is not None
        how = len(names), *self.terms(scale)
        place, key = self.file(MEASURED, item, ".npz"), measured_key(mask, *how)
        rows, found = measured_once(place, key, lambda: measure.measure_mask(mask, *how))
        about = {"image": item.name, "batch": item.batch}
        heads: list[Row] = [about | {"class": c, "class_name": n} for c, n in enumerate(names)]
        field: Row = {"um_per_px": math.nan if scale is None else scale} if in_um else {}
        field["field_px"] = int(np.count_nonzero(mask != IGNORED))
        unknown = in_um and scale is None
        fit = without_scale if unknown else dict
        self.rows += [head | field | fit(row) for head, row in zip(heads, rows, strict=True)]
        for c, particles in enumerate(found):
            diameters = particles.whole().diameter * (scale or 1.0)
            self.diameters[c].append(diameters[:0] if unknown else diameters)
        try:
            counts = self._compare(item, mask, heads, fit)
        except DataError as error:  # of the true mask: the image's own measurements stay
            self.bad.append(str(error))
            counts = None
        self.done.append(Done(item, (mask.shape[0], mask.shape[1]), counts))
        if not self.particles:
            return []
        return [heads[c] | fit(row) for c in self.with_particles for row in found[c].rows(scale)]

    def truth_of(self, item: Item, mask: Array) -> Array | None:
        """An image's true mask (H, W), 255 where its predicted one is; None without one."""
        crop, classes = self.field.crop_of(mask.shape), self.segmenter.num_classes
        truth = read_truth(item, mask.shape, classes, crop, self.segmenter.ignore_label)
        return None if truth is None else np.where(mask == IGNORED, np.uint8(IGNORED), truth)

    def _compare(
        self, item: Item, mask: Array, heads: Sequence[Row], fit: Callable[[Row], Row]
    ) -> Counts | None:
        """Note the rows of ``compare_class``; the confusion matrix, None without a true mask."""
        truth, scale = self.truth_of(item, mask), self.scale_of(item)
        if truth is None:
            return None
        unlabelled = truth == IGNORED
        ignored = unlabelled if unlabelled.any() else None
        for c, head in enumerate(heads):
            pair, grains = (truth == c, mask == c), c in self.grain_classes
            connected = measure.connectivity_of(grains, self.connectivity)
            row = measure.compare_class(
                *pair, scale, self.min_px, self.boundary_px, connected, ignored
            )
            self.compared.append(head | fit(row))
        return count_confusion(truth, np.where(mask == IGNORED, np.uint8(0), mask), len(heads))
