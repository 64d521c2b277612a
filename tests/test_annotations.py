"""Annotation files of other programs, written here from their formats' descriptions."""

from __future__ import annotations

import base64
import io
import json
import logging
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from roifile import ROI_SUBTYPE, ROI_TYPE, ImagejRoi

from annotation import imagej
from annotation.files import is_annotation, numbers_in, pages_in, read_annotation, read_drawn
from annotation.names import (
    base_name,
    class_id,
    class_names,
    class_of_region,
    numbers_of,
)
from utils.files import DataError

SIZE = (6, 8)
NAMES = ["background", "carbide", "pore"]
# A rectangle of carbide with a pore in it, and a carbide particle of one row.
DRAWN = [
    "........",
    ".11111..",
    ".12211..",
    ".12211..",
    ".11111..",
    "......11",
]
IDS = np.array([[0 if v == "." else int(v) for v in row] for row in DRAWN], np.uint8)
LARGE = [(1, 1), (6, 1), (6, 5), (1, 5)]
PORE = [(2, 2), (4, 2), (4, 4), (2, 4)]
ROW = [(6, 5), (8, 5), (8, 6), (6, 6)]


def labelme(*shapes, size=SIZE) -> str:
    entries: list[dict[str, object]] = [
        {"label": n, "points": p, "shape_type": k, **more} for n, p, k, more in shapes
    ]
    content: dict[str, object] = {
        "version": "5.4.1",
        "flags": {},
        "shapes": entries,
        "imageData": None,
    }
    return json.dumps(content | {"imageHeight": size[0], "imageWidth": size[1]})


def qupath(*features) -> str:
    return json.dumps(
        {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "id": f"{n}",
                    "geometry": {"type": kind, "coordinates": where},
                    "properties": {"objectType": "annotation"}
                    | ({"classification": {"name": name, "color": [1, 2, 3]}} if name else {}),
                }
                for n, (name, kind, where) in enumerate(features)
            ],
        }
    )


def roi(
    kind: int,
    corners,
    name="",
    group=0,
    stroke=0,
    floats=None,
    options=0,
    subtype=0,
    at=(0, 0, 0, 0),
) -> bytes:
    """A region as ImageJ's RoiEncoder writes it: 64 bytes, coordinates, second header, name.

    ``at`` is its slice in a plain stack; or its channel, slice and frame in another one.
    """
    x, y = zip(*corners, strict=True)
    left, top, right, bottom = min(x), min(y), max(x), max(y)
    count = 0 if kind in (1, 2, 3) else len(corners)
    head = b"Iout" + struct.pack(">hBxhhhhH", 228, kind, top, left, bottom, right, count)
    head += struct.pack(">4f", *(floats or (0, 0, 0, 0)))
    head += struct.pack(">hi4s4shhBBhi", stroke, 0, b"", b"", subtype, options, 0, 0, 0, at[0])
    body = b"".join(
        struct.pack(">h", v - least) for own, least in ((x, left), (y, top)) for v in own
    )
    body = body if count else b""
    second = 64 + len(body)
    more = struct.pack(
        ">4x3i2i4shBBifiii", *at[1:], second + 64, len(name), b"", 0, group, 0, 0, 0, 0, 0, 0
    )
    return head + struct.pack(">i", second) + body + more.ljust(64, b"\0") + name.encode("utf-16be")


def composite(*rings, name="") -> bytes:
    """A region of several rings: moves to their first corners (0), lines (1), closed (4)."""
    path: list[float] = []
    for (x, y), *others in rings:
        path += [0, x, y, *(value for corner in others for value in (1, *corner)), 4]
    region = ImagejRoi(roitype=ROI_TYPE.RECT, name=name, shape_roi_size=len(path))
    region.right, region.bottom = SIZE[::-1]
    region.multi_coordinates = np.array(path, np.float32)
    return region.tobytes()


