"""Pictures of masks: coloured, as gray files, and as contact sheets to judge a test set by eye."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from utils.files import IMAGE_SUFFIXES, replacing
from utils.metrics import IGNORED

Array = NDArray[Any]
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

# Class 0 in dark gray; then Okabe and Ito's colours, told apart by colour-blind readers too
# (Wong, Nature Methods 8, 441, 2011).
_PALETTE: tuple[Colour, ...] = (
    (51, 51, 51),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
# Errors, drawn on the darkened image: magenta, light blue and white differ in lightness as well.
_ERRORS: tuple[tuple[str, Colour], ...] = (
    ("false positive", (235, 50, 140)),
    ("false negative", (90, 160, 255)),
    ("wrong class", (255, 255, 255)),
)
_COLUMNS = ("image", "truth", "prediction", "error")

OVERLAY_SIDE = 2048  # larger pictures are reduced for the overlay
_GAP = 10  # pixels between panels, and around the sheet
_TEXT = 16  # font size
_LINE = 26  # height of a line of text
_NARROWEST = 150  # width of a column: four of them hold a name and its Dice
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)
_FAINT: Colour = (110, 110, 110)
_UNLABELLED: Colour = (150, 150, 150)


def palette(num_classes: int) -> Picture:
    """Return the colours of class 0 ... C-1, uint8 [C, 3], all different (up to 256 classes).

    The first eight are safe for colour-blind readers; more are spread over hue and lightness.
    """
    colours = list(_PALETTE[:num_classes])
    step = 0
    while len(colours) < num_classes:
        hue = (0.11 + step * 0.61803398875) % 1.0  # golden ratio: neighbours lie far apart
        lightness = (0.70, 0.45, 0.82, 0.33)[step % 4]
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        if colour not in colours:
            colours.append(colour)
        step += 1
    return np.array(colours, dtype=np.uint8).reshape(-1, 3)


def class_colours(num_classes: int, texts: Sequence[str] = ()) -> Picture:
    """Colours of class 0 ... C-1 from six hexadecimal digits each; without them :func:`palette`."""
    if len(texts) != num_classes:
        return palette(num_classes)
    rgb = [bytes.fromhex(text.removeprefix("#")) for text in texts]
    return np.array([list(colour) for colour in rgb], dtype=np.uint8).reshape(-1, 3)


def colour_mask(mask: Array, num_classes: int, colours: Array | None = None) -> Picture:
    """Colour a mask of class ids [H, W]; returns RGB uint8 [H, W, 3].

    The colours are uint8 [C, 3], those of :func:`palette` if none are given.

    Pixels that nobody labelled (id 255) are gray.

    Raises:
        ValueError: an id lies outside 0 ... C-1.
    """
    mask = np.asarray(mask)
    unlabelled = mask == IGNORED
    colours = palette(num_classes) if colours is None else colours
    coloured = colours[_class_ids(np.where(unlabelled, 0, mask), num_classes)]
    coloured[unlabelled] = _UNLABELLED
    return coloured


def _class_ids(mask: Array, num_classes: int) -> Array:
    ids = np.asarray(mask)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"a mask is [H, W] of integers, not {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"mask holds class id {wrong}; ids must lie in 0 ... {num_classes - 1}")
    return ids


def save_prediction(path: str | Path, mask: Array, mapping: Sequence[int]) -> Path:
    """Write a mask of class ids [H, W] as a gray, lossless PNG: class c becomes ``mapping[c]``.

    Args:
        path: the file; the source image's suffix, if it has one, becomes ``.png``.  Missing
            folders are made.
        mask: class ids 0 ... C-1.
        mapping: gray value 0 ... 255 of every class.

    Returns:
        The path written.

    Raises:
        ValueError: an id has no gray value, or a gray value lies outside 0 ... 255.
        UserError: the file cannot be written.
    """
    gray = np.array(mapping)
    if gray.ndim != 1 or gray.dtype.kind not in "iu" or gray.min() < 0 or gray.max() > 255:
        raise ValueError(f"mapping is gray values 0 ... 255, one for each class, not {mapping}")
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        path = path.with_suffix("")
    path = path.with_name(path.name + ".png")  # not with_suffix: a stem may hold dots of its own
    save_picture(path, gray.astype(np.uint8)[_class_ids(mask, len(gray))])
    return path


def save_picture(path: str | Path, pixels: Array, flag: str = "output_dir") -> None:
    """Write a PNG as a whole; missing folders are made.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path, flag, durable=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def error_map(image: Array, truth: Array, prediction: Array) -> Picture:
    """Darken the image and colour the wrong pixels; returns RGB uint8 [H, W, 3].

    Magenta: a class where the truth is background (false positive).  Light blue: background where
    the truth is a class (false negative).  White: one class taken for another.
    """
    rgb = _as_rgb(image).mean(2, keepdims=True) * 0.4
    shown = np.repeat(rgb, 3, axis=2).astype(np.uint8)
    wrong = (np.asarray(truth) != np.asarray(prediction)) & (np.asarray(truth) != IGNORED)
    positive = wrong & (np.asarray(truth) == 0)
    negative = wrong & (np.asarray(prediction) == 0)
    kinds = (positive, negative, wrong & ~positive & ~negative)
    for (_, colour), where in zip(_ERRORS, kinds, strict=True):
        shown[where] = colour
    return shown


