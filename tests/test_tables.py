"""Tables against what is written out by hand."""

from __future__ import annotations

import csv
import io
import math

from utils.tables import csv_of_rows, csv_text, digits, markdown, text


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
    escaped = ["'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\t=1"]
    assert found == [*escaped, "-", "-0.5", "1e-3", "a=b", "-2"]


def test_markdown_shows_html_as_text_on_one_line() -> None:
    (*_, line) = markdown(["a"], [["<img src=x> & y\nz"]])
    assert line == "| &lt;img src=x&gt; &amp; y z |"
