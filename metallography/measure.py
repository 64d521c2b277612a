"""Quantitative metallography on masks of class ids: fractions, counts, sizes, spacings.

Conventions, which hold for every number here:

* A *particle* is a set of pixels of one class that touch by a side or a corner (8-connected) and
  has at least ``minimum_px`` pixels; smaller ones are taken for noise.
* The area fraction counts every pixel of the class, noise and cut particles included
  (ASTM E562, E1245: each pixel is a point of the grid).
* A particle that touches the frame is cut. It counts as one half (Jeffries' planimetric rule, ASTM
  E112) and has no known size, so it is left out of all sizes. Large particles are cut more often
  than small ones: where particles are not small against the field, mean sizes come out too low.
* Lengths are in the unit of the scale: um with ``um_per_px``, else px. Densities are per 10^6
  square units: per mm2 with a scale, per megapixel (Mpx) without.
* What cannot be known (no particle, one field) is nan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# SciPy is installed with scikit-learn, which requires it.
from scipy.special import stdtrit  # type: ignore[import-untyped]

Array = NDArray[Any]
Row = dict[str, Any]

MINIMUM_PX = 10
BOUNDARY_PX = 2.0
RECALL_EDGES_PX = (0, 32, 100, 316, 1000, 3162)
"""Areas in pixels at which the classes of particle size begin, half a decade each."""
_ROWS = 256  # sums over labels go in bands, so that no picture-sized float arrays are made


# --- particles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Particles:
    """The particles of one class in one picture, one entry of each array per particle.

    Attributes:
        area: pixels, holes not counted.
        length, width: sides in px of the smallest-area rectangle of any direction around the
            particle's pixels, taken as unit squares; length >= width.
        x, y: centre of gravity in px; (0, 0) is the centre of the first pixel.
        border: whether the particle touches the frame.
    """

    area: Array
    length: Array
    width: Array
    x: Array
    y: Array
    border: Array

    @property
    def diameter(self) -> Array:
        """Diameter in px of the circle of equal area, sqrt(4 A / pi) (ISO 9276-6)."""
        return np.sqrt(4 * self.area / math.pi)

    @property
    def aspect(self) -> Array:
        """Length / width of the smallest rectangle, 1 or more."""
        return self.length / self.width

    def inside(self) -> Particles:
        """Only those that are whole."""
        keep = ~self.border
        return Particles(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    def rows(self, um_per_px: float | None = None) -> list[Row]:
        """One dict per particle, in the unit of the scale; x and y stay in px."""
        u, s = unit_of(um_per_px), um_per_px or 1.0
        columns = {
            "x_px": self.x,
            "y_px": self.y,
            f"area_{u}2": self.area * s * s,
            f"diameter_{u}": self.diameter * s,
            f"length_{u}": self.length * s,
            f"width_{u}": self.width * s,
            "aspect_ratio": self.aspect,
            "cut_by_frame": self.border.astype(int),
        }
        lists = {name: values.tolist() for name, values in columns.items()}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def find_particles(binary: Array, minimum_px: int = MINIMUM_PX) -> tuple[Particles, Array, Array]:
    """Find the particles of a class.

    Args:
        binary: (H, W), true where the class is.
        minimum_px: smallest area of a particle.

    Returns:
        The particles; labels int32 (H, W), 0 outside and for noise, else 1 + the particle's number;
        nothing else is kept.  The third is ``labels > 0``.
    """
    pixels = np.ascontiguousarray(binary).view(np.uint8) if binary.dtype == bool else binary
    pixels = np.asarray(pixels, np.uint8)
    count, labels, statistics, centres = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    area = statistics[:, cv2.CC_STAT_AREA].astype(np.int64)
    keep = area >= minimum_px
    keep[0] = False
    number = np.zeros(count, np.int32)
    number[keep] = np.arange(1, keep.sum() + 1)
    for top in range(0, labels.shape[0], _ROWS):
        labels[top : top + _ROWS] = number[labels[top : top + _ROWS]]
    frame = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    border = np.zeros(keep.sum() + 1, bool)
    border[frame] = True
    length, width = _rectangles(pixels, labels, int(keep.sum()))
    x, y = centres[keep, 0], centres[keep, 1]
    return Particles(area[keep], length, width, x, y, border[1:]), labels, labels > 0


def _rectangles(pixels: Array, labels: Array, count: int) -> tuple[Array, Array]:
    """Length and width of the smallest rectangle around each of the particles 1 ... count."""
    length, width = np.full(count, np.nan), np.full(count, np.nan)
    if not count:
        return length, width
    # Not RETR_CCOMP, which tells holes apart but takes a time that grows with their square.
    contours, _ = cv2.findContours(pixels, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    corners = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]], np.float32)
    for contour in contours:
        column, row = contour[0, 0]
        number = labels[row, column]
        # Holes are followed the other way round, so that their area is positive.
        if not number or cv2.contourArea(contour, oriented=True) > 0:
            continue
        hull = cv2.convexHull(contour)  # (points, 1, 2)
        _, sides, _ = cv2.minAreaRect((hull + corners).reshape(-1, 2).astype(np.float32))
        width[number - 1], length[number - 1] = sorted(sides)
    return length, width


# --- one picture ----------------------------------------------------------------------------------


def unit_of(um_per_px: float | None) -> str:
    """'um' with a scale, 'px' without."""
    return "px" if um_per_px is None else "um"


def density_column(um_per_px: float | None) -> str:
    """Name of the number density: per mm2 with a scale, per megapixel without."""
    return "number_per_Mpx" if um_per_px is None else "number_per_mm2"


def intercepts_per_px(binary: Array) -> float:
    """N_L, particles met per px of test line; every row and every column is a test line.

    A particle met is two crossings of its outline; one cut by the frame is one crossing, so a half
    (ASTM E112: a line that ends in a grain counts half).
    """
    crossings = np.count_nonzero(binary[:, 1:] != binary[:, :-1])
    crossings += np.count_nonzero(binary[1:] != binary[:-1])
    return crossings / 2 / (2 * binary.size)


def astm_grain_size(intercept_um: float) -> float:
    """ASTM grain-size number G = -3.288 - 6.643856 log10(mean lineal intercept in mm) (E112)."""
    if not intercept_um > 0 or math.isinf(intercept_um):
        return math.nan
    return -3.288 - 6.643856 * math.log10(intercept_um / 1000)


def measure_class(
    binary: Array,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    grains: bool = False,
) -> tuple[Row, Particles]:
    """Measure one class of one picture.

    Args:
        binary: (H, W), true where the class is.
        um_per_px: side of a pixel in micrometres; None: everything in px.
        minimum_px: smallest area of a particle.
        grains: each particle is one grain, so that a grain-size number has a meaning.

    Returns:
        The particles, and a row (``u`` stands for um or px):

        * ``area_fraction``: pixels of the class / all pixels (E562, E1245).
        * ``particles_whole``, ``particles_cut``, ``number`` = whole + cut / 2, and
          ``number_per_mm2`` (or ``_Mpx``): number / area of the field, N_A (E1245, E112).
        * of whole particles ``mean_``, ``median_``, ``max_area_u2``; ``mean_``, ``std_``, ``d10_``,
          ``d50_``, ``d90_diameter_u`` (circle of equal area; percentiles by number); ``mean_``,
          ``max_length_u`` and ``mean_aspect_ratio`` (smallest rectangle).
        * ``mean_intercept_u`` = A_A / N_L, mean chord through a particle (E1245, E112), and
          ``mean_free_path_u`` = (1 - A_A) / N_L, mean distance from edge to edge (E1245). A_A and
          N_L are of the particles without the noise.
        * ``astm_g``: of ``mean_intercept_um``, only of grains with a scale (E112).
    """
    u, s = unit_of(um_per_px), um_per_px or 1.0
    particles, _, clean = find_particles(binary, minimum_px)
    whole = particles.inside()
    number = len(whole.area) + (len(particles.area) - len(whole.area)) / 2
    fraction, lines = np.count_nonzero(clean) / clean.size, intercepts_per_px(clean)
    area, diameter, length = whole.area * s * s, whole.diameter * s, whole.length * s
    d10, d50, d90 = np.percentile(diameter, (10, 50, 90)) if len(diameter) else [math.nan] * 3
    row = {
        "area_fraction": np.count_nonzero(binary) / binary.size,
        "particles_whole": len(whole.area),
        "particles_cut": len(particles.area) - len(whole.area),
        "number": number,
        density_column(um_per_px): number * 1e6 / (binary.size * s * s),
        f"mean_area_{u}2": _mean(area),
        f"median_area_{u}2": float(np.median(area)) if len(area) else math.nan,
        f"max_area_{u}2": float(area.max()) if len(area) else math.nan,
        f"mean_diameter_{u}": _mean(diameter),
        f"std_diameter_{u}": float(diameter.std(ddof=1)) if len(diameter) > 1 else math.nan,
        f"d10_diameter_{u}": float(d10),
        f"d50_diameter_{u}": float(d50),
        f"d90_diameter_{u}": float(d90),
        f"mean_length_{u}": _mean(length),
        f"max_length_{u}": float(length.max()) if len(length) else math.nan,
        "mean_aspect_ratio": _mean(whole.aspect),
        f"mean_intercept_{u}": fraction / lines * s if lines else math.nan,
        f"mean_free_path_{u}": (1 - fraction) / lines * s if lines else math.nan,
    }
    known = grains and um_per_px is not None
    row["astm_g"] = astm_grain_size(row[f"mean_intercept_{u}"]) if known else math.nan
    return row, particles


def measure_mask(
    mask: Array,
    num_classes: int,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    grain_classes: Sequence[int] = (),
) -> tuple[list[Row], list[Particles]]:
    """Measure every class of a mask of class ids (H, W): see ``measure_class``.

    Returns:
        One row per class 0 ... C-1, which begins with ``class``, and the particles of each.
    """
    measured = [
        measure_class(mask == c, um_per_px, minimum_px, c in grain_classes)
        for c in range(num_classes)
    ]
    return [{"class": c, **row} for c, (row, _) in enumerate(measured)], [p for _, p in measured]


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan


# --- a set of pictures ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Statistics of a quantity over the fields of a set (ASTM E562, section on statistics).

    Attributes:
        fields: number of values that are known (not nan).
        mean, std: mean and sample standard deviation (n - 1).
        confidence: half-width of the 95 % confidence interval, t * std / sqrt(n).
        relative_accuracy: 100 * confidence / mean, in percent.
    """

    fields: int
    mean: float
    std: float
    confidence: float
    relative_accuracy: float


