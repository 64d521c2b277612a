"""What is cut off the edges of an image: sizes and places counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from imaging.field import Crop, read_crop
from utils.files import DataError


def test_a_crop_is_read_as_it_is_written() -> None:
    assert read_crop("1, 2,3,4") == Crop(top=1, bottom=2, left=3, right=4)
    assert str(Crop(1, 2, 3, 4)) == "1,2,3,4"
    assert Crop(0, 60, 0, 2).words() == "60 rows at the bottom, 2 columns on the right"


@pytest.mark.parametrize(
    "words", ["", "60", "0,60", "0,-1,0,0", "a,b,c,d", "1,2,3,4,5", "1e9,0,0,0"]
)
def test_another_text_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(DataError, match="give four numbers top,bottom,left,right") as caught:
        read_crop(words)
    assert "\n" not in str(caught.value)


def test_what_is_left_and_where_it_was() -> None:
    pixels = np.arange(30 * 40).reshape(30, 40)
    crop = Crop(top=1, bottom=3, left=5, right=2)
    left = crop.of(pixels)
    assert left.shape == crop.size(pixels.shape) == (26, 33)
    assert left[0, 0] == 1 * 40 + 5 and left[-1, -1] == 26 * 40 + 37
    whole = crop.back(left, pixels.shape, 0)
    assert whole.shape == (30, 40) and whole[1, 5] == 45 and whole[26, 37] == 1077
    assert whole[0].tolist() == [0] * 40 and whole[27:].sum() == 0
    assert whole[:, :5].sum() == 0 and whole[:, 38:].sum() == 0


def test_no_crop_takes_any_image_as_it_is() -> None:
    tiny = np.zeros((3, 5, 3), np.uint8)
    assert Crop().of(tiny).shape == (3, 5, 3) and Crop().back(tiny, tiny.shape, 255) is tiny


@pytest.mark.parametrize("crop", [Crop(0, 30, 0, 0), Crop(10, 10, 0, 0), Crop(0, 0, 25, 0)])
def test_a_crop_that_leaves_too_little_is_refused(crop: Crop) -> None:
    with pytest.raises(DataError, match=f"40x30 pixels, of which --crop {crop} leaves"):
        crop.of(np.zeros((30, 40), np.uint8))
