"""Contact sheets, judged pixel by pixel against what was drawn by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imaging.drawing import overview, palette, sized
from report.sheets import (
    contact_sheet,
    error_map,
    left_out_words,
    worst_median_best,
    write_sheets,
)

Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true (row) and predicted class, counted one by one; id 255 left out."""
    counts = np.zeros((classes, classes), int)
    for true, found in zip(truth.flat, prediction.flat, strict=True):
        if true != 255:
            counts[true, found] += 1
    return counts


def draw(path: Path, rows: list[Row], classes: int = 2, **how: Any) -> np.ndarray:
    """Write a sheet and read it back."""
    counts = np.array([confusion(truth, found, classes) for _, truth, found in rows])
    titles = how.pop("titles", [str(n) for n in range(len(rows))])
    contact_sheet(path, rows, titles, counts, **{"colours": palette(classes), **how})
    return np.asarray(Image.open(path))


def test_errors_are_told_apart() -> None:
    image = np.full((1, 5), 100, dtype=np.uint8)
    truth = np.array([[0, 1, 0, 1, 1]])
    prediction = np.array([[0, 1, 2, 0, 2]])
    right, also_right, positive, negative, wrong = error_map(image, truth, prediction)[0].tolist()
    assert right == also_right == [40, 40, 40]  # the image, darkened
    assert len({tuple(right), tuple(positive), tuple(negative), tuple(wrong)}) == 4
    assert positive == [235, 50, 140] and negative == [90, 160, 255] and wrong == [255, 255, 255]


def test_an_unlabelled_pixel_is_no_error() -> None:
    image = np.full((1, 2), 100, dtype=np.uint8)
    assert (error_map(image, np.array([[255, 255]]), np.array([[0, 1]])) == 40).all()


def count(sheet: np.ndarray, colour: tuple[int, ...]) -> int:
    return int((sheet == np.array(colour, dtype=np.uint8)).all(2).sum())


