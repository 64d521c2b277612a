"""One page about an experiment, ``report.html``: scores, curves, pictures, measurements, settings.

The page is a single file without scripts: pictures are inside it, nothing is fetched. It can be
mailed, opened in any browser and printed.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from report.curves import curve_picture
from report.results import Evaluation, read_results
from utils.commandline import UserError
from utils.files import replace_file
from utils.metrics import format_mean_std

REPORT = "report.html"
MAX_BYTES = 9_500_000  # of the page; mail programs refuse much more
STAGES = {"self": "Pretraining", "fine": "Fine-tuning", "sup": "Supervised training"}
CSV_ROWS = 50
_EXTREMES = "_extremes"  # in the name of a sheet of the worst, median and best image
_TABLE_BYTES = 1_500_000  # of all measurements together; the rest of the page is for pictures
_PICTURE_BYTES = 2_000_000
_CHOICES = (
    "Best on test: the evaluation with the highest ACC on the test set, as in the paper's protocol",
    "Last epoch: after the last epoch, nothing chosen",
)
_NO_MATTER = {
    "repeats", "stages", "overwrite", "resume", "save_seconds", "report", "tensorboard",
}  # fmt: skip
_EXPLAINED = (
    ("Dice", "overlap of predicted and true regions of a class, 2|P∩G| / (|P|+|G|), pooled over "
     "the whole test set; without a number: mean over the classes, background left out. "
     "1 is perfect, 0 is no overlap."),
    ("mIoU", "intersection over union, another measure of overlap, over the same classes; never "
     "larger than Dice."),
    ("ACC", "share of correct pixels, background included, mean over the test images. Where most "
     "pixels are background it is high even if every particle is missed."),
    ("Best on test", "the evaluation with the highest ACC on the test set, as in the paper's "
     "protocol. It was chosen with the labels of the test set, so it flatters a little."),
    ("Last epoch", "the network as it was after the last epoch. Nothing was chosen."),
    ("±", "sample standard deviation over runs, each with other annotated images."),
)  # fmt: skip
_COLUMNS = (
    "image", "batch", "class_name", "area_fraction", "number", "number_per", "mean_area",
    "mean_diameter", "mean_length", "mean_aspect_ratio", "mean_intercept", "mean_free_path",
)  # fmt: skip
_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5f656d; --paper: #fff; --line: #d5d9de;
  --band: #f3f5f7; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #a3a9b1; --paper: #16181b;
  --line: #3a3f45; --band: #20242a; --accent: #7ab8f5; } }
body { font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  color: var(--ink); background: var(--paper); max-width: 72rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1rem 0 .3rem; color: var(--faint); }
p, li, dd { max-width: 62rem; overflow-wrap: anywhere; }
a { color: var(--accent); } nav a { margin-right: 1.2rem; }
.faint, caption, figcaption { color: var(--faint); font-size: .9rem; text-align: left; }
.key { font-size: 1.15rem; border-left: 4px solid var(--accent); padding: .2rem 0 .2rem .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  margin: .4rem 0 1rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .w { text-align: left; }
td { white-space: nowrap; }
th { vertical-align: bottom; } thead th { border-bottom: 2px solid var(--line); }
tr.mean td { font-weight: 600; background: var(--band); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; }
figure { margin: .6rem 0 1.2rem; } img { max-width: 100%; height: auto; border-radius: 4px; }
ul.settings { columns: 17rem; list-style: none; padding: 0; font-size: .85rem; }
ul.settings li { break-inside: avoid; } code { font-size: .92em; }
@media print { :root { color-scheme: light; --ink: #000; --faint: #444; --paper: #fff;
  --line: #bbb; --band: #f0f0f0; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; }
  h2, h3, h4 { break-after: avoid; } tr { break-inside: avoid; }
  figure { break-inside: avoid; } img { width: auto; max-height: 22cm; } }
"""


