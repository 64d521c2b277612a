"""Which unlabelled images a model is least sure of: those worth labelling or looking at next.

An image is predicted in its 8 flips and quarter turns, and the views are compared pixel by pixel.
A micrograph has no top and no handedness, so the views ought to agree; where they do not, what the
network says hangs on more than the material.

The score is the *vote disagreement*: the share of the views whose class is not the majority's, mean
over the pixels. Two others are written beside it: the *entropy* of the averaged probabilities, and
the *mutual information* between class and view, which is that entropy minus the mean of the views'
own (Houlsby et al., arXiv:1112.5745, there between models instead of views). Votes were chosen
because networks trained on a few images are too sure of themselves, or too unsure, by an unknown
factor: entropy and mutual information change with it, votes do not, and they are a share that can
be drawn. Ambiguous pixels, where every view gives the same odds, do not count.

None of them sees mistakes that all views make alike. ``results/ranking_uhcs.md`` holds the ranking
beside the true error on real micrographs: it follows the share of wrong pixels, not the mean Dice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# SciPy is installed with scikit-learn, which requires it.
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from metallography.folder import count_confusion, read_truth, true_mask
from metallography.summary import Item, write_csv
from metallography.tiling import VIEWS, Predict, each_symmetry
from report.sheets import overview
from utils.drawing import blend, reduced, save_picture
from utils.imagefile import DataError, read_image
from utils.log import progress

Array = NDArray[Any]
Floats = NDArray[np.float32]
Row = dict[str, Any]

MEASURES = ("vote_disagreement", "mutual_information", "entropy")
DRAWN_SHARE = 0.25  # uncertain regions: a quarter of the views contradicts the majority
UNCERTAIN = (235, 50, 140)
PICTURES = 12


class RankedModel(Protocol):
    """What ranking needs of a model; ``Segmenter`` in predict.py is one."""

    num_classes: int

    def __call__(self, image: Array) -> NDArray[np.uint8]:
        """Class ids (H, W)."""
        ...

    def disagreement(self, image: Array) -> Floats:
        """Maps (3, h, w), see ``disagreement``."""
        ...


def disagreement(predict: Predict) -> Predict:
    """Turn a prediction of class probabilities into one of disagreement between views.

    Args:
        predict: picture (H, W) or (H, W, 3) to class probabilities (C, H, W).

    Returns:
        A function from a picture to (3, H, W), a map for each of ``MEASURES``: the share of the
        views whose class is not the majority's (0 ... 1 - 1/C), and mutual information and entropy
        of the average in nats (0 ... ln C).
    """

    def maps(image: Array) -> Floats:
        total = own = votes = np.zeros(1, np.float32)
        for view in each_symmetry(predict, image):
            total = total + view
            own = own + entropy(view)
            votes = votes + (view.argmax(axis=0) == np.arange(len(view))[:, None, None])
        of_average = entropy(total / VIEWS)
        mutual = np.maximum(of_average - own / VIEWS, 0)  # rounding can make it negative
        return np.stack([1 - votes.max(axis=0) / VIEWS, mutual, of_average]).astype(np.float32)

    return maps


def entropy(probabilities: Array) -> Floats:
    """Entropy of each pixel in nats: (C, H, W) to (H, W)."""
    tiny = np.finfo(np.float32).tiny
    return -np.sum(probabilities * np.log(np.maximum(probabilities, tiny)), axis=0)


def scores(maps: Array) -> dict[str, float]:
    """Mean over the pixels of each map of ``disagreement``; the first is the score."""
    return {name: float(m.mean(dtype=np.float64)) for name, m in zip(MEASURES, maps, strict=True)}


def draw_uncertain(image: Array, maps: Array, side: int) -> NDArray[np.uint8]:
    """Draw an image with the pixels in magenta where a quarter of the views or more disagrees.

    Args:
        image: uint8 (H, W) or (H, W, 3).
        maps: (3, h, w), of ``disagreement``; a size other than the image's is fitted to it.
        side: the longer side of the picture at most.
    """
    image = reduced(image, 4 * side)
    (height, width), (h, w) = image.shape[:2], maps.shape[1:]
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    where = (maps[0] >= DRAWN_SHARE)[rows[:, None], columns]
    colours = np.array([(0, 0, 0), UNCERTAIN], np.uint8)
    return blend(image, where.astype(np.uint8), colours, side)


class Quality(NamedTuple):
    """Of one prediction: share of right pixels, and mean Dice of the classes above 0."""

    accuracy: float
    dice: float


def quality(confusion: Array) -> Quality:
    """Accuracy and Dice of one image by its confusion matrix (C, C).

    The Dice is the mean over those classes above 0 that the truth or the prediction has; nan
    where there is none.
    """
    counts = np.asarray(confusion, np.float64)
    right, either = counts.diagonal(), counts.sum(0) + counts.sum(1)
    known = either[1:] > 0
    dice = float((2 * right[1:][known] / either[1:][known]).mean()) if known.any() else math.nan
    return Quality(float(right.sum() / counts.sum()), dice)


def correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, int]:
    """Spearman's rank correlation: rho, two-sided p value, number of pairs without nan.

    Rho is nan with less than three pairs, or if all values of one are equal.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if not math.isnan(a + b)]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return math.nan, math.nan, len(pairs)
    found = spearmanr(*zip(*pairs, strict=True))
    return float(found.statistic), float(found.pvalue), len(pairs)


