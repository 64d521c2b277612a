"""Measurements of shapes whose answer is known by hand, and slow twins."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

# SciPy is installed with scikit-learn, which requires it.
from scipy import ndimage, stats  # type: ignore[import-untyped]

from config import ConfigError
from metallography import measure
from metallography.measure import (
    areas_of,
    astm_grain_size,
    boundary_agreement,
    by_batch,
    compare_class,
    kolmogorov_smirnov,
    mean_over,
    measure_class,
    measure_mask,
    over_fields,
    recall_by_size,
)
from metallography.particles import without_scale
from metallography.summary import of_particles
from tests.masks import blobs, disc, field
from utils.files import DataError

# ---------------------------------------------------------------- one picture, by hand


def test_rectangles_by_hand() -> None:
    # 10x40 inside, 20x20 inside, 6x10 cut by the left edge, 3x3 noise.
    binary = field(100, 100, (10, 20, 10, 40), (50, 50, 20, 20), (80, 0, 6, 10), (30, 80, 3, 3))
    row, particles = measure_class(binary, um_per_px=0.5)
    assert row["area_fraction"] == pytest.approx((400 + 400 + 60 + 9) / 10000)
    assert (row["particles_whole"], row["particles_cut"], row["number"]) == (2, 1, 2.5)
    assert row["number_per_mm2"] == pytest.approx(2.5 / (0.05 * 0.05))  # a field of 50 x 50 um
    assert row["mean_area_um2"] == row["median_area_um2"] == row["max_area_um2"] == 100
    diameter = math.sqrt(4 * 100 / math.pi)
    for name in ("mean", "d10", "d50", "d90"):
        assert row[f"{name}_diameter_um"] == pytest.approx(diameter)
    assert row["std_diameter_um"] == pytest.approx(0, abs=1e-9)
    assert row["mean_length_um"] == pytest.approx((20 + 10) / 2)
    assert row["max_length_um"] == pytest.approx(20)
    assert row["mean_aspect_ratio"] == pytest.approx((4 + 1) / 2)
    assert math.isnan(row["astm_g"])
    assert particles.border.tolist() == [False, False, True]
    assert (particles.x[0], particles.y[0]) == (39.5, 14.5)


def test_intercepts_of_rectangles_by_hand() -> None:
    # Rows meet the 10x40 box 10 times and columns 40 times: 50 chords on 200 lines of 100 px.
    row, _ = measure_class(field(100, 100, (10, 20, 10, 40)))
    per_px = 50 / (200 * 100)
    assert row["mean_intercept_px"] == pytest.approx(0.04 / per_px)  # 16 = 2 * 400 / (10 + 40)
    assert row["mean_free_path_px"] == pytest.approx(0.96 / per_px)
    # Moved to the left edge, its 10 rows are met with one crossing each: 5 + 40 chords.
    row, _ = measure_class(field(100, 100, (10, 0, 10, 40)))
    assert row["mean_intercept_px"] == pytest.approx(0.04 / (45 / 20000))


def test_noise_counts_for_the_fraction_only() -> None:
    clean = field(60, 60, (10, 10, 12, 12))
    noisy = clean | field(60, 60, (40, 40, 3, 3))
    row, _ = measure_class(noisy, minimum_px=10)
    bare, _ = measure_class(clean, minimum_px=10)
    assert row.pop("area_fraction") == pytest.approx(bare.pop("area_fraction") + 9 / 3600)
    assert row == pytest.approx(bare, nan_ok=True)
    assert measure_class(noisy, minimum_px=9)[0]["particles_whole"] == 2


def test_disc() -> None:
    row, particles = measure_class(disc(201, 80))
    assert row["mean_diameter_px"] == pytest.approx(160, rel=0.003)
    assert row["mean_aspect_ratio"] == pytest.approx(1, abs=0.01)
    assert row["mean_length_px"] == pytest.approx(161, abs=1)
    # The mean chord of a disc is pi r / 2 for lines of all directions, and of any one direction.
    assert row["mean_intercept_px"] == pytest.approx(math.pi * 80 / 2, rel=0.01)
    assert (particles.x[0], particles.y[0]) == (100, 100)


def test_stripes_have_their_spacing_as_mean_free_path() -> None:
    binary = np.zeros((50, 1000), bool)
    binary[:, (np.arange(1000) % 20) < 5] = True
    row, _ = measure_class(binary)
    # Only rows cross: N_L over rows is 1/20, over rows and columns 1/40, bar the frame's cut.
    assert row["mean_free_path_px"] == pytest.approx(15 * 2, rel=0.02)
    assert row["mean_intercept_px"] == pytest.approx(5 * 2, rel=0.02)


def test_an_empty_and_a_full_field() -> None:
    empty, _ = measure_class(np.zeros((20, 30), bool), 0.1, grains=True)
    assert empty["area_fraction"] == empty["number"] == empty["number_per_mm2"] == 0
    full, _ = measure_class(np.ones((20, 30), bool), 0.1)
    assert full["area_fraction"] == 1 and full["number"] == 1  # its four corners are one particle
    for row, name in itertools.product(
        (empty, full), ("mean_area_um2", "mean_length_um", "mean_intercept_um", "mean_free_path_um")
    ):
        assert math.isnan(row[name])


def test_the_astm_grain_size_number() -> None:
    # ASTM E112, table of grain sizes: mean intercept in um of some G.
    for g, intercept in [(0, 320.0), (2, 160.0), (5, 56.6), (8, 20.0), (10, 10.0), (12, 5.0)]:
        assert measure.astm_grain_size(intercept) == pytest.approx(g, abs=0.02)
    assert math.isnan(measure.astm_grain_size(0)) and math.isnan(measure.astm_grain_size(math.nan))


def test_grains_between_boundaries() -> None:
    # A grid of square grains of 38 px, boundaries 2 px, 1 um each: the mean chord is near 38, and
    # by E112, line / grains met, a boundary counts to its grains: G is that of 40, not of 38 um.
    mask = np.ones((800, 800), np.uint8)
    inside = (np.arange(800) % 40) < 38
    mask[np.ix_(inside, inside)] = 0
    (row, boundary), _ = measure_mask(mask, 2, um_per_px=1.0, grain_classes=[0])
    assert row["mean_intercept_um"] == pytest.approx(38, rel=0.03)
    assert row["astm_g"] == pytest.approx(-3.288 - 6.643856 * math.log10(0.040), abs=0.1)
    assert row["class"] == 0 and boundary["class"] == 1 and math.isnan(boundary["astm_g"])


def lattice(pitch: int, width: int, start: int, count: int = 20):
    """Square grains (true) every ``pitch`` px; boundaries of ``width`` px begin at ``start``."""
    inside = (np.arange(count * pitch) - start) % pitch >= width
    return np.outer(inside, inside)


LATTICES = [(40, 3), (20, 4), (12, 3), (40, 4), (20, 3), (12, 4), (9, 1)]


@pytest.mark.parametrize("pitch, width", LATTICES)
def test_grain_size_does_not_depend_on_the_width_of_boundaries(pitch: int, width: int) -> None:
    # Cut in the middle of grains, a line of 20 pitches crosses 20 boundaries: 19 whole grains and
    # two halves are met, L / N = pitch. The mean chord is pitch - width.
    row, _ = measure_class(lattice(pitch, width, pitch // 2), 1.0, 1, grains=True)
    assert row["mean_intercept_um"] == pytest.approx(pitch - width)
    assert row["grain_intercept_um"] == pytest.approx(pitch, rel=0.01)
    assert row["astm_g"] == measure.astm_grain_size(row["grain_intercept_um"])
    # Beginning with a boundary, it meets 19 whole grains and one half.
    row, _ = measure_class(lattice(pitch, width, 0), 1.0, grains=True)
    by_hand = (20 * pitch - width) / 19.5
    assert row["grain_intercept_um"] == pytest.approx(by_hand, rel=0.01)
    exact = -3.288 - 6.643856 * math.log10(pitch / 1000)
    assert row["astm_g"] == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("degrees", [15, 30, 45])
@pytest.mark.parametrize("pitch, width", [(40, 3), (20, 4), (12, 3)])
def test_grain_size_of_a_slanting_lattice(pitch: int, width: int, degrees: int) -> None:
    # A line at this angle crosses cos / pitch boundaries of one family per length, sin / pitch of
    # the other.
    y, x = np.mgrid[:500, :500]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    inside = ((c * x + s * y) % pitch >= width) & ((c * y - s * x) % pitch >= width)
    row, _ = measure_class(inside, 1.0, grains=True)
    by_hand = measure.astm_grain_size(pitch / (c + s))
    assert row["astm_g"] == pytest.approx(by_hand, abs=0.12)


@pytest.mark.parametrize("width", [3, 5])
def test_grain_size_of_a_random_tessellation(width: int) -> None:
    """Boundaries drawn on a tessellation give its own line / grains met, counted without them."""
    seeds = np.random.default_rng(width).random((150, 2)) * 300
    y, x = np.mgrid[:300, :300]
    away = np.full((300, 300), np.inf)
    owner = np.zeros((300, 300), int)
    for i, (sy, sx) in enumerate(seeds):
        own = (y - sy) ** 2 + (x - sx) ** 2
        owner[own < away], away = i, np.minimum(own, away)
    sides = np.zeros((300, 300), bool)
    sides[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    sides[1:] |= owner[1:] != owner[:-1]
    crossed = sum(int((np.diff(owner, axis=axis) != 0).sum()) for axis in (0, 1))
    by_hand = measure.astm_grain_size(2 * 300 * 300 / crossed)
    drawn = ndimage.maximum_filter(sides, width)
    row, _ = measure_class(~drawn, 1.0, grains=True)
    assert row["astm_g"] == pytest.approx(by_hand, abs=0.1)
    assert measure.astm_grain_size(row["mean_intercept_um"]) > by_hand + 0.2  # the chord's


def test_grains_beside_another_phase() -> None:
    # Left 400 px: a lattice of 40 px cut in the middle of grains; right 200 px: another phase.
    # A row meets 10 grains and the half that ends at the phase; columns there meet 10.
    mask = np.full((400, 600), 2, np.uint8)
    mask[:, :400] = lattice(40, 3, 20, 10)
    grains = measure_mask(mask, 3, 1.0, grain_classes=[1])[0][1]
    by_hand = 2 * 400 * 400 / (400 * 10.5 + 400 * 10)
    assert grains["grain_intercept_um"] == pytest.approx(by_hand, rel=0.01)
    # Grains far apart in another phase: E112's line in grains / grains met, which is the chord.
    apart = field(200, 200, (20, 20, 20, 20), (120, 120, 20, 20))
    row, _ = measure_class(apart, 1.0, grains=True)
    assert row["grain_intercept_um"] == row["mean_intercept_um"] == 20


def test_an_inclusion_does_not_cut_its_grain() -> None:
    mask = lattice(40, 3, 20, 10).astype(np.uint8)
    mask[35:43, 35:43] = 2  # 64 px inside a grain
    row = measure_mask(mask, 3, 1.0, grain_classes=[1])[0][1]
    assert row["particles_whole"] + row["particles_cut"] == 11 * 11
    assert row["grain_intercept_um"] == pytest.approx(40, rel=0.01)


def test_two_classes_of_grains_share_their_boundaries() -> None:
    # 20 x 20 grains of 40 px like a chess board; the frame lies in the middle of boundaries.
    inside = lattice(40, 4, 38)
    y, x = np.mgrid[:800, :800] // 40
    mask = np.where(inside, 1 + (x + y) % 2, 0)
    for c in (1, 2):
        row = measure_mask(mask, 3, 1.0, grain_classes=[1, 2])[0][c]
        assert row["particles_whole"] == 200 and row["mean_intercept_um"] == 36
        assert row["grain_intercept_um"] == pytest.approx(40, rel=0.01)


def test_named_boundary_classes_alone_are_boundaries() -> None:
    mask = lattice(40, 4, 20, 10).astype(np.uint8)

    def intercept(classes):
        rows, _ = measure_mask(mask, 3, grain_classes=[1], boundary_classes=classes)
        return rows[1]["grain_intercept_px"]

    assert intercept([0]) == intercept(None) == pytest.approx(40, rel=0.01)
    assert intercept([]) == intercept([2]) == 36
    assert math.isnan(measure_mask(mask, 3, grain_classes=[1])[0][0]["grain_intercept_px"])


def test_a_boundary_one_pixel_wide_separates_grains_at_any_angle() -> None:
    mask = np.ones((64, 64), np.uint8) - np.eye(64, dtype=np.uint8)
    grains = measure_mask(mask, 2, 1.0, grain_classes=[1])[0][1]
    assert (grains["particles_whole"], grains["particles_cut"]) == (0, 2)
    assert measure_mask(mask, 2, 1.0)[0][1]["particles_cut"] == 1
    assert measure_mask(mask, 2, 1.0, connectivity=4)[0][1]["particles_cut"] == 2
    found = measure_mask(mask, 2, 1.0, grain_classes=[1], connectivity=8)[0][1]
    assert found["particles_cut"] == 1
    # Every row and column but the outermost crosses the boundary once: 62 grains in two halves
    # each; at the four ends a grain's outline is met once.
    assert grains["mean_intercept_um"] == 2 * (64 * 64 - 64) / (2 * (62 + 2 / 2))


def test_holes_and_specks_are_noise_for_lengths_as_for_counts() -> None:
    grains = np.ones((200, 200), np.uint8)
    grains[:, ::50] = grains[::50] = 0
    pierced = grains.copy()
    pierced[5::10, 5::10] = 0  # 400 single pixels, 1 %
    clean, noisy = (measure_mask(m, 2, 1.0, grain_classes=[1])[0][1] for m in (grains, pierced))
    for name in ("mean_intercept_um", "mean_free_path_um", "grain_intercept_um", "astm_g"):
        assert noisy[name] == clean[name]
    assert noisy["area_fraction"] == pytest.approx(clean["area_fraction"] - 0.01)
    # The free path of a phase is the chord of its matrix: 2 * 38400 pixels, 80 lines meet it.
    specks = field(200, 200, (80, 80, 40, 40)).astype(np.uint8)
    specks[5:75:10, 5::10] = 1
    matrix, phase = measure_mask(specks, 2)[0]
    assert matrix["mean_intercept_px"] == phase["mean_free_path_px"] == 2 * 38400 / 80
    # A hole of min_px pixels is no noise: 10 x 20 with a hole of 2 x 5 meets 30 + 2 + 5 lines.
    holed = field(40, 40, (10, 10, 10, 20)) & ~field(40, 40, (14, 15, 2, 5))
    assert measure_class(holed)[0]["mean_intercept_px"] == 2 * 190 / 37
    assert measure_class(holed, minimum_px=11)[0]["mean_intercept_px"] == 2 * 200 / 30


@pytest.mark.parametrize("grains", [(), (1,)])
def test_pixels_of_255_are_not_part_of_the_field(grains: tuple[int, ...]) -> None:
    inner = blobs(0).astype(np.uint8) + blobs(5)
    outer = np.full((130, 140), 255, np.uint8)
    outer[20:110, 10:130] = inner
    alone, found = measure_mask(inner, 3, 0.5, 10, grains)
    framed, moved = measure_mask(outer, 3, 0.5, 10, grains)
    for one, other in zip(alone, framed, strict=True):
        assert other == pytest.approx(one, nan_ok=True)
    assert [p.border.tolist() for p in found] == [p.border.tolist() for p in moved]
    assert sum(row["area_fraction"] for row in framed) == pytest.approx(1)
    nothing = measure_mask(np.full((20, 20), 255), 2, grain_classes=[0])[0][0]
    assert math.isnan(nothing["area_fraction"]) and math.isnan(nothing["number_per_Mpx"])
    assert math.isnan(nothing["astm_g"])


SCALES = [0, -1, -0.0, math.nan, math.inf, 1e308, 1e-300, 1e-7, 1e7]


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_that_cannot_be_is_refused(scale: float) -> None:
    mask = field(30, 30, (5, 5, 10, 10))
    _, particles = measure_class(mask)
    for work in (
        lambda: measure_mask(mask, 2, um_per_px=scale),
        lambda: measure_class(mask, scale),
        lambda: compare_class(mask, mask, scale),
        lambda: particles.rows(scale),
        lambda: by_batch([], scale),
    ):
        with pytest.raises(
            ConfigError, match=re.escape(f"--um_per_px: found {scale}; give the side")
        ):
            work()


@pytest.mark.parametrize(
    "terms, message",
    [
        ({"minimum_px": 0}, "--min_px: found 0; give a number of at least 1"),
        ({"minimum_px": math.nan}, "--min_px: found nan; give a number of at least 1"),
        ({"grain_classes": [2]}, "--grain_classes: found 2; classes are 0 ... 1"),
        ({"boundary_classes": [-1]}, "--boundary_classes: found -1; classes are 0 ... 1"),
        (
            {"grain_classes": [0, 1], "boundary_classes": [1]},
            "--boundary_classes: found 1, a grain class; it is only one",
        ),
        ({"connectivity": 6}, "--connectivity: found 6; give 4 or 8, or leave it out"),
    ],
)
def test_terms_out_of_range_are_refused(terms: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        measure_mask(field(20, 20), 2, **terms)
    assert str(error.value) == message


@pytest.mark.parametrize("mask", [np.full((9, 9), 2), np.full((9, 9), -1), np.zeros((9, 9, 3))])
def test_what_is_no_mask_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(DataError, match="^mask: (value|found shape)"):
        measure_mask(mask, 2)


def test_units_scale_and_names() -> None:
    binary = blobs(0)
    pixels, found = measure_class(binary)
    scaled, _ = measure_class(binary, um_per_px=0.25)
    powers = {"mean_area": 2, "max_area": 2, "mean_length": 1, "mean_intercept": 1}
    for name, power in powers.items():
        suffix = "2" if power == 2 else ""
        assert scaled[f"{name}_um{suffix}"] == pytest.approx(
            pixels[f"{name}_px{suffix}"] * 0.25**power
        )
    assert scaled["number_per_mm2"] == pytest.approx(pixels["number_per_Mpx"] * 16)
    rows = found.rows(0.25)
    assert len(rows) == len(found.area) and rows[0]["area_um2"] == found.area[0] / 16


# ---------------------------------------------------------------- a slow twin


@pytest.mark.parametrize("seed", range(3))
def test_intercepts_against_walking_along_every_line(seed: int) -> None:
    binary = blobs(seed, (40, 40))
    chords = 0.0
    for line in [*binary, *binary.T]:
        for inside, places in itertools.groupby(range(len(line)), key=lambda i: line[i]):
            run = list(places)
            cut = (run[0] == 0) + (run[-1] == len(line) - 1)
            chords += inside * (1 - cut / 2)
    assert measure.particles_met(binary) == chords


# ---------------------------------------------------------------- sets


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 4.0]])
def test_equal_fields_have_no_spread_by_rounding(weights: list[float] | None) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3 in floating point. And three equal fields make nothing certain."""
    found = over_fields([0.1] * 3, weights)
    assert found.mean == pytest.approx(0.1) and found.std == 0 and math.isnan(found.confidence)
    assert math.isnan(found.relative_accuracy)


