"""Make a small synthetic set in place of NEU-Seg: steel strip with three kinds of surface defect.

The pictures are drawn by the functions below from random numbers, none is a photograph. They follow
the look of camera images of hot-rolled strip: rolling texture, uneven light, grain, and on it dark
streaks (1, as inclusions), dark blotches (2, as patches) and bright lines (3, as scratches).

    python dataset/make_demo.py --out dataset/NEU_Seg-standin --seed 0
"""

from __future__ import annotations

import json
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
from numpy.typing import NDArray

from imaging.drawing import write_png
from imaging.imagefile import Pixels
from utils.commandline import Parser, UserError, exit_code
from utils.files import read_plain, replacing_folder

VERSION = 1  # raise it whenever other pictures come out
SIDE = 200
TRAIN_IMAGES, TEST_IMAGES = 24, 12
FILES = 2 * (TRAIN_IMAGES + TEST_IMAGES + 5 * 1 + 2 * 5)  # images and masks of all splits
COMPLETE = 8  # the first so many training images show all three defects
RECORD = "standin.json"
DEFAULT_FOLDER = Path(__file__).resolve().parent / "NEU_Seg-standin"
INCLUSION, PATCH, SCRATCH = 1, 2, 3

NOTE = """\
SYNTHETIC pictures, made by dataset/make_demo.py: not NEU-Seg and not photographs.
They stand in for that set so that the demo runs without a download; scores on them say nothing
about real steel. Classes: 0 background, 1 inclusion, 2 patch, 3 scratch.
Delete the folder at any time: the demo makes it again.
"""

Field = NDArray[np.float32]
ROW, COLUMN = np.mgrid[:SIDE, :SIDE].astype(np.float32)


class Coil(NamedTuple):
    """What the pictures of one production batch share; standard deviations in gray levels."""

    name: str  # the first field of the file names
    level: float  # mean gray level
    grain: float  # standard deviation of the pixel noise
    texture: float  # standard deviation of the rolling texture
    upright: bool  # whether the rolling direction runs from top to bottom (else left to right)


COILS = (
    Coil("coil11", level=112, grain=4.5, texture=3.5, upright=True),
    Coil("coil12", level=146, grain=6.0, texture=3.0, upright=True),
    Coil("coil13", level=82, grain=4.0, texture=5.0, upright=False),
    Coil("coil14", level=126, grain=8.0, texture=4.0, upright=False),
)


def make_demo_set(folder: str | Path = DEFAULT_FOLDER, seed: int = 0) -> Path:
    """Write the stand-in set to ``folder``, unless it is already there, and return the folder.

    A set of another seed or version is replaced. UserError: it holds other files, or cannot be
    written.
    """
    folder = Path(folder)
    wanted = {"version": VERSION, "seed": seed, "files": FILES}
    if _is_complete(folder, wanted):
        return folder
    if folder.exists() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files; give another folder")
    try:
        with replacing_folder(folder) as root:
            _write_set(root, seed)
            (root / "README.txt").write_text(NOTE, encoding="utf-8")
            (root / RECORD).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    except UserError:
        if not _is_complete(folder, wanted):  # else another process was faster
            raise
    return folder


def draw_picture(
    rng: np.random.Generator, coil: Coil, defects: Sequence[int]
) -> tuple[Pixels, Pixels]:
    """Draw one picture and its mask, both uint8 (SIDE, SIDE), with these defects (class ids)."""
    image = coil.level * rng.uniform(0.75, 1.25) + _surface(rng, coil)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    contrast = rng.uniform(0.6, 1.3)
    if PATCH in defects:
        shade, rough, where = _patches(rng)
        grain = 9 * _noise(rng, 0.7) + 5 * _noise(rng, 1.6)  # specks, bright among dark
        image = image + contrast * shade + rough * grain
        mask[where] = PATCH
    if INCLUSION in defects:
        shade, where = _inclusions(rng)
        shade, where = _along(shade, coil), _along(where, coil) & (mask != PATCH)
        image = image - contrast * rng.uniform(30, 52) * np.where(mask == PATCH, 0, shade)
        mask[where] = INCLUSION
    if SCRATCH in defects:
        shade, where = _scratches(rng)
        image = image + contrast * rng.uniform(55, 95) * _along(shade, coil)
        mask[_along(where, coil)] = SCRATCH
    image = np.asarray(cv2.GaussianBlur(image, (0, 0), 0.6), np.float64)  # the lens
    image = image + rng.normal(0, coil.grain, mask.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), mask


