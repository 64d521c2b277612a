"""Pictures of masks: coloured, as gray files, over their image; and the parts of sheets.

Drawn pixel by pixel: a plot would smooth masks, and mix their colours.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile

from utils.files import IMAGE_SUFFIXES, replacing
from utils.metrics import IGNORED

Array = NDArray[Any]
Picture = NDArray[np.uint8]

# Class 0 in dark gray; then Okabe and Ito's colours, told apart by colour-blind readers too
# (Wong, Nature Methods 8, 441, 2011).
_PALETTE = ("333333", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")
_UNLABELLED = (150, 150, 150)
_OUTSIDE, OUTSIDE_NAME = 0.35, "not measured"  # how dark what is outside the field becomes

OVERLAY_SIDE = 2048  # pixels; larger pictures are reduced for the overlay
GAP = 10  # pixels between the parts of a sheet, and around them
LINE = 26  # height of a line of text
_BOX = 16  # side of a colour in a legend
_PAPER, _INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def palette(num_classes: int) -> Picture:
    """Colours of class 0 ... C-1, uint8 (C, 3), all different (up to 256 classes).

    The first eight are safe for colour-blind readers; more are spread over hue and lightness.
    """
    colours = [tuple(bytes.fromhex(text)) for text in _PALETTE[:num_classes]]
    step = 0
    while len(colours) < num_classes:
        hue = (0.11 + step * 0.61803398875) % 1.0  # golden ratio: neighbours lie far apart
        lightness = (0.70, 0.45, 0.82, 0.33)[step % 4]
        colour = tuple(round(255 * v) for v in colorsys.hls_to_rgb(hue, lightness, 0.75))
        if colour not in colours:
            colours.append(colour)
        step += 1
    return np.array(colours, np.uint8).reshape(-1, 3)


def class_colours(num_classes: int, texts: Sequence[str] = ()) -> Picture:
    """Colours of class 0 ... C-1 from six hexadecimal digits each; without them ``palette``."""
    if len(texts) != num_classes:
        return palette(num_classes)
    return np.array([list(bytes.fromhex(text.removeprefix("#"))) for text in texts], np.uint8)


def default_names(num_classes: int) -> list[str]:
    """Names of class 0 ... C-1 where none are given."""
    return ["0 background", *map(str, range(1, num_classes))]


def colour_mask(mask: Array, num_classes: int, colours: Array | None = None) -> Picture:
    """Colour a mask of class ids (H, W): RGB uint8 (H, W, 3), unlabelled pixels (id 255) gray.

    Colours are uint8 (C, 3), by default ``palette``. ValueError if an id lies outside 0 ... C-1.
    """
    unlabelled = mask == IGNORED
    colours = palette(num_classes) if colours is None else colours
    coloured = colours[_class_ids(np.where(unlabelled, 0, mask), num_classes)]
    coloured[unlabelled] = _UNLABELLED
    return coloured


def _class_ids(ids: Array, num_classes: int) -> Array:
    """The mask itself, once its shape and ids are checked."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"a mask is [H, W] of integers, not {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"mask holds class id {wrong}; ids must lie in 0 ... {num_classes - 1}")
    return ids


def grays_of(mapping: Sequence[int]) -> Picture:
    """The gray of each class id, uint8 (256,); of 255, outside the field, one far from all."""
    levels = np.arange(256)
    far = np.abs(levels[:, None] - np.array(mapping)).min(axis=1).argmax()
    grays = np.full(256, far, np.uint8)
    grays[: len(mapping)] = mapping
    return grays


