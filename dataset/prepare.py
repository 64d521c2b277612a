"""Lay out images and masks as the program reads them, or look at a set that is laid out.

    python dataset/prepare.py --images raw/img --masks raw/gt --out dataset/my_set --test 0.3
    python dataset/prepare.py --check dataset/my_set

The set is written beside its place and then renamed, so it is there in full or not at all.
dataset/README.md shows the layout and examples.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from data import LAYOUT  # noqa: E402
from dataset.mask_values import IGNORED, KINDS, parse_ignored, parse_palette  # noqa: E402
from dataset.set_check import check_set, share_text  # noqa: E402
from dataset.set_plan import (  # noqa: E402
    SPLITS,
    Plan,
    Settings,
    Source,
    Tile,
    make_plan,
    read_cropped,
    read_ids,
    window,
)
from utils.commandline import (  # noqa: E402
    INTERRUPTED,
    TERMINATED,
    Parser,
    Termination,
    termination_as_interrupt,
)
from utils.imagefile import DataError, Pixels  # noqa: E402

REPORT, SOURCES = "prepare_report.txt", "prepare_sources.csv"


def prepare(settings: Settings) -> list[str]:
    """Make the set, unless it is a dry run, and return the lines of the report.

    Raises:
        DataError: all problems found, one line each.
    """
    _check_folders(settings)
    plan = make_plan(settings)
    lines = report_lines(settings, plan)
    if not settings.dry_run:
        _write_set(settings, plan, lines)
    return lines


def _check_folders(settings: Settings) -> None:
    problems = [
        f"{folder}: no such folder; correct {option}"
        for option, folder in (("--images", settings.images), ("--masks", settings.masks))
        if not os.path.isdir(folder)
    ]
    out = settings.out
    inputs = [settings.images.resolve(), settings.masks.resolve()]
    if any(out.resolve() in (folder, *folder.parents) for folder in inputs):
        problems.append(f"{out}: holds the images or masks to be read; give another --out")
    elif out.exists() and not settings.overwrite:
        problems.append(f"{out}: is there already; give another --out, or --overwrite")
    elif out.exists() and not (out / REPORT).is_file():
        problems.append(f"{out}: has no {REPORT}, so it was not made here; remove it yourself")
    if problems:
        raise DataError("\n".join(problems))


# ---------------------------------------------------------------- writing


def _write_set(settings: Settings, plan: Plan, lines: list[str]) -> None:
    """Write to a folder beside ``out`` and rename it; nothing is left behind by a failure."""
    out = settings.out
    temporary = old = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        temporary.chmod(0o755)  # mkdtemp's folders are private
        _write_tiles(settings, plan, temporary)
        for name, text in ((REPORT, "\n".join(lines) + "\n"), (SOURCES, _sources_table(plan))):
            # A file name that is no valid text holds surrogates, which UTF-8 cannot write.
            (temporary / name).write_bytes(text.encode("utf-8", "backslashreplace"))
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, old / out.name)
        os.replace(temporary, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{out}: cannot be written ({reason}); free space or change --out"
        ) from None
    finally:
        if old is not None and (old / out.name).exists() and not out.exists():
            os.replace(old / out.name, out)  # stopped between the two renames
        for folder in (temporary, old):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _write_tiles(settings: Settings, plan: Plan, root: Path) -> None:
    """Write each source's tiles to all splits they are in, so that a source is read once."""
    places: defaultdict[Source, list[tuple[str, Tile]]] = defaultdict(list)
    for split, tiles in plan.splits.items():
        for tile in tiles:
            places[tile.source].append((split, tile))
    for source, own in places.items():
        image = read_cropped(plan, source)
        ids = read_ids(settings, plan, source) if source.mask else None
        for split, tile in own:
            _write(root / split / "img", tile.name, window(settings, tile, image))
            if ids is not None and split != SPLITS["unlabelled"]:
                _write(root / split / "gt", tile.name, window(settings, tile, ids))


