"""Figures of numbers: a run's learning curves, and the single values behind a table.

Matplotlib draws on its Agg canvas, without pyplot, which would change the importing program.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from imaging.drawing import palette
from utils.commandline import UserError
from utils.files import replace_file
from utils.log import read_metrics

Entry = Mapping[str, Any]
Values = Mapping[int, float]
Doses = Mapping[int, Sequence[float]]
"""Values of runs by dose."""
Array = NDArray[Any]

TITLES = {
    "self": "Pretraining without labels",
    "fine": "Fine-tuning with labels",
    "sup": "Supervised training with labels",
}
_LOSS_NAMES = {"loss": "total loss", "dice_loss": "Dice loss", "cross_entropy": "cross-entropy"}
_LOSS_NAMES |= {"dice": "Dice loss, an earlier version's form"}
_NOT_LOSSES = {"stage", "epoch", "lr", "evaluation"}

_DPI = 100
_WIDTH, _PANEL, _MARGIN = 1200, 360, 24  # pixels: the picture, height of a panel, between panels
_MOST_DOTS = 60  # evaluations; more would hide the lines
_MOST_NAMES = 25  # of a legend; more would leave no room for the lines
_INK, _FAINT, _GRID = "#141414", "#696969", "#e0e0e0"
# Okabe and Ito's colours (Wong, Nature Methods 8, 441, 2011) without their yellow, which is too
# pale for a line on white.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")


def learning_curve(png_path: str | Path, metrics_jsonl: str | Path) -> Path:
    """Write ``curve_picture`` as a PNG (UserError if it cannot be); missing folders are made."""
    replace_file(png_path, _png(curve_picture(metrics_jsonl)))
    return Path(png_path)


def curve_picture(metrics_jsonl: str | Path) -> Image.Image:
    """Draw a run's learning curves, 1200 pixels wide, without lines that a kill cut off.

    UserError if the ``metrics.jsonl`` cannot be read, or holds no epoch yet.
    """
    try:
        figure = curve_figure(read_metrics(metrics_jsonl))
    except OSError as error:
        raise UserError(
            f"{metrics_jsonl}: cannot be read ({error.strerror or error}); give the metrics.jsonl "
            "of a run"
        ) from error
    if not figure.axes:
        raise UserError(f"{metrics_jsonl}: holds no epoch yet; train first")
    return _drawn(figure)


def curve_figure(entries: Iterable[Entry]) -> Figure:
    """Draw the lines of a ``metrics.jsonl``: a row for each stage, losses left, scores right."""
    stages: dict[str, list[Entry]] = {}
    for entry in entries:
        stages.setdefault(str(entry.get("stage")), []).append(entry)
    rows = []
    for stage, lines in stages.items():
        evaluations = [e["evaluation"] for e in lines if isinstance(e.get("evaluation"), dict)]
        epochs, scores = ([e for e in es if _known(e.get("epoch"))] for es in (lines, evaluations))
        losses, scored = _loss_names(epochs), _score_names(scores)
        if losses or scored:
            rows.append((TITLES.get(stage, stage), epochs, losses, scores, scored))
    figure = _figure(_WIDTH, _MARGIN + len(rows) * (_PANEL + _MARGIN))
    grid = figure.add_gridspec(max(1, len(rows)), 2)
    for i, (title, epochs, losses, scores, scored) in enumerate(rows):
        left, right = (grid[i, 0], grid[i, 1]) if losses and scored else (grid[i, :], grid[i, :])
        if losses:
            _draw_losses(figure.add_subplot(left), title, epochs, losses)
        if scored:
            _draw_scores(figure.add_subplot(right), scores, scored)
    return figure


def _loss_names(epochs: Sequence[Entry]) -> dict[str, str]:
    """The losses of a stage that are ever known, the total one first: key -> words."""
    found = dict.fromkeys(n for e in epochs for n in e if n not in _NOT_LOSSES and _known(e[n]))
    names = sorted(found, key=lambda name: name != "loss")
    return {name: _LOSS_NAMES.get(name, name.replace("_", " ") + " loss") for name in names}


def _score_names(evaluations: Sequence[Entry]) -> dict[str, str]:
    """Mean Dice, ACC and the Dice of each class: key -> words; empty if none is ever known."""
    found = dict.fromkeys(n for e in evaluations for n in e)
    classes = sorted(int(n[4:]) for n in found if n.startswith("dice") and n[4:].isdecimal())
    names = {"dice": "Dice", "acc": "ACC", **{f"dice{c}": f"Dice {c}" for c in classes}}
    return names if any(_known(e.get(name)) for e in evaluations for name in names) else {}


def _draw_losses(axes: Axes, title: str, epochs: Sequence[Entry], names: Mapping[str, str]) -> None:
    colours = cycle(_COLOURS)
    for name, words in names.items():
        total = name == "loss"  # the first, if it is there
        colour, width = (_INK, 1.8) if total else (next(colours), 1.4)
        _draw_curve(axes, epochs, name, words, color=colour, lw=width)
    low, high = min(0, axes.dataLim.ymin), axes.dataLim.ymax
    axes.set_ylim(low, high + 0.03 * (high - low) if high > low else low + 1)
    _finish(axes, f"{title}: losses", "epoch, counted from 0")


def _draw_scores(axes: Axes, evaluations: Sequence[Entry], names: Mapping[str, str]) -> None:
    """Draw the scores, with a ring around the highest ACC (of equals the first)."""
    colours = {f"dice{c}": _darker(rgb) for c, rgb in enumerate(palette(256).tolist())}
    colours |= {"dice": _INK, "acc": _FAINT}
    marker = "o" if len(evaluations) <= _MOST_DOTS else ""
    for number, (name, words) in enumerate(names.items()):
        width = 2 if name in ("dice", "acc") else 1.4
        words = words if number < _MOST_NAMES else "_"  # which the legend leaves out
        _draw_curve(axes, evaluations, name, words, color=colours[name], lw=width, marker=marker)
    axes.set_ylim(0, 1.03)
    below = "epoch, counted from 0"
    if known := [e for e in evaluations if _known(e.get("acc"))]:
        best = max(known, key=lambda e: e["acc"])
        ring: dict[str, Any] = {"mec": _INK, "mfc": "none", "ms": 13, "mew": 1.6, "zorder": 4}
        axes.plot(best["epoch"], best["acc"], "o", clip_on=False, **ring)
        dice = f", Dice {best['dice']:.3f}" if _known(best.get("dice")) else ""
        below += f"\nringed, best by ACC: epoch {best['epoch']}, ACC {best['acc']:.3f}{dice}"
    learnt = any(e.get("fit") for e in evaluations)
    _finish(axes, "Fit to learnt labels, no score" if learnt else "Scores on the test set", below)


def _darker(colour: Sequence[int]) -> str:
    """A colour of the masks, dark enough for a line on white."""
    red, green, blue = colour
    factor = min(1.0, 165 / (0.3 * red + 0.59 * green + 0.11 * blue))
    return "#" + "".join(f"{round(value * factor):02x}" for value in colour)


def _draw_curve(axes: Axes, entries: Sequence[Entry], name: str, words: str, **how: Any) -> None:
    """Draw one line, with gaps where a value is unknown."""
    x = np.array([e["epoch"] for e in entries], float)
    y = np.array([e[name] if _known(e.get(name)) else math.nan for e in entries])
    # The first curve lies on top.
    how |= {"clip_on": False, "zorder": 3 - len(axes.get_lines()) / 1000}
    axes.plot(x, y, label=words, ms=5, **how)
    unknown = np.concatenate([[True], np.isnan(y), [True]])
    alone = unknown[:-2] & ~unknown[1:-1] & unknown[2:]  # no line leads to these
    if alone.any():
        axes.plot(x[alone], y[alone], ms=5, **how | {"marker": "o", "ls": ""})


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _finish(axes: Axes, title: str, below: str) -> None:
    """Words around the curves; title and legend stand above the axes and cover nothing."""
    handles, names = axes.get_legend_handles_labels()
    needed = 7 * max(map(len, names)) + 42  # pixels of an entry, 7 a letter
    columns = max(1, int(1.15 * axes.get_window_extent().width // needed))
    how: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "alignment": "left"}
    how |= {"frameon": False, "borderpad": 0, "handlelength": 1.5, "columnspacing": 1.2}
    axes.legend(handles, names, title=title, title_fontsize=12, ncols=columns, **how)
    axes.set_xlabel(below, color=_FAINT)
    axes.set_xlim(0, max(1, axes.dataLim.xmax))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    _plain(axes, "y")


def dots_png(panels: Sequence[tuple[str, Sequence[tuple[str, Values]]]]) -> bytes:
    """A PNG file's bytes: a dot for each repeat and a bar at their mean, a row for each method.

    Panels (title, rows) stand side by side with one axis of values, 0 ... 1; a row is
    (name, repeat -> value), with the same names in each panel.
    """
    names = [name for name, _ in panels[0][1]]
    every = [found for _, rows in panels for _, found in rows]
    known = [v for found in every for v in found.values() if math.isfinite(v)] or [0.0, 1.0]
    room = 0.08 * (max(known) - min(known)) + 0.02
    figure = _figure(490 * len(panels) + 260, 30 * len(names) + 140)
    for i, (title, rows) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for y, (_, found) in enumerate(rows):
            _draw_row(axes, y, {r: v for r, v in sorted(found.items()) if math.isfinite(v)})
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlim(max(0.0, min(known) - room), min(1.0, max(known) + room))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.tick_params("y", length=0)
        _plain(axes, "x")
    repeats = sorted({repeat for found in every for repeat in found})
    handles = [axes.plot([], [], **_dot(r), label=f"annotated image {r}")[0] for r in repeats]
    if handles:
        handles += axes.plot([], [], "|", color=_INK, ms=14, mew=2, label="mean")
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return _png(_drawn(figure))


def _draw_row(axes: Axes, y: int, found: Values) -> None:
    """Draw the known values of a method; equal ones stay visible, a little below one another."""
    if found:
        axes.plot(math.fsum(found.values()) / len(found), y, "|", color=_INK, ms=17, mew=2)
    for number, (repeat, value) in enumerate(found.items()):
        axes.plot(value, y + 0.1 * (number - (len(found) - 1) / 2), clip_on=False, **_dot(repeat))


def _dot(repeat: int) -> dict[str, Any]:
    colour = _COLOURS[repeat % len(_COLOURS)]
    return {"ls": "", "marker": "o", "color": colour, "ms": 7.5, "mec": "white", "mew": 0.7}


def doses_png(title: str, below: str, curves: Mapping[str, Doses]) -> bytes:
    """A PNG file's bytes: ``doses_figure``."""
    return _png(_drawn(doses_figure(title, below, curves)))