def over_fields(values: Iterable[float]) -> Interval:
    """Mean over fields with its 95 % confidence interval by Student's t."""
    known = np.array([v for v in values if not math.isnan(v)], float)
    n = len(known)
    mean = _mean(known)
    if n < 2:
        return Interval(n, mean, math.nan, math.nan, math.nan)
    std = float(known.std(ddof=1))
    confidence = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Interval(n, mean, std, confidence, 100 * confidence / mean if mean else math.nan)


def by_batch(rows: Sequence[Row], um_per_px: float | None = None) -> list[Row]:
    """Pool the rows of pictures by production batch and class.

    Args:
        rows: of ``measure_class``, with ``batch`` and ``class``. Batches that are numbers, such as
            holding times, come in their order.
        um_per_px: as the rows were made with.

    Returns:
        A row per batch and class: ``fields``, area fraction and number density with mean and
        confidence over the fields, and mean area, diameter, length and aspect ratio over all whole
        particles of the batch (each particle counts alike, not each field).
    """
    u, density = unit_of(um_per_px), density_column(um_per_px)
    pooled = []
    for batch, c in sorted({(r["batch"], r["class"]) for r in rows}, key=_batch_order):
        mine = [r for r in rows if r["batch"] == batch and r["class"] == c]
        row: Row = {"batch": batch, "class": c, "fields": len(mine)}
        for name in ("area_fraction", density):
            interval = over_fields(r[name] for r in mine)
            row |= {name: interval.mean, f"{name}_ci95": interval.confidence}
        row["particles_whole"] = total = sum(r["particles_whole"] for r in mine)
        for name in (f"area_{u}2", f"diameter_{u}", f"length_{u}", "aspect_ratio"):
            found = [r for r in mine if r["particles_whole"]]
            summed = math.fsum(r[f"mean_{name}"] * r["particles_whole"] for r in found)
            row[f"mean_{name}"] = summed / total if total else math.nan
        pooled.append(row)
    return pooled