def save_prediction(path: str | Path, mask: Array, mapping: Sequence[int]) -> Path:
    """Write a mask of class ids (H, W) as a gray, lossless PNG: class c becomes ``mapping[c]``.

    An image suffix at the end of the path becomes ``.png``; missing folders are made. Returns the
    path written. ValueError if an id has no gray value, or a gray value lies outside 0 ... 255;
    UserError if the file cannot be written.
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
    """Write a PNG as a whole, or raise UserError; missing folders are made."""
    with replacing(path, flag, durable=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def write_png(path: Path, pixels: Array, clear: Array | None = None) -> None:
    """Write pixels, (H, W) or (H, W, 3) in RGB order, as a PNG; missing folders are made.

    Where ``clear`` (H, W) is true the picture is transparent.
    """
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels  # OpenCV writes BGR
    if clear is not None and clear.any():
        colours = stored if stored.ndim == 3 else np.repeat(stored[..., None], 3, axis=2)
        stored = np.dstack([colours, np.where(clear, 0, 255).astype(np.uint8)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(stored))[1].tobytes())


def is_intact(path: Path) -> bool:
    """Whether a PNG is there and its checksums hold."""
    if not path.is_file():
        return False
    try:
        with PngImageFile(path) as file:
            file.verify()
    except Exception:  # Pillow meets broken files with any exception
        return False
    return True


def blend(image: Array, mask: Array, colours: Array, side: int) -> Picture:
    """The image with its classes (all but 0) in colour, its longer side near ``side`` at most.

    What is outside the field (id 255) is darkened. Larger pictures are reduced; ones below 400
    pixels are enlarged by a whole factor.
    """
    height, width = mask.shape
    longest = max(height, width)
    factor = side / longest if longest > side else float(max(1, min(side, 400) // longest))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    rgb = as_rgb(cv2.resize(image, size, interpolation=how))
    ids = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    outside = (ids == IGNORED)[..., None] & (len(colours) <= IGNORED)
    tinted = rgb * 0.55 + colours[np.where(outside[..., 0], 0, ids)] * 0.45
    shown = np.where(outside, rgb * _OUTSIDE, np.where(ids[..., None] > 0, tinted, rgb))
    return shown.astype(np.uint8)


def reduced(pixels: Array, side: int) -> Array:
    """Take every n-th pixel, so that no side is longer than ``side``."""
    step = -(-max(pixels.shape[:2]) // side)
    return np.ascontiguousarray(pixels[::step, ::step])


def as_rgb(image: Array) -> Picture:
    """An image uint8 (H, W) or (H, W, 3) as RGB (H, W, 3)."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"an image is uint8 [H, W] or [H, W, 3], not {image.dtype} {image.shape}")
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def overlay(
    image: Array, mask: Array, names: Sequence[str], colours: Array, um_per_px: float | None
) -> Picture:
    """Draw an image with its classes in colour, and a scale bar and a legend below it.

    The image is uint8 (H, W) or (H, W, 3), its mask holds class ids (H, W), colours are uint8
    (C, 3). Without micrometres per pixel the bar is in pixels of the file.
    """
    picture = blend(image, mask, colours, OVERLAY_SIDE)
    width = picture.shape[1]
    per_px = (um_per_px or 1.0) * mask.shape[1] / width  # µm (or px of the file) in a drawn pixel
    bar = bar_length(max(width / 4 * per_px, per_px))
    scale = f"{bar:g} {'µm' if um_per_px else 'px'}"
    page = max(width, 240)
    if (mask == IGNORED).any() and len(colours) <= IGNORED:
        names, colours = [*names, OUTSIDE_NAME], np.vstack([colours, [(60, 60, 60)]])
    below = legend(over_image(names), colours, page, (scale, round(bar / per_px)))
    return np.vstack([beside([picture], [0], page), paper(8, page), below])


def over_image(names: Sequence[str]) -> list[str]:
    """Names of the classes in a legend of ``blend``, which leaves class 0 as it is."""
    return [f"{names[0]} (not coloured)", *names[1:]]


