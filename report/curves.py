"""Learning curves of a run as a picture: its losses by epoch, and its scores at evaluations.

Drawn with Pillow alone, so that every run gets its curves, whatever else is installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from utils.commandline import UserError
from utils.drawing import palette
from utils.log import read_metrics

Colour = tuple[int, int, int]
Point = tuple[float, float]

TITLES = {
    "self": "Pretraining without labels",
    "fine": "Fine-tuning with labels",
    "sup": "Supervised training with labels",
}
_LOSS_NAMES = {"loss": "total loss", "dice": "Dice loss", "cross_entropy": "cross-entropy"}
_NOT_LOSSES = {"stage", "epoch", "lr", "evaluation"}

_WIDTH = 1200  # of the whole picture, in pixels
_PANEL = 360  # height of a panel with its title and legend
_MARGIN = 24
_AXIS = 58  # room for the numbers at the left of a panel
_SMOOTH = 3  # lines are drawn so many times larger and reduced, which smooths them
_SIZE = 14  # of letters
_LINE = 20
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)
_FAINT: Colour = (105, 105, 105)
_GRID: Colour = (224, 224, 224)
# Okabe and Ito's colours, the yellow left out: it is too pale for a line on white.
_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (86, 180, 233),
)


@dataclass
class Curve:
    """One line of a panel: ``points`` (epoch, value) in their order; nan breaks the line."""

    name: str
    colour: Colour
    points: list[Point] = field(default_factory=list)
    width: float = 1.5
    dots: bool = False


@dataclass
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        curves: in the order of the legend; the first is drawn on top.
        low, high: range of the values.
        marked: (epoch, value, words) of a point with a ring around it.
    """

    title: str
    curves: list[Curve]
    low: float
    high: float
    marked: tuple[float, float, str] | None = None

    def epochs(self) -> tuple[float, float]:
        """Epoch 0 and the last one, at least one apart."""
        return 0.0, max(1.0, *(x for curve in self.curves for x, _ in curve.points))


def learning_curve(path_png: str | Path, metrics_jsonl: str | Path) -> Path:
    """Draw a run's learning curves into a PNG.

    Args:
        path_png: the file to write; missing folders are made.
        metrics_jsonl: the run's ``metrics.jsonl``.

    Returns:
        The path written.

    Raises:
        UserError: nothing can be read from the one, or the other cannot be written.
    """
    path = Path(path_png)
    picture = curve_picture(metrics_jsonl)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or give an "
            "output_dir that may be written to"
        ) from error
    return path


def curve_picture(metrics_jsonl: str | Path) -> Image.Image:
    """Draw a run's learning curves: a row for each stage, losses at the left, scores at the right.

    Args:
        metrics_jsonl: the run's ``metrics.jsonl``; lines cut off by a kill are passed over.

    Raises:
        UserError: the file cannot be read, or holds no epoch yet.
    """
    rows = panels(_read(Path(metrics_jsonl)))
    if not rows:
        raise UserError(f"{metrics_jsonl}: holds no epoch yet; train first")
    height = _MARGIN + len(rows) * (_PANEL + _MARGIN)
    picture = Image.new("RGB", (_WIDTH, height), _PAPER)
    for i, row in enumerate(rows):
        width = (_WIDTH - _MARGIN * (1 + len(row))) // len(row)
        for j, panel in enumerate(row):
            left = _MARGIN + j * (width + _MARGIN)
            drawn = _draw_panel(panel, width)
            picture.paste(drawn, (left, _MARGIN + i * (_PANEL + _MARGIN)))
    return picture


def panels(entries: Iterable[Mapping[str, Any]]) -> list[list[Panel]]:
    """Lay out the lines of a ``metrics.jsonl``: for each stage its losses, then its scores."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        stages.setdefault(str(entry.get("stage")), []).append(entry)
    rows = []
    for stage, lines in stages.items():
        title = TITLES.get(stage, stage)
        scores = [e["evaluation"] for e in lines if isinstance(e.get("evaluation"), dict)]
        row = [_loss_panel(title, lines), _score_panel(scores)]
        if any(row):
            rows.append([panel for panel in row if panel])
    return rows


def best_evaluation(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The evaluation with the highest ACC, of equals the first; None without any."""
    known = [e for e in evaluations if _number(e.get("acc"))]
    return max(known, key=lambda e: e["acc"]) if known else None


