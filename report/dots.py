"""Single values of several methods as a picture: a dot for each repeat, a bar at the mean."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from report.curves import ticks

Colour = tuple[int, int, int]
Values = Mapping[int, float]

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)
_FAINT: Colour = (105, 105, 105)
_GRID: Colour = (224, 224, 224)
# Okabe and Ito's colours, the yellow left out; a repeat has the same one in all rows.
_COLOURS: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (86, 180, 233),
)
_SIZE = 14  # of letters
_ROW = 30
_PANEL = 440  # width of a panel's axis
_MARGIN = 24
_SMOOTH = 3  # drawn so many times larger and reduced, which smooths the dots


def dots_png(panels: Sequence[tuple[str, Sequence[tuple[str, Values]]]]) -> bytes:
    """Draw panels side by side that share their rows and the axis of values.

    Args:
        panels: (title, rows); a row is (name, repeat -> value), the same names in each panel.

    Returns:
        A PNG file's bytes.
    """
    names = [name for name, _ in panels[0][1]]
    known = [v for _, rows in panels for _, found in rows for v in found.values()]
    low, high = value_range([v for v in known if math.isfinite(v)])
    left = _MARGIN + math.ceil(max((_font().getlength(n) for n in names), default=0)) + 12
    step = _PANEL + 2 * _MARGIN
    size = (left + step * len(panels), 2 * _MARGIN + _ROW * (len(names) + 2))
    large = Image.new("RGB", (size[0] * _SMOOTH, size[1] * _SMOOTH), _PAPER)
    for i, (_, rows) in enumerate(panels):
        _draw_marks(ImageDraw.Draw(large), rows, left + i * step, low, high)
    picture = large.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        draw.text((left - 12, _row_y(i)), name, fill=_INK, font=_font(), anchor="rm")
    for i, (title, _) in enumerate(panels):
        start = left + i * step
        draw.text((start, _MARGIN), title, fill=_INK, font=_font(_SIZE + 2), anchor="lm")
        for value in ticks(low, high):
            x, bottom = _x(value, start, low, high), _row_y(len(names)) - _ROW / 2 + 8
            draw.text((x, bottom), f"{value:g}", fill=_FAINT, font=_font(), anchor="mt")
    repeats = sorted({r for _, rows in panels for _, found in rows for r in found})
    _draw_legend(draw, repeats, left, size[1] - _MARGIN)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """An axis that holds all values with a little room, within 0 ... 1."""
    if not values:
        return 0.0, 1.0
    room = 0.08 * (max(values) - min(values)) + 0.02
    return max(0.0, min(values) - room), min(1.0, max(values) + room)


def _draw_marks(
    draw: ImageDraw.ImageDraw,
    rows: Sequence[tuple[str, Values]],
    start: int,
    low: float,
    high: float,
) -> None:
    """Grid, dots and means of a panel whose axis starts at ``start``, so many times larger."""
    n = _SMOOTH
    top, bottom = (_row_y(0) - _ROW / 2) * n, (_row_y(len(rows)) - _ROW / 2) * n
    for value in ticks(low, high):
        x = _x(value, start, low, high) * n
        draw.line((x, top, x, bottom), fill=_GRID, width=n)
    for i, (_, found) in enumerate(rows):
        y = _row_y(i) * n
        known = {r: v for r, v in sorted(found.items()) if math.isfinite(v)}
        if known:
            x = _x(sum(known.values()) / len(known), start, low, high) * n
            draw.line((x, y - 10 * n, x, y + 10 * n), fill=_INK, width=2 * n)
        for number, (repeat, value) in enumerate(known.items()):
            x, r = _x(value, start, low, high) * n, 5 * n
            y = (_row_y(i) + 3 * (number - (len(known) - 1) / 2)) * n  # equal ones stay visible
            draw.ellipse(
                (x - r, y - r, x + r, y + r), fill=_colour(repeat), outline=_PAPER, width=n
            )


def _draw_legend(draw: ImageDraw.ImageDraw, repeats: Sequence[int], left: float, y: int) -> None:
    x = float(left)
    for repeat in repeats:
        draw.ellipse((x, y - 5, x + 10, y + 5), fill=_colour(repeat))
        text = f"annotated image {repeat}"
        draw.text((x + 15, y), text, fill=_INK, font=_font(), anchor="lm")
        x += 15 + _font().getlength(text) + 18
    if repeats:
        draw.line((x + 2, y - 8, x + 2, y + 8), fill=_INK, width=2)
        draw.text((x + 10, y), "mean", fill=_INK, font=_font(), anchor="lm")


def _x(value: float, start: float, low: float, high: float) -> float:
    return start + (value - low) / (high - low) * _PANEL


def _row_y(row: int) -> float:
    return _MARGIN + _ROW * (row + 1)


def _colour(repeat: int) -> Colour:
    return _COLOURS[repeat % len(_COLOURS)]


def _font(size: int = _SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