@dataclass
class _Picture:
    """A picture of the page; ``body`` is filled in when all are known and share the room."""

    title: str
    alt: str
    picture: Image.Image
    drawn: bool  # lines and letters: kept without loss


@dataclass
class _Page:
    """Parts of the page, text or pictures, in their order."""

    parts: list[str | _Picture] = field(default_factory=list)

    def add(self, *parts: str | _Picture) -> None:
        self.parts += parts


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
    page = _Page()
    _scores(page, folder, runs)
    _curves(page, runs)
    _sheets(page, runs)
    _measurements(page, folder, runs)
    _settings(page, runs)
    path = folder / REPORT
    replace_file(path, _html(folder.resolve().name, page))
    return path


def runs_of(experiment_dir: str | Path) -> list[Path]:
    """The folders of an experiment's runs."""
    return [p for p in sorted(Path(experiment_dir).glob("*")) if p.is_dir() and _stages_of(p)]


def _stages_of(run: Path) -> list[str]:
    """Stages that have left something in a run's folder."""
    return [s for s in STAGES if any((run / f"{n}_{s}{x}").exists() for n, x in _TRACES)]


_TRACES = (("state", ".pt"), ("log", ".txt"))


# --- scores ---------------------------------------------------------------------------------------


def _scores(page: _Page, folder: Path, runs: Sequence[Path]) -> None:
    page.add('<h2 id="scores">Scores on the test set</h2>')
    stages = dict.fromkeys(s for run in runs for s in _stages_of(run) if s != "self")
    for stage in stages:
        results = read_results(folder, stage)
        waiting = [r.name for r in runs if stage in _stages_of(r) and r.name not in results]
        page.add(f"<h3>{STAGES[stage]}</h3>")
        if waiting:
            page.add(
                f"<p>Not in the tables, because not finished or without a state_{stage}.pt that "
                f"can be read: {_text(', '.join(waiting))}.</p>"
            )
        for size in dict.fromkeys(_size(name) for name in results):
            group = {n: pair for n, pair in results.items() if _size(n) == size}
            page.add(*_score_tables(size, group))
    if not stages:
        page.add("<p>Only pretraining so far: there is nothing to score yet.</p>")
    items = "".join(f"<dt>{_text(n)}</dt><dd>{_text(words)}</dd>" for n, words in _EXPLAINED)
    page.add(f"<h4>What the scores mean</h4><dl>{items}</dl>")


def _size(run: str) -> str:
    return run.split("_")[0]


def _size_words(size: str) -> str:
    words = {"1": "one annotated image", "f": "all annotated images"}
    return words.get(size, f"{size} annotated images")


def _score_tables(size: str, group: Mapping[str, tuple[Evaluation, Evaluation]]) -> list[str]:
    """The words that matter most, then a table for each way to choose the network."""
    names = _score_names(e for pair in group.values() for e in pair)
    last = [_value(pair[1], "dice") for pair in group.values()]
    count = f"{len(group)} run{'s' if len(group) > 1 else ''}"
    parts = [
        f'<p class="key">Trained with {_size_words(size)}, {count}: '
        f"Dice <strong>{_mean(last)}</strong> after the last epoch.</p>"
    ]
    for i, words in enumerate(_CHOICES):
        rows = [
            [name, str(pair[i].get("epoch", "-")), *(_digits(_value(pair[i], n)) for n in names)]
            for name, pair in group.items()
        ]
        mean = []
        if len(group) > 1:
            values = [[_value(pair[i], n) for pair in group.values()] for n in names]
            mean = ["mean ± std", "", *(_mean(v) for v in values)]
        head = ["run", "epoch", *(_score_word(n) for n in names)]
        parts.append(_table(head, rows, caption=words, last=mean))
    return parts


