"""Which pixels a shape covers: against drawings in characters, and a slow twin."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from annotation.outlines import outlines
from annotation.shapes import (
    Bitmap,
    Ellipse,
    Polygon,
    Shape,
    Stroke,
    paint,
    points,
    polygons,
    rectangle,
)
from utils.files import DataError


def drawn(part, size=(6, 8)) -> list[str]:
    ids = paint([(1, Shape("a", (part,)))], size, "file")
    return ["".join(".#"[v] for v in row) for row in ids]


def polygon(*rings) -> Polygon:
    return Polygon(tuple(points(ring) for ring in rings))


def test_a_rectangle_on_the_corners_of_pixels() -> None:
    assert drawn(Polygon((rectangle([(1, 1), (4, 3)]),))) == [
        "........",
        ".###....",
        ".###....",
        "........",
        "........",
        "........",
    ]


def test_centres_decide_and_one_on_an_outline_belongs_to_the_right_and_below() -> None:
    # The left and upper sides run through centres, and so do the right and lower ones.
    assert drawn(polygon([(1.5, 1.5), (4.5, 1.5), (4.5, 3.5), (1.5, 3.5)])) == [
        "........",
        ".###....",
        ".###....",
        "........",
        "........",
        "........",
    ]
    assert drawn(polygon([(1.6, 0.4), (4.6, 0.4), (4.6, 2.6), (1.6, 2.6)]))[:4] == [
        "..###...",
        "..###...",
        "..###...",
        "........",
    ]


def test_a_triangle_and_a_hole() -> None:
    # The long side runs through centres, which belong to what is on its right: outside.
    assert drawn(polygon([(0, 0), (6, 6), (0, 6)])) == [
        "........",
        "#.......",
        "##......",
        "###.....",
        "####....",
        "#####...",
    ]
    ring = [(1, 1), (6, 1), (6, 5), (1, 5)], [(2, 2), (2, 4), (5, 4), (5, 2)]
    assert drawn(polygon(*ring))[1:5] == [".#####..", ".#...#..", ".#...#..", ".#####.."]


def test_a_disc_a_line_a_dot_and_a_bitmap() -> None:
    assert drawn(Ellipse(1, 1, 4, 4)) == [
        "........",
        "..##....",
        ".####...",
        ".####...",
        "..##....",
        "........",
    ]
    line = Stroke((points([(1.5, 1.5), (5.5, 1.5), (5.5, 4.5)]),), 1.0)
    assert drawn(line)[1:5] == [".#####..", ".....#..", ".....#..", ".....#.."]
    assert drawn(Stroke((points([(2.5, 3.5)]),), 3.0))[2:5] == [".###....", ".###....", ".###...."]
    corner = Bitmap(-1, 4, np.array([[1, 0, 1], [1, 1, 0], [1, 1, 1]], bool))
    assert drawn(corner)[3:] == ["........", ".#......", "#......."]


def test_what_hangs_over_the_edge_is_cut_and_what_is_outside_is_refused() -> None:
    assert drawn(Polygon((rectangle([(6, 4), (60, 40)]),)))[3:] == [
        "........",
        "......##",
        "......##",
    ]
    with pytest.raises(DataError, match=r"file: outline 1 \(a\) lies outside the image of 8x6"):
        drawn(Polygon((rectangle([(9, 1), (12, 3)]),)))
    with pytest.raises(DataError, match="lies outside"):
        drawn(Bitmap(0, -5, np.ones((2, 2), bool)))


def test_smaller_shapes_lie_on_top_and_later_ones_of_equals() -> None:
    large, small = rectangle([(0, 0), (4, 4)]), rectangle([(1, 1), (2, 2)])
    first, second = rectangle([(5, 0), (7, 2)]), rectangle([(6, 0), (8, 2)])
    shapes = [
        (i + 1, Shape("", (Polygon((r,)),))) for i, r in enumerate((small, large, first, second))
    ]
    ids = paint(shapes, (4, 8), "file")
    assert ids[:2].tolist() == [[2, 2, 2, 2, 0, 3, 4, 4], [2, 1, 2, 2, 0, 3, 4, 4]]


corners = arrays(np.int64, st.tuples(st.integers(3, 7), st.just(2)), elements=st.integers(-8, 40))


@given(ring=corners)
def test_any_polygon_agrees_with_counting_crossings_pixel_by_pixel(ring: np.ndarray) -> None:
    ring = ring / 4 + 0.125  # exact, and no centre lies on a corner
    got = Polygon((ring,)).patch((6, 8))
    whole = np.zeros((6, 8), bool)
    whole[got.top : got.top + got.bits.shape[0], got.left : got.left + got.bits.shape[1]] = got.bits
    for r in range(6):
        for c in range(8):
            x, y, inside, on_line = c + 0.5, r + 0.5, False, False
            for (x0, y0), (x1, y1) in zip(
                ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True
            ):
                if (y0 <= y) != (y1 <= y):
                    across = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
                    on_line |= across == 0
                    inside ^= (across < 0) == (y1 > y0)
            assert on_line or whole[r, c] == inside


@given(ring=corners)
@example(ring=np.array([(0, 24), (24, 9), (24, 24)]))  # a centre lies on an edge, but for rounding
def test_shapes_that_share_their_outlines_cover_each_pixel_once(ring: np.ndarray) -> None:
    """A fan of triangles around a point: inside is what an odd number of them covers."""
    ring = ring / 4
    parts = [
        Polygon((points([(3.3, 2.7), a, b]),))
        for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True)
    ]
    total = np.zeros((6, 8), int)
    for part in [*parts, Polygon((ring,))]:
        top, left, bits = part.patch((6, 8))
        total[top : top + bits.shape[0], left : left + bits.shape[1]] += bits
    assert (total % 2 == 0).all()


@pytest.mark.parametrize(
    "wrong", [[(0, np.nan)], [(0, 1e300)], [("a", "b")], [], [1, 2], [[1], [2, 3]]]
)
def test_coordinates_that_are_none(wrong: object) -> None:
    with pytest.raises(ValueError):
        points(wrong)


@given(arrays(np.bool_, (7, 9)), st.randoms(use_true_random=False))
def test_rings_apart_are_the_particles_that_they_enclose(bits, random) -> None:
    """Rings of all particles (of pixels that touch by sides), shuffled, with holes and islands."""
    particles = outlines(bits.astype(np.uint8))
    rings = [points(ring) for particle in particles for ring in particle.rings]
    random.shuffle(rings)
    found = polygons(rings) if rings else ()
    patches = [paint([(1, Shape("a", (part,)))], bits.shape, "file") for part in found]
    assert (np.sum(patches, axis=0) == bits).all()
    expected = [paint([(1, Shape("a", (Polygon(p.rings),)))], bits.shape, "f") for p in particles]
    assert {patch.tobytes() for patch in patches} == {patch.tobytes() for patch in expected}


def test_rings_that_are_drawn_twice_enclose_nothing() -> None:
    ring = points([(1, 1), (4, 1), (4, 3), (1, 3)])
    assert drawn(Polygon((ring, ring))) == ["." * 8] * 6
    (both,) = polygons([ring, ring])
    assert drawn(both) == ["." * 8] * 6


def test_a_ring_that_crosses_many_rows_takes_no_more_memory_for_it() -> None:
    """A few megabytes of a file hold a hundred thousand edges, each from top to bottom."""
    size, edges = (2000, 50), 10_000
    zigzag = np.stack([np.linspace(1, 49, edges), np.arange(edges) % 2 * 2000.0], axis=1)
    tracemalloc.start()
    try:
        Polygon((zigzag,)).patch(size)
        assert tracemalloc.get_traced_memory()[1] < edges * 2000 * 8  # a number for each crossing
    finally:
        tracemalloc.stop()


def test_rings_counted_in_parts_are_those_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rings = [random.uniform(-5, 45, (n, 2)) for n in (3, 7, 40)]
    at_once = [Polygon((ring,)).patch((40, 40)) for ring in rings]
    for most in (1, 5, 64):
        monkeypatch.setattr("annotation.shapes.MOST_ROWS", most)
        for ring, whole in zip(rings, at_once, strict=True):
            part = Polygon((ring,)).patch((40, 40))
            assert part[:2] == whole[:2] and (part.bits == whole.bits).all()
