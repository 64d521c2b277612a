"""What a data bar that nobody cut does to area fractions, on real fields.

``PSCL_DATA=data python benchmarks/data_bar.py superalloy --weights model.pt --out bars``. A white,
a black and a gray bar with text and a scale line are put below test images of a set. Each copy is
predicted with the bar, with ``--crop``, and there are the fields without a bar. Printed are the
area fractions, how far they moved, and for how many files the bar was warned about.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import cv2
import numpy as np

import predict
from imaging.drawing import write_png
from imaging.imagefile import Pixels, read_image
from utils.commandline import Parser, UserError, exit_code
from utils.files import IMAGE_SUFFIXES, list_files
from utils.tables import markdown

DESCRIPTION = "What a data bar that nobody cut does to area fractions, on real fields."
PAPERS = {"white": (255, 0), "black": (0, 255), "gray": (128, 255)}  # gray levels: paper, print
SHARE, LEAST = 0.08, 24  # of the image's height, and pixels: the height of a bar
WARNING = re.compile(r"(\d+) image\(s\) with a data bar")
TEXT = "HV 20.00 kV  WD 10.1 mm"


class Answer(NamedTuple):
    """What one prediction said: area fraction of each class in percent, files warned about."""

    shares: list[float]
    warned: int


def with_bar(image: Pixels, paper: int, ink: int) -> tuple[Pixels, int]:
    """The image (H, W) or (H, W, 3) with a bar below it, and the height of that in pixels."""
    height, width = max(LEAST, round(SHARE * len(image))), image.shape[1]
    bar = np.full((height, width), paper, np.uint8)
    scale, middle = height / 60, height // 2
    cv2.putText(
        bar, TEXT, (width // 40, middle + height // 8), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1,
        cv2.LINE_AA,
    )  # fmt: skip
    left, right = width - width // 4, width - width // 20
    cv2.line(bar, (left, middle), (right, middle), ink, 2)
    for end in (left, right):
        cv2.line(bar, (end, middle - height // 6), (end, middle + height // 6), ink, 2)
    shown = bar if image.ndim == 2 else np.repeat(bar[..., None], 3, axis=2)
    return np.vstack([image, shown]), height


def lay_out(files: Sequence[Path], folder: Path, kind: str = "") -> int:
    """Write the images, with a bar of this kind, as PNG; returns its largest height in pixels.

    Fields of an earlier call are removed.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for old in (folder / "images").glob("field[0-9][0-9].png"):  # of more images, before
        old.unlink()
    heights = {0}
    for number, path in enumerate(files):
        image, height = read_image(path), 0
        if kind:
            image, height = with_bar(image, *PAPERS[kind])
        heights.add(height)
        write_png(folder / "images" / f"field{number:02d}.png", image)
    if len(heights) > 2:
        raise UserError("the images differ in height, so one --crop does not fit all")
    return max(heights)


def answer(folder: Path, name: str, weights: str, words: Sequence[str] = ()) -> Answer:
    """Predict the images of a folder; UserError if that fails."""
    out = folder / name
    given = ["--weights", weights, "--images", str(folder / "images"), "--out", str(out)]
    if code := predict.main([*given, "--overwrite", *words]):
        raise UserError(f"{out}: predict.py ended with {code}")
    with open(out / "measurements.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({int(row["class"]) for row in rows})
    own = [[float(r["area_fraction"]) for r in rows if int(r["class"]) == c] for c in classes]
    lines = (out / "summary.md").read_text(encoding="utf-8").splitlines()
    counts = [int(found[1]) for found in map(WARNING.search, lines) if found]
    return Answer([100 * float(np.mean(each)) for each in own], sum(counts))


def measure(files: Sequence[Path], weights: str, out: Path, crop: str) -> str:
    """The table of one set: a line without a bar, and two for each kind of bar."""
    lay_out(files, out / "none")
    plain = answer(out / "none", "answer", weights, [f"--crop={crop}"])
    lines = {"no bar": plain}
    top, bottom, left, right = (int(side) for side in crop.split(","))
    for kind in PAPERS:
        height = lay_out(files, out / kind, kind)
        cut = f"--crop={top},{bottom + height},{left},{right}"
        lines[f"{kind} bar, uncut"] = answer(out / kind, "uncut", weights, [f"--crop={crop}"])
        lines[f"{kind} bar, {cut.replace('=', ' ')}"] = answer(out / kind, "cut", weights, [cut])
    classes = [f"class {c}, %" for c in range(len(plain.shares))]
    rows = [
        [name, *(f"{share:.2f}" for share in found.shares), moved(plain, found),
         f"{found.warned} of {len(files)}"]
        for name, found in lines.items()
    ]  # fmt: skip
    head = ["images", *classes, "largest change, points", "bar warned about"]
    return "\n".join(markdown(head, rows))


def moved(plain: Answer, found: Answer) -> str:
    """By how many points of area the class that moved most did."""
    most = max(abs(a - b) for a, b in zip(plain.shares, found.shares, strict=True))
    return f"{most:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="data_bar.py", description=DESCRIPTION)
    parser.add_argument("set", help="name of a folder in PSCL_DATA")
    parser.add_argument("--weights", required=True, help="weights of a trained network")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--images", type=int, default=5, help="how many test images (5)")
    parser.add_argument("--crop", default="0,0,0,0", help="crop of the set itself (%(default)s)")
    given = parser.parse_args(argv)

    def work() -> None:
        if "PSCL_DATA" not in os.environ:
            raise UserError("PSCL_DATA: not set; set it to the folder of the real sets")
        folder = Path(os.environ["PSCL_DATA"], given.set, "test_numf", "img")
        files = list_files(folder, IMAGE_SUFFIXES)[: given.images]
        if not files:
            raise UserError(f"{folder}: no images")
        print(measure(files, given.weights, given.out / given.set, given.crop), flush=True)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
