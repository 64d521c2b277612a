"""The page of a laboratory on a folder of measured images, ``report.html`` beside its tables.

Phases first, then the images with their classes, warnings, sizes, batches, every image, and last
how it was made. One file with its pictures inside: it can be mailed and printed. A short script in
it switches, fades and enlarges the classes; without it all of them are shown.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from imaging.drawing import OUTSIDE_NAME, as_rgb, bar_length
from metallography import measure
from metallography.folder import Folder
from metallography.items import MEASUREMENTS, Item
from metallography.measure import fractions_of
from metallography.particles import Array, unit_of
from metallography.summary import (
    DEFINITIONS,
    Table,
    about_lines,
    at_most,
    fraction_interval,
    has_batches,
    of_particles,
    program_of,
    scale_words,
    sections,
    shown,
    warnings,
    words,
)
from report.figures import size_picture
from report.page import REPORT, TABLE_CHARACTERS, Picture, runs_of, write_page
from report.provenance import NETWORK_WORDS, how_measured
from utils.files import DataError
from utils.log import WARNING
from utils.metrics import IGNORED
from utils.tables import percent

BESIDE_RUNS = "laboratory.html"  # in the folder of an experiment, whose page has the usual name
UNCHECKED = (
    "Not checked: no image has a true mask here, so nobody knows how well the phases are told "
    "apart. Look at the images"
)
MOST_PICTURES = 40
FEW_ROWS = 8  # of a table above the pictures; longer ones are folded
MOST_PRINTED = 200  # rows of a folded table: longer ones stay folded on paper, too
LAYER_CHARACTERS = 4_000_000  # of all classes in all pictures; the photographs have the rest
SIDES = (1400, 1000, 700, 500, 350)  # pixels of a picture's longer side, as there is room
LEAST_PARTICLES = 10  # of a histogram
OUTSIDE_COLOUR = (40, 40, 40)
_ABOUT_PARTICLES = ("image", "batch", "class", "class_name")


@dataclass
class Told:
    """What the maker of a prediction knows, beyond the folder."""

    sample: str  # what was looked at
    names: Mapping[str, str] = field(default_factory=dict)  # of images; default: of their files
    by: str = ""  # who segmented
    how: str = NETWORK_WORDS  # the same in the paragraph of ``provenance.how_measured``
    said: Sequence[str] = ()  # sentences below the phases: how good is this
    doubts: Table | None = None  # images that may be wrong, the most doubtful first
    doubt_words: str = ""  # what its columns mean
    marks: Mapping[str, str] = field(default_factory=dict)  # what speaks against an image
    marked_places: Mapping[str, Array] = field(default_factory=dict)  # pixels (H, W) to look at
    places: str = "far from any label"  # what these are called
    warnings: Sequence[str] = ()  # more of them
    unchecked: str = UNCHECKED  # why nobody knows how right it is; '' if that was measured
    poor: Sequence[str] = ()  # phases that were mostly wrong where they were checked
    annotated: Mapping[str, str] = field(default_factory=dict)  # of images with labels: in words
    place: str = ""  # where the images come from
    changed: Sequence[Table] = ()  # against the answer before
    trained: Sequence[Table] = ()  # of its training, shown last
    notes: Sequence[str] = ()  # sentences on the training
    started: Sequence[str] = ()  # what was said at the start: how files were read, and the plan
    day: str = ""  # of the report; default: today


@dataclass
class Layer:
    """The pixels of one class of a picture, in its colour, as a data URI."""

    number: str
    uri: str


@dataclass
class View:
    """An image with its classes as layers above it."""

    name: str
    photo: Picture
    layers: list[Layer]
    bar: str  # words of the scale bar
    bar_width: float  # percent of the picture's width
    wide: float  # the picture's width in the unit of the bar
    unit: str
    shares: str
    mark: str


def place_of(images: Path) -> str:
    """A folder of images (or one image) with the folder above, such as ``test_numf/img``."""
    return "/".join(images.resolve().parts[1:][-2:]) or "/"


def write_laboratory(folder: Folder, told: Told, out: Path | None = None) -> Path:
    """Write the page of a folder that was run, into ``out``, by default the folder's own.

    Returns its path. UserError if it cannot be written.
    """
    out = out or folder.out
    names = folder.segmenter.class_names
    views = _views(folder, told)
    sizes = _size_pictures(folder)
    tables = {part: [*map(known_columns, each)] for part, each in sections(folder).items()}
    tables["batches"] = [*map(first_two_joined, tables.get("batches", []))]
    found = [line.removeprefix(WARNING) for line in warnings(folder)]
    hidden = "Scale:", *told.said  # which stand elsewhere on the page
    own = {item.name: told_name(told, item) for item in folder.items}
    content = {
        "told": told,
        "day": told.day or date.today().isoformat(),
        "program": program_of(folder),
        "by": told.by or folder.segmenter.about,
        "method": how_measured(folder, told.how),
        "fields": len(folder.done),
        "scale": scale_words(folder),
        "phases": phases(folder),
        "few_rows": FEW_ROWS,
        "most_printed": MOST_PRINTED,
        "tables": tables,
        "unchecked": "" if folder.compared else told.unchecked,
        "warnings": [*dict.fromkeys([*told.warnings, *found])],
        "unusable": folder.bad,
        "doubts": doubt_tables(told),
        "views": views,
        "left_out": max(0, len(folder.done) - len(views)),
        "legend": [*_legend(folder), *_place_legend(told)],
        "histograms": sizes,
        "few": _few(folder),
        "by_image": by_image(folder, own),
        "all_columns": all_columns(folder, own) if folder.rows else [],
        "about": [line for line in about_lines(folder) if not line.startswith(hidden)],
        "definitions": DEFINITIONS,
        "class_names": names,
    }
    pictures = [*sizes, *(view.photo for view in views)]
    return write_page(out / page_name(out), "laboratory.html", content, pictures, "--out")


def page_name(out: Path) -> str:
    """What the page is called in a folder of results."""
    return BESIDE_RUNS if runs_of(out) else REPORT


def phases(folder: Folder) -> list[dict[str, Any]]:
    """For each class: name, colour, fraction with its interval, and where the chart has marks.

    ``low``, ``mean``, ``high`` and ``fields`` are in percent of all pixels.
    """
    found = []
    for c, name in enumerate(folder.segmenter.class_names):
        rows = [row for row in folder.rows if row["class"] == c]
        shares = [100 * row["area_fraction"] for row in rows]
        mean = measure.mean_over(rows, "area_fraction", 100)
        half = 0.0 if math.isnan(mean.confidence) else mean.confidence
        known = [share for share in shares if not math.isnan(share)]
        found.append({
            "name": name,
            "colour": _hex(folder.segmenter.colours[c]),
            "text": fraction_interval(mean),
            "mean": 0.0 if math.isnan(mean.mean) else mean.mean,
            "low": max(0.0, mean.mean - half) if known else 0.0,
            "high": min(100.0, mean.mean + half) if known else 0.0,
            "has_interval": half > 0,
            "fields": known[:: -(-len(known) // 200) or 1],
        })  # fmt: skip
    return found


def by_image(folder: Folder, own: Mapping[str, str]) -> Table:
    """The area fraction of each class in each image, in percent; ``own`` are the images' names."""
    names = folder.segmenter.class_names
    batches = {item.name: item.batch for item in folder.items}
    scaled = folder.unit_scale is not None
    with_batch = has_batches(folder)
    rows = []
    scales = {item.name: folder.scale_of(item) for item in folder.items}
    for image, shares in fractions_of(folder.rows, len(names)).items():
        row = [own.get(image, image), *([batches.get(image) or "-"] if with_batch else [])]
        row += [shown("um_per_px", scales.get(image))] if scaled else []
        rows.append([*row, *(percent(s) for s in shares)])
    head = ["image", *(["batch"] if with_batch else []), *(["µm per px"] if scaled else [])]
    return {"title": "Area fraction of each image, %", "head": [*head, *names], "rows": rows}


