"""The bootstrap against loops over its draws, closed forms, and a normal approximation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from comparison.bootstrap import draw_counts, interval, number_clusters, replicates_of
from comparison.tally import Tally, count


def tallies(seed: int, repeats: int, images: int, wrong: float) -> list[Tally]:
    """Predictions of random masks of 3 classes, some pixels of which are wrong."""
    truth = np.random.default_rng(0).integers(0, 3, (images, 6, 6))
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(repeats):
        noise = rng.random(truth.shape) < wrong
        guess = np.where(noise, rng.integers(0, 3, truth.shape), truth)
        made.append(count(zip(guess, truth, strict=True), 3))
    return made


def slow_dice(tally: Tally, images: list[int]) -> float:
    """Mean Dice over classes 1 and 2 of a list of images, by loops."""
    found = []
    for c in (1, 2):
        both = sum(int(tally.both[i, c]) for i in images)
        either = sum(int(tally.either[i, c]) for i in images)
        found.append(2 * both / either)
    return sum(found) / len(found)


@pytest.mark.parametrize("paired", [True, False])
def test_every_replicate_is_that_of_the_slow_twin(paired: bool) -> None:
    first, second = tallies(1, 3, 5, 0.3), tallies(2, 3, 5, 0.5)
    clusters = np.array([0, 0, 1, 2, 2])
    found = replicates_of(first, second if paired else None, clusters, replicates=40, seed=7)
    rng = np.random.default_rng(7)
    of_clusters, of_repeats = draw_counts(3, 40, rng), draw_counts(3, 40, rng)
    for value, drawn, times in zip(found, of_clusters, of_repeats, strict=True):
        images = [i for i, c in enumerate(clusters) for _ in range(drawn[c])]
        total = 0.0
        for repeat, often in enumerate(times):
            for _ in range(often):
                total += slow_dice(first[repeat], images)
                total -= slow_dice(second[repeat], images) if paired else 0
        assert value == pytest.approx(total / 3)


def test_as_many_are_drawn_as_there_are_and_all_alike() -> None:
    drawn = draw_counts(4, 5000, np.random.default_rng(0))
    assert (drawn.sum(1) == 4).all() and drawn.shape == (5000, 4)
    assert drawn.mean(0) == pytest.approx(1, abs=0.05)
    assert drawn.var(0) == pytest.approx(3 / 4, abs=0.06)  # binomial: n p (1 - p)


def test_without_variance_there_is_no_width() -> None:
    one = tallies(1, 1, 1, 0.3) * 4  # four equal repeats, one image
    value, low, high, repeats = interval(one, None, np.array([0]))
    assert value == pytest.approx(low) and value == pytest.approx(high) and repeats == 4
    assert value == pytest.approx(slow_dice(one[0], [0]))


def test_a_method_does_not_differ_from_itself() -> None:
    some = tallies(1, 3, 4, 0.4)
    assert interval(some, some, np.arange(4)) == (0, 0, 0, 3)


def test_pairing_takes_out_what_both_share() -> None:
    first = tallies(1, 5, 8, 0.3)
    # The same predictions with one pixel of every image corrected or spoilt alike.
    second = [Tally(t.both + [0, 1, 0], t.either + [0, 2, 0], t.pixels + 1) for t in first]
    paired = interval(second, first, np.arange(8))
    alone = interval(first, None, np.arange(8))
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_the_interval_of_many_images_is_that_of_their_mean() -> None:
    # One repeat, one class, equal sizes: the pooled Dice is the mean of the images' hits, whose
    # standard error is known.
    rng = np.random.default_rng(3)
    hits = rng.integers(0, 101, 200)
    both = np.stack([np.zeros(200, np.int64), hits], axis=1)
    tally = Tally(both, np.full((200, 2), 200), np.full(200, 200))
    value, low, high, _ = interval([tally], None, np.arange(200))
    error = (hits / 100).std() / math.sqrt(200)
    assert value == pytest.approx(hits.mean() / 100)
    assert low == pytest.approx(value - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(value + 1.96 * error, abs=0.1 * error)


def test_clusters_that_agree_within_count_as_one_image_each() -> None:
    some = tallies(1, 2, 4, 0.4)
    doubled = [Tally(t.both.repeat(2, 0), t.either.repeat(2, 0), t.pixels.repeat(2)) for t in some]
    single = interval(some, None, np.arange(4))
    together = interval(doubled, None, np.arange(4).repeat(2))
    apart = interval(doubled, None, np.arange(8))
    assert together == pytest.approx(single)
    assert apart.high - apart.low < together.high - together.low


def test_clusters_are_numbered_in_the_order_they_come() -> None:
    assert number_clusters([("b", "1"), ("a", "1"), ("b", "1")]).tolist() == [0, 1, 0]


def test_nothing_is_known_of_nothing() -> None:
    value, low, high, repeats = interval([], None, np.array([0]))
    assert math.isnan(value) and math.isnan(low) and math.isnan(high) and repeats == 0
    empty = Tally(np.array([[5, 0]]), np.array([[10, 0]]), np.array([5]))
    assert math.isnan(interval([empty], None, np.array([0])).low)
