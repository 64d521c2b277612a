"""Particles whose answer is known by hand, a slow twin, and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metallography import particles
from metallography.particles import fill_holes, find_particles, measured_key
from tests.masks import blobs, field


def test_corner_to_corner_is_one_particle_and_holes_are_not_area() -> None:
    binary = field(40, 40, (5, 5, 4, 4), (9, 9, 4, 4), (20, 20, 12, 12)) & ~field(
        40, 40, (22, 22, 8, 8)
    )
    binary |= field(40, 40, (24, 24, 4, 4))  # an island in the hole
    particles, labels = find_particles(binary)
    assert sorted(particles.area.tolist()) == [16, 32, 144 - 64]
    assert sorted(particles.length.round(3).tolist())[0] == 4
    assert 12 in particles.length and not np.isnan(particles.length).any()
    np.testing.assert_array_equal(labels > 0, binary)
    assert sorted(np.bincount(labels.ravel())[1:].tolist()) == [16, 32, 80]


def test_by_sides_alone_particles_end_at_their_corners() -> None:
    binary = field(40, 40, (5, 5, 4, 6), (9, 11, 5, 5))
    particles, labels = find_particles(binary, connectivity=4)
    assert particles.area.tolist() == [24, 25]
    assert particles.length.tolist() == [6, 5] and particles.width.tolist() == [4, 5]
    assert labels[8, 10] == 1 and labels[9, 11] == 2
    assert find_particles(binary)[0].area.tolist() == [49]


def test_what_touches_ignored_pixels_is_cut() -> None:
    binary = field(40, 40, (5, 5, 4, 4), (5, 20, 4, 4), (20, 5, 4, 4))
    ignored = field(40, 40, (5, 9, 4, 2), (24, 9, 3, 3))  # beside the first, at the last's corner
    assert find_particles(binary, ignored=ignored)[0].border.tolist() == [True, False, True]


def test_holes_are_filled_by_the_nearest_particle() -> None:
    binary = field(20, 40, (2, 2, 16, 16), (2, 20, 16, 18))
    binary &= ~field(20, 40, (6, 6, 3, 3), (6, 25, 2, 5))
    binary[12, 12] = binary[13, 13] = False  # one hole of two pixels that touch by a corner
    _, labels = find_particles(binary)
    fill_holes(labels, 10)
    assert (labels == 1).sum() == 16 * 16 and (labels == 2).sum() == 16 * 18 - 10
    _, labels = find_particles(binary)
    fill_holes(labels, 10, ignored=field(20, 40, (6, 6, 3, 3)))
    assert (labels == 1).sum() == 16 * 16 - 9


@pytest.mark.parametrize("row", [0, 19])
@pytest.mark.parametrize("column", [5, 0, 27])
def test_each_edge_of_the_frame_cuts(row: int, column: int) -> None:
    top = min(row, 16)
    for binary in (field(20, 30, (top, min(column, 26), 4, 4)), field(20, 30, (8, 0, 4, 4))):
        assert find_particles(binary)[0].border.tolist() == [True]
    assert find_particles(field(20, 30, (1, 1, 18, 28)))[0].border.tolist() == [False]


def slow_rectangle(ys, xs):
    """Length and width of the smallest rectangle: a side lies along a side of the hull."""
    corners = {(y + a, x + b) for y, x in zip(ys, xs, strict=True) for a in (0, 1) for b in (0, 1)}
    points = np.array(sorted(corners), float)
    directions = {math.atan2(*(q - p)) for p in points for q in points if (p != q).any()}
    best = None
    for angle in directions:
        u = np.array([math.sin(angle), math.cos(angle)])  # points are (y, x)
        v = np.array([math.cos(angle), -math.sin(angle)])
        sides = sorted((np.ptp(points @ u), np.ptp(points @ v)))
        if best is None or sides[0] * sides[1] < best[0] * best[1] - 1e-9:
            best = sides
    return best[1], best[0]


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_smallest_rectangles_against_all_directions(seed: int, connectivity: int) -> None:
    binary = blobs(seed, (24, 30), 0.3)
    particles, labels = find_particles(binary, 3, connectivity)
    assert len(particles.area) >= 3
    for i in range(len(particles.area)):
        length, width = slow_rectangle(*np.nonzero(labels == i + 1))
        assert particles.length[i] * particles.width[i] == pytest.approx(length * width, rel=1e-4)


def test_of_equal_rectangles_the_longest_is_taken_however_the_particle_lies() -> None:
    """49 px2 either way: 7 by 7, and 7 by 3.5 times the root of 2."""
    rows = ("######.", "..####.", "....###", "....###", "....###", ".....##", "......#")
    one = np.zeros((20, 20), bool)
    one[3:10, 5:12] = [[letter == "#" for letter in row] for row in rows]
    for binary in (one, one[::-1], one[:, ::-1], one.T, np.rot90(one)):
        (particles, _), four = find_particles(binary), find_particles(binary, connectivity=4)[0]
        for found in (particles, four):
            assert found.length == pytest.approx([7 * math.sqrt(2)])
            assert found.width == pytest.approx([3.5 * math.sqrt(2)])


def test_a_rotated_bar_keeps_its_length() -> None:
    y, x = np.mgrid[:200, :200] - 100.0
    for angle in (0.1, 0.5, 0.9, 1.3):
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        particles, *_ = find_particles((abs(u) <= 60) & (abs(v) <= 10))
        assert particles.length[0] == pytest.approx(120, abs=2)
        assert particles.width[0] == pytest.approx(20, abs=2)


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_image(seed: int) -> None:
    skimage = pytest.importorskip("skimage.measure")
    binary = blobs(seed)
    regions = [
        r for r in skimage.regionprops(skimage.label(binary, connectivity=2)) if r.area >= 10
    ]
    particles, *_ = find_particles(binary)
    order, expected = (
        np.lexsort((particles.x, particles.y)),
        sorted(regions, key=lambda r: r.centroid),
    )
    assert len(order) == len(expected) > 10
    areas = [r.area for r in expected]
    np.testing.assert_array_equal(particles.area[order], areas)
    diameters = [r.equivalent_diameter_area for r in expected]
    np.testing.assert_allclose(particles.diameter[order], diameters)
    centres = np.array([r.centroid for r in expected])
    np.testing.assert_allclose(particles.y[order], centres[:, 0], atol=1e-9)
    np.testing.assert_allclose(particles.x[order], centres[:, 1], atol=1e-9)
    h, w = binary.shape
    cut = [r.bbox[0] == 0 or r.bbox[1] == 0 or r.bbox[2] == h or r.bbox[3] == w for r in expected]
    np.testing.assert_array_equal(particles.border[order], cut)


def test_a_key_of_what_was_measured_knows_all_that_decides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = np.zeros((6, 8), np.uint8)
    moved = mask.copy()
    moved[2, 3] = 1
    how = (2, 0.5, 10, (1,), None, None)  # as ``measure_mask`` takes them, after the mask
    found = [measured_key(mask, *how), measured_key(moved, *how), measured_key(mask.T, *how)]
    others = [3, None, 11, (), 4, (0,)]
    for place, value in enumerate(others):
        found.append(measured_key(mask, *(*how[:place], value, *how[place + 1 :])))
    for name in ("_code_digest", "cv2", "np"):  # the code, and the libraries by which it measures
        with monkeypatch.context() as patch:
            if name == "_code_digest":
                patch.setattr(particles, name, lambda: "another")
            else:
                patch.setattr(getattr(particles, name), "__version__", "another")
            found.append(measured_key(mask, *how))
    assert len(set(found)) == len(found) == 3 + 6 + 3
    assert measured_key(mask.copy(), *how) == found[0]
    assert measured_key(mask, 2, 0.5, 10, [1], None, None) == found[0]