def roi_set(**regions: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in regions.items():
            archive.writestr(
                zipfile.ZipInfo(f"{name}.roi"), data
            )  # of no time: tests are named by it
    return out.getvalue()


def names_in(path: Path) -> set[str]:
    """The classes of a file by their names."""
    drawn = read_drawn(path)
    return {*drawn.classes(numbers=numbers_in([drawn]))}


def closed(ring):
    return [*ring, ring[0]]


def text_region(name: str) -> bytes:
    """A rectangle that shows words: a scale, a title."""
    region = ImagejRoi(roitype=ROI_TYPE.RECT, name=name, text="5 um", text_name="Arial")
    region.subtype, region.right, region.bottom = ROI_SUBTYPE.TEXT, 3, 3
    return region.tobytes()


def planes_of_qupath(*planes) -> str:
    """PORE on each plane; QuPath writes none (None) for the first one of all."""
    content = json.loads(qupath(*[("pore", "Polygon", [closed(PORE)])] * len(planes)))
    for feature, plane in zip(content["features"], planes, strict=True):
        feature["geometry"] |= {"plane": plane} if plane else {}
    return json.dumps(content)


FILES = {
    "labelme polygons": (
        "a.json",
        labelme(
            ("carbide", LARGE, "polygon", {}),
            ("pore", PORE, "polygon", {}),
            ("carbide", [ROW[0], ROW[2]], "rectangle", {}),
        ),
    ),
    "labelme, the pore first": (
        "a.json",
        labelme(
            ("pore", PORE, "polygon", {}),
            ("Carbide", LARGE, "polygon", {}),
            ("carbide", [(6.5, 5.5), (7.5, 5.5)], "linestrip", {}),
        ),
    ),
    "QuPath with a hole": (
        "a.geojson",
        qupath(
            ("carbide", "MultiPolygon", [[closed(LARGE), closed(PORE)], [closed(ROW)]]),
            ("pore", "Polygon", [closed(PORE)]),
        ),
    ),
    "QuPath, lying over one another": (
        "a.json",
        qupath(
            ("pore", "Polygon", [closed(PORE)]),
            ("carbide", "Polygon", [closed(LARGE)]),
            ("carbide", "LineString", [(6.5, 5.5), (7.5, 5.5)]),
        ),
    ),
    "regions by name": (
        "a.zip",
        roi_set(
            x1=roi(0, LARGE, "carbide"),
            x2=roi(7, PORE, "pore"),
            x3=roi(1, ROW, "carbide-1"),
        ),
    ),
    "regions by group": (
        "a.zip",
        roi_set(
            **{
                "0003-0004": roi(8, LARGE, "0003-0004", group=1),
                "0003-0003": roi(1, PORE, group=2),
                "0005-0007": roi(3, ROW, "0005-0007-1", group=1, floats=(6, 5, 7, 5), stroke=1),
            }
        ),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_other_programs_are_read_to_the_pixel(tmp_path: Path, case: str) -> None:
    name, content = FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert is_annotation(path)
    got = read_annotation(path, SIZE, NAMES)
    assert got.dtype == np.uint8
    assert ["".join(".12"[v] for v in row) for row in got] == DRAWN
    by_hand = {"1", "2"} if "group" in case else {"carbide", "pore"}
    assert {n.lower() for n in names_in(path)} == by_hand


def test_the_other_shapes_of_labelme(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [1, 1]], bool)).save(out, format="PNG")
    mask = {"mask": base64.b64encode(out.getvalue()).decode()}
    text = labelme(
        ("1", [(2, 2), (2, 4)], "circle", {}),
        ("2", [(6, 0), (7, 1)], "mask", mask),
        ("1", [(7.2, 5.9)], "point", {}),
        ("__ignore__", [(0, 5), (1, 6)], "rectangle", {}),
        ("_background_", [(1, 1), (2, 2)], "rectangle", {}),
    )
    (tmp_path / "a.json").write_text(text)
    ids = read_annotation(tmp_path / "a.json", SIZE, ["matrix", "a", "b"])
    assert ids.tolist() == [
        [0, 1, 1, 0, 0, 0, 2, 0],
        [1, 0, 1, 1, 0, 0, 2, 2],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [255, 0, 0, 0, 0, 0, 0, 1],
    ]


def empty_png(width: int, height: int) -> str:
    """A PNG that says a size and holds no pixel of it."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = (head, b"IDAT" + zlib.compress(b""), b"IEND")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def test_a_mask_of_labelme_takes_no_more_memory_than_an_image(tmp_path: Path) -> None:
    """A few kilobytes may claim gigabytes: their size is looked at before they are unpacked."""
    path, corner = tmp_path / "a.json", [(0, 0), (1, 1)]
    path.write_text(labelme(("pore", corner, "mask", {"mask": empty_png(9, 6)})))
    with pytest.raises(DataError, match=r"a\.json: a mask of 9x6 pixels on an image of 8x6; exp"):
        read_annotation(path, SIZE, NAMES)
    alone = json.loads(labelme(("pore", corner, "mask", {"mask": empty_png(30_000, 20_000)})))
    del alone["imageHeight"]
    path.write_text(json.dumps(alone))
    with pytest.raises(DataError, match="600000000 pixels in masks, more than the 400 million"):
        read_annotation(path, SIZE, NAMES)


def test_all_masks_of_a_file_of_labelme_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = io.BytesIO(), tmp_path / "a.json"
    Image.fromarray(np.ones(SIZE, bool)).save(out, format="PNG")
    mask = {"mask": base64.b64encode(out.getvalue()).decode()}
    monkeypatch.setattr("annotation.labelme.MAX_PIXELS", 2 * 6 * 8)
    path.write_text(labelme(*[("pore", [(0, 0), (7, 5)], "mask", mask)] * 2))
    assert (read_annotation(path, SIZE, NAMES) == 2).all()
    path.write_text(labelme(*[("pore", [(0, 0), (7, 5)], "mask", mask)] * 3))
    with pytest.raises(DataError, match="144 pixels in masks, more than"):
        read_annotation(path, SIZE, NAMES)


def test_imagejs_oval_and_points_lie_in_the_centres_of_pixels(tmp_path: Path) -> None:
    regions = roi_set(a=roi(2, [(0, 0), (4, 4)], "carbide"), b=roi(10, [(6, 1), (7, 5)], "pore"))
    (tmp_path / "a.zip").write_bytes(regions)
    ids = read_annotation(tmp_path / "a.zip", SIZE, NAMES)
    assert ids[:4, :4].tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    assert np.argwhere(ids == 2).tolist() == [[1, 6], [5, 7]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", labelme(size=(60, 80)), "drawn on an image of 80x60 pixels, its image has 8x6"),
        (
            "a.json",
            labelme(("crack", PORE, "polygon", {})),
            "class 'crack' is not one of background",
        ),
        ("a.json", labelme(("pore", PORE[:2], "polygon", {})), "too few points"),
        ("a.json", labelme(("pore", PORE, "spline", {})), "shape type spline"),
        ("a.json", labelme(("pore", PORE[:1], "rectangle", {})), "too few points"),
        ("a.roi", roi(0, PORE, "pore", options=1), "'pore' is a fitted spline: in ImageJ first E"),
        ("a.roi", roi(5, PORE, "pore", options=1), "'pore' is a fitted spline"),
        ("a.roi", text_region("5 um"), "'5 um' is text and no outline: delete it"),
        ("a.roi", roi(3, PORE, "pore", subtype=2), "'pore' is an arrow and no outline"),
        (
            "a.zip",
            roi_set(a=roi(0, PORE, "pore", at=(1, 0, 0, 0)), b=roi(0, PORE, at=(3, 0, 0, 0))),
            "outlines on several slices (slice 1, slice 3); save one file for each, named as its",
        ),
        (
            "a.zip",
            roi_set(a=roi(0, PORE, "pore", at=(0, 1, 1, 1)), b=roi(0, PORE, at=(0, 1, 4, 1))),
            "(channel 1 z 1 t 1, channel 1 z 4 t 1)",
        ),
        ("a.geojson", planes_of_qupath(None, {"c": -1, "z": 2, "t": 0}), "(z 1 t 1, z 3 t 1)"),
        ("a.json", '{"images": [], "annotations": []}', "COCO"),
        ("a.json", "{}", "JSON of another kind"),
        ("a.json", "[" * 100000, "damaged"),
        ("a.json", "", "damaged"),
        ("a.json", "[1, 2]", "JSON of another kind"),
        ("a.geojson", qupath(("pore", "Curve", [])), "geometry Curve"),
        ("a.geojson", qupath(("pore", "Polygon", [[[0, 1], [2]]])), "no list of x, y"),
        ("a.geojson", qupath(("pore", "Polygon", [[[0, 1e400], [2, 3], [4, 5]]])), "finite"),
        ("a.geojson", qupath(("pore", "Polygon", [[[90, 9], [99, 9], [99, 19]]])), "lies outside"),
        ("a.zip", roi_set(a=b"Iout"), "too short"),
        ("a.zip", roi_set(a=roi(0, LARGE, "carbide")[:70]), "damaged"),
        ("a.zip", b"PK\3\4", "damaged"),
        ("a.roi", roi(6, PORE, "pore"), "damaged or of an unknown type"),
        ("a.roi", roi(0, PORE, "pore")[:-4], "damaged"),
        ("a.roi", roi(0, PORE, "crack-3"), "class 'crack' is not one of"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_annotation(path, SIZE, NAMES)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and says in line and "\n" not in line


def region_of(kind: ROI_TYPE, props: str = "") -> bytes:
    """A region as the library writes it, its name and, where told, properties behind the rest."""
    region = ImagejRoi.frompoints(LARGE, name="carbide")
    region.roitype, region.props = kind, props
    return region.tobytes()


WHOLE = {
    "polygon": roi(0, LARGE, "carbide"),
    "oval": roi(2, [(0, 0), (4, 4)], "carbide"),
    "rings": composite([(1, 1), (6, 1), (6, 5), (1, 5)], name="carbide"),
    "properties": region_of(ROI_TYPE.POLYGON, "a: 1"),
    "points": region_of(ROI_TYPE.POINT),
    "no second header": roi(0, LARGE)[:60] + bytes(4) + roi(0, LARGE)[64:80],
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_region_that_is_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    """Older versions of roifile read what there is of a name or of a second header."""
    path, whole = tmp_path / "a.roi", WHOLE[kind]
    path.write_bytes(whole)
    assert (read_annotation(path, SIZE, NAMES, particles=True) == 1).any()
    for length in range(4, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.roi: (a region is too short|damaged)"):
            read_annotation(path, SIZE, NAMES, particles=True)


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content = FILES[case]
    rng, whole = (
        np.random.default_rng(0),
        content if isinstance(content, bytes) else content.encode(),
    )
    for _ in range(40):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        data[at : at + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 9)))
        (tmp_path / name).write_bytes(data)
        try:
            ids = read_annotation(tmp_path / name, SIZE, NAMES)
            assert ids.shape == SIZE and set(np.unique(ids)) <= {0, 1, 2, 255}
        except DataError as error:
            assert len(str(error).splitlines()) == 1


def test_a_folder_or_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "b.json").mkdir()
    for name in ("a.json", "b.json"):
        with pytest.raises(DataError, match=name):
            read_annotation(tmp_path / name, SIZE, NAMES)


def test_names_become_ids() -> None:
    assert class_names({"pore", "Carbide", "ignore*"}) == ["background", "Carbide", "pore"]
    assert class_names({"2", "class 1", "background"}) == ["class 0", "class 1", "class 2"]
    assert class_names({""}) == ["background", "object"]
    assert class_names(set()) == ["background"]
    assert class_names({"pore"}, ["matrix", "carbide", "pore"]) == ["matrix", "carbide", "pore"]
    names = ["matrix", "carbide", "pore"]
    assert [
        class_id(n, names) for n in ("PORE ", "matrix", "background", "class 1", "Ignore*")
    ] == [2, 0, 0, 1, 255]
    assert class_id("", ["background", "object"]) == 1


@pytest.mark.parametrize("found", [{"pore", "2"}, {"pore", ""}, {"300"}])
def test_names_that_leave_a_doubt_are_refused(found: set[str]) -> None:
    with pytest.raises(DataError):
        class_names(found)


@pytest.mark.parametrize(
    ("name", "base"),
    [("carbide-12", "carbide"), ("0012-0034", ""), ("0001-0012-0034", ""), ("0012-0034-1", ""),
     ("M7C3", "M7C3"), ("phase 2", "phase"), ("Ignore*-4", "Ignore*"), ("", ""),
     ("class 2", "class 2"), ("class 2-17", "class 2"), ("2", "2")],
)  # fmt: skip
def test_the_name_of_a_region_without_its_number(name: str, base: str) -> None:
    assert base_name(name) == base


def read(path: Path, content: str | bytes, names=NAMES, **options) -> list[str]:
    """The class map of a file, in characters."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["".join(".12"[v] for v in row) for row in read_annotation(path, SIZE, names, **options)]


def test_outlines_of_one_slice_are_read_whichever_it_is(tmp_path: Path) -> None:
    one = [
        roi_set(a=roi(0, LARGE, "carbide", at=at), b=roi(0, PORE, "pore", at=at))
        for at in ((0, 0, 0, 0), (3, 0, 0, 0), (0, 1, 3, 1))
    ]
    some = roi_set(a=roi(0, LARGE, "carbide"), b=roi(0, PORE, "pore", at=(3, 0, 0, 0)))
    for content in (*one, some):
        assert read(tmp_path / "a.zip", content)[:5] == DRAWN[:5]
    plane = {"c": -1, "z": 2, "t": 0}
    got = read(tmp_path / "a.geojson", planes_of_qupath(plane, plane))
    assert got == read(tmp_path / "b.geojson", planes_of_qupath(None))


def test_a_page_has_the_outlines_of_its_slice_alone(tmp_path: Path) -> None:
    content = roi_set(
        a=roi(0, LARGE, "carbide", at=(1, 0, 0, 0)),
        b=roi(0, PORE, "pore", at=(1, 0, 0, 0)),
        c=roi(1, ROW, "carbide", at=(3, 0, 0, 0)),
    )
    (tmp_path / "a.zip").write_bytes(content)
    assert pages_in(tmp_path / "a.zip") == {1, 3}
    assert read(tmp_path / "a.zip", content, page=1) == [*DRAWN[:5], "........"]
    assert read(tmp_path / "a.zip", content, page=3) == ["........"] * 5 + [DRAWN[5]]
    (tmp_path / "b.zip").write_bytes(roi_set(a=roi(0, LARGE), b=roi(0, PORE)))
    assert pages_in(tmp_path / "b.zip") == set()


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        ({"a": roi(0, PORE), "b": roi(0, PORE, at=(2, 0, 0, 0))}, "without a slice beside others"),
        ({"a": roi(0, PORE, at=(0, 1, 2, 1))}, "channel 1 z 2 t 1; which page that is"),
    ],
)
def test_slices_that_may_be_any_page_are_one_line(tmp_path: Path, regions, says: str) -> None:
    (tmp_path / "a.zip").write_bytes(roi_set(**regions))
    with pytest.raises(DataError) as caught:
        pages_in(tmp_path / "a.zip")
    line = str(caught.value)
    assert says in line and line.startswith(f"{tmp_path / 'a.zip'}: ") and "\n" not in line


