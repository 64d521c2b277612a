"""Pixel counts image by image, against counts by hand and the scores of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from comparison.tally import count, count_pictures, mean_of_known
from utils.drawing import save_prediction
from utils.imagefile import DataError
from utils.metrics import SegmentationScores

TRUTH = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
GUESS = np.array([[0, 1, 1], [2, 2, 2]], np.uint8)


def test_counts_by_hand() -> None:
    tally = count([(GUESS, TRUTH)], 3)
    # The pixel that nobody labelled (255) counts nowhere.
    assert tally.both.tolist() == [[1, 1, 1]]
    assert tally.either.tolist() == [[2 + 1, 2 + 2, 1 + 2]]
    assert tally.pixels.tolist() == [5]
    scores = tally.scores()
    assert scores["acc"] == pytest.approx(3 / 5)
    assert scores["dice1"] == pytest.approx(2 / 4) and scores["dice2"] == pytest.approx(2 / 3)
    assert scores["dice"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert scores["iou1"] == pytest.approx(1 / 3) and scores["iou2"] == pytest.approx(1 / 2)
    assert scores["miou"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_the_scores_are_those_of_an_evaluation() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 4, (9, 7)), rng.integers(0, 4, (9, 7))) for _ in range(5)]
    scores = SegmentationScores(4)
    for guess, truth in pairs:
        scores.add(torch.from_numpy(guess), torch.from_numpy(truth))
    expected = scores.compute().as_dict()
    found = count(pairs, 4).scores()
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


def test_weights_pool_as_repeated_images_do() -> None:
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(0, 3, (4, 4)), rng.integers(0, 3, (4, 4))) for _ in range(3)]
    weights = np.array([[2, 0, 1], [0, 3, 0]])
    found = count(pairs, 3).mean_dice(weights)
    for value, row in zip(found, weights, strict=True):
        again = [pair for pair, times in zip(pairs, row, strict=True) for _ in range(times)]
        assert value == pytest.approx(count(again, 3).scores()["dice"])


def test_a_class_that_is_nowhere_stays_out_of_the_mean() -> None:
    scores = count([(np.array([0, 1]), np.array([0, 1]))], 3).scores()
    assert scores["dice1"] == 1 and math.isnan(scores["dice2"]) and scores["dice"] == 1
    only_background = count([(np.array([0]), np.array([0]))], 2)
    assert math.isnan(only_background.scores()["dice"])
    assert math.isnan(mean_of_known(np.array([math.nan])))


def test_pictures_are_read_back_through_their_grays(tmp_path: Path) -> None:
    mapping = (0, 128, 64)
    save_prediction(tmp_path / "a.png", GUESS, mapping)
    tally = count_pictures([tmp_path / "a.png"], [TRUTH], mapping)
    assert tally.both.tolist() == count([(GUESS, TRUTH)], 3).both.tolist()
    with pytest.raises(DataError, match=r"a\.png: a gray value that stands for no class"):
        count_pictures([tmp_path / "a.png"], [TRUTH], (0, 128, 65))
    with pytest.raises(DataError, match=r"a\.png: 3x2, its mask is 2x3"):
        count_pictures([tmp_path / "a.png"], [TRUTH.T], mapping)
    with pytest.raises(DataError, match="cannot be opened"):
        count_pictures([tmp_path / "b.png"], [TRUTH], mapping)
