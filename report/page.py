"""One page about an experiment, ``report.html``: scores, curves, pictures, measurements, settings.

The page is a single file without scripts: pictures are inside it, nothing is fetched. It can be
mailed, opened in any browser and printed. Its words and looks stand in ``page.html``, beside this
file; its numbers come from the states of the runs and the CSV files of predicted folders.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from config import FIELDS, format_value
from metallography.summary import interval, number
from report.figures import curve_picture
from report.results import Results, by_size, read_results
from utils.checkpoint import CheckpointError
from utils.commandline import UserError
from utils.files import list_files, list_names, replace_file
from utils.log import read_metrics
from utils.metrics import format_mean_std
from utils.run_folder import StateFile
from utils.tables import digits

REPORT = "report.html"
MAX_BYTES = 9_500_000  # of the page; mail programs refuse much more
TABLE_CHARACTERS = 1_000_000  # of all measurements; the rest of the page is for pictures
STAGES = {"self": "Pretraining", "fine": "Fine-tuning", "sup": "Supervised training"}
CSV_ROWS = 50
_PICTURE_CHARACTERS = 2_000_000
_BEST = (
    "Best on test: the evaluation with the highest ACC on the test set, as in the paper's protocol"
)
_LAST = "Last epoch: after the last epoch, nothing chosen"
_NO_MATTER = {
    "repeats", "stages", "overwrite", "resume", "save_seconds", "report", "tensorboard",
}  # fmt: skip
# Beginnings of the columns that say most, of each file.
_OF_MEANS = ("area_fraction", "number_per", "mean_", "astm_g")
_OF_BATCHES = ("batch", "class", "fields", "area_fraction", "number_per", "particles", "mean_")
_OF_ERRORS = ("area_fraction_error", "number_error", "ks_", "boundary_f1")
_OF_IMAGES = ("image", "batch", "class_name", "number", *_OF_MEANS)

Row = Mapping[str, str]


@dataclass
class Picture:
    """A picture of the page, or why there is none; ``uri``: as it is encoded in the room left.

    Lines and letters are ``drawn``: they are kept without loss.
    """

    title: str
    image: Image.Image | None
    alt: str = ""
    missing: str = ""
    drawn: bool = False
    uri: str = ""


@dataclass
class Table:
    """A table of the page; ``mean``: its last row is the mean of the others."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    mean: bool = False

    @property
    def words(self) -> set[int]:
        """Numbers of the columns that hold words, which stand at the left."""
        two_letters = re.compile(r"[^\W\d]{2}")
        return {i for row in self.rows for i, cell in enumerate(row) if two_letters.search(cell)}


def write_report(experiment_dir: str | Path) -> Path:
    """Write ``report.html`` into an experiment's folder, from what its runs have left there.

    Args:
        experiment_dir: such as ``aluminum_simclr``, the folder of the runs ``1_0``, ``1_1`` ...

    Returns:
        The path written. The page is smaller than 10 MB: pictures are reduced as needed.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    folder = Path(experiment_dir)
    runs = runs_of(folder)
    if not runs:
        raise UserError(
            f"{folder}: holds no run; give the folder of an experiment, such as aluminum_simclr"
        )
    curves, sheets = [_curves(run) for run in runs], _sheets(runs)
    measured = _measurements(folder, runs)
    content = {
        "name": folder.resolve().name,
        "titles": STAGES,
        "stages": _scores(folder, runs),
        "curves": curves,
        "sheets": sheets,
        "measured": measured,
        **_settings(runs),
    }
    pictures = [p for p in [*curves, *sheets, *(m["sheet"] for m in measured)] if p.image]
    text = _html(content)
    _encode_all(
        pictures, MAX_BYTES - len(text.encode(errors="backslashreplace")) - 1000 * len(pictures)
    )
    replace_file(folder / REPORT, _html(content))
    return folder / REPORT


def runs_of(experiment_dir: str | Path) -> list[Path]:
    """The folders of an experiment's runs."""
    return [path for path in list_names(experiment_dir) if path.is_dir() and _stages_of(path)]


def _stages_of(run: Path) -> list[str]:
    """Stages that have left something in a run's folder."""
    return [s for s in STAGES if any((run / n).exists() for n in (f"state_{s}.pt", f"log_{s}.txt"))]


def _html(content: Mapping[str, Any]) -> str:
    """Fill the template in; signs that HTML forbids become question marks."""
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template("page.html").render(content)
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "?", text)


# --- scores ---------------------------------------------------------------------------------------


