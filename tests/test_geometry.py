"""Views against the published loader, plain loops, torchvision, and images of coordinates."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import measure
from pscl.geometry import ViewGeometry, Window, correspond, resize, warp
from tests.golden_files import Golden, assert_agrees
from utils.metrics import IGNORED

MEAN = torch.tensor((0.49139968, 0.48215841, 0.44653091))[:, None, None]
STD = torch.tensor((0.24703223, 0.24348513, 0.26158784))[:, None, None]
ORIENTATIONS = list(itertools.product((False, True), (1, 2, 3, 4)))


@st.composite
def crops(draw: st.DrawFn) -> tuple[float, float]:
    """Extent and start of one side's crop, from a thousandth to all of it."""
    extent = draw(st.one_of(st.floats(1e-3, 1.0), st.floats(0.8, 1.0), st.just(1.0)))
    return extent, draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))) * (1 - extent)


@st.composite
def views(draw: st.DrawFn) -> ViewGeometry:
    flip, turns = draw(st.sampled_from(ORIENTATIONS))
    (height, top), (width, left) = draw(crops()), draw(crops())
    return ViewGeometry(flip, turns, height, width, top, left)


SIDES = st.integers(1, 40)


# --- the published loader -------------------------------------------------------------------------


@pytest.mark.parametrize("draw", range(8))
def test_views_and_labels_of_the_published_loader(draw: int):
    golden = Golden("views")
    image = golden["in/image"].permute(2, 0, 1) / 255
    label = F.one_hot(golden["in/mask"].long(), 4).permute(2, 0, 1) * 255.0
    flip, turns = int(golden[f"draw{draw}/in/flip"]), int(golden[f"draw{draw}/in/rot_k"])
    view = ViewGeometry(flip == 1, turns, *golden[f"draw{draw}/in/r"].tolist())
    assert_agrees((image - MEAN) / STD, golden[f"draw{draw}/out/view_q"])
    assert_agrees((view.apply(image) - MEAN) / STD, golden[f"draw{draw}/out/view_k"])
    assert_agrees(view.apply(label), golden[f"draw{draw}/out/label"])


# --- apply, cut, apply_mask -----------------------------------------------------------------------


def slow_cut(image: list[list[int]], view: ViewGeometry) -> list[list[int]]:
    """Flip, turn and crop nested lists: the upside-down image is turned counter-clockwise."""
    rows = image[::-1] if view.flip else image
    for _ in range(view.quarter_turns):
        # The last column becomes the first row.
        rows = [[row[column] for row in rows] for column in reversed(range(len(rows[0])))]
    height, width = len(rows), len(rows[0])
    top, left = int(view.top * height), int(view.left * width)
    bottom = int(view.top * height + view.height * height)
    right = int(view.left * width + view.width * width)
    bottom, right = max(bottom, top + 1), max(right, left + 1)  # at least one position
    return [row[left:right] for row in rows[top:bottom]]


@given(views(), SIDES, SIDES)
def test_cut_flips_turns_and_crops(view: ViewGeometry, height: int, width: int):
    image = torch.arange(height * width).reshape(height, width)
    expected = slow_cut(image.tolist(), view)
    assert view.cut(image).tolist() == expected
    assert view.size(height, width) == (len(expected), len(expected[0]))
    # Leading axes are carried along.
    both = torch.stack([image, -image])[:, None]
    assert view.cut(both)[1, 0].tolist() == [[-value for value in row] for row in expected]


def test_the_eight_orientations_of_a_small_image_by_hand():
    image = torch.tensor([[0, 1, 2], [3, 4, 5]])
    by_hand = {
        (False, 4): [[0, 1, 2], [3, 4, 5]],
        (False, 1): [[2, 5], [1, 4], [0, 3]],
        (False, 2): [[5, 4, 3], [2, 1, 0]],
        (False, 3): [[3, 0], [4, 1], [5, 2]],
        (True, 4): [[3, 4, 5], [0, 1, 2]],
        (True, 1): [[5, 2], [4, 1], [3, 0]],
        (True, 2): [[2, 1, 0], [5, 4, 3]],
        (True, 3): [[0, 3], [1, 4], [2, 5]],
    }
    for orientation in ORIENTATIONS:
        assert ViewGeometry(*orientation).cut(image).tolist() == by_hand[orientation]


