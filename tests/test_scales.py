"""The scale of each image: who is believed, and what is said, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile

from metallography.items import Item, result_names
from metallography.scales import Given, Scales, find_scales, read_scales
from utils.files import DataError


def image(path: Path, per_um: float | None = None) -> Item:
    """A TIFF as ImageJ writes it, with so many pixels a micrometre."""
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"imagej": True, "resolution": (per_um, per_um), "metadata": {"unit": "micron"}}
    tifffile.imwrite(path, np.zeros((20, 20), np.uint8), **(how if per_um else {}))
    return Item(path, path.stem)


def test_each_file_is_believed(tmp_path: Path) -> None:
    items = [image(tmp_path / "a.tif", 10), image(tmp_path / "b.tif", 10)]
    scales = find_scales(items, tmp_path)
    assert scales.of == pytest.approx({"a": 0.1, "b": 0.1})
    assert scales.known == pytest.approx([0.1]) and scales.lines == []


def test_two_magnifications_are_told(tmp_path: Path) -> None:
    items = [image(tmp_path / "x500.tif", 10), image(tmp_path / "x1000.tif", 20)]
    [line] = find_scales(items, tmp_path).lines
    assert "2 magnifications: 0.05 µm per pixel (1 image(s), as x1000), 0.1" in line
    assert "--resample" in line


def test_a_given_scale_counts_and_a_contradiction_is_one_line(tmp_path: Path) -> None:
    items = [image(tmp_path / "x500.tif", 10), image(tmp_path / "x1000.tif", 20)]
    scales = find_scales(items, tmp_path, um_per_px=0.1)
    assert scales.of == {"x500": 0.1, "x1000": 0.1}
    [line] = scales.lines
    assert "--um_per_px against 1 image(s)" in line and "x1000 0.05 µm (ImageJ" in line
    assert line.endswith("0.1 is used")


def test_an_image_without_a_scale_beside_others_is_told(tmp_path: Path) -> None:
    items = [image(tmp_path / "a.tif", 10), image(tmp_path / "b.tif")]
    scales = find_scales(items, tmp_path)
    assert scales.of == {"a": pytest.approx(0.1), "b": None}
    [line] = scales.lines
    assert "1 image(s) without a pixel size" in line and "b" in line
    assert find_scales(items[1:], tmp_path).lines == []  # none has one: lengths are in pixels


def test_an_image_that_cannot_be_used_decides_nothing_and_is_not_counted(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def cut(items: Sequence[Item]) -> set[str]:
        asked.append([item.name for item in items])
        return {"cut"}

    bad = image(tmp_path / "cut.tif", 4)
    plain = [image(tmp_path / f"{name}.tif") for name in "ab"]
    scales = find_scales([*plain, bad], tmp_path, unusable=cut)
    assert scales.of == {"a": None, "b": None} and scales.lines == []
    known = [image(tmp_path / f"{name}.tif", 10) for name in "cd"]
    scales = find_scales([*known, bad], tmp_path, unusable=cut)
    assert scales.known == pytest.approx([0.1]) and scales.lines == []
    assert find_scales([*known, bad], tmp_path, um_per_px=0.1, unusable=cut).lines == []
    [line] = find_scales([*known, *plain, bad], tmp_path, unusable=cut).lines
    assert "2 image(s) without a pixel size" in line
    assert len(asked) == 4 and asked[0] == ["a", "b", "cut"]
    for items in known, plain:  # all alike: nothing depends on it, so none is read
        find_scales(items, tmp_path, unusable=cut)
    assert len(asked) == 4


def test_the_table_counts_before_set_and_file(tmp_path: Path) -> None:
    items = [
        image(tmp_path / "a.tif", 10),
        image(tmp_path / "sub/b.tif"),
        image(tmp_path / "c.tif"),
    ]
    table = tmp_path / "scales.csv"
    table.write_text("File;um_per_px\nA.tif;1\na.tif;0,2\nsub/b;0.3\n", encoding="utf-8")
    scales = find_scales(
        items, tmp_path, table=table, of_set=lambda name: 0.4 if name == "c.tif" else None
    )
    assert scales.of == {"a": 0.2, "b": 0.3, "c": 0.4}
    assert any("1 row(s) without an image: A.tif" in line for line in scales.lines)
    assert any("against 1 image(s)" in line and "a 0.1 µm" in line for line in scales.lines)


def test_a_given_scale_is_for_the_images_that_the_table_lacks(tmp_path: Path) -> None:
    items = [
        image(tmp_path / "a.tif", 10),
        image(tmp_path / "b.tif", 10),
        image(tmp_path / "c.tif"),
    ]
    table = tmp_path / "scales.csv"
    table.write_text("file,um_per_px\na,0.1\n", encoding="utf-8")
    scales = find_scales(items, tmp_path, 0.2, table)
    assert scales.of == {"a": 0.1, "b": 0.2, "c": 0.2}
    assert scales.lines[0].startswith("Warning: --um_per_px against 1 image(s)")
    assert "b 0.1 µm" in scales.lines[0] and scales.lines[0].endswith("0.2 is used")
    table.write_text("file,um_per_px\na,0.1\nb,0.3\nc,0.1\n", encoding="utf-8")
    scales = find_scales(items, tmp_path, 0.2, table)
    assert scales.of == {"a": 0.1, "b": 0.3, "c": 0.1}
    assert scales.lines[0].startswith(f"Warning: {table} against 1 image(s)")
    assert scales.lines[1] == f"Warning: --um_per_px: of no effect, as {table} names every image"


def test_what_an_earlier_run_was_given_counts_until_something_is_given(tmp_path: Path) -> None:
    items = [image(tmp_path / "a.tif", 10), image(tmp_path / "b.tif")]
    (table := tmp_path / "scales.csv").write_text("file,um_per_px\nb,0.3\n")
    first = find_scales(items, tmp_path, 0.2, table).given
    scales = find_scales(items, tmp_path, before=first)
    assert scales.of == {"a": 0.2, "b": 0.3} and scales.given == first
    against, kept = scales.lines[:2]
    assert "a 0.1 µm" in against and against.endswith("that of the earlier run is used")
    assert "told: 0.2 µm (1 image(s), as a), 0.3 µm (1 image(s), as b); --um_per_px 0" in kept
    table.write_text("file,um_per_px\nb,0.4\n")
    scales = find_scales(items, tmp_path, table=table, before=first)
    assert scales.of == {"a": 0.2, "b": 0.4} == scales.given.rows
    # Images that came later were given nothing: what their files say counts first.
    later = [*items, image(tmp_path / "c.tif", 5), image(tmp_path / "d.tif")]
    scales = find_scales(later, tmp_path, before=first)
    assert scales.of == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.2, "d": 0.2})
    later = [*items, image(tmp_path / "c.tif", 4)]
    assert find_scales(later, tmp_path, before=first).of["c"] == pytest.approx(0.25)
    scales = find_scales(items, tmp_path, 0.5, before=first)  # of all, as it was said last
    assert scales.of == {"a": 0.5, "b": 0.5} and scales.given == Given(0.5, {"a": 0.5, "b": 0.5})
    [wiped] = [line for line in scales.lines if "earlier" in line]
    assert wiped == (
        "Warning: pixel sizes of 1 image(s) from an earlier --scales are not used any more: b; "
        "--um_per_px 0.5 counts for them now; to keep them give --scales again"
    )
    again = find_scales(items, tmp_path, 0.6, before=scales.given)  # of which none is of a table
    assert not any("earlier" in line for line in again.lines)
    again = find_scales(items, tmp_path, 0.6, table, before=first)
    assert not any("earlier" in line for line in again.lines)
    scales = find_scales(items, tmp_path, 0, before=first)
    assert scales.of == {"a": pytest.approx(0.1), "b": None} and scales.given == Given()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns ; the first line names them: file,um_per_px"),
        ("name,scale\na,1\n", "columns name,scale; the first line"),
        ("file,um_per_px\na.tif,fine\n", "line 2: um_per_px 'fine'; give micrometres"),
        ("file,um_per_px\na.tif,nan\n", "line 2: um_per_px 'nan'"),
        ("file,um_per_px\na.tif,0\n", "line 2: um_per_px '0'"),
        ("file,um_per_px\na.tif\n", "line 2: um_per_px ''"),
        ("file,um_per_px\na.tif,1\na.tif,2\n", "line 3: a.tif a second time"),
        ("file,um_per_px\n,1\n", "line 2: no file named"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    table = tmp_path / "scales.csv"
    table.write_text(text)
    with pytest.raises(DataError) as caught:
        read_scales(table)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "both"),
    [
        ("S7,0.1\nS7.tif,0.2", "S7.tif,0.2 and S7,0.1 are of one image (S7.tif)"),
        ("a,1\nsub/b.tif,0.1\nb,0.2", "sub/b.tif,0.1 and b,0.2 are of one image (sub/b.tif)"),
    ],
)
def test_two_rows_for_one_image_are_one_line(tmp_path: Path, text: str, both: str) -> None:
    items = [image(tmp_path / name) for name in ("a.tif", "S7.tif", "sub/b.tif")]
    table = tmp_path / "scales.csv"
    table.write_text(f"file,um_per_px\n{text}\n")
    with pytest.raises(DataError) as caught:
        find_scales(items, tmp_path, table=table)
    assert str(caught.value) == f"{table}: rows {both}; remove one"


def test_a_row_of_a_page_counts_before_one_of_its_file(tmp_path: Path) -> None:
    path = image(tmp_path / "s.tif").path
    items = [Item(path, "s-p1", 1), Item(path, "s-p2", 2)]
    table = tmp_path / "scales.csv"
    table.write_text("file,um_per_px\ns.tif,0.1\ns-p2,0.2\n")
    assert find_scales(items, tmp_path, table=table).of == {"s-p1": 0.1, "s-p2": 0.2}
    table.write_text("file,um_per_px\ns.tif,0.1\ns,0.2\n")
    with pytest.raises(DataError, match=r"rows s\.tif,0\.1 and s,0\.2 are of one image"):
        find_scales(items, tmp_path, table=table)


@pytest.mark.parametrize(
    ("names", "text", "wanted", "several"),
    [
        # The name of one file without its suffix is the path of another one.
        (("a.png", "x/a.tif"), "a,0.1\nx/a,0.2", (0.1, 0.2), ""),
        (("a.png", "x/a.tif"), "a,0.1", (0.1, None), ""),
        (("a.png", "x/a.tif"), "x/a,0.2", (None, 0.2), ""),
        (("a.png", "x/a.tif"), "a.tif,0.2", (None, 0.2), ""),
        (("x/a.png", "y/a.tif"), "a,0.1\na.tif,0.2", (None, 0.2), "a"),
        (("x/a.tif", "y/a.tif"), "a.tif,0.1\ny/a,0.2", (None, 0.2), "a.tif"),
        # One name of two files in a folder.
        (("s1.png", "s1.tif"), "s1.png,0.1\ns1.tif,0.2", (0.1, 0.2), ""),
        (("s1.png", "s1.tif"), "s1,0.1\ns1.tif,0.2", (None, 0.2), "s1"),
        (("s1.png", "s1.png.tif"), "s1.png,0.1\ns1.png.tif,0.2", (0.1, 0.2), ""),
    ],
)
def test_a_row_is_of_the_image_that_it_names_best(
    tmp_path: Path,
    names: tuple[str, str],
    text: str,
    wanted: tuple[float | None, ...],
    several: str,
) -> None:
    files = [image(tmp_path / name).path for name in names]
    results = result_names([Path(name) for name in names])
    items = [Item(path, name) for path, name in zip(files, results, strict=True)]
    table = tmp_path / "scales.csv"
    table.write_text(f"file,um_per_px\n{text}\n")
    scales = find_scales(items, tmp_path, table=table)
    assert tuple(scales.of[name] for name in results) == wanted
    told = [line for line in scales.lines if str(table) in line]
    line = f"Warning: {table}: 1 row(s) that may be of several images: {several}"
    assert told == ([f"{line}; give the file's path with its suffix"] if several else [])


def test_a_missing_table_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read .*correct --scales"):
        read_scales(tmp_path / "none.csv")


def test_scales_that_differ_by_rounding_are_one() -> None:
    scales = Scales({"a": 0.1, "b": 0.1005, "c": 0.2, "d": None})
    assert scales.known == [0.1, 0.2]