def test_points_of_a_region_lie_on_slices_of_their_own(tmp_path: Path) -> None:
    region = ImagejRoi.frombytes(roi(10, [(1, 1), (6, 1), (4, 3)], "pore"))
    region.counters = np.zeros(3, np.uint8)
    region.counter_positions = np.array([1, 2, 1], np.uint32)
    got = read(tmp_path / "a.roi", region.tobytes(), page=1)
    assert got == ["........", ".2......", "........", "....2...", "........", "........"]


def test_each_part_of_a_class_lies_by_its_own_size(tmp_path: Path) -> None:
    """A pore of two parts: one within the carbide, a larger one outside of it."""
    large, part = [(0, 0), (4, 0), (4, 4), (0, 4)], [(1, 1), (3, 1), (3, 2), (1, 2)]
    far = [(5, 0), (8, 0), (8, 6), (5, 6)]  # of 18 pixels, the carbide has 16
    expected = ["1111.222", "1221.222", "1111.222", "1111.222", ".....222", ".....222"]
    pores = ("pore", "MultiPolygon", [[closed(part)], [closed(far)]])
    matter = ("carbide", "Polygon", [closed(large)])
    assert read(tmp_path / "a.geojson", qupath(pores, matter)) == expected
    regions = roi_set(a=composite(part, far, name="pore"), b=roi(0, large, "carbide"))
    assert read(tmp_path / "a.zip", regions) == expected


