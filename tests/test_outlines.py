"""Outlines of class maps: corners by hand, validity, and the way back to the pixel."""

from __future__ import annotations

import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from roifile import ImagejRoi

from annotation.files import read_annotation
from annotation.outlines import LONGEST_SIDE, outlines, packed, to_geojson, to_rois
from tests.masks import blobs, disc
from utils.files import DataError

NAMES = ["matrix", "carbide", "pore/void", "class 3"]
COLOURS = [(0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0)]


def there_and_back(ids: np.ndarray, folder: Path, kind: str, names=NAMES) -> np.ndarray:
    found = outlines(ids)
    path = folder / ("map.geojson" if kind == "geojson" else "map.zip")
    if kind == "geojson":
        path.write_text(to_geojson(found, names, COLOURS), encoding="utf-8")
    else:
        path.write_bytes(to_rois(found, names, COLOURS))
    return read_annotation(path, ids.shape, names)


def test_corners_of_a_ring_of_pixels_by_hand() -> None:
    ids = np.zeros((5, 6), np.uint8)
    ids[1:4, 2:5] = 1
    ids[2, 3] = 0
    ((label, rings),) = outlines(ids)
    assert label == 1
    assert [sorted(map(tuple, ring.tolist())) for ring in rings] == [
        [(2, 1), (2, 4), (5, 1), (5, 4)],
        [(3, 2), (3, 3), (4, 2), (4, 3)],
    ]


def test_particles_that_touch_by_a_corner_are_two_and_a_hole_may_touch_the_outline() -> None:
    crosswise = np.eye(2, dtype=np.uint8)
    assert [len(rings) for _, rings in outlines(crosswise)] == [1, 1]
    # One particle whose arms meet at a corner: what they enclose is a hole.
    arms = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]], np.uint8)
    ((_, rings),) = outlines(arms)
    assert [sorted(map(tuple, ring.tolist())) for ring in rings] == [
        [(0, 0), (0, 4), (2, 3), (2, 4), (4, 0), (4, 3)],
        [(1, 1), (1, 3), (2, 2), (2, 3), (3, 1), (3, 2)],
    ]
    for ring in rings:
        assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)


@pytest.mark.parametrize("kind", ["geojson", "roi"])
@pytest.mark.parametrize("seed", range(3))
def test_a_class_map_comes_back_to_the_pixel(tmp_path: Path, kind: str, seed: int) -> None:
    ids = blobs(seed).astype(np.uint8)
    ids[blobs(seed + 10)] = 2
    ids[:40, :40][disc(40, 15)] = 3
    ids[:, 7] = 255  # no label: a line through everything
    assert (there_and_back(ids, tmp_path, kind) == ids).all()