def doses_figure(title: str, below: str, curves: Mapping[str, Doses]) -> Figure:
    """Dice against a dose: a dot for each run, a line through the means of a method.

    ``curves`` are the methods by name; ``below`` names the axis of doses. Where all doses have as
    many runs, thin lines join those of the same place, which are of one annotated image.
    """
    figure = _figure(900, 480)
    axes = figure.add_subplot()
    width = max((dose for found in curves.values() for dose in found), default=1)
    for number, (name, found) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        doses = sorted(found)
        means = [math.fsum(found[dose]) / len(found[dose]) for dose in doses]
        axes.plot(doses, means, color=colour, label=name, lw=2)
        aside = 0.006 * width * (number - (len(curves) - 1) / 2)  # equal doses stay visible
        places = [dose + aside for dose in doses]
        for place, dose in zip(places, doses, strict=True):
            dots = [place] * len(found[dose])
            axes.plot(dots, found[dose], "o", color=colour, ms=6, mec="white", mew=0.7)
        if len({len(runs) for runs in found.values()}) == 1:
            for runs in zip(*(found[dose] for dose in doses), strict=True):
                axes.plot(places, runs, color=colour, lw=0.7, alpha=0.5)
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(below)
    axes.set_ylabel("Dice")
    _plain(axes, "y")
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def size_picture(title: str, diameters: Array, unit: str, colour: str = _COLOURS[0]) -> Image.Image:
    """Draw ``size_figure``, 520 x 300 pixels."""
    return _drawn(size_figure(title, diameters, unit, colour))