def contact_sheet(
    path: str | Path,
    rows: Sequence[tuple[Array, Array, Array]],
    titles: Sequence[str],
    num_classes: int,
    max_rows: int = 8,
    *,
    heading: str = "",
    class_names: Sequence[str] | None = None,
    colours: Array | None = None,
    panel: int = 384,
) -> Path:
    """Write a sheet of rows image | truth | prediction | error, each with its name and Dice.

    Args:
        path: the PNG to write; missing folders are made.
        rows: (image, truth, prediction) of each picture; image uint8 (or float 0 ... 1) [H, W] or
            [H, W, 3], masks of class ids [H, W].  Sizes may differ from row to row.
        titles: name of each row, such as the file name.
        num_classes: C.
        max_rows: at most so many rows, taken evenly from the first to the last.
        heading: words at the top left.
        class_names: names for the legend; default ``0 background``, ``1``, ``2`` ...
        colours: uint8 [C, 3]; default :func:`palette`.
        panel: largest side of a picture on the sheet, in pixels.  Smaller ones are enlarged by a
            whole factor, larger ones reduced.

    Returns:
        The path written.

    Raises:
        ValueError: no rows, or shapes or ids that do not fit.
        UserError: the file cannot be written.
    """
    _check_titles(rows, titles)
    take = np.linspace(0, len(rows) - 1, min(max(max_rows, 1), len(rows))).round().astype(int)
    shown = [(rows[i], titles[i]) for i in take]
    count = f"{len(take)} of {len(rows)} images"
    colours = palette(num_classes) if colours is None else colours
    names = class_names or default_names(num_classes)
    return _write_sheet(path, shown, names, colours, (heading, count), panel)


def best_median_worst(
    path: str | Path,
    rows: Sequence[tuple[Array, Array, Array]],
    titles: Sequence[str],
    num_classes: int,
    *,
    heading: str = "",
    class_names: Sequence[str] | None = None,
    colours: Array | None = None,
    panel: int = 384,
) -> Path:
    """Write a sheet of the worst, the median and the best image by Dice, as ``contact_sheet``.

    The Dice of an image is the mean over the classes that it has or is given, background left out.
    Images without any such class come into it only when there is no other.  Of two images only the
    worst and the best are shown, of one the best.
    """
    _check_titles(rows, titles)
    picked = _picked_by_dice([image_dice(row[1], row[2], num_classes) for row in rows])
    shown = [(rows[i], f"{word}: {titles[i]}") for word, i in picked]
    count = f"worst, median, best of {len(rows)} images"
    colours = palette(num_classes) if colours is None else colours
    names = class_names or default_names(num_classes)
    return _write_sheet(path, shown, names, colours, (heading, count), panel)