def all_columns(folder: Folder, own: Mapping[str, str]) -> list[Table]:
    """All measurements of all images, a table for each class, without columns nobody knows.

    What would make the page too large is left out, and its title says so.
    """
    tables: list[Table] = []
    room = TABLE_CHARACTERS
    for c, name in enumerate(folder.segmenter.class_names):
        rows = [row for row in folder.rows if row["class"] == c]
        sized = c in folder.with_particles
        columns = [n for n in rows[0] if n not in _ABOUT_PARTICLES] if rows else []
        columns = [n for n in columns if sized or not of_particles(n)]
        known = [n for n in columns if any(row[n] == row[n] for row in rows)]
        cells = [
            [own.get(row["image"], row["image"]), *(_bounded(folder, n, row) for n in known)]
            for row in rows
        ]
        fits, used = 0, 0
        while fits < len(cells) and used < room:
            used += sum(len(cell) + 9 for cell in cells[fits])
            fits += 1
        room -= used
        more = f"; {len(cells) - fits} images are only in {MEASUREMENTS}"
        title = f"{name}: {fits} images" + (more if fits < len(cells) else "")
        head = ["image", *map(words, known)]
        tables.append({"title": title, "head": head, "rows": cells[:fits]})
    return tables


def _bounded(folder: Folder, column: str, row: Mapping[str, Any]) -> str:
    """A measurement of an image; a percentile that the smallest particle cuts off is a bound."""
    value = row[column]
    if not re.match(r"d\d+_diameter", column) or math.isnan(value):
        return shown(column, value)
    scale = row.get("um_per_px", 1.0)
    return at_most(value, math.sqrt(4 * folder.min_px / math.pi) * scale)


