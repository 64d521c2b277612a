"""Data bars: heights that were drawn, and pictures that have none."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from imaging import data_bar
from imaging.data_bar import Bar, find_bars
from imaging.field import Crop
from imaging.imagefile import read_image

FONT = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def micrograph(seed: int = 0, height: int = 200, width: int = 300) -> np.ndarray:
    """Bright discs in a gray matrix, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width), 120.0)
    for _ in range(25):
        cy, cx, r = rng.integers(height), rng.integers(width), rng.integers(5, 20)
        pixels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = 190
    return np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


def strip(height: int, width: int, paper: int, words: str = "20 kV  x500  10 µm") -> np.ndarray:
    """A strip of one level with words and a scale bar in black or white."""
    picture, ink = Image.new("L", (width, height), paper), 0 if paper > 127 else 255
    draw = ImageDraw.Draw(picture)
    draw.text((6, height // 5), words, fill=ink, font=ImageFont.truetype(FONT, height // 2))
    draw.rectangle([width - 50, height // 2, width - 10, height // 2 + 2], fill=ink)
    return np.asarray(picture)


@pytest.mark.parametrize("paper", [255, 0, 90, 110, 120, 126, 160, 190])
def test_bars_of_every_gray_are_found_to_the_row(paper: int) -> None:
    """Those of the matrix, 120, and of the discs, 190, too."""
    image = np.vstack([micrograph(), strip(26, 300, paper)])
    assert find_bars(image) == [Bar("bottom", 26)]
    assert find_bars(image[::-1]) == [Bar("top", 26)]
    assert find_bars(image.T) == [Bar("right", 26)]
    assert find_bars(np.repeat(image[..., None], 3, axis=2)) == [Bar("bottom", 26)]


def test_a_bar_with_a_frame_and_rules() -> None:
    bar = strip(40, 300, 0).copy()
    bar[[0, 20, 39]] = 255
    bar[:, [0, 100, 299]] = 255
    [found] = find_bars(np.vstack([micrograph(), bar]))
    assert found.edge == "bottom" and abs(found.pixels - 40) <= 1


@pytest.mark.parametrize(("printed", "found"), [(3, 23), (4, 24), (5, 0)])
def test_print_may_fill_the_last_rows_of_a_bar_up_to_the_width_of_a_rule(
    printed: int, found: int
) -> None:
    """20 rows of white paper, then rows of which half is black, next to the image.

    Of the last 5 rows (a rule's 4 and one) one must be paper for 0.7 of its width, which the half
    printed are not: with 4 of them the fifth from the end is, with 5 of them none.
    """
    bar = np.full((20 + printed, 300), 255, np.uint8)
    bar[:printed, :150] = 0
    bars = [Bar("bottom", found)] if found else []
    assert find_bars(np.vstack([micrograph(), bar])) == bars


def test_colours_become_the_mean_of_their_channels_rounded_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All 766 sums of three channels, in two orders, and pictures whose bars are the same."""
    first = np.minimum(np.arange(766), 255)
    second = np.minimum(np.arange(766) - first, 255)
    sums = np.stack([first, second, np.arange(766) - first - second], 1).astype(np.uint8)[None]
    for colours in (sums, sums[..., ::-1]):
        assert data_bar._gray(colours).tolist() == [[n // 3 for n in range(766)]]
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (60, 80, 3), np.uint8) for _ in range(10)]
    for seed in range(20):
        paper, tint = int(rng.integers(256)), rng.integers(-3, 4, 3)
        gray = np.vstack([micrograph(seed, 100, 150), strip(int(rng.integers(8, 40)), 150, paper)])
        noise = rng.integers(-2, 3, (*gray.shape, 3)) * (seed % 2)
        pictures.append(np.clip(gray[..., None] + tint + noise, 0, 255).astype(np.uint8))
        pictures.append(np.rot90(pictures[-1], seed % 4))
    bars = [find_bars(picture) for picture in pictures]
    assert sum(map(bool, bars)) >= 20
    monkeypatch.setattr(data_bar, "_gray", lambda image: image.mean(axis=2).astype(np.uint8))
    assert [find_bars(picture) for picture in pictures] == bars


def test_a_bar_in_a_jpeg() -> None:
    file = io.BytesIO()
    image = np.vstack([micrograph(), strip(40, 300, 255)])
    Image.fromarray(image).save(file, "JPEG", quality=85)
    [found] = find_bars(np.asarray(Image.open(file)))
    assert found.edge == "bottom" and abs(found.pixels - 40) <= 1


def test_an_empty_strip_is_one_too() -> None:
    image = np.vstack([micrograph(), np.full((20, 300), 255, np.uint8)])
    assert find_bars(image) == [Bar("bottom", 20)]


def test_what_cuts_it_off() -> None:
    bar = Bar("bottom", 26)
    assert bar.crop == Crop(bottom=26) and bar.words == "26 rows at the bottom"
    image = np.vstack([micrograph(), strip(26, 300, 0)])
    np.testing.assert_array_equal(bar.crop.of(image), micrograph())
    assert find_bars(bar.crop.of(image)) == []


def saturated() -> np.ndarray:
    """A picture whose lower third is black, with an edge that waves by 20 rows."""
    image, x = micrograph().copy(), np.arange(300)
    edge = 140 + 10 * np.sin(x / 20)
    image[np.arange(200)[:, None] > edge] = 0
    return image


@pytest.mark.parametrize(
    "image",
    [
        micrograph(),
        np.full((200, 300), 255, np.uint8),  # all of one level: no bar, no image
        saturated(),
        np.tile(np.linspace(0, 255, 200).astype(np.uint8)[:, None], (1, 300)),
        np.zeros((5, 300), np.uint8),
        np.zeros((300, 5), np.uint8),
    ],
    ids=["discs", "blank", "saturated", "ramp", "flat", "narrow"],
)
def test_what_is_no_bar(image: np.ndarray) -> None:
    assert find_bars(image) == []


@pytest.mark.skipif("PSCL_DATA" not in os.environ, reason="needs the real images of PSCL_DATA")
def test_no_real_micrograph_has_one() -> None:
    images = sorted(Path(os.environ["PSCL_DATA"]).glob("*/test_numf/img/*"))
    assert images and [path for path in images if find_bars(read_image(path))] == []
