"""Choose which specimens are for testing, and which images are the annotated ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
TRIES = 200
ENOUGH = 0.001  # share of an image that a class should fill in an annotated image


def draw_test_specimens(
    specimens: Sequence[Hashable], counts: Counts, fraction: float, seed: int
) -> set[Hashable]:
    """Draw whole specimens for the test set; both sets get at least one.

    Each of 200 random orders of the specimens is cut where the share of images comes nearest to
    ``fraction``. Taken is the one whose two parts together miss the fewest classes; among equals,
    that of the nearest share. ``specimens`` (N) has that of each image, ``counts`` (N, C) its
    pixels of each class; fewer than two specimens are a ValueError.
    """
    names = list(dict.fromkeys(specimens))
    if len(names) < 2:
        raise ValueError("a training and a test set need two specimens")
    number = {name: i for i, name in enumerate(names)}
    owner = np.array([number[s] for s in specimens])
    sizes = np.bincount(owner)
    present = np.zeros((len(names), counts.shape[1]), bool)
    np.logical_or.at(present, owner, counts > 0)
    rng = np.random.default_rng([seed, 1])

    def draw() -> tuple[int, float, NDArray[np.int64]]:
        order = rng.permutation(len(names))
        share = np.cumsum(sizes[order])[:-1] / len(owner)
        cut = int(np.argmin(np.abs(share - fraction))) + 1
        missing = sum(int((~present[part].any(0)).sum()) for part in (order[:cut], order[cut:]))
        return missing, abs(float(share[cut - 1]) - fraction), order[:cut]

    *_, best = min((draw() for _ in range(TRIES)), key=lambda drawn: drawn[:2])
    return {names[i] for i in best}


def draw_single(
    specimens: Sequence[Hashable], counts: Counts, seed: int, repeats: int = 5
) -> list[int]:
    """Draw different images, one for each repeat, those that show the most classes first.

    Among equals, images in which more classes fill 0.1 % are preferred, then new specimens.
    """
    rng = np.random.default_rng([seed, 2])
    absent = (counts == 0).sum(1)
    faint = (counts < ENOUGH * counts.sum(1, keepdims=True)).sum(1)
    left = rng.permutation(len(counts)).tolist()
    chosen: list[int] = []
    while left and len(chosen) < repeats:
        used = [specimens[i] for i in chosen]
        best = min(left, key=lambda i: (absent[i], faint[i], used.count(specimens[i])))
        chosen.append(best)
        left.remove(best)
    return chosen


def draw_groups(
    specimens: Sequence[Hashable], counts: Counts, seed: int, size: int = 5, repeats: int = 5
) -> list[list[int]]:
    """Draw different groups of ``size`` images; each group shows every class if any can.

    Among equals, images of specimens that the group does not have yet are preferred. There are
    fewer groups if no others are found, and none of fewer images than ``size``.
    """
    if len(counts) < size:
        return []
    rng = np.random.default_rng([seed, 3])
    groups: list[list[int]] = []
    for _ in range(20 * repeats):
        group = sorted(_draw_group(specimens, counts > 0, size, rng))
        if group not in groups:
            groups.append(group)
        if len(groups) == repeats:
            break
    return groups


def _draw_group(
    specimens: Sequence[Hashable], present: NDArray[np.bool_], size: int, rng: np.random.Generator
) -> list[int]:
    order = rng.permutation(len(present)).tolist()
    patterns = [frozenset(np.flatnonzero(present[i]).tolist()) for i in range(len(present))]
    distinct = list(dict.fromkeys(patterns[i] for i in order))
    wanted = frozenset().union(*distinct)
    plan = _cover(distinct, wanted, size)
    if plan is None:  # no group shows every class: take what adds the most
        plan = []
        for _ in range(size):
            seen = frozenset().union(*plan)
            best = max(distinct, key=lambda p: len(p - seen))
            plan += [best] if best - seen else []
    chosen: list[int] = []
    for pattern in [*plan, *[None] * (size - len(plan))]:
        used = [specimens[i] for i in chosen]
        free = [i for i in order if i not in chosen and pattern in (None, patterns[i])]
        chosen.append(min(free, key=lambda i: used.count(specimens[i])))
    return chosen


def _cover(
    patterns: list[frozenset[int]], wanted: frozenset[int], picks: int
) -> list[frozenset[int]] | None:
    """At most ``picks`` patterns with all the wanted classes, by an exact search; None: none."""
    if not wanted:
        return []
    if not picks:
        return None
    rarest = min(sorted(wanted), key=lambda c: sum(c in p for p in patterns))
    useful = (p for p in patterns if rarest in p)
    for pattern in sorted(useful, key=lambda p: -len(p & wanted)):
        rest = _cover(patterns, wanted - pattern, picks - 1)
        if rest is not None:
            return [pattern, *rest]
    return None
