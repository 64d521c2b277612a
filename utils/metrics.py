"""Segmentation scores: confusion matrices, Dice, IoU, pixel accuracy, mean ± std over repeats.

Words: Dice and IoU of a class are pooled over the whole test set (one ratio of sums, not a mean of
ratios), and their means leave the background, class 0, out.  Accuracy (ACC) is the mean over images
of each image's share of correct pixels, background included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = 255
"""Class id, in memory, of a pixel that nobody labelled."""


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

    def compute(self) -> Scores:
        """Read everything in one transfer and return the scores (all nan without any image)."""
        if not self._matrices:
            unknown = (math.nan,) * (self.num_classes - 1)
            no_pixels = (0,) * self.num_classes
            return Scores(
                math.nan, math.nan, unknown, math.nan, unknown, no_pixels, 0, 0, no_pixels
            )
        per_image = torch.stack(self._matrices).cpu()  # (images, C, C)
        correct = per_image.diagonal(dim1=1, dim2=2).sum(1).double()
        acc = float((correct / per_image.sum((1, 2))).mean())
        pooled = per_image.sum(0)  # (C, C)
        both = pooled.diagonal().double()  # |P ∩ G| of each class
        either = (pooled.sum(0) + pooled.sum(1)).double()  # |P| + |G| of each class
        truth, predicted = pooled.sum(1), pooled.sum(0)
        # A class that the truth lacks is nan and stays out of the means.
        there = truth > 0
        dice = torch.where(there, 2 * both / either, math.nan)
        iou = torch.where(there, both / (either - both), math.nan)
        return Scores(
            acc=acc,
            mean_dice=float(dice[1:].nanmean()),
            dice=tuple(dice[1:].tolist()),
            mean_iou=float(iou[1:].nanmean()),
            iou=tuple(iou[1:].tolist()),
            truth_pixels=tuple(truth.tolist()),
            classes_scored=int(there[1:].sum()),
            images=len(per_image),
            predicted_pixels=tuple(predicted.tolist()),
        )


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
