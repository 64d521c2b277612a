"""A set larger than memory: time of the first and of later starts, of a step, peak memory.

    python benchmarks/large_set.py --images 50000 --folder large_set

Makes PNG of 1024x1024, pretrains on crops of 128 for a few steps, with few and with all images in
memory, resumes, and deletes them. An image is a stack of bands of drawn grains, any of some
hundred, which are compressed once: so every file is another one, and made in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import cv2
import numpy as np
import torch

import config_run
from benchmarks.measure import (
    at_least,
    in_own_process,
    load_average,
    parser_of,
    print_case,
    process_megabytes,
)
from config import Config, ConfigError
from data import Batches
from imaging.imagefile import read_image
from stages.pretraining import SelfSupervised
from utils.commandline import exit_code

SET, RUNS = "set", "runs"
BANDS = 8  # of an image


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file (ISO 15948, 5.3)."""
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def drawn_band(number: int, side: int) -> tuple[bytes, bytes]:
    """Rows of grains as PNG stores them, without a filter: as they are, and compressed."""
    rng = np.random.default_rng(number)
    rows = side // BANDS
    grains = rng.integers(60, 200, (max(rows // 32, 1), side // 32), np.uint8)
    picture = cv2.resize(grains, (side, rows), interpolation=cv2.INTER_NEAREST)
    if number % 2:  # others without noise, which hardly can be compressed: the set is to fit a disk
        picture = cv2.add(picture, rng.integers(0, 3, picture.shape, np.uint8))
    raw = np.pad(picture, ((0, 0), (1, 0))).tobytes()
    deflate = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return raw, deflate.compress(raw) + deflate.flush(zlib.Z_FULL_FLUSH)


def stacked(bands: Sequence[tuple[bytes, bytes]], side: int) -> bytes:
    """A gray PNG file of such bands, one below the other."""
    checksum = 1
    for raw, _ in bands:
        checksum = zlib.adler32(raw, checksum)
    last = b"\x03\x00"  # an empty last block
    pixels = b"\x78\x01" + b"".join(packed for _, packed in bands) + last
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    file = chunk(b"IHDR", head) + chunk(b"IDAT", pixels + struct.pack(">I", checksum))
    return b"\x89PNG\r\n\x1a\n" + file + chunk(b"IEND", b"")


def make_set(folder: Path, images: int, distinct: int, side: int) -> None:
    """Write the images, an annotated one among them; ``side`` is a multiple of ``BANDS``."""
    train, annotated = folder / "train_numf/img", folder / "sup_num1_0"
    for place in (train, annotated / "img", annotated / "gt"):
        place.mkdir(parents=True)
    bands = [drawn_band(number, side) for number in range(distinct)]
    for number in range(images):
        chosen = np.random.default_rng((1, number)).integers(0, distinct, BANDS)
        file = stacked([bands[i] for i in chosen], side)
        (train / f"{number % 9}_{number:06}.png").write_bytes(file)
    first = train / f"0_{0:06}.png"
    shutil.copy(first, annotated / "img" / first.name)
    gray = read_image(first)
    cv2.imwrite(str(annotated / "gt" / first.name), (gray // 86).clip(0, 2).astype(np.uint8))


class _EnoughError(Exception):
    """All the steps were timed."""


class Few:
    """The first batches of every epoch of others."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int, first: int = 0) -> Iterator[dict[str, Any]]:
        """The first batches of one epoch."""
        return islice(self.batches.epoch(epoch, first), self.count - first)

    def epochs(self, numbers: Iterable[int], first: int = 0) -> Generator[Any, None, None]:
        """Those of several, one after the other."""
        for number in numbers:
            yield from self.epoch(number, first)
            first = 0


def start_and_step(case: dict[str, Any]) -> dict[str, float]:
    """Seconds from the program's start to its first step, and of later ones; peak memory.

    Those of the processor are this process's, whatever else the machine does. The run ends, as if
    it were killed, after an epoch of ``steps`` timed steps and its state.
    """
    noted: list[tuple[float, float]] = []  # the check's end, and each step's

    def note() -> None:
        noted.append((time.time(), time.process_time()))

    class Timed(SelfSupervised):
        def build(self) -> None:
            note()
            super().build()
            self.batches: Any = Few(self.batches, case["steps"] + 1)

        def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
            def step_and_note() -> None:
                step_done()
                next(self.module.parameters()).sum().item()  # waits for the device
                note()

            if len(noted) > 1:
                raise _EnoughError
            super().train_epoch(epoch, step_and_note)

    torch.manual_seed(0)
    config_run.STAGES["self"] = Timed
    config = Config(
        data_dir=str(Path(case["folder"], SET)), output_dir=str(Path(case["folder"], RUNS)),
        name=case["name"], num_classes=3, self_crop=128, self_mode=case["method"],
        cache=case["cache"], device=case["device"], repeats="0", stages="self", self_max_epoch=9,
        save_seconds=0.0,
    )  # fmt: skip
    with suppress(_EnoughError):
        config_run.run(config)
    ready, first, *_, last = np.array(noted) - (case["started"], 0)
    step = (last - first) / case["steps"]
    return {
        "ready, s": round(float(ready[0]), 1),
        "ready, processor s": round(float(ready[1]), 1),
        "first step, s": round(float(first[0]), 1),
        "first step, processor s": round(float(first[1]), 1),
        "step, s": round(float(step[0]), 3),
        "step, processor s": round(float(step[1]), 3),
        "peak, GB": round(process_megabytes() * 2**20 / 1e9, 2),
        "load": round(load_average(), 1),
    }


def report(given: argparse.Namespace) -> None:
    """Make the sets, measure, delete them; prints a line of JSON for each start."""
    large, small = Path(given.folder, "large"), Path(given.folder, "small")
    case = {"device": given.device, "method": given.method, "steps": given.steps,
            "threads": given.threads}  # fmt: skip
    try:
        for folder, images in ((large, given.images), (small, given.in_memory)):
            if not folder.exists():
                started = time.monotonic()
                make_set(folder / SET, images, given.distinct, given.side)
                took = time.monotonic() - started
                print(
                    f"{images} images of {given.side}x{given.side} made in {took:.0f} s", flush=True
                )
        starts = [
            (f"{given.images}, cache {given.cache}, first start", large, "first", given.cache),
            ("the same, another run", large, "other", given.cache),
            (f"{given.in_memory}, all in memory", small, "first", ""),
            (f"{given.images}, the first run goes on", large, "first", given.cache),
        ]
        for title, folder, name, cache in starts:
            own = {**case, "folder": str(folder), "name": name, "cache": cache}
            found = in_own_process(__file__, {**own, "started": time.time()})
            print(json.dumps({"set": title, **found}), flush=True)
    finally:
        for folder in () if given.keep else (large, small):
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", default="large_set", help="where the sets are made")
    parser.add_argument(
        "--images", type=at_least(9), default=50_000, help="images of the large set"
    )
    parser.add_argument(
        "--distinct", type=at_least(9), default=512, help="how many of the images differ"
    )
    parser.add_argument("--in_memory", type=at_least(9), default=64, help="images of the small set")
    parser.add_argument(
        "--side", type=at_least(128), default=1024, help="side in pixels, a multiple of 8"
    )
    parser.add_argument("--cache", default="500MB", help="--cache of the training")
    parser.add_argument("--method", default="simclr", help="method of pretraining")
    parser.add_argument("--steps", type=at_least(1), default=30, help="timed steps")
    parser.add_argument("--device", default="cpu", help="device of the training")
    parser.add_argument("--keep", action="store_true", help="keep the sets for a later call")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    def work() -> None:
        least = 8 * (given.steps + 1)  # an epoch of the first step and the timed ones
        if given.case is None and min(given.images, given.in_memory) < least:
            found = f"{given.images} and {given.in_memory} images for {given.steps} steps of 8"
            raise ConfigError(
                f"--images, --in_memory: {found}; give at least {least}, or fewer steps"
            )
        if given.case is None:
            report(given)
            return
        print_case(given.case, start_and_step)

    return exit_code(work, "Nothing of it was kept")


if __name__ == "__main__":
    sys.exit(main())
