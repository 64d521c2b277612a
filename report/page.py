"""One page about an experiment, ``report.html``: scores, curves, pictures, measurements, settings.

A single file without scripts, with its pictures inside: it can be mailed, printed and opened in any
browser. ``page.html`` is its template; its numbers come from the runs and the predicted folders.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from PIL import Image

from config import FIELDS, ConfigError
from imaging.imagefile import check_size
from metallography.items import MEASUREMENTS, SUMMARY
from metallography.summary import DEFINITIONS, Table, of_particles, shown, words
from report.figures import curve_picture
from report.results import (
    BEST,
    LAST,
    RUN,
    Results,
    by_size,
    read_results,
    read_state,
    score_rows,
    unscored,
)
from utils.commandline import UserError, format_value
from utils.files import list_files, list_names, replace_file, special_kind
from utils.tables import text_of

REPORT = "report.html"
MAX_BYTES = 9_500_000  # of the page; mail programs refuse much more
TABLE_CHARACTERS = 1_000_000  # of all measurements; the rest of the page is for pictures
STAGES = {"self": "Pretraining", "fine": "Fine-tuning", "sup": "Supervised training"}
_PICTURE_CHARACTERS = 2_000_000
_OF_NO_EFFECT = {
    "repeats", "stages", "overwrite", "resume", "save_seconds", "report", "tensorboard",
}  # fmt: skip
# Beginnings of the columns of measurements.csv that say most.
_OF_IMAGES = ("image", "batch", "class_name", "number", "area_fraction", "mean_", "astm_g")


@dataclass
class Picture:
    """A picture of the page, or why there is none; a ``drawn`` one is stored without loss."""

    title: str
    image: Image.Image | None
    alt: str = ""
    missing: str = ""
    drawn: bool = False
    uri: str = ""  # data URI, as large as the page has room for


def write_report(experiment_dir: str | Path) -> Path:
    """Write ``report.html`` on the runs ``1_0``, ``1_1`` ... of an experiment; returns its path.

    The page is smaller than 10 MB: pictures are reduced as needed. UserError if there is no run, or
    the page cannot be written.
    """
    folder = Path(experiment_dir)
    runs = runs_of(folder)
    if not runs:
        raise UserError(
            f"{folder}: holds no run; give the folder of an experiment, such as aluminum_simclr"
        )
    curves, sheets = [_curves(run) for run in runs], _sheets(runs)
    measured, stages = _measurements(folder, runs), _scores(folder, runs)
    fits = [group["fit"] for stage in stages for group in stage["groups"]]
    content = {
        "name": folder.resolve().name,
        "titles": STAGES,
        "stages": stages,
        "has_scores": False in fits,
        "has_fits": True in fits,
        "curves": curves,
        "sheets": sheets,
        "measured": measured,
        "definitions": DEFINITIONS,
        **_settings(runs),
    }
    pictures = [*curves, *sheets, *(m["sheet"] for m in measured)]
    return write_page(folder / REPORT, "page.html", content, pictures)


def write_page(
    path: Path,
    template: str,
    content: Mapping[str, Any],
    pictures: Sequence[Picture],
    flag: str = "output_dir",
) -> Path:
    """Fill in a template of this folder; its pictures are reduced to what the page has room for.

    UserError, with the option ``flag`` as the cure, if it cannot be written.
    """
    there = [p for p in pictures if p.image]
    used = len(_html(content, template).encode(errors="backslashreplace"))
    _encode_all(there, MAX_BYTES - used - 1000 * len(there))
    replace_file(path, _html(content, template), flag)
    return path


def runs_of(experiment_dir: str | Path) -> list[Path]:
    """The folders of an experiment's runs."""
    names = [path for path in list_names(experiment_dir) if RUN.fullmatch(path.name)]
    return [path for path in names if path.is_dir() and _stages_of(path)]


def experiment_of(weights: Path, out: Path) -> Path:
    """The folder of all runs of a model's experiment, whose report shows what lies in ``out``.

    ConfigError if the model lies in no run, or the report does not look into ``out``.
    """
    run = weights.resolve().parent
    if run not in runs_of(run.parent):
        raise ConfigError(
            f"--report: {weights} is not in the folder of a run, and the report is about runs; "
            "leave --report out, or give a run as --weights"
        )
    if out.resolve().parent not in (run, run.parent):
        raise ConfigError(
            f"--report: found --out {out}; the report shows what lies in {run.parent} or in its "
            "runs, so leave --out out"
        )
    given = weights.parent.parent  # as it is written, unless that is another folder
    return given if given.resolve() == run.parent else run.parent


