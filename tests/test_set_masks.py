"""What masks mean in a set: smooth edges, numbered particles, names, id maps, scribbles."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_prepare import gray, ids_of, png, run, tiff, write_raw

from annotation.edges import assign_edges
from annotation.outlines import outlines, to_geojson
from dataset import set_masks, set_plan, source_files
from imaging import imagefile
from tests.masks import disc
from tests.test_annotations import labelme, roi, roi_set
from tests.test_pairs import put

SIDE = 64
# Matrix (0) with a disc of class 1, one of class 2, and class 1 across their common edge.
IDS = np.zeros((SIDE, SIDE), np.uint8)
IDS[4:36, 4:36][disc(32, 14)] = 1
IDS[26:58, 26:58][disc(32, 15)] = 2
IDS[50:60, 4:20] = 1
IMAGES = [gray(n, (SIDE, SIDE)) for n in range(4)]
LEVELS = np.array([0, 128, 255], np.uint8)
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (255, 255, 0)], np.uint8)


def smooth(levels: np.ndarray, ids: np.ndarray = IDS, by: float = 0.8) -> np.ndarray:
    """Drawn with smooth edges: a blur of the levels, pixels far from an edge unchanged."""
    return cv2.GaussianBlur(levels[ids], (5, 5), by)


def masks_of(folder: Path, masks, *options: str, **how) -> dict[str, np.ndarray]:
    write_raw(folder, [png(m) for m in masks], images=IMAGES[: len(masks)], **how)
    assert run(folder, *options) == 0
    return ids_of(folder / "set")


def neighbours(ids: np.ndarray) -> np.ndarray:
    """Which classes (C, H, W) are drawn within 5 pixels."""
    square = np.ones((11, 11), np.uint8)
    return np.stack([cv2.dilate((ids == c).astype(np.uint8), square) for c in range(3)])


# ---------------------------------------------------------------- smooth edges


@pytest.mark.parametrize("levels", [LEVELS, COLOURS])
@pytest.mark.parametrize("palette", [True, False])
def test_a_smooth_edge_never_becomes_a_rim_of_a_third_class(tmp_path, capsys, levels, palette):
    text = " ".join(f"{i}={','.join(map(str, np.atleast_1d(v)))}" for i, v in enumerate(levels))
    options = ["--palette", text] if palette else ["--mask_kind", "auto"]
    for ids in masks_of(tmp_path, [smooth(levels)] * 3, *options).values():
        near = neighbours(IDS)
        assert np.take_along_axis(near, ids[None].astype(int), 0).all()
        # A pixel between 0 and 2 alone is of one of them, and only few pixels change sides.
        assert not (ids == 1)[near[1] == 0].any()
        assert (ids != IDS).mean() < 0.02
    assert "smooth edges (3 mask(s)" in capsys.readouterr().out


def test_masks_without_smooth_edges_stay_as_they_are(tmp_path, capsys):
    thin = IDS.copy()
    thin[:, 31] = 1  # a line of one pixel between and within the others
    for ids in masks_of(tmp_path, [LEVELS[thin]] * 3, "--palette", "0=0 1=128 2=255").values():
        np.testing.assert_array_equal(ids, thin)
    assert "smooth edges" not in capsys.readouterr().out


def test_a_thin_line_that_is_no_edge_is_a_class_without_a_palette_too(tmp_path):
    lines = np.where(IDS == 2, 2, 0).astype(np.uint8)
    lines[[10, 20], :20] = 1  # one pixel thin everywhere, in the matrix
    for ids in masks_of(tmp_path, [LEVELS[lines]] * 3, "--mask_kind", "levels").values():
        np.testing.assert_array_equal(ids, lines)


def test_one_value_on_edges_alone_is_asked_about(tmp_path, capsys):
    halved = LEVELS[[0, 2]][(IDS == 2).astype(int)]
    edge = cv2.dilate(halved, np.ones((3, 3), np.uint8)) != halved
    write_raw(tmp_path, [png(np.where(edge, 128, halved).astype(np.uint8))] * 3, images=IMAGES[:3])
    assert run(tmp_path, "--mask_kind", "levels") == 2
    told = capsys.readouterr().err
    assert "value 128 only on edges" in told and '--palette "0=0 1=255"' in told


def test_a_patch_of_a_value_that_is_no_class_is_still_refused(tmp_path, capsys):
    mask = LEVELS[IDS].copy()
    mask[30:34, 30:34] = 77
    write_raw(tmp_path, [png(mask)] * 3, images=IMAGES[:3])
    assert run(tmp_path, "--palette", "0=0 1=128 2=255") == 2
    assert "value 77 (16 pixels) is no class" in capsys.readouterr().err


def test_jpeg_noise_and_a_resized_mask(tmp_path):
    noise = np.random.default_rng(0).integers(-9, 10, IDS.shape)
    noisy = np.clip(smooth(LEVELS).astype(int) + noise, 0, 255).astype(np.uint8)
    for ids in masks_of(
        tmp_path, [noisy] * 3, "--tolerance", "12", "--palette", "0=0 1=128 2=255"
    ).values():
        assert not (ids == 1)[neighbours(IDS)[1] == 0].any()
        assert (ids != IDS).mean() < 0.03


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


# Four classes: discs and boxes, and in the second drawing lines of one to three pixels.
FOUR = np.zeros((96, 96), np.uint8)
FOUR[4:36, 4:36][disc(32, 14)] = 1
FOUR[26:58, 26:58][disc(32, 15)] = 2
FOUR[50:80, 4:28] = 3
FOUR[60:90, 50:90] = 1
LINES = FOUR.copy()
for k, width in enumerate((1, 2, 3, 1, 2, 3)):
    LINES[:, 5 + 15 * k : 5 + 15 * k + width] = 1 + k % 3
    LINES[8 + 14 * k : 8 + 14 * k + width] = 3 - k % 3


@pytest.mark.parametrize("quality", [50, 75, 85, 95])
@pytest.mark.parametrize(
    "values",
    [np.array([0, 64, 128, 255], np.uint8),
     np.array([(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)], np.uint8)],
)  # fmt: skip
@pytest.mark.parametrize(("drawn", "tolerance"), [(FOUR, 40), (LINES, 16), (LINES, 40)])
def test_of_a_jpeg_no_third_class_gains_or_it_is_refused(
    tmp_path, capsys, drawn, tolerance, values, quality
):
    images = [gray(n, drawn.shape) for n in range(3)]
    write_raw(tmp_path, [jpeg(values[drawn], quality)] * 3, images=images, suffix=".jpg")
    palette = " ".join(f"{i}={','.join(map(str, np.atleast_1d(v)))}" for i, v in enumerate(values))
    code = run(tmp_path, "--palette", palette, "--tolerance", str(tolerance))
    if code:
        assert code == 2 and "packed by JPEG" in (told := capsys.readouterr().err)
        assert "export it as PNG" in told.partition("--tolerance")[0]
        assert quality < 95 or drawn is LINES or values.ndim == 2
        return
    square = np.ones((5, 5), np.uint8)
    near = np.stack([cv2.dilate((drawn == c).astype(np.uint8), square) for c in range(4)])
    for ids in ids_of(tmp_path / "set").values():
        third = np.take_along_axis(near, ids[None].astype(int), 0) == 0
        assert third.mean() < 0.0005 and (ids != drawn).mean() < 0.005


def test_an_edge_by_hand() -> None:
    row = np.array([0, 0, 0, 128, 255, 255, 255, 255, 200, 128, 128, 128], np.int64)
    values = np.tile(row, (5, 1))[..., None]
    levels = np.array([[0], [128], [255]])
    distance = np.abs(values - levels.T)
    ids, strange = assign_edges(values, distance.argmin(2), distance.min(2) == 0, levels, 0)
    assert ids.tolist() == [[0, 0, 0, 2, 2, 2, 2, 2, 2, 1, 1, 1]] * 5  # 128 is 127 away from 255
    assert not strange.any()


def test_the_rim_of_something_small_is_no_class_of_its_own() -> None:
    levels = np.array([[0], [85], [170], [255]], np.int64)
    values = np.zeros((9, 9, 1), np.int64)
    values[3:6, 3:6] = 85  # a smooth dot of level 170: its rim has the level of another class
    values[4, 4] = 170
    values[[3, 3, 5, 5], [3, 5, 3, 5]] = 40
    distance = np.abs(values - levels.T)
    ids, strange = assign_edges(values, distance.argmin(2), distance.min(2) == 0, levels, 0)
    assert set(np.unique(ids)) == {0, 2} and ids[4, 4] == 2 and not strange.any()


def test_a_colour_between_two_is_not_given_to_a_third_that_is_nearer_in_colour() -> None:
    levels = np.array([(0, 0, 0), (200, 0, 0), (100, 30, 0)], np.int64)
    drawn = np.zeros((7, 9), np.int64)
    drawn[:, 5:], drawn[4:, :3] = 1, 2  # the third fills a corner
    values = levels[drawn]
    values[:, 4] = 120, 0, 0  # a smooth edge between the first two, 2 pixels from the third
    distance = np.abs(values[:, :, None] - levels).max(axis=3)
    ids, strange = assign_edges(values, distance.argmin(2), distance.min(2) == 0, levels, 0)
    drawn[:, 4] = 1
    assert (ids == drawn).all() and not strange.any()


# ---------------------------------------------------------------- ids beside levels and colours


@pytest.mark.parametrize("levels", [LEVELS, COLOURS])
def test_a_corrected_class_map_goes_back_in_beside_drawn_masks(tmp_path, capsys, levels):
    corrected = np.roll(IDS, 3, axis=0)
    got = masks_of(tmp_path, [levels[IDS], levels[IDS], corrected, np.zeros_like(IDS)])
    assert len(got) == 4
    for name, ids in got.items():
        wanted = {"2": corrected, "3": np.zeros_like(IDS)}.get(name[0], IDS)
        np.testing.assert_array_equal(ids, wanted)
    assert "1 mask(s) of class ids (as 2_s2_0_0.png)" in capsys.readouterr().out


# ---------------------------------------------------------------- numbered particles


def numbered(count: int) -> np.ndarray:
    ids = np.zeros((SIDE, SIDE), np.uint16)
    for n in range(count):
        top, left = 2 + 9 * (n // 7), 2 + 9 * (n % 7)
        ids[top : top + 6, left : left + 6] = n + 1
    return ids


def test_numbered_particles_are_recognised_and_read_as_one_class(tmp_path, capsys):
    masks = [numbered(20), numbered(31), numbered(2)]
    write_raw(tmp_path, [png(m) for m in masks], images=IMAGES[:3])
    assert run(tmp_path) == 2
    told = capsys.readouterr().err
    assert "numbered particle" in told and "--mask_kind particles" in told
    assert run(tmp_path, "--mask_kind", "particles") == 0
    assert "set: 2 classes" in capsys.readouterr().out
    for name, ids in ids_of(tmp_path / "set").items():
        np.testing.assert_array_equal(ids, masks[int(name[0])] > 0)


@pytest.mark.parametrize("coloured", [False, True])
def test_few_numbered_particles_are_read_as_classes_with_a_warning(tmp_path, capsys, coloured):
    colours = np.random.default_rng(0).permutation(np.arange(1, 27))[:8]  # base 3, none black
    colours[0] = 0
    masks = [numbered(5), numbered(7), numbered(2)]
    shown = [colours[m][..., None] // (9, 3, 1) % 3 * 120 if coloured else m for m in masks]
    write_raw(tmp_path, [png(m.astype(np.uint8)) for m in shown], images=IMAGES[:3])
    assert run(tmp_path) == 0
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if "connected region" in line)
    assert "each of its 7 values but 0" in line and "--mask_kind particles" in line
    assert run(tmp_path, "--mask_kind", "particles", out="cured") == 0
    assert "connected region" not in capsys.readouterr().out
    for name, ids in ids_of(tmp_path / "cured").items():
        np.testing.assert_array_equal(ids, masks[int(name[0])] > 0)


def test_classes_of_several_pieces_or_one_region_alone_are_not_taken_for_numbers(tmp_path, capsys):
    apart = numbered(4)
    apart[apart == 4] = 2  # class 2 is in two pieces
    for number, masks in enumerate([[numbered(3), apart], [numbered(1)] * 2]):
        place = tmp_path / str(number)
        write_raw(place, [png(m) for m in masks], images=IMAGES[:2])
        assert run(place) == 0
        assert "connected region" not in capsys.readouterr().out


def test_many_classes_in_several_pieces_are_no_particles(tmp_path):
    many = np.tile(numbered(9)[:20], (3, 1)).astype(np.uint8)
    got = masks_of(tmp_path, [np.pad(many, ((0, 4), (0, 0)))] * 3)
    assert max(ids.max() for ids in got.values()) == 9


def boxes(names: list[str], size=(SIDE, SIDE)) -> bytes:
    """Squares of 6 pixels where ``numbered`` has them, as labelme saves them."""
    places = [(2 + 9 * (n % 7), 2 + 9 * (n // 7)) for n in range(len(names))]
    drawn: list[tuple[str, list[tuple[int, int]], str, dict[str, object]]] = [
        (name, [(x, y), (x + 6, y + 6)], "rectangle", {})
        for name, (x, y) in zip(names, places, strict=True)
    ]
    return labelme(*drawn, size=size).encode()


def test_numbered_outlines_are_recognised_and_read_as_one_class(tmp_path, capsys):
    counts = [20, 31, 2]
    for stem, count in zip(write_raw(tmp_path, [None] * 3, images=IMAGES[:3]), counts, strict=True):
        names = [str(n + 1) for n in range(count)]
        put(tmp_path / "gt" / f"{stem}.json", boxes(names))
    assert run(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1_s1_0_0.json: every class is one outline, a numbered particle" in line
    assert "--mask_kind particles" in line and "--mask_kind ids" in line
    assert run(tmp_path, "--mask_kind", "particles") == 0
    assert "set: 2 classes" in capsys.readouterr().out
    for name, ids in ids_of(tmp_path / "set").items():
        np.testing.assert_array_equal(ids, numbered(counts[int(name[0])]) > 0)
    assert run(tmp_path, "--mask_kind", "ids", out="ids") == 0
    for name, ids in ids_of(tmp_path / "ids").items():
        np.testing.assert_array_equal(ids, numbered(counts[int(name[0])]))


@pytest.mark.parametrize("words", [False, True])
def test_few_numbered_outlines_are_read_as_classes_with_a_warning(tmp_path, capsys, words):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        names = ["carbide", "nitride", "pore"] if words else ["1", "2", "class 3"]
        put(tmp_path / "gt" / f"{stem}.json", boxes(names))
    assert run(tmp_path) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "is one outline" in line]
    assert len(told) == (0 if words else 1)  # people number particles, and name classes
    assert words or ("its 3 classes but 0" in told[0] and "--mask_kind particles" in told[0])
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, numbered(3))


MINERALS = ["augite", "biotite", "calcite", "dolomite", "epidote", "fluorite", "garnet", "halite"]
MINERALS += ["ilmenite"]


@pytest.mark.parametrize("numbered_names", [False, True])
def test_many_names_each_drawn_once_are_classes(tmp_path, capsys, numbered_names):
    names = [f"grain{n}" for n in range(1, 10)] if numbered_names else MINERALS
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        put(tmp_path / "gt" / f"{stem}.json", boxes(names))
    assert run(tmp_path) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "is one outline" in line]
    assert len(told) == numbered_names
    assert not told or ("its 9 classes but 0" in told[0] and "--mask_kind particles" in told[0])
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, numbered(9))


def test_many_classes_of_several_outlines_are_no_particles(tmp_path):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        names = [str(n % 9 + 1) for n in range(18)]
        put(tmp_path / "gt" / f"{stem}.json", boxes(names))
    assert run(tmp_path) == 0
    assert max(ids.max() for ids in ids_of(tmp_path / "set").values()) == 9


# ---------------------------------------------------------------- names of classes


def regions(**names: str) -> bytes:
    """Squares of 4 pixels, one beside the other, by their places (a: 0, b: 10, c: 20, ...)."""
    found = {}
    for key, name in names.items():
        x = 10 * (ord(key) - ord("a"))
        found[key] = roi(1, [(x, 0), (x + 4, 0), (x + 4, 4), (x, 4)], name)
    return roi_set(**found)


def test_numbers_that_regions_share_are_of_their_classes_in_every_file(tmp_path, capsys):
    stems = write_raw(tmp_path, [None] * 3, images=IMAGES[:3])
    first = regions(a="phase 1", b="phase 1", c="phase 2", d="pore-1", e="pore-2")
    put(tmp_path / "gt" / f"{stems[0]}.zip", first)
    put(tmp_path / "gt" / f"{stems[1]}.zip", regions(a="phase 2", b="phase 2", c="phase 3"))
    put(tmp_path / "gt" / f"{stems[2]}.zip", regions(a="pore"))
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "classes by name: 0 background, 1 phase 1, 2 phase 2, 3 phase 3, 4 pore" in report
    (note,) = (line for line in report.splitlines() if "differ in their number" in line)
    assert "of one class: pore (pore-1, pore-2, pore); where" in note and "--class_names" in note
    wanted = [(1, 1, 2, 4, 4), (2, 2, 3, 0, 0), (4, 0, 0, 0, 0)]
    got = ids_of(tmp_path / "set")
    for stem, own in zip(stems, wanted, strict=True):
        assert tuple(got[stem][2, [2, 12, 22, 32, 42]].tolist()) == own


def test_a_number_that_is_of_several_regions_is_joined_with_a_warning(tmp_path, capsys):
    stems = write_raw(tmp_path, [None] * 3, images=IMAGES[:3])
    first = regions(a="carbide", b="carbide-1", c="carbide-2", d="carbide-1-1", e="pore")
    put(tmp_path / "gt" / f"{stems[0]}.zip", first)
    put(tmp_path / "gt" / f"{stems[1]}.zip", regions(a="carbide-2", b="carbide-2-1", c="pore-1"))
    put(tmp_path / "gt" / f"{stems[2]}.zip", regions(a="pore-1", b="pore-2"))
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "classes by name: 0 background, 1 carbide, 2 pore" in report
    note, doubt = sorted(
        (line for line in report.splitlines() if "differ in their number" in line),
        key=lambda line: "warning" in line,
    )
    assert "of one class: pore (pore, pore-1, pore-2); where" in note and "arning" not in note
    assert "warning" in doubt and "to one class: carbide (carbide, carbide-1, carbide-2," in doubt
    assert "though several are called carbide-1, carbide-2; where" in doubt
    got = ids_of(tmp_path / "set")
    for stem, own in zip(stems, [(1, 1, 1, 1, 2), (1, 1, 2, 0, 0), (2, 2, 0, 0, 0)], strict=True):
        assert tuple(got[stem][2, [2, 12, 22, 32, 42]].tolist()) == own


def test_numbers_that_are_joined_are_told_and_kept_where_names_are_given(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        put(tmp_path / "gt" / f"{stem}.zip", regions(a="phase 1", b="phase 2"))
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "0 background, 1 phase" in report and "phase (phase 1, phase 2)" in report
    assert run(tmp_path, "--class_names", "matrix,phase 1,phase 2", out="given") == 0
    assert "differ in their number" not in capsys.readouterr().out
    for ids in ids_of(tmp_path / "given").values():
        assert ids[2, [2, 12, 22]].tolist() == [1, 2, 0] and (ids > 0).sum() == 32


def test_numbers_in_names_of_files_are_of_their_classes(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        for number in (1, 2):
            mask = np.where(number == IDS, 255, 0).astype(np.uint8)
            put(tmp_path / "gt" / f"{stem}_phase {number}.png", png(mask))
    assert run(tmp_path, "--mask_pattern", "{stem}_{class}.png") == 0
    assert "classes by name: 0 background, 1 phase 1, 2 phase 2" in capsys.readouterr().out
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, IDS)


def test_outlines_without_a_pixel_are_told_once_for_each_file(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        shapes = [("pore", [(1, 1), (5, 5)]), ("pore", [(8.6, 1), (9.4, 5)])]
        drawn = labelme(*((n, where, "rectangle", {}) for n, where in shapes), size=IDS.shape)
        put(tmp_path / "gt" / f"{stem}.json", drawn.encode())
    assert run(tmp_path) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "any pixel's centre" in line]
    assert len(told) == 3 and all("1 outline(s)" in line for line in told)
    for ids in ids_of(tmp_path / "set").values():
        assert ids.sum() == 16


def stack_of_regions(tmp_path: Path, *slices: int) -> list[str]:
    """Two stacks of 3 pages; a square at 10 times the slice on each of the slices."""
    stems = write_raw(tmp_path, [None] * 2, images=[tiff(IMAGES[:3])] * 2)
    found = {}
    for at in slices:
        corners = [(10 * at, 0), (10 * at + 4, 0), (10 * at + 4, 4), (10 * at, 4)]
        found[f"r{at}"] = roi(1, corners, "pore", at=(at, 0, 0, 0))
    for stem in stems:
        put(tmp_path / "gt" / f"{stem}.zip", roi_set(**found))
    return stems


def test_regions_of_a_stack_are_of_their_own_pages(tmp_path, capsys):
    stack_of_regions(tmp_path, 1, 3)
    assert run(tmp_path, "--page", "each", "--test", "0") == 0
    got = ids_of(tmp_path / "set")
    assert len(got) == 4
    for name, ids in got.items():
        page = int(name.partition("-p")[2][0])
        assert page in (1, 3)
        expected = np.zeros_like(IDS)
        expected[:4, 10 * page : 10 * page + 4] = 1
        np.testing.assert_array_equal(ids, expected)
    assert "one page, taken for" not in capsys.readouterr().out
    assert run(tmp_path, "--page", "3", "--test", "0", out="third") == 0
    assert "zip: outlines on slice 1 not used, give --page each" in capsys.readouterr().out
    for ids in ids_of(tmp_path / "third").values():
        assert ids[:4, 30:34].all() and ids.sum() == 16


@pytest.mark.parametrize(
    ("slices", "options", "says"),
    [
        ((3,), [], "outlines on slice 3, of 0_s0_0_0.tif page 1 is taken; give --page 3, or each"),
        ((1, 4), ["--page", "each"], "outlines on slice 4, 0_s0_0_0.tif has 3"),
    ],
)
def test_regions_of_another_page_are_one_line(tmp_path, capsys, slices, options, says):
    stack_of_regions(tmp_path, *slices)
    assert run(tmp_path, *options) == 2
    assert says in capsys.readouterr().err.splitlines()[0]


def test_regions_of_several_slices_for_one_image_are_refused(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 2, images=IMAGES[:2]):
        corners = [(0, 0), (4, 0), (4, 4), (0, 4)]
        found = {f"r{at}": roi(1, corners, "pore", at=(at, 0, 0, 0)) for at in (1, 2)}
        put(tmp_path / "gt" / f"{stem}.zip", roi_set(**found))
    assert run(tmp_path) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert "0_s0_0_0.zip: outlines on several slices (slice 1, slice 2); save one file" in line


def test_outlines_are_masks_and_name_the_classes(tmp_path, capsys):
    stems = write_raw(tmp_path, [None] * 3, images=IMAGES[:3])
    names, colours = ["matrix", "pore", "Carbide"], [(0, 0, 0)] * 3
    swapped = np.array([0, 2, 1], np.uint8)[IDS]  # the set's order is of the alphabet
    put(tmp_path / "gt" / f"{stems[0]}.geojson", to_geojson(outlines(IDS), names, colours).encode())
    box = [(10, 20), (30, 40)]
    put(
        tmp_path / "gt" / f"{stems[1]}.json",
        labelme(("pore", box, "rectangle", {}), size=IDS.shape).encode(),
    )
    corners = [(10, 20), (30, 20), (30, 40), (10, 40)]
    put(tmp_path / "gt" / f"{stems[2]}.zip", roi_set(a=roi(0, corners, "carbide-1")))
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "classes by name: 0 background, 1 Carbide, 2 pore" in report
    got = ids_of(tmp_path / "set")
    boxed = np.zeros_like(IDS)
    boxed[20:40, 10:30] = 1
    np.testing.assert_array_equal(got[stems[0]], swapped)
    np.testing.assert_array_equal(got[stems[1]], boxed * 2)
    np.testing.assert_array_equal(got[stems[2]], boxed)
    assert run(tmp_path, "--class_names", "matrix,pore,carbide", out="named") == 0
    np.testing.assert_array_equal(ids_of(tmp_path / "named")[stems[0]], IDS)


def test_outlines_beside_masks_of_pixels_need_the_names(tmp_path, capsys):
    stems = write_raw(tmp_path, [png(IDS), None, png(IDS)], images=IMAGES[:3])
    text = to_geojson(outlines(IDS), ["matrix", "pore", "carbide"], [(0, 0, 0)] * 3)
    put(tmp_path / "gt" / f"{stems[1]}.geojson", text.encode())
    assert run(tmp_path) == 2
    assert '--class_names "background,carbide,pore"' in capsys.readouterr().err
    assert run(tmp_path, "--class_names", "matrix,pore,carbide") == 0
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, IDS)


def test_outlines_by_another_name_are_named(tmp_path, capsys):
    write_raw(tmp_path, [None] * 3, images=IMAGES[:3])
    put(tmp_path / "gt" / "drawn.geojson", to_geojson([], [], []).encode())
    assert run(tmp_path) == 2
    assert "drawn.geojson has the name of none; name it as its image" in capsys.readouterr().err


def test_files_of_outlines_without_any_are_named(tmp_path, capsys):
    stems = write_raw(tmp_path, [None] * 3, images=IMAGES[:3])
    for stem in stems:
        put(tmp_path / "gt" / f"{stem}.json", b'{"shapes": []}')
    assert run(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{stems[0]}.json: no outline in it, nor in 2 other(s)" in line


def test_files_beside_images_that_are_no_outlines_are_no_masks(tmp_path, capsys):
    stems = write_raw(tmp_path, [png(IDS)] * 2 + [None], images=IMAGES[:3])
    put(tmp_path / "gt" / f"{stems[2]}.json", b'{"magnification": 500}')
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert f"{stems[2]}.json: 1 file(s) of outlines are not read" in report
    assert "1 image(s) without a mask, taken as unlabelled" in report


def test_outlines_of_another_size_or_class_are_one_line(tmp_path, capsys):
    stems = write_raw(tmp_path, [png(IDS)] * 2 + [None], images=IMAGES[:3])
    put(
        tmp_path / "gt" / f"{stems[2]}.json",
        json.dumps({"shapes": [], "imageHeight": 9, "imageWidth": 9}).encode(),
    )
    assert run(tmp_path, "--class_names", "matrix,pore,carbide") == 2
    assert "drawn on an image of 9x9 pixels, its image has 64x64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("{stem}-tag-{class}-0.png", "{0}-tag-{1}-0.png"), ("{class}/{stem}.png", "{1}/{0}.png"),
     ("{stem}/{class}.png", "{0}/{1}.png")],
)  # fmt: skip
def test_one_file_for_each_class(tmp_path, capsys, pattern, name):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        for number, label in ((2, "pore"), (1, "carbide")):
            put(
                tmp_path / "gt" / name.format(stem, label),
                png(np.where(number == IDS, 255, 0).astype(np.uint8)),
            )
    assert run(tmp_path, "--mask_pattern", pattern) == 0
    assert "classes by name: 0 background, 1 carbide, 2 pore" in capsys.readouterr().out
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, IDS)


@pytest.mark.parametrize("by_name", [False, True])
def test_files_of_classes_label_every_page_of_a_stack(tmp_path, capsys, by_name):
    pages = [IDS, np.rot90(IDS).copy()]
    for stem in write_raw(tmp_path, [None] * 2, images=[tiff(IMAGES[:2])] * 2):
        for number, label in ((1, "carbide"), (2, "pore")):
            masks = [(ids == number).astype(np.uint8) * 255 for ids in pages]
            if by_name:  # a file for each page
                for page, mask in enumerate(masks, start=1):
                    put(tmp_path / "gt" / f"{stem}-p{page}_{label}.png", png(mask))
            else:
                put(tmp_path / "gt" / f"{stem}_{label}.tif", tiff(masks))
    end = "png" if by_name else "tif"
    words = ["--mask_pattern", "{stem}_{class}." + end, "--page", "each", "--test", "0"]
    assert run(tmp_path, *words) == 0
    found = ids_of(tmp_path / "set")
    assert len(found) == 4
    for name, ids in found.items():
        np.testing.assert_array_equal(ids, pages["-p2" in name])


def test_files_of_classes_with_other_pages_than_their_image_are_refused(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 2, images=[tiff(IMAGES[:3])] * 2):
        for label in ("a", "b"):
            put(tmp_path / "gt" / f"{stem}_{label}.tif", tiff([IDS, IDS]))
    words = ["--mask_pattern", "{stem}_{class}.tif", "--page", "each"]
    assert run(tmp_path, *words) == 2
    assert "_a.tif: 2 pages, its image has 3; save as many pages in both" in capsys.readouterr().err


def test_files_of_two_classes_that_overlap_are_told(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        put(tmp_path / "gt" / f"{stem}_a.png", png(((IDS > 0) * 255).astype(np.uint8)))
        put(tmp_path / "gt" / f"{stem}_b.png", png(((IDS == 2) * 255).astype(np.uint8)))
    assert run(tmp_path, "--mask_pattern", "{stem}_{class}.png") == 0
    assert f"{3 * (IDS == 2).sum()} pixels" in capsys.readouterr().out
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, IDS)


# ---------------------------------------------------------------- scribbles


def test_names_that_are_one_too_few_for_scribbles_get_the_palette_that_fits(tmp_path, capsys):
    strokes = np.zeros((SIDE, SIDE), np.uint8)
    strokes[10:12, 5:50], strokes[30:32, 5:25], strokes[30:32, 25:50] = 1, 1, 2
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        put(tmp_path / "gt" / f"{stem}.png", png(strokes))
    assert run(tmp_path, "--class_names", "a,b") == 2
    (line,) = (t for t in capsys.readouterr().err.splitlines() if "--class_names" in t)
    assert 'if nobody labelled class 0, give --palette "ignore=0 0=1 1=2"' in line


def test_scribbles_on_colours_get_a_palette_that_works(tmp_path, capsys):
    strokes = np.zeros((SIDE, SIDE, 3), np.uint8)
    strokes[10:12, 5:50], strokes[30:32, 5:25] = (255, 0, 0), (255, 0, 0)
    strokes[30:32, 25:50] = (0, 0, 255)
    masks_of(tmp_path, [strokes] * 3)
    told = next(x for x in capsys.readouterr().out.splitlines() if "like scribbles" in x)
    palette = told.split('--palette "')[1].split('"')[0]
    assert palette == "ignore=0,0,0 0=0,0,255 1=255,0,0"
    assert run(tmp_path, "--palette", palette, out="mended") == 0
    for ids in ids_of(tmp_path / "mended").values():
        assert ids[[0, 10, 30], 30].tolist() == [255, 1, 0]


def put_strokes(root, stem):
    """Files of strokes of the classes a and b."""
    for row, label in ((10, "a"), (30, "b")):
        strokes = np.zeros((SIDE, SIDE), np.uint8)
        strokes[row : row + 2, 5:50] = 255
        put(root / "gt" / f"{stem}_{label}.png", png(strokes))


def test_scribbles_in_files_of_classes_get_a_cure_that_works(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        put_strokes(tmp_path, stem)
    words = ["--mask_pattern", "{stem}_{class}.png"]
    assert run(tmp_path, *words) == 0
    told = next(x for x in capsys.readouterr().out.splitlines() if "like scribbles" in x)
    assert 'add a file of the class "ignore" that is white everywhere' in told
    assert run(tmp_path, *words, "--ignore", "0", out="none") == 2
    refused = capsys.readouterr().err
    assert "--ignore: of no effect on" in refused and "draw a large shape" not in refused
    assert 'add a file of the class "ignore" that is white everywhere' in refused
    for path in list((tmp_path / "gt").glob("*_a.png")):
        put(
            path.with_name(path.name.replace("_a.", "_ignore.")),
            png(np.full((SIDE, SIDE), 255, np.uint8)),
        )
    assert run(tmp_path, *words, "--class_names", "a,b", out="mended") == 0
    assert "in the files of two classes" not in capsys.readouterr().out  # ignore is below them
    for ids in ids_of(tmp_path / "mended").values():
        assert ids[[0, 10, 30], 30].tolist() == [255, 0, 1]


def test_scribbles_on_a_file_of_a_class_get_a_cure_that_works(tmp_path, capsys):
    rest = np.full((SIDE, SIDE), 255, np.uint8)
    rest[10:12, 5:50] = rest[30:32, 5:50] = 0
    for stem in write_raw(tmp_path, [None] * 3, images=IMAGES[:3]):
        put(tmp_path / "gt" / f"{stem}_rest.png", png(rest))
        put_strokes(tmp_path, stem)
    words = ["--mask_pattern", "{stem}_{class}.png"]
    assert run(tmp_path, *words) == 0
    told = next(x for x in capsys.readouterr().out.splitlines() if "like scribbles" in x)
    assert 'call the file of rest "ignore"' in told
    assert 'give them with it first: --class_names "a,b";' in told
    for path in list((tmp_path / "gt").glob("*_rest.png")):
        path.rename(path.with_name(path.name.replace("_rest.", "_ignore.")))
    assert run(tmp_path, *words, "--class_names", "a,b", out="mended") == 0
    for ids in ids_of(tmp_path / "mended").values():
        assert ids[[0, 10, 30], 30].tolist() == [255, 0, 1]


def test_scribbles_are_warned_about_with_both_cures(tmp_path, capsys):
    strokes = np.zeros((SIDE, SIDE), np.uint8)
    strokes[10:12, 5:50], strokes[30:32, 5:25], strokes[30:32, 25:50] = 1, 1, 2
    got = masks_of(tmp_path, [strokes] * 3)
    assert all((ids == strokes).all() for ids in got.values())
    told = next(x for x in capsys.readouterr().out.splitlines() if "like scribbles" in x)
    assert told.startswith("warning: ") and "3 mask(s)" in told and "drawn in full" in told
    palette = told.split('--palette "')[1].split('"')[0]
    assert palette == "ignore=0 0=1 1=2"
    assert run(tmp_path, "--palette", palette, out="mended") == 0
    assert "like scribbles" not in capsys.readouterr().out
    for ids in ids_of(tmp_path / "mended").values():
        np.testing.assert_array_equal(ids, np.array([255, 0, 1], np.uint8)[strokes])


# ---------------------------------------------------------------- how often masks are decoded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each mask was decoded."""
    times, decode = Counter[str](), imagefile.decode

    def counting(path: Path, page: int = 1, seen: bool = True) -> imagefile.Picture:
        times.update([path.name] if path.parent.name == "gt" else [])
        return decode(path, page, seen)

    for module in (set_masks, source_files, set_plan):  # all that reads masks
        monkeypatch.setattr(module, "decode", counting)
    return times


