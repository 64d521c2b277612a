"""The plot of single values: dots where they belong, looked for by their colour."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from report.dots import dots_png, value_range

FIRST, SECOND = (0, 114, 178), (230, 159, 0)


def picture(panels: list[tuple[str, list[tuple[str, dict[int, float]]]]]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(dots_png(panels))).convert("RGB")).astype(int)


def places(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of pixels of a colour, the legend at the bottom left out."""
    near = (abs(pixels[:-45] - colour) < 12).all(axis=-1)
    rows, columns = np.nonzero(near)
    return rows, columns


def test_the_larger_value_is_further_right_and_in_its_row() -> None:
    rows = [("one method", {0: 0.2, 1: 0.8}), ("another", {0: 0.5})]
    pixels = picture([("Dice", rows)])
    y0, x0 = places(pixels, FIRST)
    y1, x1 = places(pixels, SECOND)
    upper = y0 < np.median(y1) + 15  # the first row, as the only dot of the second colour shows
    assert x0[upper].mean() < x0[~upper].mean() < x1.mean()
    assert y0[~upper].mean() > y1.mean() + 20
    # 0.5 lies half way between 0.2 and 0.8.
    assert abs(x0[~upper].mean() - (x0[upper].mean() + x1.mean()) / 2) < 1.5


def test_panels_share_the_axis() -> None:
    pixels = picture([("a", [("m", {0: 0.3})]), ("b", [("m", {0: 0.3, 1: 0.9})])])
    _, columns = places(pixels, FIRST)
    left, right = columns[columns < columns.mean()], columns[columns > columns.mean()]
    assert abs((right.mean() - left.mean()) - (440 + 48)) < 1.5  # one panel's width and margins


def test_nothing_finished_and_values_that_are_not_known() -> None:
    assert picture([("a", [("m", {})])]).shape[2] == 3
    pixels = picture([("a", [("m", {0: math.nan, 1: 0.5})])])
    assert not len(places(pixels, FIRST)[0]) and len(places(pixels, SECOND)[0])


def test_the_axis_holds_all_values() -> None:
    assert value_range([]) == (0, 1)
    low, high = value_range([0.3, 0.5])
    assert 0.2 < low < 0.3 and 0.5 < high < 0.6
    assert value_range([0.0, 1.0]) == (0, 1)
    low, high = value_range([0.4])
    assert low < 0.4 < high


def test_the_same_values_give_the_same_bytes() -> None:
    panels = [("a", [("m", {0: 0.1, 1: 0.2})])]
    assert dots_png(panels) == dots_png(panels)