def test_a_particle_at_a_corner_of_the_field_is_a_quarter() -> None:
    """One inside, two at sides, two at corners; cut by ignored pixels likewise."""
    mask = np.zeros((40, 50), bool)
    for top, left in ((10, 10), (0, 20), (20, 44), (0, 0), (34, 44)):
        mask[top : top + 6, left : left + 6] = True
    assert measure_class(mask)[0]["number"] == 1 + 2 / 2 + 2 / 4
    ignored = np.ones((50, 60), bool)
    ignored[5:45, 5:55] = False
    framed = np.zeros((50, 60), bool)
    framed[5:45, 5:55] = mask
    assert measure_class(framed, ignored=ignored)[0]["number"] == 2.5
    ignored[5:7, 30:32] = True  # no rectangle: what is a corner is not known
    assert measure_class(framed, ignored=ignored)[0]["number"] == 1 + 4 / 2


def test_statistics_over_fields() -> None:
    # E562's way by hand: 12, 15, 18 -> mean 15, s = 3, t(0.975, 2) = 4.303.
    found = over_fields([12.0, 15.0, math.nan, 18.0])
    assert (found.fields, found.mean, found.std) == (3, 15, 3)
    assert found.confidence == pytest.approx(4.303 * 3 / math.sqrt(3), rel=1e-4)
    assert found.relative_accuracy == pytest.approx(100 * found.confidence / 15)
    one = over_fields([0.2])
    assert one.mean == 0.2 and math.isnan(one.std) and math.isnan(one.confidence)
    assert over_fields([]).fields == 0 and math.isnan(over_fields([]).mean)
    assert math.isnan(over_fields([0.0, 0.0]).relative_accuracy)


