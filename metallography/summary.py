"""The tables of a folder of measured masks: CSV files; the summary to read, and for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from imaging.data_bar import bar_lines
from imaging.listing import some_names
from imaging.pixel_size import SAME
from metallography import measure
from metallography.folder import MEASUREMENTS, SUMMARY, Folder
from metallography.particles import Row, unit_of
from utils import metrics
from utils.files import replace_file
from utils.tables import csv_of_rows, markdown, plain

DEFINITIONS = (
    "Particle: pixels of one class that touch. One that the frame cuts counts as one half "
    "(ASTM E112, planimetric) and is left out of the sizes. Specks and holes smaller than the "
    "smallest particle are noise for counts, sizes, intercepts and free paths.",
    "Area fraction: of all pixels (ASTM E562, E1245). Mean intercept (mean chord through a "
    "particle) and mean free path: all rows and columns are test lines (ASTM E1245). Grain "
    "intercept: length of test line / grains met, boundaries shared by their grains; the "
    "grain-size number is computed from it (ASTM E112). Length and aspect ratio: smallest-area "
    "rectangle. Diameter: circle of equal area (ISO 9276-6).",
    "Each image is a field; what is cut off, transparent or 255 in its class map is no part of it. "
    "Fields of unequal area count by their area. Mean ± half-width of the 95 % confidence interval "
    "(Student's t) over fields; relative accuracy (ASTM E562) = half-width / mean.",
)

OTHER_SCALE = 1.25  # factor between scales from which on structures look of another size

Table = dict[str, Any]
"""``title``, ``head`` (names of the columns) and ``rows`` (lists of text)."""


def write_tables(folder: Folder) -> None:
    """Write the CSV files, ``summary.md`` and ``summary.json`` of a folder that was run.

    The JSON holds ``about``, ``warnings`` and ``unusable`` (sentences; a line for each file that
    could not be used) and ``tables``, see ``Table``. UserError if a file cannot be written.
    """
    batches = measure.by_batch(folder.rows, folder.unit_scale)
    files = {"measurements": folder.rows, "batches": batches}
    if any(item.truth for item in folder.items):
        files["comparison"] = folder.compared
    for name, rows in files.items():
        replace_file(folder.out / f"{name}.csv", csv_of_rows(rows, ["image"]), "--out")
    tables = _class_tables(folder) if folder.rows else []
    if any(row["batch"] for row in batches):
        tables.append(_batch_table(folder, batches))
    if folder.compared:
        tables += _comparison_tables(folder)
    about, doubts = _about(folder), warnings(folder)
    found = {"about": about, "warnings": doubts, "tables": tables, "unusable": folder.bad}
    contents = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    replace_file(folder.out / SUMMARY, contents, "--out")
    lines = ["# Prediction and measurements", ""]
    lines += [f"- {plain(line)}" for line in [*about, *DEFINITIONS, *doubts]]
    for table in tables:
        lines += ["", f"## {plain(table['title'])}", "", *markdown(table["head"], table["rows"])]
    if folder.bad:
        lines += ["", f"## {len(folder.bad)} file(s) could not be used", ""]
        lines += [f"- {plain(line)}" for line in folder.bad]
    replace_file(folder.out / "summary.md", "\n".join(lines) + "\n", "--out")


def _about(folder: Folder) -> list[str]:
    """How the images were predicted and measured."""
    s = folder.segmenter
    size = f"resized to {s.resize}x{s.resize}" if s.resize else "at their own size"
    views = ", average over 8 flips and quarter turns" if s.tta else ""
    return [
        f"Model: {s.about}",
        f"{len(folder.done)} image(s), predicted {size}{views}",
        f"Scale: {_scale(folder)}",
        f"Smallest particle: {folder.min_px} pixels",
        *folder.notes,
        f"Pixels of one particle touch {_touching(folder)}",
    ]


def _scale(folder: Folder) -> str:
    """The scale or scales of the images."""
    known = sorted({um for item in folder.items if (um := folder.scale_of(item)) is not None})
    if not known:
        return "none known, lengths are in pixels"
    if known[-1] - known[0] <= SAME * known[-1]:
        return f"{known[0]:.6g} µm per pixel"
    each = f"each image's own is the column um_per_px of {MEASUREMENTS}"
    return f"{known[0]:.4g} to {known[-1]:.4g} µm per pixel, {each}"


def _touching(folder: Folder) -> str:
    sides, corners = "by a side (4-connected)", "by a side or a corner (8-connected)"
    if folder.connectivity:
        return sides if folder.connectivity == 4 else corners
    return f"{corners}, those of grains {sides}" if folder.grain_classes else corners


def warnings(folder: Folder) -> list[str]:
    """What a reader of the numbers should know."""
    lines = list(folder.left_out)
    sizes, side = {image.size for image in folder.done}, folder.segmenter.resize
    if side and len(sizes) > 1:
        lines.append(
            f"Warning: images of {len(sizes)} sizes were all resized to {side}x{side}, as in "
            "training; where their field of view or proportions are not those of the training "
            "images, give --resize 0 or another N"
        )
    lines += [f"Warning: {line}" for line in bar_lines(folder.bars, folder.field.crop)]
    lines += _scale_doubts(folder)
    bare = [i.name for i, _, _ in folder.done if i.truth is None or not i.truth.exists()]
    if bare and any(item.truth for item in folder.items):
        count = f"{len(bare)} image(s) without a true mask (first: {bare[0]})"
        lines.append(f"Warning: {count}, not compared")
    return lines


def _scale_doubts(folder: Folder) -> list[str]:
    """Lengths in pixels where micrometres were known once; images at another magnification."""
    trained, cure = folder.segmenter.um_per_px, "give --um_per_px or --scales"
    if folder.unit_scale is None and (trained or folder.lost_scale):
        known = f"training had {trained[0]:.4g} µm per pixel" if trained else ""
        known = "an earlier run here knew one" if folder.lost_scale else known
        return [f"Warning: no pixel size is known, lengths are in pixels, though {known}; {cure}"]
    if trained is None or folder.resample or folder.segmenter.resize:
        return []
    scales = {item.name: folder.scale_of(item) for item in folder.items}
    low, high = trained[0] / OTHER_SCALE, trained[1] * OTHER_SCALE
    other = [name for name, um in scales.items() if um is not None and not low <= um <= high]
    shown = f"{trained[0]:.4g}" + (f" to {trained[1]:.4g}" if trained[1] > trained[0] else "")
    said = (
        f"{len(other)} image(s) at another magnification than the training's {shown} µm per pixel"
    )
    cure = f"--resample {trained[0]:.4g} shows them to the network at that one"
    return [f"Warning: {said}: {some_names(other)}; {cure}"] if other else []


def _class_tables(folder: Folder) -> list[Table]:
    """Means over fields by class, and the pooled distribution of diameters."""
    u = unit_of(folder.unit_scale)
    names = (f"area_{u}2", f"diameter_{u}", f"length_{u}", "aspect_ratio", f"intercept_{u}")
    means = [f"mean_{name}" for name in (*names, f"free_path_{u}")]
    columns = [measure.density_column(folder.unit_scale), *means, f"grain_intercept_{u}", "astm_g"]
    fractions, others, sizes = [], [], []
    for c, name in enumerate(folder.segmenter.class_names):
        rows = [row for row in folder.rows if row["class"] == c]
        areas = measure.areas_of(rows)
        share = measure.over_fields([100 * row["area_fraction"] for row in rows], areas)
        fractions.append([name, share.fields, *map(number, share[1:])])
        others.append(
            [name, *(interval([row[column] for row in rows], areas) for column in columns)]
        )
        d = np.concatenate(folder.diameters[c])
        spread = [d.mean(), *np.percentile(d, (10, 50, 90, 100))] if len(d) else [math.nan] * 5
        sizes.append([name, len(d), *map(number, spread)])
    head = ["class", "fields", "mean, %", "std, %", "± 95 %", "relative accuracy, %"]
    spread_head = ["class", "whole particles", "mean", "D10", "D50", "D90", "largest"]
    return [
        _table("Area fraction", head, fractions),
        _table("Over fields (mean ± 95 %)", ["class", *map(words, columns)], others),
        _table(f"Diameter of all whole particles, {words(u)}", spread_head, sizes),
    ]


def _batch_table(folder: Folder, batches: list[Row]) -> Table:
    """By production batch."""
    density = measure.density_column(folder.unit_scale)
    means = [name for name in batches[0] if name.startswith("mean_")]
    rows = [
        [
            row["batch"] or "-",
            folder.segmenter.class_names[row["class"]],
            row["fields"],
            f"{number(100 * row['area_fraction'])} ± {number(100 * row['area_fraction_ci95'])}",
            f"{number(row[density])} ± {number(row[f'{density}_ci95'])}",
            row["particles_whole"],
            *(number(row[name]) for name in means),
        ]
        for row in batches
    ]
    head = ["batch", "class", "fields", "area fraction, %", density, "whole particles", *means]
    return _table("By production batch", [*map(words, head)], rows)


def _comparison_tables(folder: Folder) -> list[Table]:
    """Against the true masks: errors by class, particles found by size, confusion."""
    names, distance = folder.segmenter.class_names, f"hausdorff95_{unit_of(folder.unit_scale)}"
    keys = ["area_fraction_error", "number_error", "ks_diameter", "boundary_f1"]
    counts = np.sum([image.counts for image in folder.done if image.counts is not None], axis=0)
    rows, recall = [], []
    for c, (name, dice) in enumerate(zip(names, metrics.dice(counts), strict=True)):
        mine = [row for row in folder.compared if row["class"] == c]
        known = [row[distance] for row in mine if not math.isnan(row[distance])]
        errors = [interval(row[key] for row in mine) for key in keys]
        rows.append([name, number(dice), *errors, number(np.median(known) if known else math.nan)])
        found = measure.recall_by_size(mine)
        recall.append([name, *(f"{hits} / {true}" if true else "-" for _, hits, true in found)])
    head = ["class", "Dice (pooled)", "area fraction, error", "number, error", "KS distance"]
    head += [f"boundary F1 ({folder.boundary_px:g} px)", f"{words(distance)} (median)"]
    matrix = [[name, *line] for name, line in zip(names, counts.tolist(), strict=True)]
    sizes = [size for size, _, _ in found]
    return [
        _table("Against true masks: prediction - truth (mean ± 95 %)", head, rows),
        _table("Particles found / all, by their true area", ["class", *sizes], recall),
        _table("Pixels: true class (row) and predicted class", ["", *names], matrix),
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    return {"title": title, "head": head, "rows": [[str(cell) for cell in row] for row in rows]}


def words(column: str) -> str:
    """A column of a CSV file as it is called here, with micrometres and squares as printed."""
    text = re.sub(r"\bum(2?)\b", "µm\\1", column.replace("_", " ")).replace("astm g", "ASTM G")
    return re.sub(r"\b([µm]m|px)2\b", "\\1²", text)


def number(value: float) -> str:
    """Four digits, more of large numbers; what is not known is ``-``."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def interval(values: Iterable[float], areas: Iterable[float] | None = None) -> str:
    """``mean ± confidence`` over fields, weighted by their ``areas``."""
    found = measure.over_fields(values, areas)
    return f"{number(found.mean)} ± {number(found.confidence)}" if found.fields else "-"
