"""The bootstrap against loops over its draws, closed forms, and a normal approximation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from comparison import bootstrap
from comparison.bootstrap import draw_counts, interval, mean_dice, number_clusters, replicates_of
from utils.metrics import SegmentationScores


def few_replicates(monkeypatch: pytest.MonkeyPatch, replicates: int, seed: int) -> None:
    """As many as loops can do."""
    monkeypatch.setattr(bootstrap, "REPLICATES", replicates)
    monkeypatch.setattr(bootstrap, "SEED", seed)


def counts_of(guesses: np.ndarray, truths: np.ndarray, classes: int = 3) -> np.ndarray:
    scores = SegmentationScores(classes)
    scores.add(torch.from_numpy(guesses), torch.from_numpy(truths))
    return scores.counts()


def runs(seed: int, repeats: int, images: int, wrong: float) -> list[np.ndarray]:
    """Predictions of random masks of 3 classes, some pixels of which are wrong."""
    truth = np.random.default_rng(0).integers(0, 3, (images, 6, 6))
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(repeats):
        noise = rng.random(truth.shape) < wrong
        made.append(counts_of(np.where(noise, rng.integers(0, 3, truth.shape), truth), truth))
    return made


def worthless(some: list[np.ndarray]) -> list[np.ndarray]:
    """All background is predicted: the Dice of the other classes is 0, so nothing is subtracted."""
    empty = [np.zeros_like(counts) for counts in some]
    for matrices, counts in zip(empty, some, strict=True):
        matrices[..., 0] = counts.sum(-1)
    return empty


def slow_dice(counts: np.ndarray, images: list[int]) -> float:
    """Mean Dice over those of the classes but 0 that a list of images truly has, by loops."""
    found = []
    for c in range(1, counts.shape[1]):
        both = sum(int(counts[i, c, c]) for i in images)
        truth = sum(int(counts[i, c].sum()) for i in images)
        predicted = sum(int(counts[i, :, c].sum()) for i in images)
        if truth:
            found.append(2 * both / (truth + predicted))
    return sum(found) / len(found) if found else math.nan


def slow_replicates(
    first: list[np.ndarray],
    second: list[np.ndarray],
    clusters: list[int],
    replicates: int,
    seed: int,
) -> list[float]:
    """The same draws, image by image and repeat by repeat."""
    units, repeats = max(clusters) + 1, len(first)
    rng = np.random.default_rng(seed)
    of_clusters = rng.multinomial(units, [1 / units] * units, size=replicates)
    of_repeats = rng.multinomial(repeats, [1 / repeats] * repeats, size=replicates)
    values = []
    for drawn, times in zip(of_clusters, of_repeats, strict=True):
        images = [i for i, c in enumerate(clusters) for _ in range(drawn[c])]
        total = 0.0
        for repeat, often in enumerate(times):
            for _ in range(often):
                total += slow_dice(first[repeat], images) - slow_dice(second[repeat], images)
        values.append(total / repeats)
    return values


@pytest.mark.parametrize("paired", [True, False])
def test_every_replicate_is_that_of_the_slow_twin(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_replicates(monkeypatch, 40, seed=7)
    first = runs(1, 3, 5, 0.3)
    second = runs(2, 3, 5, 0.5) if paired else worthless(first)
    clusters = [0, 0, 1, 2, 2]
    found = replicates_of(first, second, np.array(clusters))
    assert found == pytest.approx(slow_replicates(first, second, clusters, 40, 7))


def test_a_class_that_no_drawn_image_truly_has_is_left_out_of_both_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_replicates(monkeypatch, 200, seed=3)
    # Class 2 is in the last image only, and predicted in the first by one of the methods.
    truth = np.array([[[0, 1, 1, 0]], [[0, 1, 0, 0]], [[0, 0, 2, 2]]])
    good = np.array([[[0, 1, 2, 0]], [[0, 1, 0, 0]], [[0, 0, 2, 0]]])
    poor = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 1]], [[0, 1, 0, 2]]])
    first, second = [counts_of(good, truth)], [counts_of(poor, truth)]
    found = replicates_of(first, second, np.arange(3))
    expected = slow_replicates(first, second, [0, 1, 2], 200, 3)
    assert found == pytest.approx(expected)
    # By hand: of the first image alone Dice is 2 * 1 / (2 + 1), of the last alone 2 * 1 / (2 + 1).
    drawn = np.array([[3, 0, 0], [0, 0, 3], [1, 1, 1]])
    assert mean_dice(first[0], drawn) == pytest.approx([2 / 3, 2 / 3, (4 / 5 + 2 / 4) / 2])


def test_many_replicates_are_pooled_part_by_part() -> None:
    counts = runs(1, 1, 4, 0.3)[0]
    drawn = draw_counts(4, 1201, np.random.default_rng(0))
    found = mean_dice(counts, drawn)
    assert found.shape == (1201,)
    for row, value in list(zip(drawn, found, strict=True))[::50]:
        images = [i for i, often in enumerate(row) for _ in range(often)]
        assert value == pytest.approx(slow_dice(counts, images))


def test_as_many_are_drawn_as_there_are_and_all_alike() -> None:
    drawn = draw_counts(4, 5000, np.random.default_rng(0))
    assert (drawn.sum(1) == 4).all() and drawn.shape == (5000, 4)
    assert drawn.mean(0) == pytest.approx(1, abs=0.05)
    assert drawn.var(0) == pytest.approx(3 / 4, abs=0.06)  # binomial: n p (1 - p)


def test_without_variance_there_is_no_width() -> None:
    one = [runs(1, 1, 1, 0.3)[0].repeat(2, axis=0)] * 4  # four equal repeats, two equal images
    value, low, high, repeats = interval(one, worthless(one), np.array([0, 1]))
    assert value == pytest.approx(low) and value == pytest.approx(high) and repeats == 4
    assert value == pytest.approx(slow_dice(one[0], [0]))


def test_a_method_does_not_differ_from_itself() -> None:
    some = runs(1, 3, 4, 0.4)
    assert interval(some, some, np.arange(4)) == (0, 0, 0, 3)


def test_pairing_takes_out_what_both_share() -> None:
    first = runs(1, 5, 8, 0.3)
    # The same predictions with one more pixel of class 1 in every image, which is found.
    second = [counts + np.diag([0, 1, 0]) for counts in first]
    paired = interval(second, first, np.arange(8))
    alone = interval(first, worthless(first), np.arange(8))
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_the_interval_of_many_images_is_that_of_their_mean() -> None:
    # One repeat, one class of 100 pixels in truth and prediction of each image: the pooled Dice is
    # the mean of the images' hits, whose standard error is known.
    hits = np.random.default_rng(3).integers(0, 101, 200)
    misses = 100 - hits
    counts = np.stack([100 - misses, misses, misses, hits], axis=1).reshape(200, 2, 2)
    value, low, high, _ = interval([counts], worthless([counts]), np.arange(200))
    error = (hits / 100).std() / math.sqrt(200)
    assert value == pytest.approx(hits.mean() / 100)
    assert low == pytest.approx(value - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(value + 1.96 * error, abs=0.1 * error)


def test_clusters_that_agree_within_count_as_one_image_each() -> None:
    some = runs(1, 2, 4, 0.4)
    doubled = [counts.repeat(2, axis=0) for counts in some]
    single = interval(some, worthless(some), np.arange(4))
    together = interval(doubled, worthless(doubled), np.arange(4).repeat(2))
    apart = interval(doubled, worthless(doubled), np.arange(8))
    assert together == pytest.approx(single)
    assert apart.high - apart.low < together.high - together.low


def test_clusters_are_numbered_in_the_order_they_come() -> None:
    assert number_clusters([("b", "1"), ("a", "1"), ("b", "1")]).tolist() == [0, 1, 0]


def test_nothing_is_known_of_nothing_but_background() -> None:
    empty = [np.array([[[5, 2], [0, 0]]])]
    value, low, high, repeats = interval(empty, empty, np.array([0]))
    assert math.isnan(value) and math.isnan(low) and math.isnan(high) and repeats == 1


def test_one_cluster_gives_no_interval() -> None:
    some = runs(1, 2, 4, 0.3)
    alone, two = (interval(some, worthless(some), np.array(c)) for c in ([0] * 4, [0, 0, 0, 1]))
    assert math.isnan(alone.low) and math.isnan(alone.high) and alone.ends() == "-"
    assert alone.value == two.value and two.low < two.high