def test_rings_of_a_region_are_outer_ones_with_their_holes(tmp_path: Path) -> None:
    """A frame with an island in it, and a square beside; what lies in the frame is larger."""
    frame, hole = [(0, 0), (5, 0), (5, 5), (0, 5)], [(1, 1), (4, 1), (4, 4), (1, 4)]
    island, beside = [(2, 2), (3, 2), (3, 3), (2, 3)], [(6, 0), (8, 0), (8, 2), (6, 2)]
    under = [(0, 0), (5, 0), (5, 3), (0, 3)]  # of 15 pixels: more than island, less than the frame
    content = roi_set(
        a=composite(island, hole, frame, beside, name="carbide"), b=roi(0, under, "pore")
    )
    assert read(tmp_path / "a.zip", content) == [
        "22222.11",
        "22222.11",
        "22122...",
        "1...1...",
        "11111...",
        "........",
    ]


def test_a_rectangle_of_four_corners_is_the_polygon_of_its_points(tmp_path: Path) -> None:
    expected = ["........", "........", "..22....", "..22....", "........", "........"]
    assert read(tmp_path / "a.json", labelme(("pore", PORE, "rectangle", {}))) == expected


def test_outlines_that_cover_no_pixel_are_told(tmp_path: Path) -> None:
    thin = [(1.6, 1), (2.4, 1), (2.4, 4), (1.6, 4)]  # between the centres of two columns
    told: list[str] = []
    empty = read(tmp_path / "a.geojson", qupath(("pore", "MultiPolygon", [])), told=told)
    assert empty == ["........"] * 6 and "1 outline(s) without" in told.pop()
    content = labelme(
        ("carbide", LARGE, "polygon", {}),
        ("pore", thin, "polygon", {}),
        ("carbide", [(7, 1), (7, 1)], "rectangle", {}),
    )
    got = read(tmp_path / "a.json", content, told=told)
    assert got == ["........", *[".11111.."] * 4, "........"]
    assert [line.partition(": ")[2] for line in told] == [
        "2 outline(s) without any pixel's centre in them, the first is outline 2 (pore): left out; "
        "draw them larger, or delete them"
    ]


