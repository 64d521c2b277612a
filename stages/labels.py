"""What the masks of a run's annotated images hold: pixels of each class, places far from any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from annotation.scribbles import FAR, far_from_labels
from utils.metrics import IGNORED

Mask = NDArray[np.uint8]
LEAST_FAR = 0.001  # of an image, or it is not told
MOST_LINES = 5


def label_counts(masks: Iterable[Mask], classes: int) -> NDArray[np.int64]:
    """The labelled pixels of each class (C,) in masks of any sizes; not those of id ``IGNORED``."""
    counts = [np.bincount(mask.ravel(), minlength=256)[:classes] for mask in masks]
    return np.sum(counts, axis=0, dtype=np.int64) if counts else np.zeros(classes, np.int64)


def balanced_weights(counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Weights with which every class counts alike, by its labelled pixels (C,).

    all pixels / (classes that have any * pixels of the class), which is scikit-learn's
    ``class_weight="balanced"``: over all labelled pixels they average 1. A class without pixels
    has 0; no loss would use its weight.
    """
    there = counts > 0
    alike = counts.sum() / max(1, there.sum())
    return tuple(np.divide(alike, counts, out=np.zeros(len(counts)), where=there).tolist())


def label_line(masks: Sequence[Mask], classes: int) -> str:
    """How many pixels of the annotated images have which class."""
    counts, pixels = label_counts(masks, classes), sum(mask.size for mask in masks)
    share = counts.sum() / max(1, pixels)
    each = ", ".join(f"class {c} {count}" for c, count in enumerate(counts))
    return f"Labelled: {counts.sum()} pixels, {share:.1%} of them: {each}"


def weight_line(weights: Sequence[float], counts: NDArray[np.int64]) -> str:
    """The balanced weights, and of how many labelled pixels they are."""
    pairs = enumerate(zip(weights, counts, strict=True))
    each = ", ".join(f"class {c} {weight:.4g} ({n} pixels)" for c, (weight, n) in pairs)
    return f"Class weights, balanced: {each}"


def far_lines(masks: Iterable[Mask], names: Iterable[str]) -> list[str]:
    """A line for each partially labelled image that has pixels far from any label."""
    lines = []
    for mask, name in zip(masks, names, strict=True):
        labelled = mask != IGNORED
        share = 0.0
        if not labelled.all():
            share = float(far_from_labels(labelled, FAR * min(mask.shape)).mean())
        if share >= LEAST_FAR:
            lines.append(
                f"{name}: {share:.1%} of its pixels are farther than {FAR:g} of its shorter side "
                "from any label; label some there if it looks unlike what is labelled"
            )
    more = [f"and so for {len(lines) - MOST_LINES} more images"] if lines[MOST_LINES:] else []
    return lines[:MOST_LINES] + more
