"""A set of a few small pictures, laid out as the program wants it, and what tests do with runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import config_run

ROOT = Path(__file__).resolve().parents[1]

# Settings of a run that takes about a second.
TINY = {
    "name": "tiny",
    "channels": (4, 8, 16, 32),
    "hidden_dim": 16,
    "embed_dim": 8,
    "top_k": 2,
    "queue_size": 10,
    "self_batch_size": 2,
    "self_max_epoch": 2,
    "fine_max_epoch": 2,
    "eval_every": 1,
    "save_every": 1,
    "repeats": "0",
    "device": "cpu",
    "amp": "off",
    "threads": 1,
    "save_seconds": 0.0,
}


def draw(
    seed: int, classes: int, height: int, width: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A gray picture with a rectangle of each class, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for c in range(1, classes):
        top, left = rng.integers(0, height - 10), rng.integers(0, width - 10)
        mask[top : top + 10, left : left + 10] = c
    image = mask * (200 // classes) + rng.integers(0, 40, mask.shape)
    return image.astype(np.uint8), mask


def add(folder: Path, name: str, seed: int, classes: int, size: tuple[int, int]) -> None:
    """Write one picture and its mask into a split's folder."""
    image, mask = draw(seed, classes, *size)
    for kind, pixels in (("img", image), ("gt", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{name}.png")


def make_set(
    root: Path,
    classes: int = 3,
    size: tuple[int, int] = (32, 40),
    train: int = 4,
    batches: tuple[str, ...] = ("15", "30"),
) -> Path:
    """Train, test and annotated splits, ``<batch>_<number>.png`` each.

    Args:
        root: the folder of the set.
        classes: C.
        size: height, width.
        train: number of training images.
        batches: production batches, in turn.
    """
    for i in range(train):
        add(root / "train_numf", f"{batches[i % len(batches)]}_{i}", i, classes, size)
    for i in range(2):
        add(root / "test_numf", f"{batches[i % len(batches)]}_t{i}", 100 + i, classes, size)
    for r in range(2):
        add(root / f"sup_num1_{r}", f"{batches[r % len(batches)]}_{r}", r, classes, size)
    for i in range(5):
        add(root / "sup_num5_0", f"{batches[i % len(batches)]}_{i}", i, classes, size)
    return root


NAMES = [f"{15 * (i % 3 + 1)}_s{i}_0_0" for i in range(7)]


def noise(
    folder: Path,
    name: str,
    shape: tuple[int, ...] = (32, 32),
    classes: int = 4,
    suffix: str = ".png",
    mask: bool = True,
) -> None:
    """Write noise of any shape as an image, with random class ids as its mask."""
    rng = np.random.default_rng([0, *name.encode()])
    (folder / "img").mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "img" / f"{name}{suffix}")
    if mask:
        (folder / "gt").mkdir(parents=True, exist_ok=True)
        ids = rng.integers(0, classes, shape[:2], dtype=np.uint8)
        Image.fromarray(ids).save(folder / "gt" / f"{name}.png")


def noise_set(root: Path) -> Path:
    """A sound set: 7 training images in 3 batches, 3 test images, annotated images."""
    for name in NAMES:
        noise(root / "train_numf", name)
    for name in ("15_t0_0_0", "30_t1_0_0", "30_t2_0_0"):
        noise(root / "test_numf", name)
    for repeat in range(2):
        noise(root / f"sup_num1_{repeat}", NAMES[repeat])
    for name in NAMES[:5]:
        noise(root / "sup_num5_0", name)
    return root


def train(data: Path, out: Path, argv: str = "", **settings: object) -> int:
    """Run the program in this process; returns its exit code."""
    values = {**TINY, "data_dir": str(data), "output_dir": str(out), "num_classes": 3, **settings}
    return config_run.main(argv.split(), **values)


def command(data: Path, **settings: object) -> list[str]:
    """The command line of the same run in a process of its own; it writes into its folder."""
    values = {**TINY, "data_dir": str(data), "num_classes": 3, **settings}
    words = [sys.executable, str(ROOT / "train.py")]
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name}={text}"]
    return words


def environment() -> dict[str, str]:
    """For such a process: one thread, no buffering."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_process(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )


def files(root: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by relative name."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
