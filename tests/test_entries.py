"""Lists of texts in one text: read as a CSV file's line is."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.entries import join_entries, split_entries


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("matrix, pore,carbide ", ("matrix", "pore", "carbide")),
        ('matrix, "M/A, blocky",pore', ("matrix", "M/A, blocky", "pore")),
        ('"the ""white"" one",b', ('the "white" one', "b")),
        ('5" plate,b', ('5" plate', "b")),
        ("", ("",)),
        ("a,,b", ("a", "", "b")),
        ("a\nb,c", ("a\nb", "c")),
        ('"never closed, b', ("never closed, b",)),
    ],
)
def test_commas_separate_but_in_quotes(text: str, entries: tuple[str, ...]) -> None:
    assert split_entries(text) == entries


def test_only_what_needs_quotes_has_some() -> None:
    assert join_entries(["a", "b c", 'd"e']) == 'a,b c,d"e'
    assert join_entries(["M/A, blocky", '"x', "y"]) == '"M/A, blocky","""x",y'


@given(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1).map(str.strip)
                .filter(bool), min_size=1))  # fmt: skip
def test_what_is_joined_is_split_again_as_by_a_csv_reader(entries: list[str]) -> None:
    text = join_entries(entries)
    assert split_entries(text) == tuple(entries)
    (line,) = csv.reader(io.StringIO(text))  # the standard library's
    assert line == entries
