"""Pixel counts of a prediction, image by image: enough to score any choice of test images.

The pooled Dice of a set is a ratio of sums over its images, so whoever keeps the sums of each image
can pool any part of the set, or a resampled one, without looking at a pixel again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.imagefile import DataError, read_mask
from utils.metrics import IGNORED

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
    """Counts of one prediction of n test images with C classes, pixels without a class left out.

    Attributes:
        both: pixels that are of a class in truth and prediction, (n, C).
        either: those in the truth plus those in the prediction, (n, C).
        pixels: labelled pixels, (n,).
    """

    both: Counts
    either: Counts
    pixels: Counts

    def dice(self, weights: Floats | Counts | None = None) -> Floats:
        """Dice of every class, pooled over the images; nan for a class found nowhere.

        Args:
            weights: how often each image counts, (..., n); None: once.

        Returns:
            (..., C), the background first.
        """
        both, either = self._pooled(weights)
        return ratio(2 * both, either)

    def iou(self) -> Floats:
        """Intersection over union of every class, pooled over the images, (C,)."""
        both, either = self._pooled(None)
        return ratio(both, either - both)

    def mean_dice(self, weights: Floats | Counts | None = None) -> Floats:
        """Mean Dice over the classes but the background that occur, (...)."""
        return mean_of_known(self.dice(weights)[..., 1:])

    def scores(self) -> dict[str, float]:
        """The scores by their names in ``metrics.jsonl``: acc, dice, dice1 ..., miou, iou1 ..."""
        dice, iou = self.dice()[1:], self.iou()[1:]
        return {
            "acc": float((self.both.sum(1) / self.pixels).mean()),
            "dice": float(mean_of_known(dice)),
            **{f"dice{c}": float(value) for c, value in enumerate(dice, start=1)},
            "miou": float(mean_of_known(iou)),
            **{f"iou{c}": float(value) for c, value in enumerate(iou, start=1)},
        }

    def _pooled(self, weights: Floats | Counts | None) -> tuple[Floats, Floats]:
        """``both`` and ``either`` summed over the images, (..., C) each."""
        w = np.ones(len(self.pixels)) if weights is None else np.asarray(weights, np.float64)
        return w @ self.both.astype(np.float64), w @ self.either.astype(np.float64)


def ratio(above: Floats, below: Floats) -> Floats:
    """``above / below``, nan where ``below`` is 0."""
    known = below > 0
    return np.where(known, above / np.where(known, below, 1.0), np.nan)


def mean_of_known(values: Floats) -> Floats:
    """Mean over the last axis of those that are not nan; nan where all are."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(np.float64))


def count(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], num_classes: int) -> Tally:
    """Count pairs of prediction and truth, class ids of the same shape (H, W) each."""
    both, either, pixels = [], [], []
    for prediction, truth in pairs:
        labelled = truth != IGNORED
        p, t = prediction[labelled], truth[labelled]
        both.append(np.bincount(t[p == t], minlength=num_classes))
        either.append(np.bincount(t, minlength=num_classes) + np.bincount(p, minlength=num_classes))
        pixels.append(labelled.sum())
    return Tally(*(np.array(counts, np.int64) for counts in (both, either, pixels)))


def count_pictures(
    pictures: Sequence[Path], masks: Iterable[NDArray[Any]], mapping: Sequence[int]
) -> Tally:
    """Count predictions out of the PNG files that an evaluation wrote.

    Args:
        pictures: a file for each test image, gray value ``mapping[c]`` where class c is predicted.
        masks: the true class ids (H, W) of each, in the same order.
        mapping: gray value of each class, all different.

    Raises:
        DataError: a file cannot be read, has another size than its mask, or holds a gray value
            that is no class's.
    """
    classes = np.full(256, IGNORED, np.uint8)
    classes[list(mapping)] = np.arange(len(mapping))

    def pair(path: Path, mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        prediction = classes[read_mask(path)]
        cure = "the prediction was changed or is another run's; train this run again (--overwrite)"
        if prediction.shape != mask.shape:
            found, wanted = (f"{s[1]}x{s[0]}" for s in (prediction.shape, mask.shape))
            raise DataError(f"{path}: {found}, its mask is {wanted}; {cure}")
        if (prediction == IGNORED).any():
            raise DataError(f"{path}: a gray value that stands for no class; {cure}")
        return prediction, mask

    pairs = (pair(path, mask) for path, mask in zip(pictures, masks, strict=True))
    return count(pairs, len(mapping))
