"""The tables of a folder of measured masks: CSV files; the summary to read, and for programs."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from typing import Any

import numpy as np

from imaging.listing import some_names
from imaging.pixel_size import SAME
from metallography import measure, tiling
from metallography.folder import Folder
from metallography.items import MEASUREMENTS, SUMMARY, Item, digest_of, equal_lines
from metallography.measure import class_words, fractions_of, outlying
from metallography.particles import Row, unit_of
from utils import metrics
from utils.files import DataError, replace_file
from utils.log import VERSION, WARNING
from utils.tables import (
    csv_of_rows,
    markdown,
    nulls,
    percent,
    plain,
    plus_minus,
    plus_minus_fraction,
    rounded,
    significant,
)

NO_BATCH = "(no batch)"  # where none is known
DEFINITIONS = (
    "Particle: pixels of one class that touch. One that the frame cuts counts as one half, at a "
    "corner as a quarter (ASTM E112, planimetric), and is left out of the sizes. Specks and holes "
    "smaller than the smallest particle are noise for counts, sizes, intercepts and free paths.",
    "Area fraction: of all pixels, by image analysis (ASTM E1245). Mean intercept (mean chord "
    "through a particle) and mean free path: all rows and columns are test lines (ASTM E1245). "
    "Grain intercept: length of test line / grains met, boundaries shared by their grains; the "
    "grain-size number is computed from it (ASTM E112; by image analysis E1382). Length: longer "
    "side of the smallest rectangle around a particle; aspect ratio: that over the shorter side. "
    "Diameter: of the circle of equal area (ISO 9276-6).",
    "Each image is a field. Pixels that are cut off, such as a data bar, transparent or of no "
    "class (255 in the class map) are no part of it. Where a mask that was given has 255, the "
    "prediction counts. "
    "Fields of unequal area count by their area. Mean ± half-width of the 95 % confidence interval "
    "(Student's t) over fields; relative accuracy (ASTM E562) = half-width / mean.",
)

OF_SUMS = (
    "Mean intercept and mean free path: A_A / N_L and (1 - A_A) / N_L of the sums over all fields, "
    "so that a field without a particle counts as free path, and one with few decides little; the "
    "interval by the linearised variance of a ratio (Cochran, Sampling Techniques, 1977)."
)
OVER_FIELDS = (
    "Number, area, diameter, length, aspect ratio, grain intercept: the mean of the fields' own "
    f"values. {OF_SUMS}"
)
FEWER = (
    "In brackets: how many fields tell it, where not all do; a size needs a whole particle of the "
    "class in the field, an intercept a particle, a length a scale."
)
AT_LIMIT = 1.1  # times the smallest diameter that counts, up to which a percentile is a bound
OTHER_SCALE = 1.25  # factor between scales from which on structures look of another size

EXACT = {"number": ".10g", "um_per_px": ".6g"}  # what was counted, or given: no measured digits
UNITS = {"um": "µm", "um2": "µm²", "px": "px", "px2": "px²", "per_mm2": "1/mm²",
         "per_Mpx": "1/Mpx"}  # fmt: skip
# What a column beside another one holds of it.
SUFFIXES = {"_ci95": ", 95 % half-width", "_std": ", std", "_fields": ", fields"}

Table = dict[str, Any]
"""``title``, ``head`` (names of the columns), ``rows`` (lists of text), perhaps a ``note``."""


def write_tables(folder: Folder, method: str = "") -> None:
    """Write the CSV files, ``summary.md`` and ``summary.json`` of a folder that was run.

    ``method`` is a paragraph on how it was measured (``report.provenance``). The JSON holds it,
    ``head`` (see ``head_rows``), ``images`` (their names), ``values`` (the numbers of phases, sizes
    and batches, null where unknown), ``about``, ``warnings`` and ``unusable`` (sentences; a line
    for each file that could not be used) and ``tables``, see ``Table``. UserError if a file cannot
    be written.
    """
    batches = batch_rows(folder)
    sizes = size_rows(folder) if folder.rows else []
    files = {"measurements": folder.table_rows(), "sizes": sizes}
    if folder.pools_all or any(row["batch"] != NO_BATCH for row in batches):
        files["batches"] = batches
    else:
        (folder.out / "batches.csv").unlink(missing_ok=True)
    if any(item.truth for item in folder.items):
        files["comparison"] = folder.compared
    for name, rows in files.items():
        replace_file(folder.out / f"{name}.csv", csv_of_rows(rows, ["image"]), "--out")
    tables = [table for part in sections(folder).values() for table in part]
    about, doubts = about_lines(folder), warnings(folder)
    values = {"phases": phase_rows(folder), "sizes": sizes, "batches": batches}
    head = head_rows(folder)
    found: Row = {"head": dict(head), "images": [d.item.name for d in folder.done]}
    found |= {"values": {name: [*map(nulls, rows)] for name, rows in values.items()}}
    found |= {"about": about, "method": method, "warnings": doubts, "tables": tables}
    found |= {"unusable": folder.bad}
    contents = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    replace_file(folder.out / SUMMARY, contents, "--out")
    lines = ["# Prediction and measurements", ""]
    own = [f"{what}: {said}" for what, said in head[: 2 + len(folder.head)]]
    lines += [f"- {plain(line)}" for line in [*own, *about, *DEFINITIONS, *doubts]]
    lines += ["", "## How this was measured", "", plain(method)] if method else []
    for table in tables:
        lines += ["", f"## {plain(table['title'])}", "", *markdown(table["head"], table["rows"])]
        lines += ["", plain(table["note"])] if table.get("note") else []
    if folder.bad:
        lines += ["", f"## {len(folder.bad)} file(s) could not be used", ""]
        lines += [f"- {plain(line)}" for line in folder.bad]
    replace_file(folder.out / "summary.md", "\n".join(lines) + "\n", "--out")


CHECKED, MOSTLY_WRONG = "where it was checked", "mostly wrong: do not rely on it"


def head_rows(folder: Folder) -> list[tuple[str, str]]:
    """Which program measured what, when and how: names and words, for who reads the numbers."""
    crop, roi, names = folder.field.crop, folder.field.roi, folder.segmenter.class_names
    grains = ", ".join(names[c] for c in folder.grain_classes)
    return [
        ("Program", program_of(folder)),
        ("Date", date.today().isoformat()),
        *folder.head,
        ("Fields", str(len(folder.done))),
        ("Scale", scale_words(folder)),
        *([("Crop: top, bottom, left, right", ", ".join(map(str, crop)))] if any(crop) else []),
        *([("Region of interest", str(roi))] if roi else []),
        ("Smallest particle", f"{folder.min_px:g} pixels"),
        ("Pixels of one particle touch", _touching(folder)),
        ("Grain classes", grains or "none"),
        ("Model", folder.segmenter.about),
    ]


def program_of(folder: Folder) -> str:
    """The command that measured, and its version."""
    return f"{folder.program} of PSCL {VERSION}"


def about_csv(folder: Folder) -> str:
    """The workbook's first sheet: ``head_rows``, notes, warnings, definitions, a line each."""
    notes = [note for note in folder.notes if not note.startswith(WARNING)]
    doubts = [line.removeprefix(WARNING) for line in warnings(folder)]
    told = [("Note", notes), ("Warning", doubts), ("Definition", [*DEFINITIONS, OVER_FIELDS])]
    rows = [*head_rows(folder), *((what, line) for what, lines in told for line in lines)]
    return csv_of_rows([{"what": what, "words": line} for what, line in rows])