def test_batches_are_pooled_by_particle_and_ordered_by_number() -> None:
    def rows(batch, *boxes):
        return [
            {"batch": batch, **row} for row in measure_mask(field(50, 50, *boxes).astype(int), 2)[0]
        ]

    ten, twenty = (5, 5, 10, 10), (5, 25, 10, 20)
    fields = [*rows("120", ten), *rows("15", ten, twenty), *rows("15", ten), *rows("15"), *rows("")]
    pooled = [row for row in by_batch(fields) if row["class"] == 1]
    assert [row["batch"] for row in pooled] == ["15", "120", ""]
    row = pooled[0]
    assert (row["fields"], row["particles_whole"]) == (3, 3)
    assert row["area_fraction"] == pytest.approx((300 + 100 + 0) / 3 / 2500)
    spread = np.std([300, 100, 0], ddof=1) / 2500
    assert row["area_fraction_ci95"] == pytest.approx(stats.t.ppf(0.975, 2) * spread / math.sqrt(3))
    assert row["number_per_Mpx"] == pytest.approx(1 / 2500 * 1e6)
    assert row["mean_area_px2"] == pytest.approx((100 + 200 + 100) / 3)
    assert row["mean_length_px"] == pytest.approx((10 + 20 + 10) / 3)
    assert math.isnan(pooled[2]["mean_area_px2"]) and pooled[2]["number_per_Mpx"] == 0