def _batch_order(key: tuple[str, int]) -> tuple[bool, float, str, int]:
    batch, c = key
    try:
        return False, float(batch), batch, c
    except ValueError:
        return True, 0.0, batch, c


# --- against masks made by hand -------------------------------------------------------------------


def compare_class(
    truth: Array,
    prediction: Array,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    boundary_px: float = BOUNDARY_PX,
) -> Row:
    """Compare the measurements of one class in a predicted and in a true mask.

    Args:
        truth, prediction: bool (H, W).
        um_per_px, minimum_px: as in ``measure_class``.
        boundary_px: how far apart outlines may lie and still agree.

    Returns:
        * ``area_fraction_error``, ``number_error``: prediction minus truth.
        * ``ks_diameter``: Kolmogorov-Smirnov distance of the diameters of whole particles, 0 ... 1.
        * ``boundary_f1`` (Csurka et al., BMVC 2013): harmonic mean of the shares of outline pixels
          that lie within ``boundary_px`` of the other outline.
        * ``hausdorff95_u``: the larger of the two 95th percentiles of the distances from one
          outline to the other; inf when only one mask has the class.
        * ``found_<a>_px``, ``true_<a>_px``: of the true particles with an area of at least a and
          below the next of ``RECALL_EDGES_PX``, how many are found (at least half of their pixels
          predicted so), and how many there are.
    """
    real, labels, _ = find_particles(truth, minimum_px)
    hits = np.zeros(len(real.area) + 1, np.int64)
    for top in range(0, labels.shape[0], _ROWS):
        rows = slice(top, top + _ROWS)
        hits += np.bincount(labels[rows][prediction[rows]], minlength=len(hits))
    hits = hits[1:]
    del labels  # four bytes a pixel, of what may be a large picture
    mine = find_particles(prediction, minimum_px)[0]
    f1, distance = boundary_agreement(truth, prediction, boundary_px)
    row: Row = {
        "area_fraction_error": float(prediction.mean() - truth.mean()),
        "number_error": _number(mine) - _number(real),
        "ks_diameter": kolmogorov_smirnov(mine.inside().diameter, real.inside().diameter),
        "boundary_f1": f1,
        f"hausdorff95_{unit_of(um_per_px)}": distance * (um_per_px or 1.0),
    }
    size = np.searchsorted(RECALL_EDGES_PX, real.area, side="right") - 1
    for i, edge in enumerate(RECALL_EDGES_PX):
        row[f"found_{edge}_px"] = int(((2 * hits >= real.area) & (size == i)).sum())
        row[f"true_{edge}_px"] = int((size == i).sum())
    return row