def _is_complete(folder: Path, wanted: dict[str, int]) -> bool:
    try:
        found = json.loads(read_plain(folder / RECORD))
    except (OSError, ValueError):
        return False
    return found == wanted and len(list(folder.glob("*/*/*.png"))) == wanted["files"]


def _write_set(root: Path, seed: int) -> None:
    """Write the folders train_numf, test_numf, sup_num1_0..4 and sup_num5_0..1."""
    made = []
    for number in range(TRAIN_IMAGES + TEST_IMAGES):
        split, defects = "train_numf", _defects(number, COMPLETE)
        if number >= TRAIN_IMAGES:
            split, defects = "test_numf", _defects(number - TRAIN_IMAGES, complete=4)
        coil = COILS[number % len(COILS)]
        picture = draw_picture(np.random.default_rng([seed, VERSION, number]), coil, defects)
        made.append((f"{coil.name}_{number:03d}_0_0.png", *picture))
        _write(root / split, *made[-1])
    for repeat in range(5):
        _write(root / f"sup_num1_{repeat}", *made[repeat])
    for repeat in range(2):
        few = COMPLETE + 3 * repeat
        for number in (repeat, repeat + 4, few, few + 1, few + 2):
            _write(root / f"sup_num5_{repeat}", *made[number])


def _defects(number: int, complete: int) -> tuple[int, ...]:
    """Which defects a picture shows: all for the first ones, then one or two in turn."""
    if number < complete:
        return INCLUSION, PATCH, SCRATCH
    turns = ((INCLUSION,), (PATCH,), (SCRATCH,), (INCLUSION, SCRATCH), (PATCH,), (INCLUSION, PATCH))
    return turns[(number - complete) % len(turns)]


def _write(folder: Path, name: str, image: Pixels, mask: Pixels) -> None:
    write_png(folder / "img" / name, image)
    write_png(folder / "gt" / name, mask)