def test_batches_of_grains_have_their_size() -> None:
    line = np.arange(240) % 20 < 15  # grains of 20 px from middle to middle
    rows = [
        {"batch": batch, "um_per_px": um, "field_px": 240 * 240, **row}
        for batch, um in (("a", 0.5), ("a", 0.5), ("b", 1.0))
        for row in measure_mask((line[:, None] & line).astype(int), 2, um, grain_classes=[1])[0]
    ]
    a, b = (row for row in by_batch(rows, 0.5) if row["class"] == 1)
    for row, um in ((a, 10), (b, 20)):
        assert row["grain_intercept_um"] == pytest.approx(um, rel=0.03)  # at the frame it is cut
        assert row["astm_g"] == pytest.approx(-3.288 - 6.643856 * math.log10(um / 1000), abs=0.1)
    # Nothing is known of others by equal fields, nor by one.
    assert math.isnan(a["astm_g_ci95"]) and math.isnan(b["astm_g_ci95"])
    assert (
        "astm_g" not in by_batch([{"batch": "", **measure_mask(np.eye(9, dtype=int), 2)[0][1]}])[0]
    )


OF_FIELDS = {
    "area_fraction",
    "area_fraction_counted",
    "mean_intercept",
    "mean_free_path",
    "grain_intercept",
    "astm_g",
}


