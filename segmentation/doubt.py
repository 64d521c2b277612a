"""Which images to look at first, and what speaks against each prediction.

No measure sees mistakes that everything makes alike; what is not marked may be wrong, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from metallography.particles import Row
from metallography.ranking import outlying
from stages.presets import Look

DISAGREE = 0.2  # share of pixels in which the two methods differ
UNLIKE = {"spread": "contrast", "sharpness": "sharpness"}  # of ``presets.Look``
MOST_UNLIKE = 2.0  # factor from the most similar annotated image


def doubts(
    fractions: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
    *,
    annotated: Sequence[str],
    votes: Mapping[str, float],
    unsure: Mapping[str, float],
    differs: Mapping[str, float],
    looks: Mapping[str, Look],
) -> list[Row]:
    """A row for each image, the most doubtful first; annotated images are left out.

    Args:
        fractions: area fractions of the classes by image.
        votes: vote disagreement of the 8 views, nan where it is not known.
        unsure: 1 - the probability of the likeliest class, mean of the pixels.
        differs: share of pixels in which the network and the pixel classifier differ.
        looks: brightness, contrast and sharpness of the images.
    """
    names = [name for name in fractions if name not in annotated]
    own = [looks[name] for name in annotated if name in looks]
    reasons: dict[str, list[str]] = {name: [] for name in names}
    for name, found in outlying({name: fractions[name] for name in names}, class_names).items():
        reasons[name] += found
    for name in names:
        if differs.get(name, 0.0) > DISAGREE:
            share = 100 * differs[name]
            reasons[name].append(f"the pixel classifier sees {share:.0f} % of the pixels otherwise")
        reasons[name] += _unlike(looks.get(name), own)
    rows: list[Row] = []
    for name in names:
        row: Row = {"image": name, "reasons": "; ".join(reasons[name])}
        row |= {
            "vote_disagreement": votes.get(name, math.nan),
            "unsure": unsure.get(name, math.nan),
            "differs": differs.get(name, math.nan),
        }
        rows.append(row)
    rows.sort(key=lambda r: (-len(reasons[r["image"]]), -_known(r["vote_disagreement"]),
                             -_known(r["unsure"])))  # fmt: skip
    return [{"rank": number, **row} for number, row in enumerate(rows, start=1)]


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _unlike(image: Look | None, annotated: Sequence[Look]) -> list[str]:
    """How an image looks unlike every annotated one, brightness aside, which is evened out."""
    if image is None or not annotated:
        return []
    found = []
    for name, what in UNLIKE.items():
        ratios = [getattr(image, name) / max(getattr(a, name), 1e-6) for a in annotated]
        factor = min(max(r, 1 / max(r, 1e-6)) for r in ratios)
        if factor > MOST_UNLIKE:
            found.append(f"its {what} differs from the annotated by a factor of {factor:.1f}")
    return found


def missing_lines(
    fractions: Mapping[str, Sequence[float]], class_names: Sequence[str], annotated: Sequence[str]
) -> list[str]:
    """Sentences on classes that were found nowhere, or in the annotated images alone."""
    others = [name for name in fractions if name not in annotated]
    lines = []
    for c, title in enumerate(class_names):
        inside = any(fractions[name][c] > 0 for name in annotated if name in fractions)
        if others and inside and not any(fractions[name][c] > 0 for name in others):
            lines.append(f"{title} is in the annotation and was found in no other image")
    return lines