def rank(
    model: RankedModel,
    images: Path,
    items: Sequence[Item],
    out: Path,
    masks: Path | None,
    batch_of: Callable[[str], str],
) -> tuple[list[Row], list[str]]:
    """Score images; write ``ranking.csv`` and ``ranking.png``, those least sure of first.

    Args:
        model: what predicts.
        images: the folder, or one file.
        items: its images.
        out: the folder of the results.
        masks: folder of true masks: the prediction's accuracy and Dice are written as well.
        batch_of: production batch by file name without suffix.

    Returns:
        The rows of the table, and a line for each file that could not be used.
    """
    rows: list[Row] = []
    bad: list[str] = []
    shown: list[tuple[float, str, Array]] = []  # the least sure so far: score, name, picture
    with progress(len(items), "images") as bar:
        for item in items:
            try:
                image = read_image(item.path)
                row: Row = {"image": item.name, "batch": batch_of(item.path.stem)}
                maps = model.disagreement(image)
                row |= scores(maps)
                if masks:
                    row |= _against(true_mask(item, images, masks), image, model)._asdict()
                rows.append(row)
                drawn = row[MEASURES[0]], item.name, draw_uncertain(image, maps, 360)
                shown = sorted([*shown, drawn], key=lambda entry: -entry[0])[:PICTURES]
            except DataError as error:
                bad.append(str(error))
            bar.update(1)
    rows.sort(key=lambda row: -row[MEASURES[0]])
    rows = [{"rank": i, **row} for i, row in enumerate(rows, start=1)]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "ranking.csv", rows)
    if shown:
        titles = [f"{i}. {name}  {score:.4f}" for i, (score, name, _) in enumerate(shown, start=1)]
        heading = "Least sure first. Magenta: 2 or more of the 8 views give another class."
        pictures = [picture for _, _, picture in shown]
        save_picture(out / "ranking.png", overview(pictures, titles, heading))
    return rows, bad


def _against(path: Path | None, image: Array, model: RankedModel) -> Quality:
    """Quality of the prediction; nan without a true mask."""
    if path is None:
        return Quality(math.nan, math.nan)
    truth = read_truth(path, image.shape[:2], model.num_classes)
    return quality(count_confusion(truth, model(image), model.num_classes).numpy())


def agreement_lines(rows: Sequence[Row]) -> list[str]:
    """How well each measure follows the true error, over images: a line per measure and error."""
    lines = []
    for name in MEASURES:
        for kind in Quality._fields:
            values = [row[name] for row in rows], [1 - row[kind] for row in rows]
            rho, p, count = correlation(*values)
            lines.append(f"Spearman, {name} and 1 - {kind}: {rho:.3f} (p = {p:.2g}, n = {count})")
    return lines