@pytest.mark.parametrize("um_per_px", [None, 0.5])
def test_every_column_is_of_particles_or_of_the_field(um_per_px: float | None) -> None:
    """A new one stands in ``OF_PARTICLES``, or here: a matrix has it in the tables then."""
    row, _ = measure_class(field(50, 50, (5, 5, 10, 10)), um_per_px, grains=True)
    names = [measure.without_unit(column) for column in row]
    assert len(set(names)) == len(names)
    assert set(names) - measure.OF_PARTICLES == OF_FIELDS
    assert set(names) >= measure.OF_PARTICLES
    shown = {column for column in row if not of_particles(column)}
    assert {measure.without_unit(column) for column in shown} == OF_FIELDS


# ---------------------------------------------------------------- against true masks


def test_comparison_by_hand() -> None:
    truth = field(60, 60, (5, 5, 10, 10), (30, 30, 4, 5), (0, 40, 10, 10))
    prediction = field(
        60, 60, (5, 10, 10, 10), (50, 50, 5, 5)
    )  # half of the first, and a wrong one
    row = compare_class(truth, prediction, um_per_px=2.0)
    assert row["area_fraction_error"] == pytest.approx((125 - 220) / 3600)
    assert row["number_error"] == 2 - 2.5
    assert row["ks_diameter"] == pytest.approx(0.5)  # {100, 20} against {100, 25}
    recall = recall_by_size([row, row])
    assert recall[0] == ("0 ... 32 px", 0, 2)
    assert recall[1] == ("32 ... 100 px", 0, 0)
    assert recall[2] == ("100 ... 316 px", 2, 4)  # found: the half; not: the one at the frame
    assert recall[-1] == ("3162 px and more", 0, 0)


