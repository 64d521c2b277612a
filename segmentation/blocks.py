"""Blocks of the annotation held out in turn: the one honest figure that a single mask can give.

Each mask is cut into four blocks, the quarters of its image. They are held out one at a time: what
learns from three is scored on the fourth. Where the time is short two that touch at a corner are
held out at a time: two trainings that learn from half of the annotation take a third of the time of
four that learn from three quarters. The figure holds within the annotated images: others may
differ, and pretraining knew the whole mask.

Few strokes may leave a quarter without a class, and then nothing could learn it there. Their blocks
are groups of strokes, such that every class is in each of the pairs of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from imaging.drawing import write_png
from imaging.imagefile import Pixels, read_mask
from segmentation.intake import Picture
from stages.labels import in_strokes
from utils.metrics import IGNORED, Counts, SegmentationScores, dice, mean_score

BLOCKS = 4
AREA = 10**9  # pixels that counts by area are scaled to
Fold = tuple[int, ...]
"""Blocks that are held out together, numbered from the left to the right and downwards."""
SINGLE: tuple[Fold, ...] = ((0,), (1,), (2,), (3,))
PAIRS: tuple[Fold, ...] = ((0, 3), (1, 2))

Predict = Callable[[Pixels, Any], Pixels]
"""The pixels of an image, and which of them count (see ``Annotation``), to class ids (H, W)."""


class Annotation(NamedTuple):
    """An image and what was labelled in it."""

    image: Pixels  # (H, W) or (H, W, 3)
    labels: Pixels  # class ids (H, W), 255 where unlabelled
    inside: NDArray[np.bool_] | None = None  # (H, W): where the image counts; None: everywhere


class HeldOut(NamedTuple):
    """Scores on held-out blocks."""

    counts: Counts  # (blocks, C, C), all annotated images together, true class as the row

    @property
    def classes(self) -> NDArray[np.float64]:
        """Dice of each class (C,), pooled over the blocks; nan of a class that none shows."""
        return dice(self.counts.sum(axis=0))

    @property
    def mean(self) -> float:
        """Mean Dice without the background, as all scores of the program."""
        return float(mean_score(self.classes))

    @property
    def error(self) -> float:
        """Share of wrong pixels."""
        total = self.counts.sum()
        return float(1 - np.trace(self.counts.sum(axis=0)) / total) if total else 0.0

    def by_area(self, shares: Sequence[float]) -> HeldOut:
        """The same as if each class had its share (C,) of the pixels.

        Strokes show rare classes more often than the image does. The counts are of ``AREA`` pixels,
        so many that rounding does no harm.
        """
        pixels = self.counts.sum(axis=(0, 2))
        wanted = np.asarray(shares) * AREA
        weights = np.divide(wanted, pixels, out=np.zeros(len(pixels)), where=pixels > 0)
        return HeldOut(np.rint(self.counts * weights[:, None]).astype(np.int64))

    @property
    def by_block(self) -> NDArray[np.float64]:
        """Dice (blocks, C); nan of a class that the block does not show."""
        return dice(self.counts)


def stored(counts: Sequence[Any] | None) -> HeldOut | None:
    """Held-out scores from their confusion matrices as lists; None if there are none."""
    return HeldOut(np.asarray(counts, np.int64)) if counts else None


def quarters(shape: Sequence[int]) -> Pixels:
    """The quarter of an image in which each pixel (H, W) lies, in the order of ``Fold``."""
    rows, columns = (np.arange(side) >= side // 2 for side in shape[:2])
    return np.asarray(2 * rows[:, None] + columns, np.uint8)


def numbers(labels: Pixels) -> Pixels:
    """The block of each labelled pixel (H, W): its quarter, or the group of its stroke."""
    found, classes = quarters(labels.shape), set(np.unique(labels).tolist()) - {IGNORED}
    if not in_strokes([labels]):
        return found
    halves = [set(labels[np.isin(found, pair)].tolist()) for pair in PAIRS]
    return found if all(classes <= half for half in halves) else _of_strokes(labels)


def _of_strokes(labels: Pixels) -> Pixels:
    """The block of each labelled pixel, 0 elsewhere: whole strokes, each class spread evenly.

    Strokes of the rarest classes are given out first, each to the block in which the classes are
    most evenly spread over the blocks and their pairs afterwards. A stroke that alone has a class
    is cut in two.
    """
    classes = np.array(sorted(set(np.unique(labels).tolist()) - {IGNORED}))
    count, strokes = cv2.connectedComponents((labels != IGNORED).astype(np.uint8))
    sizes = np.zeros((count, len(classes)))  # pixels by stroke and class; stroke 0 is no label
    for c, label in enumerate(classes.tolist()):
        sizes[:, c] = np.bincount(strokes[labels == label], minlength=count)
    for c, label in enumerate(classes.tolist()):
        if np.count_nonzero(sizes[:, c]) == 1 and sizes[:, c].max() > 1:
            sizes = _cut_in_two(strokes, labels, label, int(sizes[:, c].argmax()), sizes, classes)
    shares = sizes / np.maximum(1, sizes.sum(axis=0))
    held, block_of = np.zeros((BLOCKS, len(classes))), np.zeros(len(sizes), np.uint8)
    for stroke in sorted(range(1, len(sizes)), key=lambda s: (-shares[s].max(), s)):
        costs = []
        for block in range(BLOCKS):
            tried = held.copy()
            tried[block] += shares[stroke]
            pairs = sum(float((tried[list(pair)].sum(axis=0) ** 2).sum()) for pair in PAIRS)
            costs.append(round(pairs + float((tried**2).sum()), 9))
        block_of[stroke] = int(np.argmin(costs))
        held[block_of[stroke]] += shares[stroke]
    return block_of[strokes]


def _cut_in_two(
    strokes: NDArray[Any],
    labels: Pixels,
    label: int,
    stroke: int,
    sizes: NDArray[Any],
    classes: NDArray[Any],
) -> NDArray[Any]:
    """Make a stroke two, by the middle of its pixels of a class; returns the sizes of all."""
    places = np.argwhere((strokes == stroke) & (labels == label))
    axis = int(np.ptp(places, axis=0).argmax())
    middle = np.sort(places[:, axis])[len(places) // 2]
    far = (np.arange(strokes.shape[axis]) >= middle).reshape((-1, 1) if axis == 0 else (1, -1))
    strokes[(strokes == stroke) & far] = len(sizes)
    both = [[((strokes == s) & (labels == c)).sum() for c in classes] for s in (stroke, len(sizes))]
    sizes[stroke] = both[0]
    return np.vstack([sizes, both[1]])


def without(labels: Pixels, blocks: Sequence[int]) -> Pixels:
    """The labels (H, W) with some blocks unlabelled."""
    left = labels.copy()
    left[np.isin(numbers(labels), list(blocks))] = IGNORED
    return left


def only(labels: Pixels, block: int) -> Pixels:
    """The labels (H, W) of one block, all others unlabelled."""
    return without(labels, [number for number in range(BLOCKS) if number != block])


def usable(annotated: Sequence[Annotation], folds: Sequence[Sequence[int]]) -> list[Fold]:
    """The folds that can be held out: they have labels, and the other blocks show two classes."""
    labels = [own.labels for own in annotated]
    found = []
    for fold in map(tuple, folds):
        rest = {c for mask in labels for c in np.unique(without(mask, fold)).tolist()}
        own = any((without(mask, learnt_blocks(fold)) != IGNORED).any() for mask in labels)
        if own and len(rest - {IGNORED}) > 1:
            found.append(fold)
    return found


def learnt_blocks(fold: Sequence[int]) -> list[int]:
    """The blocks that are learnt from where a fold is held out, cyclically from its first on."""
    following = [(fold[0] + offset) % BLOCKS for offset in range(1, BLOCKS)]
    return [number for number in following if number not in fold]


def write_labels(folder: Path, pictures: Sequence[Picture], left_out: Sequence[int]) -> Path:
    """Write the labels without some blocks, where any are left; returns the folder."""
    for picture in pictures:
        if picture.labels:
            left = without(read_mask(picture.labels), left_out)
            if (left != IGNORED).any():
                write_png(folder / picture.labels.name, left)
    return folder


def score(
    annotated: Sequence[Annotation], predictors: dict[Fold, Predict], classes: int
) -> HeldOut:
    """Score each fold by the predictor that did not learn from it; block by block, in order."""
    counts: dict[int, Counts] = {}
    for fold, predict in predictors.items():
        scores = {block: SegmentationScores(classes) for block in fold}
        for own in annotated:
            truths = {block: only(own.labels, block) for block in fold}
            known = {b: truth for b, truth in truths.items() if (truth != IGNORED).any()}
            ids = predict(own.image, own.inside) if known else None
            for block, truth in known.items():
                assert ids is not None
                scores[block].add(torch.from_numpy(ids), torch.from_numpy(truth))
        counts |= {block: each.counts().sum(axis=0) for block, each in scores.items()}
    found = [counts[block] for block in sorted(counts)]
    return HeldOut(np.array(found, np.int64).reshape(-1, classes, classes))


Learn = Callable[[Sequence[Annotation]], Predict]
"""Annotated images to what predicts."""


def held_out(
    annotated: Sequence[Annotation],
    folds: Sequence[Fold],
    num_classes: int,
    learn: Learn,
    size: int = BLOCKS,
    step_done: Callable[[int], object] = lambda _: None,
) -> HeldOut:
    """Held-out scores of what learnt from ``size`` of the other blocks, from all by default."""
    predictors: dict[Fold, Predict] = {}
    for fold in folds:
        left_out = set(range(BLOCKS)) - set(learnt_blocks(fold)[:size])
        given = [own._replace(labels=without(own.labels, sorted(left_out))) for own in annotated]
        if any((own.labels != IGNORED).any() for own in given):
            predictors[fold] = learn(given)
        step_done(1)
    return score(annotated, predictors, num_classes)


def curve(
    annotated: Sequence[Annotation],
    folds: Sequence[Fold],
    num_classes: int,
    learn: Learn,
    step_done: Callable[[int], object],
) -> dict[int, HeldOut]:
    """Held-out scores of what learnt from 1, 2 (and 3) of the four blocks."""
    return {
        size: held_out(annotated, folds, num_classes, learn, size, step_done)
        for size in curve_sizes(folds)
    }


def curve_sizes(folds: Sequence[Sequence[int]]) -> range:
    """Numbers of blocks that a learning curve learns from."""
    return range(1, BLOCKS - max(map(len, folds)) + 1)
