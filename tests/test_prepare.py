"""Laying out a user's own images, and looking at a set for leaks: on tiny images made here."""

import csv
import io
import itertools
import os
import re
import shlex
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import find_split, parse_name
from dataset import prepare as program
from dataset.check import check_data
from dataset.mask_values import MOST_CLASSES, find_rule, parse_palette
from dataset.set_check import (
    best_correlation,
    check_set,
    orientations,
    reduce,
    same_in_any_orientation,
)
from dataset.set_draws import draw_groups, draw_single, draw_test_specimens
from dataset.set_plan import tile_starts
from dataset.source_files import read_pixels
from imaging.drawing import palette
from imaging.imagefile import read_image
from imaging.pages import count_pages
from utils.commandline import Termination
from utils.files import DataError

ROOT = Path(__file__).resolve().parents[1]
SIDE = 16
# What every mask below means: four vertical stripes.
STRIPES = np.repeat(np.arange(4, dtype=np.uint8), SIDE // 4)[None].repeat(SIDE, axis=0)


def tiff(pages, order="<", compress=False) -> bytes:
    """A TIFF of pages (H, W) of any number type, written from the file format's description."""
    kinds = {"u": 1, "i": 2, "f": 3}
    out = io.BytesIO()
    out.write((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 0))
    link = 4
    for page in pages:
        data = page.astype(page.dtype.newbyteorder(order)).tobytes()
        half = len(data) // 2 // page.itemsize * page.itemsize
        strips = [data[:half], data[half:]]
        strips = [zlib.compress(s) for s in strips] if compress else strips
        places = []
        for strip in strips:
            places.append(out.tell())
            out.write(strip)
        arrays = out.tell()
        out.write(struct.pack(order + "4I", *places, *map(len, strips)))
        out.write(b"\0" * (out.tell() % 2))
        here = out.tell()
        tags = [
            (256, 4, 1, page.shape[1]),
            (257, 4, 1, page.shape[0]),
            (258, 3, 1, page.itemsize * 8),
            (259, 3, 1, 8 if compress else 1),
            (262, 3, 1, 1),
            (273, 4, 2, arrays),
            (277, 3, 1, 1),
            (278, 4, 1, page.shape[0] // 2),
            (279, 4, 2, arrays + 8),
            (339, 3, 1, kinds[page.dtype.kind]),
        ]
        out.write(struct.pack(order + "H", len(tags)))
        for tag, kind, count, value in tags:
            packed = struct.pack(order + ("HH" if kind == 3 else "I"), value, *[0] * (kind == 3))
            out.write(struct.pack(order + "HHI", tag, kind, count) + packed)
        end = out.tell()
        out.write(struct.pack(order + "I", 0))
        out.seek(link)
        out.write(struct.pack(order + "I", here))
        out.seek(0, io.SEEK_END)
        link = end
    return out.getvalue()


def png(pixels, **how) -> bytes:
    out = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(out, format="PNG", **how)
    return out.getvalue()


def from_table(values, ids=STRIPES, dtype=np.uint8):
    return np.array(values, dtype)[ids]


def palette_image(colours):
    picture = Image.fromarray(STRIPES)
    picture.putpalette(list(itertools.chain(*colours)))
    return picture


def gray(seed=0, shape=(SIDE, SIDE)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_raw(folder: Path, masks, suffix=".png", name="{0}_s{0}_0_0", images=None) -> list[str]:
    """Images in folder/img and encoded masks in folder/gt, one of each for every mask."""
    for part in ("img", "gt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    stems = [name.format(i) for i in range(len(masks))]
    for i, (stem, mask) in enumerate(zip(stems, masks, strict=True)):
        image = gray(i) if images is None else images[i]
        data = image if isinstance(image, bytes) else png(image)
        (folder / "img" / f"{stem}{'.tif' if data[:2] in (b'II', b'MM') else '.png'}").write_bytes(
            data
        )
        if mask is not None:
            (folder / "gt" / f"{stem}{suffix}").write_bytes(mask)
    return stems


def run(folder: Path, *options: str, out: str = "set") -> int:
    base = ["--images", folder / "img", "--masks", folder / "gt", "--out", folder / out]
    return program.main([*map(str, base), *options])


def ids_of(root: Path) -> dict[str, np.ndarray]:
    found = {}
    for split in ("train_numf", "test_numf"):
        for sample in find_split(root, split):
            found[sample.image.stem] = np.asarray(Image.open(sample.mask))
    return found


def rgb(colours):
    return from_table(colours)


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0)]
NOISY = np.clip(
    rgb([(40, 40, 40), (200, 20, 20), (60, 20, 220), (90, 220, 90)]).astype(int)
    + np.random.default_rng(3).integers(-5, 6, (SIDE, SIDE, 3)),
    0,
    255,
).astype(np.uint8)
SHIFTED = "0=0,0,0 1=255,0,0 2=0,0,255 3=0,255,0"
IGNORE_LAST = np.array([0, 1, 2, 255])

MASKS = {
    # name: mask file, suffix, options, id of each stripe
    "ids": (png(STRIPES), ".png", [], [0, 1, 2, 3]),
    "ids in tif": (tiff([STRIPES]), ".tif", [], [0, 1, 2, 3]),
    "class 1 missing": (png(from_table([0, 2, 3, 3])), ".png", [], [0, 2, 3, 3]),
    "0 and 255": (png(from_table([0, 255, 255, 0])), ".png", [], [0, 1, 1, 0]),
    "1 bit": (png(Image.fromarray(STRIPES % 2 == 1)), ".png", [], [0, 1, 0, 1]),
    "gray in three channels": (png(rgb([(v,) * 3 for v in range(4)])), ".png", [], [0, 1, 2, 3]),
    "gray with transparency": (
        png(np.stack([STRIPES, np.full_like(STRIPES, 9)], -1)), ".png", [], [0, 1, 2, 3]
    ),
    "levels": (png(from_table([128, 0, 255, 0])), ".png", [], [1, 0, 2, 0]),
    "levels from 85": (png(from_table([85, 170, 255, 0])), ".png", [], [1, 2, 3, 0]),
    "levels asked for": (
        png(from_table([0, 1, 3, 3])), ".png", ["--mask_kind", "levels"], [0, 1, 2, 2]
    ),
    "16-bit levels": (
        png(from_table([0, 65535, 0, 30000], dtype=np.uint16)), ".png", [], [0, 2, 0, 1]
    ),
    "noisy levels": (
        png(np.array(STRIPES * 80 + gray(5) % 6, np.uint8)), ".png", ["--tolerance", "12"],
        [0, 1, 2, 3],
    ),
    "gray palette": (
        png(from_table([7, 0, 200, 200])), ".png", ["--palette", "0=200 1=7 2=0"], [1, 2, 0, 0]
    ),
    "255 ignored": (png(from_table([0, 1, 2, 255])), ".png", [], IGNORE_LAST),
    "255 ignored as asked": (
        png(from_table([0, 0, 0, 255])), ".png", ["--ignore", "255"], [0, 0, 0, 255]
    ),
    "ignored as 0": (
        png(from_table([0, 1, 2, 255])), ".png", ["--ignored_as", "0"], [0, 1, 2, 0]
    ),
    "value 9 ignored": (
        png(from_table([0, 1, 2, 9])), ".png", ["--ignore=9"], IGNORE_LAST
    ),
    "ignore in palette": (
        png(from_table([0, 50, 99, 7])), ".png", ["--palette", "0=0 1=50 2=99 ignore=7"],
        IGNORE_LAST,
    ),
    "int64 with -1": (
        tiff([from_table([0, 1, 2, -1], dtype=np.int64)]), ".tif", [], IGNORE_LAST
    ),
    "int64 with -1 and a palette": (
        tiff([from_table([5, 6, 7, -1], dtype=np.int64)], ">", True), ".tif",
        ["--palette", "0=5 1=6 2=7"], IGNORE_LAST,
    ),
    "int8 with -1": (tiff([from_table([0, 1, 2, -1], dtype=np.int8)]), ".tif", [], IGNORE_LAST),
    "int16": (tiff([STRIPES.astype(np.int16)], ">"), ".tiff", [], [0, 1, 2, 3]),
    "float": (tiff([STRIPES.astype(np.float32)]), ".tif", [], [0, 1, 2, 3]),
    "float64 with NaN": (
        tiff([from_table([0, 1, 2, np.nan], dtype=np.float64)]), ".tif", [], IGNORE_LAST
    ),
    "colours": (png(rgb(COLOURS)), ".png", ["--palette", SHIFTED], [0, 1, 2, 3]),
    "two colours, one class": (
        png(rgb(COLOURS)), ".png", ["--palette", "0=0,0,0 1=255,0,0 1=0,0,255 2=0,255,0"],
        [0, 1, 1, 2],
    ),
    "colours within 6": (
        png(NOISY), ".png", ["--tolerance", "6", "--palette",
        "3=40,40,40 2=200,20,20 1=60,20,220 0=90,220,90"], [3, 2, 1, 0],
    ),
    "dozens of colours": (png(NOISY), ".png", ["--tolerance", "20"], [0, 2, 1, 3]),
    "colours by brightness": (png(rgb(COLOURS)), ".png", [], [0, 2, 1, 3]),
    "one colour ignored": (
        png(rgb(COLOURS)), ".png", ["--ignore", "0,255,0"], [0, 2, 1, 255]
    ),
    "palette file": (png(palette_image(COLOURS)), ".png", [], [0, 1, 2, 3]),
    "palette file by colour": (
        png(palette_image(COLOURS)), ".png", ["--palette", "3=0,0,0 2=255,0,0 1=0,0,255 0=0,255,0"],
        [3, 2, 1, 0],
    ),
    "palette file, kind colours": (
        png(palette_image(COLOURS)), ".png", ["--mask_kind", "colours"], [0, 2, 1, 3]
    ),
    "16-bit colours": (
        cv2.imencode(".png", rgb(COLOURS).astype(np.uint16)[..., ::-1] * 200)[1].tobytes(), ".png",
        ["--palette", "0=0,0,0 1=51000,0,0 2=0,0,51000 3=0,51000,0"], [0, 1, 2, 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_becomes_class_ids(tmp_path, name, capsys):
    mask, suffix, options, stripes = MASKS[name]
    write_raw(tmp_path, [mask] * 2, suffix)
    assert run(tmp_path, *options) == 0, capsys.readouterr().err
    found = ids_of(tmp_path / "set")
    assert len(found) == 2
    for ids in found.values():
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, np.array(stripes, np.uint8)[STRIPES])


def test_one_rule_for_the_whole_set(tmp_path):
    """A mask with few of the values gets the same ids as one with all of them."""
    masks = [from_table([0, 128, 255, 0]), from_table([128] * 4), from_table([255, 0, 0, 0])]
    write_raw(tmp_path, [png(m) for m in masks])
    assert run(tmp_path) == 0
    for name, ids in ids_of(tmp_path / "set").items():
        expected = np.searchsorted([0, 128, 255], masks[int(name[0])])
        np.testing.assert_array_equal(ids, expected)


def test_gray_masks_among_coloured_ones(tmp_path):
    write_raw(tmp_path, [png(rgb(COLOURS)), png(np.zeros((SIDE, SIDE), np.uint8))])
    assert run(tmp_path, "--palette", SHIFTED) == 0
    found = ids_of(tmp_path / "set")
    assert found["1_s1_0_0"].max() == 0
    np.testing.assert_array_equal(found["0_s0_0_0"], STRIPES)


def test_the_printed_palette_gives_the_same_masks(tmp_path, capsys):
    write_raw(tmp_path, [png(NOISY)] * 2)
    assert run(tmp_path, "--tolerance", "20") == 0
    text = capsys.readouterr().out.split('the same as --palette "')[1]
    printed = text.split('"')[0]
    assert "--tolerance 20" in text
    assert run(tmp_path, "--palette", printed, "--tolerance", "20", out="again") == 0
    first, again = ids_of(tmp_path / "set"), ids_of(tmp_path / "again")
    assert all((first[k] == again[k]).all() for k in first)


def test_groups_of_values_lie_about_the_most_frequent():
    words = "--images a --masks b --out c --tolerance 4"
    settings = program.read_settings(words.split())
    rule = find_rule({96: 1, 100: 1000, 104: 5, 200: 9}, False, settings)
    assert rule.palette == ((0, (100,)), (1, (200,)))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    "dtype", [f"{k}{n}" for k in "ui" for n in (1, 2, 4, 8)] + ["f2", "f4", "f8"]
)
@pytest.mark.parametrize(("order", "compress"), [("<", False), (">", True)])
def test_tiff_of_every_number_type(tmp_path, dtype, order, compress):
    values = (np.arange(20 * 30).reshape(20, 30) % 120).astype(np.dtype(dtype))
    pages = [values, values + values.dtype.type(3)]
    (tmp_path / "a.tif").write_bytes(tiff(pages, order, compress))
    assert count_pages(tmp_path / "a.tif") == 2
    for number, page in enumerate(pages, start=1):
        np.testing.assert_array_equal(read_pixels(tmp_path / "a.tif", number), page)


def test_own_tiff_reader_agrees_with_pillow_and_its_writer(tmp_path):
    for mode, how in (("L", None), ("L", "tiff_deflate"), ("L", "tiff_lzw"), ("I;16", None)):
        pixels = gray(1, (33, 21)).astype(np.uint16 if mode == "I;16" else np.uint8)
        Image.fromarray(pixels).save(tmp_path / "p.tif", compression=how)
        np.testing.assert_array_equal(read_pixels(tmp_path / "p.tif"), pixels)


RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float64),
        (RAMP * 2 - 1).astype(np.float32),
        (RAMP * 0.01).astype(np.float32),
        (RAMP * 1e6).astype(np.int64),
        (RAMP * 65535).astype(np.uint16),
    ],
    ids=lambda v: str(v.dtype),
)
def test_one_range_of_gray_values_serves_the_set(tmp_path, values, capsys):
    second = (values / 2).astype(values.dtype)  # a darker field of the same set
    images = [tiff([values]), tiff([second])]
    write_raw(tmp_path, [tiff([STRIPES])] * 2, ".tif", images=images)
    assert run(tmp_path, "--test", "0") == 0
    assert f"{values.dtype} images: " in capsys.readouterr().out
    found = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "set/train_numf/img").iterdir())]
    # 512 pixels: the smallest and the largest one are left out.
    pool = np.sort(np.concatenate([values, second], axis=None).astype(float))
    for pixels, own in zip(found, (values, second), strict=True):
        expected = np.clip((own.astype(float) - pool[1]) / (pool[-2] - pool[1]), 0, 1) * 255
        assert pixels.dtype == np.uint8 and np.abs(pixels - expected).max() < 0.51