def size_figure(title: str, diameters: Array, unit: str, colour: str = _COLOURS[0]) -> Figure:
    """Draw the share of particles by diameter, with the 10, 50 and 90 % of their number marked.

    ``colour`` is that of the bars, such as ``#e69f00``, the class's own.

    8 to 30 bars, as wide as Freedman and Diaconis say; where the largest is more than 20 times the
    smallest, they and the axis are logarithmic.
    """
    figure = _figure(520, 300)
    axes = figure.add_subplot()
    low, high = float(diameters.min()), float(max(diameters.max(), 1.01 * diameters.min()))
    wide = high > 20 * low
    values = np.log(diameters) if wide else diameters
    count = _bars(values)
    edges = (np.geomspace if wide else np.linspace)(low, high, count + 1)
    edges[0], edges[-1] = low, high  # which powers would round
    shares = 100 * np.histogram(diameters, edges)[0] / len(diameters)
    axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=colour, ec=_FAINT, lw=0.6)
    for n, side in ((10, "right"), (50, "left"), (90, "left")):
        at = float(np.percentile(diameters, n))
        axes.axvline(at, color=_INK, lw=1.2, ls="-" if n == 50 else (0, (4, 3)))
        axes.text(at, 1.01, f"D{n}", transform=axes.get_xaxis_transform(), ha=side, fontsize=9)
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title, loc="left", fontsize=12, pad=20)
    axes.set_xlabel(f"diameter, {unit}{', logarithmic' if wide else ''}")
    axes.set_ylabel("whole particles, %")
    _plain(axes, "y")
    return figure


def _bars(values: Array) -> int:
    """8 to 30, by the rule of Freedman and Diaconis."""
    # Counted without the edges, of which nearly equal values and a far one want any number.
    first, third = np.percentile(values, (25, 75))
    width = 2 * float(third - first) / len(values) ** (1 / 3)
    spread = float(values.max() - values.min())
    if not width:
        return 8
    return 30 if spread > 30 * width else max(math.ceil(spread / width), 8)


def _figure(width: int, height: int) -> Figure:
    """An empty figure; width and height in pixels."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    return Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white", layout=layout)


def _plain(axes: Axes, grid: str) -> None:
    """Few lines around the data: a pale grid across one axis, no frame at the top and right."""
    axes.grid(axis=grid, color=_GRID)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(color=_FAINT, labelcolor=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)


def _drawn(figure: Figure) -> Image.Image:
    """The pixels of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    """A PNG without date and software in it, so that equal pictures have equal bytes."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()
