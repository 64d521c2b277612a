"""Segmentation scores: confusion matrices, Dice, IoU, pixel accuracy, mean ± std over repeats.

Everything is a function of the confusion matrix of each image, counts (n, C, C) with the true class
as the row, and there is one rule for a class that is absent:

* Pooled over a set (one ratio of sums, not a mean of ratios) a class that the truth of the whole
  set lacks is nan, whatever was predicted: there is nothing to find. Means leave it and the
  background, class 0, out.
* Of a single image a class counts if the truth or the prediction has it.

Accuracy (ACC) is the mean over images of the share of correct pixels, background included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

IGNORED = 255
"""Class id, in memory, of a pixel that nobody labelled."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (row) and predicted class (column).

    Args:
        prediction: integer class ids, any shape.
        truth: integer class ids, the same shape, on the same device; pixels of id ``IGNORED``
            (255) are not counted when C is less.
        num_classes: C; every id must lie in 0 ... C-1.

    Returns:
        int64 [C, C] on the device of ``truth``.  Nothing here waits for an accelerator, which is
        why ids are checked on the CPU only.

    Raises:
        ValueError: the shapes differ, or (on the CPU) an id lies outside 0 ... C-1.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} differ in shape"
        )
    if truth.device.type == "cpu":
        _check_ids(prediction, "prediction", num_classes)
        _check_ids(truth[truth != IGNORED], "truth", num_classes)
    labelled = (truth != IGNORED).flatten()
    index = (truth.long() * num_classes + prediction.long()).flatten() * labelled  # (pixels,)
    # Not torch.bincount: on an accelerator it reads the largest index back, and so waits.
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index, labelled.long())
    return counts.view(num_classes, num_classes)  # (C, C)


def _check_ids(ids: Tensor, what: str, num_classes: int) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{what} holds class id {wrong}; ids must lie in 0 ... {num_classes - 1}")


def pooled(counts: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Sum the matrices (n, C, C) of images, each ``weights`` (..., n) times: (..., C, C)."""
    matrices = np.asarray(counts, np.float64)
    times = np.ones(len(matrices)) if weights is None else np.asarray(weights, np.float64)
    return np.tensordot(times, matrices, axes=1)


def dice(matrix: ArrayLike) -> Floats:
    """Dice 2|P∩G| / (|P| + |G|) of each class by pooled counts (..., C, C): (..., C).

    nan for a class that the truth lacks.
    """
    both, predicted, truth = _areas(matrix)
    return ratio(2 * both, np.where(truth > 0, predicted + truth, 0))


def iou(matrix: ArrayLike) -> Floats:
    """Intersection over union of each class by pooled counts, as ``dice``."""
    both, predicted, truth = _areas(matrix)
    return ratio(both, np.where(truth > 0, predicted + truth - both, 0))


def image_dice(matrix: ArrayLike) -> Floats:
    """Dice of each class of a single image by its counts (..., C, C): (..., C).

    nan for a class that neither truth nor prediction has.
    """
    both, predicted, truth = _areas(matrix)
    return ratio(2 * both, predicted + truth)


def mean_score(values: Floats) -> Floats:
    """Mean of (..., C) over the known values of all classes but the background; nan if none."""
    known = ~np.isnan(values[..., 1:])
    total = np.where(known, values[..., 1:], 0.0).sum(-1)
    return ratio(total, known.sum(-1))


def ratio(above: Floats, below: NDArray[np.floating | np.integer]) -> Floats:
    """``above / below``, nan where ``below`` is 0."""
    known = below > 0
    return np.where(known, above / np.where(known, below, 1), np.nan)


def _areas(matrix: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Pixels (..., C) of each class: shared, in the prediction, in the truth."""
    counts = np.asarray(matrix, np.float64)
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-2), counts.sum(-1)


