"""How sure a mean Dice, or a difference of two, is: resampling of repeats and of test images.

Two things were left to chance: which images were annotated (the repeats), and which images are in
the test set. A replicate draws both with replacement, as many as there are. What it drew serves
both methods of a difference, which is therefore paired, and every repeat; the Dice of each repeat
is pooled anew over the images drawn. Test images cut from one micrograph are drawn together.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comparison.tally import Tally

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

REPLICATES = 10_000
SEED = 0
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its bootstrap interval (percentiles); both nan where nothing is known."""

    value: float
    low: float
    high: float
    repeats: int


def draw_counts(units: int, replicates: int, rng: np.random.Generator) -> Counts:
    """How often each of so many units is drawn in each replicate: (replicates, units)."""
    return rng.multinomial(units, np.full(units, 1 / units), size=replicates)


def number_clusters(names: Sequence[Hashable]) -> Counts:
    """Number the clusters that images belong to, by what they are called: (images,)."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def replicates_of(
    tallies: Sequence[Tally],
    others: Sequence[Tally] | None,
    clusters: Counts,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> Floats:
    """Mean Dice over the repeats, or its difference to another method's, of every replicate.

    Args:
        tallies: the method's, one for each repeat, of the same test images in the same order.
        others: those of the method to subtract, for the same repeats; None: nothing.
        clusters: number of the cluster that each image is drawn with, (images,).
        replicates: how many.
        seed: of the draws; with one seed all methods see the same draws.

    Returns:
        (replicates,); nan where a replicate has no class to score.
    """
    rng = np.random.default_rng(seed)
    images = draw_counts(int(clusters.max()) + 1, replicates, rng)[:, clusters]  # (R, images)
    repeats = draw_counts(len(tallies), replicates, rng)  # (R, repeats)
    values = np.stack([t.mean_dice(images) for t in tallies], axis=1)  # (R, repeats)
    if others is not None:
        values = values - np.stack([t.mean_dice(images) for t in others], axis=1)
    return (np.where(repeats > 0, values, 0) * repeats).sum(1) / len(tallies)


def interval(
    tallies: Sequence[Tally],
    others: Sequence[Tally] | None,
    clusters: Counts,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> Interval:
    """The value of the whole set and its ``LEVEL`` interval; arguments as ``replicates_of``."""
    if not tallies:
        return Interval(np.nan, np.nan, np.nan, 0)
    whole = np.array([t.mean_dice() for t in tallies])
    if others is not None:
        whole = whole - np.array([t.mean_dice() for t in others])
    found = replicates_of(tallies, others, clusters, replicates, seed)
    known = found[~np.isnan(found)]
    if not len(known):
        return Interval(float(whole.mean()), np.nan, np.nan, len(tallies))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(whole.mean()), float(low), float(high), len(tallies))
