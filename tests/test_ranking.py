"""Ranking by disagreement of views, on predictions whose disagreement is known by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metallography import ranking
from metallography.summary import Item


def by_column(image: np.ndarray) -> np.ndarray:
    """Sure of class 1 in the left half of what it is shown where the picture is not 0."""
    one = np.zeros(image.shape, np.float32)
    one[:, : image.shape[1] // 2] = 1
    one[image == 0] = 0
    return np.stack([1 - one, one])


def test_views_that_contradict_each_other() -> None:
    # Of the 8 views of a square, 4 show any pixel in their left half: 4 votes against 4.
    votes, mutual, entropy = ranking.disagreement(by_column)(np.ones((8, 8), np.uint8))
    np.testing.assert_allclose(votes, 0.5)
    np.testing.assert_allclose(mutual, math.log(2), rtol=1e-5)
    np.testing.assert_allclose(entropy, math.log(2), rtol=1e-5)


def test_even_odds_in_all_views_are_no_disagreement() -> None:
    votes, mutual, entropy = ranking.disagreement(lambda x: np.full((2, *x.shape), 0.5))(
        np.ones((6, 10), np.uint8)
    )
    assert votes.max() == 0 and mutual.max() < 1e-6
    np.testing.assert_allclose(entropy, math.log(2), rtol=1e-5)


class Model:
    num_classes = 2

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return by_column(image).argmax(axis=0).astype(np.uint8)

    def disagreement(self, image: np.ndarray) -> np.ndarray:
        return ranking.disagreement(by_column)(image)


def test_images_come_in_the_order_of_their_disputed_share(tmp_path: Path) -> None:
    shares = {"a": 2, "b": 8, "c": 0, "d": 5}  # rows of 8 in which the views contradict each other
    items = []
    for folder in ("img", "gt"):
        (tmp_path / folder).mkdir()
    for name, disputed in shares.items():
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:disputed] = 200
        Image.fromarray(pixels).save(tmp_path / "img" / f"{name}.png")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "gt" / f"{name}.png")
        items.append(Item(tmp_path / "img" / f"{name}.png", name))
    (tmp_path / "img" / "bad.png").write_bytes(b"")
    items.append(Item(tmp_path / "img" / "bad.png", "bad"))
    out = tmp_path / "out"
    rows, bad = ranking.rank(
        Model(), tmp_path / "img", items, out, tmp_path / "gt", lambda stem: ""
    )
    assert [row["image"] for row in rows] == ["b", "d", "a", "c"]
    # Half of the views vote for each class in those rows.
    assert [row["vote_disagreement"] for row in rows] == pytest.approx([0.5, 5 / 16, 1 / 8, 0])
    assert [row["accuracy"] for row in rows] == pytest.approx([0.5, 1 - 5 / 16, 1 - 1 / 8, 1])
    assert len(bad) == 1 and "bad.png" in bad[0]
    with (out / "ranking.csv").open(encoding="utf-8") as file:
        assert [row["rank"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert ranking.agreement_lines(rows)[0].startswith(
        "Spearman, vote_disagreement and 1 - accuracy: 1.000"
    )
    sheet = np.asarray(Image.open(out / "ranking.png")).astype(int)
    magenta = (sheet[..., 0] - sheet[..., 1] > 50) & (sheet[..., 2] - sheet[..., 1] > 10)
    assert magenta.sum() == (8 + 5 + 2 + 0) * 8 * 45**2  # 8 pixels enlarged 45 times


def test_rank_correlation_by_hand() -> None:
    # d = (0, 1, -1, 0): rho = 1 - 6 * 2 / (4 * 15) = 0.8
    assert ranking.correlation([1, 2, 3, 4], [10, 30, 20, 99])[0] == pytest.approx(0.8)
    assert ranking.correlation([1, 2, 3, math.nan], [9, 8, 7, 0])[::2] == pytest.approx((-1, 3))
    assert math.isnan(ranking.correlation([1, 1, 1], [1, 2, 3])[0])


def test_quality_by_hand() -> None:
    found = ranking.quality(np.array([[5, 1, 0], [2, 2, 0], [0, 0, 0]]))
    assert found == pytest.approx((0.7, 4 / 7))
    assert math.isnan(ranking.quality(np.array([[4, 0], [0, 0]])).dice)
