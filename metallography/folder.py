"""A folder of images: found, predicted, measured, compared with true masks, and resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import parse_name
from imaging.drawing import overlay, save_picture
from imaging.imagefile import read_image, read_mask
from metallography import measure
from metallography.particles import MINIMUM_PX, Array, Row, row_bands
from metallography.segmenter import Segmenter, check_number
from utils.commandline import UserError
from utils.files import IMAGE_SUFFIXES, DataError, list_files, replace_file, replacing, writing
from utils.log import progress, read_metrics
from utils.metrics import IGNORED, Counts, SegmentationScores
from utils.tables import csv_of_rows

RECORD, SUMMARY, MEASUREMENTS = "predicted.jsonl", "summary.json", "measurements.csv"
TABLES = (SUMMARY, MEASUREMENTS, "batches.csv", "particles.csv", "comparison.csv")


class Item(NamedTuple):
    """An image to predict."""

    path: Path
    name: str  # what its results are called below each output folder
    truth: Path | None = None  # where its true mask would lie; None without --masks

    @property
    def batch(self) -> str:
        """The production batch, '' when the file name carries none."""
        return parse_name(self.path.stem)[0]


def list_images(folder: Path, out: Path, masks: Path | None = None) -> list[Item]:
    """Images of a folder and its sub-folders (or one file), in the order of their paths.

    A name is the path without its suffix, or with it where two images differ in nothing else. A
    true mask is a .png with the image's path, below ``masks``. Files in ``out`` and ``masks`` are
    not images. DataError if there is no such folder, or no image in it.
    """
    one = folder.is_file()
    hidden = {path.resolve() for path in (out, masks) if path}
    paths = [folder] if one else list_files(folder, IMAGE_SUFFIXES, below=True, leave_out=hidden)
    if not paths:
        what = "no image in it" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; give a folder with images ({' '.join(IMAGE_SUFFIXES)})")
    below = [path.relative_to(folder.parent if one else folder) for path in paths]
    shared = Counter(str(path.with_suffix("")).lower() for path in below)
    items = []
    for path, inside in zip(paths, below, strict=True):
        bare = inside.with_suffix("")
        name = inside if shared[str(bare).lower()] > 1 else bare
        truth = masks / inside.with_suffix(".png") if masks else None
        items.append(Item(path, name.as_posix(), truth))
    return items


def read_truth(item: Item, shape: tuple[int, ...], num_classes: int) -> Array | None:
    """Read an image's true mask (H, W), None where there is none; DataError if it does not fit."""
    if item.truth is None or not item.truth.exists():
        return None
    truth = read_mask(item.truth)
    if truth.shape != shape:
        raise DataError(
            f"{item.truth}: {truth.shape[1]}x{truth.shape[0]}, its image is "
            f"{shape[1]}x{shape[0]}; a mask has the size of its image: export it so"
        )
    wrong = truth[(truth >= num_classes) & (truth != IGNORED)]
    if wrong.size:
        raise DataError(
            f"{item.truth}: value {wrong.max()} where the model has {num_classes} classes; class "
            f"ids are 0..{num_classes - 1}, and {IGNORED} where nobody labelled: correct the mask"
        )
    return truth


def count_confusion(truth: Array, prediction: Array, num_classes: int) -> Counts:
    """Pixels by true (row) and predicted class, (C, C), counted band by band."""
    scores = SegmentationScores(num_classes)
    for rows in row_bands(len(truth)):
        scores.add(torch.from_numpy(prediction[rows]), torch.from_numpy(truth[rows]))
    return scores.counts().sum(axis=0)


class Record:
    """Which images are done, and with which settings: a line of JSON each.

    UserError if the folder holds predictions made with other settings, or cannot be written to.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], overwrite: bool) -> None:
        self.path = path
        self.done: dict[str, Row] = {}
        with writing(path, "--out"):
            lines = [] if overwrite or not path.exists() else read_metrics(path)
        if lines:
            old = lines[0]
            pairs = ((key, old.get(key), value) for key, value in settings.items())
            changed = [f"{key} was {was}, is {now}" for key, was, now in pairs if was != now]
            if changed:
                raise UserError(
                    f"{path.parent}: holds predictions made with other settings "
                    f"({'; '.join(changed)}); give --overwrite or another --out"
                )
            self.done = {line["name"]: line for line in lines[1:]}
        # Rewritten, because the next line would be appended to one that a kill cut off.
        text = "".join(json.dumps(line) + "\n" for line in [settings, *self.done.values()])
        replace_file(path, text, "--out")

    def add(self, entry: Row) -> None:
        """Note that an image is done."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@contextmanager
