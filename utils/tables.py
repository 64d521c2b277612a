"""Tables as Markdown, CSV and plain text."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from utils.files import DataError, replacing, special_kind

Cells = Sequence[object]
NOT_FOUND = "0 (not found)"  # a class of which no pixel is in any field
# Where a cell begins: spreadsheets of other languages separate by semicolons, or by tabs, and know
# no quotes but at the beginning of a cell, so that a new line within quotes may begin one, too.
SPLITS = re.compile(r"[;\t\r\n]")
# What a spreadsheet takes for a formula begins so; an apostrophe before it is the mark of a text.
FORMULA = re.compile(r"(\A|[;\t\r\n])(?='*[=+\-@\t\r])")
MARKED = re.compile(r"(\A|[;\t\r\n])'(?='*[=+\-@\t\r])")


def read_csv(path: Path, flag: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a small CSV file, in lower case, and its rows: line number, text by column.

    Cells are separated by commas or, where the first line has none, by semicolons or tabs. Raises
    DataError, which names the option ``flag``, for what cannot be read.
    """
    if kind := special_kind(path):
        raise DataError(f"{path}: {kind}, not a file; correct {flag}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        encoded = "not UTF-8: in Excel save it as 'CSV UTF-8'"
        reason = getattr(error, "strerror", None) or encoded
        raise DataError(f"{path}: cannot be read ({reason}); correct {flag}") from None
    first = lines[0] if lines else ""
    reader = csv.DictReader(lines, delimiter=next((m for m in ",;\t" if m in first), ","))
    try:
        head = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = head
        rows = []
        for row in reader:
            if surplus := [cell for cell in row.pop(None, []) if cell.strip()]:
                found = f"line {reader.line_num}: {len(head) + len(surplus)} cells where the head "
                cure = 'write decimals with a point, or separate the columns by ";"'
                raise DataError(f"{path}: {found}has {len(head)}; {cure}")
            rows.append((reader.line_num, {n: text_of((row[n] or "").strip()) for n in head if n}))
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); correct {flag}") from None
    return head, rows


def digits(value: float, decimals: int = 4) -> str:
    """A number with a fixed number of decimals; nan is a dash."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def significant(value: float) -> str:
    """Four significant digits, zeros at the end too; what is not known is a dash.

    Zero itself is known to no digit more: 0.
    """
    if math.isnan(value):
        return "-"
    shown = float(f"{value:.4g}")
    if 1e4 <= abs(shown) < 1e9:
        return f"{shown:.0f}"
    return f"{shown:#.4g}".removesuffix(".") if shown else "0"


def percent(share: float) -> str:
    """A share of one image, which has no interval, in percent: two decimals, or digits if less."""
    number = 100 * share
    if math.isnan(number) or not number:
        return significant(number)
    return f"{number:.2f}" if abs(number) >= 0.01 else f"{number:.2g}"


def rounded(value: float, uncertainty: float) -> tuple[str, str]:
    """A value and its uncertainty, both to the second significant digit of the uncertainty.

    As the GUM (JCGM 100:2008, 7.2.6) asks. Where nothing is known about the uncertainty, or it is
    0, the value has four significant digits.
    """
    if not math.isfinite(value) or not math.isfinite(uncertainty) or not uncertainty:
        return significant(value), significant(uncertainty)
    two = Decimal(f"{abs(uncertainty):.1e}")  # 0.0996 is 0.10
    shown = Decimal(repr(float(value))).quantize(two)
    return f"{shown if shown else abs(shown):f}", f"{two:f}"


def plus_minus(value: float, uncertainty: float) -> str:
    """``41.3 ± 2.1``, see ``rounded``; the value alone where there is no uncertainty, or 0."""
    shown, half = rounded(value, uncertainty)
    return shown if "-" in (shown, half) or not uncertainty else f"{shown} ± {half}"


def plus_minus_fraction(mean: float, half: float) -> str:
    """An area fraction in percent; without an interval as that of one image (``percent``).

    Of a class that is in no field no interval says how rare it is elsewhere.
    """
    if not mean:
        return NOT_FOUND
    return percent(mean / 100) if math.isnan(half) else plus_minus(mean, half)


def nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which knows no nan."""
    return {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in row.items()}


def markdown(head: Cells, rows: Iterable[Cells], right: bool = False) -> list[str]:
    """Lines of a Markdown table, HTML escaped; ``right`` aligns columns from the second on."""
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    lines = [head, rule, *rows]
    return ["| " + " | ".join(plain(c).replace("|", "\\|") for c in line) + " |" for line in lines]


def plain(text: object) -> str:
    """Text for Markdown on one line, HTML escaped: names of files and classes may hold anything."""
    return html.escape(" ".join(str(text).splitlines()), quote=False)


def text(rows: Iterable[Cells]) -> list[str]:
    """Lines for a terminal, columns aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def csv_text(rows: Iterable[Cells]) -> str:
    """CSV with line feeds; nan and None are empty cells, and no cell is a formula.

    Nor does one become a formula, or several cells, where a spreadsheet separates by semicolons or
    tabs. ``text_of`` gives the texts back.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        cells = [cell(value) for value in row]
        if any(isinstance(c, str) and SPLITS.search(c) for c in cells):
            file.write(",".join(map(_quoted, cells)) + "\n")  # the writer quotes commas alone
        else:
            writer.writerow(cells)
    return file.getvalue()


def _quoted(value: object) -> str:
    """A cell in quotes, if it needs them."""
    shown = str(value)
    needed = SPLITS.search(shown) or "," in shown or '"' in shown
    return '"' + shown.replace('"', '""') + '"' if needed else shown


def csv_of_rows(rows: Sequence[Mapping[str, Any]], head: Sequence[str] = ()) -> str:
    """CSV of rows with equal keys, which are the head; without rows only ``head``."""
    names = list(rows[0]) if rows else list(head)
    return csv_text([names, *([row[name] for name in names] for row in rows)])


@contextmanager
def growing_csv(
    path: Path, first: str, flag: str = "--out"
) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A CSV that takes some rows at a time, so that few are held in memory.

    Without rows its head is the column ``first``. UserError, which names the option ``flag``, if it
    cannot be written.
    """
    with (
        replacing(path, flag) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):

        def add(rows: Sequence[Mapping[str, Any]]) -> None:
            if rows:
                head, end, rest = csv_of_rows(rows).partition("\n")
                file.write(rest if file.tell() else head + end + rest)

        yield add
        if not file.tell():
            file.write(csv_of_rows([], [first]))


def cell(value: object) -> object:
    """A value for a CSV file or a spreadsheet.

    What is not known is empty. Text that a spreadsheet would run as a formula begins with an
    apostrophe, which it takes for the mark of a text; so does what would be one behind a separator.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str) and len(value) > 1:
        with suppress(ValueError):
            float(value)
            return value  # a number
        return FORMULA.sub(r"\1'", value)
    return value


def text_of(written: str) -> str:
    """The text of which ``cell`` made what is written in a CSV file."""
    return MARKED.sub(r"\1", written)
