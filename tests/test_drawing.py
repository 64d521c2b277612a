"""Pictures, judged pixel by pixel against what was drawn by hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.commandline import UserError
from utils.drawing import (
    class_colours,
    colour_mask,
    contact_sheet,
    error_map,
    palette,
    save_prediction,
)


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
    with pytest.raises(UserError, match="free disk space") as error:
        save_prediction(tmp_path / "file" / "a.png", mask, (0, 128, 64, 255))
    assert str(tmp_path / "file" / "a.png") in str(error.value)


def test_errors_are_told_apart() -> None:
    image = np.full((1, 5), 100, dtype=np.uint8)
    truth = np.array([[0, 1, 0, 1, 1]])
    prediction = np.array([[0, 1, 2, 0, 2]])
    right, also_right, positive, negative, wrong = error_map(image, truth, prediction)[0].tolist()
    assert right == also_right == [40, 40, 40]  # the image, darkened
    assert len({tuple(right), tuple(positive), tuple(negative), tuple(wrong)}) == 4
    assert positive == [235, 50, 140] and negative == [90, 160, 255] and wrong == [255, 255, 255]


def count(sheet: np.ndarray, colour: tuple[int, ...]) -> int:
    return int((sheet == np.array(colour, dtype=np.uint8)).all(2).sum())


def striped(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class 1 in the left half of the truth; the prediction lacks its upper half."""
    truth = np.zeros((height, width), dtype=np.int64)
    truth[:, : width // 2] = 1
    prediction = truth.copy()
    prediction[: height // 2] = 0
    return np.full((height, width, 3), (120, 60, 30), dtype=np.uint8), truth, prediction


def test_a_sheet_shows_every_panel_crisp(tmp_path: Path) -> None:
    row = striped(40, 40)
    path = contact_sheet(tmp_path / "new" / "sheet.png", [row], ["a.png"], 2, panel=100)
    sheet = np.asarray(Image.open(path))
    # 40 -> factor 2 -> 80 pixels; halves of 40 x 80, the prediction's and the errors' 40 x 40.
    box = 17 * 17 - 4 * 16  # the legend's square without its frame
    assert count(sheet, tuple(palette(2)[1])) == 40 * 80 + 40 * 40 + box
    assert count(sheet, (90, 160, 255)) == 40 * 40 + box
    assert count(sheet, (120, 60, 30)) == 80 * 80
    errors = sheet[-10 - 80 : -10, 10 + 3 * 160 :]  # without the text above
    assert count(errors, (28, 28, 28)) == 80 * 80 - 40 * 40  # 0.4 of the mean, 70


def test_a_sheet_in_colours_of_ones_own(tmp_path: Path) -> None:
    colours = class_colours(2, ["#0a0b0c", "FF8000"])
    assert colours.tolist() == [[10, 11, 12], [255, 128, 0]]
    path = contact_sheet(tmp_path / "s.png", [striped(40, 40)], ["a"], 2, panel=80, colours=colours)
    sheet = np.asarray(Image.open(path))
    box = 17 * 17 - 4 * 16
    assert count(sheet, (255, 128, 0)) == 40 * 80 + 40 * 40 + box
    assert count(sheet, tuple(palette(2)[1])) == 0
    assert class_colours(3, ["0a0b0c", "ff8000"]).tolist() == palette(3).tolist()  # do not fit


def test_sheets_of_mixed_sizes_and_many_rows(tmp_path: Path) -> None:
    sizes = [(24, 40), (40, 24), (1, 1), (300, 64), (31, 33), (40, 40)]
    rows = [striped(h, w) for h, w in sizes]
    rows[1] = (rows[1][0][:, :, 0], *rows[1][1:])  # gray
    rows[2] = (rows[2][0] / 255.0, *rows[2][1:])  # float
    titles = ["x" * 500 + ".png", "钢 é", "", "d", "e", "f"]
    heights = []
    for max_rows in (1, 2, 6, 100):
        path = contact_sheet(tmp_path / "s.png", rows, titles, 12, max_rows, panel=96)
        with Image.open(path) as sheet:
            assert sheet.mode == "RGB"
            heights.append(sheet.height)
    assert heights[0] < heights[1] < heights[2] == heights[3]


def test_rows_are_taken_from_the_first_to_the_last(tmp_path: Path) -> None:
    rows = []
    for gray in range(100, 109):
        image, truth, _ = striped(32, 32)
        rows.append((np.full_like(image, gray), truth, truth))
    path = contact_sheet(tmp_path / "s.png", rows, ["t"] * 9, 2, 3, panel=32)
    sheet = np.asarray(Image.open(path))
    shown = [g for g in range(100, 109) if count(sheet, (g, g, g)) >= 32 * 32]
    assert shown == [100, 104, 108]


def test_masks_keep_their_colours_when_reduced(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, (150, 170))
    row = (np.zeros((150, 170), dtype=np.uint8), truth, truth)
    path = contact_sheet(tmp_path / "s.png", [row], [""], 3, panel=85)
    sheet = np.asarray(Image.open(path))
    panels = sheet[-10 - 75 : -10, 10 + 160 : 10 + 160 + 85].reshape(-1, 3)
    assert {tuple(c) for c in panels.tolist()} == {tuple(c) for c in palette(3).tolist()}


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    image, truth, prediction = striped(8, 8)
    path = tmp_path / "s.png"
    with pytest.raises(ValueError, match="0 rows"):
        contact_sheet(path, [], [], 2)
    with pytest.raises(ValueError, match="one title for each"):
        contact_sheet(path, [(image, truth, prediction)], [], 2)
    with pytest.raises(ValueError, match="differ in size"):
        contact_sheet(path, [(image, truth[:4], prediction)], ["a"], 2)
    with pytest.raises(ValueError, match="class names"):
        contact_sheet(path, [(image, truth, prediction)], ["a"], 2, class_names=["one"])
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet(path, [(image.astype(np.int64), truth, prediction)], ["a"], 2)
    assert not path.exists()
