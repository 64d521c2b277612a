"""Which unlabelled images a model is least sure of: those worth labelling or looking at next.

An image is predicted in its 8 views (``metallography.tiling.each_view``). The score is the *vote
disagreement*: the share of the views whose class is not the majority's, mean over the pixels.
Ambiguous pixels, where every view gives the same odds, do not raise it. Networks trained on a few
images are too sure of themselves, or too unsure, by an unknown factor; *entropy* and *mutual
information*, written beside the score, change with that factor, votes do not.

Errors shared by all views cannot be detected. On real micrographs the ranking follows the
share of wrong pixels, not the mean Dice (``results/ranking_uhcs.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imaging.data_bar import bar_lines, find_bars
from imaging.drawing import blend, reduced
from imaging.field import NO_RULE, FieldRule
from metallography.folder import count_confusion
from metallography.items import Item, read_truth
from metallography.particles import Array, Row
from metallography.segmenter import Segmenter
from metallography.tiling import MEASURES
from utils.files import DataError, replace_file
from utils.log import progress
from utils.metrics import IGNORED, Counts, image_dice, mean_score, ratio
from utils.ranks import group
from utils.tables import csv_of_rows

QUALITIES = ("accuracy", "dice")
DOUBT = "doubt"  # column of what ``doubt_of`` tells
DRAWN_SHARE = 0.25  # uncertain pixels: a quarter of the views contradicts the majority
UNCERTAIN = (235, 50, 140)
PICTURES = 12
SIDE = 360  # pixels of a picture's longer side
HEADING = "Least sure first"
QUESTIONED = "2 or more of the 8 views give another class"


class SecondOpinion(NamedTuple):
    """Another method that learnt the same annotated images."""

    ids: Callable[[Array, Any], Array]  # an image, and which pixels count, to class ids (H, W)
    error: float  # share of pixels in which it is wrong on parts held out; nan: not known


def doubt_of(unsure: float, differs: float, error: float) -> float:
    """The doubt of an image: what a network is unsure of, and what another method sees otherwise.

    ``unsure`` is 1 - the probability of the likeliest class, mean of the pixels; ``differs`` the
    share of pixels in which the methods differ, which counts beyond the ``error`` of the second,
    all of it where that is nan.
    Chosen on training images of NEU-Seg, see ``results/doubt``.
    """
    beyond = differs if math.isnan(error) else differs - error
    return unsure + (math.nan if math.isnan(beyond) else max(beyond, 0.0))


class Ranking(NamedTuple):
    """Images by how unsure the model is of them, those it is least sure of first."""

    rows: list[Row]  # the lines of ``ranking.csv``
    pictures: list[Array]  # of the first ``PICTURES``, with the regions in question
    titles: list[str]  # of the pictures
    shown: list[tuple[str, int]]  # names and widths, in pixels of the file, of their images
    bad: list[str]  # a line for each file that could not be used
    doubts: list[str]  # a line for each kind of data bar that nobody cut


def rank(
    segmenter: Segmenter,
    items: Sequence[Item],
    out: Path,
    field: FieldRule = NO_RULE,
    second: SecondOpinion | None = None,
) -> Ranking:
    """Score images; write ``ranking.csv`` into ``out``, with true masks accuracy and Dice too.

    Only the ``field`` of each image counts. Ranks share the images, and get the same. With a
    ``second`` opinion images are sorted by their doubt (``doubt_of``), else by the votes.
    """
    classes = segmenter.num_classes
    rows: list[Any] = []  # with the number of each image
    bad: list[Any] = []
    shown: list[Any] = []  # the least sure so far: minus score, number, name, picture
    barred: list[Any] = []  # with the number of each image: its file, data bars, whether it is cut
    with progress(len(items), "images") as bar:
        for number, item in group.share(list(enumerate(items))):
            try:
                image = item.read(segmenter.gray)
                shape, crop = image.shape[:2], field.crop_of(image.shape)
                outside = field.outside(item.path, item.name, shape, item.page)
                inside = None if outside is None else ~crop.of(outside)
                image = field.part(image, item.path, item.page)
                barred.append((number, item.own_path, find_bars(image), any(crop)))
                maps = segmenter.disagreement(image, inside)
                counted = maps if inside is None else maps[:, fitted(inside, maps.shape[1:])]
                means = [float(values.mean(dtype=np.float64)) for values in counted]
                row: Row = {"image": item.name, "batch": item.batch}
                row |= dict(zip(MEASURES, means, strict=True))
                mask = None if second is None else add_doubt(row, segmenter, image, inside, second)
                if any(each.truth for each in items):
                    row |= dict.fromkeys(QUALITIES, math.nan)
                truth = read_truth(item, shape, classes, crop, segmenter.ignore_label)
                if truth is not None:
                    true = crop.of(truth).copy()
                    mask = segmenter(image, inside) if mask is None else mask
                    true[np.zeros_like(true, bool) if inside is None else ~inside] = IGNORED
                    row |= quality(count_confusion(true, mask, classes))
                rows.append((number, row))
                drawn = -_key(row), number, item.name, image.shape[1], draw_uncertain(image, maps)
                shown = sorted([*shown, drawn], key=lambda entry: entry[:2])[:PICTURES]
            except DataError as error:
                bad.append((number, str(error)))
            bar.update(1)
    rows, shown, bad, barred = map(_of_all_ranks, (rows, shown, bad, barred))
    ranked = sorted((row for _, row in rows), key=lambda row: -_key(row))
    ranked = [{"rank": i, **row} for i, row in enumerate(ranked, start=1)]
    if group.writes():
        replace_file(out / "ranking.csv", csv_of_rows(ranked, ["image"]), "--out")
    del shown[PICTURES:]
    titles = [f"{i}. {name}  {-score:.4f}" for i, (score, _, name, *_) in enumerate(shown, start=1)]
    names = [(name, width) for _, _, name, width, _ in shown]
    lines = [line for _, line in bad]
    bars = {path: found for _, path, found, _ in barred}
    doubts = bar_lines(bars, field.crop, [path for _, path, _, cut in barred if not cut])
    return Ranking(ranked, [picture for *_, picture in shown], titles, names, lines, doubts)


def _of_all_ranks(found: list[Any]) -> list[Any]:
    """The entries of all ranks, by their numbers, of which no two are equal."""
    return sorted(entry for own in group.gather_objects(found) for entry in own)


def _key(row: Row) -> float:
    return float(row[DOUBT if DOUBT in row else MEASURES[0]])


def add_doubt(
    row: Row, segmenter: Segmenter, image: Array, inside: Array | None, second: SecondOpinion
) -> Array:
    """Add the doubt of an image to its row; returns its predicted class ids (H, W)."""
    masks, missing = [], []
    for _, band in segmenter.bands(image, inside):
        masks.append(band.argmax(axis=0).astype(np.uint8))
        missing.append(1 - band.max(axis=0))
    mask, unsure = np.concatenate(masks), np.concatenate(missing)
    other = second.ids(image, inside) != mask
    if inside is not None:
        unsure, other = unsure[inside], other[inside]
    row["unsure"], row["differs"] = float(unsure.mean(dtype=np.float64)), float(other.mean())
    row[DOUBT] = doubt_of(row["unsure"], row["differs"], second.error)
    return mask


def draw_uncertain(image: Array, maps: Array) -> NDArray[np.uint8]:
    """Draw an image with the pixels in magenta where a quarter of the views or more disagrees.

    The maps (3, h, w) of ``tiling.disagreement`` are fitted to the image, uint8 (H, W) or
    (H, W, 3).
    """
    image = reduced(image, 4 * SIDE)
    where = fitted(maps[0] >= DRAWN_SHARE, image.shape[:2])
    colours = np.array([(0, 0, 0), UNCERTAIN], np.uint8)
    return blend(image, where.astype(np.uint8), colours, SIDE)


def fitted(pixels: Array, shape: tuple[int, ...]) -> Array:
    """Pixels (h, w) at the size (H, W) of another picture, by the nearest ones."""
    (height, width), (h, w) = shape, pixels.shape
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return pixels[rows[:, None], columns]


def quality(counts: Counts) -> dict[str, float]:
    """Accuracy, and mean Dice (``metrics.image_dice``), of one image by its confusion matrix."""
    correct = float(ratio(counts.trace(), counts.sum()))  # nan of a mask without any label
    values = correct, float(mean_score(image_dice(counts)))
    return dict(zip(QUALITIES, values, strict=True))


def correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, int]:
    """Spearman's rank correlation: rho, two-sided p value, number of pairs without nan.

    Rho is nan with less than three pairs, or if all values of one are equal.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if not math.isnan(a + b)]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return math.nan, math.nan, len(pairs)
    # Here, as most commands never need it: 0.6 s.
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    found = spearmanr(*zip(*pairs, strict=True))
    return float(found.statistic), float(found.pvalue), len(pairs)


def agreement_lines(rows: Sequence[Row]) -> list[str]:
    """How well each measure follows the true error, over images: a line per measure and error."""
    known = sum(not math.isnan(row.get(QUALITIES[0], math.nan)) for row in rows)
    if known < 3:
        return [f"Warning: {known} of {len(rows)} images have a true mask in --masks, named as the "
                "image; 3 are needed to compare the order with their errors"]  # fmt: skip
    lines = [
        "Rank correlation of each measure with the true error of an image: 1 where the measure "
        "puts images in the order of their errors, 0 where it says nothing about them"
    ]
    for name in (*MEASURES, *([DOUBT] if rows and DOUBT in rows[0] else [])):
        for kind in QUALITIES:
            error = [1 - row.get(kind, math.nan) for row in rows]
            rho, p, count = correlation([row[name] for row in rows], error)
            lines.append(f"Spearman, {name} and 1 - {kind}: {rho:.3f} (p = {p:.2g}, n = {count})")
    return lines
