"""Paired bootstrap of a difference of two mean Dice values.

Two things were left to chance: which images were annotated (the repeats), and which images are in
the test set. A replicate draws as many of each with replacement, the same for both methods, and
pools the Dice of each repeat over the images drawn. Tiles of one micrograph are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from utils.metrics import Counts, Floats, dice, mean_score, pooled

REPLICATES, SEED, LEVEL = 10_000, 0, 0.95
AT_ONCE = 500  # replicates pooled together: with many classes, all would fill the memory


class Interval(NamedTuple):
    """An estimate with its bootstrap interval (percentiles); both nan where nothing is known."""

    value: float
    low: float
    high: float
    repeats: int

    def ends(self) -> str:
        """Both ends for people; '-' where there are none."""
        known = not math.isnan(self.low)
        return f"{self.low:+.4f}, {self.high:+.4f}" if known else "-"


def draw_counts(units: int, replicates: int, rng: np.random.Generator) -> Counts:
    """How often each unit is drawn in each replicate: (replicates, units)."""
    return rng.multinomial(units, np.full(units, 1 / units), size=replicates)


def number_clusters(names: Sequence[Hashable]) -> Counts:
    """Number the clusters of images by their names: (images,)."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def mean_dice(counts: Counts, drawn: Counts) -> Floats:
    """Mean Dice of resampled test sets: (R,); nan where the truth is nothing but background.

    ``counts`` (n, C, C): confusion matrix of each image; ``drawn`` (R, n): how often it is drawn.
    """
    parts = [drawn[start : start + AT_ONCE] for start in range(0, len(drawn), AT_ONCE)]
    return np.concatenate([mean_score(dice(pooled(counts, part))) for part in parts])


def _differences(runs: Sequence[Counts], others: Sequence[Counts], drawn: Counts) -> Floats:
    """Difference in mean Dice of each repeat on resampled test sets: (R, repeats)."""
    pairs = zip(runs, others, strict=True)
    return np.stack([mean_dice(a, drawn) - mean_dice(b, drawn) for a, b in pairs], axis=1)


def replicates_of(runs: Sequence[Counts], others: Sequence[Counts], clusters: Counts) -> Floats:
    """Difference in mean Dice, averaged over the repeats, of every replicate: (REPLICATES,).

    ``runs`` and ``others`` hold, for each repeat, the confusion matrices (n, C, C) of a method and
    of the one to subtract, of the same images; ``clusters`` (n,) number what is drawn together.
    All methods see the same draws, of ``SEED``. nan without a class to score.
    """
    rng = np.random.default_rng(SEED)
    images = draw_counts(int(clusters.max()) + 1, REPLICATES, rng)[:, clusters]  # (R, n)
    repeats = draw_counts(len(runs), REPLICATES, rng)  # (R, repeats)
    values = np.where(repeats > 0, _differences(runs, others, images), 0)
    return (values * repeats).sum(1) / len(runs)


def interval(runs: Sequence[Counts], others: Sequence[Counts], clusters: Counts) -> Interval:
    """The difference on the whole test set and its ``LEVEL`` interval, see ``replicates_of``.

    Of fewer than two clusters there is none: nothing says how test images differ.
    """
    value = float(_differences(runs, others, np.ones((1, len(clusters)), np.int64)).mean())
    if len(np.unique(clusters)) < 2:
        return Interval(value, math.nan, math.nan, len(runs))
    found = replicates_of(runs, others, clusters)
    known = found[~np.isnan(found)]
    ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(known, ends) if len(known) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), len(runs))