def test_nothing_is_compared_where_the_truth_is_ignored() -> None:
    truth, prediction = blobs(2), blobs(2) ^ field(90, 120, (40, 50, 9, 9))
    framed = [np.random.default_rng(i).random((110, 150)) < 0.5 for i in range(2)]
    for whole, part in zip(framed, (truth, prediction), strict=True):
        whole[5:95, 8:128] = part
    ignored = ~field(110, 150, (5, 8, 90, 120))
    found = compare_class(framed[0], framed[1], ignored=ignored)
    expected = compare_class(truth, prediction)
    assert found == pytest.approx(expected) and expected["boundary_f1"] < 1


def test_a_shift_of_three_pixels() -> None:
    truth, shifted = field(80, 80, (20, 20, 30, 30)), field(80, 80, (20, 23, 30, 30))
    f1, distance = boundary_agreement(truth, shifted, 2)
    assert distance == 3

    def near(own, other):
        ys, xs = np.nonzero(own)
        others = np.argwhere(other)
        away = [np.hypot(*(others - (y, x)).T).min() for y, x in zip(ys, xs, strict=True)]
        return np.mean(np.array(away) <= 2), np.percentile(away, 95)

    def ring(binary):
        padded = np.pad(binary, 1, mode="edge")
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        return binary & ~inner

    assert ring(truth).sum() == 116
    (a, p), (b, q) = near(ring(truth), ring(shifted)), near(ring(shifted), ring(truth))
    assert f1 == pytest.approx(2 * a * b / (a + b)) and distance == pytest.approx(max(p, q))
    assert boundary_agreement(truth, shifted, 3)[0] == 1
    assert compare_class(truth, shifted, 0.1)["hausdorff95_um"] == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(2))
def test_boundaries_against_all_pairs(seed: int) -> None:
    first, second = blobs(seed, (40, 50)), blobs(seed + 7, (40, 50))
    outlines = [np.argwhere(measure.outline(b)) for b in (first, second)]
    apart = np.linalg.norm(outlines[0][:, None] - outlines[1][None], axis=2)
    near = (apart.min(1) <= 2).mean(), (apart.min(0) <= 2).mean()
    f1, distance = boundary_agreement(first, second, 2)
    assert f1 == pytest.approx(2 * near[0] * near[1] / sum(near))
    expected = max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95))
    assert distance == pytest.approx(expected, abs=1e-3)


def test_the_same_and_nothing() -> None:
    binary, nothing = blobs(1), np.zeros((90, 120), bool)
    same = compare_class(binary, binary)
    assert same["area_fraction_error"] == same["number_error"] == same["ks_diameter"] == 0
    assert same["boundary_f1"] == 1 and same["hausdorff95_px"] == 0
    assert all(found == true for _, found, true in recall_by_size([same]))
    missed = compare_class(binary, nothing)
    assert missed["boundary_f1"] == 0 and missed["hausdorff95_px"] == math.inf
    assert math.isnan(missed["ks_diameter"])
    neither = compare_class(nothing, nothing)
    assert math.isnan(neither["boundary_f1"]) and math.isnan(neither["hausdorff95_px"])


def test_kolmogorov_smirnov_against_scipy() -> None:
    rng = np.random.default_rng(0)
    for n, m in [(5, 9), (30, 12), (1, 1)]:
        first, second = rng.integers(0, 8, n), rng.integers(2, 9, m)
        expected = stats.ks_2samp(first, second).statistic
        assert kolmogorov_smirnov(first, second) == pytest.approx(expected)


# ---------------------------------------------------------------- fields of unequal area and scale


def test_fields_of_unequal_area_count_by_their_area() -> None:
    """Three pixels in four of a field of 100, one in four of one of 300: 150 of 400."""
    found = over_fields([0.75, 0.25], [100, 300])
    assert found.mean == pytest.approx(150 / 400)
    # A ratio's variance: n / (n - 1) * sum(w**2 * (x - mean)**2) / sum(w)**2.
    error = math.sqrt(2 * (100**2 * 0.375**2 + 300**2 * 0.125**2)) / 400
    assert found.confidence == pytest.approx(12.7062047 * error)
    assert found.fields == 2


def test_fields_of_equal_area_are_what_they_were() -> None:
    values = [0.1, 0.2, 0.4, math.nan]
    assert over_fields(values, [7] * 4) == over_fields(values)
    assert over_fields([0.3], [5]).mean == 0.3 and math.isnan(over_fields([], []).mean)


