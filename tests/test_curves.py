"""Learning curves, judged by hand-made metrics and by where the pixels lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from report.curves import best_evaluation, curve_picture, learning_curve, panels, ticks
from utils.commandline import UserError

FALLING: list[dict[str, Any]] = [
    {"stage": "self", "epoch": n, "loss": 8.0 - n, "image": 1.0, "patch_up1": 2.0, "lr": 1e-4}
    for n in range(8)
]


def scored(epoch: int, acc: float | None, dice: float | None) -> dict[str, Any]:
    return {
        "stage": "fine",
        "evaluation": {"epoch": epoch, "acc": acc, "dice": dice, "dice1": dice, "dice12": 0.5},
    }


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.07, [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07][::2]),
        (0.0, 999.0, [0, 200, 400, 600, 800]),
        (0.0, 6.97, [0, 1, 2, 3, 4, 5, 6]),
        (-3.0, 3.0, [-3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_epochs_are_whole() -> None:
    assert ticks(0, 1, whole=True) == [0, 1]
    assert ticks(0, 3, whole=True) == [0, 1, 2, 3]
    for last in range(1, 3000, 7):
        found = ticks(0, last, whole=True)
        assert 2 <= len(found) <= 7 and all(t == int(t) for t in found)


def test_losses_and_scores_are_laid_out_by_stage() -> None:
    rows = panels([*FALLING, scored(199, 0.5, 0.25), scored(399, 0.75, 0.125)])
    assert [len(row) for row in rows] == [1, 1]
    losses, scores = rows[0][0], rows[1][0]
    assert [c.name for c in losses.curves] == ["total loss", "image loss", "patch up1 loss"]
    assert losses.curves[0].points == [(float(n), 8.0 - n) for n in range(8)]
    assert (losses.low, losses.high) == (0, 8)
    assert [c.name for c in scores.curves] == ["Dice", "ACC", "Dice 1", "Dice 12"]
    assert scores.curves[0].points == [(199, 0.25), (399, 0.125)]
    assert (scores.low, scores.high) == (0, 1)
    assert scores.marked == (399, 0.75, "best by ACC: epoch 399, ACC 0.750, Dice 0.125")


def test_the_best_is_the_first_with_the_highest_acc() -> None:
    known = [{"epoch": 1, "acc": None}, {"epoch": 3, "acc": 0.5}, {"epoch": 5, "acc": 0.5}]
    assert best_evaluation(known) is known[1]
    assert best_evaluation(known[:1]) is None
    assert best_evaluation([]) is None


def rows_of(picture: Image.Image) -> np.ndarray:
    """Mean row of what is coloured in each column below the legend; nan where nothing is."""
    pixels = np.asarray(picture).astype(int)[80:]
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


def test_the_best_evaluation_has_a_ring(tmp_path: Path) -> None:
    low = np.asarray(curve_picture(write(tmp_path, scored(1, 0.2, None), scored(3, 0.1, None))))
    high = np.asarray(curve_picture(write(tmp_path, scored(1, 0.1, None), scored(3, 0.2, None))))
    ink = [(picture[120:300, 90:] < 60).all(2).sum(0) for picture in (low, high)]
    left, right = (np.flatnonzero(columns).mean() for columns in ink)
    assert right - left > 400  # at epoch 1 and at epoch 3 of 3


def test_short_and_odd_files_are_drawn(tmp_path: Path) -> None:
    one = write(tmp_path, {"stage": "sup", "epoch": 0, "loss": 0.0}, scored(0, 0.5, 0.5))
    assert curve_picture(one).width > 0
    with one.open("ab") as file:
        file.write(b'[1]\n"text"\n\xff\xfe\n{"stage": "fine", "epoch": 1, "lo')
    assert curve_picture(one).width > 0
    odd = write(tmp_path, {"epoch": 3, "loss": -1.0, "word": "x"}, {"stage": 5, "evaluation": 7})
    assert [p.curves[0].name for row in panels(map(json.loads, odd.open())) for p in row] == [
        "total loss"
    ]


def test_a_png_is_written(tmp_path: Path) -> None:
    metrics = write(tmp_path, *FALLING, scored(1, 0.5, 0.5))
    path = learning_curve(tmp_path / "new" / "curve.png", metrics)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1200
    assert path == tmp_path / "new" / "curve.png"


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        curve_picture(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="no epoch yet") as error:
        curve_picture(write(tmp_path, {"stage": "self", "epoch": 0, "loss": None}))
    assert "metrics.jsonl" in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="free disk space") as error:
        learning_curve(tmp_path / "file" / "a.png", write(tmp_path, *FALLING))
    assert "\n" not in str(error.value)