def phases_csv(folder: Folder) -> str:
    """Area fraction of each class over all fields, as the workbook has it: mean and half-width."""
    return csv_of_rows(phase_rows(folder))


def phase_rows(folder: Folder) -> list[Row]:
    """The rows of ``phases_csv``."""
    rows = []
    for c, name in enumerate(folder.segmenter.class_names):
        own = [row for row in folder.rows if row["class"] == c]
        found = measure.mean_over(own, "area_fraction")
        row: Row = {"class": c, "class_name": name, "fields": found.fields}
        row |= {"area_fraction": found.mean, "area_fraction_ci95": found.confidence}
        if folder.poor:
            row[CHECKED] = MOSTLY_WRONG if name in folder.poor else ""
        rows.append(row)
    return rows


def size_columns(folder: Folder) -> list[str]:
    """The columns of ``measurements.csv`` of which the mean over fields is told, beside phases."""
    u = unit_of(folder.unit_scale)
    names = (f"area_{u}2", f"diameter_{u}", f"length_{u}", "aspect_ratio", f"intercept_{u}")
    means = [f"mean_{name}" for name in (*names, f"free_path_{u}")]
    grains = [f"grain_intercept_{u}", "astm_g"] if folder.grain_classes else []
    return [measure.density_column(folder.unit_scale), *means, *grains]


