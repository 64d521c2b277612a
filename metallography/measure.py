"""Quantitative metallography on masks of class ids: fractions, counts, sizes, spacings.

Conventions, which hold for every number here:

* What a particle is stands in ``metallography.particles``.
* The area fraction counts every pixel of the class, noise and cut particles included
  (ASTM E562, E1245: each pixel is a point of the grid).
* A particle that the frame cuts counts as one half (Jeffries' planimetric rule, ASTM E112). Its
  size is unknown, so all sizes are of whole particles. Large particles are cut more often than
  small ones: where particles are not small against the field, mean sizes come out too low.
* Lengths are in the unit of the scale: um with ``um_per_px``, else px. Densities are per 10^6
  square units: per mm2 with a scale, per megapixel (Mpx) without.
* What cannot be known (no particle, one field) is nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

# SciPy is installed with scikit-learn, which requires it.
from scipy.special import stdtrit  # type: ignore[import-untyped]

from metallography.particles import (
    MINIMUM_PX,
    Array,
    Particles,
    Row,
    find_particles,
    row_bands,
    unit_of,
)

BOUNDARY_PX = 2.0
RECALL_EDGES_PX = (0, 32, 100, 316, 1000, 3162)
"""Areas in pixels at which the ranges of particle size begin, half a decade each."""


def density_column(um_per_px: float | None) -> str:
    """The column of the number density."""
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
    """Measure one class of one image (H, W), true where the class is.

    With ``grains`` each particle is one grain, so that a grain-size number has a meaning.
    Returns a row (``u`` stands for um or px), and the particles:

    * ``area_fraction``: pixels of the class / all pixels.
    * ``particles_whole``, ``particles_cut``, ``number`` = whole + cut / 2, and ``number_per_mm2``
      (or ``_Mpx``): number / area of the field, N_A (E1245, E112).
    * of whole particles ``mean_``, ``median_``, ``max_area_u2``; ``mean_``, ``std_``, ``d10_``,
      ``d50_``, ``d90_diameter_u`` (circle of equal area; percentiles by number); ``mean_``,
      ``max_length_u`` and ``mean_aspect_ratio`` (smallest rectangle).
    * ``mean_intercept_u`` = A_A / N_L, mean chord through a particle (E1245, E112), and
      ``mean_free_path_u`` = (1 - A_A) / N_L, mean distance from edge to edge (E1245). A_A and N_L
      are of the particles without the noise.
    * ``astm_g``: of ``mean_intercept_um``, only of grains with a scale (E112).
    """
    u, s = unit_of(um_per_px), um_per_px or 1.0
    particles, labels = find_particles(binary, minimum_px)
    clean = labels > 0
    del labels  # four bytes a pixel; the image may be large
    whole = particles.whole()
    fraction, lines = np.count_nonzero(clean) / clean.size, intercepts_per_px(clean)
    area, diameter, length = whole.area * s * s, whole.diameter * s, whole.length * s
    spread = np.percentile(diameter, (10, 50, 90)).tolist() if len(diameter) else [math.nan] * 3
    row = {
        "area_fraction": np.count_nonzero(binary) / binary.size,
        "particles_whole": len(whole.area),
        "particles_cut": len(particles.area) - len(whole.area),
        "number": particles.number,
        density_column(um_per_px): particles.number * 1e6 / (binary.size * s * s),
        f"mean_area_{u}2": _known(np.mean, area),
        f"median_area_{u}2": _known(np.median, area),
        f"max_area_{u}2": _known(np.max, area),
        f"mean_diameter_{u}": _known(np.mean, diameter),
        f"std_diameter_{u}": _std(diameter),
        **{f"d{n}_diameter_{u}": value for n, value in zip((10, 50, 90), spread, strict=True)},
        f"mean_length_{u}": _known(np.mean, length),
        f"max_length_{u}": _known(np.max, length),
        "mean_aspect_ratio": _known(np.mean, whole.aspect),
        f"mean_intercept_{u}": fraction / lines * s if lines else math.nan,
        f"mean_free_path_{u}": (1 - fraction) / lines * s if lines else math.nan,
    }
    graded = grains and um_per_px is not None
    row["astm_g"] = astm_grain_size(row[f"mean_intercept_{u}"]) if graded else math.nan
    return row, particles


def measure_mask(
    mask: Array,
    num_classes: int,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    grain_classes: Sequence[int] = (),
) -> tuple[list[Row], list[Particles]]:
    """``measure_class`` of every class of a mask of class ids (H, W); rows begin with ``class``."""
    rows, particles = [], []
    for c in range(num_classes):
        row, found = measure_class(mask == c, um_per_px, minimum_px, c in grain_classes)
        rows.append({"class": c, **row})
        particles.append(found)
    return rows, particles


def _known(statistic: Callable[[Array], Any], values: Array) -> float:
    """A statistic of the values; nan where there are none."""
    return float(statistic(values)) if len(values) else math.nan


def _std(values: Array) -> float:
    """Sample standard deviation (n - 1); nan of fewer than two values."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


