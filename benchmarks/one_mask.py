"""What segment.py does on real sets with one mask: the truth is for judging alone.

``PSCL_DATA=data python benchmarks/one_mask.py superalloy --out one_mask --minutes 20``. Of
each set every fourth of the first 40 training images, the first 15 test images and, where there are
some, 50 unlabelled ones are copied under neutral names, with one mask; ``--scribble
0.05`` leaves strokes of it on 5 % of the pixels. Printed are the true Dice and the mIoU with
matrix, pooled over the images with a truth but without the given mask, and the mean error of the
area fractions.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import numpy as np

import segment
from benchmarks.scribbles import scribble
from imaging.drawing import write_png
from imaging.imagefile import read_mask
from segmentation.demo.judged import judge
from utils.commandline import Parser, UserError, exit_code
from utils.files import IMAGE_SUFFIXES, list_files

DESCRIPTION = "What segment.py does on real sets with one mask; the truth is for judging alone."
STROKE = 3  # width of a stroke, pixels
TRAIN, TEST, UNLABELLED = 10, 15, 50
MARKER = ".one_mask"  # in a folder that was laid out here


def lay_out(data: Path, out: Path, share: float) -> None:
    """Copy a set's images, one mask and the truth into ``images``, ``masks``, ``truth``.

    With a ``share`` only strokes of the mask are labelled (``benchmarks/scribbles.py``). ``out`` is
    replaced; ``MARKER`` in it says that it was made here.
    """
    one = list_files(data / "sup_num1_0" / "img", IMAGE_SUFFIXES)[0]
    chosen = list_files(data / "train_numf" / "img", IMAGE_SUFFIXES)[::4][:TRAIN]
    chosen += list_files(data / "test_numf" / "img", IMAGE_SUFFIXES)[:TEST]
    chosen += list_files(data / "train_unlabelled" / "img", IMAGE_SUFFIXES)[:UNLABELLED]
    chosen += [] if one.name in {path.name for path in chosen} else [one]
    shutil.rmtree(out, ignore_errors=True)
    for kind in ("images", "masks", "truth"):
        (out / kind).mkdir(parents=True)
    (out / MARKER).touch()
    for number, path in enumerate(sorted(chosen, key=lambda p: p.name)):
        stem = f"image{number:03d}"
        shutil.copyfile(path, out / "images" / f"{stem}{path.suffix}")
        mask = path.parent.parent / "gt" / f"{path.stem}.png"
        if mask.exists():
            shutil.copyfile(mask, out / "truth" / f"{stem}.png")
        if path.name == one.name:
            shutil.copyfile(mask, out / "masks" / f"{stem}.png")
            if share:
                strokes = scribble(read_mask(mask), share, STROKE, np.random.default_rng(0))
                write_png(out / "masks" / f"{stem}.png", strokes)


def own_place(data: Path, place: Path) -> Path:
    """The folder ``place`` of one set's results; UserError if it might be anybody's data."""
    inside = {place.resolve(), *place.resolve().parents}
    if data.resolve() in inside:
        raise UserError(f"--out: {place} is in the folder of the sets, {data}; give another one")
    if place.exists() and not (place / MARKER).is_file():
        what = "is there, and was not made by this benchmark"
        raise UserError(f"--out: {place} {what} (it has no {MARKER}); give another folder")
    return place


def measure(name: str, out: Path, rest: Sequence[str], correct: int, share: float) -> None:
    """One set: lay out, run, judge; then correct the worst images with the truth and run again."""
    data = Path(os.environ["PSCL_DATA"]) / name
    place = own_place(data.parent, out / name)
    if not (place / "images").is_dir():
        lay_out(data, place, share)
    given = [path.stem for path in list_files(place / "masks")]
    words = [f"--images={place / 'images'}", f"--out={place / 'out'}", *rest]
    started = time.monotonic()
    run(name, ["--masks", str(place / "masks"), *words])
    found = judge(place / "out" / "classes", place / "truth", given)
    print(f"{name}: {found.line()}, {(time.monotonic() - started) / 60:.1f} min", flush=True)
    if not correct:
        return
    worst = found.worst[:correct]
    (place / "more").mkdir(exist_ok=True)
    for stem in worst:
        shutil.copyfile(place / "truth" / f"{stem}.png", place / "more" / f"{stem}.png")
    before = judge(place / "out" / "classes", place / "truth", [*given, *worst])
    run(name, ["--masks", str(place / "masks"), str(place / "more"), *words])
    after = judge(place / "out" / "classes", place / "truth", [*given, *worst])
    print(f"{name}: before {', '.join(worst)} were corrected, on all others: {before.line()}")
    print(f"{name}: after: {after.line()}", flush=True)


def run(name: str, words: Sequence[str]) -> None:
    """``segment.py`` with these words; UserError if it fails."""
    if code := segment.main(list(words)):
        raise UserError(f"{name}: segment.py ended with {code}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; options that it does not know go to segment.py."""
    parser = Parser(prog="one_mask.py", description=DESCRIPTION)
    add = parser.add_argument
    add("sets", nargs="+", help="names of the folders in PSCL_DATA")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--correct", type=int, default=0, help="how many images to correct afterwards (0)")
    add(
        "--scribble",
        type=float,
        default=0.0,
        help="share of the mask's pixels to keep as strokes (all)",
    )
    given, rest = parser.parse_known_args(argv)

    def work() -> None:
        if "PSCL_DATA" not in os.environ:
            raise UserError("PSCL_DATA: not set; set it to the folder of the real sets")
        for name in given.sets:
            measure(name, given.out, rest, given.correct, given.scribble)

    return exit_code(work, "The same command goes on")


if __name__ == "__main__":
    sys.exit(main())
