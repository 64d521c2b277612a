"""Blocks of an annotation: places by hand, scores of drawn predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from segmentation import blocks
from utils.metrics import IGNORED

LABELS = np.zeros((5, 7), np.uint8)
LABELS[:2, 3:] = 1  # block 1 is class 1 alone
ANNOTATED = [blocks.Annotation(LABELS * 9, LABELS)]


def test_the_blocks_are_a_partition_of_any_image() -> None:
    for shape in ((5, 7), (2, 2), (48, 31)):
        found = blocks.quarters(shape)
        rows, columns = shape[0] // 2, shape[1] // 2
        assert (found[:rows, :columns] == 0).all() and (found[:rows, columns:] == 1).all()
        assert (found[rows:, :columns] == 2).all() and (found[rows:, columns:] == 3).all()


def strokes(*places: tuple[int, int, int]) -> np.ndarray:
    """Strokes of 2 x 6 pixels on 60 x 60: row, column and class of each."""
    labels = np.full((60, 60), IGNORED, np.uint8)
    for row, column, label in places:
        labels[row : row + 2, column : column + 6] = label
    return labels


def test_few_strokes_are_given_out_whole_so_that_both_halves_have_every_class() -> None:
    # All of class 1 in the upper left quarter, where nothing else could learn it.
    labels = strokes((2, 2, 1), (8, 2, 1), (14, 2, 1), (20, 2, 1), (2, 40, 0), (40, 2, 0),
                     (40, 40, 0), (50, 50, 0))  # fmt: skip
    found = blocks.numbers(labels)
    for pair in blocks.PAIRS:
        assert set(labels[np.isin(found, pair)].tolist()) - {IGNORED} == {0, 1}
    for row, column in ((2, 2), (8, 2), (14, 2), (20, 2), (2, 40), (40, 2), (40, 40), (50, 50)):
        assert len(np.unique(found[row : row + 2, column : column + 6])) == 1
    each = [int(((labels == 1) & (found == block)).sum()) for block in range(4)]
    assert each == [12, 12, 12, 12]  # four strokes of the class, one in each block


def test_a_stroke_that_alone_has_a_class_is_cut_in_two() -> None:
    labels = strokes((2, 2, 1), (2, 40, 0), (40, 2, 0), (40, 40, 0))
    found = blocks.numbers(labels)
    for pair in blocks.PAIRS:
        assert ((labels == 1) & np.isin(found, pair)).sum() == 6


def test_strokes_that_are_in_all_quarters_and_whole_masks_have_quarters_as_blocks() -> None:
    spread = strokes(*((r, c + 8 * k, k) for r in (2, 40) for c in (2, 40) for k in (0, 1)))
    one_quarter = np.zeros((60, 60), np.uint8)
    one_quarter[:10, :10] = 1  # drawn in full
    for labels in (spread, one_quarter):
        assert (blocks.numbers(labels) == blocks.quarters((60, 60))).all()


def test_what_is_left_out_and_what_is_scored_are_the_whole() -> None:
    for block in range(4):
        left, own = blocks.without(LABELS, [block]), blocks.only(LABELS, block)
        assert ((left == IGNORED) != (own == IGNORED)).all()
        assert (np.where(left == IGNORED, own, left) == LABELS).all()


def test_a_block_is_scored_by_who_did_not_learn_it_and_a_missing_class_has_no_score() -> None:
    wrong = np.ones_like(LABELS)
    predictors = {(2,): lambda *_: wrong, (0, 1): lambda *_: LABELS}
    found = blocks.score(ANNOTATED, predictors, 2)
    # Block 0: rows 0-1, columns 0-2, all class 0; block 1: 8 pixels of class 1; block 2: 9 of 0.
    assert found.counts.tolist() == [[[6, 0], [0, 0]], [[0, 0], [0, 8]], [[0, 9], [0, 0]]]
    assert found.error == pytest.approx(9 / 23)
    assert found.by_block[0, 0] == 1 and np.isnan(found.by_block[0, 1])
    assert found.mean == pytest.approx(2 * 8 / (8 + 17))  # class 1: 8 true, 17 predicted


def test_a_fold_without_which_one_class_is_left_is_not_held_out() -> None:
    assert blocks.usable(ANNOTATED, blocks.SINGLE) == [(0,), (2,), (3,)]
    assert blocks.usable(ANNOTATED, blocks.PAIRS) == [(0, 3)]  # class 1 is in block 1 alone


def test_labels_in_one_block_alone_hold_nothing_out() -> None:
    labels = np.full((8, 8), IGNORED, np.uint8)
    labels[0, 0], labels[0, 1] = 0, 1
    given = [blocks.Annotation(labels, labels)]
    assert blocks.usable(given, blocks.SINGLE) == blocks.usable(given, blocks.PAIRS) == []


def test_the_curve_learns_from_one_two_and_three_other_blocks() -> None:
    seen: list[int] = []

    def learn(given: Sequence[blocks.Annotation]) -> blocks.Predict:
        seen.append(int((given[0].labels != IGNORED).sum()))
        return lambda *_: LABELS

    found = blocks.curve(ANNOTATED, blocks.SINGLE, 2, learn, lambda _: None)
    sizes = [6, 8, 9, 12]  # pixels of the blocks
    one, two = seen[:4], seen[4:8]
    assert one == [sizes[(b + 1) % 4] for b in range(4)]
    assert two == [sizes[(b + 1) % 4] + sizes[(b + 2) % 4] for b in range(4)]
    assert seen[8:] == [35 - size for size in sizes]
    assert {n: own.mean for n, own in found.items()} == {1: 1, 2: 1, 3: 1}


def test_a_pair_of_blocks_is_held_out_by_who_learnt_the_other_pair() -> None:
    assert blocks.learnt_blocks((0, 3)) == [1, 2] and blocks.learnt_blocks((1, 2)) == [3, 0]
    seen: list[int] = []

    def learn(given: Sequence[blocks.Annotation]) -> blocks.Predict:
        seen.append(int((given[0].labels != IGNORED).sum()))
        return lambda *_: LABELS

    found = blocks.curve(ANNOTATED, blocks.PAIRS, 2, learn, lambda _: None)
    # Blocks have 6, 8, 9 and 12 pixels: one of the other pair, then both.
    assert seen == [8, 12, 17, 18] and list(found) == [1, 2]
    assert found[2].counts.shape == (4, 2, 2) and found[2].counts.sum() == LABELS.size


def test_strokes_are_scored_as_if_each_class_had_its_share_of_the_area() -> None:
    # Half of the strokes are of class 1, which has a fifth of the area: it counts 0.4, class 0 1.6.
    found = blocks.HeldOut(np.array([[[40, 10], [20, 30]]], np.int64)).by_area([0.8, 0.2])
    millions = 10**6 * np.array([[[640, 160], [80, 120]]])
    assert found.counts.tolist() == millions.tolist()
    assert found.by_area([0.8, 0.2]).counts.tolist() == millions.tolist()  # again is no more
    assert found.classes[1] == pytest.approx(2 * 12 / (2 * 12 + 8 + 16))
    assert found.error == pytest.approx((16 + 8) / 100)
