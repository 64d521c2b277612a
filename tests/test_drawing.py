"""Pictures, judged pixel by pixel against what was drawn by hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from imaging import drawing
from imaging.drawing import (
    class_colours,
    colour_mask,
    legend,
    palette,
    save_prediction,
    text_length,
    text_line,
    write_png,
)
from utils.commandline import UserError


@pytest.mark.parametrize("num_classes", [1, 2, 8, 9, 40, 256])
def test_every_class_has_a_colour_of_its_own(num_classes: int) -> None:
    colours = palette(num_classes)
    assert colours.dtype == np.uint8 and colours.shape == (num_classes, 3)
    assert len({tuple(c) for c in colours.tolist()}) == num_classes
    assert palette(256)[:num_classes].tolist() == colours.tolist()  # a class keeps its colour


def test_colours_differ_for_readers_without_red_or_green() -> None:
    # Machado et al. 2009, full deuteranopia and protanopia, on linear RGB.
    deuteranopia = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    protanopia = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    linear = (palette(6) / 255.0) ** 2.2
    for matrix in (deuteranopia, protanopia):
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        gaps = [np.linalg.norm(seen[a] - seen[b]) for a in range(6) for b in range(a)]
        assert min(gaps) > 0.15


def test_a_mask_is_coloured_pixel_by_pixel() -> None:
    mask = np.array([[0, 1, 2], [3, 9, 0]], dtype=np.uint8)
    coloured = colour_mask(mask, 10)
    assert coloured.dtype == np.uint8 and coloured.shape == (2, 3, 3)
    for y in range(2):
        for x in range(3):
            assert coloured[y, x].tolist() == palette(10)[mask[y, x]].tolist()


@pytest.mark.parametrize("wrong", [-1, 4, 254])
def test_an_id_that_is_no_class_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"class id {wrong}; "):
        colour_mask(np.array([[0, wrong]]), 4)
    with pytest.raises(ValueError, match="integers"):
        colour_mask(np.zeros((2, 2)), 4)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a.png", "a.png"),
        ("a.JPG", "a.png"),
        ("15_s7_0.5_x.tif", "15_s7_0.5_x.png"),
        ("15_s7_0.5_x", "15_s7_0.5_x.png"),
        ("钢 µ.bmp", "钢 µ.png"),
    ],
)
def test_a_prediction_is_a_lossless_gray_png(tmp_path: Path, name: str, written: str) -> None:
    mask = np.random.default_rng(0).integers(0, 4, (13, 21))
    path = save_prediction(tmp_path / "epoch_199" / name, mask, (0, 128, 64, 255))
    assert path == tmp_path / "epoch_199" / written
    encoded = np.frombuffer(path.read_bytes(), np.uint8)
    pixels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)  # another reader than the writer
    assert pixels is not None and pixels.dtype == np.uint8 and pixels.ndim == 2
    for gray, ids in ((0, 0), (128, 1), (64, 2), (255, 3)):
        assert ((pixels == gray) == (mask == ids)).all()


def test_a_prediction_that_cannot_be_written(tmp_path: Path) -> None:
    mask = np.array([[0, 3]])
    with pytest.raises(ValueError, match="class id 3"):
        save_prediction(tmp_path / "a.png", mask, (0, 128, 64))
    for mapping in ((0, 128, 64, 256), (0, 1, 2, -1), (0.5, 1, 2, 3)):
        with pytest.raises(ValueError, match="0 ... 255"):
            save_prediction(tmp_path / "a.png", mask, mapping)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed") as error:
        save_prediction(tmp_path / "file" / "a.png", mask, (0, 128, 64, 255))
    assert str(tmp_path / "file" / "a.png") in str(error.value)


def test_colours_of_ones_own() -> None:
    assert class_colours(2, ["#0a0b0c", "FF8000"]).tolist() == [[10, 11, 12], [255, 128, 0]]
    assert class_colours(3, ["0a0b0c", "ff8000"]).tolist() == palette(3).tolist()  # do not fit


def test_the_legend_of_an_overlay_says_that_class_0_is_not_coloured(monkeypatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(
        drawing, "legend", lambda names, *_: told.append(names) or drawing.paper(1, 240)
    )
    mask = np.zeros((240, 240), np.uint8)
    drawing.overlay(mask, mask, ["ferrite", "pore"], palette(2), None)
    assert told == [["ferrite (not coloured)", "pore"]]


def test_a_legend_breaks_into_lines_and_begins_with_the_bar() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    names = ["matrix", "β", "钢\nsteel"]
    wide, narrow = legend(names, colours, 900), legend(names, colours, 90)
    assert wide.shape == (26, 900, 3) and narrow.shape == (3 * 26, 90, 3)
    for strip in (wide, narrow):
        for colour in colours:
            assert (strip == colour).all(2).sum() == 15 * 15  # 17 x 17 with its frame
    barred = legend(names, colours, 900, ("5 um", 40))
    assert (barred[10, 10:50] == 20).all() and not (barred[10, 50:57] == 20).any()
    red = np.flatnonzero((barred == colours[0]).all(2).any(0))
    assert red[0] > 50 + text_length("5 um")
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        legend(names[:2], colours, 900)


def test_greek_letters_are_drawn_as_they_are() -> None:
    alpha, beta, box = (text_line([sign], [0], 40) for sign in ("α", "β", "\uffff"))
    assert (alpha != beta).any() and (alpha != box).any()


def test_a_long_text_loses_its_middle() -> None:
    line = text_line(["x" * 500, "right"], [10, 200], 260)
    ink = np.flatnonzero((line < 128).all(2).any(0))
    assert not ((ink >= 190) & (ink < 200)).any()  # nothing runs into the next text
    assert ink[0] >= 10 and ink[ink < 200].max() > 170 and ink[-1] > 200
    assert (line == text_line(["x" * 400, "right"], [10, 200], 260)).all()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_a_png_holds_the_pixels_in_their_order(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (pixels, np.ascontiguousarray(pixels[::-1])[::-1]):  # contiguous or not
        write_png(tmp_path / "deep" / "er" / "a.png", given)
        found = np.asarray(Image.open(tmp_path / "deep" / "er" / "a.png"))
        np.testing.assert_array_equal(found, pixels)
    stored = cv2.imread(str(tmp_path / "deep/er/a.png"), cv2.IMREAD_UNCHANGED)
    assert stored is not None and stored.shape == shape
