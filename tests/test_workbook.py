"""The workbook, read back from its XML."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from xml.etree import ElementTree

import pytest

from metallography.folder import Folder
from report.workbook import code_of, of_islands, write_workbook
from utils.tables import csv_text

SPACE = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}


def cells(path: Path, sheet: int = 1) -> dict[str, tuple[str, str]]:
    """Cell -> kind (n: a number) and text."""
    with zipfile.ZipFile(path) as book:
        tree = ElementTree.fromstring(book.read(f"xl/worksheets/sheet{sheet}.xml"))
    found = {}
    for cell in tree.iterfind(".//m:c", SPACE):
        assert cell.find("m:f", SPACE) is None, "a formula"
        text = "".join(t.text or "" for t in cell.iter() if t.tag.endswith(("}v", "}t")))
        found[cell.get("r", "")] = cell.get("t", "n"), text
    return found


def test_numbers_are_numbers_and_text_is_text(tmp_path: Path) -> None:
    table = "image,area,name\n1e5.tif,0.25,'=cmd|calc\n-3,1e-05,\n007,-12,'-x\nnan,inf,@1\n"
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    (tmp_path / "b.csv").write_text("ü\n\udc80\n", encoding="utf-8", errors="surrogateescape")
    out = tmp_path / "book.xlsx"
    assert write_workbook(out, {"fields": tmp_path / "a.csv", "b": tmp_path / "b.csv"}) == []
    got = cells(out)
    assert got["A1"] == ("inlineStr", "image") and got["B2"] == ("n", "0.25")
    assert got["A2"] == ("inlineStr", "1e5.tif") and got["C2"] == ("inlineStr", "=cmd|calc")
    assert float(got["B3"][1]) == 1e-5 and "C3" not in got
    assert got["C4"] == ("inlineStr", "-x") and got["B4"] == ("n", "-12")
    assert got["A5"] == ("inlineStr", "nan") and got["C5"] == ("inlineStr", "@1")
    assert cells(out, 2)["A1"] == ("inlineStr", "ü")
    first = out.read_bytes()
    write_workbook(out, {"fields": tmp_path / "a.csv", "b": tmp_path / "b.csv"})
    assert out.read_bytes() == first


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,batch,class,class_name\n007,0012,1,2\n1e5,7,2,1e3\n")
    write_workbook(tmp_path / "b.xlsx", {"a": tmp_path / "a.csv"})
    got = cells(tmp_path / "b.xlsx")
    kinds = {name: got[name] for name in ("A2", "B2", "D2", "A3", "D3")}
    assert [text for _, text in kinds.values()] == ["007", "0012", "2", "1e5", "1e3"]
    assert {kind for kind, _ in kinds.values()} == {"inlineStr"} and got["C2"] == ("n", "1")


def test_names_with_separators_are_those_of_their_images(tmp_path: Path) -> None:
    names = ["s7;=1+1.png", "=s7.png", "a;b.png"]
    table = csv_text([["image", "x"], *([name, 0.5] for name in names)])
    write_workbook(tmp_path / "b.xlsx", {"fields": table})
    got = cells(tmp_path / "b.xlsx")
    assert [got[cell] for cell in ("A2", "A3", "A4")] == [("inlineStr", name) for name in names]


def test_a_sheet_may_be_a_text(tmp_path: Path) -> None:
    write_workbook(tmp_path / "b.xlsx", {"phases": "class_name,x\n1,2\n"})
    got = cells(tmp_path / "b.xlsx")
    assert (got["A2"], got["B2"]) == (("inlineStr", "1"), ("n", "2"))


def test_a_table_longer_than_a_sheet_is_left_out_and_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("report.workbook.MOST_ROWS", 2)
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    (tmp_path / "b.csv").write_text("x\n1\n")
    told = write_workbook(tmp_path / "b.xlsx", {"a": tmp_path / "a.csv", "b": tmp_path / "b.csv"})
    assert told == [f"{tmp_path / 'a.csv'}: 3 rows, a sheet has 2; see the CSV file"]
    assert float(cells(tmp_path / "b.xlsx")["A2"][1]) == 1


def test_cells_show_the_digits_of_their_uncertainty_and_hold_all(tmp_path: Path) -> None:
    """41.345 ± 2.06 shows as 41.3, its half-width as 2.1; without one, four digits."""
    table = "class,area_fraction,area_fraction_ci95,mean\n1,0.41345,0.0206,12.34567\n2,0.5,,3\n"
    (tmp_path / "a.csv").write_text(table)
    out = tmp_path / "book.xlsx"
    share = {"words": str.upper, "is_share": lambda column: column.startswith("area_fraction")}
    write_workbook(out, {"a": tmp_path / "a.csv"}, **share)  # type: ignore[arg-type]
    got = cells(out)
    assert got["B1"][1] == "AREA_FRACTION" and float(got["B2"][1]) == pytest.approx(41.345)
    assert float(got["D2"][1]) == 12.34567 and float(got["B3"][1]) == 50 and "C3" not in got
    shown = {cell: number_format(out, cell) for cell in ("B2", "C2", "D2", "D3", "A2")}
    assert shown == {"B2": "0.0", "C2": "0.0", "D2": "0.00", "D3": "General", "A2": "General"}


@pytest.mark.parametrize(
    ("value", "uncertainty", "code"),
    [  # as the page shows it: 1122000, 1330000 ± 380000, 12350 ± 680, 41.3 ± 2.1
        (1122084.0, math.nan, "0.000E+00"),
        (1332475.2, 376903.1, "0.00E+00"),
        (376903.1, 376903.1, "0.0E+00"),
        (12347.1, 678.0, "0.000E+00"),
        (41.345, 2.06, "0.0"),
        (123.4, 12.0, "0"),
        (1e-5, math.nan, "0.000E+00"),
        (0.0, math.nan, "0"),
    ],
)
def test_a_format_rounds_before_the_point_as_behind_it(
    value: float, uncertainty: float, code: str
) -> None:
    assert code_of(value, uncertainty) == code


def test_counts_scales_and_single_fractions_are_as_on_the_page(tmp_path: Path) -> None:
    table = "number,um_per_px,area_fraction\n21.0,0.123456,0.02075\n"
    share = {"is_share": lambda column: column.startswith("area_fraction")}
    write_workbook(tmp_path / "b.xlsx", {"a": table}, **share)  # type: ignore[arg-type]
    shown = [number_format(tmp_path / "b.xlsx", cell) for cell in ("A2", "B2", "C2")]
    assert shown == ["General", "General", "0.00"]


def test_pieces_of_the_matrix_have_no_cells(tmp_path: Path) -> None:
    """Its chords are no sizes of pieces, and stay."""
    folder = cast("Folder", SimpleNamespace(with_particles=[1]))
    head = "class,mean_area_um2,number_per_mm2_ci95,mean_intercept_um\n"
    table = f"{head}0,1.5,2.5,3.5\n1,4.5,5.5,6.5\n"
    out = tmp_path / "b.xlsx"
    write_workbook(out, {"a": table}, left_blank=of_islands(folder))
    assert {*cells(out)} == {
        *(f"{c}1" for c in "ABCD"), "A2", "D2", *(f"{c}3" for c in "ABCD"),
    }  # fmt: skip


def number_format(path: Path, cell: str) -> str:
    """The format of a cell of the first sheet."""
    with zipfile.ZipFile(path) as book:
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
        styles = ElementTree.fromstring(book.read("xl/styles.xml"))
    (found,) = [c for c in sheet.iterfind(".//m:c", SPACE) if c.get("r") == cell]
    formats = {
        f.get("numFmtId"): f.get("formatCode") for f in styles.iterfind(".//m:numFmt", SPACE)
    }
    used = styles.findall(".//m:cellXfs/m:xf", SPACE)[int(found.get("s", 0))].get("numFmtId", "0")
    built_in = {"0": "General", "1": "0", "2": "0.00"}  # ECMA-376, 18.8.30
    return built_in.get(used) or formats[used] or ""
