"""Figures, judged by hand-made numbers: what the axes hold, and where the pixels lie."""

from __future__ import annotations

import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from report.figures import (
    curve_figure,
    curve_picture,
    doses_figure,
    doses_png,
    dots_png,
    learning_curve,
    size_figure,
    size_picture,
)
from utils.commandline import UserError

FALLING: list[dict[str, Any]] = [
    {"stage": "self", "epoch": n, "loss": 8.0 - n, "image": 1.0, "patch_up1": 2.0, "lr": 1e-4}
    for n in range(8)
]
FIRST, SECOND = (0, 114, 178), (230, 159, 0)  # colours of repeats 0 and 1


def scored(epoch: int, acc: float | None, dice: float | None) -> dict[str, Any]:
    return {
        "stage": "fine",
        "evaluation": {"epoch": epoch, "acc": acc, "dice": dice, "dice1": dice, "dice12": 0.5},
    }


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def legend(axes: Axes) -> tuple[str, list[str]]:
    """The title of a panel and the names of its curves."""
    found = axes.get_legend()
    assert found is not None
    return found.get_title().get_text(), [text.get_text() for text in found.get_texts()]


def curve(axes: Axes, name: str) -> list[tuple[float, float]]:
    """The points of a curve by its name."""
    (line,) = (line for line in axes.get_lines() if line.get_label() == name)
    return list(zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True))


# --- learning curves ------------------------------------------------------------------------------


def test_losses_and_scores_are_laid_out_by_stage() -> None:
    losses, scores = curve_figure([*FALLING, scored(199, 0.5, 0.25), scored(399, 0.75, 0.125)]).axes
    title, names = legend(losses)
    assert title == "Pretraining without labels: losses"
    assert names == ["total loss", "image loss", "patch up1 loss"]
    assert curve(losses, "total loss") == [(float(n), 8.0 - n) for n in range(8)]
    low, high = losses.get_ylim()
    assert low == 0 and 8 <= high < 8.5
    assert legend(scores) == ("Scores on the test set", ["Dice", "ACC", "Dice 1", "Dice 12"])
    assert curve(scores, "Dice") == [(199, 0.25), (399, 0.125)]
    low, high = scores.get_ylim()
    assert low == 0 and 1 <= high < 1.05
    assert "best by ACC: epoch 399, ACC 0.750, Dice 0.125" in scores.get_xlabel()


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([None, 0.5, 0.5], 3), ([0.25, 0.125, 0.25], 1), ([None, None, None], None)],
)
def test_the_best_is_the_first_with_the_highest_acc(
    accuracies: list[float | None], best: int | None
) -> None:
    (scores,) = curve_figure([scored(2 * n + 1, a, 0.5) for n, a in enumerate(accuracies)]).axes
    assert f"best by ACC: epoch {best}," in scores.get_xlabel() or best is None
    assert ("best" in scores.get_xlabel()) == (best is not None)


def test_ticks_of_epochs_are_whole() -> None:
    for last in (1, 2, 3, 7, 9, 13, 26, 99, 199, 2999):
        (axes,) = curve_figure([{"stage": "self", "epoch": n, "loss": 1.0} for n in (0, last)]).axes
        inside = [tick for tick in axes.get_xticks() if 0 <= tick <= last]
        assert 2 <= len(inside) <= 9 and all(tick == int(tick) for tick in inside)
        assert axes.get_xlim() == (0, last)


def rows_of(picture: Image.Image) -> np.ndarray:
    """Mean row of what is coloured in each column below the legend; nan where nothing is."""
    pixels = np.asarray(picture).astype(int)[60:]
    coloured = pixels.max(2) - pixels.min(2) > 60  # axes, grid and letters are gray
    height = np.arange(len(pixels))[:, None]
    with np.errstate(invalid="ignore"):
        return (coloured * height).sum(0) / coloured.sum(0)


def test_a_falling_loss_falls_on_the_picture(tmp_path: Path) -> None:
    entries = [{"stage": "self", "epoch": n, "a": 8.0 - n} for n in range(8)]
    height = rows_of(curve_picture(write(tmp_path, *entries)))
    drawn = height[np.isfinite(height)]
    assert len(drawn) > 1000 and (np.diff(drawn) > -1).all()
    # A straight line from (0, 8) to (7, 1): the columns' rows lie on a straight line too.
    x = np.flatnonzero(np.isfinite(height))
    assert np.corrcoef(x, drawn)[0, 1] > 0.9999


