"""Which images to look at first, where in them, and what speaks against each prediction.

The *doubt* of an image is the share of its pixels that a twin of the network sees otherwise: one
trained alike, with another seed (deep ensembles, Lakshminarayanan, Pritzel and Blundell 2017).
Without a twin it is how unsure the network is, and by how much more than expected the pixel
classifier sees other classes (``metallography.ranking.doubt_of``): expected is its error on
held-out blocks. Where the classifier answers alone, what it is unsure of decides. Measures and
bounds were chosen on training images of NEU-Seg and then frozen (``results/doubt``). Errors
shared by all methods cannot be detected; what is not marked may be wrong, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np

from imaging.field import filled
from imaging.imagefile import Pixels, read_image, read_mask
from metallography.measure import class_words, outlying
from metallography.particles import Array, Row
from metallography.ranking import doubt_of
from metallography.summary import Table
from utils.metrics import IGNORED
from utils.tables import digits

DOUBTFUL = 0.085  # doubt of an image from which on it is marked
DOUBTFUL_BY_TWIN = 0.04  # the same where a twin network is asked
UNSURE = 0.2  # mean, from which on an image of the pixel classifier alone is marked
OTHER = 0.5  # doubt of a pixel that another method sees otherwise, beside its own
SHARE = 0.05  # of all pixels, that are marked as places to label
MANY = 2.5  # times the particles of the annotation, from which on counts are doubtful
FEWEST_COUNTED = 5  # particles of the annotation, by which that is judged
SIGMA = 1.0  # pixels, of the blur that makes places of single pixels


def doubt_map(uncertain: Pixels, predicted: Array, others: Sequence[Array] = ()) -> Pixels:
    """The doubt of every pixel, uint8 (H, W), 255 for the most that there can be.

    ``uncertain`` is 1 - the probability of the likeliest class, 255 for 1; ``others`` are the
    class ids of other methods.
    """
    found = uncertain.astype(np.float32)
    for ids in others:
        found += 255 * OTHER * (ids != predicted)
    # Not cut off: of many pixels that are equally doubtful none would be a place to label.
    return np.asarray((found / (1 + OTHER * len(others))).astype(np.uint8))


def unlike(ids: Pixels, others: Pixels) -> float:
    """The share of a class map's pixels within its field that another class map has otherwise."""
    return float((ids != others)[ids != IGNORED].mean())


class Places(Mapping[str, Array]):
    """The most doubtful pixels of all images together: bool (H, W) by name, read when asked for.

    ``maps`` are files of ``doubt_map``. ``share`` of all pixels are marked, or less where many are
    equally doubtful. Of images with a class map in ``fields`` pixels that are 255 there do not
    count, and are never marked.
    """

    def __init__(
        self,
        maps: Mapping[str, Path],
        share: float = SHARE,
        fields: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.maps, self.fields, counts = dict(maps), fields, np.zeros(256, np.int64)
        for name in self.maps:
            smooth, inside = self._smooth(name)
            counts += np.bincount(smooth[inside], minlength=256)
        above = counts[::-1].cumsum()[::-1]  # of each value: pixels with that or more
        few = np.flatnonzero(above <= share * counts.sum())
        self.least = max(int(few[0]), 1) if few.size else 256

    def _smooth(self, name: str) -> tuple[Pixels, Array]:
        """The doubt of an image (H, W), blurred within its field, and where that is."""
        found = read_image(self.maps[name])
        inside = np.ones(found.shape, bool)
        if name in self.fields:
            inside = read_mask(self.fields[name]) != IGNORED
        found = filled(found, inside)  # or the blur would make the edge of the field surer
        return np.asarray(cv2.GaussianBlur(found, (0, 0), SIGMA), np.uint8), inside

    def __getitem__(self, name: str) -> Array:
        smooth, inside = self._smooth(name)
        return np.asarray(inside & (smooth >= self.least))

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)


