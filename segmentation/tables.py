"""Tables of the page on an answer: which images are doubtful, and what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from metallography.particles import Row
from metallography.summary import Table
from segmentation import doubt
from segmentation.answers import Round
from utils.tables import digits, percent

# Columns of doubt.csv that are shares of 1, as people read them.
DOUBT_WORDS = {
    "unsure": "unsure, %",
    "twin_differs": "twin network differs, %",
    "differs": "pixel classifier differs, %",
    "vote_disagreement": "votes that differ, %",
    "label_here": "label here, %",
}
ABOUT_DOUBT = {  # what the columns of doubt.csv mean
    "unsure": "Unsure: 1 - probability of the likeliest class, mean of the pixels; certainty = "
    "100 % - unsure.",
    "doubt": "Doubt: unsure, plus the share of pixels on which the pixel classifier disagrees "
    "beyond its own error on held-out blocks.",
    "twin_differs": "Doubt: share of pixels on which a twin network disagrees, one that was "
    "trained the same way from other random numbers.",
    "vote_disagreement": "Votes: share of the 8 flips and turns that give another class.",
    "label_here": f"Label here: share of the image among the {100 * doubt.SHARE:.0f} % of all "
    "pixels that are most doubtful.",
}
NEW_LABELS = ("image", "pixels that differ from the last answer", "labelled pixels")


def changes(this: Round, before: Round | None) -> list[list[str]]:
    """Images whose area fractions changed, the most first: a line of cells each."""
    if before is None:
        return []
    rows = []
    for image, now in this.fractions.items():
        was = before.fractions.get(image)
        if was and len(was) == len(now):
            moved = [abs(a - b) for a, b in zip(was, now, strict=True)]
            rows.append((max(moved), image, was, now))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [
        [image, *(f"{percent(a)} → {percent(b)}" for a, b in zip(was, now, strict=True))]
        for most, image, was, now in rows
        if most >= 0.0005
    ]


def doubt_table(doubts: Sequence[Row], own: Mapping[str, str]) -> Table:
    """All images without labels, their doubt, and what speaks against each; shares in percent."""
    head = ["image", "what speaks against it", "doubt", *DOUBT_WORDS.values()]
    rows = [
        [
            own[row["image"]],
            row["reasons"] or "-",
            digits(row["doubt"], 2),
            *(digits(100 * row[name], 1) for name in DOUBT_WORDS),
        ]
        for row in doubts
    ]
    title = "Images without labels, the most doubtful first"
    return {"title": title, "head": head, "rows": rows}


def doubt_words(doubts: Sequence[Row]) -> str:
    """What the columns of ``doubt_table`` mean, of those in which anything is known."""
    known = {n for n in ABOUT_DOUBT if any(not math.isnan(row[n]) for row in doubts)}
    known -= {"doubt"} if "twin_differs" in known else set()
    return " ".join(said for name, said in ABOUT_DOUBT.items() if name in known)


def change_tables(
    this: Round, before: Round | None, names: Sequence[str], own: Mapping[str, str]
) -> list[Table]:
    """What new labels and area fractions changed since the answer before."""
    corrected = [[own[name], str(n), str(all_)] for name, (n, all_) in this.corrected.items()]
    moved = [[own[name], *cells] for name, *cells in changes(this, before)]
    title = "What changed: area fraction before → after, %"
    new = {"title": "Labels that are new", "head": [*NEW_LABELS], "rows": corrected}
    other = {"title": title, "head": ["image", *names],
             "rows": moved or [["none", *("-" for _ in names)]]}  # fmt: skip
    return [*([new] if corrected else []), *([other] if before is not None else [])]