@given(views(), SIDES, SIDES)
def test_apply_resizes_the_cut_as_torchvision_does(view: ViewGeometry, height: int, width: int):
    generator = torch.Generator().manual_seed(height * 41 + width)
    image = torch.rand(2, 3, height, width, generator=generator)
    cut = torch.tensor([[slow_cut(c.tolist(), view) for c in picture] for picture in image])
    expected = tv.resize(cut, [height, width], tv.InterpolationMode.BILINEAR, antialias=True)
    actual = view.apply(image)
    assert actual.shape == image.shape
    assert torch.allclose(actual, expected, atol=1e-5)
    assert torch.equal(view.apply(image[0, 0]), actual[0, 0])


def test_a_batch_is_warped_as_its_images_are():
    """Square and oblong images, all orientations, with crops and without."""
    rng = np.random.default_rng(3)
    for rows, columns in ((37, 37), (64, 64), (24, 40), (40, 24)):
        views = [ViewGeometry.draw(rng, (0.0, 0.2, 0.6)[i % 3]) for i in range(24)]
        for own in (views, [v for v in views if v.quarter_turns % 2 == 0]):
            images = torch.rand(len(own), 2, rows, columns)
            expected = torch.stack([v.apply(x) for v, x in zip(own, images, strict=True)])
            torch.testing.assert_close(warp(images, own), expected, rtol=0, atol=2e-6)


def test_a_batch_is_warped_by_operators_whose_number_is_the_same_for_all_batches():
    """No image is warped by itself, and nothing waits for a device."""
    calls = []
    for count in (1, 5):
        views = [ViewGeometry(bool(i % 2), i % 4 + 1, 0.9, 0.8, 0.05, 0.1) for i in range(count)]
        with measure.counted(measure.Stopwatch(torch.device("cpu"))) as found:
            warp(torch.rand(count, 3, 32, 32), views)
        assert not found.waits
        calls.append(found.counts[""])
    assert calls[0] == calls[1]


@given(views(), SIDES, SIDES)
def test_apply_mask_takes_the_nearest_centre(view: ViewGeometry, height: int, width: int):
    mask = torch.arange(height * width).reshape(height, width)
    cut = slow_cut(mask.tolist(), view)

    def nearest(new: int, old: int) -> list[set[int]]:
        """Whose centre is nearest to that of each new pixel; on the border of two, either."""
        places = [Fraction(2 * i + 1, 2) * old / new for i in range(new)]
        return [{floor(x)} | ({floor(x) - 1} if x.denominator == 1 else set()) for x in places]

    actual = view.apply_mask(mask)
    assert actual.shape == mask.shape and actual.dtype == mask.dtype
    rows, columns = nearest(height, len(cut)), nearest(width, len(cut[0]))
    for i, j in itertools.product(range(height), range(width)):
        allowed = {cut[r][c] for r in rows[i] for c in columns[j]}
        assert int(actual[i, j]) in allowed


def test_a_view_that_changes_nothing_changes_nothing():
    image = torch.rand(3, 7, 5)
    mask = torch.randint(4, (7, 5), dtype=torch.uint8)
    assert torch.equal(ViewGeometry(False, 4).apply(image), image)
    assert torch.equal(ViewGeometry(False, 4).apply_mask(mask), mask)


