"""Masks in which only strokes are labelled, and one value says that nobody labelled the rest."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from imaging.imagefile import Pixels

# Chosen on real sets: 599 whole masks, of which none is taken for scribbles, and 350 scribbled ones
# of 1 and 5 % (``benchmarks/scribbles.py``, strokes of 1 to 9 pixels), of which nine in ten are.
LEAST_SHARE = 0.8  # of the pixels that the value round the strokes has
SMALLEST = 10  # pixels of a value that counts
THICKEST = 0.04  # half the width of strokes, as a share of the image's shorter side
MOST_STROKES = 100  # more pieces are particles
LEAST_WHOLE = 0.9  # of the rest that hangs together: a network of boundaries cuts it into grains
TOUCHING = 0.02  # length along which strokes of different values touch, over that along the rest
# Contrast between a class and what is beside it, in standard deviations:
CONTRAST = 0.6  # strokes of some class have less, as they end anywhere
CONTRAST_TOUCHING = 1.0  # most classes have less, where strokes cross boundaries
FAR = 0.1  # from any label, as a share of the image's shorter side
GAP, RING = 1, 4  # pixels beside a stroke: those left out, and those compared with it


def unlabelled_value(ids: Pixels, image: Pixels) -> int | None:
    """The value round strokes, if a mask (H, W) looks like scribbles on its image; else None.

    ``image`` is (H, W) or (H, W, 3). Scribbles are strokes of at least two values on a third one,
    whose edges have the same gray levels on both sides: a class that was drawn in full ends where
    the image changes. Where strokes touch, because one crosses a boundary, less is enough.
    """
    rest = value_round_strokes(ids)
    if rest is None:
        return None
    others = [v for v in np.unique(ids).tolist() if v != rest]
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    smooth = cv2.GaussianBlur(gray.astype(np.float32), (0, 0), 1.0)
    beside = _grown(ids != rest, GAP) == 0
    differences = []
    for value in others:
        drawn = ids == value
        ring = _grown(drawn, RING).astype(np.bool_) & beside
        if drawn.sum() >= 2 * SMALLEST and ring.sum() >= 2 * SMALLEST:
            inside, outside = smooth[drawn], smooth[ring]
            deviation = np.sqrt((inside.var() + outside.var()) / 2) + 1
            differences.append(abs(inside.mean() - outside.mean()) / deviation)
    if _touching(ids, rest) >= TOUCHING:
        return rest if not differences or np.median(differences) < CONTRAST_TOUCHING else None
    return rest if differences and min(differences) < CONTRAST else None


def value_round_strokes(ids: Pixels) -> int | None:
    """The value of most pixels of a mask, if thin strokes of others lie on it; else None."""
    counts = np.bincount(ids.ravel(), minlength=256)
    rest = int(counts.argmax())
    others = (counts >= SMALLEST).sum() - 1
    if counts[rest] < LEAST_SHARE * ids.size or others < 2 or not _are_strokes(ids != rest):
        return None
    return rest


def far_from_labels(labelled: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """Which pixels (H, W) are farther than ``distance`` pixels from every labelled one."""
    if not labelled.any():
        return np.ones_like(labelled)
    away = cv2.distanceTransform((~labelled).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(away > distance)


def _are_strokes(drawn: NDArray[np.bool_]) -> bool:
    """Whether something is drawn in a few thin pieces that do not enclose the rest."""
    depth = cv2.distanceTransform(drawn.astype(np.uint8), cv2.DIST_L2, 5)
    middle = drawn & (depth >= cv2.dilate(depth, np.ones((3, 3), np.uint8)) - 1e-6)
    if np.quantile(depth[middle], 0.95) > THICKEST * min(drawn.shape) + 1:
        return False
    if cv2.connectedComponents(drawn.astype(np.uint8), connectivity=8)[0] - 1 > MOST_STROKES:
        return False
    pieces = cv2.connectedComponentsWithStats((~drawn).astype(np.uint8), connectivity=4)[2]
    return bool(pieces[1:, cv2.CC_STAT_AREA].max() >= LEAST_WHOLE * (~drawn).sum())


def _touching(ids: Pixels, rest: int) -> float:
    """Sides of pixels between two drawn values, over those between one of them and the rest."""
    inner = outer = 0
    for one, other in ((ids[:, 1:], ids[:, :-1]), (ids[1:], ids[:-1])):
        differ = one != other
        drawn = (one != rest) & (other != rest)
        inner += int((differ & drawn).sum())
        outer += int((differ & ~drawn).sum())
    return inner / max(1, outer)


def _grown(mask: NDArray[np.bool_], radius: int) -> Pixels:
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), disc))
