"""A pixel classifier as metallographers know it from Weka or ilastik: filters and a random forest.

The forest classifies pixels by the responses of a few filters at several scales. It sees no shape
larger than its widest filter, learns nothing from unlabelled images, and is trained in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaging.store import ImageStore
from stages.labels import Inside
from utils.metrics import IGNORED

Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.uint8]

TREES = 100
QUICK = (40, 5)  # trees, and pixels of the smallest leaf
SIGMAS = (0.5, 1.0, 2.0, 4.0)  # standard deviations of the filters, pixels
MOST_PIXELS = 5_000  # of one class for training; a class with more is sampled at random


def pixel_features(image: Floats, sigmas: Sequence[float] = SIGMAS) -> Floats:
    """Filter responses at every pixel: float32 (1 or 3, H, W) to (H, W, F).

    In this order: the intensity of each channel; then for every sigma (pixels) the intensity of
    each channel blurred by a Gaussian, and of the mean over the channels the gradient's magnitude,
    the Laplacian, the larger and smaller eigenvalue of the Hessian, and of the structure tensor
    (derivatives per pixel). F = channels + (channels + 6) * number of sigmas.
    """
    channels = image.astype(np.float32)
    gray = channels.mean(axis=0, dtype=np.float32)
    found = list(channels)
    for sigma in sigmas:
        found += [blur(channel, sigma) for channel in channels]
        smooth = blur(gray, sigma)
        rows, columns = gradient(smooth)
        found.append(np.hypot(rows, columns))
        high, low = eigenvalues(*hessian(smooth))
        found += [high + low, high, low]
        # A window wider than the derivative's, or one eigenvalue is always zero.
        tensor = [blur(p, 2 * sigma) for p in (rows * rows, rows * columns, columns * columns)]
        found += eigenvalues(*tensor)
    return np.stack(found, axis=-1, dtype=np.float32)


def blur(pixels: Floats, sigma: float) -> Floats:
    """Gaussian blur of (H, W); beyond its edges the image is mirrored."""
    smooth = cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return np.asarray(smooth, np.float32)


def gradient(pixels: Floats) -> tuple[Floats, Floats]:
    """First derivatives of (H, W) along rows (downwards) and columns, by central differences."""
    p = np.pad(pixels, 1, mode="symmetric")
    return (p[2:, 1:-1] - p[:-2, 1:-1]) / 2, (p[1:-1, 2:] - p[1:-1, :-2]) / 2


def hessian(pixels: Floats) -> tuple[Floats, Floats, Floats]:
    """Second derivatives of (H, W): along rows, mixed, along columns."""
    p = np.pad(pixels, 1, mode="symmetric")
    middle = 2 * pixels
    mixed = (p[2:, 2:] + p[:-2, :-2] - p[2:, :-2] - p[:-2, 2:]) / 4
    return p[2:, 1:-1] - middle + p[:-2, 1:-1], mixed, p[1:-1, 2:] - middle + p[1:-1, :-2]


def eigenvalues(a: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats]:
    """Larger and smaller eigenvalue of the symmetric matrices [[a, b], [b, c]], each (H, W)."""
    centre, radius = (a + c) / 2, np.hypot((a - c) / 2, b)
    return centre + radius, centre - radius


class PixelForest:
    """A random forest of ``TREES`` trees on ``pixel_features``, else with scikit-learn's defaults.

    ``seed`` is that of the trees and of the pixels drawn. ``standardize``: images are normalised by
    the mean and standard deviation of the pixels that count; else gray 255 becomes 1. ``quick``: 40
    trees whose leaves hold at least 5 pixels, which decide in a third of the time.
    """

    def __init__(
        self, seed: int, standardize: bool = False, threads: int = 1, quick: bool = False
    ) -> None:
        self.seed, self.standardize, self.channels = seed, standardize, 1
        trees, least = QUICK if quick else (TREES, 1)
        # Here, as every training imports this module and few make a forest: 0.6 s.
        from sklearn.ensemble import RandomForestClassifier

        self.model = RandomForestClassifier(
            trees, min_samples_leaf=least, random_state=seed, n_jobs=threads
        )

    def fit(
        self,
        images: Sequence[NDArray[np.uint8]],
        masks: Sequence[Ids],
        insides: Sequence[Inside] = (),
    ) -> int:
        """Train on images (1 or 3, H, W) and masks (H, W); returns the number of pixels used.

        ``insides`` are those of ``features``, by default all None. If no image has colour, colour
        images are predicted by the mean of their channels.
        """
        self.channels = max(len(image) for image in images)
        own = zip(images, insides or [None] * len(images), strict=True)
        described = [self.features(image, inside) for image, inside in own]
        features = np.concatenate([f.reshape(-1, f.shape[-1]) for f in described])
        ids = np.concatenate([mask.ravel() for mask in masks])
        chosen = draw_pixels(ids, self.seed)
        self.model.fit(features[chosen], ids[chosen])
        # Several threads add up the trees' probabilities in any order, and ties depend on it.
        self.model.set_params(n_jobs=1)
        return len(chosen)

    def features(self, image: NDArray[np.uint8], inside: Inside = None) -> Floats:
        """``pixel_features`` (H, W, F) of an image (1 or 3, H, W), normalised.

        Pixels where ``inside``, bool (H, W), is False do not count for that; None: all do.
        """
        pixels = with_channels(image, self.channels).astype(np.float32)
        if self.standardize:
            counted: Any = ... if inside is None else (slice(None), inside)
            pixels -= pixels[counted].mean(dtype=np.float64)
            return pixel_features(pixels / max(float(pixels[counted].std(dtype=np.float64)), 1.0))
        return pixel_features(pixels / 255)

    def probabilities(
        self, image: NDArray[np.uint8], num_classes: int, inside: Inside = None
    ) -> NDArray[np.float32]:
        """Class probabilities (C, H, W) of an image (1 or 3, H, W); 0 of classes never trained."""
        features = self.features(image, inside)
        found = self._shares(features)
        shares = np.zeros((num_classes, found.shape[0]), np.float32)
        shares[self.model.classes_] = found.T
        return shares.reshape(num_classes, *features.shape[:2])

    def predict(self, image: NDArray[np.uint8], inside: Inside = None) -> Ids:
        """Class ids (H, W) of an image (1 or 3, H, W), among those of the training masks."""
        features = self.features(image, inside)
        found = self.model.classes_[self._shares(features).argmax(axis=1)]
        return np.asarray(found.reshape(features.shape[:2]), np.uint8)

    def _shares(self, features: Floats) -> NDArray[np.float64]:
        """Probabilities of the classes learnt (H * W, classes) of features (H, W, F).

        The same sum over the trees, in the same order, as scikit-learn's ``predict_proba``, whose
        checks and calls, tree by tree, take most of the time where images are small.
        """
        pixels = np.ascontiguousarray(features.reshape(-1, features.shape[-1]), np.float32)
        found = np.zeros((len(pixels), len(self.model.classes_)))
        for tree in self.model.estimators_:
            found += tree.tree_.predict(pixels)
        return found / len(self.model.estimators_)


def pixels_of(store: ImageStore, image: Path) -> tuple[NDArray[np.uint8], Inside]:
    """An image (1 or 3, H, W) of a store, and which of its pixels count; DataError."""
    inside = store.inside(image)
    return store.image(image).numpy(), None if inside is None else inside.numpy()


def with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """An image (1 or 3, H, W) with 1 or 3 channels: their mean, or the one three times."""
    if len(image) > channels:
        return np.rint(image.mean(axis=0, keepdims=True)).astype(np.uint8)
    return image.repeat(channels // len(image), axis=0)


def draw_pixels(ids: Ids, seed: int, most: int = MOST_PIXELS) -> NDArray[np.int64]:
    """Indices of the training pixels: at most ``most`` labelled ones of each class."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in np.unique(ids[ids != IGNORED]):
        found = np.flatnonzero(ids == c)
        chosen.append(found if len(found) <= most else rng.choice(found, most, replace=False))
    return np.sort(np.concatenate(chosen))


def forest_settings() -> dict[str, Any]:
    """The forest's own settings, JSON-able."""
    return {"trees": TREES, "sigmas": list(SIGMAS), "most_pixels": MOST_PIXELS}