def _scores(folder: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """For each stage with labels: runs that are not finished, and tables for each data size."""
    stages = []
    for stage in dict.fromkeys(s for run in runs for s in _stages_of(run) if s != "self"):
        results = read_results(folder, stage)
        waiting = [r.name for r in runs if stage in _stages_of(r) and r.name not in results]
        groups = []
        for size, group in by_size(results).items():
            dice = _mean([last.get("dice", math.nan) for _, last in group.values()])
            tables = _score_tables(group)
            groups.append({"size": size, "runs": len(group), "dice": dice, "tables": tables})
        stages.append({"name": stage, "waiting": waiting, "groups": groups})
    return stages


def _score_tables(group: Results) -> list[Table]:
    """A table for each way to choose the network: Dice, that of each class, ACC, mIoU."""
    found = dict.fromkeys(n for pair in group.values() for e in pair for n in e)
    classes = sorted(int(n[4:]) for n in found if re.fullmatch(r"dice\d+", n))
    names = ["dice", *(f"dice{c}" for c in classes), "acc", "miou"]
    head = ["run", "epoch", "Dice", *(f"Dice {c}" for c in classes), "ACC", "mIoU"]
    tables = []
    for i, words in enumerate((_BEST, _LAST)):
        chosen = {run: pair[i] for run, pair in group.items()}
        scores = {run: [e.get(n, math.nan) for n in names] for run, e in chosen.items()}
        rows = [[run, str(e["epoch"]), *map(digits, scores[run])] for run, e in chosen.items()]
        if len(group) > 1:
            rows.append(["mean ± std", "", *map(_mean, zip(*scores.values(), strict=True))])
        tables.append(Table(words, head, rows, mean=len(group) > 1))
    return tables


def _mean(values: Sequence[float]) -> str:
    return format_mean_std(values) if len(values) > 1 else digits(values[0])


# --- pictures -------------------------------------------------------------------------------------


def _curves(run: Path) -> Picture:
    alt = f"Learning curves of run {run.name}"
    try:
        return Picture(f"Run {run.name}", curve_picture(run / "metrics.jsonl"), alt, drawn=True)
    except UserError:
        return Picture(f"Run {run.name}", None, missing="no curves yet")


def _sheets(runs: Sequence[Path]) -> list[Picture]:
    """The contact sheets; those of extremes first: few images that say much."""
    pictures = []
    for path in (p for run in runs for p in reversed(list_files(run, (".png",)))):
        if path.name.startswith("sheet_"):
            extremes = path.stem.endswith("_extremes")
            words = "worst, median and best test image by Dice" if extremes else "test set"
            name = f"{path.parent.name}/{path.name}"
            image = _open(path)
            title = f"Run {path.parent.name}: {words} ({name})" if image else name
            pictures.append(Picture(title, image, words, missing="cannot be read, left out"))
    return pictures


def _open(path: Path) -> Image.Image | None:
    """A picture; None if it is absent or cannot be read."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _encode_all(pictures: Sequence[Picture], room: int) -> None:
    """Encode pictures into at most ``room`` characters together; drawn ones, small, come first."""
    for done, picture in enumerate(sorted(pictures, key=lambda p: not p.drawn)):
        share = min(room // (len(pictures) - done), _PICTURE_CHARACTERS)
        picture.uri = _encode(picture, share)
        room -= len(picture.uri)


def _encode(picture: Picture, room: int) -> str:
    """A data URI of at most ``room`` characters, the largest and best that fits; '' if none."""
    assert picture.image is not None
    for width, quality in ((1600, 80), (1600, 65), (1200, 65), (900, 60), (600, 50), (400, 40)):
        small = picture.image
        if small.width > width:
            size = (width, max(1, round(small.height * width / small.width)))
            small = small.resize(size, Image.Resampling.LANCZOS)
        if max(small.size) > 65_000:  # JPEG knows no larger ones
            continue
        file = io.BytesIO()
        if picture.drawn:
            small.save(file, format="PNG", optimize=True)
        else:
            # Colours in full resolution: thin coloured particles would fade otherwise.
            # Not optimize: it wants the file in one buffer, which pictures full of noise overflow.
            small.save(file, format="JPEG", quality=quality, subsampling=0)
        kind = "png" if picture.drawn else "jpeg"
        uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(uri) <= room:
            return uri
    return ""


# --- measurements ---------------------------------------------------------------------------------


def _measurements(folder: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """For each folder with a ``measurements.csv``: how it was made, its tables, its sheet."""
    places = [folder, *(p for run in runs for p in (run, *list_names(run))), *list_names(folder)]
    room = TABLE_CHARACTERS
    found = []
    for place in dict.fromkeys(p for p in places if (p / "measurements.csv").is_file()):
        name = place.relative_to(folder).as_posix()
        notes, tables = _prediction(place / "predicted.jsonl"), []
        try:
            tables = _tables(place)
            notes += [] if tables else ["measurements.csv: holds no measurements."]
        except (OSError, csv.Error) as error:
            notes.append(f"measurements.csv: cannot be read ({error}).")
        size = sum(len(cell) for table in tables for row in table.rows for cell in row)
        if size > room:
            tables, size = [], 0
            notes.append(f"Too much for this page: see {name}.")
        room -= size
        sheet = Picture(f"{name}: some of its images", _open(place / "sheet.png"), "predictions")
        found.append({"name": name, "notes": notes, "tables": tables, "sheet": sheet})
    return found


def _prediction(record: Path) -> list[str]:
    """How a folder was predicted, by the record that prediction left; empty without one."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError):
        lines = read_metrics(record)
    if not lines:
        return []
    size, scale = lines[0].get("resize"), lines[-1].get("um_per_px")
    how = f"resized to {size} x {size}" if size else "at their own size"
    views = ", 8 views averaged" if lines[0].get("tta") else ""
    unit = f"Scale: {scale:g} µm per pixel" if scale else "No scale given, lengths in pixels"
    return [f"Predicted {how}{views}. {unit}."]


def _tables(place: Path) -> list[Table]:
    """What was measured: by class, by batch, against true masks, and the first images."""
    rows = _read_csv(place / "measurements.csv")
    if not rows:
        return []
    tables = [_means("By class: mean ± 95 % over images", rows, _OF_MEANS)]
    if any(row.get("batch") for row in rows):
        names = {row.get("class", ""): row.get("class_name", "") for row in rows}
        batches = _read_csv(place / "batches.csv")
        named = [{**row, "class": names.get(row.get("class", ""), "")} for row in batches]
        tables.append(_rows("By production batch (ci95: half-width)", named, _OF_BATCHES))
    caption = "Against true masks, prediction - truth: mean ± 95 % over images"
    tables.append(_means(caption, _read_csv(place / "comparison.csv"), _OF_ERRORS))
    count = f"the first {CSV_ROWS} of {len(rows)}" if len(rows) > CSV_ROWS else f"all {len(rows)}"
    caption = f"By image and class, {count} lines; all columns: {place.name}/measurements.csv"
    tables.append(_rows(caption, rows[:CSV_ROWS], _OF_IMAGES))
    return [table for table in tables if table.rows]


def _read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by its head; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return [{k: v for k, v in row.items() if k} for row in csv.DictReader(file, restval="")]


def _means(caption: str, rows: Sequence[Row], columns: tuple[str, ...]) -> Table:
    """Means over images with their confidence, a row for each class."""
    names = _known(rows, columns)
    lines = []
    for name in dict.fromkeys(row["class_name"] for row in rows if row.get("class_name")):
        mine = [row for row in rows if row["class_name"] == name]
        means = (interval(_value(row[n]) for row in mine) for n in names)
        lines.append([name, str(len(mine)), *means])
    return Table(caption, ["class", "images", *map(_title, names)], lines)


def _rows(caption: str, rows: Sequence[Row], columns: tuple[str, ...]) -> Table:
    """Rows as they are, those columns (the first twelve if none is known)."""
    names = _known(rows, columns) or _known(rows, ("",))[:12]
    return Table(caption, [*map(_title, names)], [[_short(row[n]) for n in names] for row in rows])


def _known(rows: Sequence[Row], columns: tuple[str, ...]) -> list[str]:
    """The columns that begin so, but for those without any value."""
    names = rows[0] if rows else ()
    return [n for n in names if n.startswith(columns) and any(row[n] for row in rows)]


def _title(column: str) -> str:
    """A column's name in words, with micrometres and squares as they are printed."""
    text = re.sub(r"\bum(2?)\b", "µm\\1", column.replace("_", " ")).replace("astm g", "ASTM G")
    return re.sub(r"\b([µm]m|px)2\b", "\\1²", text)


def _value(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _short(cell: str) -> str:
    """Four digits of a number that has more."""
    return number(float(cell)) if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", cell) else cell


# --- settings -------------------------------------------------------------------------------------


def _settings(runs: Sequence[Path]) -> dict[str, Any]:
    """What each stage was, once; settings of the first run; and where other runs have others."""
    stages: dict[str, dict[str, Any]] = {}
    usual: dict[str, str] = {}
    others = {}
    complete = False  # older states hold those settings alone which decide the result
    for run, stage in [(folder, name) for folder in runs for name in _stages_of(folder)]:
        state = None
        with suppress(CheckpointError):
            state = StateFile(run / f"state_{stage}.pt").load()
        if state is None:
            continue
        title = f"{STAGES[stage]}, run {run.name}"
        about = {"about": state.get("about"), "environment": state.get("environment")}
        stages.setdefault(stage, {"title": title, **about})
        complete |= "config" in state
        values = state.get("config", state["settings"])
        own = {n: format_value(values[n]) for n in FIELDS if n in values}
        usual = own | usual
        other = {n: v for n, v in own.items() if usual[n] != v and n not in _NO_MATTER}
        others[f"Other settings in {title}"] = other
    kept = {n: v for n, v in usual.items() if v == format_value(FIELDS[n].default)}
    changed = {n: v for n, v in usual.items() if n not in kept}
    lists = {"Changed from their defaults": changed, "At their defaults": kept}
    if not complete:
        lists = {"Settings that decide the result": usual}
    return {"trained": [*stages.values()], "settings": lists | others}