def test_resize_of_a_plane_keeps_it_a_plane_between_the_borders():
    """Centres are aligned: enlarging a ramp by two gives steps of a half, clamped at the ends."""
    ramp = torch.arange(4.0)[None].expand(2, 4)
    expected = [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert resize(ramp, (2, 8))[0].tolist() == pytest.approx(expected)


# --- crop_box and draw ----------------------------------------------------------------------------


@given(views(), st.integers(1, 2000), st.integers(1, 2000))
@example(ViewGeometry(False, 1, 1e-3, 1e-3, 0.999, 0.999), 1, 1)
def test_the_crop_box_is_never_empty_and_inside(view: ViewGeometry, rows: int, columns: int):
    top, bottom, left, right = view.crop_box(rows, columns)
    turned = (columns, rows) if view.quarter_turns in (1, 3) else (rows, columns)
    assert 0 <= top < bottom <= turned[0]
    assert 0 <= left < right <= turned[1]


@pytest.mark.parametrize("random_crop", [0.0, 0.2, 1.0])
def test_draws_are_uniform_over_what_is_allowed(random_crop: float):
    rng = np.random.default_rng(5)
    drawn = [ViewGeometry.draw(rng, random_crop) for _ in range(4000)]
    counts = [sum((v.flip, v.quarter_turns) == o for v in drawn) for o in ORIENTATIONS]
    # Binomial with p 1/8: the standard deviation is 21; five of it.
    assert all(abs(count - 500) < 105 for count in counts)
    for view in drawn:
        assert type(view.flip) is bool and type(view.quarter_turns) is int
        for extent, start in ((view.height, view.top), (view.width, view.left)):
            assert 1 - random_crop <= extent <= 1 and extent > 0
            assert 0 <= start <= 1 - extent
    spread = random_crop / 12**0.5 / 4000**0.5
    for side in ("height", "width"):
        mean = sum(getattr(v, side) for v in drawn) / 4000
        assert abs(mean - (1 - random_crop / 2)) <= 5 * spread
    if random_crop == 0:
        assert {(v.height, v.width, v.top, v.left) for v in drawn} == {(1.0, 1.0, 0.0, 0.0)}
    else:
        # U(0, 1 - extent) has half of it as its mean, and both sides are drawn separately.
        share = [v.top / (1 - v.height) for v in drawn]
        assert abs(sum(share) / 4000 - 0.5) < 5 / 12**0.5 / 4000**0.5
        assert abs(np.corrcoef([(v.height, v.width) for v in drawn], rowvar=False)[0, 1]) < 0.08


def test_the_same_seed_draws_the_same_views():
    def draw(seed: int) -> list[ViewGeometry]:
        rng = np.random.default_rng(seed)
        return [ViewGeometry.draw(rng, 0.2) for _ in range(5)]

    assert draw(3) == draw(3) != draw(4)


# --- correspondence -------------------------------------------------------------------------------


def index_steps_of_a_grid(
    view: ViewGeometry, rows: int, columns: int, box: tuple[int, int, int, int]
) -> tuple[int, int, int]:
    """The slow twin of ``index_steps``: a whole grid of indices, and the strides of its views."""
    grid, (top, bottom, left, right) = np.arange(rows * columns).reshape(rows, columns), box
    whole = np.rot90(grid[::-1] if view.flip else grid, view.quarter_turns)
    cut = whole[top:bottom, left:right]
    down, across = (stride // grid.itemsize for stride in cut.strides)
    return int(cut[0, 0]), down, across


def test_index_steps_are_those_of_a_grid_for_every_flip_turn_and_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All boxes of all small grids, flat ones among them, and drawn views of large ones."""
    sides = (1, 2, 3, 5)
    for rows, columns, (flip, turns) in itertools.product(sides, sides, ORIENTATIONS):
        view, turned = ViewGeometry(flip, turns), (rows, columns)[:: -1 if turns % 2 else 1]
        ends = (itertools.combinations(range(side + 1), 2) for side in turned)
        for (top, bottom), (left, right) in itertools.product(*ends):
            box = top, bottom, left, right
            monkeypatch.setattr(ViewGeometry, "crop_box", lambda *_, box=box: box)
            expected = index_steps_of_a_grid(view, rows, columns, box)
            assert view.index_steps(rows, columns) == expected
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    for _ in range(200):
        view = ViewGeometry.draw(rng, 0.9)
        rows, columns = rng.integers(1, 90, size=2).tolist()
        expected = index_steps_of_a_grid(view, rows, columns, view.crop_box(rows, columns))
        assert view.index_steps(rows, columns) == expected


def slow_correspondence(view: ViewGeometry, rows: int, columns: int) -> tuple[list, list]:
    """The published way: grids of indices, one flipped, turned and cropped, one resized."""
    grid = torch.arange(rows * columns).reshape(rows, columns)
    query = torch.tensor(slow_cut(grid.tolist(), view))
    key = F.interpolate(grid[None, None].float(), size=tuple(query.shape), mode="nearest")
    return query.flatten().tolist(), key.long().flatten().tolist()


@settings(max_examples=80)
@given(st.lists(views(), min_size=1, max_size=4), SIDES, SIDES, st.sampled_from([1, 2, 7, 256]))
def test_correspondence_of_a_batch(
    batch: list[ViewGeometry], rows: int, columns: int, multiple: int
):
    places = correspond(batch, rows, columns, multiple=multiple)
    expected = [slow_correspondence(view, rows, columns) for view in batch]
    cells = math.ceil(rows * columns / multiple) * multiple
    assert places.query.shape == places.key.shape == places.valid.shape == (len(batch), cells)
    assert places.query.dtype == places.key.dtype == torch.int64
    for b, (query, key) in enumerate(expected):
        own = len(query)
        assert places.query[b, :own].tolist() == query
        assert places.key[b, :own].tolist() == key
        assert places.valid[b].tolist() == [True] * own + [False] * (cells - own)
    # Features are gathered in the padding too, so it must point into the map.
    assert ((places.key >= 0) & (places.key < rows * columns)).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_correspondence_on_grids_of_real_size(orientation: tuple[bool, int]):
    rng = np.random.default_rng(sum(orientation))
    for rows, columns in ((94, 94), (188, 141), (376, 376), (97, 389)):
        drawn = ViewGeometry.draw(rng, 0.2)
        view = ViewGeometry(*orientation, drawn.height, drawn.width, drawn.top, drawn.left)
        places = correspond([view], rows, columns)
        query, key = slow_correspondence(view, rows, columns)
        assert places.query[0, : len(query)].tolist() == query
        assert places.key[0, : len(key)].tolist() == key


@settings(max_examples=80)
@given(views(), st.integers(2, 40), st.integers(2, 40))
def test_both_views_show_the_same_material(view: ViewGeometry, rows: int, columns: int):
    """Each pixel's value is its own coordinate: cell by cell, the two views must read alike.

    A cell's key pixel is the floor of its place in the enlarged crop, and so up to half a pixel of
    the crop and half a pixel of the view beside it; a shrunk crop (turned, H != W) also blurs.
    """
    assume(max(rows, columns) <= 2 * min(rows, columns))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    view_q = torch.stack([row, column]).float()  # view q has no geometry
    view_k = view.apply(view_q)
    places = correspond([view], rows, columns)
    there = view_q.flatten(1)[:, places.query[places.valid]]
    here = view_k.flatten(1)[:, places.key[places.valid]]
    height, width = view.size(rows, columns)
    shrink = [height / rows, width / columns]  # along the axes of view k
    if view.quarter_turns in (1, 3):
        shrink.reverse()  # along the axes of view q, whose coordinates are compared
    for axis in (0, 1):
        allowed = 0.5 + 0.5 * shrink[axis] + (0.5 * shrink[axis] if shrink[axis] > 1 else 0)
        assert (there[axis] - here[axis]).abs().max() <= allowed + 1e-3


def test_without_a_crop_both_views_show_exactly_the_same():
    image: Tensor = torch.rand(6, 6)
    for orientation in ORIENTATIONS:
        view = ViewGeometry(*orientation)
        places = correspond([view], 6, 6)
        assert sorted(places.query[0].tolist()) == list(range(36))
        seen_q = image.flatten()[places.query[0]]
        assert torch.equal(seen_q, view.apply(image).flatten()[places.key[0]])


# --- windows --------------------------------------------------------------------------------------


def coordinates(rows: int, columns: int) -> Tensor:
    """An image whose two channels are each pixel's row and column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([row, column]).float()


@given(st.integers(16, 40), st.integers(16, 40), st.integers(0, 16), st.integers(0, 2**32 - 1))
def test_a_plain_window_is_a_slice(rows: int, columns: int, side: int, seed: int):
    image = coordinates(rows, columns)
    window = Window.draw(np.random.default_rng(seed), (rows, columns), side)
    seen = window.apply(image)
    shape = (side, side) if side else (rows, columns)
    assert seen.shape == (2, *shape)
    top, left = (int(seen[i, 0, 0].round()) for i in (0, 1))
    expected = image[:, top : top + shape[0], left : left + shape[1]]
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
    mask = window.apply_mask((image[0] * columns + image[1]).long())
    assert torch.equal(mask, (expected[0] * columns + expected[1]).long())


def test_plain_windows_reach_every_place():
    draws = [Window.draw(np.random.default_rng(seed), (18, 20), 16) for seed in range(200)]
    assert {(w.row - 8, w.column - 8) for w in draws} == set(itertools.product(range(3), range(5)))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_window_turns_counter_clockwise(turns: int):
    image = coordinates(20, 20)
    window = Window(20, 20, 10, 10, angle=90 * turns)
    expected = torch.rot90(image, turns, (-2, -1))
    torch.testing.assert_close(window.apply(image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.7])
@pytest.mark.parametrize("angle", [0.0, -30.0, 45.0])
def test_a_window_by_the_formula(scale: float, angle: float):
    """Row and column of each seen pixel, with loops: turn the offset from the centre back."""
    window = Window(9, 12, 31.0, 34.5, scale, angle)
    seen = window.apply(coordinates(64, 70))
    turn = np.exp(1j * np.radians(angle))
    for i, j in itertools.product(range(9), range(12)):
        # Columns are real, rows upwards imaginary, so a product by exp(-i angle) turns clockwise.
        offset = ((j + 0.5 - 6) - 1j * (i + 0.5 - 4.5)) / scale / turn
        row, column = 31.0 - offset.imag - 0.5, 34.5 + offset.real - 0.5
        np.testing.assert_allclose(seen[:, i, j], (row, column), atol=1e-3)


@given(st.integers(0, 2**32 - 1), st.floats(1, 2), st.floats(0, 45))
@settings(max_examples=50)
def test_the_mask_follows_the_pixels_through_a_window(seed: int, scale: float, rotation: float):
    image = coordinates(40, 50)
    window = Window.draw(np.random.default_rng(seed), (40, 50), 32, scale, rotation)
    ids = window.apply_mask((1000 + image[0] * 50 + image[1]).long())
    row, column = window.apply(image)
    labelled, place = ids != IGNORED, ids - 1000
    # Interpolated, a pixel is at most half a pixel from the row and column of the nearest.
    assert ((row - place // 50).abs()[labelled] <= 0.501).all()
    assert ((column - place % 50).abs()[labelled] <= 0.501).all()
    inside = window.places(40, 50)[2]
    assert torch.equal(labelled, inside) and inside[14:18, 14:18].all()
    assert image[0].min() <= row.min() and row.max() <= image[0].max()  # mirrored, not black


def test_a_window_larger_than_the_image_is_unlabelled_outside():
    window = Window.draw(np.random.default_rng(0), (20, 40), 32)
    assert window.row == 16  # 32 rows on 20: it begins at the top
    mask = window.apply_mask(torch.zeros(20, 40, dtype=torch.long))
    assert (mask[:20] == 0).all() and (mask[20:] == IGNORED).all()


def test_windows_are_drawn_in_their_ranges():
    rng = np.random.default_rng(0)
    draws = [Window.draw(rng, (188, 200), 128, 1.5, 30) for _ in range(2000)]
    logs = np.log([w.scale for w in draws]) / np.log(1.5)
    angles = np.array([w.angle for w in draws]) / 30
    for values in (logs, angles):
        assert -1 <= values.min() < -0.99 and 0.99 < values.max() <= 1
        assert abs(values.mean()) < 0.05 and abs(values.std() - 3**-0.5) < 0.03
    for w in draws:
        half = min(64 / w.scale, 94)
        assert half - 1e-9 <= w.row <= 188 - half + 1e-9


def test_a_part_of_the_image_is_enough_for_a_window():
    rng = np.random.default_rng(0)
    image, mask = torch.rand(2, 60, 90), torch.randint(0, 9, (60, 90))
    shares = []
    for side, scale in [(16, 1.0), (16, 1.4), (40, 1.9), (100, 1.4)] * 15:
        rotation = 0.0 if scale == 1 else 180.0
        window = Window.draw(rng, (60, 90), side, scale, rotation)
        part, moved = window.part(60, 90)
        torch.testing.assert_close(
            moved.apply(image[(..., *part)]), window.apply(image), rtol=0, atol=1e-4
        )
        found, whole = moved.apply_mask(mask[part]), window.apply_mask(mask)
        assert (found != whole).float().mean() < 0.01  # rounding at the borders of pixels
        shares.append(mask[part].numel() / mask.numel())
    assert min(shares) < 0.1 and max(shares) == 1