def _picked_by_dice(dice: Sequence[Mapping[int, float]]) -> list[tuple[str, int]]:
    """Pick (word, number) of the worst, median and best image, each image at most once."""
    means = {i: sum(d.values()) / len(d) for i, d in enumerate(dice) if d}
    order = sorted(means, key=lambda i: (means[i], i)) or [0]
    places = {len(order) - 1: "best", 0: "worst", (len(order) - 1) // 2: "median"}
    if len(order) < 3:
        places = {0: "worst", len(order) - 1: "best"}
    return [(places[place], order[place]) for place in sorted(places)]


def _check_titles(rows: Sequence[object], titles: Sequence[str]) -> None:
    if not rows or len(rows) != len(titles):
        raise ValueError(f"{len(rows)} rows and {len(titles)} titles: give one title for each row")


def _write_sheet(
    path: str | Path,
    shown: Sequence[tuple[tuple[Array, Array, Array], str]],
    names: Sequence[str],
    colours: Array,
    head: tuple[str, str],
    panel: int,
) -> Path:
    """Draw (row, title) below one another, with words at the top left and right, and save."""
    drawn = [_row_panels(row, colours, panel) for row, _ in shown]
    cell = max(_NARROWEST, *(tile.width for tiles in drawn for tile in tiles))
    width = _GAP + len(_COLUMNS) * (cell + _GAP)
    legend = _legend_lines(names, colours, width)
    top = _GAP + _LINE * (2 + len(legend)) + _GAP
    height = top + sum(_LINE + tiles[0].height + _GAP for tiles in drawn)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _two_texts(draw, _GAP, width, *head)
    for line, entries in enumerate(legend):
        _draw_legend(draw, entries, _GAP + _LINE * (1 + line))
    for column, name in enumerate(_COLUMNS):
        at = (_GAP + column * (cell + _GAP), top - _GAP - _LINE + 6)
        _text(draw, at, name, cell, _FAINT)
    for ((_, truth, prediction), title), tiles in zip(shown, drawn, strict=True):
        _two_texts(draw, top, width, title, _dice_text(truth, prediction, len(colours)))
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_GAP + column * (cell + _GAP), top + _LINE))
        top += _LINE + tiles[0].height + _GAP
    path = Path(path)
    save_picture(path, np.asarray(sheet))
    return path


def _row_panels(row: tuple[Array, Array, Array], colours: Array, panel: int) -> list[Image.Image]:
    """Draw one row's four pictures, all scaled alike."""
    image, truth, prediction = (np.asarray(part) for part in row)
    if not image.shape[:2] == truth.shape == prediction.shape:
        raise ValueError(
            f"image {image.shape}, truth {truth.shape} and prediction {prediction.shape} differ "
            "in size"
        )
    pictures = (
        _as_rgb(image),
        colour_mask(truth, len(colours), colours),
        colour_mask(prediction, len(colours), colours),
        error_map(image, truth, prediction),
    )
    height, width = truth.shape
    factor: float = panel / max(height, width)
    if factor >= 1:
        factor = math.floor(factor)  # whole, so that every pixel becomes an equal square
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    tiles = []
    for i, picture in enumerate(pictures):
        # Only a reduced photograph is smoothed; masks keep their colours.
        smooth = i == 0 and factor < 1
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        tiles.append(Image.fromarray(picture).resize(size, how))
    return tiles


