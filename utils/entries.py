"""Lists of texts in one text, such as the names of classes of an option: with commas between."""

from __future__ import annotations

import csv
from collections.abc import Iterable


def join_entries(entries: Iterable[str]) -> str:
    """``matrix,"M/A, blocky"``: what holds a comma stands in quotes, as in a CSV file."""
    return ",".join(_quoted(e) if "," in e or e.startswith('"') else e for e in entries)


def split_entries(text: str) -> tuple[str, ...]:
    """The entries of such a text, without blanks around them."""
    try:
        entries = next(csv.reader([text], skipinitialspace=True), []) or [""]
    except csv.Error:  # such as a line within it
        entries = text.split(",")
    return tuple(entry.strip() for entry in entries)


def _quoted(entry: str) -> str:
    return '"' + entry.replace('"', '""') + '"'
