"""CSV tables as one Excel workbook, a sheet each; that of a predicted folder."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

import xlsxwriter

from metallography.folder import Folder
from metallography.items import TABLES
from metallography.summary import EXACT, about_csv, is_share, of_particles, phases_csv, words
from utils.files import replacing, writing
from utils.tables import percent, rounded, text_of

WORKBOOK = "measurements.xlsx"
MOST_ROWS = 1_048_576  # of a sheet
TEXTS = ("words", "image", "batch", "class_name", "reasons")  # columns whose numbers are names
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
    left_blank: Callable[[Mapping[str, str], str], bool] = lambda row, column: False,
    created: datetime = CREATED,
) -> list[str]:
    """Write an ``.xlsx`` of CSV with a head: sheet name (31 characters at most) -> file, or text.

    Numbers become numbers, all else text, never a formula. Cells hold all digits and show as many
    as the page has: what the uncertainty in ``<column>_ci95`` allows (``tables.rounded``), else
    four digits, or two decimals of a percent; counts and scales all. ``words`` are the columns'
    names for people; shares of 1 become percent. ``left_blank`` tells of a row, by column, and a
    column whether the cell stays empty. Returns a line for each table with
    more rows than a sheet has, which is left out. UserError if it cannot be written.
    """
    left_out = []
    options = {"constant_memory": True, "strings_to_formulas": False, "strings_to_urls": False}
    with replacing(path, "--out") as temporary, xlsxwriter.Workbook(temporary, options) as book:
        book.set_properties({"created": created})
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
                        if r and left_blank(known, column):
                            continue
                        if r and column not in TEXTS and NUMBER.fullmatch(cell):
                            factor = 100 if is_share(column) else 1
                            half = known.get(f"{column.removesuffix('_ci95')}_ci95", "")
                            shown = formats.of(cell, half, factor, column)
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
    """Formats of numbers by their code, made once for each."""

    def __init__(self, book: Any) -> None:
        self.book, self.made = book, dict[str, Any]()

    def of(self, cell: str, half: str, factor: int, column: str = "") -> Any:
        """The format of a number with an uncertainty, '' if there is none.

        None, all digits, for an integer and for what was counted or given (``EXACT``).
        """
        if column in EXACT or ("." not in cell and "e" not in cell.lower()):
            return None
        value = float(cell) * factor
        uncertainty = float(half) * factor if NUMBER.fullmatch(half) else math.nan
        code = code_of(value, uncertainty, factor > 1)
        if code not in self.made:
            self.made[code] = self.book.add_format({"num_format": code})
        return self.made[code]


def code_of(value: float, uncertainty: float, is_percent: bool = False) -> str:
    """The format in which a spreadsheet shows a value as the page does, see ``write_workbook``.

    No format rounds before the point but one with a power of ten.
    """
    alone = not math.isfinite(uncertainty) or not uncertainty
    shown = percent(value / 100) if alone and is_percent else rounded(value, uncertainty)[0]
    mantissa, power, _ = shown.partition("e")
    if not power and "." not in shown and float(shown) != round(value):
        last = Decimal(f"{uncertainty:.1e}" if not alone else f"{value:.3e}").as_tuple().exponent
        mantissa, power = f"{float(shown):.{max(0, len(shown.lstrip('-')) - 1 - int(last))}e}", "e"
        mantissa = mantissa.partition("e")[0]
    decimals = len(mantissa.partition(".")[2])
    return "0" + f".{'0' * decimals}" * bool(decimals) + "E+00" * bool(power)


def _text(cell: str) -> str:
    return text_of(cell).encode("utf-8", "backslashreplace").decode()


def of_islands(folder: Folder) -> Callable[[Mapping[str, str], str], bool]:
    """Whether a cell counts or sizes the matrix's pieces, which are no particles: it stays empty.

    Its CSV files have them all the same.
    """
    sized = {str(c) for c in folder.with_particles}

    def told(row: Mapping[str, str], column: str) -> bool:
        islands = row.get("class", "") not in {"", *sized}
        return islands and of_particles(column.removesuffix("_ci95"))

    return told


def sheets_of(folder: Folder, **more: Path | str) -> dict[str, Path | str]:
    """The sheets of a predicted folder: what was measured and how, its tables, and ``more``."""
    return {"about": about_csv(folder)} | tables_of(folder.out, phases=phases_csv(folder), **more)


def today() -> datetime:
    """The day of a workbook: the bytes are the same all day."""
    now = datetime.now()
    return datetime(now.year, now.month, now.day, tzinfo=timezone.utc)


def write_folder_workbook(folder: Folder) -> list[str]:
    """Write the tables of a predicted folder as ``measurements.xlsx``; see ``write_workbook``."""
    path = folder.out / WORKBOOK
    lines = write_workbook(path, sheets_of(folder), words, is_share, of_islands(folder), today())
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