def in_palette(kind: str) -> bytes:
    picture, file = Image.fromarray(IDS), io.BytesIO()
    picture.putpalette(COLOURS.ravel().tolist())
    picture.save(file, kind)
    return file.getvalue()


PALETTE = "0=0 1=128 2=255"
# Masks, options, and how often each is decoded where none is kept: looked at, counted and written,
# and once more for each question that only its pixels answer.
READ = {
    "two levels": (".png", [png(LEVELS[np.minimum(IDS, 1)])] * 3, [], 3),
    "ids that may be particles": (".png", [png(IDS)] * 3, [], 4),
    "a palette file": (".png", [in_palette("PNG")] * 3, [], 4),
    "palettes in TIFF": (".tif", [in_palette("TIFF")] * 3, [], 4),
    "smooth edges": (".png", [png(smooth(LEVELS))] * 3, ["--mask_kind", "levels"], 5),
    "JPEG": (".jpg", [jpeg(LEVELS[IDS], 90)] * 3, ["--palette", PALETTE, "--tolerance", "30"], 4),
    "a part": (".png", [png(LEVELS[IDS])] * 3, ["--crop", "0,4,0,0", "--mask_kind", "levels"], 5),
    "colours": (".png", [png(COLOURS[IDS])] * 3, [], 5),
}


@pytest.mark.parametrize("name", READ)
def test_each_mask_is_decoded_once_or_where_none_is_kept_as_often_as_counted(
    tmp_path, monkeypatch, capsys, decoded, name
):
    suffix, masks, options, most = READ[name]
    write_raw(tmp_path, masks, suffix, images=IMAGES[:3])
    assert run(tmp_path, *options) == 0
    assert set(decoded.values()) == {1} and len(decoded) == 3
    found, told = ids_of(tmp_path / "set"), capsys.readouterr().out
    decoded.clear()
    monkeypatch.setattr(set_masks, "KEPT", 0)
    assert run(tmp_path, *options, out="again") == 0
    assert set(decoded.values()) == {most} and len(decoded) == 3
    assert capsys.readouterr().out.replace("again", "set") == told
    for image, ids in ids_of(tmp_path / "again").items():
        np.testing.assert_array_equal(ids, found[image])