def _score_names(evaluations: Iterable[Evaluation]) -> list[str]:
    """Dice, that of each class, ACC, mIoU."""
    found = dict.fromkeys(n for e in evaluations for n in e)
    classes = sorted(int(n[4:]) for n in found if re.fullmatch(r"dice\d+", n))
    return ["dice", *(f"dice{c}" for c in classes), "acc", "miou"]


def _score_word(name: str) -> str:
    if name in ("acc", "miou"):
        return {"acc": "ACC", "miou": "mIoU"}[name]
    return f"Dice {name[4:]}".strip()


def _value(evaluation: Evaluation, name: str) -> float:
    value = evaluation.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _digits(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _mean(values: Sequence[float]) -> str:
    return format_mean_std(values) if len(values) > 1 else _digits(values[0])


# --- curves and pictures --------------------------------------------------------------------------


def _curves(page: _Page, runs: Sequence[Path]) -> None:
    page.add('<h2 id="curves">Learning curves</h2>')
    page.add(
        '<p class="faint">Losses should fall and level out. Scores are measured on test images '
        "that the network never learned from: if they fall while the losses still fall, the "
        "network is learning its training images by heart. In pretraining, the image loss compares "
        "whole images and the patch loss small regions, on maps of a quarter (up1), half (up2) and "
        "the full size (up3) of the image.</p>"
    )
    for run in runs:
        path = run / "metrics.jsonl"
        try:
            picture = curve_picture(path)
        except UserError:
            page.add(f"<p>{_text(run.name)}: no curves yet.</p>")
            continue
        page.add(_Picture(f"Run {run.name}", f"Learning curves of run {run.name}", picture, True))


def _sheets(page: _Page, runs: Sequence[Path]) -> None:
    # 'sheet_fine_extremes.png' before 'sheet_fine.png': few pictures that say much come first.
    found = [(run, p) for run in runs for p in sorted(run.glob("sheet_*.png"), reverse=True)]
    if not found:
        return
    page.add('<h2 id="pictures">Test images</h2>')
    page.add(
        '<p class="faint">From left to right: the image, its true classes, the predicted classes, '
        "and the errors. Magenta: a class was found where there is background. Light blue: a class "
        "was missed. White: one class was taken for another.</p>"
    )
    for run, path in found:
        name = f"{run.name}/{path.name}"
        picture = _open(path)
        if picture is None:
            page.add(f"<p>{_text(name)}: cannot be read, left out.</p>")
            continue
        words = (
            "worst, median and best test image by Dice" if _EXTREMES in path.stem else "test set"
        )
        page.add(_Picture(f"Run {run.name}: {words} ({name})", words, picture, False))


def _open(path: Path) -> Image.Image | None:
    """A picture; None if it is absent or cannot be read."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _encode(picture: Image.Image, room: int, drawn: bool) -> str | None:
    """A data URI of at most ``room`` characters, the largest and best that fits; None if none."""
    for width, quality in ((1600, 80), (1600, 65), (1200, 65), (900, 60), (600, 50), (400, 40)):
        small = picture
        if picture.width > width:
            size = (width, max(1, round(picture.height * width / picture.width)))
            small = picture.resize(size, Image.Resampling.LANCZOS)
        if max(small.size) > 65_000:  # JPEG knows no larger ones
            continue
        file = io.BytesIO()
        if drawn:
            small.save(file, format="PNG", optimize=True)
        else:
            # Colours in full resolution: thin coloured particles would fade otherwise.
            # Not optimize: it wants the file in one buffer, which pictures full of noise overflow.
            small.save(file, format="JPEG", quality=quality, subsampling=0)
        kind = "png" if drawn else "jpeg"
        uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(uri) <= room:
            return uri
    return None


# --- measurements ---------------------------------------------------------------------------------


def _measurements(page: _Page, folder: Path, runs: Sequence[Path]) -> None:
    places = [folder, *(p for run in runs for p in (run, *sorted(run.glob("*/"))))]
    places += [p for p in sorted(folder.glob("*/")) if p not in places]
    found = [p for p in places if (p / "measurements.csv").is_file()]
    if found:
        page.add('<h2 id="measurements">Measurements</h2>')
    room = _TABLE_BYTES
    for place in found:
        name = place.relative_to(folder).as_posix()
        parts = [f"<h3>{_text(name)}</h3>"]
        summary = place / "summary.md"
        with suppress(OSError):
            if summary.is_file():
                parts += _markdown(summary.read_text(encoding="utf-8", errors="replace"))
        parts.append(_csv_table(place / "measurements.csv"))
        size = sum(len(part.encode("utf-8", "backslashreplace")) for part in parts)
        if size > room:
            parts = [parts[0], f"<p>Too much for this page: see {_text(name)}.</p>"]
        else:
            room -= size
        page.add(*parts)
        sheet = _open(place / "sheet.png")
        if sheet is not None:
            page.add(
                _Picture(f"{name}: some of its images", "images and predictions", sheet, False)
            )


def _markdown(text: str) -> Iterator[str]:
    """The headings, lists and tables of a ``summary.md``."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if not lines or lines[0].startswith("# "):
            continue
        if lines[0].startswith("#"):
            yield f"<h4>{_text(_units(lines.pop(0).lstrip('# ')))}</h4>"
        if len(lines) > 1 and all(line.startswith("|") for line in lines):
            head, _, *rows = [_cells(line) for line in lines]
            yield _table([_units(name) for name in head], rows)
        elif lines and all(line.startswith("- ") for line in lines):
            yield "<ul>" + "".join(f"<li>{_text(line[2:])}</li>" for line in lines) + "</ul>"
        elif lines:
            yield f"<p>{_text(' '.join(lines))}</p>"


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _csv_table(path: Path) -> str:
    """The first rows of a ``measurements.csv``, and its columns that say most."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            head, *rows = list(csv.reader(file)) or [[]]
    except (OSError, csv.Error) as error:
        return f"<p>{_text(path.name)}: cannot be read ({_text(str(error))}).</p>"
    if not rows:
        return f"<p>{_text(path.name)}: holds no measurements.</p>"
    known = [i for i, name in enumerate(head) if name.startswith(_COLUMNS)]
    chosen = known or list(range(min(12, len(head))))
    shown = [[_short(row[i]) if i < len(row) else "" for i in chosen] for row in rows[:CSV_ROWS]]
    count = f"the first {CSV_ROWS} of {len(rows)}" if len(rows) > CSV_ROWS else f"all {len(rows)}"
    caption = f"By image and class, {count} lines; all columns: {path.parent.name}/{path.name}"
    return _table([_units(head[i].replace("_", " ")) for i in chosen], shown, caption=caption)


def _units(text: str) -> str:
    """Micrometres and squares as they are printed."""
    text = re.sub(r"\bum(2?)\b", "µm\\1", text)
    return re.sub(r"\b([µm]m)2\b", "\\1²", text)


def _short(text: str) -> str:
    """Four digits of a number that has more."""
    if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text):
        value = float(text)
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text


# --- settings -------------------------------------------------------------------------------------


@dataclass
class _Head:
    """The head of a text log: sentences, settings that were changed, all others, versions."""

    sentences: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    versions: str = ""


def _read_head(path: Path) -> _Head:
    head = _Head()
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            line = line.rstrip("\n")
            setting = re.fullmatch(r"(\w+) = (.*)", line)
            if line.startswith(("Epoch: ", "From epoch ")):
                break
            if setting:
                head.changed[setting[1]] = setting[2]
            elif line.startswith("defaults: "):
                pairs = re.split(r", (?=\w+=)", line.removeprefix("defaults: "))
                head.defaults = {n: v for n, _, v in (pair.partition("=") for pair in pairs)}
            elif line.startswith("program "):
                head.versions = line
            elif line:
                head.sentences.append(line)
    return head


def _settings(page: _Page, runs: Sequence[Path]) -> None:
    page.add('<h2 id="settings">Settings</h2>')
    heads = {(r.name, s): _read_head(r / f"log_{s}.txt") for r in runs for s in _stages_of(r)}
    for stage in dict.fromkeys(s for _, s in heads):
        run, head = next((r, h) for (r, s), h in heads.items() if s == stage)
        sentences = "".join(f"<li>{_text(s)}</li>" for s in head.sentences)
        page.add(f"<h3>{STAGES[stage]}, run {_text(run)}</h3><ul>{sentences}</ul>")
        if head.versions:
            page.add(f'<p class="faint">Computed with {_text(head.versions)}.</p>')
    first = next(iter(heads.values()))
    if first.changed:
        page.add("<h3>Changed from their defaults</h3>", _setting_list(first.changed))
    if first.defaults:
        page.add("<h3>At their defaults</h3>", _setting_list(first.defaults))
    usual = {**first.defaults, **first.changed}
    for (run, stage), head in heads.items():
        own = {**head.defaults, **head.changed}
        other = {n: v for n, v in own.items() if usual.get(n) != v and n not in _NO_MATTER}
        if other:
            name = f"{STAGES[stage]} of run {_text(run)}"
            page.add(f"<h4>Other settings in {name}</h4>", _setting_list(other))


def _setting_list(settings: Mapping[str, str]) -> str:
    items = (f"<li>{_text(n)} = <code>{_text(v)}</code></li>" for n, v in settings.items())
    return f'<ul class="settings">{"".join(items)}</ul>'


# --- the page -------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """Text for HTML; signs that HTML forbids become question marks."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "?", text))


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    last: Sequence[str] = (),
) -> str:
    words = {i for row in rows for i, cell in enumerate(row) if re.search("[^\\W\\d]{2}", cell)}

    def line(cells: Iterable[str], tag: str) -> str:
        left = (' class="w"' if i in words else "" for i in range(len(head)))
        pairs = zip(left, cells, strict=False)
        return "".join(f"<{tag}{how}>{_text(cell)}</{tag}>" for how, cell in pairs)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    if last:
        body += f'<tr class="mean">{line(last, "td")}</tr>'
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html(name: str, page: _Page) -> str:
    """Join the parts; pictures share what the text leaves of ``MAX_BYTES``, small ones first."""
    links = [
        f'<a href="#{key}">{words}</a>'
        for part in page.parts
        if isinstance(part, str)
        for key, words in re.findall(r'<h2 id="(\w+)">([^<]*)</h2>', part)
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)}: report</title><style>{_CSS}</style></head><body>\n"
        f"<h1>{_text(name)}</h1>\n<nav>{' '.join(links)}</nav>\n"
    )
    text = sum(len(p.encode("utf-8", "replace")) for p in page.parts if isinstance(p, str))
    room = MAX_BYTES - len(head) - text - 1000 * len(page.parts)
    pictures = [p for p in page.parts if isinstance(p, _Picture)]
    drawn: dict[int, str] = {}
    for left, part in zip(
        range(len(pictures), 0, -1), sorted(pictures, key=lambda p: not p.drawn), strict=True
    ):
        uri = _encode(part.picture, min(room // left, _PICTURE_BYTES), part.drawn)
        room -= len(uri or "")
        drawn[id(part)] = _figure(part, uri)
    parts = (part if isinstance(part, str) else drawn[id(part)] for part in page.parts)
    return head + "\n".join(parts) + "\n</body></html>\n"


def _figure(part: _Picture, uri: str | None) -> str:
    if uri is None:
        return f"<p>{_text(part.title)}: left out, the page would be too large.</p>"
    width, height = part.picture.size
    image = f'<img src="{uri}" alt="{_text(part.alt)}" width="{width}" height="{height}">'
    return f"<figure><figcaption>{_text(part.title)}</figcaption>{image}</figure>"