def size_rows(folder: Folder) -> list[Row]:
    """The rows of ``sizes.csv``: of each class the means over fields, then all whole particles."""
    u, rows = unit_of(folder.unit_scale), []
    for c, name in enumerate(folder.segmenter.class_names):
        own, sized = [r for r in folder.rows if r["class"] == c], c in folder.with_particles
        row: Row = {"class": c, "class_name": name}
        for column in size_columns(folder):
            known = own if sized or not of_particles(column) else []
            found = measure.mean_over(known, column)
            row |= {column: found.mean, f"{column}_ci95": found.confidence}
            row |= {f"{column}_std": found.std, f"{column}_fields": found.fields}
        d = np.concatenate(folder.diameters[c]) if sized else np.zeros(0)
        whole = [d.mean(), *np.percentile(d, (10, 50, 90)), d.max()] if len(d) else [math.nan] * 5
        row["particles_whole"] = len(d) if sized else None
        for n, of in enumerate(("mean", "d10", "d50", "d90", "max")):
            row[f"whole_{of}_diameter_{u}"] = float(whole[n])
        rows.append(row)
    return rows


def batch_rows(folder: Folder) -> list[Row]:
    """The rows of ``batches.csv``, with the names of the classes."""
    names, found = folder.segmenter.class_names, measure.by_batch(folder.rows, folder.unit_scale)
    return [
        {"batch": "", "class": row["class"], "class_name": names[row["class"]]}
        | row
        | {"batch": row["batch"] or NO_BATCH}
        for row in found
    ]


def sections(folder: Folder) -> dict[str, list[Table]]:
    """The tables by what they tell of: ``phases``, ``sizes``, ``batches``, ``truth``."""
    tables = _class_tables(folder) if folder.rows else []
    batches = measure.by_batch(folder.rows, folder.unit_scale)
    return {
        "phases": [checked(folder, table) for table in tables[:1]],
        "sizes": [checked(folder, table) for table in tables[1:]],
        "batches": [checked(folder, _batch_table(folder, batches))] if has_batches(folder) else [],
        "truth": _comparison_tables(folder) if folder.compared else [],
    }


def has_batches(folder: Folder) -> bool:
    """Whether there are production batches to tell apart, or ``--batch_from`` told of some.

    Names of files that all begin alike say of one batch what the tables of all images say.
    """
    told = any(item.told_batch is not None for item in folder.items)
    found = {row["batch"] for row in folder.rows}
    return len(found) > 1 or (told and any(found))


def checked(folder: Folder, table: Table) -> Table:
    """A table of classes with a last column that marks those that were mostly wrong, if any was."""
    if not folder.poor:
        return table
    at = table["head"].index("class")
    rows = [[*r, MOSTLY_WRONG if r[at] in folder.poor else "-"] for r in table["rows"]]
    return {**table, "head": [*table["head"], CHECKED], "rows": rows}


def about_lines(folder: Folder) -> list[str]:
    """How the images were predicted and measured."""
    s = folder.segmenter
    views = ", average over 8 flips and quarter turns" if s.tta else ""
    return [
        f"Model: {s.about}",
        f"{len(folder.done)} image(s), predicted {folder.size_words()}{views}",
        f"Scale: {scale_words(folder)}",
        f"Smallest particle: {folder.min_px:g} pixels",
        *(note for note in folder.notes if not note.startswith(WARNING)),
        f"Pixels of one particle touch {_touching(folder)}",
    ]


