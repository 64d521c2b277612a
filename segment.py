"""From a folder of images and one mask to class maps, measurements and a report, in one command.

``python segment.py --images FOLDER --masks FILE_OR_FOLDER``; all options: ``-h``. The first answer
is there within a minute. To correct it, change class maps in OUT/classes or give more masks, and
give the same command again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from config import PRESETS
from segmentation.job import run
from segmentation.request import PRETRAIN, Request
from utils.commandline import Parser, exit_code

AGAIN = "The same command goes on and ends with the same result"
READING = ("mask-pattern", "mask-kind", "palette", "ignore", "tolerance", "crop")


def parser() -> argparse.ArgumentParser:
    """The options; what cannot be read ends the program with one line and exit code 2."""
    made = Parser(prog="segment.py", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--images", required=True, type=Path, help="folder of the images, with sub-folders")
    add("--masks", required=True, type=Path, nargs="+", metavar="FILE_OR_FOLDER",
        help="the mask of one image or of several, named as their images; later ones win")  # fmt: skip
    add("--out", type=Path, help="folder of the results; default: segmented_<images>, here")
    add("--minutes", type=float, default=20.0, help="most time that it may take (%(default)g)")
    add("--preset", default="auto", choices=tuple(PRESETS), help="settings of the network: auto "
        "looks at the images first (default), robust, or paper")  # fmt: skip
    add("--pretrain", default="auto", choices=PRETRAIN, help="pretraining by PSCL: auto, where it "
        "pays within the time (default), always or never")  # fmt: skip
    add("--class_names", type=_names, default=(), metavar="NAME,...", help="names of the classes")
    add("--um_per_px", type=float, help="micrometres per pixel; default: all lengths in pixels")
    for name in READING:
        add(f"--{name}", default="", help=f"how masks are read: see dataset/prepare.py, --{name}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=int, default=0, help="CPU threads; 0: as many as PyTorch chooses")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return made


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def request_of(options: argparse.Namespace) -> Request:
    """The job that the options ask for; ConfigError."""
    given = {name: getattr(options, name.replace("-", "_")) for name in READING}
    default = Path(f"segmented_{options.images.resolve().name or 'images'}")
    return Request(
        images=options.images,
        masks=tuple(options.masks),
        out=options.out or default,
        minutes=options.minutes,
        preset=options.preset,
        pretrain=options.pretrain,
        class_names=options.class_names,
        um_per_px=options.um_per_px,
        reading=tuple(f"--{name}={value}" for name, value in given.items() if value),
        device=options.device,
        threads=options.threads,
        seed=options.seed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2, 130 or 143."""
    options = parser().parse_args(argv)

    def work() -> None:
        run(request_of(options))

    return exit_code(work, AGAIN, "smaller images, or --preset paper")


if __name__ == "__main__":
    sys.exit(main())