def doubt_tables(told: Told) -> list[Table]:
    """The table of doubts in two, as far as it has rows: images that are marked, and all others."""
    if told.doubts is None:
        return []
    title, head, rows = (told.doubts[part] for part in ("title", "head", "rows"))
    marked, others = rows[: len(told.marks)], rows[len(told.marks) :]
    parts = [
        (f"{title}: {len(marked)} marked", marked),
        (f"{title}: {len(others)} not marked", others),
    ]
    return [known_columns({"title": t, "head": head, "rows": own}) for t, own in parts if own]


def known_columns(table: Table) -> Table:
    """A table without columns of which nothing is known, such as G where there are no grains."""
    rows = table["rows"]
    known = [i for i in range(len(table["head"])) if i == 0 or any(row[i] != "-" for row in rows)]
    head, *cells = ([row[i] for i in known] for row in (table["head"], *rows))
    return {**table, "head": head, "rows": cells}


def first_two_joined(table: Table) -> Table:
    """A table whose first two columns, batch and class, are one: it alone stays in sight."""
    (one, other, *head), rows = table["head"], table["rows"]
    cells = [[f"{a}: {b}", *rest] for a, b, *rest in rows]
    return {**table, "head": [f"{one}, {other}", *head], "rows": cells}


def _size_pictures(folder: Folder) -> list[Picture]:
    unit = words(unit_of(folder.unit_scale))
    pictures = []
    for c in folder.with_particles:
        name, parts = folder.segmenter.class_names[c], folder.diameters[c]
        values = np.concatenate(parts) if parts else np.zeros(0)
        if len(values) >= LEAST_PARTICLES:
            title = f"{name}: {len(values)} whole particles"
            image = size_picture(title, values, unit, _hex(folder.segmenter.colours[c]))
            pictures.append(Picture("", image, f"Diameters of {title}", drawn=True))
    return pictures


def _few(folder: Folder) -> list[str]:
    """Classes with too few whole particles for a histogram."""
    counts = {c: sum(map(len, folder.diameters[c])) for c in folder.with_particles}
    names = folder.segmenter.class_names
    return [f"{names[c]} ({count})" for c, count in counts.items() if count < LEAST_PARTICLES]


def _views(folder: Folder, told: Told) -> list[View]:
    """Pictures of images, at most ``MOST_PICTURES``: marked ones as they come, others evenly."""
    items = {done.item.name: done.item for done in folder.done}
    marked = [items[name] for name in told.marks if name in items]
    others = [done.item for done in folder.done if done.item.name not in told.marks]
    most = max(0, MOST_PICTURES - len(marked))
    evenly = np.linspace(0, len(others) - 1, min(most, len(others))).round().astype(int)
    chosen = [*marked[:MOST_PICTURES], *(others[i] for i in evenly)]
    room = LAYER_CHARACTERS // max(1, len(chosen))
    views = []
    for item in chosen:
        try:
            image = item.read(folder.segmenter.gray)
            mask = folder.measured(item)
        except DataError:  # it was there a moment ago; the tables are written already
            continue
        views.append(_view(folder, told, item, image, mask, room))
    return views


