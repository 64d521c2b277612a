"""Tables against what is written out by hand."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest

from utils.files import DataError
from utils.tables import (
    csv_of_rows,
    csv_text,
    digits,
    markdown,
    percent,
    plus_minus,
    read_csv,
    rounded,
    significant,
    text,
    text_of,
)


def test_markdown_escapes_the_bar_and_aligns() -> None:
    assert markdown(["a|b", "n"], [["x", 1]], right=True) == [
        "| a\\|b | n |",
        "| --- | ---: |",
        "| x | 1 |",
    ]
    assert markdown(["a", "n"], []) == ["| a | n |", "| --- | --- |"]


def test_text_is_as_wide_as_needed() -> None:
    assert text([["run", "Dice"], ["1_0", "0.5"]]) == ["run  Dice", "1_0   0.5"]


def test_csv_leaves_the_unknown_empty_and_is_read_back() -> None:
    rows = [{"image": "a,b", "area": math.nan, "n": None}, {"image": 'c"d', "area": 0.25, "n": 2}]
    found = csv_of_rows(rows)
    assert found == 'image,area,n\n"a,b",,\n"c""d",0.25,2\n'
    assert list(csv.reader(io.StringIO(found)))[2] == ['c"d', "0.25", "2"]
    assert csv_of_rows([], ["image"]) == "image\n" == csv_text([["image"]])


def test_digits() -> None:
    assert (digits(0.12345), digits(math.nan), digits(2, 1)) == ("0.1235", "-", "2.0")


def test_no_cell_is_a_formula() -> None:
    cells = [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "-",
        "-0.5",
        "1e-3",
        "a=b",
        -2,
    ]
    text = csv_text([cells])
    (found,) = csv.reader(io.StringIO(text))
    # The last one begins with a tab, behind which a cell begins where tabs separate.
    escaped = ["'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\t'=1"]
    assert found == [*escaped, "-", "-0.5", "1e-3", "a=b", "-2"]


@pytest.mark.parametrize("separator", [";", "\t", "\r", "\n"])
@pytest.mark.parametrize("sign", ["=", "+", "-", "@"])
def test_no_part_of_a_cell_is_a_formula_where_commas_do_not_separate(
    separator: str, sign: str
) -> None:
    """Spreadsheets of other languages separate by semicolons or tabs, and end a row at its end.

    Quotes hold a cell together at its beginning alone, which ``0.5,"s7;=1+1"`` is not for them.
    """
    name = f"s7{separator}{sign}1+1"
    text = csv_text([[name, 1.0], [0.5, name]])
    assert text == f'"s7{separator}\'{sign}1+1",1.0\n0.5,"s7{separator}\'{sign}1+1"\n'
    rows = [*csv.reader(io.StringIO(text, newline=""))]
    assert [[text_of(cell) for cell in row] for row in rows] == [[name, "1.0"], ["0.5", name]]


def test_what_holds_another_separator_is_in_quotes() -> None:
    assert csv_text([["a;b", "", 'c"d', "e"]]) == '"a;b",,"c""d",e\n'
    assert csv_text([["a\tb"], ["a\rb"], ["a b"]]) == '"a\tb"\n"a\rb"\na b\n'


NAMES = ["=1", "'=1", "''=1", "-", "'-", "-0.5", "a;=b", "a;'=b", "a;b", "a;;=b", "\t\t=1", "a'=b",
         "it's; +5", "a;'b", ";=", "\n-x;@y"]  # fmt: skip


def test_a_text_is_read_back_as_it_was() -> None:
    rows = [*csv.reader(io.StringIO(csv_text([NAMES]), newline=""))]
    assert [text_of(cell) for cell in rows[0]] == NAMES


def test_a_table_of_this_program_may_be_given_back(tmp_path: Path) -> None:
    names = ["a;=b.png", "=c.png", "d;e.png"]
    (tmp_path / "a.csv").write_text(csv_text([["file", "um_per_px"], *([n, 2.5] for n in names)]))
    _, rows = read_csv(tmp_path / "a.csv", "--scales")
    assert [row["file"] for _, row in rows] == names


def test_markdown_shows_html_as_text_on_one_line() -> None:
    (*_, line) = markdown(["a"], [["<img src=x> & y\nz"]])
    assert line == "| &lt;img src=x&gt; &amp; y z |"


@pytest.mark.parametrize(
    ("value", "uncertainty", "expected"),
    [
        (0.0123, 0.0045, "0.0123 ± 0.0045"),
        (41.345, 2.06, "41.3 ± 2.1"),
        (99.96, 0.03, "99.960 ± 0.030"),
        (0.5, 0.0996, "0.50 ± 0.10"),  # the uncertainty rounds up to another power of ten
        (70.0, 127.06, "70 ± 130"),
        (12347.0, 678.0, "12350 ± 680"),
        (-3.14159, 0.5, "-3.14 ± 0.50"),
        (-0.001, 0.4, "0.00 ± 0.40"),  # no minus before a zero
        (0, 0, "0"),  # equal fields are not certain
        (5000.0, 0.0, "5000"),
        (12.3456, math.nan, "12.35"),  # one field has no interval
        (math.nan, math.nan, "-"),
        (math.nan, 1.0, "-"),
        (math.inf, 1.0, "inf ± 1.000"),
    ],
)
def test_a_value_has_the_digits_that_its_uncertainty_allows(
    value: float, uncertainty: float, expected: str
) -> None:
    assert plus_minus(value, uncertainty) == expected


def test_value_and_uncertainty_are_rounded_together() -> None:
    assert rounded(8.0, 0.25) == ("8.00", "0.25")
    assert rounded(8.125, math.nan) == ("8.125", "-")


def test_numbers_have_four_digits_and_the_unknown_is_a_dash() -> None:
    values = [1.23456, 577184.0, 9999.6, 1234.4, 1.8, -10.0, 0.0]
    shown = ["1.235", "577200", "10000", "1234", "1.800", "-10.00", "0"]
    assert [significant(v) for v in values] == shown
    values = [1.5e10, 1e-5, math.nan, math.inf]
    assert [significant(v) for v in values] == ["1.500e+10", "1.000e-05", "-", "inf"]


def test_the_share_of_one_image_has_two_decimals_and_is_never_shown_as_nothing() -> None:
    values = (0.55072, 0.47, 1.0, 0.012345, 0.0, math.nan)
    assert [percent(v) for v in values] == ["55.07", "47.00", "100.00", "1.23", "0", "-"]
    small = (8 / 40_000, 1e-4, 5e-5, 1 / 3e6)
    assert [percent(v) for v in small] == ["0.02", "0.01", "0.005", "3.3e-05"]


def test_a_decimal_comma_is_refused_and_empty_cells_at_the_end_are_not(tmp_path: Path) -> None:
    path = tmp_path / "scales.csv"
    path.write_text("file,um_per_px\na.png,1.5,,\n")
    assert read_csv(path, "--scales")[1] == [(2, {"file": "a.png", "um_per_px": "1.5"})]
    path.write_text("file,um_per_px\na.png,1.5\nb.png,1,5\n")
    with pytest.raises(DataError, match="line 3: 3 cells where the head has 2; write decimals"):
        read_csv(path, "--scales")
