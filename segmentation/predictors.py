"""Who answers: a network or the pixel classifier, both as a folder of images wants them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from config import Config
from data import find_split
from imaging.drawing import class_colours, default_names, is_intact, save_picture, write_png
from imaging.field import read_visible, resized_field, visible
from imaging.gray_range import Conversion, EachImage
from imaging.imagefile import Pixels, read_mask
from metallography.folder import Folder
from metallography.items import RECORD, Item, read_truth
from metallography.particles import MEASURED, Array, Row
from metallography.ranking import SecondOpinion
from metallography.segmenter import Bands, Certainty, Segmenter
from metallography.tiling import UNETS, Floats, resized_bands
from report.provenance import NETWORK_WORDS
from segmentation import blocks
from segmentation.answers import KINDS, digest, merged
from segmentation.doubt import doubt_map
from stages.forest import MOST_PIXELS, PixelForest, draw_pixels
from stages.labels import label_counts, labelled_share
from utils.files import DataError, copy_file, open_to_append, replace_file
from utils.log import progress, read_metrics
from utils.metrics import IGNORED

Shares = NDArray[np.floating[Any]]

# Whose answers are compared: in ``rounds.json``, too.
NETWORK, FOREST, BEFORE = "network", "pixel classifier", "answer before"
# Of the image that is timed, and pixels of a class that are learnt.
TIMED_SIDE, SMALLEST_SIDE, TIMED_PIXELS = 384, 200, 500
# Times slower that a forest of 5,000 pixels a class predicts: 1.46 on uhcs, 1.5 on the demo. Its
# time to learn follows n log2(n): 11.4 us on 2,000 and on 20,000 pixels of uhcs, 9.4 and 8.7 there.
GROWN = 1.5
FEATURES = 0.35  # seconds a megapixel, on the core on which others are timed (``Costs.slower``)
SURE = 0.8  # probability from which on a pixel beside strokes is labelled, see results/scribbles
VOTES = "votes.jsonl"
MARK = "round.txt"  # in a folder of class maps: of what they are
PREDICTED = "predicted"  # the class maps of annotated images without their labels


class Watched:
    """A network that also tells how sure it is of each image, in one view of it or in all 8."""

    def __init__(self, segmenter: Segmenter, views: int) -> None:
        self.segmenter = segmenter
        self.num_classes, self.class_names = segmenter.num_classes, segmenter.class_names
        self.mapping, self.colours = segmenter.mapping, segmenter.colours
        self.resize, self.reduce, self.sight = segmenter.resize, segmenter.reduce, segmenter.sight
        self.tile, self.overlap = segmenter.tile, segmenter.overlap
        self.tta, self.about, self.digest = views > 1, segmenter.about, segmenter.digest
        self.gray, self.ignore_label = segmenter.gray, segmenter.ignore_label
        self.um_per_px = segmenter.um_per_px

    def bands(self, image: Array, inside: Array | None = None, factor: float = 1.0) -> Bands:
        """Class probabilities, see ``Segmenter.bands``; returns its certainty of what counts."""
        votes, unsure, rows, pixels = 0.0, 0.0, [], 0
        bands = self.segmenter.bands_and_votes if self.tta else self.segmenter.bands
        for top, band in bands(image, inside, factor):
            counted: Any = ... if inside is None else inside[top : top + band.shape[1]]
            votes += float(band[-1][counted].sum(dtype=np.float64)) if self.tta else float("nan")
            classes = band[: self.num_classes]
            missing = 1 - classes.max(axis=0)
            unsure += float(missing[counted].sum(dtype=np.float64))
            pixels += missing[counted].size
            rows.append(np.rint(255 * missing).astype(np.uint8))
            yield top, classes
        pixels = max(1, pixels)
        return Certainty(unsure / pixels, np.concatenate(rows), votes / pixels)

    def ids(self, image: Array, inside: Array | None = None) -> Pixels:
        """Class ids (H, W) of an image; ``inside`` as in ``bands``."""
        bands = self.bands(image, inside)
        return np.concatenate([band.argmax(0).astype(np.uint8) for _, band in bands])


class Classifier:
    """The pixel classifier on images reduced by a whole factor, predicting at their own size."""

    def __init__(
        self, num_classes: int, class_names: Sequence[str], reduce: int, seed: int, threads: int
    ) -> None:
        self.num_classes, self.reduce = num_classes, reduce
        look = Config(num_classes=num_classes, class_names=tuple(class_names)).resolved()
        self.class_names = list(look.class_names) or default_names(num_classes)
        self.mapping, self.colours = look.mapping, class_colours(num_classes)
        self.resize, self.tile, self.overlap, self.tta, self.sight = 0, 0, 0, False, UNETS
        self.gray: Conversion = EachImage()  # never used: the set holds 8-bit images
        self.ignore_label = IGNORED
        self.um_per_px: tuple[float, float] | None = None
        self.forest = PixelForest(seed, standardize=True, threads=threads, quick=True)
        small = f", on images reduced by a factor of {reduce}" if reduce > 1 else ""
        self.about = (
            f"pixel classifier: filters and a random forest, no network{small}; it sees no shape "
            "larger than its filters"
        )
        self.digest = ""
        self.drawn = np.zeros(num_classes, np.int64)  # pixels of each class that it has learnt

    def fit(
        self,
        images: Sequence[Pixels],
        labels: Sequence[Pixels],
        insides: Sequence[Array | None] = (),
    ) -> None:
        """Learn from images (H, W) or (H, W, 3) and class ids (H, W), 255 where unlabelled.

        ``insides`` are as in ``bands``, of each image; by default all None.
        """
        small = [self.small(image) for image in images]
        masks = [reduced_labels(m, self.reduce, self.num_classes) for m in labels]
        pairs = zip(small, insides or [None] * len(small), strict=True)
        fields = [resized_field(inside, pixels.shape[1:]) for pixels, inside in pairs]
        self.drawn = label_counts(masks, self.num_classes).clip(max=MOST_PIXELS)
        self.forest.fit(small, masks, fields)
        found = hashlib.sha256(f"{self.reduce} {self.forest.seed}".encode())
        for pixels in (*small, *masks, *(own for own in fields if own is not None)):
            found.update(np.ascontiguousarray(pixels).tobytes())
        self.digest = found.hexdigest()[:16]

    def small(self, image: Pixels) -> Pixels:
        """The image as the forest sees it, (1 or 3, h, w)."""
        if self.reduce > 1:
            size = [-(-side // self.reduce) for side in image.shape[1::-1]]
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        return image[None] if image.ndim == 2 else np.moveaxis(image, 2, 0)

    def bands(self, image: Array, inside: Array | None = None, factor: float = 1.0) -> Bands:
        """Class probabilities, see ``Segmenter.bands``.

        Returns its certainty, which knows no votes.
        """
        small = self.small(image)
        counted = resized_field(inside, small.shape[1:])
        found = self.forest.probabilities(small, self.num_classes, counted)
        missing = 1 - found.max(axis=0)
        if self.reduce > 1:
            yield from resized_bands(found, *image.shape[:2])
        else:
            yield 0, found
        uncertain = cv2.resize(np.rint(255 * missing).astype(np.uint8), image.shape[1::-1])
        unsure = float((missing if counted is None else missing[counted]).mean(dtype=np.float64))
        return Certainty(unsure, np.asarray(uncertain, np.uint8), math.nan)

    def ids(self, image: Array, inside: Array | None = None) -> Pixels:
        """Class ids (H, W) of an image; ``inside`` as in ``bands``."""
        bands = self.bands(image, inside)
        return np.concatenate([band.argmax(0).astype(np.uint8) for _, band in bands])


class Costs(NamedTuple):
    """Seconds that the pixel classifier takes, as timed on this machine (``costs_of``)."""

    labelled: tuple[int, ...]  # pixels of each class in the annotated images
    annotated: float  # megapixels of these images
    learning: float  # seconds of n pixels learnt, over n * log2(n)
    features: float  # seconds a megapixel
    megapixel: float  # seconds in which it is predicted, features included

    @property
    def slower(self) -> float:
        """How many times slower than the core on which constants were timed; 1 if it is faster."""
        return max(1.0, self.features / FEATURES)

    def fit(self, share: float = 1.0, reduce: int = 1) -> float:
        """Seconds to learn a share of the labels, on images reduced by a whole factor."""
        drawn = sum(min(MOST_PIXELS, share * count / reduce**2) for count in self.labelled)
        described = self.features * self.annotated / reduce**2
        return described + self.learning * drawn * math.log2(max(2.0, drawn))

    def held(self, folds: Sequence[blocks.Fold], reduce: int) -> float:
        """Seconds of the learning curve on held-out blocks (``blocks.curve``)."""
        predict = self.megapixel * self.annotated / reduce**2
        sizes = blocks.curve_sizes(folds)
        each = [self.fit(size / blocks.BLOCKS, reduce) + predict for size in sizes]
        return len(folds) * sum(each)


def costs_of(
    images: Sequence[Pixels], labels: Sequence[Pixels], num_classes: int, threads: int
) -> Costs:
    """Time the pixel classifier on the annotated image with most labels, and few of its pixels.

    A small image is repeated, as calls take their time whatever the pixels.
    A forest that has learnt all predicts slower than one of few pixels, by ``GROWN`` at most.
    """
    counts = label_counts(labels, num_classes)
    each = [label_counts([mask], num_classes).clip(max=TIMED_PIXELS).sum() for mask in labels]
    most = int(np.argmax(each))
    reduce = math.ceil(math.sqrt(labels[most].size) / TIMED_SIDE)
    model = Classifier(num_classes, (), reduce, 0, threads)
    image, ids = model.small(images[most]), reduced_labels(labels[most], reduce, num_classes)
    times = [-(-SMALLEST_SIDE // side) for side in ids.shape]
    image, ids = np.tile(image, (1, *times)), np.tile(ids, times)
    chosen = draw_pixels(ids.ravel(), 0, TIMED_PIXELS)
    few = np.full(ids.size, IGNORED, np.uint8)
    few[chosen] = ids.ravel()[chosen]

    def learn() -> object:
        model.forest.model.set_params(n_jobs=threads)
        return model.forest.fit([image], [few.reshape(ids.shape)])

    learn()  # what is loaded at its first use is not timed
    seconds = _seconds(lambda: model.forest.features(image))
    fit = max(_seconds(learn) - seconds, 1e-6)
    predict = _seconds(lambda: model.forest.probabilities(image, num_classes))
    per, n = 1e6 / ids.size, max(2, len(chosen))
    annotated = sum(mask.size for mask in labels) / 1e6
    learning = fit / (n * math.log2(n))
    return Costs(tuple(counts.tolist()), annotated, learning, per * seconds, per * predict * GROWN)


def _seconds(do: Callable[[], object]) -> float:
    """How long it takes: the middle one of three tries."""
    took = []
    for _ in range(3):
        started = time.monotonic()
        do()
        took.append(time.monotonic() - started)
    return sorted(took)[1]


def taught(
    annotated: Sequence[blocks.Annotation], num_classes: int, threads: int = 1
) -> Classifier:
    """A pixel classifier, at full resolution, that has learnt annotated images."""
    model = Classifier(num_classes, (), 1, 0, threads)
    model.fit(*zip(*annotated, strict=True))
    return model


def beside_strokes(
    model: Classifier, strokes: Sequence[blocks.Annotation]
) -> tuple[list[Pixels], Floats]:
    """Strokes (H, W) of each image, with the labels of which a classifier that learnt them is sure.

    Also returns the share of the area (C,) that it expects each class to have in these images.
    Outside what counts of an image (``inside``) it adds no label, and expects nothing.
    """
    found = []
    for image, _, inside in strokes:
        own = np.concatenate([band for _, band in model.bands(image, inside)], axis=1)
        found.append(own if inside is None else own * inside)
    total = sum(p.sum(axis=(1, 2), dtype=np.float64) for p in found)
    shares = total / max(float(np.sum(total)), 1e-9)
    weights = area_weights(shares, model.drawn)
    pairs = zip(strokes, found, strict=True)
    return [sure_labels(own.labels, p, weights) for own, p in pairs], shares


def area_weights(probabilities: Shares, drawn: NDArray[np.integer]) -> NDArray[np.float64]:
    """Weights (C,) of a classifier's probabilities with which classes have their share of the area.

    ``probabilities`` (C,) are the means over all pixels of the annotated images; ``drawn`` (C,) are
    the pixels of each class that the classifier has learnt. Whoever draws strokes draws them in
    rare phases too, so that these have a larger share of the labels than of the image. This is one
    step of the correction by expectation maximisation of Saerens, Latinne and Decaestecker, Neural
    Computation 14 (2002) 21-41. More steps were worse where strokes were few.
    """
    share = drawn / max(1, drawn.sum())
    found = np.asarray(probabilities, np.float64)
    return np.divide(found, share, out=np.zeros_like(found), where=share > 0)


def sure_labels(labels: Pixels, probabilities: Shares, weights: Shares) -> Pixels:
    """The labels (H, W), and those of other pixels whose class has a probability of ``SURE``.

    ``probabilities`` (C, H, W) are weighted by ``area_weights`` (C,) first.
    """
    found = probabilities * weights[:, None, None]
    top = found.max(axis=0)
    sure = (labels == IGNORED) & (top >= SURE * found.sum(axis=0)) & (top > 0)
    return np.where(sure, found.argmax(axis=0), labels).astype(np.uint8)


def second_opinion(annotated: Path, segmenter: Segmenter, threads: int = 1) -> SecondOpinion:
    """A pixel classifier of annotated images, and its error on held-out halves; DataError.

    ``annotated`` is a folder of a set, with ``img`` and ``gt``, which are read as ``segmenter``
    reads images and masks. The error is nan where no half can be held out.
    """
    samples = [s for s in find_split(annotated.parent, annotated.name) if s.mask]
    if not samples:
        raise DataError(f"{annotated}: no image with a mask in img and gt; give such a folder")
    given, classes = list[blocks.Annotation](), segmenter.num_classes
    for sample in samples:
        item = Item(sample.image, sample.image.stem, truth=sample.mask)
        image, inside = read_visible(sample.image, segmenter.gray)
        labels = read_truth(item, image.shape[:2], classes, ignore_label=segmenter.ignore_label)
        if labels is not None:
            labels = labels if inside is None else np.where(inside, labels, np.uint8(IGNORED))
            given.append(blocks.Annotation(image, np.asarray(labels, np.uint8), inside))
    if all((own.labels == IGNORED).all() for own in given):
        raise DataError(f"{annotated}: no pixel has a class; give masks with labels")

    def learn(annotated: Sequence[blocks.Annotation]) -> blocks.Predict:
        return taught(annotated, classes, threads).ids

    folds = blocks.usable(given, blocks.PAIRS)
    error = blocks.held_out(given, folds, classes, learn).error if folds else float("nan")
    return SecondOpinion(taught(given, classes, threads).ids, error)


def is_marked(folder: Path, text: str) -> bool:
    """Whether the class maps in a folder are those of which its mark says ``text``."""
    mark = folder / MARK
    return mark.is_file() and mark.read_text(encoding="utf-8") == text


def write_maps(folder: Path, network: Watched, images: Mapping[str, Path], text: str) -> None:
    """Write class maps of images, files by name; go on if the folder is marked ``text``."""
    if not is_marked(folder, text):
        shutil.rmtree(folder, ignore_errors=True)
        replace_file(folder / MARK, text, "--out")
    with progress(len(images), "images") as bar:
        for name, image in images.items():
            path = folder / f"{name}.png"
            if not is_intact(path):
                save_picture(path, network.ids(*read_visible(image)), "--out")
            bar.update(1)


def take_over(
    earlier: Path, place: Path, images: Mapping[str, bool], weights: str, digest_now: str
) -> None:
    """Copy what a pixel classifier predicted into the folder of its answer under another digest.

    ``earlier`` is a finished ``AnswerFolder`` of a predictor with the digest ``weights`` and of the
    same ``images`` and labels, by name: whether an image is annotated. Another predictor's is left
    alone, and so is a ``place`` where the answer was begun. Whoever opens ``place`` then finds all
    images done, but those of which a file was removed, damaged or changed since. The record comes
    last, so that after a kill nothing of this counts. UserError if the disk is full.
    """
    head, *rest = _record_of(earlier) or [{}]
    begun = (_record_of(place) or [{}])[0].get("weights") == digest_now
    if begun or head.get("weights") != weights or not (earlier / VOTES).is_file():
        return
    kept, noted = [], {line["name"]: line for line in rest if line.get("name") in images}
    for name, entry in noted.items():
        kinds = [*KINDS, *([PREDICTED] if images[name] else [])]
        files = [f"{kind}/{name}.png" for kind in kinds]
        whole = all(is_intact(earlier / file) for file in files)
        if whole and digest(earlier / files[0]) == entry.get("map"):
            measured = f"{MEASURED}/{name}.npz"
            for file in [*files, *([measured] if (earlier / measured).is_file() else [])]:
                copy_file(earlier / file, place / file)
            kept.append(entry)
    copy_file(earlier / VOTES, place / VOTES)
    lines = [head | {"weights": digest_now}, *kept]
    replace_file(place / RECORD, "".join(f"{json.dumps(line)}\n" for line in lines), "--out")


def _record_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / RECORD
    return read_metrics(path) if path.is_file() else []


@dataclass
class AnswerFolder(Folder):
    """Predicts and measures; labelled pixels win over the prediction in their own image."""

    labels: dict[str, Path] = field(default_factory=dict)  # by the name of the image
    others: Sequence[Path] = ()  # folders of class maps by other methods
    pools_all: bool = False
    program: str = "segment.py"
    replaceable: bool = True  # its folder is the program's own
    rare_cure: str = "annotate another image, with more of it"
    by: str = NETWORK_WORDS  # who segmented, see ``provenance.how_measured``
    class_colours: Sequence[str] = ()  # see ``imaging.drawing``; (): those of the segmenter

    def __post_init__(self) -> None:
        if self.class_colours:
            own = class_colours(self.segmenter.num_classes, self.class_colours)
            self.segmenter.colours = own
        super().__post_init__()

    def predict(self, item: Item, image: Array) -> Array:
        """Predict an image; write its doubt; put its labels, if any, over the prediction."""
        predicted, certainty = self.predict_field(item, image)
        assert certainty is not None  # as of ``Watched`` and ``Classifier``
        self._note(item.name, certainty)
        labels = self.labels.get(item.name)
        files = [folder / f"{item.name}.png" for folder in self.others]
        found = doubt_map(
            certainty.uncertain, predicted, [read_mask(f) for f in files if f.exists()]
        )
        found[predicted == IGNORED] = 0  # outside the field
        if labels is not None:
            found[read_mask(labels) != IGNORED] = 0
        write_png(self.file("doubt", item), found)
        if labels is None:
            return predicted
        write_png(self.file(PREDICTED, item), predicted)
        return merged(predicted, read_mask(labels))

    @cached_property
    def annotated(self) -> dict[str, float]:
        """Of images whose labels were learnt: the share of what is visible that is labelled."""
        images, shares = {item.name: item.path for item in self.items}, {}
        for name, path in self.labels.items():
            mask = read_mask(path)
            inside = visible(images[name], mask.shape) if name in images else None
            shares[name] = labelled_share([mask], [inside])
        return shares

    def bar_lines(self) -> list[str]:
        """Nothing: the images are warned of with what was cut off them (``Intake.warnings``)."""
        return []

    def title_of(self, item: Item) -> str:
        """The name of an image, with a mark if its labels were learnt."""
        share = self.annotated.get(item.name)
        return item.name if share is None else f"{item.name} ({annotated_words(share)})"

    def table_rows(self) -> list[Row]:
        """The rows of ``measurements.csv``, with a last column on whose labels were learnt."""
        told = {
            name: "yes" if share == 1 else part_text(share)
            for name, share in self.annotated.items()
        }
        return [row | {"annotated": told.get(row["image"], "no")} for row in self.rows]

    def size_words(self) -> str:
        """At which size images are predicted."""
        reduce = self.segmenter.reduce
        reduced = f"reduced by a factor of {reduce}, class maps at their own size"
        return reduced if reduce > 1 else super().size_words()

    def _note(self, name: str, certainty: Certainty) -> None:
        """Add a line on an image; of several on one image the last counts."""
        found = {"votes": certainty.votes, "unsure": certainty.unsure}
        line = json.dumps({"name": name, **{k: _or_none(value) for k, value in found.items()}})
        with open_to_append(self.out / VOTES) as file:
            file.write(f"\n{line}\n".encode())  # the line before may have been cut off by a kill

    def noted(self, kind: str) -> dict[str, float]:
        """'votes' or 'unsure' of each image, see ``Certainty``; nan where it is not known."""
        path = self.out / VOTES
        lines = read_metrics(path) if path.exists() else []
        return {e["name"]: float("nan") if e.get(kind) is None else e[kind] for e in lines}


def part_text(share: float) -> str:
    """A share below 1 in percent, with two digits; never 100 %."""
    return f"{100 * min(share, 0.99):.2g} %"


def annotated_words(share: float) -> str:
    """'annotated', or '17 % annotated', of a value of ``AnswerFolder.annotated``."""
    return "annotated" if share == 1 else f"{part_text(share)} annotated"


def _or_none(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value


def reduced_labels(labels: Pixels, factor: int, num_classes: int) -> Pixels:
    """Class ids reduced by a whole factor: the most frequent label of each block, if it has one."""
    if factor == 1:
        return labels
    height, width = (-(-side // factor) for side in labels.shape)
    padded = np.full((height * factor, width * factor), IGNORED, np.uint8)
    padded[: labels.shape[0], : labels.shape[1]] = labels
    blocks = padded.reshape(height, factor, width, factor)
    counts = np.stack([(blocks == c).sum(axis=(1, 3)) for c in range(num_classes)])  # (C, h, w)
    return np.where(counts.any(axis=0), counts.argmax(axis=0), IGNORED).astype(np.uint8)