def _growing_table(path: Path) -> Iterator[Callable[[Sequence[Row]], None]]:
    """A CSV that takes the rows of one image at a time, so that few are held in memory."""
    with (
        replacing(path, "--out") as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):

        def add(rows: Sequence[Row]) -> None:
            if rows:
                head, end, rest = csv_of_rows(rows).partition("\n")
                file.write(rest if file.tell() else head + end + rest)

        yield add
        if not file.tell():
            file.write(csv_of_rows([], ["image"]))


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

    segmenter: Segmenter
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

    def __post_init__(self) -> None:
        segmenter = self.segmenter
        classes = range(segmenter.num_classes)
        measure.check_terms(len(classes), *self.terms)
        check_number("boundary_px", self.boundary_px, least=0)
        names = ("resize", "tta", "tile", "overlap")
        settings = {"weights": segmenter.digest} | {n: getattr(segmenter, n) for n in names}
        self.record = Record(self.out / RECORD, settings, self.overwrite)
        self.rows: list[Row] = []  # of measure_class, for each image and class
        self.compared: list[Row] = []  # of compare_class, likewise
        self.diameters: list[list[Array]] = [[] for _ in classes]  # of whole particles
        self.done: list[Done] = []
        self.predicted = self.skipped = 0  # images predicted now, and done already
        self.bad: list[str] = []  # a line for each file that could not be used

    @property
    def terms(self) -> measure.Terms:
        """How to measure: the last arguments of ``measure.measure_mask``."""
        return (
            self.um_per_px,
            self.min_px,
            self.grain_classes,
            self.connectivity,
            self.boundary_classes,
        )

    def run(self) -> None:
        """Predict what is not done yet, and measure all; UserError if that cannot be written."""
        with ExitStack() as stack:
            stack.enter_context(writing(self.out, "--out"))
            for name in TABLES:  # of an earlier run, perhaps at another scale
                (self.out / name).unlink(missing_ok=True)
            table = _growing_table(self.out / "particles.csv")
            add = stack.enter_context(table if self.particles else nullcontext(lambda rows: None))
            bar = stack.enter_context(progress(len(self.items), "images"))
            for item in self.items:
                try:
                    add(self.measure(item, self.class_ids(item)))
                except DataError as error:
                    self.bad.append(str(error))
                bar.update(1)

    def file(self, kind: str, item: Item, suffix: str = ".png") -> Path:
        """Where a result of an image goes."""
        return self.out / kind / f"{item.name}{suffix}"

    def class_ids(self, item: Item) -> Array:
        """The predicted class ids of an image: from its file if that is done, else predicted."""
        try:
            status = item.path.stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:  # reading the image will report what is wrong
            size = changed = 0
        state: Row = {"name": item.name, "bytes": size, "changed": changed}
        entry = state | {"um_per_px": self.um_per_px}
        old = self.record.done.get(item.name, {})
        wanted = [self.file(kind, item) for kind in ("classes", "gray", "overlay")]
        wanted += [self.file("probabilities", item, ".npy")] if self.probabilities else []
        done = state.items() <= old.items() and all(path.exists() for path in wanted)
        if done and old == entry:
            self.skipped += 1
            return read_mask(wanted[0])
        image = read_image(item.path)
        mask = read_mask(wanted[0]) if done else self.predict(item, image)
        self.skipped += done
        self.predicted += not done
        names, colours = self.segmenter.class_names, self.segmenter.colours
        # Drawn again at another scale, too, because the scale bar changes.
        picture = overlay(image, mask, names, colours, self.um_per_px)
        save_picture(self.file("overlay", item), picture, "--out")
        self.record.add(entry)
        return mask

    def predict(self, item: Item, image: Array) -> Array:
        """Predict an image, and write its masks (and probabilities: float16 (H, W, C))."""
        mask = np.empty(image.shape[:2], np.uint8)
        with ExitStack() as stack:
            file = None
            if self.probabilities:
                path = self.file("probabilities", item, ".npy")
                temporary = stack.enter_context(replacing(path, "--out", durable=False))
                file = stack.enter_context(temporary.open("wb"))
                shape = (*mask.shape, self.segmenter.num_classes)
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            for top, band in self.segmenter.bands(image):
                mask[top : top + band.shape[1]] = band.argmax(axis=0)
                if file:
                    file.write(np.ascontiguousarray(np.moveaxis(band, 0, 2), "<f2").data)
        save_picture(self.file("classes", item), mask, "--out")
        grays = np.array(self.segmenter.mapping, np.uint8)
        save_picture(self.file("gray", item), grays[mask], "--out")
        return mask

    def measure(self, item: Item, mask: Array) -> list[Row]:
        """Measure a mask, and compare it with the true one; returns its rows of particles.csv."""
        names, scale, least = self.segmenter.class_names, self.um_per_px, self.min_px
        truth = read_truth(item, mask.shape, len(names))
        rows, found = measure.measure_mask(mask, len(names), *self.terms)
        about = {"image": item.name, "batch": item.batch}
        heads: list[Row] = [about | {"class": c, "class_name": n} for c, n in enumerate(names)]
        self.rows += [head | row for head, row in zip(heads, rows, strict=True)]
        for c, particles in enumerate(found):
            self.diameters[c].append(particles.whole().diameter * (scale or 1.0))
        counts = None
        if truth is not None:
            unlabelled = truth == IGNORED
            ignored = unlabelled if unlabelled.any() else None
            for c, head in enumerate(heads):
                pair, grains = (truth == c, mask == c), c in self.grain_classes
                connected = measure.connectivity_of(grains, self.connectivity)
                row = measure.compare_class(
                    *pair, scale, least, self.boundary_px, connected, ignored
                )
                self.compared.append(head | row)
            counts = count_confusion(truth, mask, len(names))
        self.done.append(Done(item, (mask.shape[0], mask.shape[1]), counts))
        if not self.particles:
            return []
        shown = [c for c in range(len(names)) if c or c in self.grain_classes]
        return [heads[c] | row for c in shown for row in found[c].rows(scale)]