def _stages_of(run: Path) -> list[str]:
    """Stages that have left files in a run's folder."""
    return [s for s in STAGES if any((run / n).exists() for n in (f"state_{s}.pt", f"log_{s}.txt"))]


def _html(content: Mapping[str, Any], template: str) -> str:
    """Fill the template in; characters that HTML forbids become question marks."""
    text = _template(template).render(content)
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "?", text)


@cache
def _template(name: str) -> Template:
    """A template of this folder, compiled once: a page is filled in twice."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["word_columns"] = _word_columns
    return pages.get_template(name)


def _word_columns(rows: Sequence[Sequence[str]]) -> set[int]:
    """Numbers of the columns that hold words, which are aligned left."""
    two_letters = re.compile(r"[^\W\d]{2}")
    return {i for row in rows for i, cell in enumerate(row) if two_letters.search(cell)}


def _scores(folder: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """For each stage with labels: runs that are not finished, and tables for each data size.

    Runs that were evaluated on learnt labels have tables of their own, which are no scores.
    """
    stages = []
    for stage in dict.fromkeys(s for run in runs for s in _stages_of(run) if s != "self"):
        results, fits = (read_results(folder, stage, fit) for fit in (False, True))
        without = unscored(folder, stage)
        done = {*results, *fits, *without}
        waiting = [r.name for r in runs if stage in _stages_of(r) and r.name not in done]
        groups = [
            {"size": size, "runs": len(group), "tables": _score_tables(group), "fit": found is fits}
            for found in (results, fits)
            for size, group in by_size(found).items()
        ]
        entry = {"name": stage, "waiting": waiting, "groups": groups, "unscored": without}
        stages.append(entry)
    return stages


def _score_tables(group: Results) -> list[Table]:
    """A table for each way to choose the network: Dice, that of each class, ACC, mIoU."""
    found = {name for pair in group.values() for evaluation in pair for name in evaluation}
    classes = sorted(int(n[4:]) for n in found if re.fullmatch(r"dice\d+", n))
    names = ["dice", *(f"dice{c}" for c in classes), "acc", "miou"]
    head = ["run", "epoch", "Dice", *(f"Dice {c}" for c in classes), "ACC", "mIoU"]
    titles = f"Best on test: {BEST}", f"Last epoch: {LAST}"
    return [
        {"title": title, "head": head, "rows": score_rows(group, choice, names)}
        for choice, title in enumerate(titles)
    ]


def _curves(run: Path) -> Picture:
    image = None
    with suppress(UserError):
        image = curve_picture(run / "metrics.jsonl")
    alt = f"Learning curves of run {run.name}"
    return Picture(f"Run {run.name}", image, alt, missing="no curves yet", drawn=True)


def _sheets(runs: Sequence[Path]) -> list[Picture]:
    """The contact sheets; those of extremes first: few images that say much."""
    pictures = []
    for path in (p for run in runs for p in reversed(list_files(run, (".png",)))):
        if path.name.startswith("sheet_"):
            extremes = path.stem.endswith("_extremes")
            alt = "worst, median and best test image by Dice" if extremes else "test set"
            name = f"{path.parent.name}/{path.name}"
            image = _open(path)
            title = f"Run {path.parent.name}: {alt} ({name})" if image else name
            pictures.append(Picture(title, image, alt, missing="cannot be read, left out"))
    return pictures


def _open(path: Path) -> Image.Image | None:
    """A picture; None if it is absent or cannot be read."""
    try:
        if special_kind(path):
            return None
        with Image.open(path) as file:
            check_size(path, *file.size)
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


def _encode_all(pictures: Sequence[Picture], room: int) -> None:
    """Encode all pictures within ``room`` characters; drawn ones, which are small, come first."""
    for done, picture in enumerate(sorted(pictures, key=lambda p: not p.drawn)):
        share = min(room // (len(pictures) - done), _PICTURE_CHARACTERS)
        picture.uri = _encode(picture, share)
        room -= len(picture.uri)


def _encode(picture: Picture, room: int) -> str:
    """A data URI of at most ``room`` characters, the largest and best that fits; '' if none."""
    assert picture.image is not None
    kind = "png" if picture.drawn else "jpeg"
    for width, quality in ((1600, 80), (1600, 65), (1200, 65), (900, 60), (600, 50), (400, 40)):
        small = picture.image.copy()
        small.thumbnail((width, 65_000), Image.Resampling.LANCZOS)  # JPEG knows no larger ones
        file = io.BytesIO()
        # Colours in full resolution: thin coloured particles would fade otherwise. No JPEG is
        # optimized: that wants the file in one buffer, which pictures full of noise overflow.
        small.save(file, kind, optimize=picture.drawn, quality=quality, subsampling=0)
        uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(uri) <= room:
            return uri
    return ""


def _measurements(folder: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """For each folder with a ``measurements.csv``: its summary, rows by image, its sheet."""
    places = [folder, *(p for run in runs for p in (run, *list_names(run))), *list_names(folder)]
    room = TABLE_CHARACTERS
    found = []
    for place in dict.fromkeys(p for p in places if (p / MEASUREMENTS).is_file()):
        name = place.relative_to(folder).as_posix()
        content = _predicted(place)
        size = len(str(content))
        if size > room:
            content, size = {"problems": [f"Too much for this page: see {name}."]}, 0
        room -= size
        sheet = Picture(f"{name}: some of its images", _open(place / "sheet.png"), "predictions")
        found.append({"name": name, "sheet": sheet, **content})
    return found


def _predicted(place: Path) -> dict[str, Any]:
    """The summary of a predicted folder (older ones have none), and its table by image."""
    content: dict[str, Any] = {"problems": []}
    for name, read in ((SUMMARY, _summary), (MEASUREMENTS, _by_image)):
        try:
            content |= read(place / name)
        except (OSError, TypeError, ValueError, csv.Error) as error:
            content["problems"].append(f"{name}: cannot be read ({error}).")
    return content


def _summary(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _by_image(path: Path) -> dict[str, Table]:
    """The rows of a ``measurements.csv``, of the columns that say most."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        head, *rows = [*csv.reader(file)] or [[]]
    if not rows:
        raise ValueError("it holds no measurements")
    rows = [[text_of(cell) for _, cell in zip_longest(head, row, fillvalue="")] for row in rows]
    known = [i for i in range(len(head)) if any(row[i] for row in rows)]
    chosen = [i for i in known if head[i].startswith(_OF_IMAGES)] or known[:12]
    title = (
        f"By image and class, all {len(rows)} lines; all columns: {path.parent.name}/{path.name}"
    )
    words_of = {i for i in chosen if head[i] in ("image", "batch", "class_name")}
    matrix = [_is_matrix(dict(zip(head, row, strict=False))) for row in rows]
    cells = [
        [
            "-" if islands and of_particles(head[i]) else row[i] if i in words_of or not row[i]
            else shown(head[i], _value(row[i]))
            for i in chosen
        ]
        for row, islands in zip(rows, matrix, strict=True)
    ]  # fmt: skip
    table = {"title": title, "head": [words(head[i]) for i in chosen], "rows": cells}
    return {"by_image": table}


