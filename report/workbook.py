"""CSV tables as one Excel workbook, a sheet each; that of a predicted folder."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import xlsxwriter

from metallography.folder import Folder
from metallography.items import TABLES
from metallography.summary import is_share, phases_csv, words
from utils.files import replacing, writing
from utils.tables import rounded, text_of

WORKBOOK = "measurements.xlsx"
MOST_ROWS = 1_048_576  # of a sheet
TEXTS = ("image", "batch", "class_name", "reasons")  # columns whose numbers are names
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
CREATED = datetime(2000, 1, 1, tzinfo=timezone.utc)  # the same bytes on any day


def tables_of(out: Path, **more: Path | str) -> dict[str, Path | str]:
    """The CSV files of a folder of results, by the name that their sheet gets, and ``more``."""
    paths = [path for path in (out / name for name in TABLES) if path.suffix == ".csv"]
    return {path.stem: path for path in paths if path.is_file()} | more


def write_workbook(
    path: Path,
    tables: Mapping[str, Path | str],
    words: Callable[[str], str] = str,
    is_share: Callable[[str], bool] = lambda column: False,
) -> list[str]:
    """Write an ``.xlsx`` of CSV with a head: sheet name (31 characters at most) -> file, or text.

    Numbers become numbers, all else text, never a formula. Cells hold all digits and show as many
    as the uncertainty in ``<column>_ci95`` allows (``tables.rounded``), else four. ``words`` are
    the columns' names for people; shares of 1 become percent. Returns a line for each table with
    more rows than a sheet has, which is left out. UserError if it cannot be written.
    """
    left_out = []
    options = {"constant_memory": True, "strings_to_formulas": False, "strings_to_urls": False}
    with replacing(path, "--out") as temporary, xlsxwriter.Workbook(temporary, options) as book:
        book.set_properties({"created": CREATED})
        bold, formats = book.add_format({"bold": True}), Formats(book)
        for name, table in tables.items():
            with _lines(table) as file:
                count = sum(1 for _ in csv.reader(file))
            if count > MOST_ROWS:
                left_out.append(f"{table}: {count} rows, a sheet has {MOST_ROWS}; see the CSV file")
                continue
            sheet = book.add_worksheet(name)
            sheet.freeze_panes(1, 0)
            with _lines(table) as file:
                head: list[str] = []
                for r, row in enumerate(csv.reader(file)):
                    head = head or row
                    known = dict(zip(head, row, strict=False))
                    for c, (cell, column) in enumerate(zip(row, head, strict=False)):
                        if r and column not in TEXTS and NUMBER.fullmatch(cell):
                            factor = 100 if is_share(column) else 1
                            half = known.get(f"{column.removesuffix('_ci95')}_ci95", "")
                            shown = formats.of(cell, half, factor)
                            sheet.write_number(r, c, float(cell) * factor, shown)
                        elif cell:
                            text = _text(cell) if r else _text(words(cell))
                            sheet.write_string(r, c, text, None if r else bold)
    return left_out


def _lines(table: Path | str) -> TextIO:
    """The lines of a CSV file, or of a text."""
    if isinstance(table, str):
        return io.StringIO(table, newline="")
    return table.open(encoding="utf-8", errors="surrogateescape", newline="")


class Formats:
    """Formats of numbers by their decimals, made once for each."""

    def __init__(self, book: Any) -> None:
        self.book, self.made = book, dict[int, Any]()

    def of(self, cell: str, half: str, factor: int) -> Any:
        """The format of a number with an uncertainty, '' if there is none; None for an integer."""
        if "." not in cell and "e" not in cell.lower():
            return None
        uncertainty = float(half) * factor if NUMBER.fullmatch(half) else math.nan
        shown = rounded(float(cell) * factor, uncertainty)[0]
        if "e" in shown:
            return None
        decimals = len(shown.partition(".")[2])
        if decimals not in self.made:
            code = f"0.{'0' * decimals}" if decimals else "0"
            self.made[decimals] = self.book.add_format({"num_format": code})
        return self.made[decimals]


def _text(cell: str) -> str:
    return text_of(cell).encode("utf-8", "backslashreplace").decode()


def write_folder_workbook(folder: Folder) -> list[str]:
    """Write the tables of a predicted folder as ``measurements.xlsx``; see ``write_workbook``."""
    path, sheets = folder.out / WORKBOOK, tables_of(folder.out, phases=phases_csv(folder))
    lines = write_workbook(path, sheets, words, is_share)
    folder.record.add_workbook(hashlib.sha256(path.read_bytes()).hexdigest())
    return lines


def remove_workbook(folder: Folder) -> list[str]:
    """Remove the workbook of an earlier run; a line if it is not known to be this program's."""
    path = folder.out / WORKBOOK
    if not path.is_file():
        return []
    if hashlib.sha256(path.read_bytes()).hexdigest() == folder.record.workbook:
        with writing(path, "--out"):
            path.unlink()
        return []
    what = f"{path}: not as this program wrote it, so it is left"
    return [f"{what}; its numbers may be of an earlier run: --xlsx replaces it"]
