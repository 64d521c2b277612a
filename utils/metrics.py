"""Segmentation scores: confusion matrices, Dice, IoU, pixel accuracy, mean ± std over repeats.

All scores are functions of the images' confusion matrices (n, C, C), true class as row.

* Pooled over a set (one ratio of sums, not a mean of ratios), a class that the truth of the whole
  set lacks is nan, whatever was predicted. Means leave it and the background, class 0, out.
* Of a single image a class counts if the truth or the prediction has it.
* Accuracy (ACC) is the mean over images of the share of correct pixels, background included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from utils.tables import digits

IGNORED = 255  # class id, in memory, of an unlabelled pixel

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix, int64 (C, C): pixels by true class (row) and predicted class (column).

    ``prediction`` and ``truth`` are integer class ids 0 ... C-1 of equal shape on one device;
    pixels whose truth is ``IGNORED`` are not counted. Raises ValueError if the shapes differ or, on
    the CPU only (an accelerator would be synchronised), if an id is out of range.
    """
    if prediction.shape != truth.shape:
        shapes = f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)}"
        raise ValueError(f"{shapes} differ in shape")
    if truth.device.type == "cpu":
        _check_ids(prediction, "prediction", num_classes)
        _check_ids(truth[truth != IGNORED], "truth", num_classes)
    labelled = (truth != IGNORED).flatten()
    index = (truth.long() * num_classes + prediction.long()).flatten() * labelled  # (pixels,)
    # Not torch.bincount, which reads the largest index back and so synchronises an accelerator.
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index, labelled.long())
    return counts.view(num_classes, num_classes)  # (C, C)


def _check_ids(ids: Tensor, what: str, num_classes: int) -> None:
    wrong = ids[(ids < 0) | (ids >= num_classes)]
    if len(wrong):
        legal = f"ids must lie in 0 ... {num_classes - 1}"
        raise ValueError(f"{what} holds class id {int(wrong[0])}; {legal}")


def pooled(counts: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Sum of images' matrices (n, C, C), weighted by ``weights`` (..., n): (..., C, C)."""
    matrices = np.asarray(counts, np.float64)
    times = np.ones(len(matrices)) if weights is None else np.asarray(weights, np.float64)
    return np.tensordot(times, matrices, axes=1)


def dice(matrix: ArrayLike) -> Floats:
    """Dice 2|P∩G| / (|P| + |G|) by pooled counts (..., C, C): (..., C), nan of classes not in G."""
    both, predicted, truth = _areas(matrix)
    return ratio(2 * both, np.where(truth > 0, predicted + truth, 0))


def iou(matrix: ArrayLike) -> Floats:
    """Intersection over union |P∩G| / |P∪G|, otherwise as ``dice``."""
    both, predicted, truth = _areas(matrix)
    return ratio(both, np.where(truth > 0, predicted + truth - both, 0))


def image_dice(matrix: ArrayLike) -> Floats:
    """Dice of single images by their counts (..., C, C): (..., C), nan for classes in neither."""
    both, predicted, truth = _areas(matrix)
    return ratio(2 * both, predicted + truth)


def mean_score(values: Floats) -> Floats:
    """Mean of (..., C) over the classes above 0 that are not nan; nan if there is none."""
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
    """Scores of one test set; the rules are those of this module."""

    acc: float
    mean_dice: float
    dice: tuple[float, ...]  # of class 1 ... C-1
    mean_iou: float
    iou: tuple[float, ...]  # of class 1 ... C-1
    truth_pixels: tuple[int, ...]  # of class 0 ... C-1, whole set
    classes_scored: int  # of 1 ... C-1, those that the truth has
    images: int
    predicted_pixels: tuple[int, ...] = ()  # of class 0 ... C-1, where the truth has a label

    @classmethod
    def from_confusion(cls, counts: ArrayLike) -> Scores:
        """The scores of a set by the confusion matrices (n, C, C) of its images; n = 0 gives nan.

        An image without a labelled pixel has no accuracy and is left out of ``acc``.
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
        """The scores as an evaluation in ``metrics.jsonl`` holds them."""
        return {
            "acc": self.acc,
            "dice": self.mean_dice,
            **{f"dice{c}": value for c, value in enumerate(self.dice, start=1)},
            "miou": self.mean_iou,
            **{f"iou{c}": value for c, value in enumerate(self.iou, start=1)},
            "truth_pixels": list(self.truth_pixels),
            "predicted_pixels": list(self.predicted_pixels),
            "classes_scored": self.classes_scored,
            "images": self.images,
        }


class SegmentationScores:
    """Accumulates the confusion matrix of each image on its device."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._matrices: list[Tensor] = []  # each (C, C)

    def add(self, prediction: Tensor, truth: Tensor) -> None:
        """Add one image, integer class ids [H, W], or several, [B, H, W]."""
        if truth.ndim not in (2, 3):
            raise ValueError(f"masks are [H, W] or [B, H, W], not {tuple(truth.shape)}")
        pairs = [(prediction, truth)] if truth.ndim == 2 else zip(prediction, truth, strict=True)
        self._matrices += [confusion(p, t, self.num_classes) for p, t in pairs]

    def counts(self) -> Counts:
        """The confusion matrices (n, C, C) of all images so far, in one transfer."""
        if not self._matrices:
            return np.zeros((0, self.num_classes, self.num_classes), np.int64)
        return np.asarray(torch.stack(self._matrices).cpu().numpy(), np.int64)

    def compute(self) -> Scores:
        """The scores of all images so far."""
        return Scores.from_confusion(self.counts())


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over repeats.

    The deviation of a single value is nan, and so are both of no values or of any nan.
    """
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def format_mean_std(values: Sequence[float]) -> str:
    """``mean ± std`` over repeats to four decimals; nan is ``-``."""
    return " ± ".join(map(digits, mean_std(values)))
