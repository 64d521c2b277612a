"""A folder of images: found, predicted, measured, compared with true masks, and resumed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metallography import measure
from metallography.summary import Item, Model, Results, Terms, summary, write_csv
from report.sheets import contact_sheet, overview
from utils.commandline import UserError
from utils.drawing import (
    OVERLAY_SIDE,
    blend,
    overlay,
    reduced,
    save_picture,
    save_prediction,
)
from utils.imagefile import DataError, read_image, read_mask
from utils.log import progress
from utils.metrics import confusion

Array = NDArray[Any]
Row = dict[str, Any]

SHEET_PICTURES = 12
COMPARED_ROWS = 8
RECORD = "predicted.jsonl"


def list_images(
    folder: str | Path, suffixes: Sequence[str], leave_out: Sequence[Path] = ()
) -> list[Item]:
    """Images of a folder and its sub-folders (or one file), in the order of their paths.

    Hidden files and folders and those of ``leave_out`` are not looked at. Results are called by the
    image's path without its suffix; images that differ in nothing else keep it.

    Raises:
        DataError: no such folder, or no image in it.
    """
    root = Path(folder)
    hidden = {p.resolve() for p in leave_out} - {root.resolve()}
    paths = [root] if root.is_file() else []
    for where, folders, files in os.walk(root):
        here = Path(where)
        kept = (f for f in folders if not f.startswith(".") and (here / f).resolve() not in hidden)
        folders[:] = sorted(kept)
        shown = (f for f in files if not f.startswith("."))
        paths += [here / f for f in shown if Path(f).suffix.lower() in suffixes]
    if not paths:
        what = "no image in it" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: {what}; read are {' '.join(suffixes)}")
    base = root.parent if root.is_file() else root
    names = {p: p.relative_to(base).with_suffix("").as_posix() for p in sorted(paths)}
    shared = Counter(name.lower() for name in names.values())
    return [
        Item(p, p.relative_to(base).as_posix() if shared[name.lower()] > 1 else name)
        for p, name in names.items()
    ]


class Record:
    """Which images are done, and with which settings: a line of JSON each.

    Raises:
        UserError: the folder holds predictions made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self.done: dict[str, Row] = {}
        lines = [] if overwrite or not path.exists() else list(_json_lines(path))
        if lines:
            old = lines[0]
            changed = [key for key in settings if old.get(key) != settings[key]]
            other = [f"{key} was {old.get(key)}, is {settings[key]}" for key in changed]
            if other:
                raise UserError(
                    f"{path.parent}: holds predictions made otherwise ({'; '.join(other)}); give "
                    "--overwrite or another --out"
                )
            self.done = {line["name"]: line for line in lines[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, so that a line cut off by a kill does not spoil the next one.
        text = "".join(json.dumps(line) + "\n" for line in [settings, *self.done.values()])
        path.write_text(text, encoding="utf-8")

    def add(self, entry: Row) -> None:
        """Note that an image is done."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _json_lines(path: Path) -> Iterator[Row]:
    """The lines of a file; one that was cut off by a kill is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


class Folder:
    """Predicts and measures the images of a folder; ``run`` does it all.

    Args:
        model: what predicts.
        images: the folder, or one file.
        items: its images, as ``list_images`` gives them.
        out: the folder of the results.
        masks: folder of true masks to compare with.
        terms: how to measure.
        batch_of: production batch by file name without suffix.
        probabilities, particles: write these too.
        overwrite: predict again what is done.
    """

    def __init__(
        self,
        model: Model,
        images: Path,
        items: Sequence[Item],
        out: Path,
        *,
        masks: Path | None = None,
        terms: Terms,
        batch_of: Callable[[str], str],
        probabilities: bool = False,
        particles: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.model, self.images, self.items, self.out = model, images, items, out
        self.masks, self.terms, self.batch_of = masks, terms, batch_of
        self.with_probabilities, self.with_particles = probabilities, particles
        self.results = Results()
        settings = {
            "weights": model.digest,
            "resize": model.resize,
            "tta": model.tta,
            "tile": model.tile,
            "overlap": model.overlap,
        }
        self.record = Record(out / RECORD, settings, overwrite)

    def run(self) -> Results:
        """Predict what is not done yet, measure everything, write the tables."""
        particles = self.out / "particles.csv" if self.with_particles else None
        begun = False
        # Of an earlier run, perhaps at another scale.
        for name in ("measurements.csv", "batches.csv", "particles.csv", "comparison.csv"):
            (self.out / name).unlink(missing_ok=True)
        with progress(len(self.items), "images") as bar:
            for item in self.items:
                try:
                    rows = self.one(item)
                except DataError as error:
                    self.results.bad.append(str(error))
                    rows = []
                if particles:
                    write_csv(particles, rows, append=begun)
                    begun = begun or bool(rows)
                bar.update(1)
        write_csv(self.out / "measurements.csv", self.results.rows)
        write_csv(
            self.out / "batches.csv", measure.by_batch(self.results.rows, self.terms.um_per_px)
        )
        if self.masks:
            write_csv(self.out / "comparison.csv", self.results.compared)
        self.sheet()
        lines = summary(self.model, self.terms, self.results)
        text = "\n".join(lines) + "\n"
        (self.out / "summary.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        return self.results

    def file(self, kind: str, item: Item, suffix: str = ".png") -> Path:
        """Where a result of an image goes."""
        return self.out / kind / f"{item.name}{suffix}"

    def one(self, item: Item) -> list[Row]:
        """Predict, draw and measure one image; returns its particles."""
        status = item.path.stat() if item.path.exists() else None
        entry: Row = {
            "name": item.name,
            "bytes": status.st_size if status else 0,
            "changed": status.st_mtime_ns if status else 0,
            "um_per_px": self.terms.um_per_px,
        }
        old = self.record.done.get(entry["name"])
        same = old is not None and all(old.get(k) == entry[k] for k in ("bytes", "changed"))
        wanted = [self.file("classes", item), self.file("gray", item), self.file("overlay", item)]
        if self.with_probabilities:
            wanted.append(self.file("probabilities", item, ".npy"))
        if same and all(path.exists() for path in wanted):
            mask = read_mask(wanted[0])
            self.results.skipped += 1
            if old != entry:  # another scale
                self.draw(item, read_image(item.path), mask)
                self.record.add(entry)
        else:
            image = read_image(item.path)
            mask = self.predict(item, image)
            self.results.predicted += 1
            self.draw(item, image, mask)
            self.record.add(entry)
            del image  # it may be large, and so is what measuring needs
        return self.measure(item, mask)

    def predict(self, item: Item, image: Array) -> Array:
        """Predict an image, write its masks (and probabilities: float16 (H, W, C))."""
        s = self.model
        mask = np.empty(image.shape[:2], np.uint8)
        path = self.file("probabilities", item, ".npy")
        file = None
        if self.with_probabilities:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
            shape = (*mask.shape, s.num_classes)
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        try:
            for top, band in s.bands(image):
                mask[top : top + band.shape[1]] = band.argmax(axis=0)
                if file:
                    file.write(np.ascontiguousarray(np.moveaxis(band, 0, 2), "<f2").data)
        finally:
            if file:
                file.close()
        save_prediction(self.file("classes", item), mask, range(s.num_classes))
        save_prediction(self.file("gray", item), mask, s.mapping)
        return mask

    def draw(self, item: Item, image: Array, mask: Array) -> None:
        """Write the overlay."""
        s = self.model
        picture = overlay(image, mask, s.class_names, s.colours, self.terms.um_per_px)
        save_picture(self.file("overlay", item), picture)

    def measure(self, item: Item, mask: Array) -> list[Row]:
        """Measure a mask, compare it with the true one if there is one; returns its particles."""
        s, o, r = self.model, self.terms, self.results
        truth_path = self.truth_path(item)
        truth = read_truth(truth_path, mask.shape, s.num_classes) if truth_path else None
        batch = self.batch_of(item.path.stem)
        rows, particles = measure.measure_mask(
            mask, s.num_classes, o.um_per_px, o.min_px, o.grain_classes
        )
        heads = [
            {"image": item.name, "batch": batch, "class": c, "class_name": name}
            for c, name in enumerate(s.class_names)
        ]
        r.rows += [head | row for head, row in zip(heads, rows, strict=True)]
        scale = o.um_per_px or 1.0
        for c, found in enumerate(particles):
            r.diameters.setdefault(c, []).append(found.inside().diameter * scale)
        if truth is not None:
            r.compared += [
                head
                | measure.compare_class(truth == c, mask == c, o.um_per_px, o.min_px, o.boundary_px)
                for c, head in enumerate(heads)
            ]
            counted = count_confusion(truth, mask, s.num_classes)
            r.confusion = counted if r.confusion is None else r.confusion + counted
        elif self.masks:
            r.without_truth.append(item.name)
        r.sizes.add((mask.shape[0], mask.shape[1]))
        r.done.append((item, truth_path))
        if not self.with_particles:
            return []
        shown = [c for c in range(s.num_classes) if c or c in o.grain_classes]
        return [heads[c] | row for c in shown for row in particles[c].rows(o.um_per_px)]

    def truth_path(self, item: Item) -> Path | None:
        """The true mask of an image: same place below ``--masks``, same name, .png."""
        if self.masks is None:
            return None
        return true_mask(item, self.images, self.masks)

    def sheet(self) -> None:
        """Write the contact sheet: with true masks where there are some."""
        s, done = self.model, self.results.done
        compared = [(item, path) for item, path in done if path]
        chosen = compared or done
        most = COMPARED_ROWS if compared else SHEET_PICTURES
        take = np.linspace(0, len(chosen) - 1, min(most, len(chosen))).round().astype(int)
        chosen = [chosen[i] for i in take]
        titles = [item.name for item, _ in chosen]
        rows, counts, pictures = [], [], []
        for item, path in chosen:
            image, mask = read_image(item.path), read_mask(self.file("classes", item))
            if path is None:
                pictures.append(blend(image, mask, s.colours, 360))
            else:
                truth = read_mask(path)
                counts.append(count_confusion(truth, mask, s.num_classes).numpy())
                image, mask = reduced(image, OVERLAY_SIDE), reduced(mask, OVERLAY_SIDE)
                rows.append((image, reduced(truth, OVERLAY_SIDE), mask))
        target = self.out / "sheet.png"
        if rows:
            heading = f"Taken evenly from {len(compared)}; above {OVERLAY_SIDE} pixels reduced"
            contact_sheet(
                target,
                rows,
                titles,
                np.stack(counts),
                heading=heading,
                class_names=s.class_names,
                colours=s.colours,
            )
        elif pictures:
            save_picture(target, overview(pictures, titles))


def true_mask(item: Item, images: Path, masks: Path) -> Path | None:
    """The true mask of an image: same place below ``masks``, same name, .png."""
    below = item.path.relative_to(images.parent if images.is_file() else images)
    path = (masks / below).with_suffix(".png")
    return path if path.exists() else None


def read_truth(path: Path, shape: tuple[int, ...], num_classes: int) -> Array:
    """Read a true mask.

    Raises:
        DataError: it is not of the image's shape (H, W), or holds an id above C - 1.
    """
    truth = read_mask(path)
    if truth.shape != shape:
        raise DataError(
            f"{path}: {truth.shape[1]}x{truth.shape[0]}, its image is "
            f"{shape[1]}x{shape[0]}; a mask has the size of its image"
        )
    if truth.max() >= num_classes:
        raise DataError(
            f"{path}: value {truth.max()} where the model has {num_classes} classes; class ids are "
            f"0..{num_classes - 1}: correct the mask"
        )
    return truth


def count_confusion(truth: Array, prediction: Array, num_classes: int) -> Tensor:
    """Pixels by true (row) and predicted class, int64 (C, C), counted band by band."""
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for top in range(0, len(truth), 512):
        predicted, true = (torch.from_numpy(m[top : top + 512]) for m in (prediction, truth))
        total += confusion(predicted, true, num_classes)
    return total
