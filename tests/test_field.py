"""What is cut off the edges of an image: sizes and places counted by hand."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from imaging.field import (
    Crop,
    FieldRule,
    filled,
    read_crop,
    read_visible,
    resized_field,
    transparent,
)
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


# ---------------------------------------------------------------- transparency, region of interest


def see_through(path: Path, alpha: np.ndarray, **how: object) -> Path:
    gray = np.full(alpha.shape, 100, np.uint8)
    Image.fromarray(np.dstack([gray, gray, gray, alpha])).save(path, **how)
    return path


def test_transparent_pixels_are_found(tmp_path: Path) -> None:
    alpha = np.full((20, 30), 255, np.uint8)
    alpha[:5], alpha[5] = 0, 128  # half transparent ones can be seen
    for name in ("a.png", "a.tif", "a.webp"):
        clear = transparent(see_through(tmp_path / name, alpha, lossless=True))
        assert clear is not None and (clear == (alpha == 0)).all(), name


def test_transparency_of_more_pixels_than_are_read_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = np.zeros((6, 8), np.uint8)
    clear[:2] = 255
    Image.fromarray(np.dstack([clear, clear]), "LA").save(tmp_path / "a.png")
    assert transparent(tmp_path / "a.png") is not None
    monkeypatch.setattr("imaging.imagefile.MAX_PIXELS", 40)
    assert transparent(tmp_path / "a.png") is None


def test_what_shows_no_transparency_is_all_field(tmp_path: Path) -> None:
    for value in (0, 255):  # a writer that sets all to 0 did not mean it
        alpha = np.full((20, 30), value, np.uint8)
        assert transparent(see_through(tmp_path / "a.png", alpha)) is None
    Image.fromarray(alpha).save(tmp_path / "gray.jpg")
    assert transparent(tmp_path / "gray.jpg") is None
    assert transparent(tmp_path / "none.png") is None


def test_hidden_pixels_become_their_nearest_visible_one(tmp_path: Path) -> None:
    pixels = np.array([[7, 50, 51, 52, 53, 9]], np.uint8)
    inside = pixels < 10
    found = filled(pixels, inside)
    assert found.tolist() == [[7, 7, 7, 9, 9, 9]]
    colours = np.dstack([pixels, 2 * pixels])
    assert (filled(colours, inside)[..., 1] == 2 * found).all()
    assert filled(pixels, None) is pixels
    assert filled(pixels, np.zeros_like(inside)) is pixels  # nothing to take
    Image.fromarray(np.dstack([pixels, np.where(inside, 255, 0).astype(np.uint8)]), "LA").save(
        tmp_path / "a.png"
    )
    read, seen = read_visible(tmp_path / "a.png")
    assert (read == found).all() and seen is not None and (seen == inside).all()


def test_more_than_8_bits_get_their_range_from_what_is_visible(tmp_path: Path) -> None:
    for hidden in (0, 60000):
        pixels = np.tile(np.uint16([1000, 1100, 1200, 1300]), (4, 1))
        alpha = np.full_like(pixels, 65535)
        pixels[0], alpha[0] = hidden, 0
        stored = cv2.imencode(".png", np.dstack([pixels] * 3 + [alpha]))[1]
        (tmp_path / "a.png").write_bytes(stored.tobytes())
        read, _ = read_visible(tmp_path / "a.png")
        assert read[1:].tolist() == [[0, 85, 170, 255]] * 3  # 300 levels on 255


def test_a_smaller_pixel_counts_if_half_of_it_does() -> None:
    inside = np.zeros((4, 6), bool)
    inside[:2, :2] = inside[0, 2:4] = inside[2, 4] = True  # 4, 2 and 1 of 4 pixels
    small = resized_field(inside, (2, 3))
    assert small is not None and small.tolist() == [[True, True, False], [False, False, False]]
    inside[:2] = False
    last = resized_field(inside, (2, 3))  # none has half: what has some
    assert last is not None and last.tolist() == [[False, False, False], [False, False, True]]


def test_crop_region_and_transparency_add_up(tmp_path: Path) -> None:
    alpha = np.full((40, 50), 255, np.uint8)
    alpha[:, 45:] = 0
    image = see_through(tmp_path / "a.png", alpha)
    region = np.full((40, 50), 255, np.uint8)
    region[:, :10] = 0
    (tmp_path / "roi").mkdir()
    Image.fromarray(region).save(tmp_path / "roi" / "a.png")
    rule = FieldRule(Crop(bottom=8), roi=tmp_path / "roi")
    expected = np.zeros((40, 50), bool)
    expected[32:] = expected[:, :10] = expected[:, 45:] = True
    np.testing.assert_array_equal(rule.outside(image, "a", (40, 50)), expected)
    alone = rule.outside(tmp_path / "b.png", "b", (40, 50))  # no region of its own
    assert np.count_nonzero(alone) == 8 * 50
    assert FieldRule().outside(tmp_path / "b.png", "b", (40, 50)) is None


def test_images_that_are_cut_already_are_not_cut_again() -> None:
    rule = FieldRule(Crop(bottom=8), frozenset({(32, 50)}))
    assert rule.crop_of((40, 50)) == Crop(bottom=8) and rule.crop_of((32, 50)) == Crop()


def test_a_region_that_does_not_fit_or_is_empty_is_one_line(tmp_path: Path) -> None:
    rule = FieldRule(roi=tmp_path)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: 5x4, its image is 50x40"):
        rule.outside(tmp_path / "x.png", "a", (40, 50))
    with pytest.raises(DataError, match="nothing of it is inside the field"):
        rule.outside(tmp_path / "x.png", "a", (4, 5))


def test_a_region_is_found_in_another_unicode_form_and_with_a_suffix_in_capitals(
    tmp_path: Path,
) -> None:
    rule = FieldRule(roi=tmp_path)
    region = np.ones((40, 50), np.uint8)
    region[:4] = 0
    with open(tmp_path / f"{unicodedata.normalize('NFD', 'Prüf')}.PNG", "wb") as file:
        Image.fromarray(region).save(file, "png")
    outside = rule.outside(tmp_path / "Prüf.tif", "Prüf", (40, 50))
    assert np.count_nonzero(outside) == 4 * 50 and not rule.lacks_region("Prüf")


def test_what_decides_the_field_is_remembered(tmp_path: Path) -> None:
    assert FieldRule().state("a") == {}
    rule = FieldRule(Crop(bottom=8), roi=tmp_path)
    assert rule.state("a") == {"crop": "0,8,0,0"}
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    assert rule.state("a").keys() == {"crop", "roi"}