def _as_rgb(image: Array) -> Picture:
    """Turn uint8, or float 0 ... 1, [H, W] or [H, W, 1 or 3] into RGB uint8 [H, W, 3]."""
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f":
        pixels = np.clip(np.nan_to_num(pixels) * 255 + 0.5, 0, 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image is uint8 or float 0 ... 1, not {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"an image is [H, W] or [H, W, 3], not {pixels.shape}")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def image_dice(truth: Array, prediction: Array, num_classes: int) -> dict[int, float]:
    """Dice of one image for each class that it has or is given, background left out.

    Args:
        truth: class ids [H, W]; pixels of id 255 are not counted.
        prediction: class ids [H, W].
        num_classes: C.

    Returns:
        Class -> Dice; empty if there is only background.
    """
    truth = np.asarray(truth)
    prediction = np.where(truth == IGNORED, 0, prediction)
    dice: dict[int, float] = {}
    for c in range(1, num_classes):
        size = int((truth == c).sum()) + int((prediction == c).sum())
        if size:
            dice[c] = 2 * int(((truth == c) & (prediction == c)).sum()) / size
    return dice


def _dice_text(truth: Array, prediction: Array, num_classes: int) -> str:
    """Return the Dice of one image in words, mean and by class."""
    dice = image_dice(truth, prediction, num_classes)
    if not dice:
        return "Dice -  (background only)"
    classes = "   ".join(f"{c}: {value:.2f}" for c, value in list(dice.items())[:8])
    return f"Dice {sum(dice.values()) / len(dice):.3f}   ({classes})"


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, ink: Colour = _INK
) -> None:
    """Write text; what is wider than ``width`` pixels loses its middle."""
    font = _font()
    text = shown = _drawable(text)
    keep = len(text)
    while keep > 1 and draw.textlength(shown, font=font) > width:
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"
    draw.text(at, shown, fill=ink, font=font)


def _two_texts(draw: ImageDraw.ImageDraw, top: int, width: int, left: str, right: str) -> None:
    """Write one text from the left edge and one up to the right edge, which has the precedence."""
    right_at = width - _GAP - math.ceil(draw.textlength(right, font=_font()))
    _text(draw, (_GAP, top), left, right_at - 2 * _GAP)
    _text(draw, (right_at, top), right, width)


def _drawable(text: str) -> str:
    """Replace what the built-in font cannot draw: accents are dropped, other signs become ``?``."""
    font = _font()
    blank = bytes(font.getmask("\uffff"))  # the box that stands for an unknown sign
    drawn = []
    for sign in text:
        if not sign.isascii() and bytes(font.getmask(sign)) == blank:
            base = unicodedata.normalize("NFKD", sign)[0]
            sign = base if base.isascii() else "?"
        drawn.append(sign if sign.isprintable() else "?")
    return "".join(drawn)


_Entry = tuple[str, Colour, int]  # words, colour, left edge


def default_names(num_classes: int) -> list[str]:
    """Names of class 0 ... C-1 where nobody gave any."""
    return ["0 background", *map(str, range(1, num_classes))]


def _legend_lines(names: Sequence[str], colours: Array, width: int) -> list[list[_Entry]]:
    """Lay the legend out in lines of at most ``width`` pixels."""
    num_classes = len(colours)
    names = [_drawable(name) for name in names]
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} class names for {num_classes} classes: give one for each")
    drawn = [tuple(int(v) for v in colour) for colour in colours]
    entries = [*zip(names, drawn, strict=True), *_ERRORS]
    font = _font()
    lines: list[list[_Entry]] = [[]]
    left = _GAP
    for i, (words, colour) in enumerate(entries):
        if i == num_classes:
            left += 3 * _GAP  # sets the errors apart from the classes
        needed = _LINE + math.ceil(font.getlength(words)) + 2 * _GAP
        if lines[-1] and left + needed > width:
            lines.append([])
            left = _GAP
        lines[-1].append((words, colour, left))  # type: ignore[arg-type]
        left += needed
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, entries: Sequence[_Entry], top: int) -> None:
    side = _TEXT
    for words, colour, left in entries:
        box = (left, top + 3, left + side, top + 3 + side)
        draw.rectangle(box, fill=colour, outline=_FAINT)
        draw.text((left + side + 6, top), words, fill=_INK, font=_font())


