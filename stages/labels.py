"""What the masks of a run's annotated images hold: pixels of each class, places far from any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from annotation.scribbles import FAR, far_from_labels
from utils.metrics import IGNORED

Mask = NDArray[np.uint8]
Inside = NDArray[np.bool_] | None
"""Which pixels (H, W) of an image count; None: all."""
LEAST_FAR = 0.001  # of an image, or it is not told
MOST_LINES = 5
STROKES = 0.2  # share of labelled pixels below which masks are taken for strokes


def label_counts(masks: Iterable[Mask], classes: int) -> NDArray[np.int64]:
    """The labelled pixels of each class (C,) in masks of any sizes; not those of id ``IGNORED``."""
    counts = [np.bincount(mask.ravel(), minlength=256)[:classes] for mask in masks]
    return np.sum(counts, axis=0, dtype=np.int64) if counts else np.zeros(classes, np.int64)


def balanced_weights(counts: NDArray[np.int64], power: float = 1.0) -> tuple[float, ...]:
    """Weights with which every class counts alike, by its labelled pixels (C,), to a ``power``.

    all pixels / (classes that have any * pixels of the class), which is scikit-learn's
    ``class_weight="balanced"``: over all labelled pixels they average 1. With their square root a
    class counts by the root of its pixels; these average 1 or less, and the cross-entropy has that
    much less weight beside the Dice loss. A class without pixels has 0; no loss would use it.
    """
    there = counts > 0
    alike = counts.sum() / max(1, there.sum())
    weights = np.divide(alike, counts, out=np.zeros(len(counts)), where=there)
    return tuple((weights**power).tolist())


def label_line(
    masks: Sequence[Mask],
    classes: int,
    names: Sequence[str] = (),
    insides: Sequence[Inside] = (),
) -> str:
    """How many pixels of the annotated images have which class, by its name if there are some.

    ``insides`` are those of ``labelled_share``.
    """
    counts, share = label_counts(masks, classes), labelled_share(masks, insides)
    titles = names if len(names) == classes else [f"class {c}" for c in range(classes)]
    each = ", ".join(f"{title} {n}" for title, n in zip(titles, counts, strict=True))
    return f"Labelled: {counts.sum()} pixels, {share:.1%} of them: {each}"


def weight_line(how: str, weights: Sequence[float], counts: NDArray[np.int64]) -> str:
    """The weights balanced in the way ``how``, and of how many labelled pixels they are."""
    pairs = enumerate(zip(weights, counts, strict=True))
    each = ", ".join(f"class {c} {weight:.4g} ({n} pixels)" for c, (weight, n) in pairs)
    return f"Class weights, {how}: {each}"


def far_lines(
    masks: Sequence[Mask], names: Iterable[str], insides: Sequence[Inside] = ()
) -> list[str]:
    """A line for each partially labelled image that has pixels far from any label.

    ``insides`` are those of ``labelled_share``.
    """
    lines = []
    own = insides or [None] * len(masks)
    for mask, name, inside in zip(masks, names, own, strict=True):
        labelled = mask != IGNORED
        share = 0.0
        if not labelled.all():
            far = far_from_labels(labelled, FAR * min(mask.shape))
            share = float((far if inside is None else far[inside]).mean())
        if share >= LEAST_FAR:
            lines.append(
                f"{name}: {share:.1%} of its pixels are farther than {FAR:g} of its shorter side "
                "from any label; label some there if it looks unlike what is labelled"
            )
    more = [f"and so for {len(lines) - MOST_LINES} more images"] if lines[MOST_LINES:] else []
    return lines[:MOST_LINES] + more


def in_strokes(masks: Sequence[Mask], insides: Sequence[Inside] = ()) -> bool:
    """Whether so few pixels of the annotated images are labelled that these are strokes."""
    return 0 < labelled_share(masks, insides) < STROKES


def labelled_share(masks: Sequence[Mask], insides: Sequence[Inside] = ()) -> float:
    """Share of the pixels of the annotated images that are labelled; 0 without images.

    ``insides`` say which pixels (H, W) of each image count, None: all, which is the default.
    """
    labelled = pixels = 0
    for mask, inside in zip(masks, insides or [None] * len(masks), strict=True):
        counted = mask if inside is None else mask[inside]
        labelled, pixels = labelled + int((counted != IGNORED).sum()), pixels + counted.size
    return labelled / max(1, pixels)
