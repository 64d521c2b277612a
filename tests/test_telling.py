"""What is said of held-out blocks: gains and their standard errors by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segmentation import blocks
from segmentation.answers import Round
from segmentation.blocks import HeldOut
from segmentation.schedule import Schedule
from segmentation.telling import curve_lines, gain_error, honest_lines

Counts = list[list[list[int]]]


def found(*right: int) -> Counts:
    """Confusion matrices of blocks of 20 pixels, 10 of each class, of which some are right."""
    return [[[10, 0], [10 - r, r]] for r in right]


def dice(right: int) -> float:
    """Of class 1 of such a block: 10 true pixels, ``right`` predicted."""
    return 2 * right / (10 + right)


def round_of(fewer: Counts, most: Counts) -> Round:
    return Round(1, "", 2, {}, curve={"2": fewer, "3": most}, by="pixel classifier")


def test_the_error_of_a_gain_is_that_of_its_mean_over_the_blocks() -> None:
    fewer, most = found(5, 5, 5, 5), found(6, 10, 5, 8)
    gains = [dice(r) - dice(5) for r in (6, 10, 5, 8)]
    own = gain_error(HeldOut(np.array(fewer)), HeldOut(np.array(most)))
    assert own == pytest.approx(np.std(gains, ddof=1) / 2)
    assert math.isnan(gain_error(HeldOut(np.array(fewer[:1])), HeldOut(np.array(most[:1]))))


@pytest.mark.parametrize(
    ("fewer", "most", "words"),
    [
        (found(5, 5, 5, 5), found(8, 8, 8, 9), "would still help"),
        (found(8, 8, 8, 8), found(8, 8, 8, 8), "would bring little"),
        (found(5, 8, 2, 9), found(9, 5, 6, 8), "too little to tell from chance"),
        (found(5), found(9), "too little to tell from chance"),  # one block alone
    ],
)
def test_one_mask_is_called_enough_only_where_the_blocks_agree(
    fewer: Counts, most: Counts, words: str
) -> None:
    assert words in curve_lines(round_of(fewer, most))[1]


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        (blocks.SINGLE, "learnt from three quarters of the annotation, scored on the fourth"),
        (blocks.PAIRS, "learnt from half of the annotation, scored on the other half"),
    ],
)
def test_it_is_said_how_much_was_learnt_from(folds: tuple[blocks.Fold, ...], words: str) -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = {"pixel classifier": found(6, 6)}, "pixel classifier"
    lists = [list(fold) for fold in folds]
    schedule = Schedule({}, 0, 0, lists, 0, 0, {}, 1, [1, 1], {}, [])
    assert words in honest_lines(this, schedule)[0]


def test_of_strokes_it_is_said_that_they_alone_are_scored() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = {"pixel classifier": found(6, 6)}, "pixel classifier"
    schedule = Schedule(
        {}, 0, 0, [list(fold) for fold in blocks.PAIRS], 0, 0, {}, 1, [1, 1], {}, []
    )
    assert "Only strokes are scored" not in honest_lines(this, schedule)[0]
    this.shares = [0.5, 0.5]
    assert honest_lines(this, schedule)[0].endswith(
        "Only strokes are scored: what nobody labelled may be told apart worse"
    )