def _loss_panel(title: str, lines: Sequence[Mapping[str, Any]]) -> Panel | None:
    """The losses of a stage, the total one first."""
    epochs = [e for e in lines if _number(e.get("epoch"))]
    names = dict.fromkeys(name for e in epochs for name in e if name not in _NOT_LOSSES)
    names = {n: None for n in names if any(_number(e.get(n)) for e in epochs)}
    parts = [name for name in names if name != "loss"]
    curves = [
        Curve(_loss_name(name), _COLOURS[i % len(_COLOURS)], _points(epochs, name))
        for i, name in enumerate(parts)
    ]
    if "loss" in names:
        curves.insert(0, Curve(_loss_name("loss"), _INK, _points(epochs, "loss"), width=2))
    values = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    if not values:
        return None
    low, high = min(0.0, *values), max(values)
    return Panel(f"{title}: losses", curves, low, high if high > low else low + 1)


def _loss_name(name: str) -> str:
    return _LOSS_NAMES.get(name, name.replace("_", " ") + " loss")


def _score_panel(evaluations: Sequence[Mapping[str, Any]]) -> Panel | None:
    """Mean Dice, ACC and the Dice of each class, the best by ACC marked."""
    evaluations = [e for e in evaluations if _number(e.get("epoch"))]
    classes = dict.fromkeys(int(n[4:]) for e in evaluations for n in e if _is_class_dice(n))
    colours = palette(max(classes, default=0) + 1).tolist()
    curves = [
        Curve(words, colour, _points(evaluations, name), width=2.5, dots=True)
        for name, words, colour in (("dice", "Dice", _INK), ("acc", "ACC", _FAINT))
    ]
    for c in sorted(classes):
        points = _points(evaluations, f"dice{c}")
        curves.append(Curve(f"Dice {c}", _darker(colours[c]), points, dots=True))
    if not any(math.isfinite(y) for curve in curves for _, y in curve.points):
        return None
    marked = None
    best = best_evaluation(evaluations)
    if best is not None:
        dice = f", Dice {best['dice']:.3f}" if _number(best.get("dice")) else ""
        words = f"best by ACC: epoch {best['epoch']}, ACC {best['acc']:.3f}{dice}"
        marked = (float(best["epoch"]), float(best["acc"]), words)
    return Panel("Scores on the test set", curves, 0.0, 1.0, marked)


def _is_class_dice(name: str) -> bool:
    return name.startswith("dice") and name[4:].isdecimal()


def _darker(colour: Sequence[int]) -> Colour:
    """A colour of the masks, dark enough for a line on white."""
    r, g, b = (int(v) for v in colour)
    factor = min(1.0, 165 / (0.3 * r + 0.59 * g + 0.11 * b))
    return round(r * factor), round(g * factor), round(b * factor)


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [
        (float(e["epoch"]), float(e[name]) if _number(e.get(name)) else math.nan) for e in entries
    ]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); give the metrics.jsonl of a run"
        ) from error


def ticks(low: float, high: float, most: int = 7, whole: bool = False) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart, within a range.

    Args:
        low, high: the range, ``low`` < ``high``.
        most: at most so many.
        whole: whole numbers only.
    """
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    if whole:
        step = max(step, 1.0)
    for factor in (1, 2, 5, 10, 20, 50, 100):
        first = math.ceil(low / (step * factor) - 1e-9)
        last = math.floor(high / (step * factor) + 1e-9)
        if last - first < most:
            break
    return [n * step * factor for n in range(first, last + 1)]


# --- drawing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Where epochs and values lie in the pixels of a panel."""

    left: int
    top: int
    right: int
    bottom: int
    epochs: tuple[float, float]
    values: tuple[float, float]

    def at(self, epoch: float, value: float) -> Point:
        """Pixel of a point."""
        x = (epoch - self.epochs[0]) / (self.epochs[1] - self.epochs[0])
        y = (value - self.values[0]) / (self.values[1] - self.values[0])
        return (
            self.left + x * (self.right - self.left),
            self.bottom - y * (self.bottom - self.top),
        )


