"""Quantitative metallography on masks of class ids: fractions, counts, sizes, spacings.

Conventions, which hold for every number here:

* What a particle is stands in ``metallography.particles``.
* The area fraction counts every labelled pixel, noise and cut particles included
  (ASTM E562, E1245: each pixel is a point of the grid).
* Pixels of class 255 (``IGNORED``: unlabelled, outside the region of interest) count in no
  fraction, no length and no area of the field; a particle that touches them is cut.
* Specks of a class and holes in it of fewer than ``minimum_px`` pixels are noise: for numbers,
  sizes, chords, free paths and grain size alike, not for the area fraction.
* A particle that the frame cuts counts as one half, as a quarter at a corner (planimetric rule of
  Jeffries and Saltykov, ASTM E112). Its size is unknown, so all sizes are of whole particles. Large
  particles are cut more often than small ones: where particles are not small against the field,
  mean sizes come out too low.
* Lengths are in the unit of the scale: um with ``um_per_px``, else px. Densities are per 10^6
  square units: per mm2 with a scale, per megapixel (Mpx) without.
* What cannot be known (no particle, one field) is nan.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import cv2
import numpy as np

# SciPy is installed with scikit-learn, which requires it.
from scipy.special import stdtrit  # type: ignore[import-untyped]

from config import ConfigError
from metallography.particles import (
    MINIMUM_PX,
    Array,
    Particles,
    Row,
    fill_holes,
    find_particles,
    nearest_labels,
    row_bands,
    unit_of,
)
from utils.files import DataError
from utils.metrics import IGNORED
from utils.tables import percent

BOUNDARY_PX = 2.0
G_OF_ONE_MM, G_OF_A_TENTH = -3.288, 6.643856  # of an intercept of 1 mm, and more of a tenth (E112)
OUTLYING = 3.5  # robust z-scores (Iglewicz and Hoaglin 1993)
LEAST_OFF = 0.15  # area fraction by which an outlier differs at least
ROUNDING = 1e-12  # of a mean: what standard deviation is none
RECALL_EDGES_PX = (0, 32, 100, 316, 1000, 3162)
"""Areas in pixels at which the ranges of particle size begin, half a decade each."""

# The columns of ``measure_class`` that count or size particles, one by one, without their units:
# of a matrix, whose pieces are islands between the other phases, people are not shown them.
OF_PARTICLES = frozenset((
    "particles_whole", "particles_cut", "number", "number_per",
    "mean_area", "median_area", "max_area",
    "mean_diameter", "std_diameter", "d10_diameter", "d50_diameter", "d90_diameter",
    "mean_length", "max_length", "mean_aspect_ratio",
))  # fmt: skip

# Those that are ratios of what test lines cover and meet, over fields as in one (``mean_over``).
OF_LINES = ("mean_intercept", "mean_free_path")

Terms = tuple[float | None, int, Sequence[int], int | None, Sequence[int] | None]
"""um_per_px, minimum_px, grain_classes, connectivity, boundary_classes: see ``measure_mask``."""


def without_unit(column: str) -> str:
    """The name of a column of ``measure_class`` without its unit."""
    return re.sub("_(um2?|px2?|mm2|Mpx)$", "", column)


def density_column(um_per_px: float | None) -> str:
    """The column of the number density."""
    return "number_per_Mpx" if um_per_px is None else "number_per_mm2"


def particles_met(labels: Array, ignored: Array | None = None) -> float:
    """N, particles met by test lines; every row and every column of labels (H, W) is a test line.

    A particle met is two crossings of its outline. One that is cut by the frame or by what is
    ``ignored`` is one crossing, so a half (ASTM E112: a line that ends in a grain counts half).
    """
    ends = 0
    pairs = [(labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])]
    for axis, (here, there) in zip((1, 0), pairs, strict=True):
        crossed = here != there
        if ignored is not None:
            known = np.moveaxis(~ignored, axis, 0)
            crossed &= np.moveaxis(known[1:] & known[:-1], 0, axis)
        ends += int(np.count_nonzero(here[crossed])) + int(np.count_nonzero(there[crossed]))
    return ends / 2


def grain_intercept(
    labels: Array, others: Array | None = None, ignored: Array | None = None
) -> float:
    """E112's mean lineal intercept of grains in px: length of test line / grains met; or nan.

    Where boundaries are a class of their own, a chord ends at the boundary's edge, but the grain
    only in its middle. So grains (``labels`` (H, W)) first grow to the middle of the gaps between
    them; a gap as wide as the grains' mean chord or wider is no boundary but another phase, of
    which no line is counted: L is the line in grains alone, E112's rule for two phases. ``others``
    (H, W) is true where grains of another class, or what is no boundary, stop the growth.
    """
    grains = labels > 0
    met = particles_met(labels, ignored)
    if not met:
        return math.nan
    sources = grains if others is None else grains | others
    height, width = labels.shape
    goes_on = sources  # beyond the field as at its edge
    if ignored is not None:
        height, width = ((~ignored).any(axis=axis).sum() for axis in (1, 0))
        goes_on = nearest_labels(sources.astype(np.int32), ~ignored, ignored) > 0
    # Few large grains have chords longer than the field; nothing so wide is a boundary.
    reach = min(2 * np.count_nonzero(grains) / met, min(height, width) / 2) / 2
    gaps = _closed(goes_on, reach) & ~sources
    if ignored is not None:
        gaps &= ~ignored
    grown = nearest_labels(labels, sources, gaps)
    met = particles_met(grown, ignored)
    return 2 * int(np.count_nonzero(grown)) / met if met else math.nan


def _closed(binary: Array, radius: float) -> Array:
    """Morphological closing of a mask (H, W) by a disc; beyond the frame its edge goes on."""
    edge = math.ceil(radius) + 2
    radius += 1e-3  # the precise transform still rounds
    far = np.pad(~binary, edge, mode="edge").view(np.uint8)
    near = cv2.distanceTransform(far, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= radius
    depth = cv2.distanceTransform(near.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return binary | (depth[edge:-edge, edge:-edge] > radius)


def astm_grain_size(intercept_um: float) -> float:
    """ASTM grain-size number G = -3.288 - 6.643856 log10(mean lineal intercept in mm) (E112)."""
    if not intercept_um > 0 or math.isinf(intercept_um):
        return math.nan
    return G_OF_ONE_MM - G_OF_A_TENTH * math.log10(intercept_um / 1000)


def check_terms(
    num_classes: int,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    grain_classes: Sequence[int] = (),
    connectivity: int | None = None,
    boundary_classes: Sequence[int] | None = None,
) -> None:
    """ConfigError, one line, unless a mask can be measured so (see ``measure_mask``)."""
    unit_of(um_per_px)
    if not 1 <= minimum_px < math.inf:
        raise ConfigError(f"--min_px: found {minimum_px}; give a number of at least 1")
    if connectivity not in (None, 4, 8):
        raise ConfigError(f"--connectivity: found {connectivity}; give 4 or 8, or leave it out")
    named = {"grain_classes": grain_classes, "boundary_classes": boundary_classes or ()}
    for name, classes in named.items():
        for c in classes:
            if c not in range(num_classes):
                raise ConfigError(f"--{name}: found {c}; classes are 0 ... {num_classes - 1}")
    both = set(grain_classes) & set(boundary_classes or ())
    if both:
        raise ConfigError(f"--boundary_classes: found {min(both)}, a grain class; it is only one")


def connectivity_of(grains: bool, connectivity: int | None = None) -> int:
    """How pixels of a particle touch: as given, else 4 for grains and 8 for all others."""
    return connectivity or (4 if grains else 8)


def measure_class(
    binary: Array,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    grains: bool = False,
    connectivity: int | None = None,
    ignored: Array | None = None,
    others: Array | None = None,
) -> tuple[Row, Particles]:
    """Measure one class of one image (H, W), true where the class is.

    With ``grains`` each particle is one grain, so that a grain-size number has a meaning;
    ``others`` see ``grain_intercept``, ``connectivity`` see ``connectivity_of``. ``ignored`` (H, W)
    is true where no class is known: those pixels are not part of the field.
    Returns a row (``u`` stands for um or px), and the particles:

    * ``area_fraction``: pixels of the class / all pixels (E562, E1245).
    * ``particles_whole``, ``particles_cut``, ``number`` = whole + cut / 2, or / 4 at a corner of
      the frame, and ``number_per_mm2`` (or ``_Mpx``): number / area of the field, N_A (E1245,
      E112).
    * of whole particles ``mean_``, ``median_``, ``max_area_u2``; ``mean_``, ``std_``, ``d10_``,
      ``d50_``, ``d90_diameter_u`` (circle of equal area; percentiles by number); ``mean_``,
      ``max_length_u`` and ``mean_aspect_ratio`` (smallest rectangle).
    * ``area_fraction_counted``, A_A of the next two: that of the particles without the noise, and
      with their holes of fewer than ``minimum_px`` pixels filled.
    * ``mean_intercept_u`` = A_A / N_L, mean chord through a particle (E1245), and
      ``mean_free_path_u`` = (1 - A_A) / N_L, mean distance from edge to edge (E1245).
    * ``grain_intercept_u``, of grains only: line / grains met (E112), see ``grain_intercept``.
    * ``astm_g``: of ``grain_intercept_um``, so only of grains with a scale (E112).
    """
    u, s = unit_of(um_per_px), um_per_px or 1.0
    field = int(binary.size if ignored is None else np.count_nonzero(~ignored))
    connected = connectivity_of(grains, connectivity)
    particles, labels = find_particles(binary, minimum_px, connected, ignored)
    fill_holes(labels, minimum_px, ignored)
    covered, met = int(np.count_nonzero(labels)), particles_met(labels, ignored)
    line_per_grain = grain_intercept(labels, others, ignored) * s if grains else math.nan
    del labels  # four bytes a pixel; the image may be large
    row = {
        "area_fraction": int(np.count_nonzero(binary)) / field if field else math.nan,
        "particles_whole": int(np.count_nonzero(~particles.border)),
        "particles_cut": int(np.count_nonzero(particles.border)),
        "number": particles.number,
        density_column(um_per_px): particles.number * 1e6 / (field * s * s) if field else math.nan,
        **_sizes(particles.whole(), u, s),
        "area_fraction_counted": covered / field if field else math.nan,
        # Rows and columns are 2 px of line for each pixel of the field.
        f"mean_intercept_{u}": 2 * covered / met * s if met else math.nan,
        f"mean_free_path_{u}": 2 * (field - covered) / met * s if met else math.nan,
        f"grain_intercept_{u}": line_per_grain,
    }
    row["astm_g"] = astm_grain_size(line_per_grain) if um_per_px is not None else math.nan
    return row, particles


def _sizes(whole: Particles, u: str, s: float) -> Row:
    """The columns of ``measure_class`` on the sizes of whole particles, a pixel being s u wide."""
    area, diameter, length = whole.area * s * s, whole.diameter * s, whole.length * s
    spread = np.percentile(diameter, (10, 50, 90)).tolist() if len(diameter) else [math.nan] * 3
    return {
        f"mean_area_{u}2": _known(np.mean, area),
        f"median_area_{u}2": _known(np.median, area),
        f"max_area_{u}2": _known(np.max, area),
        f"mean_diameter_{u}": _known(np.mean, diameter),
        f"std_diameter_{u}": _std(diameter),
        **{f"d{n}_diameter_{u}": value for n, value in zip((10, 50, 90), spread, strict=True)},
        f"mean_length_{u}": _known(np.mean, length),
        f"max_length_{u}": _known(np.max, length),
        "mean_aspect_ratio": _known(np.mean, whole.aspect),
    }


def measure_mask(
    mask: Array,
    num_classes: int,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    grain_classes: Sequence[int] = (),
    connectivity: int | None = None,
    boundary_classes: Sequence[int] | None = None,
) -> tuple[list[Row], list[Particles]]:
    """``measure_class`` of every class of a mask of class ids (H, W); rows begin with ``class``.

    Pixels of 255 (``IGNORED``) are not part of the field. Grain boundaries are the pixels of
    ``boundary_classes``, by default of every class that is no grain class. ConfigError if a term is
    out of range, DataError if the mask is none or holds other values.
    """
    check_terms(num_classes, um_per_px, minimum_px, grain_classes, connectivity, boundary_classes)
    if mask.ndim != 2 or not mask.size:
        raise DataError(f"mask: found shape {mask.shape}; give class ids of shape (H, W)")
    without = mask == IGNORED
    wrong = ((mask < 0) | (mask >= num_classes)) & ~without
    if wrong.any():
        raise DataError(
            f"mask: value {mask[wrong][0]} where there are {num_classes} classes; class ids are "
            f"0 ... {num_classes - 1}, and {IGNORED} where no class is known"
        )
    ignored = without if without.any() else None
    stops = set(grain_classes)
    if boundary_classes is not None:
        stops = set(range(num_classes)) - set(boundary_classes)
    rows, particles = [], []
    for c in range(num_classes):
        grains = c in grain_classes
        others = np.isin(mask, [*(stops - {c})]) if grains and stops - {c} else None
        binary = mask == c
        row, found = measure_class(
            binary, um_per_px, minimum_px, grains, connectivity, ignored, others
        )
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
    confidence: float  # half-width of the 95 % confidence interval, t * std / sqrt(n); no std: nan
    relative_accuracy: float  # 100 * confidence / mean, in percent


def over_fields(values: Iterable[float], weights: Iterable[float] | None = None) -> Interval:
    """Mean over fields with its 95 % confidence interval by Student's t.

    ``weights`` are the fields' areas: what is measured per area is then the mean over the whole
    area, and its error that of a ratio (Cochran, Sampling Techniques, 1977, chapter 6). Equal ones,
    and None, give the mean of the fields. Of fields that are all equal nobody knows the interval.
    """
    values = list(values)
    pairs = zip(values, [1.0] * len(values) if weights is None else weights, strict=True)
    known = np.array([(v, w) for v, w in pairs if not math.isnan(v)], float).reshape(-1, 2)
    value, weight = known.T
    n, mean, std = len(value), _known(np.mean, value), _std(value)
    if std <= ROUNDING * abs(mean):  # equal values, whose mean is rounded
        std = 0.0
    error = std / math.sqrt(n) if n else math.nan
    if n and not (weight == weight[0]).all():
        share = weight / weight.sum()
        mean = float(share @ value)
        off = (value - mean) ** 2
        std, error = (math.sqrt(n / (n - 1) * float(s @ off)) for s in (share, share**2))
        std, error = (0.0, 0.0) if std <= ROUNDING * abs(mean) else (std, error)
    confidence = float(stdtrit(n - 1, 0.975)) * error if n > 1 and std else math.nan
    return Interval(n, mean, std, confidence, 100 * confidence / mean if mean else math.nan)


def ratio_over_fields(above: Sequence[float], below: Sequence[float]) -> Interval:
    """The sum of ``above`` / the sum of ``below``, an entry a field, with its 95 % interval.

    Its error is the linearised one of a ratio of means, sqrt(n / (n - 1) * sum (above - ratio *
    below)^2) / sum below (Cochran, Sampling Techniques, 1977, chapter 6); ``std`` is sqrt(n) times
    that. A field with 0 in both says nothing of the ratio, and is none of the n.
    """
    found = np.array([pair for pair in zip(above, below, strict=True) if any(pair)], float)
    over, under = found.reshape(-1, 2).T
    n, whole = len(over), float(under.sum())
    if not whole:
        return Interval(0, math.nan, math.nan, math.nan, math.nan)
    ratio = float(over.sum()) / whole
    off = float(((over - ratio * under) ** 2).sum())
    error = math.sqrt(n / (n - 1) * off) / whole if n > 1 else math.nan
    std = math.sqrt(n) * error
    std = 0.0 if std <= ROUNDING * abs(ratio) else std
    confidence = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n) if n > 1 and std else math.nan
    return Interval(n, ratio, std, confidence, 100 * confidence / ratio if ratio else math.nan)


def areas_of(rows: Sequence[Row]) -> list[float]:
    """The areas of the fields of rows with ``field_px`` and, with a scale, ``um_per_px``.

    In square micrometres if every scale is known, else in pixels; all 1 where areas are not known.
    So rows whose value is not known have to be left out before, see ``mean_over``.
    """
    scales = [float(row.get("um_per_px") or math.nan) for row in rows]
    scales = [1.0] * len(rows) if any(map(math.isnan, scales)) else scales
    return [row.get("field_px", 1.0) * um**2 for row, um in zip(rows, scales, strict=True)]


def mean_over(rows: Sequence[Row], column: str, factor: float = 1.0) -> Interval:
    """``over_fields`` of ``factor`` times a column, each field weighted by its area.

    Fields that have no value of it, such as a length without a scale, decide no other's weight.
    The ASTM grain-size number is that of the mean intercept, not the mean of the fields' numbers
    (E112: G is of the mean of what was measured), its half-width by the slope of G there. Mean
    intercept and mean free path are ratios over all fields as they are in one (E1245), so that a
    field with few particles counts for few: A_A or 1 - A_A, and N_L, are summed by area, see
    ``ratio_over_fields``. A field without a particle has all of its length free.
    """
    if without_unit(column) in OF_LINES:
        return _over_lines(rows, column, factor)
    known = [row for row in rows if not math.isnan(row[column])]
    if column != "astm_g" or not known:
        return over_fields([factor * row[column] for row in known], areas_of(known))
    of = mean_over(known, "grain_intercept_um")
    g, slope = astm_grain_size(of.mean), G_OF_A_TENTH / (math.log(10) * of.mean)
    half = slope * of.confidence
    return Interval(of.fields, g, slope * of.std, half, 100 * half / g if g else math.nan)


def _over_lines(rows: Sequence[Row], column: str, factor: float) -> Interval:
    """``mean_over`` of one of ``OF_LINES``; A_A and N_L follow from both of them."""
    kind, u = column.rsplit("_", 1)
    scales = [row.get("um_per_px", 1.0) if u == "um" else 1.0 for row in rows]
    parts = [row["area_fraction_counted"] * um for row, um in zip(rows, scales, strict=True)]
    known = [row for row, part in zip(rows, parts, strict=True) if not math.isnan(part)]
    above, below = [], []
    for row, area in zip(known, areas_of(known), strict=True):
        chord, path = row[f"mean_intercept_{u}"], row[f"mean_free_path_{u}"]
        met = 0.0 if math.isnan(chord) else 1 / (chord + path)  # N_L
        covered = row["area_fraction_counted"]
        above.append(factor * area * (covered if kind == OF_LINES[0] else 1 - covered))
        below.append(area * met)
    return ratio_over_fields(above, below)


def by_batch(rows: Sequence[Row], um_per_px: float | None = None) -> list[Row]:
    """Pool rows of ``measure_class``, with ``batch`` and ``class``, by production batch and class.

    Batches that are numbers, such as holding times, come in their order. A row holds ``fields``;
    area fraction, number density, mean intercept and mean free path with mean and confidence over
    the fields (``mean_over``), where some class is of grains also their intercept and G; and mean
    area, diameter, length and aspect ratio over all whole particles of the batch (each particle
    counts alike, not each field) in images whose scale is known.
    """
    u, density = unit_of(um_per_px), density_column(um_per_px)
    pooled, found = [], defaultdict[tuple[str, int], list[Row]](list)
    for one in rows:
        found[one["batch"], one["class"]].append(one)
    sizes = [f"grain_intercept_{u}", "astm_g"]
    grains = sizes if any(not math.isnan(one[sizes[0]]) for one in rows) else []
    lines = [f"{name}_{u}" for name in OF_LINES]
    for batch, c in sorted(found, key=_batch_order):
        fields = found[batch, c]
        row: Row = {"batch": batch, "class": c, "fields": len(fields)}
        for name in ("area_fraction", density, *lines, *grains):
            interval = mean_over(fields, name)
            row |= {name: interval.mean, f"{name}_ci95": interval.confidence}
        row["particles_whole"] = sum(r["particles_whole"] for r in fields)
        for name in (f"area_{u}2", f"diameter_{u}", f"length_{u}", "aspect_ratio"):
            sized = [r for r in fields if not math.isnan(r[f"mean_{name}"])]
            summed = math.fsum(r[f"mean_{name}"] * r["particles_whole"] for r in sized)
            total = sum(r["particles_whole"] for r in sized)
            row[f"mean_{name}"] = summed / total if total else math.nan
        pooled.append(row)
    return pooled


def _batch_order(key: tuple[str, int]) -> tuple[bool, float, str, int]:
    batch, c = key
    with suppress(ValueError):
        if math.isfinite(number := float(batch)):
            return False, number, batch, c
    return True, 0.0, batch, c


def compare_class(
    truth: Array,
    prediction: Array,
    um_per_px: float | None = None,
    minimum_px: int = MINIMUM_PX,
    boundary_px: float = BOUNDARY_PX,
    connectivity: int = 8,
    ignored: Array | None = None,
) -> Row:
    """Compare a predicted and a true mask of one class, bool (H, W), see ``measure_class``.

    Where ``ignored`` (H, W) is true nothing is compared.

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
    field = int(truth.size)
    if ignored is not None:
        truth, prediction = truth & ~ignored, prediction & ~ignored
        field = int(np.count_nonzero(~ignored))
    more = int(np.count_nonzero(prediction)) - int(np.count_nonzero(truth))
    real, labels = find_particles(truth, minimum_px, connectivity, ignored)
    hits = np.zeros(len(real.area) + 1, np.int64)
    for rows in row_bands(len(labels)):
        hits += np.bincount(labels[rows][prediction[rows]], minlength=len(hits))
    del labels  # four bytes a pixel; the image may be large
    predicted = find_particles(prediction, minimum_px, connectivity, ignored)[0]
    f1, distance = boundary_agreement(truth, prediction, boundary_px, ignored)
    row: Row = {
        "area_fraction_error": more / field if field else math.nan,
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


def outline(binary: Array, ignored: Array | None = None) -> Array:
    """Pixels (H, W) of a class with a side next to a pixel of another.

    The frame, and the edge of what is ``ignored``, is no outline.
    """
    pixels = np.ascontiguousarray(binary if ignored is None else binary | ignored, np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return np.asarray(binary, bool) & (cv2.erode(pixels, cross) == 0)


def boundary_agreement(
    truth: Array,
    prediction: Array,
    boundary_px: float = BOUNDARY_PX,
    ignored: Array | None = None,
) -> tuple[float, float]:
    """Boundary F1 and 95 % Hausdorff distance in px of two masks (H, W) of one class.

    (nan, nan) if neither has an outline, (0, inf) if one has none.
    """
    edges = outline(truth, ignored), outline(prediction, ignored)
    outlined = [bool(edge.any()) for edge in edges]
    if not all(outlined):
        return (0.0, math.inf) if any(outlined) else (math.nan, math.nan)
    shares, distances = [], []
    for own, other in (edges, edges[::-1]):
        field = cv2.distanceTransform((~other).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # The precise transform still rounds, and in OpenCV 4.9 not alike in every run: exactly 2 px
        # may come out as 2.0000002. Squares of distances between pixels are whole numbers.
        apart = np.sqrt(np.rint(np.square(field[own], dtype=np.float64)))
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


def fractions_of(rows: Sequence[Row], classes: int) -> dict[str, list[float]]:
    """Area fractions of the classes by image, from the rows of ``measure_class``."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row["image"]), [math.nan] * classes)[row["class"]] = row[
            "area_fraction"
        ]
    return found


def robust_z(values: Sequence[float]) -> list[float]:
    """How far each value lies from the median, in 1.4826 median absolute deviations."""
    x = np.asarray(values, np.float64)
    off = x - np.median(x)
    spread = 1.4826 * np.median(np.abs(off))
    return (off / max(float(spread), 1e-3)).tolist()


def class_words(title: str) -> str:
    """The name of a class within a sentence: one that is a number is 'class 1'."""
    return f"class {title}" if title[:1].isdigit() else title


def outlying(
    fractions: Mapping[str, Sequence[float]], class_names: Sequence[str]
) -> dict[str, list[str]]:
    """Images with an area fraction far from the median of all: a reason for each such class."""
    reasons: dict[str, list[str]] = {}
    for c, title in enumerate(class_names):
        known = {name: own[c] for name, own in fractions.items() if not math.isnan(own[c])}
        middle = float(np.median(list(known.values()))) if known else 0.0
        for (name, value), z in zip(known.items(), robust_z(list(known.values())) if known else [],
                                    strict=True):  # fmt: skip
            if abs(z) > OUTLYING and abs(value - middle) > LEAST_OFF:
                own, usual = percent(value), percent(middle)
                said = f"{own} % of {class_words(title)}, where the median is {usual} %"
                reasons.setdefault(name, []).append(said)
    return reasons