def bar_length(widest: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) that is at most ``widest``."""
    power = 10.0 ** math.floor(math.log10(widest))
    return power * max(step for step in (1, 2, 5) if step * power <= widest * (1 + 1e-9))


def sized(
    names: Sequence[str], scales: Sequence[tuple[int, float | None]], widths: Sequence[int]
) -> tuple[list[str], tuple[str, int] | None]:
    """Titles of pictures, and the scale bar of all, None if they have several scales.

    ``scales`` are the width in pixels of the file and micrometres per pixel of each image,
    ``widths`` the drawn pixels. Where there is no common bar, titles tell how wide the field is.
    """
    per_px = [(um or 1.0) * px / width for (px, um), width in zip(scales, widths, strict=True)]
    units = {"µm" if um else "px" for _, um in scales}
    if len(units) == 1 and max(per_px) <= 1.01 * min(per_px):
        length = bar_length(max(min(widths) / 2 * per_px[0], per_px[0]))
        return list(names), (f"{length:g} {units.pop()}", max(1, round(length / per_px[0])))
    fields = (f"{px * um:.3g} µm" if um else f"{px} px" for px, um in scales)
    return [f"{n} ({wide} wide)" for n, wide in zip(names, fields, strict=True)], None


def paper(height: int, width: int) -> Picture:
    """White: an empty strip of a sheet, which is a stack of strips (H, width, 3)."""
    return np.full((height, width, 3), _PAPER, np.uint8)


def beside(pictures: Sequence[Array], lefts: Sequence[int], width: int) -> Picture:
    """Pictures (H, W, 3) beside one another, each from its left edge on."""
    strip = paper(max(len(picture) for picture in pictures), width)
    for left, picture in zip(lefts, pictures, strict=False):  # the last row may be short
        strip[: len(picture), left : left + picture.shape[1]] = picture
    return strip


def overview(pictures: Sequence[Array], titles: Sequence[str], heading: str = "") -> Picture:
    """Pictures (H, W, 3) of at most 400 pixels a side in rows of four, each with its title."""
    columns = min(4, len(pictures))
    *lefts, width = (GAP + 410 * column for column in range(columns + 1))
    parts = [paper(GAP, width)]
    if heading:
        parts.append(text_line([heading], [GAP], width))
    for i in range(0, len(pictures), columns):
        parts.append(text_line(titles[i : i + columns], lefts, width))
        parts += [beside(pictures[i : i + columns], lefts, width), paper(GAP, width)]
    return np.vstack(parts)


def text_line(
    texts: Sequence[str], lefts: Sequence[int], width: int, ink: tuple[int, int, int] = _INK
) -> Picture:
    """A line of texts; one that would run into the next is shortened in its middle."""
    line = paper(LINE, width)
    for text, left, right in zip(texts, lefts, [*lefts[1:], width], strict=False):
        text = shown = _one_line(text)
        keep = len(text)
        while keep > 1 and text_length(shown) > right - left - GAP:
            keep -= 1
            shown = f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"
        _write(line, shown, left, ink)
    return line


def legend(
    names: Sequence[str], colours: Array, width: int, bar: tuple[str, int] | None = None
) -> Picture:
    """Lines of names beside their colours (C, 3), after a scale bar: its words and its pixels."""
    if len(names) != len(colours):
        raise ValueError(f"{len(names)} class names for {len(colours)} classes: give one for each")
    marks = [(_one_line(name), _BOX, tuple(c)) for name, c in zip(names, colours, strict=True)]
    parts = [paper(LINE, width)]
    left = GAP
    for words, side, colour in [*([(*bar, None)] if bar else []), *marks]:
        needed = side + 8 + text_length(words) + 2 * GAP
        if left > GAP and left + needed > width:
            parts.append(paper(LINE, width))
            left = GAP
        line = parts[-1]
        if colour is None:
            line[8:13, left : left + side] = _INK
        else:
            line[3 : 4 + side, left : left + side + 1] = FAINT
            line[4 : 3 + side, left + 1 : left + side] = colour
        _write(line, words, left + side + 8)
        left += needed
    return np.vstack(parts)


def text_length(text: str) -> int:
    """Pixels that a text is wide."""
    return math.ceil(_font().getlength(text))


def _write(line: Picture, text: str, left: int, ink: tuple[int, int, int] = _INK) -> None:
    """Write a text into a line, in place."""
    picture = Image.fromarray(line)
    ImageDraw.Draw(picture).text((left, 3), text, fill=ink, font=_font())
    line[:] = np.asarray(picture)


def _one_line(text: str) -> str:
    """Replace line feeds and the like, which file names may hold."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has Greek letters and µ."""
    path = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), 14)
