"""Tables of a folder of measured masks: CSV files, and ``summary.md`` to read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metallography import measure

Array = NDArray[Any]
Row = dict[str, Any]

INTERVAL = "mean ± half-width of the 95 % confidence interval (Student's t) over fields"


class Model(Protocol):
    """What a folder needs of a model; ``Segmenter`` in predict.py is one.

    Attributes:
        path, about, digest: its file, one line on it, and a number for its tensors.
        num_classes, class_names, mapping, colours: C; per class: name, gray value, RGB.
        resize, tta, tile, overlap: how it predicts.
    """

    path: Path
    about: str
    digest: str
    num_classes: int
    class_names: list[str]
    mapping: tuple[int, ...]
    colours: Array
    resize: int
    tta: bool
    tile: int
    overlap: int

    def bands(self, image: Array) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Class probabilities by rows: first row, (C, rows, W)."""
        ...


@dataclass(frozen=True)
class Terms:
    """How masks are measured; see ``measure.measure_class`` and ``measure.compare_class``."""

    um_per_px: float | None = None
    min_px: int = measure.MINIMUM_PX
    boundary_px: float = measure.BOUNDARY_PX
    grain_classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Item:
    """An image file, and ``name``: what its results are called below each output folder."""

    path: Path
    name: str


@dataclass
class Results:
    """What a folder gave: rows of measurements and comparisons, and what went wrong."""

    rows: list[Row] = field(default_factory=list)
    compared: list[Row] = field(default_factory=list)
    diameters: dict[int, list[Array]] = field(default_factory=dict)
    confusion: Tensor | None = None
    sizes: set[tuple[int, int]] = field(default_factory=set)
    done: list[tuple[Item, Path | None]] = field(default_factory=list)
    predicted: int = 0
    skipped: int = 0
    bad: list[str] = field(default_factory=list)
    without_truth: list[str] = field(default_factory=list)


def write_csv(path: Path, rows: Sequence[Row], append: bool = False) -> None:
    """Write rows with equal keys; what is not known (nan) stays empty."""
    mode = "a" if append else "w"
    with path.open(mode, newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["image"])
        if not append:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if _unknown(v) else v for k, v in row.items()})


