"""Confusion matrices of a run's predictions: stored ones, and those counted from its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from comparison.plan import count_pictures
from imaging.drawing import save_prediction
from utils.files import DataError
from utils.metrics import SegmentationScores

TRUTH = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
GUESS = np.array([[0, 1, 1], [2, 2, 2]], np.uint8)
MAPPING = (0, 128, 64)


def test_pictures_are_counted_through_their_grays(tmp_path: Path) -> None:
    save_prediction(tmp_path / "a.png", GUESS, MAPPING)
    save_prediction(tmp_path / "b.png", np.zeros_like(GUESS), MAPPING)
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    counts = count_pictures(pictures, [torch.from_numpy(TRUTH)] * 2, MAPPING)
    # By hand, true class by row; the unlabelled pixel (255) counts nowhere.
    assert counts.tolist() == [
        [[1, 1, 0], [0, 1, 1], [0, 0, 1]],
        [[2, 0, 0], [2, 0, 0], [1, 0, 0]],
    ]


def test_pictures_give_the_counts_of_their_evaluation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores, pictures, masks = SegmentationScores(4), [], []
    for number in range(5):
        guess, truth = rng.integers(0, 4, (2, 9, 7)).astype(np.uint8)
        masks.append(torch.from_numpy(truth))
        scores.add(torch.from_numpy(guess), masks[-1])
        pictures.append(tmp_path / f"{number}.png")
        save_prediction(pictures[-1], guess, (0, 128, 64, 255))
    found = count_pictures(pictures, masks, (0, 128, 64, 255))
    assert found.tolist() == scores.counts().tolist()


@pytest.mark.parametrize(
    ("name", "mask", "mapping", "message"),
    [
        ("a", TRUTH, (0, 128, 65), r"a\.png: a gray value that stands for no class"),
        ("a", TRUTH.T, MAPPING, r"a\.png: 3x2, its mask is 2x3"),
        ("b", TRUTH, MAPPING, "cannot be opened"),
    ],
)
def test_a_picture_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, mask: np.ndarray, mapping: tuple[int, ...], message: str
) -> None:
    save_prediction(tmp_path / "a.png", GUESS, MAPPING)
    masks = [torch.from_numpy(mask.copy())]
    with pytest.raises(DataError, match=message):
        count_pictures([tmp_path / f"{name}.png"], masks, mapping)