def _view(folder: Folder, told: Told, item: Item, image: Array, mask: Array, room: int) -> View:
    names, colours = folder.segmenter.class_names, folder.segmenter.colours
    for side in SIDES:
        size = fitted_size(mask.shape, side)
        ids = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        layers = [Layer(str(c), layer_uri(ids == c, colours[c])) for c in range(len(names))
                  if (ids == c).any()]  # fmt: skip
        if (ids == IGNORED).any() and len(names) <= IGNORED:
            layers.append(Layer("outside", layer_uri(ids == IGNORED, OUTSIDE_COLOUR)))
        place = told.marked_places.get(item.name)
        if place is not None and place.any():
            where = cv2.resize(place.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            layers.append(Layer("place", layer_uri(_hatched(where > 0), (235, 50, 140))))
        if sum(len(layer.uri) for layer in layers) <= room:
            break
    how = cv2.INTER_AREA if max(size) < max(mask.shape) else cv2.INTER_NEAREST
    photo = Image.fromarray(as_rgb(cv2.resize(image, size, interpolation=how)))
    um = folder.scale_of(item)
    width = mask.shape[1] * (um or 1.0)
    bar, unit = bar_length(width / 4), "µm" if um else "px"
    name = told_name(told, item)
    shares = fractions_of([r for r in folder.rows if r["image"] == item.name], len(names))
    said = [f"{n}: {percent(s)} %" for n, s in zip(names, shares[item.name], strict=True) if s > 0]
    return View(
        name,
        Picture(name, photo, f"{name} with its classes"),
        layers,
        f"{bar:g} {unit}",
        100 * bar / width,
        width,
        unit,
        ", ".join(said),
        told.marks.get(item.name, ""),
    )


def told_name(told: Told, item: Item) -> str:
    """The name of an image on the page, with a mark if its labels were learnt."""
    mark = f" ({told.annotated[item.name]})" if item.name in told.annotated else ""
    return (told.names.get(item.name) or own_name(item)) + mark


def own_name(item: Item) -> str:
    """The name of an image's file with its sub-folders, as the user knows it."""
    name = Path(item.name)
    return (name.parent / item.path.name).as_posix() if name.name == item.path.stem else item.name


def fitted_size(shape: Sequence[int], side: int) -> tuple[int, int]:
    """Width and height (as OpenCV has them) of a picture (H, W) reduced to ``side`` pixels.

    Small ones are enlarged by a whole factor, so that their pixels stay squares.
    """
    longest = max(shape)
    factor = side / longest if longest > side else float(max(1, min(side, 500) // longest))
    return max(1, round(shape[1] * factor)), max(1, round(shape[0] * factor))


def layer_uri(where: Array, colour: Sequence[int]) -> str:
    """A PNG of one colour where ``where`` (H, W) is true, and nothing elsewhere."""
    picture = Image.fromarray(where.astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, *(int(value) for value in colour)])
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=0, bits=1, optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _hatched(where: Array) -> Array:
    """Slanted lines over what is true."""
    height, width = where.shape
    diagonal = np.arange(height)[:, None] + np.arange(width)
    return np.asarray(where & (diagonal % 12 < 3))


def _legend(folder: Folder) -> list[dict[str, Any]]:
    """Number, name and colour of each class, and whether it is shown at first."""
    s = folder.segmenter
    found = [
        {"number": str(c), "name": name, "colour": _hex(s.colours[c]), "shown": c > 0}
        for c, name in enumerate(s.class_names)
    ]
    if any((row["field_px"] < h * w) for row, (h, w) in _fields(folder)):
        colour = _hex(OUTSIDE_COLOUR)
        found.append({"number": "outside", "name": OUTSIDE_NAME, "colour": colour, "shown": True})
    return found


def _place_legend(told: Told) -> list[dict[str, Any]]:
    if not any(place.any() for place in told.marked_places.values()):
        return []
    return [{"number": "place", "name": told.places, "colour": "#eb328c", "shown": True}]


def _fields(folder: Folder) -> list[tuple[Mapping[str, Any], tuple[int, int]]]:
    first = {row["image"]: row for row in folder.rows if row["class"] == 0}
    return [(first[done.item.name], done.size) for done in folder.done if done.item.name in first]


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in colour)