def _number(particles: Particles) -> float:
    return float(len(particles.area) - particles.border.sum() / 2)


def kolmogorov_smirnov(first: Array, second: Array) -> float:
    """Largest distance of two samples' cumulative distributions; nan if one is empty."""
    if not len(first) or not len(second):
        return math.nan
    at = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(v), at, side="right") / len(v) for v in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def outline(binary: Array) -> Array:
    """Pixels (H, W) of a class with a side next to a pixel of another; the frame is no outline."""
    pixels = np.ascontiguousarray(binary, np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return (pixels != 0) & (cv2.erode(pixels, cross) == 0)


def boundary_agreement(
    truth: Array, prediction: Array, boundary_px: float = BOUNDARY_PX
) -> tuple[float, float]:
    """Boundary F1 and 95 % Hausdorff distance in px of two masks (H, W) of one class.

    Returns:
        (nan, nan) if neither has an outline, (0, inf) if one has none.
    """
    edges = outline(truth), outline(prediction)
    if not edges[0].any() or not edges[1].any():
        none = not edges[0].any() and not edges[1].any()
        return (math.nan, math.nan) if none else (0.0, math.inf)
    shares, distances = [], []
    for own, other in (edges, edges[::-1]):
        field = cv2.distanceTransform((~other).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        apart = field[own]
        # The precise transform still rounds: exactly 2 px may come out as 2.0000002.
        shares.append(float((apart <= boundary_px + 1e-3).mean()))
        distances.append(float(np.percentile(apart, 95)))
    total = sum(shares)
    return (2 * shares[0] * shares[1] / total if total else 0.0), max(distances)


def recall_by_size(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Sum rows of ``compare_class``: (size class in words, found, true) per class of size."""
    rows = list(rows)
    bounds = [*map(str, RECALL_EDGES_PX[1:]), ""]
    return [
        (
            f"{edge} ... {end} px" if end else f"{edge} px and more",
            sum(r[f"found_{edge}_px"] for r in rows),
            sum(r[f"true_{edge}_px"] for r in rows),
        )
        for edge, end in zip(RECALL_EDGES_PX, bounds, strict=True)
    ]