def test_a_missing_value_is_a_gap(tmp_path: Path) -> None:
    values = [5.0, 5.0, 5.0, None, 5.0, 5.0, 5.0]
    entries = [{"stage": "self", "epoch": n, "a": v} for n, v in enumerate(values)]
    seen = np.isfinite(rows_of(curve_picture(write(tmp_path, *entries))))
    columns = np.flatnonzero(seen)
    gaps = np.diff(columns)
    # Two of six epochs are blank: a third of the line's length.
    assert (gaps > 5).sum() == 1
    assert gaps.max() / (columns[-1] - columns[0]) == pytest.approx(2 / 6, abs=0.02)


def test_a_value_between_gaps_is_a_dot(tmp_path: Path) -> None:
    values = [None, 5.0, None, None, None]
    entries = [{"stage": "self", "epoch": n, "a": v} for n, v in enumerate(values)]
    columns = np.flatnonzero(np.isfinite(rows_of(curve_picture(write(tmp_path, *entries)))))
    assert 3 <= len(columns) <= 12


def test_the_best_evaluation_has_a_ring(tmp_path: Path) -> None:
    low = np.asarray(curve_picture(write(tmp_path, scored(1, 0.2, None), scored(3, 0.1, None))))
    high = np.asarray(curve_picture(write(tmp_path, scored(1, 0.1, None), scored(3, 0.2, None))))
    ink = [(picture[120:330, 90:] < 60).all(2).sum(0) for picture in (low, high)]
    left, right = (np.flatnonzero(columns).mean() for columns in ink)
    assert right - left > 400  # at epoch 1 and at epoch 3 of 3


