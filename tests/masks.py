"""Masks of one class for tests: boxes, discs, random textures."""

from __future__ import annotations

import numpy as np


def field(height: int = 100, width: int = 100, *boxes: tuple[int, int, int, int]):
    """A field with rectangles (top, left, height, width)."""
    binary = np.zeros((height, width), bool)
    for top, left, h, w in boxes:
        binary[top : top + h, left : left + w] = True
    return binary


def disc(side: int, radius: float):
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return x**2 + y**2 <= radius**2


def blobs(seed: int, shape=(90, 120), share=0.35):
    """A random texture with particles of many shapes, holes, and noise."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=shape)
    for axis in (0, 1):
        noise = sum(np.roll(noise, k, axis) for k in range(-2, 3))
    return noise > np.quantile(noise, 1 - share)