def striped(height: int, width: int) -> Row:
    """Class 1 in the left half of the truth; the prediction lacks its upper half."""
    truth = np.zeros((height, width), dtype=np.int64)
    truth[:, : width // 2] = 1
    prediction = truth.copy()
    prediction[: height // 2] = 0
    return np.full((height, width, 3), (120, 60, 30), dtype=np.uint8), truth, prediction


def test_a_sheet_shows_every_panel_crisp(tmp_path: Path) -> None:
    sheet = draw(tmp_path / "new" / "sheet.png", [striped(40, 40)], panel=100)
    # 40 -> factor 2 -> 80 pixels; halves of 40 x 80, the prediction's and the errors' 40 x 40.
    box = 17 * 17 - 4 * 16  # the legend's square without its frame
    assert count(sheet, tuple(palette(2)[1])) == 40 * 80 + 40 * 40 + box
    assert count(sheet, (90, 160, 255)) == 40 * 40 + box
    assert count(sheet, (120, 60, 30)) == 80 * 80
    errors = sheet[-10 - 80 : -10, 10 + 3 * 160 :]  # without the text above
    assert count(errors, (28, 28, 28)) == 80 * 80 - 40 * 40  # 0.4 of the mean, 70


def test_a_sheet_in_colours_of_ones_own(tmp_path: Path) -> None:
    colours = np.array([[10, 11, 12], [255, 128, 0]], np.uint8)
    sheet = draw(tmp_path / "s.png", [striped(40, 40)], panel=80, colours=colours)
    box = 17 * 17 - 4 * 16
    assert count(sheet, (255, 128, 0)) == 40 * 80 + 40 * 40 + box
    assert count(sheet, tuple(palette(2)[1])) == 0


def test_rows_of_mixed_sizes_stand_below_one_another(tmp_path: Path) -> None:
    sizes = [(24, 40), (40, 24), (1, 1), (300, 64), (31, 33), (40, 40)]
    rows = [striped(h, w) for h, w in sizes]
    rows[1] = (rows[1][0][:, :, 0], *rows[1][1:])  # gray
    titles = ["x" * 500 + ".png", "钢 é\n", "", "d", "e", "f"]
    heights = []
    for n in (1, 2, 6):
        sheet = draw(tmp_path / "s.png", rows[:n], 12, titles=titles[:n], panel=96)
        assert sheet.shape[2] == 3
        heights.append(sheet.shape[0])
    # Two more pixels for each; 24 x 40 becomes 48 x 80; a line of text is 26 pixels, a gap 10.
    assert heights[1] - heights[0] == 26 + 80 + 10
    assert heights[2] - heights[1] == 4 * (26 + 10) + 96 + 96 + 93 + 80 - 31


def test_masks_keep_their_colours_when_reduced(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, (150, 170))
    sheet = draw(tmp_path / "s.png", [(np.zeros((150, 170), np.uint8), truth, truth)], 3, panel=85)
    panels = sheet[-10 - 75 : -10, 10 + 160 : 10 + 160 + 85].reshape(-1, 3)
    assert {tuple(c) for c in panels.tolist()} == {tuple(c) for c in palette(3).tolist()}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": []}, "0 rows"),
        ({"titles": []}, "one title"),
        ({"counts": np.zeros((2, 2, 2))}, "one matrix for each"),
        ({"truth": np.zeros((4, 8), int)}, "differ in size"),
        ({"class_names": ["one"]}, "class names"),
        ({"image": np.zeros((8, 8), np.int64)}, "uint8"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    image, truth, prediction = striped(8, 8)
    row = (changed.pop("image", image), changed.pop("truth", truth), prediction)
    given = {"rows": [row], "titles": ["a"], "counts": np.ones((1, 2, 2)), "colours": palette(2)}
    with pytest.raises(ValueError, match=said):
        contact_sheet(tmp_path / "s.png", **{**given, **changed})
    assert not (tmp_path / "s.png").exists()


def test_an_overview_has_four_pictures_a_row() -> None:
    pictures = [np.full((100 + n, 90, 3), (n, 0, 200), np.uint8) for n in range(6)]
    sheet = overview(pictures, [str(n) for n in range(6)], "heading")
    for n, picture in enumerate(pictures):
        rows, columns = np.nonzero((sheet == (n, 0, 200)).all(2))
        assert len(rows) == picture.shape[0] * 90
        assert columns.min() == 10 + 410 * (n % 4) and (rows.min() > 200) == (n >= 4)


def test_one_bar_is_the_scale_of_pictures_that_share_one() -> None:
    # 400 px of 0.5 µm drawn at 200 pixels: 1 µm a pixel; at most half of a picture is 100 µm.
    titles, bar = sized(["a", "b"], [(400, 0.5), (800, 0.5)], [200, 400])
    assert (titles, bar) == (["a", "b"], ("100 µm", 100))
    assert sized(["a"], [(400, None)], [200])[1] == ("200 px", 100)


def test_pictures_of_several_scales_tell_how_wide_each_is() -> None:
    titles, bar = sized(["a", "b", "c"], [(400, 0.5), (400, 0.125), (300, None)], [200, 200, 150])
    assert bar is None and titles == ["a (200 µm wide)", "b (50 µm wide)", "c (300 px wide)"]


def test_a_sheet_says_what_it_leaves_out() -> None:
    assert left_out_words(5, 5, 5) == "all 5 images"
    assert left_out_words(12, 40, 40) == "12 of 40 images, taken evenly; all are in overlay"
    said = "5 of 5 images; 3 without a true mask left out; all are in overlay"
    assert left_out_words(5, 5, 8) == said


def test_the_scale_bar_of_a_contact_sheet_is_as_long_as_told(tmp_path: Path) -> None:
    plain = draw(tmp_path / "a.png", [striped(40, 40)], panel=80)
    barred = draw(tmp_path / "b.png", [striped(40, 40)], panel=80, bar=("20 µm", 40))
    ink = (barred[:60] == (20, 20, 20)).all(2).sum(1).max()
    assert ink >= 40 and barred.shape[1] == plain.shape[1]


# --- the sheets of a run --------------------------------------------------------------------------


def found(share: int) -> Row:
    """An image of 8 x 8 whose ``share`` of 8 true columns are found: Dice 2 share / (8 + share)."""
    truth = np.ones((8, 8), dtype=np.uint8)
    prediction = np.zeros((8, 8), dtype=np.uint8)
    prediction[:, :share] = 1
    return np.full((8, 8), 20 + share, dtype=np.uint8), truth, prediction


def write(folder: Path, rows: list[Row], **how: Any) -> None:
    counts = np.array([confusion(truth, found, 2) for _, truth, found in rows])
    names = [str(n) for n in range(len(rows))]
    look: dict[str, Any] = {"heading": "steel/1_0", "class_names": (), "colours": palette(2)}
    write_sheets(folder, "fine", rows, names, counts, **look, **how)


def grays(path: Path) -> list[int]:
    """The gray values of the photographs on a sheet, from the top."""
    panel = np.asarray(Image.open(path))[88:, 10:18]  # columns of the first panel, below the legend
    panel = panel.reshape(-1, 24)
    flat = [int(row[0]) for row in panel if (row == row[0]).all() and 20 <= row[0] <= 39]
    return list(dict.fromkeys(flat))  # letters are not of one gray over 8 columns


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([5, 1, 8, 3, 7], [1, 5, 8]),
        ([4, 2, 8, 6], [2, 4, 8]),
        ([4, 2], [2, 4]),
        ([3], [3]),
    ],
)
def test_the_worst_median_and_best_are_picked(
    tmp_path: Path, shares: list[int], expected: list[int]
) -> None:
    rows = [found(share) for share in shares]
    empty = np.zeros((8, 8), dtype=np.uint8)
    rows.append((empty + 29, empty, empty))  # only background: neither good nor bad
    write(tmp_path, rows)
    assert [gray - 20 for gray in grays(tmp_path / "sheet_fine_extremes.png")] == expected
    assert sorted(grays(tmp_path / "sheet_fine.png")) == sorted(20 + s for s in [*shares, 9])


def test_background_alone_is_shown_where_there_is_nothing_else(tmp_path: Path) -> None:
    empty = np.zeros((8, 8), dtype=np.uint8)
    write(tmp_path, [(empty + 25, empty, empty)])
    path = tmp_path / "sheet_fine_extremes.png"
    assert grays(path) == [25]
    sheet = np.asarray(Image.open(path))
    side = 384
    truth = sheet[-10 - side : -10, 10 + side + 10 : 10 + side + 10 + side]
    assert (truth == palette(2)[0]).all()


def test_rows_are_taken_from_the_first_to_the_last(tmp_path: Path) -> None:
    write(
        tmp_path, [(np.full((8, 8), 20 + n, np.uint8), *found(4)[1:]) for n in range(9)], max_rows=3
    )
    assert grays(tmp_path / "sheet_fine.png") == [20, 24, 28]


def test_the_dice_of_an_image_is_over_the_classes_that_truth_or_prediction_has() -> None:
    # Mean Dice by hand: class 1 alone 2*2/(4+2) = 2/3; class 2 predicted, none there: (1 + 0) / 2;
    # nothing but background; all found.
    counts = np.zeros((4, 3, 3), int)
    counts[0, 1] = [2, 2, 0]
    counts[1] = [[0, 0, 3], [0, 5, 0], [0, 0, 0]]
    counts[2, 0, 0] = 9
    counts[3, 2, 2] = 1
    assert worst_median_best(counts) == {"worst": 1, "median": 0, "best": 3}


def test_the_sheets_of_a_run_have_the_scale_of_their_own_images(tmp_path: Path) -> None:
    """Four images, drawn at 384 pixels: 8 px of 0.5 um each, the last one of 2 um."""
    rows = [found(share) for share in (2, 4, 6, 8)]

    def bar_of(scales: list[tuple[int, float | None]]) -> int:
        """The longest dark run in the line of the legend, at the height of the bar."""
        write(tmp_path, rows, scales=scales)
        line = np.asarray(Image.open(tmp_path / "sheet_fine.png"))[10 + 26 + 10]
        dark = "".join("x" if ink else " " for ink in (line == (20, 20, 20)).all(1))
        return max(map(len, dark.split()))

    assert bar_of([(8, 0.5)] * 4) == 192  # half of a picture: 4 px, 2 um
    assert bar_of([(8, None)] * 4) == 96  # of 4 px, 2
    # Of 10 px that were reduced to 8, half is 5 px: exactly half again.
    assert bar_of([(10, None)] * 4) == 192
    # 9 px: half is 4.5, the bar 2 px of 9.
    assert bar_of([(9, None)] * 4) == 85
    assert bar_of([(8, 0.5)] * 3 + [(8, 2.0)]) < 40  # no bar for all: titles tell the widths