def scale_words(folder: Folder) -> str:
    """The scale or scales of the images."""
    items = [image.item for image in folder.done] or folder.items  # not those that are unusable
    scales = [um for item in items if (um := folder.scale_of(item)) is not None]
    known = sorted({*scales})
    if not known:
        return "none known, lengths are in pixels"
    some = "" if len(scales) == len(items) else f", of {len(scales)} of {len(items)} images"
    if known[-1] - known[0] <= SAME * known[-1]:
        return f"{known[0]:.6g} µm per pixel{some}"
    each = f"each image's own is the column um_per_px of {MEASUREMENTS}"
    return f"{known[0]:.4g} to {known[-1]:.4g} µm per pixel{some}, {each}"


def _touching(folder: Folder) -> str:
    sides, corners = "by a side (4-connected)", "by a side or a corner (8-connected)"
    if folder.connectivity:
        return sides if folder.connectivity == 4 else corners
    return f"{corners}, those of grains {sides}" if folder.grain_classes else corners


def later_warnings(folder: Folder) -> list[str]:
    """The ``warnings`` that are not among the notes, which were told before the work began."""
    return [line for line in warnings(folder) if line not in folder.notes]


def warnings(folder: Folder) -> list[str]:
    """What a reader of the numbers should know: on the images first, then what may follow from it.

    So a data bar that nobody cut is told before the phase of which there is too much.
    """
    lines = [note for note in folder.notes if note.startswith(WARNING)] + [*folder.left_out]
    sizes, side = {image.size for image in folder.done}, folder.segmenter.resize
    if side and len(sizes) > 1:
        lines.append(
            f"Warning: images of {len(sizes)} sizes were all resized to {side}x{side}, as in "
            "training; where their field of view or proportions are not those of the training "
            "images, give --resize 0 or another N"
        )
    lines += [f"Warning: {line}" for line in folder.bar_lines()]
    lines += _scale_doubts(folder) + _tiled_doubts(folder)
    if folder.grain_classes and folder.unit_scale is None:
        lines.append(
            "Warning: no pixel size is known, so there is no grain-size number (ASTM E112); give "
            "--um_per_px or --scales"
        )
    whole = [i.name for i, _, _ in folder.done if folder.field.lacks_region(i.name)]
    if whole:
        count = f"{len(whole)} image(s) without a mask in --roi (first: {whole[0]})"
        lines.append(f"Warning: {count}, measured whole")
    bare = [i.name for i, _, _ in folder.done if i.truth is None or not i.truth.exists()]
    if bare and any(item.truth for item in folder.items):
        count = f"{len(bare)} image(s) without a true mask (first: {bare[0]})"
        lines.append(f"Warning: {count}, not compared")
    return lines + [f"Warning: {line}" for line in (*folder.warned, *_fraction_doubts(folder))]


def equal_images(folder: Folder) -> list[str]:
    """A line on images of a folder that are equal (``equal_lines``).

    Only those with equal class maps are read once more: equal images have equal ones.
    """
    alike: defaultdict[str, list[Item]] = defaultdict(list)
    for item, size, _ in folder.done:
        alike[f"{size} {folder.record.done.get(item.name, {}).get('map')}"].append(item)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for item in (item for items in alike.values() if len(items) > 1 for item in items):
        with suppress(DataError):  # which the run reported
            groups[digest_of(item.read(folder.segmenter.gray))].append(folder.title_of(item))
    return equal_lines(groups.values())