def _unknown(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def summary(s: Model, o: Terms, r: Results) -> list[str]:
    """``summary.md``, line by line."""
    scale = f"{o.um_per_px:g} µm per pixel" if o.um_per_px else "no scale given, lengths in pixels"
    size = f"resized to {s.resize}x{s.resize}" if s.resize else "at their own size"
    lines = [
        "# Prediction and measurements",
        "",
        f"- Model: {s.about}",
        f"- {len(r.done)} image(s), predicted {size}" + (", 8 views averaged" if s.tta else ""),
        f"- Scale: {scale}",
        f"- Particles: 8-connected, at least {o.min_px} pixels. Cut by the frame: counted as one "
        "half (ASTM E112, planimetric), left out of the sizes.",
        "- Area fraction: all pixels (ASTM E562, E1245). Mean free path and mean intercept: test "
        "lines along all rows and columns (ASTM E1245, E112). Length and aspect ratio: "
        "smallest-area rectangle. Diameter: circle of equal area (ISO 9276-6).",
        f"- Of fields: {INTERVAL}; relative accuracy (ASTM E562) = half-width / mean.",
        *warnings(s, r),
    ]
    if r.rows:
        lines += _class_tables(s, o, r) + _batch_table(s, o, r)
    if r.confusion is not None:
        lines += _comparison_tables(s, o, r)
    if r.bad:
        lines += ["", f"## {len(r.bad)} file(s) could not be used", "", *(f"- {b}" for b in r.bad)]
    return lines


def warnings(s: Model, r: Results) -> list[str]:
    """What a reader of the numbers should know."""
    lines = []
    if s.resize and len(r.sizes) > 1:
        lines.append(
            f"- Warning: images of {len(r.sizes)} sizes were all resized to {s.resize}x{s.resize}, "
            "as in training; where their field of view or proportions are not those of the "
            "training images, give --resize 0 or another N"
        )
    if r.without_truth:
        n, first = len(r.without_truth), r.without_truth[0]
        lines.append(f"- Warning: {n} image(s) without a true mask (first: {first}), not compared")
    return lines


def _class_tables(s: Model, o: Terms, r: Results) -> list[str]:
    """Means over fields by class, and the pooled distribution of diameters."""
    u, density = measure.unit_of(o.um_per_px), measure.density_column(o.um_per_px)
    columns = {
        density: density.replace("_", " "),
        f"mean_area_{u}2": f"mean area, {u}2",
        f"mean_length_{u}": f"mean length, {u}",
        "mean_aspect_ratio": "aspect ratio",
        f"mean_intercept_{u}": f"mean intercept, {u}",
        f"mean_free_path_{u}": f"mean free path, {u}",
        "astm_g": "ASTM G",
    }
    fractions, others, sizes = [], [], []
    for c, name in enumerate(s.class_names):
        rows = [row for row in r.rows if row["class"] == c]
        share = measure.over_fields(100 * row["area_fraction"] for row in rows)
        values = (share.mean, share.std, share.confidence, share.relative_accuracy)
        fractions.append([name, str(share.fields), *map(number, values)])
        others.append([name, *(interval(row[k] for row in rows) for k in columns)])
        d = np.concatenate(r.diameters[c])
        spread = np.percentile(d, (10, 50, 90, 100)) if len(d) else [math.nan] * 4
        mean = float(d.mean()) if len(d) else math.nan
        sizes.append([name, str(len(d)), number(mean), *map(number, spread)])
    head = ["class", "fields", "mean, %", "std, %", "± 95 %", "relative accuracy, %"]
    spread_head = ["class", "whole particles", "mean", "D10", "D50", "D90", "largest"]
    return [
        *table("Area fraction", head, fractions),
        *table("Over fields (mean ± 95 %)", ["class", *columns.values()], others),
        *table(f"Diameter of all whole particles, {u}", spread_head, sizes),
    ]


def _batch_table(s: Model, o: Terms, r: Results) -> list[str]:
    """By production batch, if the file names tell any."""
    if not any(row["batch"] for row in r.rows):
        return []
    u, density = measure.unit_of(o.um_per_px), measure.density_column(o.um_per_px)
    keys = ["mean_" + k for k in (f"area_{u}2", f"diameter_{u}", f"length_{u}", "aspect_ratio")]
    rows = []
    for row in measure.by_batch(r.rows, o.um_per_px):
        cells = [row["batch"] or "-", s.class_names[row["class"]], str(row["fields"])]
        cells.append(
            f"{number(100 * row['area_fraction'])} ± {number(100 * row['area_fraction_ci95'])}"
        )
        cells.append(f"{number(row[density])} ± {number(row[f'{density}_ci95'])}")
        rows.append([*cells, str(row["particles_whole"]), *(number(row[k]) for k in keys)])
    head = ["batch", "class", "fields", "area fraction, %", density.replace("_", " ")]
    head += ["whole particles", *(k.replace("_", " ") for k in keys)]
    return table("By production batch", head, rows)


def _comparison_tables(s: Model, o: Terms, r: Results) -> list[str]:
    """Against the true masks: errors by class, recall by size, confusion."""
    assert r.confusion is not None
    distance = f"hausdorff95_{measure.unit_of(o.um_per_px)}"
    keys = ["area_fraction_error", "number_error", "ks_diameter", "boundary_f1"]
    either = r.confusion.sum(0) + r.confusion.sum(1)
    dice = (2 * r.confusion.diagonal() / either).tolist()
    rows, recall, sizes = [], [], []
    for c, name in enumerate(s.class_names):
        mine = [row for row in r.compared if row["class"] == c]
        known = [row[distance] for row in mine if not math.isnan(row[distance])]
        middle = float(np.median(known)) if known else math.nan
        cells = [interval(row[k] for row in mine) for k in keys]
        rows.append([name, number(dice[c]), *cells, number(middle)])
        found = measure.recall_by_size(mine)
        sizes = [size for size, _, _ in found]
        recall.append([name, *(f"{a} / {b}" if b else "-" for _, a, b in found)])
    matrix = [
        [name, *map(str, counts)]
        for name, counts in zip(s.class_names, r.confusion.tolist(), strict=True)
    ]
    head = ["class", "Dice (pooled)", "area fraction, error", "number, error", "KS distance"]
    head += [f"boundary F1 ({o.boundary_px:g} px)", f"{distance.replace('_', ' ')} (median)"]
    return [
        *table("Against true masks: prediction - truth (mean ± 95 %)", head, rows),
        *table("Particles found, by their true area", ["class", *sizes], recall),
        *table("Pixels: true class (row) and predicted class", ["", *s.class_names], matrix),
    ]


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A heading and a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return ["", f"## {title}", "", *(f"| {' | '.join(line)} |" for line in cells)]


def number(value: float) -> str:
    """Four digits, more of large numbers; what is not known is ``-``."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def interval(values: Iterable[float]) -> str:
    """``mean ± confidence`` over fields."""
    found = measure.over_fields(values)
    return f"{number(found.mean)} ± {number(found.confidence)}" if found.fields else "-"
