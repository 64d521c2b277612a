"""Pictures that are, or are cut from, others: places chosen by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from stages.overlap import Part, Pixels, Whole, as_gray, parts_of

WHOLE = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)


def is_part(part: Pixels, whole: Pixels) -> bool:
    """Of gray pictures (h, w) and (H, W)."""
    return Part(part).lies_in(Whole(whole))


def plain_parts_of(small: Sequence[Pixels], large: Sequence[Pixels]) -> dict[int, int]:
    """``parts_of``, at every place of every picture."""
    found = {}
    for number, part in enumerate(map(as_gray, small)):
        for which, whole in reversed([*enumerate(map(as_gray, large))]):
            if len(np.unique(part)) > 1 and all(np.less_equal(part.shape, whole.shape)):
                places = np.lib.stride_tricks.sliding_window_view(whole, part.shape)
                if (places == part).all((2, 3)).any():
                    found[number] = which
    return found


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


def random_pictures(rng: np.random.Generator, levels: int) -> tuple[list[Pixels], list[Pixels]]:
    """Parts, some of them cut from the wholes, one size more often than others."""
    sizes = [(20, 31) if rng.random() < 0.6 else tuple(rng.integers(4, 40, 2)) for _ in range(5)]
    large = [rng.integers(0, levels, size, dtype=np.uint8) for size in sizes]
    large += [large[1].copy(), np.repeat(large[0][..., None], 3, axis=2)]
    small = [large[n].copy() for n in rng.integers(0, len(large), 3)]
    for whole in (large[n] for n in rng.integers(0, len(large), 6)):
        height, width = rng.integers(1, whole.shape[0] + 1), rng.integers(1, whole.shape[1] + 1)
        top = rng.integers(0, whole.shape[0] - height + 1)
        left = rng.integers(0, whole.shape[1] - width + 1)
        small.append(whole[top : top + height, left : left + width].copy())
    for part in small[2:4]:
        part.flat[rng.integers(part.size)] ^= 1
    return [*small, rng.integers(0, levels, (20, 31), dtype=np.uint8)], large


@pytest.mark.parametrize("levels", [1, 2, 4, 256])
def test_parts_are_those_that_a_look_at_every_place_finds(levels: int) -> None:
    rng, hits = np.random.default_rng(levels), 0
    for _ in range(20):
        small, large = random_pictures(rng, levels)
        found = parts_of(iter(small), iter(large))
        assert found == plain_parts_of(small, large) and list(found) == sorted(found)
        hits += len(found)
    assert hits > 50 or levels == 1


def test_equal_checksums_are_not_yet_equal_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Whole, "digest", 1)
    assert parts_of([WHOLE], [WHOLE ^ 1, WHOLE]) == {0: 1}


def test_pictures_are_read_one_by_one_and_no_more_than_needed() -> None:
    taken = []

    def pictures() -> Iterator[Pixels]:
        for number in range(4):
            taken.append(number)
            yield WHOLE ^ (number != 1)

    assert parts_of([WHOLE, WHOLE[3:9]], pictures()) == {0: 1, 1: 1} and taken == [0, 1]
    assert parts_of([], pictures()) == {} and taken == [0, 1]