def _scale_doubts(folder: Folder) -> list[str]:
    """Lengths in pixels where micrometres were known once; images at another magnification."""
    trained, cure = folder.segmenter.um_per_px, "give --um_per_px or --scales"
    if folder.unit_scale is None and (trained or folder.lost_scale):
        known = f"training had {trained[0]:.4g} µm per pixel" if trained else ""
        known = "an earlier run here knew one" if folder.lost_scale else known
        return [f"Warning: no pixel size is known, lengths are in pixels, though {known}; {cure}"]
    if trained is None or folder.resample or folder.segmenter.resize:
        return []
    scales = {image.item.name: folder.scale_of(image.item) for image in folder.done}
    low, high = trained[0] / OTHER_SCALE, trained[1] * OTHER_SCALE
    other = [name for name, um in scales.items() if um is not None and not low <= um <= high]
    shown = f"{trained[0]:.4g}" + (f" to {trained[1]:.4g}" if trained[1] > trained[0] else "")
    said = (
        f"{len(other)} image(s) at another magnification than the training's {shown} µm per pixel"
    )
    cure = f"--resample {trained[0]:.4g} shows them to the network at that one"
    return [f"Warning: {said}: {some_names(other)}; {cure}"] if other else []


def _tiled_doubts(folder: Folder) -> list[str]:
    """Images that were cut into tiles for a network that sees farther than these overlap."""
    s = folder.segmenter
    if s.sight != tiling.WIDE:
        return []
    cut = []
    for item, size, _ in folder.done:
        scale = folder.scale_of(item)
        factor = scale / folder.resample if folder.resample and scale else 1.0
        side = s.resize or round(max(folder.field.crop_of(size).size(size)) * factor)
        cut += [item.name] if side > s.tile else []
    said = (
        f"Warning: {len(cut)} image(s) cut into tiles of {s.tile} pixels, of which this network's "
        f"encoder sees more: {some_names(cut)}; along the cuts they are close to what the whole "
        "image would give, not equal; a larger --tile cuts none"
    )
    return [said] if cut else []


def _fraction_doubts(folder: Folder) -> list[str]:
    """Classes in no mask or predicted nowhere; images with area fractions unlike the others'."""
    names = folder.segmenter.class_names
    found = fractions_of(folder.rows, len(names))
    lines = []
    for c, name in enumerate(names):
        nowhere = not any(shares[c] > 0 for shares in found.values())
        if c in folder.in_no_mask and nowhere:
            lines.append(
                f"{class_words(name)} is in no mask, so it is predicted nowhere; annotate an image "
                "that shows it, or, if there is no such phase, number the classes of the masks "
                "without a gap: 0, 1, 2 ..."
            )
        elif len(found) > 1 and nowhere:
            lines.append(
                f"{class_words(name)} is predicted in none of the {len(found)} images; if they "
                f"show it, {folder.rare_cure}"
            )
    odd = outlying(found, names)
    for image in [*odd][:1]:
        lines.append(
            f"{len(odd)} image(s) with an area fraction far from the others': {some_names(odd)}; "
            f"{image} has {'; '.join(odd[image])}; look at the overlays"
        )
    return lines


def _class_tables(folder: Folder) -> list[Table]:
    """Means over fields by class, and the pooled distribution of diameters."""
    u = unit_of(folder.unit_scale)
    columns = size_columns(folder)
    fractions, others, sizes = [], [], []
    for c, name in enumerate(folder.segmenter.class_names):
        rows = [row for row in folder.rows if row["class"] == c]
        share = measure.mean_over(rows, "area_fraction", 100)
        accuracy = rounded(share.relative_accuracy, share.relative_accuracy)[0]
        mean = fraction_interval(share)
        fractions.append([name, share.fields, mean, rounded(share.std, share.std)[0], accuracy])
        told = [n for n in columns if c in folder.with_particles or not of_particles(n)]
        found = {n: interval(measure.mean_over(rows, n), share.fields) for n in told}
        others.append([name, *(found.get(n, "-") for n in columns)])
        if c in folder.with_particles:
            d = np.concatenate(folder.diameters[c])
            spread = np.percentile(d, (10, 50, 90)).tolist() if len(d) else [math.nan] * 3
            ends = [float(d.mean()), float(d.max())] if len(d) else [math.nan] * 2
            bounds = [at_most(value, folder.smallest_diameter) for value in spread]
            sizes.append([name, len(d), significant(ends[0]), *bounds, significant(ends[1])])
    head = ["class", "fields", "area fraction, %", "std, %", "relative accuracy, %"]
    spread_head = ["class", "whole particles", "mean of them", "D10", "D50", "D90", "largest"]
    return [
        _table("Area fraction (mean ± 95 %)", head, fractions),
        _table("Over fields (mean ± 95 %)", ["class", *map(words, columns)], others,
               " ".join(filter(None, (OVER_FIELDS, fewer_note(others), matrix_note(folder))))),
        _table(f"Diameter of all whole particles of all fields together, {words(u)}",
               spread_head, sizes, sizes_note(folder, sizes)),
    ]  # fmt: skip


