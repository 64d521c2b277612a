"""A pixel classifier as metallographers know it from Weka or ilastik: filters and a random forest.

Every pixel is described by the answers of a few filters at several widths, and a forest learns from
the pixels of the annotated images which class such an answer belongs to. It sees no shape larger
than its widest filter, learns nothing from images without labels, and is done in seconds: what
everybody would try first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from utils.metrics import IGNORED

Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.uint8]

TREES = 100
SIGMAS = (0.5, 1.0, 2.0, 4.0)  # widths of the filters, in pixels
MOST_PIXELS = 5_000  # of one class; more of them are drawn from


def pixel_features(image: Floats, sigmas: Sequence[float] = SIGMAS) -> Floats:
    """Describe every pixel of an image.

    In this order: the intensity of each channel; then for every width sigma the intensity of each
    channel blurred by a Gaussian, and of the mean over the channels the gradient's magnitude, the
    Laplacian, the larger and smaller eigenvalue of the Hessian, and of the structure tensor.

    Args:
        image: float32 (1 or 3, H, W).
        sigmas: standard deviations of the Gaussians, pixels.

    Returns:
        float32 (H, W, F), F = channels + (channels + 6) * number of sigmas; derivatives are by
        pixels.
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
        # Averaged over a window wider than the derivative, else one eigenvalue is always zero.
        tensor = [blur(p, 2 * sigma) for p in (rows * rows, rows * columns, columns * columns)]
        found += eigenvalues(*tensor)
    return np.stack(found, axis=-1, dtype=np.float32)


def blur(pixels: Floats, sigma: float) -> Floats:
    """Average over a Gaussian window of (H, W); beyond its edges the image is mirrored."""
    return np.asarray(
        cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT), np.float32
    )


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
    """A random forest of ``TREES`` trees on ``pixel_features``, scikit-learn's other defaults.

    Args:
        seed: of the trees and of the pixels drawn.
        standardize: images are normalised by the mean and deviation of their own pixels; else 255
            counts as 1.
        threads: that grow trees.
        trees: fewer, to see how long it takes; None: all.
    """

    def __init__(
        self,
        seed: int,
        standardize: bool = False,
        threads: int = 1,
        trees: int | None = None,
    ) -> None:
        self.seed, self.standardize = seed, standardize
        self.channels = 1
        self.model = RandomForestClassifier(trees or TREES, random_state=seed, n_jobs=threads)

    def fit(self, images: Sequence[NDArray[np.uint8]], masks: Sequence[Ids]) -> int:
        """Learn from annotated images, uint8 (1 or 3, H, W), and their masks (H, W).

        If none of them has colour, that of other images is not looked at.
        Pixels that nobody labelled (``IGNORED``) are left out; of a class with more than
        ``MOST_PIXELS``, that many are drawn.

        Returns:
            The number of pixels learnt from.
        """
        self.channels = max(len(image) for image in images)
        described = [self.features(image) for image in images]
        features = np.concatenate([f.reshape(-1, f.shape[-1]) for f in described])
        ids = np.concatenate([mask.ravel() for mask in masks])
        chosen = draw_pixels(ids, self.seed)
        self.model.fit(features[chosen], ids[chosen])
        # One thread: several add the trees' probabilities up in any order, and ties with them.
        self.model.set_params(n_jobs=1)
        return len(chosen)

    def features(self, image: NDArray[np.uint8]) -> Floats:
        """What is known of every pixel of an image (1 or 3, H, W): (H, W, F)."""
        pixels = with_channels(image, self.channels).astype(np.float32)
        if self.standardize:
            pixels -= pixels.mean(dtype=np.float64)
            return pixel_features(pixels / max(float(pixels.std(dtype=np.float64)), 1.0))
        return pixel_features(pixels / 255)

    def predict(self, image: NDArray[np.uint8]) -> Ids:
        """Class ids (H, W) of an image (1 or 3, H, W), of those classes that were learnt."""
        features = self.features(image)
        found = self.model.predict(features.reshape(-1, features.shape[-1]))
        return np.asarray(found.reshape(features.shape[:2]), np.uint8)


def with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """An image (1 or 3, H, W) with 1 or 3 channels: their mean, or the one three times."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.repeat(3, axis=0)
    return np.rint(image.mean(axis=0, keepdims=True)).astype(np.uint8)


def draw_pixels(ids: Ids, seed: int, most: int = MOST_PIXELS) -> NDArray[np.int64]:
    """Places of the pixels to learn from, in order: at most ``most`` of each class in ``ids``."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in np.unique(ids[ids != IGNORED]):
        places = np.flatnonzero(ids == c)
        chosen.append(places if len(places) <= most else rng.choice(places, most, replace=False))
    return np.sort(np.concatenate(chosen))


def forest_settings() -> dict[str, Any]:
    """What decides a forest's result beside the images and the seed."""
    return {"trees": TREES, "sigmas": list(SIGMAS), "most_pixels": MOST_PIXELS}
