"""Contact sheets of images and masks, with truth, prediction and errors where there is a truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from imaging import drawing
from imaging.drawing import (
    GAP,
    OVERLAY_SIDE,
    Array,
    Picture,
    beside,
    legend,
    paper,
    sized,
    text_line,
)
from metallography.folder import Folder
from metallography.ranking import DOUBT, HEADING, QUESTIONED, UNCERTAIN, Ranking
from utils.files import DataError
from utils.metrics import IGNORED, image_dice, mean_score

Row = tuple[Array, Array, Array]

# Drawn on the darkened image: magenta, light blue and white differ in lightness as well.
ERRORS = {
    "false positive": (235, 50, 140),  # a class where the truth is background
    "false negative": (90, 160, 255),  # background where the truth is a class
    "wrong class": (255, 255, 255),  # one class taken for another
}
_COLUMNS = ("image", "truth", "prediction", "error")
SHEET_PICTURES, COMPARED_ROWS = 12, 8  # of a predicted folder, without and with true masks
SHEET_SIDE = 400  # of a picture without truth; twice 200, so that small images fill their place
PANEL = 384  # pixels of a panel's longer side
_NARROWEST = 150  # pixels of a column: four of them hold a name and its Dice


def write_sheets(
    folder: str | Path,
    stage: str,
    rows: Sequence[Row],
    names: Sequence[str],
    counts: Array,
    *,
    scales: Sequence[tuple[int, float | None]] = (),
    max_rows: int = 8,
    **look: Any,
) -> None:
    """Write a stage's ``sheet_<stage>.png`` and ``sheet_<stage>_extremes.png`` into a run's folder.

    The first has at most ``max_rows`` images, taken evenly; the second the worst, the median and
    the best. Rows, names, counts and ``scales`` (see ``drawing.sized``; default: pixels as they
    are) are of all test images. ``look``, and what is raised, as in ``contact_sheet``.
    """
    evenly = _evenly(len(rows), max(max_rows, 1))
    extremes = worst_median_best(counts)
    sheets = {
        "": (str(len(evenly)), [(names[i], i) for i in evenly]),
        "_extremes": (", ".join(extremes), [(f"{w}: {names[i]}", i) for w, i in extremes.items()]),
    }
    for suffix, (note, chosen) in sheets.items():
        numbers = [i for _, i in chosen]
        shown = [rows[i] for i in numbers]
        sizes = [truth.shape for _, truth, _ in shown]
        own = [scales[i] for i in numbers] if scales else [(w, None) for _, w in sizes]
        widths = [panel_size(size, PANEL)[1] for size in sizes]
        titles, bar = sized([title for title, _ in chosen], own, widths)
        contact_sheet(
            Path(folder, f"sheet_{stage}{suffix}.png"),
            shown,
            titles,
            counts[numbers],
            note=f"{note} of {len(rows)} images",
            bar=bar,
            **look,
        )


def predicted_sheet(folder: Folder) -> None:
    """Draw ``sheet.png`` of a predicted folder: images, with their true masks if there are any.

    It has a legend, says what it leaves out, and how large a pixel is: by a bar where all pictures
    have one scale, else by the width of each.
    """
    segmenter, path = folder.segmenter, folder.out / "sheet.png"
    compared = [image for image in folder.done if image.counts is not None]
    done = compared or folder.done
    chosen = [done[i] for i in _evenly(len(done), COMPARED_ROWS if compared else SHEET_PICTURES)]
    names, rows, pictures, counts, scales = [], [], [], [], []
    for item, size, matrix in chosen:
        try:
            image = item.read(segmenter.gray)
            mask = folder.measured(item)
            truth = folder.truth_of(item, mask) if matrix is not None else None
        except DataError:  # it was there a moment ago; the tables are written already
            continue
        scales.append((size[1], folder.scale_of(item)))
        names.append(folder.title_of(item))
        if truth is not None and matrix is not None:
            parts = (image, truth, mask)
            image, truth, mask = (drawing.reduced(part, OVERLAY_SIDE) for part in parts)
            rows.append((image, truth, mask))
            counts.append(matrix)
        else:
            pictures.append(drawing.blend(image, mask, segmenter.colours, SHEET_SIDE))
    if not names:
        return
    heading = left_out_words(len(names), len(done), len(folder.done))
    colours = segmenter.colours
    if rows:
        widths = [panel_size(truth.shape, PANEL)[1] for _, truth, _ in rows]
        titles, bar = sized(names, scales, widths)
        look: dict[str, Any] = {"class_names": segmenter.class_names, "colours": colours}
        contact_sheet(path, rows, titles, np.stack(counts), heading=heading, bar=bar, **look)
        return
    titles, bar = sized(names, scales, [picture.shape[1] for picture in pictures])
    sheet = drawing.overview(pictures, titles, heading)
    below = legend(drawing.over_image(segmenter.class_names), colours, sheet.shape[1], bar)
    drawing.save_picture(path, np.vstack([sheet, below]), "--out")


def ranked_sheet(
    path: Path, found: Ranking, um_per_px: Mapping[str, float | None] = MappingProxyType({})
) -> None:
    """Draw ``ranking.png``: the images that a model is least sure of, with a scale and a legend.

    ``um_per_px`` has micrometres per pixel of the images by name, None or nothing where unknown.
    """
    scales = [(width, um_per_px.get(name)) for name, width in found.shown]
    titles, bar = sized(found.titles, scales, [picture.shape[1] for picture in found.pictures])
    shown, ranked = len(found.pictures), len(found.rows)
    left_out = f"; {ranked - shown} surer images left out" if shown < ranked else ""
    measure = "doubt" if DOUBT in found.rows[0] else "disagreement of the votes"
    heading = f"{HEADING}: {shown} of {ranked} images{left_out}; the number is the {measure}"
    sheet = drawing.overview(found.pictures, titles, heading)
    colours = np.array([UNCERTAIN], np.uint8)
    below = legend([QUESTIONED], colours, sheet.shape[1], bar)
    drawing.save_picture(path, np.vstack([sheet, below]), "--out")


def left_out_words(there: int, compared: int, measured: int) -> str:
    """How many images a sheet shows, and which it leaves out."""
    if there == measured:
        return f"all {there} images" if there > 1 else ""
    without = f"; {measured - compared} without a true mask left out" if compared < measured else ""
    count = f"{there} of {compared} images" + (", taken evenly" if there < compared else "")
    return count + without + "; all are in overlay"


def _evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 0 ... count - 1, evenly from end to end."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def worst_median_best(counts: Array) -> dict[str, int]:
    """Which image is the worst, the median and the best by mean ``image_dice``: word -> number.

    ``counts`` are confusion matrices (n, C, C). An image with background alone is named only where
    there is no other. Of two images only the worst and the best are named, of one the best.
    """
    means = mean_score(image_dice(counts))  # (n,)
    order = [i for i in np.argsort(means, kind="stable").tolist() if not np.isnan(means[i])] or [0]
    places = {"worst": 0, "median": (len(order) - 1) // 2, "best": -1}
    left_out = {1: ["worst", "median"], 2: ["median"]}.get(len(order), [])
    return {word: order[place] for word, place in places.items() if word not in left_out}


def contact_sheet(
    path: str | Path,
    rows: Sequence[Row],
    titles: Sequence[str],
    counts: Array,
    *,
    colours: Array,
    class_names: Sequence[str] = (),
    heading: str = "",
    note: str = "",
    bar: tuple[str, int] | None = None,
    panel: int = PANEL,
) -> None:
    """Write a PNG of rows image | truth | prediction | error, each with its title and Dice.

    A row is (image, truth, prediction): uint8 (H, W) or (H, W, 3), and twice class ids (H, W);
    ``counts`` are its confusion matrices (n, C, C). Sizes may differ from row to row: pictures are
    enlarged by a whole factor or reduced, to at most ``panel`` pixels. The legend has ``colours``,
    uint8 (C, 3); ``heading`` and ``note`` are words at the top, left and right; ``bar`` is a scale
    bar, its words and its drawn pixels.

    ValueError if there are no rows, or numbers, shapes or ids do not fit; UserError if the file
    cannot be written.
    """
    if not rows or not len(rows) == len(titles) == len(counts):
        raise ValueError(
            f"{len(rows)} rows, {len(titles)} titles and {len(counts)} matrices: give one title "
            "and one matrix for each row"
        )
    drawn = [_panels(row, colours, panel) for row in rows]
    cell = max(_NARROWEST, *(tile.shape[1] for tiles in drawn for tile in tiles))
    lefts = [GAP + column * (cell + GAP) for column in range(len(_COLUMNS))]
    width = lefts[-1] + cell + GAP
    names = class_names or drawing.default_names(len(colours))
    errors = legend([*ERRORS], np.array([*ERRORS.values()]), width)
    parts = [paper(GAP, width), _two_ends(heading, note, width)]
    columns = text_line(_COLUMNS, lefts, width, drawing.FAINT)
    parts += [legend(names, colours, width, bar), errors, columns]
    for title, matrix, tiles in zip(titles, counts, drawn, strict=True):
        parts += [_two_ends(title, _dice_text(matrix), width), beside(tiles, lefts, width)]
        parts.append(paper(GAP, width))
    drawing.save_picture(path, np.vstack(parts))


def _panels(row: Row, colours: Array, panel: int) -> list[Picture]:
    """The four pictures of a row, all scaled alike."""
    image, truth, prediction = row
    if not image.shape[:2] == truth.shape == prediction.shape:
        raise ValueError(
            f"image {image.shape}, truth {truth.shape} and prediction {prediction.shape} differ "
            "in size"
        )
    factor = panel / max(truth.shape)
    height, width = panel_size(truth.shape, panel)
    exact = Image.Resampling.NEAREST  # masks keep their colours
    pictures = (
        (drawing.as_rgb(image), Image.Resampling.LANCZOS if factor < 1 else exact),
        (drawing.colour_mask(truth, len(colours), colours), exact),
        (drawing.colour_mask(prediction, len(colours), colours), exact),
        (error_map(image, truth, prediction), exact),
    )
    scaled = (Image.fromarray(pixels).resize((width, height), how) for pixels, how in pictures)
    return [np.asarray(picture) for picture in scaled]


def panel_size(shape: tuple[int, ...], panel: int) -> tuple[int, int]:
    """Height and width at which a mask of this shape is drawn."""
    factor: float = panel / max(shape)
    if factor >= 1:
        factor = math.floor(factor)  # whole, so that every pixel becomes an equal square
    height, width = (max(1, round(side * factor)) for side in shape)
    return height, width


def _dice_text(matrix: Array) -> str:
    """The Dice of one image by its confusion matrix (C, C), mean and by class."""
    dice = image_dice(matrix)
    mean = float(mean_score(dice))
    if math.isnan(mean):
        return "Dice -  (background only)"
    known = [(c, value) for c, value in enumerate(dice) if c and not math.isnan(value)]
    return f"Dice {mean:.3f}   ({'   '.join(f'{c}: {value:.2f}' for c, value in known[:8])})"


def error_map(image: Array, truth: Array, prediction: Array) -> Picture:
    """Darken the image and colour the wrong pixels, see ``ERRORS``: RGB uint8 (H, W, 3)."""
    gray = drawing.as_rgb(image).mean(2, keepdims=True) * 0.4
    shown = np.repeat(gray, 3, axis=2).astype(np.uint8)
    wrong = (truth != prediction) & (truth != IGNORED)
    positive, negative = wrong & (truth == 0), wrong & (prediction == 0)
    kinds = (positive, negative, wrong & ~positive & ~negative)
    for colour, where in zip(ERRORS.values(), kinds, strict=True):
        shown[where] = colour
    return shown


def _two_ends(left: str, right: str, width: int) -> Picture:
    """A line with a text at each end; where both do not fit, the left one is shortened."""
    right_at = max(width // 4, width - GAP - drawing.text_length(right))
    return text_line([left, right], [GAP, right_at], width)
