"""What segment.py does on real sets of which only one mask is given: the truth is for judging alone.

``PSCL_DATA=data python benchmarks/one_mask.py superalloy --out /tmp/one_mask --minutes 20``. Of each
set every fourth of the first 40 training images, the first 15 test images and, where there are some,
50 unlabelled ones are copied under neutral names, with one mask. Printed are the true Dice, pooled
over the images with a truth but without the given mask, and the mean error of the area fractions.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

import segment  # noqa: E402
from imaging.imagefile import Pixels, read_mask  # noqa: E402
from utils.commandline import Parser, UserError, exit_code  # noqa: E402
from utils.files import IMAGE_SUFFIXES, list_files  # noqa: E402
from utils.metrics import SegmentationScores, dice, mean_score  # noqa: E402

TRAIN, TEST, UNLABELLED = 10, 15, 50


class Truth(NamedTuple):
    """How near an answer is to the truth."""

    dice: tuple[float, ...]  # of each class, pooled over images
    area_error: tuple[float, ...]  # mean absolute error of the area fraction, in points
    images: int
    worst: tuple[str, ...]  # names of the images, the worst first

    @property
    def mean(self) -> float:
        """Mean Dice without the background."""
        return float(mean_score(np.array(self.dice)))

    def line(self) -> str:
        """The numbers in a line."""
        classes = " ".join(f"{value:.3f}" for value in self.dice)
        areas = " ".join(f"{value:.1f}" for value in self.area_error)
        mean = np.mean(self.area_error)
        return (
            f"true Dice {self.mean:.3f} (by class {classes}), area fractions {mean:.1f} points off "
            f"(by class {areas}), {self.images} images"
        )


def lay_out(data: Path, out: Path) -> None:
    """Copy a set's images, one mask and the truth into ``images``, ``masks``, ``truth``."""
    one = list_files(data / "sup_num1_0" / "img", IMAGE_SUFFIXES)[0]
    chosen = list_files(data / "train_numf" / "img", IMAGE_SUFFIXES)[::4][:TRAIN]
    chosen += list_files(data / "test_numf" / "img", IMAGE_SUFFIXES)[:TEST]
    chosen += list_files(data / "train_unlabelled" / "img", IMAGE_SUFFIXES)[:UNLABELLED]
    chosen += [] if one.name in {path.name for path in chosen} else [one]
    shutil.rmtree(out, ignore_errors=True)
    for kind in ("images", "masks", "truth"):
        (out / kind).mkdir(parents=True)
    for number, path in enumerate(sorted(chosen, key=lambda p: p.name)):
        stem = f"image{number:03d}"
        shutil.copyfile(path, out / "images" / f"{stem}{path.suffix}")
        mask = path.parent.parent / "gt" / f"{path.stem}.png"
        if mask.exists():
            shutil.copyfile(mask, out / "truth" / f"{stem}.png")
        if path.name == one.name:
            shutil.copyfile(mask, out / "masks" / f"{stem}.png")


def judge(classes: Path, truth: Path, left_out: Sequence[str]) -> Truth:
    """Compare class maps with true masks of the same names, but for ``left_out``."""
    pairs: dict[str, tuple[Pixels, Pixels]] = {
        path.stem: (read_mask(path), read_mask(classes / path.name))
        for path in list_files(truth, (".png",))
        if path.stem not in left_out and (classes / path.name).exists()
    }
    count = 1 + max(int(mask[mask < 255].max()) for pair in pairs.values() for mask in pair)
    scores = SegmentationScores(count)
    for mask, prediction in pairs.values():
        scores.add(torch.from_numpy(prediction), torch.from_numpy(mask))
    counts = scores.counts()
    areas = counts.sum(axis=1) - counts.sum(axis=2)  # (n, C): predicted - true
    error = np.abs(areas / counts.sum(axis=(1, 2))[:, None]).mean(axis=0) * 100
    own = {name: float(mean_score(dice(c))) for name, c in zip(pairs, counts, strict=True)}
    worst = sorted(own, key=lambda name: (np.isnan(own[name]), own[name]))
    pooled = dice(counts.sum(axis=0))
    return Truth(tuple(pooled.tolist()), tuple(error.tolist()), len(pairs), tuple(worst))


def measure(name: str, out: Path, rest: Sequence[str], correct: int) -> None:
    """One set: lay out, run, judge; then correct the worst images with the truth and run again."""
    data = Path(os.environ["PSCL_DATA"]) / name
    place = out / name
    if not (place / "images").is_dir():
        lay_out(data, place)
    given = [path.stem for path in list_files(place / "masks")]
    words = [f"--images={place / 'images'}", f"--out={place / 'out'}", *rest]
    started = time.monotonic()
    code = segment.main(["--masks", str(place / "masks"), *words])
    if code:
        raise UserError(f"{name}: segment.py ended with {code}")
    found = judge(place / "out" / "classes", place / "truth", given)
    print(f"{name}: {found.line()}, {(time.monotonic() - started) / 60:.1f} min", flush=True)
    if not correct:
        return
    worst = found.worst[:correct]
    (place / "more").mkdir(exist_ok=True)
    for stem in worst:
        shutil.copyfile(place / "truth" / f"{stem}.png", place / "more" / f"{stem}.png")
    before = judge(place / "out" / "classes", place / "truth", [*given, *worst])
    segment.main(["--masks", str(place / "masks"), str(place / "more"), *words])
    after = judge(place / "out" / "classes", place / "truth", [*given, *worst])
    print(f"{name}: before {', '.join(worst)} were corrected, on all others: {before.line()}")
    print(f"{name}: after: {after.line()}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; options that it does not know go to segment.py."""
    parser = Parser(prog="one_mask.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="+", help="names of the folders in PSCL_DATA")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--correct", type=int, default=0, help="images to correct afterwards (0)")
    given, rest = parser.parse_known_args(argv)

    def work() -> None:
        if "PSCL_DATA" not in os.environ:
            raise UserError("PSCL_DATA: not set; set it to the folder of the real sets")
        for name in given.sets:
            measure(name, given.out, rest, given.correct)

    return exit_code(work, "The same command goes on")


if __name__ == "__main__":
    sys.exit(main())