def of_particles(column: str) -> bool:
    """Whether a column of ``measurements.csv`` counts or sizes particles, one by one."""
    return measure.without_unit(column) in measure.OF_PARTICLES


def at_most(value: float, smallest: float) -> str:
    """A percentile of diameters: a bound (≤) at the ``smallest`` that counts, which cuts it off."""
    bound = "≤ " if value <= AT_LIMIT * smallest else ""
    return bound + significant(value)


def matrix_note(folder: Folder) -> str:
    """Why class 0 has no sizes; nothing to say where its pieces are grains."""
    if 0 in folder.with_particles:
        return ""
    name = folder.segmenter.class_names[0].removeprefix("0 ")  # that of classes without names
    return (
        f"Class 0 ({name}) is taken for the matrix: its pieces are islands between the other "
        f"phases, no particles, so it has no sizes here. {MEASUREMENTS} has them all the same."
    )


def sizes_note(folder: Folder, rows: Sequence[Sequence[object]]) -> str:
    """Which mean this is, and what the smallest particle that counts does to the sizes."""
    note = (
        "Here each particle counts alike; over fields each field counts by its area, however many "
        "particles it has."
    )
    if any(str(cell).startswith("≤") for row in rows for cell in row):
        smallest = smallest_words(folder)
        note += (
            f" ≤: the smallest particles are cut off. Those of fewer than {folder.min_px:g} pixels "
            f"({smallest} across) do not count (option --min_px), and many are hardly larger: with "
            "all counted the percentile would be smaller, as would mean and D50, and the number "
            "larger."
        )
    return note


def smallest_words(folder: Folder) -> str:
    """The diameter of the smallest particle that counts, with its unit; of several scales, from
    the finest to the coarsest."""
    known = [um for item in folder.items if (um := folder.scale_of(item)) is not None]
    most = folder.smallest_diameter
    least = most * min(known, default=1.0) / max(known, default=1.0)
    ends = " to ".join(dict.fromkeys([significant(least), significant(most)]))
    return f"{ends} {words(unit_of(folder.unit_scale))}"


def _batch_table(folder: Folder, batches: list[Row]) -> Table:
    """By production batch."""
    density = measure.density_column(folder.unit_scale)
    u = unit_of(folder.unit_scale)
    lines = [f"{name}_{u}" for name in measure.OF_LINES]
    means = [n for n in batches[0] if of_particles(n) and n.startswith("mean_")]
    of_fields = [n for n in (*lines, f"grain_intercept_{u}", "astm_g") if n in batches[0]]
    rows = []
    for row in batches:
        sized = row["class"] in folder.with_particles
        number = plus_minus(row[density], row[f"{density}_ci95"])
        sizes = [number, row["particles_whole"], *(significant(row[name]) for name in means)]
        name = folder.segmenter.class_names[row["class"]]
        half = 100 * row["area_fraction_ci95"]
        share = plus_minus_fraction(100 * row["area_fraction"], half)
        cells = sizes if sized else ["-"] * len(sizes)
        cells += [plus_minus(row[name], row[f"{name}_ci95"]) for name in of_fields]
        rows.append([row["batch"] or NO_BATCH, name, row["fields"], share, *cells])
    head = ["batch", "class", "fields", "area_fraction", density, "whole particles", *means]
    head += of_fields
    told = any(item.told_batch is not None for item in folder.items)
    named = "those in the names of files, whatever their sub-folder"
    note = f"Batches are {'those that were given (option --batch_from)' if told else named}. "
    note += "Mean area, diameter, length and aspect ratio: of all whole particles of the batch, "
    note += f"each alike. {OF_SUMS}"
    return _table("By production batch", [*map(words, head)], rows, note)