@pytest.mark.parametrize("classes", [3, 12, 30, 200])
def test_the_legend_covers_no_line(classes: int) -> None:
    scores = {"epoch": 3, "acc": 1.0, **{f"dice{c}": 1.0 for c in range(1, classes + 1)}}
    figure = curve_figure([*FALLING, {"stage": "self", "evaluation": scores}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: no room for the axes
        figure.draw_without_rendering()
    assert figure.axes
    for axes in figure.axes:
        frame = axes.get_window_extent()
        box = axes.get_legend().get_window_extent()  # type: ignore[union-attr]
        assert box.y0 >= frame.y1 - 1 and frame.height > 100
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_short_and_odd_files_are_drawn(tmp_path: Path) -> None:
    one = write(tmp_path, {"stage": "sup", "epoch": 0, "loss": 0.0}, scored(0, 0.5, 0.5))
    assert curve_picture(one).width > 0
    with one.open("ab") as file:
        file.write(b'[1]\n"text"\n\xff\xfe\n{"stage": "fine", "epoch": 1, "lo')
    assert curve_picture(one).width > 0
    odd = write(tmp_path, {"epoch": 3, "loss": -1.0, "word": "x"}, {"stage": 5, "evaluation": 7})
    figure = curve_figure(map(json.loads, odd.open()))
    assert [legend(axes)[1] for axes in figure.axes] == [["total loss"]]


def test_a_png_is_written(tmp_path: Path) -> None:
    metrics = write(tmp_path, *FALLING, scored(1, 0.5, 0.5))
    path = learning_curve(tmp_path / "new" / "curve.png", metrics)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1200
        assert picture.info == {}  # no date and no version: they would differ from run to run
    assert path == tmp_path / "new" / "curve.png"
    again = learning_curve(tmp_path / "again.png", metrics)
    assert again.read_bytes() == path.read_bytes()


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        curve_picture(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="no epoch yet") as error:
        curve_picture(write(tmp_path, {"stage": "self", "epoch": 0, "loss": None}))
    assert "metrics.jsonl" in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed") as error:
        learning_curve(tmp_path / "file" / "a.png", write(tmp_path, *FALLING))
    assert "\n" not in str(error.value)


def test_an_importing_program_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    curve_picture(write(tmp_path, *FALLING))
    dots_png([("a", [("m", {0: 0.1})])])
    assert dict(matplotlib.rcParams) == before


# --- single values: dots, looked for by their colour ----------------------------------------------


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
    # The second panel holds 0.9 too; 0.3 lies as far right of 0.1 in both all the same.
    pixels = picture([("a", [("m", {0: 0.1, 1: 0.3})]), ("b", [("m", {0: 0.1, 1: 0.3, 2: 0.9})])])
    middle = pixels.shape[1] / 2 + 20
    (_, first), (_, second) = places(pixels, FIRST), places(pixels, SECOND)
    left = second[second < middle].mean() - first[first < middle].mean()
    right = second[second > middle].mean() - first[first > middle].mean()
    assert left > 50 and abs(left - right) < 1.5


def test_nothing_finished_and_values_that_are_not_known() -> None:
    assert picture([("a", [("m", {})])]).shape[2] == 3
    pixels = picture([("a", [("m", {0: math.nan, 1: 0.5})])])
    assert not len(places(pixels, FIRST)[0]) and len(places(pixels, SECOND)[0])


@pytest.mark.parametrize("values", [(0.3, 0.5), (0.0, 1.0), (0.4, 0.4)])
def test_the_axis_holds_all_values(values: tuple[float, float]) -> None:
    pixels = picture([("a", [("m", dict(enumerate(values)))])])
    for colour in (FIRST, SECOND):
        rows, columns = places(pixels, colour)
        assert np.ptp(columns) >= 6 and np.ptp(rows) >= 4  # a dot that is not cut
        assert columns.min() > 0 and columns.max() < pixels.shape[1] - 1


def test_the_same_values_give_the_same_bytes() -> None:
    panels = [("a", [("m", {0: 0.1, 1: 0.2})])]
    assert dots_png(panels) == dots_png(panels)


def test_a_line_goes_through_the_means_of_the_doses_and_every_run_has_a_dot() -> None:
    curves = {"A": {100: [0.5, 0.3], 0: [0.2, 0.2]}, "B": {0: [0.2], 100: [0.6]}}
    axes = doses_figure("Title", "steps", curves).axes[0]
    means = {line.get_label(): line for line in axes.lines if line.get_label() in curves}
    assert np.asarray(means["A"].get_xdata()).tolist() == [0, 100]
    assert np.asarray(means["A"].get_ydata()).tolist() == pytest.approx([0.2, 0.4])
    assert np.asarray(means["B"].get_ydata()).tolist() == pytest.approx([0.2, 0.6])
    rows = [np.asarray(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    dots = np.concatenate(rows).tolist()
    assert sorted(dots) == [0.2, 0.2, 0.2, 0.3, 0.5, 0.6]
    assert axes.get_xlabel() == "steps" and axes.get_legend() is not None
    assert doses_png("Title", "steps", curves) == doses_png("Title", "steps", curves)


def test_a_histogram_has_all_particles_in_percent_and_marks_percentiles() -> None:
    diameters = np.array([1.0] * 10 + [2.0] * 30 + [4.0] * 60)
    (axes,) = size_figure("γ′", diameters, "µm").axes
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert sum(heights) == pytest.approx(100) and heights[0] == pytest.approx(10)
    assert heights[-1] == pytest.approx(60) and axes.get_xlabel() == "diameter, µm"
    assert axes.get_xscale() == "linear"
    # Number 10 of 99 steps: 0.9 * 10 = 9.9 lies between the last 1 and the first 2.
    marks = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert marks == {"D10": pytest.approx(1.9), "D50": 4.0, "D90": 4.0}


@pytest.mark.parametrize(
    "diameters", [[2.0] * 12, [1.0] * 11 + [300.0], [0.1 * n for n in range(1, 40)]]
)
def test_histograms_of_equal_and_of_widely_spread_sizes(diameters: list[float]) -> None:
    (axes,) = size_figure("", np.array(diameters), "px").axes
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert sum(heights) == pytest.approx(100)
    assert axes.get_xscale() == ("log" if max(diameters) > 20 * min(diameters) else "linear")
    assert axes.get_xlabel().endswith(", logarithmic") == (axes.get_xscale() == "log")
    assert size_picture("", np.array(diameters), "px").size == (520, 300)


@pytest.mark.parametrize("seed", range(6))
def test_a_histogram_has_the_bars_of_freedman_and_diaconis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    diameters = rng.gamma(3, size=20 * 4**seed) + 1
    wanted = len(np.histogram_bin_edges(diameters, "fd")) - 1  # NumPy's, of few enough bars
    (axes,) = size_figure("", diameters, "px").axes
    assert len(axes.patches) == min(max(wanted, 8), 30)


@pytest.mark.parametrize("others", [[], [50.0, 12.0, 300.0]])
def test_a_histogram_of_nearly_equal_sizes_takes_no_memory(others: list[float]) -> None:
    """By the rule it would have some 10^13 bars."""
    diameters = np.array([10.0] * 50 + [10 * (1 + 2e-13)] * 50 + others)
    (axes,) = size_figure("", diameters, "px").axes
    assert len(axes.patches) == (30 if others else 8)