class Interval(NamedTuple):
    """Statistics of a quantity over the fields of a set (ASTM E562, section on statistics)."""

    fields: int  # number of values that are known (not nan)
    mean: float
    std: float  # sample standard deviation (n - 1)
    confidence: float  # half-width of the 95 % confidence interval, t * std / sqrt(n)
    relative_accuracy: float  # 100 * confidence / mean, in percent


def over_fields(values: Iterable[float]) -> Interval:
    """Mean over fields with its 95 % confidence interval by Student's t."""
    known = np.array([v for v in values if not math.isnan(v)], float)
    n, mean, std = len(known), _known(np.mean, known), _std(known)
    confidence = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n) if n > 1 else math.nan
    return Interval(n, mean, std, confidence, 100 * confidence / mean if mean else math.nan)


def by_batch(rows: Sequence[Row], um_per_px: float | None = None) -> list[Row]:
    """Pool rows of ``measure_class``, with ``batch`` and ``class``, by production batch and class.

    Batches that are numbers, such as holding times, come in their order. A row holds ``fields``,
    area fraction and number density with mean and confidence over the fields, and mean area,
    diameter, length and aspect ratio over all whole particles of the batch (each particle counts
    alike, not each field).
    """
    u, density = unit_of(um_per_px), density_column(um_per_px)
    pooled = []
    for batch, c in sorted({(r["batch"], r["class"]) for r in rows}, key=_batch_order):
        fields = [r for r in rows if r["batch"] == batch and r["class"] == c]
        row: Row = {"batch": batch, "class": c, "fields": len(fields)}
        for name in ("area_fraction", density):
            interval = over_fields(r[name] for r in fields)
            row |= {name: interval.mean, f"{name}_ci95": interval.confidence}
        row["particles_whole"] = total = sum(r["particles_whole"] for r in fields)
        found = [r for r in fields if r["particles_whole"]]
        for name in (f"area_{u}2", f"diameter_{u}", f"length_{u}", "aspect_ratio"):
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


def compare_class(
    truth: Array,
    prediction: Array,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    boundary_px: float = BOUNDARY_PX,
) -> Row:
    """Compare a predicted and a true mask of one class, bool (H, W), see ``measure_class``.

    * ``area_fraction_error``, ``number_error``: prediction minus truth.
    * ``ks_diameter``: Kolmogorov-Smirnov distance of the diameters of whole particles, 0 ... 1.
    * ``boundary_f1`` (Csurka et al., BMVC 2013): harmonic mean of the shares of outline pixels that
      lie within ``boundary_px`` of the other outline.
    * ``hausdorff95_u``: the larger of the two 95th percentiles of the distances from one outline to
      the other; inf when only one mask has the class.
    * ``found_<a>_px``, ``true_<a>_px``: of the true particles with an area of at least a and below
      the next of ``RECALL_EDGES_PX``, how many are found (at least half of their pixels predicted
      as their class), and how many there are.
    """
    real, labels = find_particles(truth, minimum_px)
    hits = np.zeros(len(real.area) + 1, np.int64)
    for rows in row_bands(len(labels)):
        hits += np.bincount(labels[rows][prediction[rows]], minlength=len(hits))
    del labels  # four bytes a pixel; the image may be large
    predicted = find_particles(prediction, minimum_px)[0]
    f1, distance = boundary_agreement(truth, prediction, boundary_px)
    row: Row = {
        "area_fraction_error": float(prediction.mean() - truth.mean()),
        "number_error": predicted.number - real.number,
        "ks_diameter": kolmogorov_smirnov(predicted.whole().diameter, real.whole().diameter),
        "boundary_f1": f1,
        f"hausdorff95_{unit_of(um_per_px)}": distance * (um_per_px or 1.0),
    }
    found = 2 * hits[1:] >= real.area
    size = np.searchsorted(RECALL_EDGES_PX, real.area, side="right") - 1
    for i, edge in enumerate(RECALL_EDGES_PX):
        row[f"found_{edge}_px"] = int((found & (size == i)).sum())
        row[f"true_{edge}_px"] = int((size == i).sum())
    return row


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

    (nan, nan) if neither has an outline, (0, inf) if one has none.
    """
    edges = outline(truth), outline(prediction)
    outlined = [bool(edge.any()) for edge in edges]
    if not all(outlined):
        return (0.0, math.inf) if any(outlined) else (math.nan, math.nan)
    shares, distances = [], []
    for own, other in (edges, edges[::-1]):
        field = cv2.distanceTransform((~other).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        apart = field[own]
        # The precise transform still rounds: exactly 2 px may come out as 2.0000002.
        shares.append(float((apart <= boundary_px + 1e-3).mean()))
        distances.append(float(np.percentile(apart, 95)))
    total = sum(shares)
    return (2 * shares[0] * shares[1] / total if total else 0.0), max(distances)


def recall_by_size(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """Sum rows of ``compare_class``: (range of areas in words, found, true) for each range."""
    ends = [f" ... {end} px" for end in RECALL_EDGES_PX[1:]] + [" px and more"]
    summed = []
    for edge, end in zip(RECALL_EDGES_PX, ends, strict=True):
        found, true = (sum(row[f"{kind}_{edge}_px"] for row in rows) for kind in ("found", "true"))
        summed.append((f"{edge}{end}", found, true))
    return summed