def _write(folder: Path, name: str, pixels: Pixels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels  # OpenCV writes BGR
    encoded = cv2.imencode(".png", np.ascontiguousarray(stored))[1]
    (folder / f"{name}.png").write_bytes(encoded.tobytes())


def _sources_table(plan: Plan) -> str:
    """Where each image of the set comes from, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = "name split file page top left batch sample specimen"
    writer.writerow(header.split())
    for split in SPLITS.values():
        for tile in plan.splits.get(split, []):
            rows, columns = plan.boxes[tile.source][0]
            source = tile.source
            place = source.page, rows.start + tile.top, columns.start + tile.left
            row = (f"{tile.name}.png", split, source.image.name, *place)
            writer.writerow((*row, source.batch, source.sample, source.specimen))
    return text.getvalue()


# ---------------------------------------------------------------- report


def report_lines(settings: Settings, plan: Plan) -> list[str]:
    """The report: what was made of what, and what to know about it."""
    out = settings.out
    state = "dry run, nothing written" if settings.dry_run else "written"
    lines = [f"{out}: {plan.num_classes} classes, seed {settings.seed} ({state})", ""]
    lines += ["masks: " + plan.rule.lines()[0], "       " + plan.rule.lines()[1]]
    if any(settings.crop):
        lines.append("cropped: {} top, {} bottom, {} left, {} right".format(*settings.crop))
    if settings.tile:
        lines.append(f"tiles: {settings.tile}x{settings.tile}, overlap {settings.overlap} or more")
    lines += [*plan.notes, "", f"{'split':17}images specimens batches  share of class 0, 1, ..."]
    for split in sorted(plan.splits, key=lambda s: (s.startswith("sup"), s)):
        tiles = plan.splits[split]
        specimens = {t.source.specimen for t in tiles}
        batches = {t.source.batch for t in tiles if t.source.batch}
        shares = ""
        if split != SPLITS["unlabelled"]:
            shares = share_text(np.array([t.counts for t in tiles]).sum(0))
        row = f"{split:17}{len(tiles):6}{len(specimens):10}{len(batches):8}  {shares}"
        lines.append(row.rstrip())
    lines += ["", *_missing_classes(plan)]
    if plan.ignored and settings.ignored_as == IGNORED:
        plan.warnings.append(
            f"{plan.ignored} pixels without a label are written as {IGNORED}: train with "
            f"--ignore_label {IGNORED}, or write them as a class with --ignored-as CLASS"
        )
    elif plan.rule.ids.tolist().count(IGNORED) and settings.ignored_as != IGNORED:
        lines.append(f"pixels without a label are written as class {settings.ignored_as}")
    plan.warnings += _doubts(settings, plan)
    single = [t[0].source.specimen for s, t in plan.splits.items() if s.startswith("sup_num1_")]
    if len(set(single)) < len(single):
        plan.warnings.append(
            f"sup_num1_*: {len(single)} images of {len(set(single))} specimen(s): repeats with "
            "images of one specimen are not independent"
        )
    if not any(t.source.batch for t in plan.splits[SPLITS["train"]]):
        plan.warnings.append("no production batch is known; PSCL-MoCo needs --batch-from")
    lines += [f"warning: {line}" for line in plan.warnings]
    return lines


def _doubts(settings: Settings, plan: Plan) -> list[str]:
    """Warnings of sizes that differ, and of a class 0 that may not be the background."""
    doubts = []
    sizes = {tuple(part.stop - part.start for part in box) for box, _ in plan.boxes.values()}
    if len(sizes) > 1 and not settings.tile:
        doubts.append(f"{len(sizes)} image sizes; train with --image_size N, or give --tile here")
    shares = np.array([t.counts for t in plan.splits[SPLITS["train"]]]).sum(0)
    if "numbered" in plan.rule.note and shares[0] < shares.max():
        doubts.append(
            f"class 0 (background, left out of the mean Dice) is not the largest class, "
            f"{shares.argmax()} is; give --palette for another order"
        )
    return doubts


def _missing_classes(plan: Plan) -> list[str]:
    """Which classes training, test and the annotated images do not show."""
    lines = []
    everywhere = set(range(plan.num_classes))
    for split in sorted(s for s in plan.splits if s != SPLITS["unlabelled"]):
        shown = np.flatnonzero(np.array([t.counts for t in plan.splits[split]]).sum(0)).tolist()
        absent = sorted(everywhere - set(shown))
        if absent:
            lines.append(f"{split}: class {', '.join(map(str, absent))} does not occur")
    return lines or ["every class occurs in every split"]


# ---------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    epilog = f"The layout:\n{LAYOUT}"
    parser = Parser("prepare.py", description=__doc__, epilog=epilog, formatter_class=raw)
    add = parser.add_argument
    add("--check", type=Path, metavar="DIR", help="look at a set that is laid out")
    add("--sheet", type=Path, help="with --check: contact sheet, default <DIR>_check.png here")
    add("--near", type=float, default=0.9, help="with --check: correlation of near copies (0.9)")
    add("--num_classes", type=int, default=0, help="number of classes; default: highest id + 1")
    add("--images", type=Path, help="folder of the images")
    add("--masks", type=Path, help="folder of the masks; may be the same folder")
    add("--out", type=Path, help="folder of the set to make")
    add("--mask-pattern", default="", help='mask name, such as "{stem}_mask.png"; default: stem')
    add("--mask-kind", choices=KINDS, default="auto", help="what mask values are; default: auto")
    add("--palette", default="", help='"0=0,0,0 1=255,0,0 ignore=255,255,255", or "0=0 1=128"')
    add("--ignore", default="", help='mask values without a label: "255"; -1 always is one')
    add("--ignored-as", type=int, default=IGNORED, help="value written for them (255)")
    add("--tolerance", type=int, default=0, help="mask values so near (per channel) are one (0)")
    add("--page", default="", help="page of TIFFs of several pages, counted from 1, or each")
    add("--crop", default="0,0,0,0", help="pixels cut off: top,bottom,left,right")
    add("--trim", type=int, default=0, help="cut image or mask if it is this much larger (0)")
    add("--tile", type=int, default=0, help="side of square tiles in pixels; default: whole images")
    add("--overlap", type=int, default=0, help="least overlap of tiles in pixels (0)")
    add("--batch-from", default="", help="regular expression with a group (batch), a second one"
        " (sample), or named ones (batch, sample, specimen), on the file name; or a CSV file with"
        " the columns file,batch[,sample][,specimen][,split]")  # fmt: skip
    add("--test", type=float, default=0.3, help="share of the images for testing (0.3)")
    add("--seed", type=int, default=0, help="seed of the draws (0)")
    add("--dry-run", action="store_true", help="print the report, write nothing")
    add("--overwrite", action="store_true", help="replace a set that was made here")
    return parser


def read_settings(given: argparse.Namespace) -> Settings:
    """Settings from the command line.

    Raises:
        DataError: all options that are wrong, one line each.
    """
    problems: list[str] = []

    def read(parse, default):  # type: ignore[no-untyped-def]
        try:
            return parse()
        except DataError as error:
            problems.append(str(error))
            return default

    for option in ("images", "masks", "out"):
        if getattr(given, option) is None:
            problems.append(f"--{option}: not given; --images, --masks and --out are needed")
    checks = (
        (0 <= given.test < 1, f"--test {given.test}: give a share of 0 or more, below 1"),
        (given.tile >= 0, f"--tile {given.tile}: give a side in pixels"),
        (not 0 < given.tile < 16, f"--tile {given.tile}: give 16 pixels or more"),
        (
            0 <= given.overlap < max(given.tile, 1),
            f"--overlap {given.overlap}: give 0 or more, less than --tile {given.tile}",
        ),
        (given.tolerance >= 0, f"--tolerance {given.tolerance}: give 0 or more"),
        (given.trim >= 0, f"--trim {given.trim}: give 0 or more"),
        (given.seed >= 0, f"--seed {given.seed}: give 0 or more"),
        (0 <= given.num_classes <= 255, f"--num_classes {given.num_classes}: give 1 to 255"),
        (0 <= given.ignored_as <= 255, f"--ignored-as {given.ignored_as}: give 0 to 255"),
        (
            not given.mask_pattern or "{stem}" in given.mask_pattern,
            f"--mask-pattern {given.mask_pattern!r}: write {{stem}} for the image's name",
        ),
        (
            given.page in ("", "each") or given.page.isdecimal() and int(given.page) > 0,
            f"--page {given.page!r}: give a number from 1, or each",
        ),
    )
    problems += [line for good, line in checks if not good]
    crop = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", given.crop.replace(" ", ""))
    if crop is None:
        problems.append(f"--crop {given.crop!r}: give four numbers top,bottom,left,right")
    palette = read(lambda: parse_palette(given.palette) if given.palette else (), ())
    ignored = read(lambda: parse_ignored(given.ignore), ())
    pattern, table = read(lambda: _batch_from(given.batch_from), (None, None))
    if problems or crop is None:
        raise DataError("\n".join(problems))
    top, bottom, left, right = (int(n) for n in crop.groups())
    return Settings(
        palette=palette,
        ignored=ignored,
        page=-1 if given.page == "each" else int(given.page or 0),
        crop=(top, bottom, left, right),
        pattern=pattern,
        table=table,
        **{k: v for k, v in vars(given).items() if k not in _SPECIAL},
    )


_SPECIAL = {"palette", "ignore", "page", "crop", "batch_from", "check", "sheet", "near"}


def _batch_from(text: str) -> tuple[re.Pattern[str] | None, dict[str, dict[str, str]] | None]:
    """A regular expression, or the rows of a CSV file by file name."""
    if not text:
        return None, None
    if text.lower().endswith(".csv"):
        return None, _read_table(Path(text))
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise DataError(f"--batch-from {text!r}: {error}; correct the expression") from None
    if not pattern.groups or (pattern.groupindex and "batch" not in pattern.groupindex):
        raise DataError(rf"--batch-from {text!r}: no group; put ( ) around the batch: (\d+)min")
    return pattern, None


def _read_table(path: Path) -> dict[str, dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); correct --batch-from") from None
    delimiter = ";" if lines and ";" in lines[0] and "," not in lines[0] else ","
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        found = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = found
        rows = list(enumerate(reader, start=2))
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); correct --batch-from") from None
    if not {"file", "batch"} <= set(found):
        shown = ",".join(found)
        raise DataError(f"{path}: columns {shown}; the first line names them: file,batch,...")
    table: dict[str, dict[str, str]] = {}
    problems = []
    for number, row in rows:
        values = {k: (v or "").strip() for k, v in row.items() if k and not isinstance(v, list)}
        name = values["file"] = unicodedata.normalize("NFC", values["file"])
        if values.get("split", "") not in ("", *SPLITS):
            wrong = f"{path}: line {number}: split {values['split']!r}"
            problems.append(f"{wrong}; give {', '.join(SPLITS)} or none")
        if name in table:
            problems.append(f"{path}: line {number}: {name} a second time; remove one")
        table[name] = values
    if problems:
        raise DataError("\n".join(problems))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = _parser().parse_args(argv)
    try:
        with termination_as_interrupt():
            if given.check is not None:
                return _check(given)
            _show(prepare(read_settings(given)), sys.stdout)
    except DataError as error:
        _show([str(error)], sys.stderr)
        return 2
    except MemoryError:
        _show(["Out of memory: make the images smaller, or close other programs"], sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        _show(["Interrupted; no set was made or changed."], sys.stderr)
        return TERMINATED if isinstance(stop, Termination) else INTERRUPTED
    return 0


def _check(given: argparse.Namespace) -> int:
    """``--check``; returns the exit code."""
    wrong = []
    if not 0 <= given.num_classes <= 255:
        wrong.append(f"--num_classes {given.num_classes}: give 1 to 255")
    if not 0 < given.near <= 1:
        wrong.append(f"--near {given.near}: give a correlation above 0, at most 1")
    if wrong:
        raise DataError("\n".join(wrong))
    sheet = given.sheet or Path(f"{given.check.resolve().name}_check.png")
    lines, problems = check_set(
        given.check, num_classes=given.num_classes, sheet=sheet, near=given.near
    )
    _show(lines, sys.stdout)
    _show(problems, sys.stderr)
    return 2 if problems else 0


def _show(lines: Sequence[str], stream: TextIO) -> None:
    """Print lines; what the terminal's encoding lacks is escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


if __name__ == "__main__":
    sys.exit(main())