def _draw_panel(panel: Panel, width: int) -> Image.Image:
    entries = _legend(panel.curves, width)
    top = 2 * _LINE + _LINE * len(entries) + (_LINE if panel.marked else 0)
    high = panel.high + 0.03 * (panel.high - panel.low)
    frame = _Frame(
        _AXIS, top, width - 12, _PANEL - 2 * _LINE - 4, panel.epochs(), (panel.low, high)
    )
    large = Image.new("RGB", (width * _SMOOTH, _PANEL * _SMOOTH), _PAPER)
    _draw_lines(ImageDraw.Draw(large), panel, frame)
    drawn = large.resize((width, _PANEL), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(drawn)
    _draw_numbers(draw, frame)
    draw.text((0, 0), panel.title, fill=_INK, font=_font(_SIZE + 3))
    for i, line in enumerate(entries):
        for curve, left in line:
            y = 30 + i * _LINE + _LINE // 2
            draw.line((left, y, left + 18, y), fill=curve.colour, width=3)
            draw.text((left + 24, y), curve.name, fill=_INK, font=_font(), anchor="lm")
    if panel.marked:
        y = 30 + len(entries) * _LINE + _LINE // 2
        draw.ellipse((3, y - 6, 15, y + 6), outline=_INK, width=2)
        draw.text((24, y), panel.marked[2], fill=_INK, font=_font(), anchor="lm")
    return drawn


def _draw_lines(draw: ImageDraw.ImageDraw, panel: Panel, frame: _Frame) -> None:
    """Draw the grid, the curves and the ring, ``_SMOOTH`` times as large."""
    n = _SMOOTH
    for value in ticks(*frame.values):
        _, y = frame.at(0, value)
        draw.line((frame.left * n, y * n, frame.right * n, y * n), fill=_GRID, width=n)
    left, bottom = frame.left * n, frame.bottom * n
    draw.line((left, frame.top * n, left, bottom), fill=_FAINT, width=n)
    draw.line((left, bottom, frame.right * n, bottom), fill=_FAINT, width=n)
    for epoch in ticks(*frame.epochs, whole=True):
        x, _ = frame.at(epoch, 0)
        draw.line((x * n, bottom, x * n, bottom + 5 * n), fill=_FAINT, width=n)
    for curve in reversed(panel.curves):
        for piece in _pieces(curve.points):
            at = [(x * n, y * n) for x, y in (frame.at(*point) for point in piece)]
            if len(at) > 1:
                draw.line(at, fill=curve.colour, width=round(curve.width * n), joint="curve")
            for x, y in at if curve.dots or len(at) == 1 else ():
                r = 3.5 * n
                draw.ellipse((x - r, y - r, x + r, y + r), fill=curve.colour)
    if panel.marked:
        x, y = frame.at(*panel.marked[:2])
        r = 8 * n
        box = (x * n - r, y * n - r, x * n + r, y * n + r)
        draw.ellipse(box, outline=_INK, width=2 * n)


def _pieces(points: Iterable[Point]) -> list[list[Point]]:
    """Split a line where a value is missing."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _draw_numbers(draw: ImageDraw.ImageDraw, frame: _Frame) -> None:
    for value in ticks(*frame.values):
        _, y = frame.at(0, value)
        draw.text((frame.left - 8, y), f"{value:g}", fill=_FAINT, font=_font(), anchor="rm")
    for epoch in ticks(*frame.epochs, whole=True):
        x, _ = frame.at(epoch, 0)
        draw.text((x, frame.bottom + 8), f"{epoch:g}", fill=_FAINT, font=_font(), anchor="mt")
    middle = (frame.left + frame.right) / 2
    draw.text((middle, _PANEL - 2), "epoch, counted from 0", fill=_FAINT, font=_font(), anchor="mb")


def _legend(curves: Sequence[Curve], width: int) -> list[list[tuple[Curve, int]]]:
    """Lay the legend out in lines: (curve, left edge)."""
    lines: list[list[tuple[Curve, int]]] = [[]]
    left = 0
    for curve in curves:
        needed = 24 + math.ceil(_font().getlength(curve.name)) + 18
        if lines[-1] and left + needed > width:
            lines.append([])
            left = 0
        lines[-1].append((curve, left))
        left += needed
    return lines


def _font(size: int = _SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