@dataclass(frozen=True)
class Scores:
    """Scores of one test set.

    Attributes:
        acc: mean over images of the share of correct pixels, background included.
        mean_dice: mean of ``dice`` over the classes that are scored.
        dice: Dice of class 1 ... C-1; nan for a class that the truth of the whole set lacks,
            whatever was predicted: there is nothing to find, so 0 or 1 would say nothing.
        mean_iou: mean of ``iou`` over the same classes (the log's ``mIoU``).
        iou: intersection over union of class 1 ... C-1; nan as for ``dice``.
        truth_pixels: pixels of class 0 ... C-1 in the truth of the whole set.
        classes_scored: number of non-background classes that the two means are over.
        images: number of images.
        predicted_pixels: pixels of class 0 ... C-1 in the predictions, where the truth has a label.
    """

    acc: float
    mean_dice: float
    dice: tuple[float, ...]
    mean_iou: float
    iou: tuple[float, ...]
    truth_pixels: tuple[int, ...]
    classes_scored: int
    images: int
    predicted_pixels: tuple[int, ...] = ()

    @classmethod
    def from_confusion(cls, counts: ArrayLike) -> Scores:
        """The scores of a set by the confusion matrices (n, C, C) of its images.

        An image without a labelled pixel has no accuracy and is left out of ``acc``. Of no image
        everything is nan.
        """
        matrices = np.asarray(counts, np.int64)
        matrix = matrices.sum(0)  # (C, C)
        correct, labelled = np.trace(matrices, axis1=1, axis2=2), matrices.sum((1, 2))
        shares = ratio(correct.astype(np.float64), labelled)
        known = shares[~np.isnan(shares)]
        of_class, overlap = dice(matrix), iou(matrix)
        truth = matrix.sum(1)
        return cls(
            acc=float(known.mean()) if len(known) else math.nan,
            mean_dice=float(mean_score(of_class)),
            dice=tuple(of_class[1:].tolist()),
            mean_iou=float(mean_score(overlap)),
            iou=tuple(overlap[1:].tolist()),
            truth_pixels=tuple(truth.tolist()),
            classes_scored=int((truth[1:] > 0).sum()),
            images=len(matrices),
            predicted_pixels=tuple(matrix.sum(0).tolist()),
        )

    def as_dict(self) -> dict[str, float | int | list[int]]:
        """Return the scores flat, as one evaluation line of ``metrics.jsonl`` holds them."""
        flat: dict[str, float | int | list[int]] = {"acc": self.acc, "dice": self.mean_dice}
        flat.update({f"dice{c}": value for c, value in enumerate(self.dice, start=1)})
        flat["miou"] = self.mean_iou
        flat.update({f"iou{c}": value for c, value in enumerate(self.iou, start=1)})
        flat["truth_pixels"] = list(self.truth_pixels)
        flat["predicted_pixels"] = list(self.predicted_pixels)
        flat["classes_scored"] = self.classes_scored
        flat["images"] = self.images
        return flat


class SegmentationScores:
    """Accumulates one confusion matrix per image on its device; read once, at the end."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._matrices: list[Tensor] = []  # each (C, C)

    def add(self, prediction: Tensor, truth: Tensor) -> None:
        """Add one image, integer class ids [H, W], or several, [B, H, W]."""
        if truth.ndim not in (2, 3):
            raise ValueError(f"masks are [H, W] or [B, H, W], not {tuple(truth.shape)}")
        if truth.ndim == 2:
            self._matrices.append(confusion(prediction, truth, self.num_classes))
            return
        for one_prediction, one_truth in zip(prediction, truth, strict=True):
            self._matrices.append(confusion(one_prediction, one_truth, self.num_classes))

    def counts(self) -> Counts:
        """The confusion matrices (n, C, C) of all images so far, in one transfer."""
        if not self._matrices:
            return np.zeros((0, self.num_classes, self.num_classes), np.int64)
        return np.asarray(torch.stack(self._matrices).cpu().numpy(), np.int64)

    def compute(self) -> Scores:
        """The scores of all images so far."""
        return Scores.from_confusion(self.counts())


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1) over repeats.

    One value has no spread: its std is nan.  No values give (nan, nan), and a nan among the values
    makes both nan, because a score that one repeat lacks has no mean over the repeats.
    """
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def format_mean_std(values: Sequence[float], digits: int = 4) -> str:
    """Return ``mean ± std`` over repeats as text; what is not known (nan) is printed as ``-``."""
    mean, std = mean_std(values)
    parts = ["-" if math.isnan(v) else f"{v:.{digits}f}" for v in (mean, std)]
    return " ± ".join(parts)
