"""Masks with a black and white file for each class, joined to class ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imaging.imagefile import Array, Pixels
from utils.files import DataError


def join_classes(files: Sequence[tuple[int, str, Array]]) -> tuple[Pixels, int]:
    """Class ids, uint8 (H, W), from (id, path, pixels) of each class; how many pixels have two.

    The class is where a file is brighter than half its highest value. Pixels of two classes get the
    one with fewer pixels in the image, those of none 0. Raises DataError: sizes differ.
    """
    masks: list[tuple[int, Array]] = []
    for label, path, pixels in files:
        gray = pixels.max(axis=2) if pixels.ndim == 3 else pixels
        if masks and gray.shape != masks[0][1].shape:
            (height, width), (h, w) = gray.shape, masks[0][1].shape
            found = f"{path}: {width}x{height}, another file of the same image is {w}x{h}"
            raise DataError(f"{found}; export both again")
        masks.append((label, gray > max(0, gray.max()) / 2))
    ids = np.zeros(masks[0][1].shape, np.uint8)
    by_class: dict[int, Array] = {}
    for label, mask in masks:  # several files of one class are one
        by_class[label] = by_class[label] | mask if label in by_class else mask
    for label, mask in sorted(by_class.items(), key=lambda one: -int(one[1].sum())):
        ids[mask] = label
    return ids, int((np.sum(list(by_class.values()), axis=0) > 1).sum())