def test_an_unknown_field_takes_its_weight_along() -> None:
    assert over_fields([0.2, math.nan, 0.4], [1, 50, 3]).mean == pytest.approx(0.35)


def test_areas_are_in_square_micrometres_where_every_scale_is_known() -> None:
    rows = [{"field_px": 100, "um_per_px": 0.1}, {"field_px": 100, "um_per_px": 0.2}]
    assert areas_of(rows) == pytest.approx([1, 4])
    assert areas_of([{"field_px": 100}, {"field_px": 200}]) == [100, 200]
    assert areas_of([{}, {}]) == [1, 1]
    assert areas_of([rows[0], {"field_px": 300, "um_per_px": math.nan}]) == [100, 300]


def test_a_field_without_a_scale_does_not_weigh_lengths_of_the_others() -> None:
    """16 squares at 0.1 um per pixel, 4 at 1, one without a scale, all of 200 x 200 px."""

    def square(n: int) -> tuple[int, int, int, int]:
        return (10 + 40 * (n // 4), 10 + 40 * (n % 4), 10, 10)

    rows = []
    for um, count in ((0.1, 16), (1.0, 4), (None, 1)):
        row, _ = measure_class(field(200, 200, *map(square, range(count))), um)
        head = {"um_per_px": um or math.nan, "field_px": 40_000, "batch": "b", "class": 1}
        rows.append(head | (row if um else without_scale(row)))
    areas = 200**2 * (0.1**2 + 1) * 1e-6  # mm2
    density = mean_over(rows, "number_per_mm2")
    assert density.mean == pytest.approx(20 / areas) and density.fields == 2
    (pooled,) = by_batch(rows, 0.1)
    assert pooled["number_per_mm2"] == pytest.approx(20 / areas)
    assert mean_over(rows, "mean_area_um2").mean == pytest.approx((0.01 * 1 + 100) / 1.01)
    # What has no length is known of all fields, whose pixels are then all that is known.
    assert mean_over(rows, "area_fraction", 100).mean == pytest.approx(100 * 21 * 100 / 120_000)


def test_intercept_and_free_path_over_fields_are_of_their_sums() -> None:
    """Twelve squares of 10 px, one bar, none: A_A and N_L summed, not the fields' ratios averaged.

    Rows and columns are 2 px of line for each pixel. A square of side 10 is met by 20 of them, a
    bar of 80 x 2 px by 82: 1360 px of particles are met 12 * 20 + 82 = 322 times.
    """
    squares = [(5 + 20 * (n // 4), 5 + 20 * (n % 4), 10, 10) for n in range(12)]
    images = [field(100, 100, *squares), field(100, 100, (5, 5, 80, 2)), field(100, 100)]
    rows = [{"batch": "b", "class": 1, **measure_class(image)[0]} for image in images]
    covered, met, line, n = [1200, 160, 0], [240, 82, 0], 20_000, 3
    chord, path = 2 * sum(covered) / sum(met), (n * line - 2 * sum(covered)) / sum(met)
    found = {name: mean_over(rows, f"mean_{name}_px") for name in ("intercept", "free_path")}
    assert found["intercept"].mean == pytest.approx(chord)
    assert found["free_path"].mean == pytest.approx(path)
    share = sum(covered) / 30_000
    assert path / chord == pytest.approx((1 - share) / share)
    # The third field has no chord, but is free path; t(0.975, 1) = 12.706, t(0.975, 2) = 4.3027.
    assert (found["intercept"].fields, found["free_path"].fields) == (2, 3)
    off = [2 * c - chord * m for c, m in zip(covered, met, strict=True)]
    error = math.sqrt(2 / 1 * (off[0] ** 2 + off[1] ** 2)) / sum(met)
    assert found["intercept"].confidence == pytest.approx(12.7062047 * error)
    off = [line - 2 * c - path * m for c, m in zip(covered, met, strict=True)]
    error = math.sqrt(3 / 2 * sum(o**2 for o in off)) / sum(met)
    assert found["free_path"].confidence == pytest.approx(4.3026527 * error)
    assert found["free_path"].std == pytest.approx(math.sqrt(3) * error)
    (pooled,) = by_batch(rows)
    assert pooled["mean_intercept_px"] == pytest.approx(chord)
    assert pooled["mean_free_path_px_ci95"] == found["free_path"].confidence


def test_free_path_counts_fields_by_area_and_those_without_a_scale_not_at_all() -> None:
    """Bars across the field at two magnifications; fields of nothing else, and of nothing."""
    bars = np.zeros((100, 100), bool)
    bars[:, 20:30] = True  # met by each of 100 rows, of 10 px
    rows = []
    for um, image in ((0.5, bars), (1.0, bars), (0.5, ~np.zeros_like(bars)), (None, ~bars)):
        row = measure_class(image, um)[0]
        head = {"um_per_px": um or math.nan, "field_px": 10_000}
        rows.append(head | (row if um else without_scale(row)))
    # By area, in um2: 2500 and 10,000 of which a tenth is bar, 2500 all bar, met by no end.
    # A bar that ends at the frame above and below has 100 rows in it, and its columns no end.
    met = [100 / (2 * 10_000 * um) for um in (0.5, 1.0)]
    below = 2500 * met[0] + 10_000 * met[1]
    assert mean_over(rows, "mean_free_path_um").mean == pytest.approx(0.9 * 12_500 / below)
    found = mean_over(rows, "mean_intercept_um")
    assert found.mean == pytest.approx((0.1 * 12_500 + 2500) / below) and found.fields == 3
    assert mean_over(rows[:1], "mean_free_path_um").mean == rows[0]["mean_free_path_um"]
    none = [{"area_fraction_counted": 0.0, **dict.fromkeys(OF_LINES_PX, math.nan)}] * 2
    assert math.isnan(mean_over(none, "mean_intercept_px").mean)
    assert math.isnan(mean_over(none, "mean_free_path_px").mean)


OF_LINES_PX = ("mean_intercept_px", "mean_free_path_px")


@pytest.mark.parametrize("specks", [0, 1, 10])
def test_fields_of_noise_alone_change_no_free_path(specks: int) -> None:
    """Two of three fields have nothing but specks of 9 px in the matrix; of 10 px they count."""
    bars = np.zeros((60, 60), bool)
    bars[:, 20:30] = True  # 50 of 60 columns are matrix, met by two ends of each of 60 rows
    noisy = np.zeros((60, 60), bool)
    for n in range(specks):
        noisy[3 : 3 + 3, 5 * n : 5 * n + 3] = True
    rows = [measure_class(~image)[0] | {"field_px": 3600} for image in (bars, noisy, noisy)]
    assert rows[1]["area_fraction_counted"] == 1 and math.isnan(rows[1]["mean_free_path_px"])
    assert rows[0]["area_fraction_counted"] == 50 / 60
    found = mean_over(rows, "mean_free_path_px")
    assert found.mean == pytest.approx(rows[0]["mean_free_path_px"]) and found.fields == 1
    assert mean_over([{**rows[1]}] * 2, "mean_free_path_px").fields == 0


def test_the_grain_size_number_of_fields_is_that_of_their_mean_intercept() -> None:
    rows = [{"grain_intercept_um": um, "astm_g": astm_grain_size(um)} for um in (10.0, 40.0)]
    found = mean_over(rows, "astm_g")
    assert found.mean == pytest.approx(-3.288 - 6.643856 * math.log10(0.025)) and found.fields == 2
    half = 12.7062047 * 15  # t(0.975, 1) times the standard error of 10 and 40
    # By finite differences: dG / dl at 25 um.
    slope = (astm_grain_size(25.001) - astm_grain_size(24.999)) / 0.002
    assert found.confidence == pytest.approx(abs(slope) * half, rel=1e-4)
    unknown = mean_over([{"grain_intercept_px": 3.0, "astm_g": math.nan}], "astm_g")
    assert math.isnan(unknown.mean) and unknown.fields == 0


@pytest.mark.parametrize("rows", [(0, 40, 0, 0), (13, 0, 7, 21)])
def test_a_field_is_the_same_cut_or_ignored(rows: tuple[int, int, int, int]) -> None:
    """A lattice of grains of 15 px with boundaries of 5; the frame may be an array's or not."""
    top, bottom, left, right = rows
    line = np.arange(240) % 20 < 15
    grains = line[:, None] & line
    cut = grains[top : 240 - bottom, left : 240 - right]
    ignored = np.ones(grains.shape, bool)
    ignored[top : 240 - bottom, left : 240 - right] = False
    alone, _ = measure_class(cut, 1.0, grains=True)
    within, _ = measure_class(grains & ~ignored, 1.0, grains=True, ignored=ignored)
    assert within == pytest.approx(alone, nan_ok=True)


def test_batches_that_are_no_numbers_come_last() -> None:
    rows = [
        {"batch": b, "class": c, **measure_class(field(40, 40, (5, 5, 9, 9)))[0]}
        for c in (1, 0)
        for b in ("nan", "10", "inf", "9")
    ]
    found = [(row["batch"], row["class"]) for row in by_batch(rows)]
    order = ("9", "10", "inf", "nan")
    assert found == [(b, c) for b in order for c in (0, 1)]


def test_without_a_scale_lengths_are_unknown_and_counts_are_kept() -> None:
    row = measure_mask(np.eye(20, dtype=np.uint8), 2, None, 1)[0][1]
    changed, in_um = without_scale(row), measure_mask(np.eye(20, dtype=np.uint8), 2, 0.1, 1)[0][1]
    assert list(changed) == list(in_um)
    for name, value in changed.items():
        if name.endswith(("_um", "_um2", "_mm2")):
            assert math.isnan(value), name
        else:
            assert value == row[name] or math.isnan(value), name
    kept = {"x_px": 3.0, "found_32_px": 2, "hausdorff95_px": 1.0}
    changed = without_scale(kept)
    assert changed["x_px"] == 3.0 and changed["found_32_px"] == 2
    assert math.isnan(changed["hausdorff95_um"])
