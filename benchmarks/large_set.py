"""A set larger than memory: time of the first and of later starts, of a step, peak memory.

    python benchmarks/large_set.py --images 50000 --folder large_set

Makes images of 1024x1024, some hundred different ones and hard links to them, pretrains on crops of
128 for a few steps, with few and with all images in memory, and deletes them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from benchmarks.measure import at_least, in_own_process, parser_of, print_case
from config import Config, ConfigError
from config_run import open_set
from imaging.imagefile import read_image
from stages.pretraining import SelfSupervised
from utils.commandline import exit_code
from utils.log import RunLog

SET, RUNS = "set", "runs"


def make_set(folder: Path, images: int, distinct: int, side: int) -> float:
    """Write the images, an annotated one among them; returns the seconds that it took."""
    started = time.monotonic()
    train, annotated = folder / "train_numf/img", folder / "sup_num1_0"
    for place in (train, annotated / "img", annotated / "gt"):
        place.mkdir(parents=True)
    for number in range(min(distinct, images)):
        rng = np.random.default_rng(number)
        grains = cv2.resize(rng.integers(60, 200, (side // 16, side // 16), np.uint8), (side, side))
        noise = rng.integers(0, 24, (side, side), np.uint8)
        # Every fourth has noise, which hardly can be compressed, as a micrograph has.
        picture = cv2.add(grains, noise if number % 4 == 0 else noise // 8)
        cv2.imwrite(str(train / f"{number % 9}_{number:06}.png"), picture)
    first = sorted(train.iterdir())
    for number in range(len(first), images):
        os.link(first[number % len(first)], train / f"{number % 9}_{number:06}.png")
    shutil.copy(first[0], annotated / "img" / first[0].name)
    gray = read_image(first[0])
    cv2.imwrite(str(annotated / "gt" / first[0].name), (gray // 86).clip(0, 2).astype(np.uint8))
    return time.monotonic() - started


class _EnoughError(Exception):
    """All the steps were timed."""


def start_and_step(case: dict[str, Any]) -> dict[str, float]:
    """Seconds from the program's start to its first step, and of later ones; peak memory.

    Those of the processor are this process's, whatever else the machine does.
    """
    torch.manual_seed(0)
    config = Config(
        data_dir=str(Path(case["folder"], SET)), output_dir=str(Path(case["folder"], RUNS)),
        num_classes=3, self_crop=128, self_mode=case["method"], cache=case["cache"],
        device=case["device"], repeats="0", stages="self",
    ).resolved()  # fmt: skip
    jobs, _ = open_set(config)
    checked, processor = time.time() - case["started"], time.process_time()
    run = SelfSupervised(jobs[0])
    if problems := run.problems():
        raise ConfigError("\n".join(problems))
    jobs[0].store.keep_index()
    run.build()
    run.log = RunLog(case["folder"], "self", enabled=False)
    ended: list[tuple[float, float]] = []

    def step_done() -> None:
        next(run.module.parameters()).sum().item()
        ended.append((time.time(), time.process_time()))
        if len(ended) > case["steps"]:
            raise _EnoughError

    with suppress(_EnoughError):
        for epoch in range(case["steps"] + 1):
            run.train_epoch(epoch, step_done)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    between = np.subtract(ended[-1], ended[0]) / case["steps"]
    return {
        "checked, s": round(checked, 1),
        "checked, processor s": round(processor, 1),
        "first step, s": round(ended[0][0] - case["started"], 1),
        "first step, processor s": round(ended[0][1], 1),
        "step, s": round(float(between[0]), 3),
        "step, processor s": round(float(between[1]), 3),
        "peak, GB": round(peak / 1e9, 2),
        "load": round(os.getloadavg()[0], 1),
    }


def report(given: argparse.Namespace) -> None:
    """Make the sets, measure, delete them; prints a line of JSON for each start."""
    large, small = Path(given.folder, "large"), Path(given.folder, "small")
    case = {"device": given.device, "method": given.method, "steps": given.steps,
            "threads": given.threads, "cache": given.cache}  # fmt: skip
    try:
        for folder, images in ((large, given.images), (small, given.in_memory)):
            took = make_set(folder / SET, images, given.distinct, given.side)
            print(f"{images} images of {given.side}x{given.side} made in {took:.0f} s", flush=True)
        starts = [
            (f"{given.images}, cache {given.cache}, first start", large, given.cache),
            ("the same, second start", large, given.cache),
            (f"{given.in_memory}, all in memory", small, ""),
            (f"{given.images}, third start", large, given.cache),
        ]
        for title, folder, cache in starts:
            own = {**case, "folder": str(folder), "cache": cache, "started": time.time()}
            found = in_own_process(__file__, own)
            print(json.dumps({"set": title, **found}), flush=True)
    finally:
        for folder in (large, small):
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", default="large_set", help="where the sets are made")
    parser.add_argument("--images", type=at_least(9), default=50_000)
    parser.add_argument("--distinct", type=at_least(9), default=300, help="of them, different")
    parser.add_argument("--in_memory", type=at_least(9), default=64, help="images of a small set")
    parser.add_argument("--side", type=at_least(128), default=1024, help="pixels")
    parser.add_argument("--cache", default="500MB")
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--steps", type=at_least(1), default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    def work() -> None:
        if given.case is None:
            report(given)
            return
        print_case(given.case, start_and_step)

    return exit_code(work, "Nothing of it was kept")


if __name__ == "__main__":
    sys.exit(main())