@pytest.mark.parametrize(
    ("names", "known", "classes"),
    [
        # Several regions of each name, as written by a macro and as ImageJ tells them apart.
        (["phase 1"] * 3 + ["phase 2"] * 2, [], ["phase 1"] * 3 + ["phase 2"] * 2),
        (["phase 1", "phase 1-1", "phase 1-2", "phase 2", "phase 2-1", "phase 3"], [],
         ["phase 1"] * 3 + ["phase 2"] * 2 + ["phase 3"]),
        (["phase-1", "phase-1", "Phase-2", "phase-2"], [],
         ["phase-1"] * 2 + ["Phase-2", "phase-2"]),
        # One number of several regions decides nothing, nor do several where the name is one, too.
        (["phase 1", "phase 1-1", "phase 1-2", "phase 2"], [], ["phase"] * 4),
        (["phase-1", "phase-1", "Phase-2"], [], ["phase", "phase", "Phase"]),
        (["phase", "phase-1", "phase-1-1", "phase-2", "phase-2-1"], [], ["phase"] * 5),
        # ImageJ's counters.
        (["carbide-1", "carbide-2"], [], ["carbide", "carbide"]),
        (["carbide", "carbide-1", "carbide-2"], [], ["carbide"] * 3),
        (["carbide", *(f"carbide-{n}" for n in range(1, 20)), "carbide-3-1"], [], ["carbide"] * 21),
        (["carbide", "carbide-1", "carbide-2", "carbide-1-1", "pore"], [],
         ["carbide"] * 4 + ["pore"]),
        (["Carbide-1", "carbide-2"], [], ["Carbide", "carbide"]),
        (["Phase 1", "phase 1"], [], ["Phase", "phase"]),
        # A number that is of the name.
        (["Al-7075-1", "Al-7075-2", "Al-6061-1"], [], ["Al-7075", "Al-7075", "Al-6061"]),
        (["p 1-1", "p 2-1", "p 2-2"], ["p 1", "p 2", "p"], ["p 1", "p 2", "p 2"]),
        (["Ignore*", "Ignore*-1", "Ignore*-1-1"], ["pore"], ["Ignore*"] * 3),
        (["class 2", "class 2-1", "2-1", "2-2"], [], ["class 2", "class 2", "2", "2"]),
        (["0012-0034", "0012-0034-1", "0012-0034-2"], [], ["", "", ""]),
        # The whole name is known, in any case of letters.
        (["p 1", "P 2", "p 3"], ["p 1", "p 2"], ["p 1", "P 2", "p"]),
    ],
)  # fmt: skip
def test_a_number_that_regions_share_is_of_their_class(names, known, classes) -> None:
    numbers = numbers_of([names])
    assert [class_of_region(name, known, numbers) for name in names] == classes


def test_names_that_are_given_are_kept_whole(tmp_path: Path) -> None:
    content = roi_set(a=roi(0, LARGE, "phase 1"), b=roi(0, PORE, "phase 2"), c=roi(1, ROW, "x-1"))
    (tmp_path / "a.zip").write_bytes(content)
    ids = read_annotation(tmp_path / "a.zip", SIZE, ["", "phase 1", "phase 2", "x"])
    assert ["".join(".123"[v] for v in row) for row in ids] == [*DRAWN[:5], "......33"]
    assert names_in(tmp_path / "a.zip") == {"phase", "x"}


def test_the_logger_of_the_library_is_its_users() -> None:
    """A program that reads regions itself is told by the library's log, and not by an error."""
    damaged = roi(6, PORE, "pore")
    logger = logging.getLogger("roifile")
    with pytest.raises(ValueError, match="damaged or of an unknown type"):
        imagej.shapes_of(damaged)
    assert logger.handlers == []
    ImagejRoi.frombytes(damaged).coordinates()
