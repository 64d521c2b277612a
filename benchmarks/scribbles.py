"""Make scribbles out of whole masks: as if somebody had labelled a few per cent of the pixels.

    python benchmarks/scribbles.py --data_dir dataset/my_set --out dataset/scribbled --share 0.05

The annotated images (``sup_*``) get masks in which only strokes are labelled and all else is 255
(train with ``--ignore_label 255``, or ``set.json``, where there is one, says it); all other splits
are copied as they are. The next stroke begins in the class with the fewest labels. Half of the
strokes stay within the class in which they begin, as a careful hand would draw them; the other half
run on across boundaries, and each pixel has its true class.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import cv2
import numpy as np

from config import ConfigError
from data import find_split
from dataset.set_file import read_set_file
from imaging.drawing import write_png
from imaging.imagefile import Pixels, read_mask
from utils.commandline import Parser, exit_code
from utils.files import replacing_folder
from utils.log import to_terminal
from utils.metrics import IGNORED

LENGTH = 60  # of a stroke, in pixels
STEP = 6  # pixels after which a stroke turns a little
MOST_STROKES = 20_000


def scribble(mask: Pixels, share: float, width: int, rng: np.random.Generator) -> Pixels:
    """Keep the labels (H, W) under random strokes, ``share`` of the pixels; the others are 255."""
    kept = np.full_like(mask, IGNORED)
    classes = [c for c in np.unique(mask).tolist() if c != IGNORED]
    places = {c: np.argwhere(mask == c) for c in classes}
    goal = round(share * mask.size)
    for number in range(MOST_STROKES):
        counts = {c: int((kept == c).sum()) for c in classes}
        left = [c for c in classes if counts[c] < len(places[c])]
        missing = goal - sum(counts.values())
        if missing <= 0 or not left:
            break
        start = min(left, key=lambda c: counts[c])  # the class with the fewest labels
        stroke = _stroke(mask.shape[:2], places[start], width, rng)
        drawn = stroke & (kept == IGNORED) & (mask != IGNORED)
        if number % 2 == 0:
            drawn &= mask == start
        # Short enough that every class gets some of the pixels.
        most = max(1, goal // (2 * len(classes)))
        at = np.flatnonzero(drawn)[: min(missing, most)]
        kept.flat[at] = mask.flat[at]
    return kept


def _stroke(
    size: tuple[int, ...], places: np.ndarray, width: int, rng: np.random.Generator
) -> np.ndarray:
    """The pixels under a bent line, true in (H, W), from one of the places (N, 2: row, column)."""
    row, column = places[rng.integers(len(places))].astype(float)
    line, angle = [(column, row)], rng.uniform(0, 2 * np.pi)
    for _ in range(LENGTH // STEP):
        angle += rng.normal(0, 0.35)
        column, row = column + STEP * np.cos(angle), row + STEP * np.sin(angle)
        line.append((column, row))
    canvas = np.zeros(size, np.uint8)
    cv2.polylines(canvas, [np.rint(line).astype(np.int32)], False, 1, width)
    return canvas > 0


def make_scribbles(data_dir: Path, out: Path, share: float, width: int, seed: int) -> list[str]:
    """Write the set; a line for each scribbled mask. Raises UserError."""
    lines = []
    known = read_set_file(data_dir)
    with replacing_folder(out) as root:
        if known:
            label = IGNORED if known.ignore_label is None else known.ignore_label
            dataclasses.replace(known, ignore_label=label).write(root)
        for folder in sorted(path for path in data_dir.iterdir() if path.is_dir()):
            shutil.copytree(folder, root / folder.name, dirs_exist_ok=True)
            if not folder.name.startswith("sup_"):
                continue
            for sample in find_split(data_dir, folder.name):
                if sample.mask is None:
                    continue
                rng = np.random.default_rng([seed, *sample.name.encode()])
                kept = scribble(read_mask(sample.mask), share, width, rng)
                write_png(root / folder.name / "gt" / sample.mask.name, kept)
                counts = np.bincount(kept.ravel(), minlength=256)[:IGNORED]
                text = ", ".join(f"class {c}: {n}" for c, n in enumerate(counts) if n)
                labelled = counts.sum() / kept.size
                lines.append(f"{folder.name}/{sample.mask.name}: {labelled:.1%} labelled; {text}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser("scribbles.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="a set with whole masks")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set to make")
    parser.add_argument(
        "--share", type=float, default=0.05, help="share of the pixels to label (%(default)s)"
    )
    parser.add_argument("--width", type=int, default=3, help="pixels across a stroke (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the strokes (%(default)s)")
    options = parser.parse_args(argv)

    def work() -> None:
        if not options.data_dir.is_dir() or options.out.exists():
            raise ConfigError("--data_dir must be a folder, and --out not be there yet")
        if not 0 < options.share < 1 or options.width < 1:
            raise ConfigError("--share is above 0 and below 1, --width 1 or more")
        given = options.data_dir, options.out, options.share, options.width, options.seed
        to_terminal("\n".join(make_scribbles(*given)))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