def test_what_is_cropped_does_not_count_for_the_range(tmp_path):
    deep = (RAMP * 2000 + 1000).astype(np.uint16)
    bar = np.full((8, SIDE), 65535, np.uint16)
    images = [tiff([np.concatenate([deep, bar])])] * 2
    masks = [tiff([np.concatenate([STRIPES, STRIPES[:8]])])] * 2
    write_raw(tmp_path, masks, ".tif", images=images)
    assert run(tmp_path, "--crop", "0,8,0,0") == 0
    for path in sorted((tmp_path / "set").glob("t*_numf/img/*.png")):
        assert np.asarray(Image.open(path)).max() == 255


def test_nan_in_an_image_is_refused(tmp_path, capsys):
    images = [tiff([np.where(RAMP > 0.5, np.nan, RAMP)])] * 2
    write_raw(tmp_path, [tiff([STRIPES])] * 2, ".tif", images=images)
    assert run(tmp_path) == 2
    assert "0_s0_0_0.tif: value nan in its pixels" in capsys.readouterr().err


def test_pages(tmp_path, capsys):
    pages = [np.full((SIDE, SIDE), 40 * n, np.uint8) for n in range(1, 4)]
    masks = tiff([STRIPES, STRIPES // 2, STRIPES * 0])
    write_raw(tmp_path, [masks] * 2, ".tif", images=[tiff(pages)] * 2)
    assert run(tmp_path, "--page", "2", out="second") == 0
    assert run(tmp_path, out="first") == 0
    assert "3 pages, the first is taken; --page" in capsys.readouterr().out
    assert run(tmp_path, "--page", "each", out="each") == 0
    for out, level in (("first", 40), ("second", 80)):
        sample = find_split(tmp_path / out, "train_numf")[0]
        assert (np.asarray(Image.open(sample.image)) == level).all()
        assert (np.asarray(Image.open(sample.mask)) == STRIPES // (level // 40)).all()
    for split, other in (("train_numf", 0), ("test_numf", 0)):
        samples = find_split(tmp_path / "each", split)  # the pages of a file stay together
        owner = samples[0].name[0]
        assert [s.name for s in samples] == [
            f"{owner}_s{owner}-p{n}_0_{other}.png" for n in (1, 2, 3)
        ]
        levels = [int(np.asarray(Image.open(s.image)).mean()) for s in samples]
        assert levels == [40, 80, 120]


def test_a_mask_of_one_page_is_of_one_page(tmp_path, capsys):
    pages = [np.full((SIDE, SIDE), 40 * n, np.uint8) for n in range(1, 4)]
    write_raw(tmp_path, [png(STRIPES)] * 3, images=[tiff(pages)] * 3)
    (own,) = (tmp_path / "gt").glob("0_*")
    Image.fromarray(STRIPES * 0 + 1).save(own.with_name(f"{own.stem}-p3.png"))
    assert run(tmp_path, "--page", "each", "--test", "0", out="each") == 0
    assert "one page, taken for page 1 of" in capsys.readouterr().out
    found = {
        s.name.split("-")[1][:2]: s
        for s in find_split(tmp_path / "each", "train_numf")
        if s.name.startswith("0_")
    }
    assert sorted(found) == ["p1", "p3"]
    assert (np.asarray(Image.open(found["p3"].mask)) == 1).all()
    assert run(tmp_path, "--page", "2", "--test", "0", out="second") == 0
    assert "not used, page 3 is not taken; give --page each" in capsys.readouterr().out
    for sample in find_split(tmp_path / "second", "train_numf"):
        assert (np.asarray(Image.open(sample.mask)) == STRIPES).all()


def test_colour_images_keep_their_colours(tmp_path):
    image = gray(4, (SIDE, SIDE, 3))
    write_raw(tmp_path, [png(STRIPES)] * 2, images=[png(image)] * 2)
    assert run(tmp_path) == 0
    for sample in find_split(tmp_path / "set", "train_numf"):
        np.testing.assert_array_equal(np.asarray(Image.open(sample.image)), image)


# ---------------------------------------------------------------- geometry


def coordinates(height, width):
    """An image whose red is the row and whose green is the column, and a mask of quadrants."""
    row, column = np.mgrid[:height, :width]
    mask = (2 * (row >= height // 2) + (column >= width // 2)).astype(np.uint8)
    return np.stack([row, column, 0 * row + 200], -1).astype(np.uint8), mask


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "crop"),
    [
        ((40, 56), 16, 0, (0, 0, 0, 0)),
        ((48, 64), 16, 0, (0, 0, 0, 0)),
        ((50, 61), 20, 7, (0, 0, 0, 0)),
        ((60, 70), 24, 5, (3, 9, 2, 11)),
        ((20, 90), 20, 19, (0, 0, 0, 50)),
    ],
)
def test_tiles_are_where_their_table_says(tmp_path, size, tile, overlap, crop):
    image, mask = coordinates(*size)
    write_raw(tmp_path, [png(mask)] * 2, images=[png(image)] * 2)
    options = ["--crop", ",".join(map(str, crop)), "--tile", str(tile), "--overlap", str(overlap)]
    assert run(tmp_path, *options) == 0
    root = tmp_path / "set"
    with (root / program.SOURCES).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    covered = np.zeros(size, int)
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        top, left = int(row["top"]), int(row["left"])
        stem = Path(row["name"]).stem
        owner = row["file"].split("_")[0]
        _, _, r, c = stem.split("_")
        assert parse_name(stem) == (owner, f"s{owner}")
        pixels = np.asarray(Image.open(root / row["split"] / "img" / row["name"]))
        ids = np.asarray(Image.open(root / row["split"] / "gt" / row["name"]))
        assert pixels.shape == (tile, tile, 3) and ids.shape == (tile, tile)
        box = np.s_[top : top + tile, left : left + tile]
        np.testing.assert_array_equal(pixels, image[box])
        np.testing.assert_array_equal(ids, mask[box])
        if owner == "0":
            covered[box] += 1
            places["row", r], places["column", c] = top, left
    inside = np.zeros(size, bool)
    inside[crop[0] : size[0] - crop[1], crop[2] : size[1] - crop[3]] = True
    assert (covered[inside] > 0).all() and (covered[~inside] == 0).all()
    for axis, first in (("row", crop[0]), ("column", crop[2])):
        starts = [places[axis, str(n)] for n in range(sum(a == axis for a, _ in places))]
        assert starts[0] == first and starts == sorted(set(starts))
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(starts))


@given(side=st.integers(1, 400), tile=st.integers(1, 200), overlap=st.integers(0, 199))
def test_tile_starts(side, tile, overlap):
    tile, overlap = min(tile, side), min(overlap, min(tile, side) - 1)
    starts = tile_starts(side, tile, overlap)
    assert starts[0] == 0 and starts[-1] == side - tile
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    assert len(starts) == -(-(side - overlap) // (tile - overlap)) or side == tile  # no more


def test_corner_tiles_of_a_micrograph():
    assert tile_starts(484, 376, 0) == [0, 108] and tile_starts(645, 376, 0) == [0, 269]


@pytest.mark.parametrize(
    ("mask_rows", "options", "expected"),
    [
        (50, ["--crop", "4,6,0,0"], 40),  # cropped with its image
        (40, ["--crop", "4,6,0,0"], 40),  # was cropped before
        (39, ["--crop", "4,6,0,0", "--trim", "1"], 39),
        (51, ["--trim", "1"], 50),
    ],
)
def test_crop_and_trim(tmp_path, mask_rows, options, expected):
    image, mask = coordinates(50, 32)
    first = 4 if "--crop" in options else 0
    rows = (np.arange(mask_rows) + (first if mask_rows < 50 else 0)) % 50
    marks = (rows[:, None] % 4 * np.ones((1, 32))).astype(np.uint8)
    write_raw(tmp_path, [png(marks)] * 2, images=[png(image)] * 2)
    assert run(tmp_path, *options) == 0
    sample = find_split(tmp_path / "set", "train_numf")[0]
    pixels, ids = np.asarray(Image.open(sample.image)), np.asarray(Image.open(sample.mask))
    assert pixels.shape[:2] == ids.shape == (expected, 32)
    np.testing.assert_array_equal(pixels[..., 0] % 4, ids)  # they still lie on each other


# ---------------------------------------------------------------- names, specimens, splits


def test_batch_from_an_expression(tmp_path):
    write_raw(tmp_path, [png(STRIPES)] * 4, name="alloy {0}0min_Nr{0} (a)")
    assert run(tmp_path, "--batch_from", r"(\d+)min_(Nr\d)") == 0
    names = sorted(ids_of(tmp_path / "set"))
    assert names == ["00_Nr0_0_0", "10_Nr1_0_0", "20_Nr2_0_0", "30_Nr3_0_0"]
    named = r"(?P<sample>Nr\d)"
    assert run(tmp_path, "--batch_from", rf"(?P<batch>\d+)min_{named}", out="b") == 0
    assert sorted(ids_of(tmp_path / "b")) == names


def test_batch_from_a_table(tmp_path):
    write_raw(tmp_path, [png(STRIPES)] * 6, name="pic{0}")
    lines = ["file,batch,sample,specimen,split", "pic0.png,45,a b,one,train", "pic1,45,c_d,one,"]
    lines += ["pic2,60,e,two,test", "pic3,60,f,two,", "pic4,90,g,three,", "pic5,90,h,four,"]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    assert run(tmp_path, "--batch_from", str(table)) == 0
    test = {s.image.stem for s in find_split(tmp_path / "set", "test_numf")}
    train = {s.image.stem for s in find_split(tmp_path / "set", "train_numf")}
    assert test == {"60_e_0_0", "60_f_0_0"}
    assert train == {"45_a-b_0_0", "45_c-d_0_0", "90_g_0_0", "90_h_0_0"}


def test_names_without_a_batch_stay_without_one(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES)] * 3, name="picture{0}")
    assert run(tmp_path) == 0
    assert "no production batch" in capsys.readouterr().out
    assert sorted(ids_of(tmp_path / "set")) == ["picture0", "picture1", "picture2"]
    for folder in ("img", "gt"):
        for path in (tmp_path / folder).iterdir():
            Image.open(path).resize((32, 16), 0).save(path)
    assert run(tmp_path, "--tile", "16", out="tiles") == 0
    names = sorted(ids_of(tmp_path / "tiles"))
    assert names == [f"_picture{n}_0_{c}" for n in range(3) for c in (0, 1)]
    assert {parse_name(n)[0] for n in names} == {""}


def test_images_of_one_sample_get_different_names(tmp_path):
    write_raw(tmp_path, [png(STRIPES)] * 4, name="view{0}")
    options = ["--batch_from", "(view)(?P<specimen>.)"]
    assert run(tmp_path, *options) == 2  # named groups without 'batch'
    table = "file,batch,sample\nview0,b,x\nview1,b,x\nview2,b,y\nview3,b,y"
    (tmp_path / "t.csv").write_text(table)
    assert run(tmp_path, "--batch_from", str(tmp_path / "t.csv")) == 0
    test = {s.image.stem for s in find_split(tmp_path / "set", "test_numf")}
    assert test in ({"b_x-1_0_0", "b_x-2_0_0"}, {"b_y-1_0_0", "b_y-2_0_0"})


@settings(max_examples=40)
@given(
    owners=st.lists(st.integers(0, 6), min_size=2, max_size=30),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_test_set_is_whole_specimens(owners, fraction, seed, data):
    if len(set(owners)) < 2:
        owners = [*owners, 7]
    bits = data.draw(st.lists(st.integers(0, 15), min_size=len(owners), max_size=len(owners)))
    counts = np.array([[b >> c & 1 for c in range(4)] for b in bits])
    names = [f"s{o}" for o in owners]
    test = draw_test_specimens(names, counts, fraction, seed)
    assert test and test < set(names)
    assert test == draw_test_specimens(names, counts, fraction, seed)


def test_the_drawn_share_is_the_wanted_one_and_no_class_is_lost():
    names = [f"s{i // 4}" for i in range(80)]  # 20 specimens of 4 tiles
    counts = np.ones((80, 3), int)
    counts[:, 2] = np.isin(np.arange(80) // 4, (5, 11))  # a class of two specimens only
    for seed in range(20):
        test = draw_test_specimens(names, counts, 0.3, seed)
        assert len(test) == 6 and len(test & {"s5", "s11"}) == 1
    different = {frozenset(draw_test_specimens(names, counts, 0.3, s)) for s in range(20)}
    assert len(different) > 10


def test_no_tile_of_a_specimen_is_in_two_splits(tmp_path, capsys):
    image, mask = coordinates(32, 48)
    masks = [png(mask) if n % 3 else None for n in range(9)]  # 0, 3, 6 without
    (tmp_path / "t.csv").write_text(
        "file,batch,sample,specimen\n" + "\n".join(f"p{n},b,{n},spec{n // 2}" for n in range(9))
    )
    write_raw(tmp_path, masks, name="p{0}", images=[png(image)] * 9)
    for seed in range(5):
        options = ["--tile", "16", "--batch_from", str(tmp_path / "t.csv"), "--seed", str(seed)]
        assert run(tmp_path, *options, out=f"set{seed}") == 0
        root = tmp_path / f"set{seed}"
        owners = {}
        for split in ("train_numf", "test_numf", "train_unlabelled"):
            numbers = {int(parse_name(s.image.stem)[1]) for s in find_split(root, split)}
            owners[split] = {n // 2 for n in numbers}
            if split == "train_unlabelled":
                assert numbers <= {0, 3, 6} and not (root / split / "gt").exists()
        assert owners["test_numf"] and owners["train_numf"]
        assert not owners["test_numf"] & (owners["train_numf"] | owners["train_unlabelled"])
        left_out = {n for n in (0, 3, 6) if n // 2 in owners["test_numf"]}
        said = f"{6 * len(left_out)} image(s) without a mask left out" in capsys.readouterr().out
        assert said == bool(left_out)


# ---------------------------------------------------------------- annotated images


def patterns(*classes):
    """Counts of images that show these classes, 4 classes in all."""
    return np.array([[100 * (c in own) for c in range(4)] for own in classes])


def test_single_images_show_every_class_where_there_are_such():
    counts = patterns({0}, {0, 1, 2, 3}, {0, 1}, {0, 1, 2, 3}, {0, 2, 3}, {0, 1, 2, 3}, {1})
    chosen = draw_single(list("abcdefg"), counts, seed=0)
    assert sorted(chosen[:3]) == [1, 3, 5] and chosen[3] == 4 and chosen[4] == 2
    assert draw_single(list("abc"), counts[:3], seed=0) == [1, 2, 0]  # no more than there are
    owners = list("aaaabbbbcccc")
    for seed in range(5):
        chosen = draw_single(owners, np.ones((12, 4), int) * 100, seed)
        assert len(set(chosen)) == 5 and {owners[i] for i in chosen[:3]} == {"a", "b", "c"}
    assert len({tuple(draw_single(owners, np.ones((12, 4), int), s)) for s in range(9)}) > 5


def test_single_images_prefer_more_than_a_few_pixels():
    counts = np.array([[9999, 1], [5000, 5000], [9998, 2], [6000, 4000]])
    for seed in range(6):
        assert sorted(draw_single(list("abcd"), counts, seed)[:2]) == [1, 3]


@settings(max_examples=60)
@given(
    rows=st.lists(st.sets(st.integers(0, 6), min_size=1), min_size=3, max_size=9),
    size=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_groups_show_every_class_if_any_choice_does(rows, size, seed):
    counts = np.array([[int(c in row) for c in range(7)] for row in rows])
    groups = draw_groups(range(len(rows)), counts, seed, size, repeats=3)
    most = max(
        len(set().union(*(rows[i] for i in c)))
        for c in itertools.combinations(range(len(rows)), size)
    )
    everything = len(set().union(*rows))
    assert groups and all(len(set(g)) == size for g in groups)
    assert len({tuple(g) for g in groups}) == len(groups)
    if most == everything:
        assert all(len(set().union(*(rows[i] for i in g))) == everything for g in groups)


def test_groups_take_different_specimens():
    owners = [i // 4 for i in range(24)]
    for group in draw_groups(owners, np.ones((24, 3), int), seed=0):
        assert len({owners[i] for i in group}) == 5
    assert draw_groups(owners[:4], np.ones((4, 3), int), seed=0) == []
    assert draw_groups(owners[:5], np.ones((5, 3), int), seed=0) == [[0, 1, 2, 3, 4]]


def test_the_report_says_which_classes_are_missing(tmp_path, capsys):
    masks = [png(from_table(v)) for v in ([0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 0, 0], [0, 2, 0, 0])]
    write_raw(tmp_path, masks)
    assert run(tmp_path, "--test", "0.5", "--num_classes", "4") == 0
    report = capsys.readouterr().out
    assert "train_numf: class 3 does not occur" in report
    assert "sup_num1_0: class " in report and "2 of 5 sets sup_num1_*" in report
    assert report.rstrip("\n") == (tmp_path / "set" / program.REPORT).read_text().rstrip("\n")


# ---------------------------------------------------------------- the set as a whole


def many(tmp_path, count=20, shape=(SIDE, SIDE)):
    rng = np.random.default_rng(0)
    masks = [png(rng.integers(0, 4, shape, dtype=np.uint8)) for _ in range(count)]
    images = [png(gray(n, shape)) for n in range(count)]
    return write_raw(tmp_path, masks, name="{0}_s{0}_0_0", images=images)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("options", [[], ["--tile", "16"]])
def test_the_set_passes_the_check_before_training(tmp_path, options):
    many(tmp_path, shape=(32, 32))
    assert run(tmp_path, *options) == 0
    common = dict(num_classes=4, stages=("self", "fine", "sup"), self_mode_needs_groups=True)
    assert check_data(tmp_path / "set", sizes="15", repeats="01234", **common).warnings == ()
    assert check_data(tmp_path / "set", sizes="f", **common).warnings == ()
    train = {s.name: s for s in find_split(tmp_path / "set", "train_numf")}
    chosen: dict[str, set[tuple[str, ...]]] = {"1": set(), "5": set()}
    for size, k in itertools.product("15", range(5)):
        own = find_split(tmp_path / "set", f"sup_num{size}_{k}")
        chosen[size].add(tuple(s.name for s in own))
        assert len(own) == int(size)
        for s in own:
            assert s.image.read_bytes() == train[s.name].image.read_bytes()
            assert s.mask and s.mask.read_bytes() == Path(str(train[s.name].mask)).read_bytes()
    assert len(chosen["1"]) == len(chosen["5"]) == 5


def test_same_seed_same_set_other_seed_other_splits(tmp_path):
    many(tmp_path)
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(tmp_path, "--seed", seed, out=out) == 0
    one, same, other = (files(tmp_path / n) for n in "abc")
    for found in (one, same, other):
        del found[program.REPORT]
    assert one == same and one.keys() != other.keys()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    many(tmp_path)
    before = files(tmp_path)
    assert run(tmp_path, "--dry_run", out="deep/er/set") == 0
    assert "dry run, nothing written" in capsys.readouterr().out
    assert files(tmp_path) == before and not (tmp_path / "deep").exists()


def test_unicode_paths(tmp_path):
    folder = tmp_path / "Größe 時効"
    write_raw(folder, [png(STRIPES)] * 3, name="時効{0}_probe-ä{0}_0_0")
    assert run(folder, out="ausgabe ß") == 0
    assert len(ids_of(folder / "ausgabe ß")) == 3
    assert (
        program.main(["--check", str(folder / "ausgabe ß"), "--sheet", str(folder / "ü.png")]) == 0
    )


def test_masks_beside_images_by_a_pattern(tmp_path):
    stems = write_raw(tmp_path, [None] * 3)
    for stem in stems:
        (tmp_path / "img" / f"{stem}_mask.png").write_bytes(png(STRIPES))
    args = ["--images", tmp_path / "img", "--masks", tmp_path / "img", "--out", tmp_path / "set"]
    assert program.main([*map(str, args), "--mask_pattern", "{stem}_mask.png"]) == 0
    assert sorted(ids_of(tmp_path / "set")) == stems


def test_an_existing_set_is_replaced_only_when_asked(tmp_path, capsys):
    many(tmp_path)
    assert run(tmp_path) == 0
    before = files(tmp_path / "set")
    capsys.readouterr()
    assert run(tmp_path, "--seed", "1") == 2
    assert "is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert files(tmp_path / "set") == before
    assert run(tmp_path, "--seed", "1", "--overwrite") == 0
    assert files(tmp_path / "set") != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gt", "img", "set"]


def test_folders_of_others_are_never_replaced(tmp_path, capsys):
    many(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert run(tmp_path, "--overwrite", out="mine") == 2
    assert "remove it yourself" in capsys.readouterr().err
    for out in ("img", "."):
        assert run(tmp_path, "--overwrite", out=out) == 2
        assert "holds the images or masks" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_no_half_set(tmp_path, monkeypatch, capsys, existing):
    many(tmp_path)
    if existing:
        assert run(tmp_path) == 0
    before = files(tmp_path)
    done = []

    def write(path: Path, *pixels: object) -> None:
        done.append(path)
        if len(done) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(program, "write_png", write)
    assert run(tmp_path, "--overwrite") == 2
    err = capsys.readouterr().err
    assert "set: cannot be written (No space left on device)" in err and err.count("\n") == 1
    assert files(tmp_path) == before
    expected = ["gt", "img", "set"] if existing else ["gt", "img"]
    assert sorted(p.name for p in tmp_path.iterdir()) == expected


# ---------------------------------------------------------------- refusals


REFUSALS = {
    # name: (mask files, options, what the one line says)
    "other size": ([png(STRIPES[:, :9]), png(STRIPES)], [], ["0_s0_0_0.png: 9x16", "16x16"]),
    "broken mask": ([png(gray(1))[:150], png(STRIPES)], [], ["gt/0_s0_0_0.png: damaged or cut"]),
    "empty mask": ([b"", png(STRIPES)], [], ["gt/0_s0_0_0.png: empty file"]),
    "strange colour": (
        [png(rgb(COLOURS)), png(rgb([*COLOURS[:3], (9, 8, 7)]))], ["--palette", SHIFTED],
        ["1_s1_0_0.png: colour 9,8,7 (64 pixels)", "class 0 is 9 away", "--tolerance"],
    ),
    "strange level": (
        [png(STRIPES)] * 2, ["--palette", "0=0 1=1 2=2"],
        ["s0_0_0.png: value 3 (64 pixels)", "--palette"],
    ),
    "too many levels": (
        [png(gray(1)), png(gray(2))], [], ["gray levels", f"than {MOST_CLASSES}", "--tolerance"],
    ),
    "fractions": (
        [(tiff([RAMP]))] * 2, [], ["0_s0_0_0.tif: value 0.003", "whole numbers"],
    ),
    "pages": ([tiff([STRIPES] * 2)] * 2, [], ["tif: 2 pages, its image has 1"]),
    "negative": (
        [tiff([STRIPES.astype(np.int16) - 5])] * 2, [], ["value -5", "--ignore=-5"],
    ),
    "more classes than said": (
        [png(STRIPES)] * 2, ["--num_classes", "3", "--mask_kind", "ids"],
        ["4 classes where --num_classes is 3"],
    ),
    "ids of colours": ([png(rgb(COLOURS))] * 2, ["--mask_kind", "ids"], ["coloured", "--palette"]),
    "one specimen": (
        [png(STRIPES)] * 2, ["--batch_from", "_(s).(_)"], ["1 specimen(s)", "--batch_from"],
    ),
    "tile too large": ([png(STRIPES)] * 2, ["--tile", "20"], ["16x16 is smaller than --tile 20"]),
    "crop too large": ([png(STRIPES)] * 2, ["--crop", "9,9,0,0"], ["16x0", "at least 16"]),
    "no mask": ([None, None], [], ["gt: no mask in it", "give the file of a mask, or a folder"]),
    "no match": ([png(STRIPES)] * 2, ["--batch_from", "(x)"], ["img/0_s0_0_0.png", "'(x)'"]),
    "no group": ([png(STRIPES)] * 2, ["--batch_from", "x"], ["'x': no group"]),
    "bad expression": ([png(STRIPES)] * 2, ["--batch_from", "(x"], ["'(x'", "correct"]),
    "no table": ([png(STRIPES)] * 2, ["--batch_from", "no.csv"], ["no.csv: cannot be read"]),
    "no page": ([png(STRIPES)] * 2, ["--page", "2"], ["no page 2, it has 1"]),
    "bad page": ([png(STRIPES)] * 2, ["--page", "0"], ["--page '0'"]),
    "bad crop": ([png(STRIPES)] * 2, ["--crop", "1,2"], ["--crop '1,2'", "top,bottom,left,right"]),
    "bad palette": ([png(STRIPES)] * 2, ["--palette", "0:1"], ["'0:1'", "write 1=255"]),
    "bad overlap": (
        [png(STRIPES)] * 2, ["--tile", "16", "--overlap", "16"], ["--overlap 16", "less than"]
    ),
    "bad share": ([png(STRIPES)] * 2, ["--test", "1"], ["--test 1.0", "below 1"]),
    "bad pattern": ([png(STRIPES)] * 2, ["--mask_pattern", "m.png"], ["'m.png'", "{stem}"]),
    "bad ignore": ([png(STRIPES)] * 2, ["--ignore", "x"], ["--ignore: 'x'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_file_value_and_cure(tmp_path, capsys, name):
    masks, options, said = REFUSALS[name]
    suffix = ".tif" if masks[0] and masks[0][:2] == b"II" else ".png"
    write_raw(tmp_path, masks, suffix)
    before = files(tmp_path)
    assert run(tmp_path, *options) == 2
    captured = capsys.readouterr()
    first = captured.err.splitlines()[0]
    assert captured.out == "" and "Traceback" not in captured.err
    assert all(text in first for text in said), first
    assert re.search("; |: give |: write ", first)  # what is wrong; what to do
    assert files(tmp_path) == before


def test_all_problems_are_told_at_once(tmp_path, capsys):
    write_raw(tmp_path, [png(gray(1))[:150], png(STRIPES), png(STRIPES[:, :9]), png(STRIPES)])
    (tmp_path / "img" / "1_s1_0_0.png").write_bytes(b"no image")
    (tmp_path / "img" / "3_s3_0_0.bmp").write_bytes(png(STRIPES))
    assert run(tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert {n for n in "0123" if any(f"{n}_s{n}_0_0" in line for line in lines)} == set("0123")
    assert run(tmp_path, "--tile", "-1", "--test", "7", "--crop", "x", "--palette", "y") == 2
    assert len(capsys.readouterr().err.splitlines()) >= 4


def test_after_thirty_problems_only_their_number(tmp_path, capsys):
    write_raw(tmp_path, [b"x"] * 40)
    assert run(tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 31 and lines[-1] == "and 10 more"


def test_tables_are_checked(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES)] * 3, name="p{0}")
    table = tmp_path / "t.csv"
    for text, said in (
        ("name,batch\np0,1", "columns name,batch"),
        ("file,batch\np0,1\np0,2", "line 3: p0 a second time"),
        ("file,batch,split\np0,1,valid", "line 2: split 'valid'"),
        ("file,batch\np0,1\np1,1", "p2.png: not in the table"),
        (
            "file,batch,specimen,split\np0,1,a,train\np1,1,a,test\np2,1,b,",
            "specimen a: in training and in test",
        ),
    ):
        table.write_text(text)
        assert run(tmp_path, "--batch_from", str(table)) == 2
        assert said in capsys.readouterr().err
    table.write_text("file;batch\np0;1\np1;1\np2;2\np9;2\n")
    assert run(tmp_path, "--batch_from", str(table)) == 0
    assert "1 row(s) without an image, as p9" in capsys.readouterr().out


def test_a_table_that_is_no_table_is_one_line(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES)] * 2)
    (tmp_path / "t.csv").write_text("file,batch\n" + "x" * 200_000 + ",1\n")
    assert run(tmp_path, "--batch_from", str(tmp_path / "t.csv")) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 't.csv'}: not a CSV file") and err.count("\n") == 1


def test_accents_of_two_kinds_find_each_other(tmp_path):
    stems = write_raw(tmp_path, [png(STRIPES)] * 3, name="{0}_é_0_0")
    for stem in stems:  # as macOS writes names
        mask = tmp_path / "gt" / f"{stem}.png"
        mask.rename(mask.with_stem(unicodedata.normalize("NFD", stem)))
    rows = [f"{unicodedata.normalize('NFD', stem)},b{i}" for i, stem in enumerate(stems)]
    (tmp_path / "t.csv").write_text("\n".join(["file,batch", *rows]), encoding="utf-8")
    assert run(tmp_path) == 0 and len(ids_of(tmp_path / "set")) == 3
    assert run(tmp_path, "--batch_from", str(tmp_path / "t.csv"), out="named") == 0
    names = ids_of(tmp_path / "named")
    assert sorted(parse_name(name)[0] for name in names) == ["b0", "b1", "b2"]


def test_a_tiff_is_turned_by_its_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pages = [Image.fromarray(STRIPES), Image.fromarray(STRIPES.T.copy())]
    for compression in (None, "tiff_lzw"):
        options = {"compression": compression} if compression else {}
        path = tmp_path / "a.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:], exif=exif, **options)
        assert Image.open(path).getexif()[0x0112] == 6
        for page, stored in ((1, STRIPES), (2, STRIPES.T)):
            expected = np.rot90(stored, -1)  # 6: row 0 is seen on the right
            assert (read_pixels(path, page) == expected).all()
            assert (read_image(path, page=page) == expected).all()


@pytest.mark.parametrize(("orientation", "words"), [(3, "turned by 180"), (6, "turned by 90")])
def test_turned_images_are_upright_and_named(tmp_path, capsys, orientation, words):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = gray(1, (SIDE, 24))
    stored = np.rot90(upright, 2 if orientation == 3 else 1)
    stream = io.BytesIO()
    Image.fromarray(stored).save(stream, "png", exif=exif)
    mask = np.repeat(np.arange(4, dtype=np.uint8), 6)[None].repeat(SIDE, axis=0)
    write_raw(tmp_path, [png(mask)] * 2, images=[stream.getvalue()] * 2)
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    assert f"0_s0_0_0.png: {words} degrees, as its EXIF orientation ({orientation}) says" in said
    for path in sorted((tmp_path / "set").glob("t*_numf/img/*.png")):
        assert (np.asarray(Image.open(path)) == upright).all()
    if orientation == 6:  # drawn on pixels that were not turned
        write_raw(tmp_path / "b", [png(mask.T)] * 2, images=[stream.getvalue()] * 2)
        assert run(tmp_path / "b") == 2
        error = capsys.readouterr().err
        assert "16x24, its image is 24x16, turned by 90 degrees" in error
        assert "draw the mask on the upright image" in error


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (Termination(), 143), (MemoryError(), 2)]
)
def test_a_stop_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, stop, code):
    write_raw(tmp_path, [png(STRIPES)] * 2)
    before = files(tmp_path)
    real, calls = program.write_png, []

    def write(*words):
        calls.append(words)
        if len(calls) == 3:
            raise stop
        real(*words)

    monkeypatch.setattr(program, "write_png", write)
    assert run(tmp_path) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert files(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["gt", "img"]


def test_repeats_of_one_specimen_and_a_single_class_are_announced(tmp_path, capsys):
    masks = [png(STRIPES)] * 4 + [png(STRIPES % 3)] * 4
    rows = [f"{i}_s{i}_0_0.png,b,{i},{i // 4}" for i in range(8)]
    (tmp_path / "t.csv").write_text("\n".join(["file,batch,sample,specimen", *rows]))
    write_raw(tmp_path, masks)
    table = ("--batch_from", str(tmp_path / "t.csv"))
    assert run(tmp_path, *table, "--test", "0", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "warning: sup_num1_*: 5 images of 2 specimen(s)" in out and "one class" not in out
    assert run(tmp_path, *table, "--test", "0", "--dry_run", "--palette", "0=0 0=1 0=2 0=3") == 0
    assert "warning: one class in all masks" in capsys.readouterr().out


def test_folders_that_may_not_be_listed_are_one_line(tmp_path, monkeypatch, capsys):
    write_raw(tmp_path, [png(STRIPES)] * 2)
    refused = {tmp_path / "img", tmp_path / "locked"}
    (tmp_path / "locked").mkdir()
    listed = Path.iterdir

    def iterdir(self):
        if self in refused:
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    said = "cannot be listed (Permission denied); check its permissions\n"
    assert run(tmp_path) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'img'}: {said}"
    assert program.main(["--check", str(tmp_path / "locked")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'locked'}: {said}"


def test_options_of_the_check_are_checked(tmp_path, capsys):
    for words in (["--num_classes", "400"], ["--num_classes", "-1"]):
        assert program.main(["--check", str(tmp_path), *words]) == 2
        assert f"--num_classes {words[1]}: give 1 to 255" in capsys.readouterr().err
    for near in ("0", "1.5", "nan"):
        assert program.main(["--check", str(tmp_path), "--near", near]) == 2
        assert f"--near {float(near)}: give a corr" in capsys.readouterr().err


def test_missing_options_and_folders(tmp_path, capsys):
    assert program.main(["--images", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("not given") == 2
    assert run(tmp_path / "no") == 2
    assert capsys.readouterr().err.count("no such folder") == 2
    with pytest.raises(SystemExit) as stop:
        program.main(["--tolerance", "much"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "0", "x=1", "0=1,2", "0=1 0=1,2,3", "256=0", "-1=0", "0=1 1=1", "0=a"]
)
def test_palettes_that_are_refused(text):
    with pytest.raises(DataError, match="--palette"):
        parse_palette(text)


def test_ignored_pixels_are_announced(tmp_path, capsys):
    write_raw(tmp_path, [png(from_table([0, 1, 2, 255]))] * 2)
    assert run(tmp_path) == 0
    assert f"{2 * SIDE * 4} pixels without a label are written as 255" in capsys.readouterr().out
    with pytest.raises(DataError, match="value 255"):
        check_data(tmp_path / "set", num_classes=3, repeats="0")
    assert run(tmp_path, "--ignored_as", "2", out="b") == 0
    assert "without a label are written as class 2" in capsys.readouterr().out
    check_data(tmp_path / "b", num_classes=3, repeats="0")


def test_doubts_about_sizes_and_the_background(tmp_path, capsys):
    masks = [png(from_table([0, 128, 128, 255])), png(from_table([0, 128, 128, 255])[:, :12])]
    write_raw(tmp_path, masks, images=[png(gray(0)), png(gray(0)[:, :12])])
    assert run(tmp_path) == 2  # 12 pixels are too few
    capsys.readouterr()
    tall = np.vstack([from_table([0, 128, 128, 255])] * 2)
    write_raw(tmp_path, [masks[0], png(tall)], images=[png(gray(0)), png(gray(0, tall.shape))])
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "warning: 2 image sizes; train with --image_size" in report
    assert "warning: class 0 (background" in report and "1 is; if another" in report


def test_the_old_set_survives_a_stop_between_the_renames(tmp_path, stop_at_the_second_rename):
    many(tmp_path)
    assert run(tmp_path) == 0
    before = files(tmp_path)
    stop_at_the_second_rename()
    assert run(tmp_path, "--overwrite") == 130
    assert files(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gt", "img", "set"]


def test_a_set_that_a_kill_left_nowhere_is_told_of_and_put_back(tmp_path, capsys):
    """As a kill between the two renames leaves it: the old set and the new one, hidden."""
    many(tmp_path)
    assert run(tmp_path) == 0
    before = files(tmp_path)
    place = tmp_path / f".set.pscl-x.{2**30}.abcdefgh"  # no system counts processes so far
    (place / "new").mkdir(parents=True)
    (tmp_path / "set").rename(place / "old")
    with pytest.raises(DataError, match=r"set: no such folder; .* left it in .*abcdefgh.*old: "):
        check_data(tmp_path / "set", num_classes=3, repeats="0")
    assert program.main(["--check", str(tmp_path / "set")]) == 2
    assert "abcdefgh" in capsys.readouterr().err
    assert run(tmp_path, "--dry_run", "--seed", "1") == 0 and not (tmp_path / "set").exists()
    assert run(tmp_path, "--seed", "1") == 2  # it was replaced with --overwrite, and it is back
    said = capsys.readouterr()
    assert "set: put back" in said.out and "is there already" in said.err
    assert files(tmp_path) == before


def test_the_readme_shows_commands_that_the_program_takes(monkeypatch, tmp_path):
    pages = [ROOT / "dataset" / "README.md", ROOT / "docs" / "data.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = re.findall(r"^ *python dataset/prepare\.py (.*)$", text, re.MULTILINE)
    assert len(lines) >= 10
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r"\w+\.csv", " ".join(lines))):
        (tmp_path / name).write_text("file,batch\n")
    for line in lines:
        settings = program.read_settings(shlex.split(line))
        assert isinstance(settings, program.Look) or settings.images


# ---------------------------------------------------------------- looking at a set


def smooth(seed, shape=(48, 48)):
    """A picture with structure, unlike any of another seed."""
    rough = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    soft = cv2.GaussianBlur(rough, (0, 0), 1.5)
    return np.clip(128 + soft * 200, 0, 255).astype(np.uint8)


def split_of(root: Path, split: str, pictures: dict[str, np.ndarray], jpg=()) -> None:
    for part in ("img", "gt"):
        (root / split / part).mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        suffix = ".jpg" if name in jpg else ".png"
        how = {"quality": 60} if name in jpg else {}
        Image.fromarray(picture).save(root / split / "img" / f"{name}{suffix}", **how)
        mask = np.zeros(picture.shape[:2], np.uint8)
        mask[5:9] = 1
        Image.fromarray(mask).save(root / split / "gt" / f"{name}.png")


def test_planted_copies_are_found_and_nothing_else(tmp_path, capsys):
    train = {f"b_{n}_0_0": smooth(n) for n in range(40)}
    test = {f"t_{n}_0_0": smooth(100 + n) for n in range(20)}
    for n in range(8):  # every orientation
        test[f"t_same{n}_0_0"] = np.ascontiguousarray(orientations(train[f"b_{n}_0_0"])[n])
    darker = (np.rot90(train["b_20_0_0"]) * 0.7 + 20).astype(np.uint8)
    test["t_near_0_0"] = np.ascontiguousarray(darker)
    test["b_30_0_1"] = smooth(500)  # another field of a training sample
    split_of(tmp_path, "train_numf", train)
    split_of(tmp_path, "test_numf", test, jpg=("t_near_0_0",))
    split_of(tmp_path, "sup_num1_0", {"b_0_0_0": train["b_0_0_0"]})
    sheet = tmp_path / "out" / "sheet.png"
    assert program.main(["--check", str(tmp_path), "--sheet", str(sheet)]) == 0
    text = capsys.readouterr().out
    assert "rotated or mirrored too: 8 of 30" in text
    for n in range(8):
        assert f"test_numf/t_same{n}_0_0.png = " in text and f"train_numf/b_{n}_0_0.png" in text
    assert "near copies in test, correlation 0.9 and more: 1 of 30" in text
    assert "test_numf/t_near_0_0.jpg ~ train_numf/b_20_0_0.png" in text
    assert "both in test and elsewhere: 1\n  b_30" in text
    width, height = Image.open(sheet).size
    assert width > 500 and height > 500


def test_a_clean_set_has_no_leak(tmp_path, capsys):
    many(tmp_path, shape=(32, 32))
    assert run(tmp_path) == 0
    capsys.readouterr()
    sheet = str(tmp_path / "s.png")
    assert program.main(["--check", str(tmp_path / "set"), "--sheet", sheet]) == 0
    text = capsys.readouterr().out
    assert text.count(": 0 of 6") == 2 and "elsewhere: 0" in text and "4 classes" in text
    assert "every annotated image shows every class" in text


def test_shares_and_missing_classes_are_counted(tmp_path, capsys):
    split_of(tmp_path, "train_numf", {f"b_{n}_0_0": smooth(n) for n in range(3)})
    split_of(tmp_path, "sup_num1_0", {"b_9_0_0": smooth(9)})
    Image.fromarray(np.full((48, 48), 255, np.uint8)).save(tmp_path / "sup_num1_0/gt/b_9_0_0.png")
    sheet = str(tmp_path / "s.png")
    assert program.main(["--check", str(tmp_path), "--num_classes", "2", "--sheet", sheet]) == 0
    text = capsys.readouterr().out
    assert "48x48; .917 .083\n" in text  # 4 of 48 rows
    assert "2304 pixels without a label (255)" in text
    assert "sup_num1_0: class 0, 1 does not occur" in text
    assert "sup_num1_0/b_9_0_0.png: is not in train_numf" in text
    assert "test_numf: not there" in text


def test_problems_of_a_set_are_told(tmp_path, capsys):
    split_of(tmp_path, "train_numf", {f"b_{n}_0_0": smooth(n) for n in range(4)})
    (tmp_path / "train_numf/img/b_0_0_0.png").write_bytes(b"broken")
    (tmp_path / "train_numf/gt/b_1_0_0.png").unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "train_numf/gt/b_2_0_0.png")
    sheet = str(tmp_path / "s.png")
    assert program.main(["--check", str(tmp_path), "--num_classes", "1", "--sheet", sheet]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, (file, said) in zip(
        lines,
        [("b_0", "not an image"), ("b_1", "no mask"), ("b_2", "9x9"), ("b_3", "value 1 in a mask")],
        strict=True,
    ):
        assert file in line and said in line
    assert program.main(["--check", str(tmp_path / "nowhere")]) == 2
    assert program.main(["--check", str(tmp_path / "train_numf")]) == 2
    assert "no folder with img in it" in capsys.readouterr().err


def test_hash_is_one_for_all_orientations_and_only_those():
    picture = gray(7, (9, 14, 3))
    turned = orientations(picture)
    assert len({p.tobytes() + repr(p.shape).encode() for p in turned}) == 8
    expected = {same_in_any_orientation(picture)}
    assert {same_in_any_orientation(np.ascontiguousarray(p)) for p in turned} == expected
    other = picture.copy()
    other[3, 3, 1] ^= 1
    assert same_in_any_orientation(other) not in expected


@pytest.mark.parametrize("block", [1, 2, 100])
def test_best_correlation_against_plain_loops(block):
    ours = [reduce(smooth(n)) for n in range(5)]
    others = [reduce(np.ascontiguousarray(np.rot90(smooth(n), n))) for n in range(3, 22)]
    best, which = best_correlation(ours, others, block)
    for i, vector in enumerate(ours):
        table = [max(float((v * o).sum()) for v in orientations(vector)) for o in others]
        assert which[i] == int(np.argmax(table))
        assert best[i] == pytest.approx(max(table), abs=1e-5)
    assert best[3] > 0.999 and which[3] == 0 and best[:3].max() < 0.9


def test_the_same_light_does_not_make_pictures_alike():
    light = np.linspace(0, 200, 48)
    lit = [np.clip(0.3 * smooth(n) + light, 0, 255).astype(np.uint8) for n in (1, 2)]
    assert np.corrcoef(lit[0].ravel(), lit[1].ravel())[0, 1] > 0.9
    assert best_correlation([reduce(lit[0])], [reduce(lit[1])])[0][0] < 0.6


def test_the_sheet_colours_the_classes_above_0(tmp_path):
    for part, pixels in (("img", np.full((48, 48), 100)), ("gt", np.repeat([0, 1, 255], 16))):
        folder = tmp_path / "set" / "train_numf" / part
        folder.mkdir(parents=True)
        whole = np.broadcast_to(pixels, (48, 48)).astype(np.uint8)
        Image.fromarray(whole).save(folder / "a_b.png")
    check_set(tmp_path / "set", num_classes=2, sheet=tmp_path / "sheet.png")
    drawn = np.asarray(Image.open(tmp_path / "sheet.png"))[60:].reshape(-1, 3)  # below the legend
    for colour in (palette(2)[1], np.full(3, 255)):  # class 1, and what is no class
        share = (drawn - 100.0) / (colour - 100.0)  # of the colour over gray 100, in each channel
        even = np.ptp(share, axis=1) < 0.03
        assert (even & (np.abs(share[:, 0] - 0.5) < 0.1)).sum() > 1000, colour
    assert (drawn == 100).all(1).sum() > 3 * 1000  # the image itself, and class 0
    key = np.asarray(Image.open(tmp_path / "sheet.png"))[-52:]  # two lines
    for colour in palette(2):
        assert (key == colour).all(2).sum() >= 14 * 14  # the square of the legend
    # 48 px are drawn as 192: of half of them, 24, the bar is 20 px long.
    assert (key[10] == (20, 20, 20)).all(1)[10 : 10 + 81].sum() == 80


def test_flat_pictures_are_near_nothing():
    assert not reduce(np.full((40, 40), 77, np.uint8)).any()
    assert np.linalg.norm(reduce(smooth(1))) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_as_a_program_from_another_folder(tmp_path):
    write_raw(tmp_path, [png(STRIPES)] * 2)
    script = ROOT / "dataset" / "prepare.py"
    command = [sys.executable, str(script), "--images", "img", "--masks", "gt", "--out", "set"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == (tmp_path / "set" / program.REPORT).read_text(encoding="utf-8")


def test_what_transparent_pixels_hide_is_in_no_set(tmp_path):
    """Neither the pixels nor the gray range of 16 bits depend on it, and it stays transparent."""
    found = []
    for hidden in (0, 117, 65535):
        root = tmp_path / str(hidden)
        pixels = np.random.default_rng(0).integers(900, 1900, (SIDE, SIDE)).astype(np.uint16)
        alpha = np.full_like(pixels, 65535)
        pixels[:, : SIDE // 2], alpha[:, : SIDE // 2] = hidden, 0
        stored = cv2.imencode(".png", np.dstack([pixels] * 3 + [alpha]))[1].tobytes()
        for folder in ("img", "gt"):
            (root / folder).mkdir(parents=True)
        (root / "img" / "a.png").write_bytes(stored)
        Image.fromarray(STRIPES).save(root / "gt" / "a.png")
        flags = ["--images", root / "img", "--masks", root / "gt", "--out", root / "set"]
        assert program.main([str(word) for word in (*flags, "--test", 0)]) == 0
        (image,) = (root / "set" / "train_numf" / "img").iterdir()
        found.append(np.asarray(Image.open(image)))
    shown = found[0]
    assert (shown[..., 3] == np.repeat([0, 255], SIDE // 2)).all()
    assert (shown[:, : SIDE // 2, 0] == shown[:, [SIDE // 2], 0]).all()
    assert shown[..., 0].min() == 0 and shown[..., 0].max() == 255  # of 900 to 1900
    assert all((other == shown).all() for other in found[1:])


def test_tiles_of_which_nothing_is_visible_are_left_out(tmp_path, capsys):
    """Of two rows of four tiles the two on the left are transparent in each."""
    pixels = np.random.default_rng(0).integers(0, 255, (2 * SIDE, 4 * SIDE), dtype=np.uint8)
    alpha = np.full_like(pixels, 255)
    alpha[:, : 2 * SIDE + 3] = 0
    for folder in ("img", "gt"):
        (tmp_path / folder).mkdir()
    stored = cv2.imencode(".png", np.dstack([pixels] * 3 + [alpha]))[1].tobytes()
    (tmp_path / "img" / "a.png").write_bytes(stored)
    Image.fromarray((pixels > 99).astype(np.uint8)).save(tmp_path / "gt" / "a.png")
    assert run(tmp_path, "--tile", str(SIDE), "--test", "0") == 0
    names = sorted(path.name for path in (tmp_path / "set" / "train_numf" / "img").iterdir())
    assert names == ["_a_0_2.png", "_a_0_3.png", "_a_1_2.png", "_a_1_3.png"]
    assert "4 tile(s) left out, which are transparent everywhere" in capsys.readouterr().out