def _comparison_tables(folder: Folder) -> list[Table]:
    """Against the true masks: errors by class, particles found by size, confusion."""
    names, distance = folder.segmenter.class_names, f"hausdorff95_{unit_of(folder.unit_scale)}"
    keys = {"area_fraction_error": 100, "number_error": 1, "ks_diameter": 1, "boundary_f1": 1}
    counts = np.sum([image.counts for image in folder.done if image.counts is not None], axis=0)
    rows, recall = [], []
    for c, (name, dice) in enumerate(zip(names, metrics.dice(counts), strict=True)):
        mine = [row for row in folder.compared if row["class"] == c]
        known = [row[distance] for row in mine if not math.isnan(row[distance])]
        errors = [
            interval(measure.over_fields(scale * row[key] for row in mine), len(mine))
            for key, scale in keys.items()
        ]
        middle = significant(np.median(known) if known else math.nan)
        rows.append([name, significant(dice), *errors, middle])
        found = measure.recall_by_size(mine)
        recall.append([name, *(f"{hits} / {true}" if true else "-" for _, hits, true in found)])
    head = [
        "class",
        "Dice (pooled)",
        "area fraction, error, points",
        "number, error",
        "KS distance",
    ]
    head += [f"boundary F1 ({folder.boundary_px:g} px)", f"{words(distance)} (median)"]
    matrix = [[name, *line] for name, line in zip(names, counts.tolist(), strict=True)]
    sizes = [size for size, _, _ in found]
    return [
        _table(
            "Against true masks: prediction - truth (mean ± 95 %)", head, rows, fewer_note(rows)
        ),
        _table("Particles found / all, by their true area", ["class", *sizes], recall),
        _table("Pixels: true class (row) and predicted class", ["", *names], matrix),
    ]


def _table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> Table:
    found = {"title": title, "head": head, "rows": [[str(cell) for cell in row] for row in rows]}
    return found | ({"note": note} if note else {})


def words(column: str) -> str:
    """A column of a CSV file as people read it: ``mean area, µm²``; fractions are in percent."""
    if column in UNITS or column == "um_per_px":
        return UNITS.get(column, "µm per px")
    name, kind = column, ""
    for suffix, said in SUFFIXES.items():
        if column.endswith(suffix):
            name, kind = column.removesuffix(suffix), said
    unit = re.fullmatch(r"(.+?)_(um2?|px2?|per_mm2|per_Mpx)", name)
    measured = f", {UNITS[unit[2]]}" if unit else ""
    if is_share(name):
        measured = ", points" if kind else ", %"
    shown = (unit[1] if unit else name) + kind + ("" if column.endswith("_fields") else measured)
    return shown.replace("_", " ").replace("astm g", "ASTM G")


def is_share(column: str) -> bool:
    """Whether a column of a CSV file holds shares of 1, which people are shown in percent."""
    return column.startswith("area_fraction")


def shown(column: str, value: object) -> str:
    """A value of a column of a CSV file as people read it, see ``words``."""
    if not isinstance(value, float):
        return "-" if value is None or value == "" else str(value)
    if column in EXACT and not math.isnan(value):
        return f"{value:{EXACT[column]}}"
    return percent(value) if is_share(column) else significant(value)


def interval(found: measure.Interval, fields: int | None = None) -> str:
    """``mean ± confidence`` over fields, and over how many if not over all of ``fields``."""
    text = plus_minus(found.mean, found.confidence)
    if fields in (None, found.fields) or text == "-":
        return text
    return f"{text} ({found.fields} field{'s' if found.fields > 1 else ''})"


def fraction_interval(found: measure.Interval) -> str:
    """``interval`` of an area fraction in percent, see ``plus_minus_fraction``."""
    return plus_minus_fraction(found.mean, found.confidence)


def fewer_note(rows: Sequence[Sequence[object]]) -> str:
    """What a number of fields in brackets means, if a cell of a table has one."""
    told = any(str(cell).endswith((" field)", " fields)")) for row in rows for cell in row)
    return FEWER if told else ""
