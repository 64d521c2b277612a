"""CSV tables as one Excel workbook, a sheet each."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import xlsxwriter

from utils.files import replacing

MOST_ROWS = 1_048_576  # of a sheet
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
ESCAPED = ("'=", "'+", "'-", "'@", "'\t", "'\r")  # text that a spreadsheet would take for a formula
CREATED = datetime(2000, 1, 1, tzinfo=timezone.utc)  # the same bytes on any day


def write_workbook(path: Path, tables: Mapping[str, Path]) -> list[str]:
    """Write an ``.xlsx`` of CSV files with a head: sheet name (31 characters at most) -> file.

    Numbers become numbers, all else text, never a formula. Returns a line for each table with more
    rows than a sheet has, which is left out. UserError if it cannot be written.
    """
    left_out = []
    options = {"constant_memory": True, "strings_to_formulas": False, "strings_to_urls": False}
    with replacing(path, "--out") as temporary, xlsxwriter.Workbook(temporary, options) as book:
        book.set_properties({"created": CREATED})
        bold = book.add_format({"bold": True})
        for name, table in tables.items():
            with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = sum(1 for _ in csv.reader(file))
            if rows > MOST_ROWS:
                left_out.append(f"{table}: {rows} rows, a sheet has {MOST_ROWS}; see the CSV file")
                continue
            sheet = book.add_worksheet(name)
            sheet.freeze_panes(1, 0)
            with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                for r, row in enumerate(csv.reader(file)):
                    for c, cell in enumerate(row):
                        if r and NUMBER.fullmatch(cell):
                            sheet.write_number(r, c, float(cell))
                        elif cell:
                            text = cell[1:] if cell.startswith(ESCAPED) else cell
                            shown = text.encode("utf-8", "backslashreplace").decode()
                            sheet.write_string(r, c, shown, None if r else bold)
    return left_out
