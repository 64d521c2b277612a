"""One mask in the file of every program of docs/annotation.md comes back to the pixel.

The files are written here as the programs write them, by none of the project's own writers;
outlines are rectangles of one row, whose pixels nobody has to work out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]
from test_prepare import ids_of, png, run, write_raw

from tests.test_annotations import closed, labelme, qupath, roi, roi_set
from tests.test_pairs import put
from tests.test_set_masks import IDS, IMAGES

NAMES = ["", "carbide", "pore"]
FLAT = np.array([(0, 0, 0), (255, 0, 0), (0, 160, 255)], np.uint8)
Files = dict[str, bytes]  # contents by the end of the name, after the image's


def strips(ids: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Class, row, first column and column after the last of every run of equal pixels above 0."""
    for y, row in enumerate(ids.tolist()):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                if row[start]:
                    yield row[start], y, start, x
                start = x


def corners(y: int, left: int, right: int) -> list[tuple[int, int]]:
    return [(left, y), (right, y), (right, y + 1), (left, y + 1)]


def saved(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def fiji(ids: np.ndarray) -> Files:
    """A set of regions, their names the classes with ImageJ's running numbers."""
    each = enumerate(strips(ids))
    regions = {f"{n:04}": roi(1, corners(*at), f"{NAMES[c]}-{n}") for n, (c, *at) in each}
    return {".zip": roi_set(**regions)}


def fiji_groups(ids: np.ndarray) -> Files:
    """As ImageJ names what nobody named: the row and column of its middle, counted if not alone."""
    regions = {}
    for n, (c, *at) in enumerate(strips(ids)):
        name = f"{at[0]:04}-{sum(at[1:]) // 2:04}-{n}"
        regions[name] = roi(0, corners(*at), name, group=c)
    return {".zip": roi_set(**regions)}


def from_qupath(ids: np.ndarray) -> Files:
    """One annotation for each class, of many parts."""
    features = []
    for c, name in enumerate(NAMES[1:], start=1):
        parts = [[closed(corners(*at))] for own, *at in strips(ids) if own == c]
        features.append((name, "MultiPolygon", parts))
    return {".geojson": qupath(*features).encode()}


def from_labelme(ids: np.ndarray) -> Files:
    shapes: list[tuple[str, list[tuple[int, int]], str, dict[str, object]]] = [
        (NAMES[c], [(left, y), (right, y + 1)], "rectangle", {})
        for c, y, left, right in strips(ids)
    ]
    return {".json": labelme(*shapes, size=ids.shape).encode()}


def each_class(ids: np.ndarray) -> Files:
    return {f"_{NAMES[c]}.png": png(np.where(ids == c, 255, 0).astype(np.uint8)) for c in (1, 2)}


def indexed(ids: np.ndarray) -> bytes:
    """GIMP's export of an image in indexed mode: the table begins with what it likes."""
    order = np.array([2, 0, 1], np.uint8)
    picture = Image.fromarray(order[ids])
    table = np.zeros((3, 3), np.uint8)
    table[order] = FLAT
    picture.putpalette(table.ravel().tolist())
    return png(picture)


COLOURS = "0=0,0,0 1=255,0,0 2=0,160,255"
FROM_1 = "0=1 1=2 2=3"
WAYS: dict[str, tuple[Callable[[np.ndarray], Files], list[str]]] = {
    "Fiji, regions by name": (fiji, []),
    "Fiji, regions by group": (fiji_groups, []),
    "QuPath": (from_qupath, []),
    "labelme": (from_labelme, []),
    "napari": (lambda ids: {".tif": saved(ids.astype(np.int32), "TIFF")}, []),
    "napari, 8 bits": (lambda ids: {".tif": saved(ids, "TIFF")}, []),
    "ilastik, png": (lambda ids: {".png": png(ids + 1)}, ["--palette", FROM_1]),
    "ilastik, tif": (lambda ids: {".tif": saved(ids + 1, "TIFF")}, ["--palette", FROM_1]),
    "GIMP": (lambda ids: {".png": png(FLAT[ids])}, ["--palette", COLOURS]),
    "GIMP, indexed": (lambda ids: {".png": indexed(ids)}, ["--palette", COLOURS]),
    "Fiji, gray levels": (
        lambda ids: {".png": png(np.array([0, 128, 255], np.uint8)[ids])},
        ["--palette", "0=0 1=128 2=255"],
    ),
    "one file for each class": (each_class, ["--mask_pattern", "{stem}_{class}.png"]),
    "a corrected class map": (lambda ids: {".png": png(ids)}, []),
}


def written(
    folder: Path, masks: list[np.ndarray], make: Callable[[np.ndarray], Files]
) -> list[str]:
    stems = write_raw(folder, [None] * len(masks), images=IMAGES[: len(masks)])
    for stem, ids in zip(stems, masks, strict=True):
        for end, contents in make(ids).items():
            put(folder / "gt" / f"{stem}{end}", contents)
    return stems


@pytest.mark.parametrize("way", WAYS)
def test_one_mask_comes_back_to_the_pixel(tmp_path: Path, way: str) -> None:
    make, options = WAYS[way]
    masks = [IDS, IDS[::-1].copy(), np.roll(IDS, 7, axis=1)]
    stems = written(tmp_path, masks, make)
    assert run(tmp_path, *options) == 0
    got = ids_of(tmp_path / "set")
    assert len(got) == 3
    for stem, ids in zip(stems, masks, strict=True):
        np.testing.assert_array_equal(got[stem], ids)


def test_numbered_particles_come_back_as_one_class_to_the_pixel(tmp_path: Path) -> None:
    """Cellpose, StarDist and MorphoLibJ: 16 bits, a number for each particle."""
    drawn = np.random.default_rng(4).random(IDS.shape) < 0.3
    numbers = ndimage.label(drawn)[0].astype(np.uint16)
    assert numbers.max() > 255
    stems = written(tmp_path, [numbers] * 3, lambda ids: {".tif": saved(ids, "TIFF")})
    assert run(tmp_path, "--mask_kind", "particles") == 0
    np.testing.assert_array_equal(ids_of(tmp_path / "set")[stems[0]], drawn)


def test_the_page_names_every_program_that_is_tried_here() -> None:
    page = (Path(__file__).parents[1] / "docs" / "annotation.md").read_text(encoding="utf-8")
    for program in {way.partition(",")[0] for way in WAYS}:
        assert program in page, program