def doubts(
    fractions: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
    *,
    annotated: Sequence[str],
    votes: Mapping[str, float],
    unsure: Mapping[str, float],
    differs: Mapping[str, float],
    places: Mapping[str, Array],
    field_px: Mapping[str, int] = MappingProxyType({}),
    expected: float = math.nan,
    twin: Mapping[str, float] = MappingProxyType({}),
) -> list[Row]:
    """A row for each image, the most doubtful first; annotated images are left out.

    Args:
        fractions: area fractions of the classes by image.
        votes: vote disagreement of the 8 views, nan where it is not known.
        unsure: 1 - the probability of the likeliest class, mean of the pixels.
        differs: share of pixels in which the network and the pixel classifier differ, nan where
            the classifier alone answers: what it is unsure of decides then.
        places: pixels that are worth labelling.
        field_px: how many pixels of an image count; by default all.
        expected: share of pixels in which the classifier is wrong on held-out blocks; nan if none
            could be held out.
        twin: share of pixels that a twin of the network sees otherwise, if there is one.
    """
    names = [name for name in fractions if name not in annotated]
    reasons: dict[str, list[str]] = {name: [] for name in names}
    rows: list[Row] = []
    for name in names:
        own, other = unsure.get(name, math.nan), differs.get(name, math.nan)
        alike = twin.get(name, math.nan)
        doubt = doubt_of(own, other, expected) if math.isnan(alike) else alike
        reasons[name] += _reasons(own, other, expected, alike)
        share = math.nan
        if name in places:
            place = places[name]
            share = float(place.sum() / field_px.get(name, place.size))
        rows.append(
            {
                "image": name,
                "doubt": doubt,
                "unsure": own,
                "twin_differs": alike,
                "differs": other,
                "vote_disagreement": votes.get(name, math.nan),
                "label_here": share,
            }
        )
    for name, found in outlying({name: fractions[name] for name in names}, class_names).items():
        reasons[name] += found
    rows.sort(key=lambda r: (not reasons[r["image"]], -_known(r["doubt"]), -_known(r["unsure"])))
    return [
        {"rank": number, "image": row["image"], "reasons": "; ".join(reasons[row["image"]]), **row}
        for number, row in enumerate(rows, start=1)
    ]


def _reasons(unsure: float, differs: float, expected: float, twin: float) -> list[str]:
    """A sentence on an image that is doubtful by these numbers, see ``doubts``."""
    if not math.isnan(twin):
        said = f"doubt {twin:.2f}: a twin network, trained the same way from other random numbers, "
        said += f"disagrees on {100 * twin:.0f} % of the pixels"
        return [said] if twin >= DOUBTFUL_BY_TWIN else []
    doubt = doubt_of(unsure, differs, expected)
    if doubt >= DOUBTFUL:
        usual = "" if math.isnan(expected) else f" ({100 * expected:.0f} % are expected)"
        return [
            f"doubt {doubt:.2f}: the network's mean certainty is {certainty(unsure)}, the pixel "
            f"classifier disagrees on {100 * differs:.0f} % of the pixels{usual}"
        ]
    alone = math.isnan(differs) and unsure >= UNSURE
    return [f"the pixel classifier's mean certainty is {certainty(unsure)}"] if alone else []


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def certainty(unsure: float) -> str:
    """The mean probability of the likeliest class, in percent."""
    return f"{100 * (1 - unsure):.0f} %"


def doubtful_lines(doubts: Sequence[Row]) -> list[str]:
    """A warning where most images are marked."""
    marked = sum(bool(row["reasons"]) for row in doubts)
    if marked <= 0.5 * len(doubts):
        return []
    what = f"{marked} of {len(doubts)} images are marked as doubtful"
    return [f"{what}: the answer as a whole is doubtful; correct one of the first, see doubt.csv"]


def count_lines(
    rows: Sequence[Row],
    class_names: Sequence[str],
    annotated: Mapping[str, float],
    counted: Sequence[int],
) -> list[str]:
    """Sentences on classes of many more particles in the other images than in the annotated ones.

    ``rows`` are those of ``measurements.csv``, ``counted`` the classes whose particles are counted,
    ``annotated`` the labelled shares by image: those that are labelled as a whole are compared.
    """
    lines = []
    for c in counted:
        own = [r for r in rows if r["class"] == c and annotated.get(r["image"]) == 1]
        others = [r for r in rows if r["class"] == c and r["image"] not in annotated]
        number, area = sum(r["number"] for r in own), sum(r["field_px"] for r in own)
        if number < FEWEST_COUNTED or not others:
            continue
        found = float(np.median([r["number"] / r["field_px"] for r in others])) * area
        if found > MANY * number:
            lines.append(
                f"{class_words(class_names[c])}: {number:g} particles in the annotation "
                f"(cut by the frame: one half), {found:.0f} in as large a field of the other "
                "images (median): specks of the prediction may be counted; look at the overlays, "
                "or give a larger --min_px"
            )
    return lines


def missing_lines(
    fractions: Mapping[str, Sequence[float]], class_names: Sequence[str], annotated: Sequence[str]
) -> list[str]:
    """Sentences on classes that were found nowhere, or in the annotated images alone."""
    others = [name for name in fractions if name not in annotated]
    lines = []
    for c, title in enumerate(class_names):
        inside = any(fractions[name][c] > 0 for name in annotated if name in fractions)
        if others and inside and not any(fractions[name][c] > 0 for name in others):
            found = f"{class_words(title)} is in the annotation"
            lines.append(f"{found} and was found in no other image")
    return lines


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
    "label_here": f"Label here: share of the image among the {100 * SHARE:.0f} % of all "
    "pixels that are most doubtful.",
}


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
