"""Blocks of the annotation held out in turn: the one honest figure that a single mask can give.

Each mask is cut into four blocks, the quarters of its image. What learns from three of them is
scored on the fourth. The figure holds within the annotated images: others may differ, and
pretraining knew the whole mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dataset.layout import write_png
from imaging.imagefile import Pixels, read_image, read_mask
from segmentation.intake import Picture
from utils.metrics import IGNORED, Counts, SegmentationScores, dice, mean_score

BLOCKS = 4
CURVE = (1, 2, 3)  # blocks of four that are learnt from

Predict = Callable[[Path], Pixels]
"""An image's file to its class ids (H, W)."""


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
    def by_block(self) -> NDArray[np.float64]:
        """Dice (blocks, C); nan of a class that the block does not show."""
        return dice(self.counts)


def stored(counts: Sequence[Any] | None) -> HeldOut | None:
    """Held-out scores from their confusion matrices as lists; None if there are none."""
    return HeldOut(np.asarray(counts, np.int64)) if counts else None


def cut(shape: Sequence[int]) -> list[tuple[slice, slice]]:
    """The quarters of an image (H, W), from the left to the right and downwards."""
    rows, columns = (slice(0, shape[0] // 2), slice(shape[0] // 2, shape[0])), shape[1] // 2
    return [(r, c) for r in rows for c in (slice(0, columns), slice(columns, shape[1]))]


def without(labels: Pixels, blocks: Sequence[int]) -> Pixels:
    """The labels (H, W) with some blocks unlabelled."""
    left = labels.copy()
    for number in blocks:
        left[cut(labels.shape)[number]] = IGNORED
    return left


def only(labels: Pixels, block: int) -> Pixels:
    """The labels (H, W) of one block, all others unlabelled."""
    return without(labels, [number for number in range(BLOCKS) if number != block])


def usable(pictures: Sequence[Picture]) -> list[int]:
    """The blocks that can be held out: they have labels, and the others show two classes."""
    labels = [read_mask(p.labels) for p in pictures if p.labels]
    found = []
    for block in range(BLOCKS):
        rest = {c for mask in labels for c in np.unique(without(mask, [block])).tolist()}
        if (
            any((only(mask, block) != IGNORED).any() for mask in labels)
            and len(rest - {IGNORED}) > 1
        ):
            found.append(block)
    return found


def write_labels(folder: Path, pictures: Sequence[Picture], left_out: Sequence[int]) -> Path:
    """Write the labels without some blocks, where any are left; returns the folder."""
    for picture in pictures:
        if picture.labels:
            left = without(read_mask(picture.labels), left_out)
            if (left != IGNORED).any():
                write_png(folder / picture.labels.name, left)
    return folder


def score(pictures: Sequence[Picture], predictors: dict[int, Predict], num_classes: int) -> HeldOut:
    """Score each block by the predictor that did not learn from it."""
    counts = []
    for block, predict in predictors.items():
        scores = SegmentationScores(num_classes)
        for picture in pictures:
            if picture.labels:
                truth = only(read_mask(picture.labels), block)
                if (truth != IGNORED).any():
                    ids = predict(picture.file)
                    scores.add(torch.from_numpy(ids), torch.from_numpy(truth))
        counts.append(scores.counts().sum(axis=0))
    return HeldOut(np.array(counts).reshape(-1, num_classes, num_classes))


def curve(
    pictures: Sequence[Picture],
    blocks: Sequence[int],
    num_classes: int,
    learn: Callable[[Sequence[Pixels], Sequence[Pixels]], Predict],
    step_done: Callable[[int], object],
) -> dict[int, HeldOut]:
    """Held-out scores of what learnt from 1, 2 and 3 of the four blocks.

    ``learn`` takes images and their labels, 255 where unlabelled.
    """
    images = [read_image(p.file) for p in pictures if p.labels]
    labels = [read_mask(p.labels) for p in pictures if p.labels]
    found = {}
    for size in CURVE:
        predictors: dict[int, Predict] = {}
        for block in blocks:
            learnt = [(block + offset) % BLOCKS for offset in range(1, size + 1)]
            left_out = [number for number in range(BLOCKS) if number not in learnt]
            masks = [without(mask, left_out) for mask in labels]
            if any((mask != IGNORED).any() for mask in masks):
                predictors[block] = learn(images, masks)
            step_done(1)
        found[size] = score(pictures, predictors, num_classes)
    return found