@given(
    ids=arrays(
        np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2)
    )
)
def test_any_small_map_comes_back_and_no_ring_meets_itself(
    tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray
) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert (there_and_back(ids, folder, "geojson") == ids).all()
    assert (there_and_back(ids, folder, "roi") == ids).all()
    found = outlines(ids)
    area = 0.0
    for _, rings in found:
        for ring in rings:
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)
            x, y = ring.T
            area += (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
    assert area == (ids > 0).sum()


def rings_by_edges(mask: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The slow twin: every edge of a pixel is walked along, one by one."""
    steps = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # right, down, left, up
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    padded = np.pad(labels, 1)
    # Edges of pixels with the particle on their right: start (x, y), direction, particle.
    starts, directions, particles = [], [], []
    here, above = padded[1:, 1:], padded[:-1, 1:]
    left = padded[1:, :-1]
    for own, other, heading, shift in (
        (here, above, 0, (0, 0)),  # upper side: to the right
        (left, here, 1, (0, 0)),  # right side: down
        (above, here, 2, (1, 0)),  # lower side: to the left
        (here, left, 3, (0, 1)),  # left side: up
    ):
        y, x = np.nonzero((own > 0) & (own != other))
        starts.append(np.stack([x + shift[0], y + shift[1]], axis=1))
        directions.append(np.full(len(x), heading))
        particles.append(own[y, x])
    start, direction = np.concatenate(starts), np.concatenate(directions)
    particle = np.concatenate(particles).astype(np.int64)
    following = edges_after(start, start + steps[direction], direction, particle, mask.shape[1] + 2)
    turns = (direction[following] != direction).tolist()
    ends = (start + steps[direction]).tolist()
    owner, walk, seen = particle.tolist(), following.tolist(), bytearray(len(start))
    for first in range(len(walk)):
        if seen[first]:
            continue
        ring, edge = [], first
        while not seen[edge]:
            seen[edge] = 1
            if turns[edge]:
                ring.append(ends[edge])
            edge = walk[edge]
        yield owner[first], np.array(ring)


def edges_after(
    start: np.ndarray, ends: np.ndarray, direction: np.ndarray, particle: np.ndarray, width: int
) -> np.ndarray:
    """The edge after each edge: to the left where the particle goes on there, else straight on."""
    place, goal = start[:, 1] * width + start[:, 0], ends[:, 1] * width + ends[:, 0]
    key = (place * 4 + direction).astype(np.int64)
    order = np.argsort(key)
    ordered = key[order]

    def edge_to(turn: int) -> tuple[np.ndarray, np.ndarray]:
        wanted = goal * 4 + (direction + turn) % 4
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        found = order[at]
        return found, (ordered[at] == wanted) & (particle[found] == particle)

    following = np.full(len(start), -1)
    for turn in (1, 0, 3):  # right, straight on, left; a left one of the same particle wins
        edge, there = edge_to(turn)
        following = np.where(there, edge, following)
    return following


def outlines_by_edges(ids: np.ndarray) -> list[tuple[int, tuple[np.ndarray, ...]]]:
    """``outlines`` by the slow twin, ordered by particle, the outer ring first."""
    found = []
    for label in np.unique(ids[ids > 0]).tolist():
        parts = defaultdict[int, list[np.ndarray]](list)
        for particle, ring in rings_by_edges(ids == label):
            parts[particle].append(ring)
        for _, rings in sorted(parts.items()):
            area = [
                float((r[:, 0] * np.roll(r[:, 1], -1) - r[:, 1] * np.roll(r[:, 0], -1)).sum())
                for r in rings
            ]
            order = sorted(range(len(rings)), key=lambda n: area[n] < 0)
            found.append((label, tuple(rings[n] for n in order)))
    return found


def assert_outlines_of_edges(ids: np.ndarray) -> None:
    found, expected = outlines(ids), outlines_by_edges(ids)
    assert [(label, len(rings)) for label, rings in found] == [(n, len(r)) for n, r in expected]
    for (_, rings), (_, others) in zip(found, expected, strict=True):
        for ring, other in zip(rings, others, strict=True):
            np.testing.assert_array_equal(ring, other)
            assert ring.dtype == other.dtype


@given(
    ids=arrays(
        np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 2)
    )
)
def test_rings_are_those_of_every_edge_walked_one_by_one(ids: np.ndarray) -> None:
    """The same corners, from the same one on, in the same order."""
    assert_outlines_of_edges(ids)


@pytest.mark.parametrize("band", [1, 700, 2**20])
def test_rings_of_textures_do_not_depend_on_the_rows_that_are_looked_at_at_once(
    monkeypatch: pytest.MonkeyPatch, band: int
) -> None:
    monkeypatch.setattr("annotation.outlines._BAND", band)
    noise = np.random.default_rng(0).integers(0, 4, (70, 50)).astype(np.uint8)
    noise[noise == 3] = 255
    for ids in (noise, noise.T, blobs(0).astype(np.uint8), np.ones((9, 200), np.uint8)):
        assert_outlines_of_edges(ids)


def test_a_map_of_one_class_alone_has_no_outlines(tmp_path: Path) -> None:
    assert outlines(np.zeros((4, 5), np.uint8)) == []
    assert there_and_back(np.zeros((4, 5), np.uint8), tmp_path, "geojson").sum() == 0


def test_what_qupath_and_imagej_are_told() -> None:
    ids = np.zeros((6, 6), np.uint8)
    ids[1:3, 1:3], ids[5, 5] = 2, 1
    found = outlines(ids)
    first, second = json.loads(to_geojson(found, NAMES, COLOURS))["features"]
    assert first["properties"]["classification"] == {"name": "carbide", "color": [255, 0, 0]}
    ring = second["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1] and len(ring) == 5
    with zipfile.ZipFile(io.BytesIO(to_rois(found, NAMES, COLOURS))) as archive:
        rois = [ImagejRoi.frombytes(archive.read(name)) for name in archive.namelist()]
    assert [(roi.name, roi.group) for roi in rois] == [("carbide-1", 1), ("pore/void-2", 2)]
    assert (rois[1].left, rois[1].top, rois[1].right, rois[1].bottom) == (1, 1, 3, 3)


def test_what_regions_of_imagej_cannot_say_is_refused() -> None:
    wide = np.ones((1, LONGEST_SIDE + 1), np.uint8)
    with pytest.raises(DataError, match="32768x1 pixels: .* give --outlines geojson"):
        packed(wide, "roi", ["0", "1"], [(0, 0, 0)] * 2)
    assert packed(wide, "geojson", ["0", "1"], [(0, 0, 0)] * 2)


def test_regions_are_not_named_as_another_class(tmp_path: Path) -> None:
    """The first region of ``phase`` would be called ``phase-1``, which is a class, too."""
    ids = np.array([[1, 1, 0, 2, 2]] * 2, np.uint8)
    names = ["matrix", "phase", "phase-1", "pore"]
    np.testing.assert_array_equal(there_and_back(ids, tmp_path, "roi", names), ids)


@pytest.mark.parametrize(
    ("names", "regions"),
    [
        (["matrix", "Phase", "phase-1"], ["Phase-00001", "phase-1-2"]),
        (["matrix", "a", "a-1 "], ["a-00001", "a-1 -2"]),
        (["matrix", "phase", "phase-1", "phase-00001"], ["phase-000001", "phase-1-2"]),
        (["matrix", "phase", "PHASE-2"], ["phase-1", "PHASE-2-2"]),
    ],
)
def test_names_of_regions_are_free_as_they_are_read(
    tmp_path: Path, names: list[str], regions: list[str]
) -> None:
    ids = np.array([[1, 1, 0, 2, 2]] * 2, np.uint8)
    raw = packed(ids, "roi", names, [(0, 0, 0)] * len(names))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        rois = [ImagejRoi.frombytes(archive.read(name)) for name in archive.namelist()]
    assert [roi.name for roi in rois] == regions
    (tmp_path / "map.zip").write_bytes(raw)
    np.testing.assert_array_equal(read_annotation(tmp_path / "map.zip", ids.shape, names), ids)