# --- overlays and overviews ----------------------------------------------------------------------


def blend(image: Array, mask: Array, colours: Array, side: int) -> NDArray[np.uint8]:
    """The image with its classes (all but 0) in colour, its longer side near ``side`` at most.

    Larger pictures are reduced; ones below 400 pixels are enlarged by a whole factor.
    """
    height, width = mask.shape
    longest = max(height, width)
    factor = side / longest if longest > side else float(max(1, min(side, 400) // longest))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    pixels = cv2.resize(image, size, interpolation=how)
    ids = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    tinted = rgb * 0.55 + colours[ids] * 0.45
    return np.where(ids[..., None] > 0, tinted, rgb).astype(np.uint8)


def reduced(pixels: Array, side: int) -> Array:
    """Take every n-th pixel, so that no side is longer than ``side``."""
    step = -(-max(pixels.shape[:2]) // side)
    return np.ascontiguousarray(pixels[::step, ::step])


def bar_length(widest: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) that is at most ``widest``."""
    power = 10.0 ** math.floor(math.log10(widest))
    return power * max(step for step in (1, 2, 5) if step * power <= widest * (1 + 1e-9))


def overlay(
    image: Array, mask: Array, names: Sequence[str], colours: Array, um_per_px: float | None
) -> NDArray[np.uint8]:
    """Draw an image with its classes in colour, and a legend and a scale bar below it."""
    picture = blend(image, mask, colours, OVERLAY_SIDE)
    height, width = picture.shape[:2]
    font = ImageFont.load_default(16)
    per_px = (um_per_px or 1.0) * mask.shape[1] / width  # um (or px of the file) in a drawn pixel
    bar = bar_length(max(width / 4 * per_px, per_px))
    scale = f"{bar:g} {'um' if um_per_px else 'px'}"
    entries: list[tuple[str, int, Any]] = [(scale, round(bar / per_px), None)]
    entries += [
        (name, 16, tuple(colour.tolist())) for name, colour in zip(names, colours, strict=True)
    ]
    page = max(width, 240)
    places, left, line = [], 10, 0
    for words, mark, _ in entries:
        needed = mark + 8 + math.ceil(font.getlength(_drawable(words))) + 20
        if left > 10 and left + needed > page:
            left, line = 10, line + 1
        places.append((left, height + 8 + 26 * line))
        left += needed
    canvas = Image.new("RGB", (page, height + 26 * (line + 1) + 10), (255, 255, 255))
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (words, mark, colour), (x, y) in zip(entries, places, strict=True):
        if colour is None:
            draw.rectangle((x, y + 8, x + mark - 1, y + 12), fill=(20, 20, 20))
        else:
            draw.rectangle((x, y + 3, x + 16, y + 19), fill=colour, outline=(110, 110, 110))
        draw.text((x + mark + 8, y), _drawable(words), fill=(20, 20, 20), font=font)
    return np.asarray(canvas)


def overview(
    pictures: Sequence[Array], titles: Sequence[str], heading: str = ""
) -> NDArray[np.uint8]:
    """Pictures (H, W, 3) of at most 400 pixels a side in rows of four, each with its title."""
    cell, columns = 410, min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    top = _GAP + (_LINE if heading else 0)
    size = (_GAP + cell * columns, top + (cell + _LINE) * rows)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (_GAP, _GAP), heading, size[0] - 2 * _GAP)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, upper = _GAP + cell * (i % columns), top + (cell + _LINE) * (i // columns)
        _text(draw, (left, upper), title, cell - 2 * _GAP)
        sheet.paste(Image.fromarray(picture), (left, upper + _LINE))
    return np.asarray(sheet)
