"""Ranking of images, on predictions whose disagreement between views is known by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.field import Crop, FieldRule
from imaging.gray_range import EACH_IMAGE
from metallography import ranking
from metallography.items import list_images
from metallography.tiling import disagreement


def by_column(image: np.ndarray) -> np.ndarray:
    """Sure of class 1 in the left half of what it is shown where the picture is not 0."""
    one = np.zeros(image.shape, np.float32)
    one[:, : image.shape[1] // 2] = 1
    one[image == 0] = 0
    return np.stack([1 - one, one])


class Model:
    num_classes, ignore_label, gray = 2, 255, EACH_IMAGE

    def __call__(self, image: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        return by_column(image).argmax(axis=0).astype(np.uint8)

    def bands(
        self, image: np.ndarray, inside: np.ndarray | None = None
    ) -> list[tuple[int, np.ndarray]]:
        found = 0.1 + 0.8 * by_column(image)
        return [(0, found[:, :3]), (3, found[:, 3:])]

    def disagreement(self, image: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        return disagreement(by_column)(image)


def test_images_come_in_the_order_of_their_disputed_share(tmp_path: Path) -> None:
    shares = {"a": 2, "b": 8, "c": 0, "d": 5}  # rows of 8 in which the views contradict each other
    for folder in ("img", "gt"):
        (tmp_path / folder).mkdir()
    for name, disputed in shares.items():
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:disputed] = 200
        Image.fromarray(pixels).save(tmp_path / "img" / f"{name}.png")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "gt" / f"{name}.png")
    (tmp_path / "img" / "bad.png").write_bytes(b"")
    out = tmp_path / "out"
    items = list_images(tmp_path / "img", out, tmp_path / "gt")
    rows, pictures, titles, _, bad, _ = ranking.rank(Model(), items, out)
    assert [row["image"] for row in rows] == ["b", "d", "a", "c"]
    # Half of the views vote for each class in those rows.
    assert [row["vote_disagreement"] for row in rows] == pytest.approx([0.5, 5 / 16, 1 / 8, 0])
    assert [row["accuracy"] for row in rows] == pytest.approx([0.5, 1 - 5 / 16, 1 - 1 / 8, 1])
    assert len(bad) == 1 and "bad.png" in bad[0]
    with (out / "ranking.csv").open(encoding="utf-8") as file:
        assert [row["rank"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert ranking.agreement_lines(rows)[1].startswith(
        "Spearman, vote_disagreement and 1 - accuracy: 1.000"
    )
    few = [row | {"accuracy": math.nan} for row in rows[:2]]
    (line,) = ranking.agreement_lines([*rows[2:], *few])
    assert line.startswith("Warning: 2 of 4 images have a true mask")
    assert titles == ["1. b  0.5000", "2. d  0.3125", "3. a  0.1250", "4. c  0.0000"]
    for picture, disputed in zip(pictures, (8, 5, 2, 0), strict=True):
        assert picture.shape == (360, 360, 3)  # 8 pixels enlarged 45 times
        shown = picture.astype(int)
        magenta = (shown[..., 0] - shown[..., 1] > 50) & (shown[..., 2] - shown[..., 1] > 10)
        assert magenta.sum() == disputed * 8 * 45**2


def test_a_second_opinion_puts_what_it_sees_otherwise_first(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for name, disputed in {"a": 8, "b": 0}.items():
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:disputed] = 200
        Image.fromarray(pixels).save(tmp_path / "img" / f"{name}.png")
    items = list_images(tmp_path / "img", tmp_path / "out")
    # It sees class 1 in half of every image: as the model in a, otherwise in half of b.
    half = np.repeat(np.arange(8)[None] < 4, 8, axis=0).astype(np.uint8)
    second = ranking.SecondOpinion(lambda *_: half, error=0.2)
    found = ranking.rank(Model(), items, tmp_path / "out", second=second)  # type: ignore[arg-type]
    assert [row["image"] for row in found.rows] == ["b", "a"]
    assert [row["unsure"] for row in found.rows] == pytest.approx([0.1, 0.1], abs=1e-6)
    assert [row["differs"] for row in found.rows] == [0.5, 0]
    assert [row["doubt"] for row in found.rows] == pytest.approx([0.1 + 0.5 - 0.2, 0.1], abs=1e-6)
    assert found.titles[0] == "1. b  0.4000"


def test_data_bars_that_nobody_cut_are_told(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for name, rows in {"a": 10, "b": 0}.items():
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
        pixels[64 - rows :] = 255
        Image.fromarray(pixels).save(tmp_path / "img" / f"{name}.png")
    items = list_images(tmp_path / "img", tmp_path / "out")
    found = ranking.rank(Model(), items, tmp_path / "out")  # type: ignore[arg-type]
    (line,) = found.doubts
    assert "1 image(s)" in line and "a.png" in line and line.endswith("--crop 0,10,0,0")
    field = FieldRule(crop=Crop(bottom=10))
    assert ranking.rank(Model(), items, tmp_path / "out", field).doubts == []  # type: ignore[arg-type]
    # Not cut by a model's crop, as it is taken for an image that was cut: the cure is its own bar.
    field = FieldRule(Crop(bottom=3), frozenset({(64, 64)}))
    (line,) = ranking.rank(Model(), items, tmp_path / "out", field).doubts  # type: ignore[arg-type]
    assert line.endswith("--crop 0,10,0,0")


def test_rank_correlation_by_hand() -> None:
    # d = (0, 1, -1, 0): rho = 1 - 6 * 2 / (4 * 15) = 0.8
    assert ranking.correlation([1, 2, 3, 4], [10, 30, 20, 99])[0] == pytest.approx(0.8)
    assert ranking.correlation([1, 2, 3, math.nan], [9, 8, 7, 0])[::2] == pytest.approx((-1, 3))
    assert math.isnan(ranking.correlation([1, 1, 1], [1, 2, 3])[0])


def test_quality_by_hand() -> None:
    found = ranking.quality(np.array([[5, 1, 0], [2, 2, 0], [0, 0, 0]]))
    assert found == pytest.approx({"accuracy": 0.7, "dice": 4 / 7})
    # A class that is only predicted counts, with a Dice of 0.
    found = ranking.quality(np.array([[5, 1, 1], [2, 2, 0], [0, 0, 0]]))
    assert found == pytest.approx({"accuracy": 7 / 11, "dice": (4 / 7 + 0) / 2})
    assert math.isnan(ranking.quality(np.array([[4, 0], [0, 0]]))["dice"])
    assert all(map(math.isnan, ranking.quality(np.zeros((2, 2), int)).values()))  # no label at all