def _is_matrix(row: Mapping[str, str]) -> bool:
    """Whether a row is of class 0 without grains, whose pieces are islands."""
    grains = any(value for name, value in row.items() if name.startswith("grain_intercept"))
    return row.get("class") == "0" and not grains


def _value(cell: str) -> str | float:
    """A number with decimals or a power as a number; all else as it stands."""
    return float(cell) if re.fullmatch(r"-?\d+(\.\d+(e[-+]?\d+)?|e[-+]?\d+)", cell) else cell


def _settings(runs: Sequence[Path]) -> dict[str, Any]:
    """Each stage's setup, the settings of the first run, and those in which other runs differ."""
    stages: dict[str, dict[str, Any]] = {}
    usual: dict[str, str] = {}
    others = {}
    for run, stage in [(folder, name) for folder in runs for name in _stages_of(folder)]:
        state = read_state(run, stage)
        if state is None:
            continue
        title = f"{STAGES[stage]}, run {run.name}"
        about = {key: state[key] for key in ("about", "environment")}
        stages.setdefault(stage, {"title": title, **about})
        values = state["config"]
        own = {n: format_value(values[n]) for n in FIELDS if n in values}
        usual = own | usual
        others[f"Other settings in {title}"] = {
            n: v for n, v in own.items() if usual[n] != v and n not in _OF_NO_EFFECT
        }
    kept = {n: v for n, v in usual.items() if v == format_value(FIELDS[n].default)}
    changed = {n: v for n, v in usual.items() if n not in kept}
    lists = {"Changed from their defaults": changed, "At their defaults": kept} if usual else {}
    return {"trained": [*stages.values()], "settings": lists | others}
