"""Values of masks against a slow twin: one int64 a pixel, and everything by sorting them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from annotation.edges import assign_edges, flat
from dataset import mask_values, set_masks
from dataset.mask_values import By, MaskRule, filling, histogram_of, to_codes, values_of
from imaging.imagefile import has_colour
from tests.masks import blobs
from utils.files import DataError

PATH = Path("mask.png")


def slow_codes(pixels: np.ndarray, colours: bool) -> np.ndarray:
    if pixels.dtype.kind == "f":
        pixels = np.where(np.isnan(pixels), -1.0, pixels)
        broken = pixels[(pixels != np.round(pixels)) | (np.abs(pixels) > 2.0**53)]
        if broken.size:
            value = f"{PATH}: value {broken.flat[0]:g} in a mask"
            raise DataError(f"{value}; values must be whole numbers: threshold or round it")
    values = pixels.astype(np.int64)
    if not colours and not has_colour(values):
        return values if values.ndim == 2 else values[..., 0]
    if values.min() < 0 or values.max() > 65535:
        value = values.min() if values.min() < 0 else values.max()
        raise DataError(f"{PATH}: value {value} among coloured masks; save it in colours too")
    red, green, blue = (values, values, values) if values.ndim == 2 else np.moveaxis(values, 2, 0)
    return np.asarray(red << 32 | green << 16 | blue)


def slow_histogram(codes: np.ndarray) -> Counter[int]:
    distinct, counts = np.unique(codes, return_counts=True)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def slow_filling(codes: np.ndarray, colours: bool, tolerance: int) -> set[int]:
    values = values_of(codes.ravel(), colours).reshape(*codes.shape, -1)
    return set(np.unique(codes[flat(values, tolerance)]).tolist())


def slow_assign(rule: MaskRule, codes: np.ndarray) -> tuple[np.ndarray, ...]:
    distinct, where = np.unique(codes, return_inverse=True)
    where = where.reshape(codes.shape)
    values = values_of(distinct, rule.colours)
    levels = np.array([value for _, value in rule.palette], np.int64)
    far = np.abs(values[:, None] - levels).max(axis=2)  # (N, L)
    entry, distance = far.argmin(axis=1), far.min(axis=1)
    labels = np.array([label for label, _ in rule.palette], np.uint8)
    nearest, within = entry[where], (distance <= rule.tolerance)[where]
    if not rule.tolerance and within.all():
        return labels[nearest], ~within, ~within
    values = values_of(codes.ravel(), rule.colours).reshape(*codes.shape, -1)
    given, strange = assign_edges(values, nearest, within, levels, rule.tolerance)
    return labels[given], (given != nearest) | ~within & ~strange, strange


def slow_pieces(codes: np.ndarray, numbers: np.ndarray) -> int:
    """How many of the numbers are one region each."""
    return sum(
        cv2.connectedComponents((codes == n).astype(np.uint8), connectivity=8)[0] == 2
        for n in numbers.tolist()
    )


def slow_numbers(codes: np.ndarray) -> bool | None:
    numbers = np.unique(codes[codes > 0])
    if len(numbers) < 8:
        return None
    numbers = numbers[:: max(1, len(numbers) // 300)]
    return slow_pieces(codes, numbers) >= 0.9 * len(numbers)


def slow_few(codes: np.ndarray, colours: bool) -> int:
    numbers = np.unique(codes[(codes > 0) & (colours | (codes != 255))])
    if not 2 <= len(numbers) <= (32 if colours else 7) or not (codes == 0).any():
        return 0
    return len(numbers) if slow_pieces(codes, numbers) == len(numbers) else 0


def classes(seed: int) -> np.ndarray:
    """Three classes, (60, 47), in patches and as dots."""
    rng = np.random.default_rng(seed)
    ids = blobs(seed, (60, 47)).astype(np.int64)
    ids[blobs(seed + 50, (60, 47), 0.2)] = 2
    return np.where(rng.random(ids.shape) < 0.01, rng.integers(0, 3, ids.shape), ids)


def blurred(levels: np.ndarray, seed: int) -> np.ndarray:
    pixels = cv2.GaussianBlur(levels[classes(seed)].astype(np.float32), (5, 5), 0.8)
    return np.rint(pixels).astype(levels.dtype)


def noise(seed: int, dtype: type, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


def grains(dtype: type) -> np.ndarray:
    """Numbered particles: squares of 4x4 pixels, some of them cut in two."""
    numbers: np.ndarray = np.arange(1, 181).reshape(15, 12).astype(dtype)
    numbers[3] = numbers[2]
    whole = np.kron(numbers, np.ones((4, 4), dtype))
    whole[::4], whole[:, ::4] = 0, 0
    return whole


def two_of_three(_: int) -> np.ndarray:
    """Two whole pieces, 1 and 2, and what has no label (255), which is in two."""
    return np.kron(np.array([[0, 1, 0, 255], [0, 2, 0, 0], [255, 0, 0, 0]]), np.ones((4, 4), int))


GRAY, DEEP = np.array([0, 128, 255], np.uint8), np.array([0, 700, 65535], np.uint16)
RGB = np.array([(0, 0, 0), (255, 0, 0), (255, 255, 0)], np.uint8)
# What a mask holds by a seed, and the values of its classes.
MASKS: dict[str, tuple[Callable[[int], np.ndarray], np.ndarray]] = {
    "8 bits": (lambda seed: GRAY[classes(seed)], GRAY),
    "turned": (lambda seed: GRAY[classes(seed)].T[::-1], GRAY),
    "random 8 bits": (lambda seed: noise(seed, np.uint8, 50, 41), GRAY),
    "blurred 8 bits": (lambda seed: blurred(GRAY, seed), GRAY),
    "16 bits": (lambda seed: DEEP[classes(seed)], DEEP),
    "big-endian": (lambda seed: DEEP[classes(seed)].astype(">u2"), DEEP),
    "random 16 bits": (lambda seed: noise(seed, np.uint16, 50, 41), DEEP),
    "blurred 16 bits": (lambda seed: blurred(DEEP, seed), DEEP),
    "colours": (lambda seed: RGB[classes(seed)], RGB),
    "blurred colours": (lambda seed: blurred(RGB, seed), RGB),
    "random colours": (lambda seed: noise(seed, np.uint8, 30, 41, 3), RGB),
    "16-bit colours": (lambda seed: (RGB * np.uint16(257))[classes(seed)], RGB.astype(int) * 257),
    "three equal channels": (lambda seed: np.repeat(GRAY[classes(seed)][..., None], 3, 2), GRAY),
    "bits": (lambda seed: classes(seed) > 0, np.array([0, 1])),
    "below zero": (lambda seed: classes(seed).astype(np.int16) - 1, np.array([-1, 0, 1])),
    "int32": (lambda seed: classes(seed).astype(np.int32) * 70000, np.array([0, 70000, 140000])),
    "uint64": (lambda seed: classes(seed).astype(np.uint64), np.array([0, 1, 2])),
    "floats with gaps": (
        lambda seed: np.where(classes(seed) == 2, np.nan, classes(seed)),
        np.array([-1, 0, 1]),
    ),
    "fractions": (lambda seed: (classes(seed) * 0.5).astype(np.float32), GRAY),
    "float colours": (lambda seed: RGB[classes(seed)].astype(np.float32), RGB),
    "grains": (lambda seed: grains(np.uint8), GRAY),
    "deep grains": (lambda seed: grains(np.uint16) * np.uint16(300), GRAY),
    "two of three": (two_of_three, GRAY),
    "whole grains": (lambda seed: grains(np.int32) * (grains(np.int32) < 25), GRAY),
}


@pytest.mark.parametrize("band", [1, 500])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("as_colours", [False, True])
def test_codes_counts_and_classes_are_those_of_the_slow_twin(
    monkeypatch: pytest.MonkeyPatch, name: str, as_colours: bool, band: int
) -> None:
    monkeypatch.setattr(mask_values, "_BAND", band)
    make, values = MASKS[name]
    for seed in range(2):
        pixels: np.ndarray = make(seed)
        colours = as_colours or has_colour(pixels)
        try:
            expected = slow_codes(pixels, colours)
        except DataError as error:
            with pytest.raises(DataError) as caught:
                to_codes(PATH, pixels, colours)
            assert str(caught.value) == str(error)
            continue
        codes = to_codes(PATH, pixels, colours)
        np.testing.assert_array_equal(codes, expected)
        assert codes.dtype == pixels.dtype or codes.dtype == np.int64
        own = histogram_of(codes)
        assert list(own.items()) == list(slow_histogram(expected).items())
        some = blobs(seed, codes.shape)
        assert list(histogram_of(codes[some]).items()) == list(
            slow_histogram(expected[some]).items()
        )
        read = partial(np.asarray, codes)
        assert set_masks.numbers_particles(own, read) == slow_numbers(expected)
        assert set_masks.few_pieces(own, read, colours) == slow_few(expected, colours)
        entries = [tuple(np.atleast_1d(value).tolist()) for value in values]
        if colours:
            entries = [value * 3 if len(value) == 1 else value for value in entries]
        for tolerance in (0, 12):
            found = filling(codes, colours, tolerance)
            assert found == slow_filling(expected, colours, tolerance)
            for palette in ([*enumerate(entries)], [*enumerate(entries[:2])], [(255, entries[1])]):
                rule = MaskRule(colours, palette, tolerance, By.PALETTE, "")
                for one, other in zip(rule.assign(codes), slow_assign(rule, expected), strict=True):
                    np.testing.assert_array_equal(one, other)
                    assert one.dtype == other.dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_levels_of_8_and_16_bits_are_not_copied(dtype: type) -> None:
    pixels: np.ndarray = np.zeros((5, 4), dtype)
    assert np.shares_memory(to_codes(PATH, pixels, False), pixels)
    assert histogram_of(pixels[:0]) == Counter()
