"""Tables as Markdown, CSV and plain text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Cells = Sequence[object]


def digits(value: float, decimals: int = 4) -> str:
    """A number with a fixed number of decimals; nan is a dash."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def markdown(head: Cells, rows: Iterable[Cells], right: bool = False) -> list[str]:
    """Lines of a Markdown table; ``right`` aligns all columns but the first to the right."""
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    lines = [head, rule, *rows]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines]


def text(rows: Iterable[Cells]) -> list[str]:
    """Lines for a terminal, columns aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def csv_text(rows: Iterable[Cells]) -> str:
    """CSV with line feeds; nan and None are empty cells."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_plain(c) for c in row] for row in rows)
    return file.getvalue()


def csv_of_rows(rows: Sequence[Mapping[str, Any]], head: Sequence[str] = ()) -> str:
    """CSV of rows with equal keys, which are the head; without rows only ``head``."""
    names = list(rows[0]) if rows else list(head)
    return csv_text([names, *([row[name] for name in names] for row in rows)])


def _plain(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