def _noise(
    rng: np.random.Generator, across: float, along: float | None = None, columns: int = SIDE
) -> Field:
    """Noise (SIDE, columns), mean 0, deviation 1, blurred by ``along`` rows, ``across`` columns."""
    sigmas = (across if along is None else along), across
    # Broad noise on a coarser grid, enlarged, looks the same and takes a tenth of the time.
    steps = [max(1, int(sigma / 2.5)) for sigma in sigmas]
    margin = 8  # more than the blur reaches on the coarse grid
    sides = [-(-n // step) + 2 * margin for n, step in zip((SIDE, columns), steps, strict=True)]
    white = rng.standard_normal(sides).astype(np.float32)
    sigma_rows, sigma_columns = (sigma / step for sigma, step in zip(sigmas, steps, strict=True))
    smooth = cv2.GaussianBlur(white, (0, 0), sigmaX=sigma_columns, sigmaY=sigma_rows)
    smooth = smooth[margin:-margin, margin:-margin]
    size = smooth.shape[1] * steps[1], smooth.shape[0] * steps[0]
    smooth = cv2.resize(smooth, size, interpolation=cv2.INTER_CUBIC)[:SIDE, :columns]
    return np.asarray((smooth - smooth.mean()) / smooth.std(), np.float32)


def _along(field: NDArray, coil: Coil) -> NDArray:
    """Turn a field drawn with the rolling direction upright to the coil's direction."""
    return field if coil.upright else field.T


def _surface(rng: np.random.Generator, coil: Coil) -> Field:
    """Uneven light, rolling texture and mottling, in gray levels about 0."""
    row, column = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)
    light = rng.normal(0, 7) * row + rng.normal(0, 12) * column
    light = light - rng.uniform(0, 9) * (row**2 + column**2) + 4 * _noise(rng, 35)
    rolling = coil.texture * (0.6 * _noise(rng, 0.7, 18) + 0.8 * _noise(rng, 5, 45))
    return np.asarray(light + _along(rolling, coil) + 1.5 * _noise(rng, 2), np.float32)


def _patches(rng: np.random.Generator) -> tuple[Field, Field, NDArray[np.bool_]]:
    """Two to five dark blotches on brighter, rough ground: shade, roughness (0..1), mask."""
    height = np.full((SIDE, SIDE), -9.0, np.float32)
    for _ in range(rng.integers(2, 6)):
        centre = rng.uniform(5, SIDE - 5, 2)
        radii = rng.uniform(18, 58), rng.uniform(11, 27)
        angle = rng.uniform(0, np.pi)
        u = (ROW - centre[0]) * np.cos(angle) + (COLUMN - centre[1]) * np.sin(angle)
        v = (COLUMN - centre[1]) * np.cos(angle) - (ROW - centre[0]) * np.sin(angle)
        height = np.maximum(height, 1 - np.hypot(u / radii[0], v / radii[1]))
    height = height + 0.30 * _noise(rng, 10) + 0.09 * _noise(rng, 3)
    where = cv2.GaussianBlur(height, (0, 0), 2) > 0
    dark = np.clip(0.5 + height / 0.55, 0, 1) * (1 + 0.12 * _noise(rng, 6))
    ground = np.clip(1.35 + 1.1 * height + 0.2 * _noise(rng, 18), 0, 1)
    shade = rng.uniform(15, 60) * ground - rng.uniform(80, 115) * dark
    return np.asarray(shade, np.float32), np.asarray(ground, np.float32), where


def _inclusions(rng: np.random.Generator) -> tuple[Field, NDArray[np.bool_]]:
    """Three to nine spindles along the rolling direction (upright): shade 0..1 and mask."""
    shade = np.zeros((SIDE, SIDE), np.float32)
    where = np.zeros((SIDE, SIDE), bool)
    middle = rng.uniform(25, SIDE - 25)
    wander = 2.0 * _noise(rng, 1, 22, columns=1)
    for _ in range(rng.integers(3, 10)):
        length, width = rng.uniform(10, 42), rng.uniform(1.8, 5.5)
        u = (ROW - rng.uniform(0, SIDE)) / length
        v = COLUMN - np.clip(rng.normal(middle, 28), 4, SIDE - 4) - wander
        edge = width * (1 - np.abs(u) ** 1.6) + 0.8 * _noise(rng, 1.5, 6) - np.abs(v)
        where |= (np.abs(u) < 1) & (edge > -0.3)
        strength = rng.uniform(0.6, 1.0) * np.clip(0.4 + edge / 3.5, 0, 1)
        strength = strength * np.clip(1 + 0.2 * _noise(rng, 1.2, 5), 0.4, 1.3)
        shade = np.maximum(shade, np.where(np.abs(u) < 1, strength, 0))
    return shade, where


def _scratches(rng: np.random.Generator) -> tuple[Field, NDArray[np.bool_]]:
    """One to three bundles of bright lines, nearly along the rolling direction: shade, mask."""
    shade = np.zeros((SIDE, SIDE), np.float32)
    where = np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(1, 4)):
        start, slope = rng.uniform(12, SIDE - 12), rng.normal(0, 0.03)
        top = rng.uniform(-60, 90)
        bottom = top + rng.uniform(80, 240)
        for offset in rng.uniform(-9, 9, rng.integers(1, 4)):
            width = rng.choice([rng.uniform(0.9, 2.2), rng.uniform(2.2, 5.0)], p=[0.75, 0.25])
            line = start + offset + slope * ROW + 0.5 * _noise(rng, 1, 30, columns=1)
            ends = np.clip(np.minimum(ROW - top, bottom - ROW) / 12, 0, 1)
            broken = 0.8 + 0.22 * _noise(rng, 1, 24, columns=1) + 0.16 * _noise(rng, 1, 5)
            across = np.abs(COLUMN - line) / width
            broken = np.clip(broken + 0.1 * _noise(rng, 0.8), 0.15, 1.3)
            light = ends * broken * np.exp(-(across**4) / 2) * rng.uniform(0.55, 1.1)
            shade = np.maximum(shade, light) - 0.12 * ends * np.exp(-((across - 2.2) ** 2))
            where |= (across < 1.15) & (ends > 0.3)
    return np.asarray(shade, np.float32), where


def main() -> int:
    """Command line: make the set and say where it is."""
    parser = Parser("make_demo.py", description="Make the synthetic stand-in for NEU-Seg")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder of the set")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    given = parser.parse_args()
    return exit_code(lambda: print(make_demo_set(given.out, given.seed)), "No set was made")


if __name__ == "__main__":
    sys.exit(main())
