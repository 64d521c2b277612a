"""Draw a set that looks like metallography: 30 images of a steel, one of them annotated.

Grains of ferrite (0), dark boundaries (1), islands of lamellar pearlite (2), bright particles (3).
Illumination, brightness, contrast, focus and noise differ from image to image, as they do from one
sample to the next. Everything is drawn from random numbers, nothing is a photograph.

They are made by ``python segment.py --demo``, in ``dataset/micrographs``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree  # type: ignore[import-untyped]

from imaging.drawing import write_png
from imaging.imagefile import Pixels
from utils.commandline import UserError
from utils.files import replacing_folder

VERSION = 1  # raise it whenever other pictures come out
SIDE, IMAGES = 192, 30
ANNOTATED = 0  # number of the image whose mask is given
RECORD = "micrographs.json"
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "dataset" / "micrographs"
CLASSES = ("ferrite", "boundary", "pearlite", "particle")
FERRITE, BOUNDARY, PEARLITE, PARTICLE = range(4)
GRAIN = 34  # mean distance of grain centres, in pixels
BOUNDARY_WIDTH = 3.4  # pixels
PEARLITE_SHARE = 0.28  # of the grains

NOTE = """\
SYNTHETIC pictures, made by segmentation/demo/micrographs.py, not photographs; scores on them say
nothing about real steel. images: what segment.py is given; masks: the one annotated image; truth:
the masks of all, for judging alone. Delete the folder at any time: the demo makes it again.
"""

Field = NDArray[np.float32]


def make_micrographs(folder: str | Path = DEFAULT_FOLDER, seed: int = 0) -> Path:
    """Write the set to ``folder``, unless it is already there, and return the folder.

    It has ``images``, ``masks`` (one) and ``truth``. UserError: the folder holds other files, or
    cannot be written.
    """
    folder = Path(folder)
    wanted = {"version": VERSION, "seed": seed}
    if _record(folder) == wanted:
        return folder
    if folder.exists() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files; give another folder")
    with replacing_folder(folder) as root:
        for number in range(IMAGES):
            image, mask = draw_micrograph(np.random.default_rng([seed, VERSION, number]))
            name = f"steel_{number:02d}.png"
            write_png(root / "images" / name, image)
            write_png(root / "truth" / name, mask)
            if number == ANNOTATED:
                write_png(root / "masks" / name, mask)
        (root / "README.txt").write_text(NOTE, encoding="utf-8")
        (root / RECORD).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    return folder


def _record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def draw_micrograph(rng: np.random.Generator, side: int = SIDE) -> tuple[Pixels, Pixels]:
    """Draw one image and its mask, both uint8 (side, side)."""
    grain, edge = _grains(rng, side)
    chosen = rng.random(int(grain.max()) + 1) < PEARLITE_SHARE
    pearlite = chosen[grain]
    mask = np.where(pearlite, PEARLITE, FERRITE).astype(np.uint8)
    shade = 150 + rng.normal(0, 5, len(chosen))[grain] + 2.5 * _noise(rng, side, 3)
    lamellae = _lamellae(rng, side, len(chosen), grain)
    shade = np.where(pearlite, 96 + 26 * lamellae, shade)
    particles = _particles(rng, side) & ~pearlite & (edge > BOUNDARY_WIDTH + 1)
    shade[particles] = 205 + 6 * _noise(rng, side, 2)[particles]
    mask[particles] = PARTICLE
    boundary = edge < BOUNDARY_WIDTH / 2
    shade[boundary] = 62 + 6 * _noise(rng, side, 2)[boundary]
    mask[boundary] = BOUNDARY
    return _photograph(rng, shade), mask


def _grains(rng: np.random.Generator, side: int) -> tuple[NDArray[np.int64], Field]:
    """Numbers of the grains (Voronoi cells with wavy edges), and the distance to the next one."""
    margin = 2 * GRAIN
    count = round(((side + 2 * margin) / GRAIN) ** 2)
    centres = rng.uniform(-margin, side + margin, (count, 2))
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    rows, columns = rows + 2.5 * _noise(rng, side, 7), columns + 2.5 * _noise(rng, side, 7)
    distances, nearest = cKDTree(centres).query(np.dstack([rows, columns]), k=2)
    apart = np.linalg.norm(centres[nearest[..., 0]] - centres[nearest[..., 1]], axis=-1)
    # The distance of a point to the bisector of its two nearest centres.
    edge = (distances[..., 1] ** 2 - distances[..., 0] ** 2) / (2 * np.maximum(apart, 1))
    return nearest[..., 0], edge.astype(np.float32)


def _lamellae(rng: np.random.Generator, side: int, count: int, grain: NDArray[np.int64]) -> Field:
    """Stripes, -1 to 1, of a direction and a spacing of each grain's own."""
    angle, spacing = rng.uniform(0, np.pi, count)[grain], rng.uniform(4.5, 7.0, count)[grain]
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    along = rows * np.cos(angle) + columns * np.sin(angle) + 0.8 * _noise(rng, side, 5)
    return np.asarray(np.sin(2 * np.pi * along / spacing), np.float32)


def _particles(rng: np.random.Generator, side: int) -> NDArray[np.bool_]:
    """Ellipses scattered over the image."""
    found = np.zeros((side, side), np.uint8)
    for _ in range(rng.poisson(46)):
        centre = tuple(rng.integers(0, side, 2).tolist())
        axes = tuple(rng.integers(2, 6, 2).tolist())
        cv2.ellipse(found, centre, axes, rng.uniform(0, 180), 0, 360, 1, -1)
    return found.astype(bool)


def _photograph(rng: np.random.Generator, shade: NDArray[Any]) -> Pixels:
    """What a camera makes of it: uneven light, contrast, focus and noise of this one image."""
    side = len(shade)
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    light = (
        rng.normal(0, 9) * rows
        + rng.normal(0, 9) * columns
        - rng.uniform(0, 14) * (rows**2 + columns**2)
    )
    image = (shade - 130) * rng.uniform(0.55, 1.15) + 130 + rng.uniform(-38, 38) + light
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 0.9))
    image = image + rng.normal(0, rng.uniform(2.5, 5.5), shade.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, side: int, sigma: float) -> Field:
    """Noise (side, side), mean 0 and deviation 1, blurred by ``sigma`` pixels."""
    margin = int(4 * sigma)
    white = rng.standard_normal((side + 2 * margin,) * 2).astype(np.float32)
    smooth = cv2.GaussianBlur(white, (0, 0), sigma)[margin : margin + side, margin : margin + side]
    return np.asarray((smooth - smooth.mean()) / smooth.std(), np.float32)
