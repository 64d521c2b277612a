"""From a folder of images and one mask to class maps, measurements and a report, in one command.

``python segment.py --images FOLDER --masks FILE_OR_FOLDER``; all options: ``-h``. To correct the
answer, change class maps in OUT/classes or give more masks, and give the same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

from annotation.outlines import SUFFIX
from config import ConfigError
from dataset.check import Problems
from dataset.mask_values import KINDS, reading_of
from imaging.listing import names_of
from metallography.particles import MINIMUM_PX
from presets import PRESETS
from segmentation.answers import TABLES
from segmentation.demo import judged as demo
from segmentation.demo.micrographs import DEFAULT_FOLDER
from segmentation.job import run
from segmentation.request import PRETRAIN, Request
from utils.commandline import Parser, exit_code
from utils.entries import split_entries
from utils.files import MOST_BYTES, cut_name, refuse_held

DESCRIPTION = "From a folder of images and one mask to class maps, measurements and a report."
AGAIN = "The same command goes on and ends with the same result"
READING: dict[str, tuple[str, dict[str, Any]]] = {  # options of dataset/prepare.py
    "mask_pattern": ('names of masks, if they are not those of the images: "{stem}_mask.png"', {}),
    "mask_kind": (f"what the values in masks mean: {', '.join(KINDS)} (auto)", {"choices": KINDS}),
    "palette": ('which class a value in masks means: "0=0 1=128 2=255", or of colours '
        '"0=0,0,0 1=255,0,0 ignore=255,255,255"; default: the values in their order', {}),
    "ignore": ("values in masks of pixels that nobody labelled, such as 9", {}),
    "tolerance": ("values in masks that differ by at most this in each channel are one class (0)",
        {"type": int}),
    "crop": ("pixels to cut off images, such as a data bar: top,bottom,left,right; default: as in "
        "the previous run, else 0,0,0,0", {}),
    "trim": ("crop up to N pixels where image and mask differ in size (0)", {"type": int}),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options; what cannot be read ends the program with one line and exit code 2."""
    made = Parser(prog="segment.py", description=DESCRIPTION)
    add = made.add_argument
    add("--images", type=Path, help="folder of the images, with sub-folders")
    add("--masks", type=Path, nargs="+", metavar="FILE_OR_FOLDER", default=[], help="masks of "
        "one or several images, named as the images; of two for one the later wins")  # fmt: skip
    add("--out", type=Path, help="folder of the results; default: segmented_<images>, here; of "
        "a folder img: segmented_<its parent>_img; within a set the set's name comes first, as in "
        "segmented_steel_test_numf_img")  # fmt: skip
    add("--demo", action="store_true", help="segment synthetic micrographs, whose truth is known")
    add("--minutes", type=float, help="target run time in minutes (20; with --demo "
        "1.5); the plan tells the expected end")  # fmt: skip
    add("--preset", default="auto", choices=tuple(PRESETS), help="settings of the network: auto "
        "(default; chosen after a look at the images), robust, or paper")  # fmt: skip
    add("--pretrain", choices=PRETRAIN, help="pretraining by PSCL: never (default; in our tests it "
        "did not improve networks of one mask), or always (default with --demo)")  # fmt: skip
    add("--class_names", type=split_entries, default=(), metavar="NAME,...",
        help="names of the classes, of id 0 first; default: as in the previous run")  # fmt: skip
    add("--class_colours", type=split_entries, default=(), metavar="RRGGBB,...",
        help="colours of the classes in pictures, six hexadecimal digits each, such as "
        "333333,e69f00; default: as in the previous run, else as in coloured masks; auto: forget "
        "the previous run's")  # fmt: skip
    add("--um_per_px", type=float, help="micrometres per pixel; default: as in the previous run, "
        "else as the files say, else lengths in pixels; 0: forget the previous run's")  # fmt: skip
    add("--scales", type=Path, help="a CSV file of scales for single images, which count before "
        "--um_per_px: file,um_per_px")  # fmt: skip
    add("--batch_from", default="", metavar="EXPRESSION|CSV", help="production batches: a regular "
        "expression with a group, for the file name or the path below the folder; or a CSV file: "
        "file,batch; default: as names begin, 15 of 15_s7_2.png")  # fmt: skip
    add("--outlines", choices=tuple(SUFFIX), default="", help="also write the outlines of all "
        "particles, to be corrected: GeoJSON (QuPath), or RoiSet.zip (ImageJ, Fiji)")  # fmt: skip
    add("--particles", action="store_true", help="also write particles.csv, a line per particle")
    add("--sample", default="", help="what the images show, for the head of report.html; default: "
        "the name of their folder; for a folder named img, its parent's name")  # fmt: skip
    add("--min_px", type=int, default=MINIMUM_PX, help="smallest particle in pixels: smaller "
        f"specks and holes count as noise ({MINIMUM_PX})")  # fmt: skip
    add("--grain_classes", type=int, nargs="+", default=[], metavar="CLASS", help="ids of the "
        "classes whose particles are grains: an ASTM grain-size number is given")  # fmt: skip
    for name, (meaning, how) in READING.items():
        add(f"--{name}", help=meaning, **how)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=int, default=0, help="CPU threads; 0: as many as PyTorch chooses")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return made


def default_out(images: Path) -> Path:
    """Where results go that no --out is given for: named by the folder, ``img`` by its parent."""
    return Path(cut_name("_".join(["segmented", *names_of(images)]), MOST_BYTES))


def request_of(options: argparse.Namespace) -> Request:
    """The job that the options ask for; UserError, a line for each wrong one."""
    if options.demo and (options.images or options.masks):
        raise ConfigError("--demo: brings its own images and mask; leave --images and --masks out")
    if not options.demo and not options.images:
        raise ConfigError("--images: not given; give a folder of images, and --masks one mask")
    images, masks, minutes = options.images, tuple(options.masks), 20.0
    if options.demo:
        images, masks = demo.given()
        minutes = demo.MINUTES
    problems = Problems()
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        problems.append("torchrun: segment.py runs in one process; start it without torchrun")
    reading = reading_of(options, problems)
    problems.refuse()
    default = Path(f"segmented_{DEFAULT_FOLDER.name}") if options.demo else default_out(images)
    return Request(
        images=images,
        masks=masks,
        out=options.out or default,
        minutes=minutes if options.minutes is None else options.minutes,
        preset=options.preset,
        pretrain=options.pretrain or ("always" if options.demo else "never"),
        class_names=options.class_names or (demo.CLASSES if options.demo else ()),
        class_colours=options.class_colours,
        um_per_px=options.um_per_px,
        min_px=options.min_px,
        grain_classes=tuple(options.grain_classes),
        reading=reading,
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        outlines=options.outlines,
        particles=options.particles,
        scales=options.scales,
        batch_from=options.batch_from,
        sample=options.sample,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    0; 1 for a phase that --demo missed or a training that failed; 2, 130 or 143.
    """
    options = parser().parse_args(argv)

    def work() -> int:
        if options.demo:
            return demo.demo(request_of(options))
        request = request_of(options)
        refuse_held(request.out / name for name in TABLES)
        run(request)
        return 0

    return exit_code(work, AGAIN, "smaller images, or fewer --threads")


if __name__ == "__main__":
    sys.exit(main())
