"""Pictures that are, or are cut from, others: places chosen by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stages.overlap import is_part, parts_of

WHOLE = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 50), (30, 0), (30, 50), (7, 13)])
def test_a_crop_is_found_at_any_place(top: int, left: int) -> None:
    assert is_part(WHOLE[top : top + 30, left : left + 30], WHOLE)


def test_the_same_picture_and_one_changed_pixel() -> None:
    other = WHOLE.copy()
    other[59, 79] ^= 1
    assert is_part(WHOLE.copy(), WHOLE)
    assert not is_part(other, WHOLE)
    assert not is_part(other[30:, 50:], WHOLE)


def test_neighbouring_and_overlapping_tiles_are_no_hit() -> None:
    left, right, overlapping = WHOLE[:, :40], WHOLE[:, 40:], WHOLE[:, 20:60]
    assert parts_of([left, right], [overlapping]) == {}
    assert parts_of([left, overlapping], [right, WHOLE]) == {0: 1, 1: 1}


def test_a_larger_picture_is_no_part_and_one_wider_but_lower_is_none_either() -> None:
    assert not is_part(WHOLE, WHOLE[:30, :30])
    assert not is_part(WHOLE[:10], WHOLE[:30, :60])


def test_a_match_that_runs_over_the_edge_of_a_row_does_not_count() -> None:
    whole = np.zeros((4, 30), np.uint8)
    whole[0, 20:], whole[1, :14] = np.arange(1, 11), np.arange(11, 25)
    part = np.arange(1, 25, dtype=np.uint8)[None]  # 24 pixels that follow one another in memory
    assert not is_part(part, whole)


def test_gray_saved_as_colours_is_the_same_picture_and_an_even_one_is_none() -> None:
    colours = np.repeat(WHOLE[..., None], 3, axis=2)
    even = np.full((20, 20), 7, np.uint8)
    assert parts_of([colours[5:40, 5:40], even], [even, WHOLE]) == {0: 1}


def test_repeated_patterns_are_looked_at_one_by_one() -> None:
    tile = np.random.default_rng(1).integers(0, 256, (20, 20), dtype=np.uint8)
    whole = np.tile(tile, (3, 3))
    whole[:40, :40] ^= 1
    part = whole[20:60, 20:60].copy()
    assert is_part(part, whole)
