"""Methods side by side: what each repeat scored, means, paired differences; Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from comparison.bootstrap import LEVEL, Interval, interval
from comparison.tally import Tally
from utils.metrics import mean_std

PROTOCOLS = {
    "best": "Best epoch on the test set (the paper's protocol)",
    "last": "Last epoch (nothing chosen)",
}
SCORES = {"dice": "Dice", "acc": "ACC", "miou": "mIoU"}
KEYS = ("mean", "low", "high", "repeats")


@dataclass(frozen=True)
class Result:
    """What one repeat scored at one evaluation: its epoch, counted from 0, and its counts."""

    epoch: int
    tally: Tally


@dataclass(frozen=True)
class Row:
    """A method, or a variant of one, with what its finished repeats scored.

    Attributes:
        key: its name for programs.
        title: its name for people.
        results: protocol -> repeat -> result.
        plain: a pretraining method that sees no annotated image.
        published: Dice, its deviation and ACC in the paper, nan where it gives none.
    """

    key: str
    title: str
    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    plain: bool = False
    published: tuple[float, float, float] | None = None

    def repeats(self) -> list[int]:
        """Numbers of the finished repeats."""
        return sorted(self.results.get("last", {}))

    def values(self, protocol: str, score: str) -> list[float]:
        """A score of each finished repeat, in the order of their numbers."""
        found = self.results.get(protocol, {})
        return [found[r].tally.scores()[score] for r in sorted(found)]


class Comparison:
    """Rows with their differences to some of them.

    Args:
        rows: in the order of the table.
        clusters: number of the cluster that each test image is resampled with.
        references: heading -> key of the row to subtract; ``best plain`` stands for the plain
            method with the highest mean Dice of those with the most repeats.
        repeats: numbers of the repeats that were asked for.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        clusters: NDArray[np.int64],
        references: Sequence[str],
        repeats: Iterable[int],
    ) -> None:
        self.rows, self.clusters = list(rows), clusters
        self.references = list(references)
        self.repeats = sorted(set(repeats).union(*(row.repeats() for row in rows)))
        self._differences: dict[tuple[str, str, str], Interval | None] = {}

    def best_plain(self, protocol: str) -> str:
        """Key of the best plain method; '' if none has a finished repeat."""
        known = [row for row in self.rows if row.plain and row.repeats()]
        if not known:
            return ""
        return max(
            known, key=lambda row: (len(row.repeats()), mean_std(row.values(protocol, "dice"))[0])
        ).key

    def reference(self, name: str, protocol: str) -> Row | None:
        """The row that a reference stands for, if it has a finished repeat."""
        key = self.best_plain(protocol) if name == "best plain" else name
        return next((row for row in self.rows if row.key == key and row.repeats()), None)

    def difference(self, row: Row, name: str, protocol: str) -> Interval | None:
        """Dice of a row less that of a reference, over the repeats that both have; else None."""
        place = (row.key, name, protocol)
        if place not in self._differences:
            self._differences[place] = self._difference(row, name, protocol)
        return self._differences[place]

    def _difference(self, row: Row, name: str, protocol: str) -> Interval | None:
        other = self.reference(name, protocol)
        if other is None or other is row:
            return None
        mine, theirs = row.results.get(protocol, {}), other.results[protocol]
        shared = sorted(mine.keys() & theirs.keys())
        if not shared:
            return None
        first = [mine[r].tally for r in shared]
        return interval(first, [theirs[r].tally for r in shared], self.clusters)

    # Markdown

    def markdown(self) -> list[str]:
        """Both protocols as tables, then every single value."""
        lines = []
        for protocol, title in PROTOCOLS.items():
            lines += [f"## {title}", "", *self._table(protocol), ""]
        return [*lines, "## All values", "", *self._all_values()]

    def _table(self, protocol: str) -> list[str]:
        published = any(row.published for row in self.rows)
        head = ["method", "repeats"]
        for title in SCORES.values():
            head += [title, "std"]
        for name in self.references:
            other = self.reference(name, protocol)
            named = f"{name} ({other.key})" if name == "best plain" and other else name
            head.append(f"Dice − {named} [{LEVEL:.0%}]")
        head += ["paper: Dice", "std", "ACC"] if published else []
        body = []
        for row in self.rows:
            cells = [row.title, f"{len(row.repeats())} of {len(self.repeats)}"]
            for score in SCORES:
                cells += [number(v) for v in mean_std(row.values(protocol, score))]
            cells += [self._difference_text(row, n, protocol) for n in self.references]
            if published:
                cells += [number(v) for v in row.published or (math.nan,) * 3]
            body.append(cells)
        return markdown_table(head, body)

    def _difference_text(self, row: Row, name: str, protocol: str) -> str:
        found = self.difference(row, name, protocol)
        if found is None:
            return "-"
        text = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        fewer = found.repeats < len(row.repeats())
        return f"{text} ({found.repeats} repeats)" if fewer else text

    def _all_values(self) -> list[str]:
        head = ["method", "repeat"]
        for protocol in PROTOCOLS:
            head += [f"{protocol}: epoch", *SCORES.values()]
        body = []
        for row in self.rows:
            for repeat in row.repeats():
                cells = [row.title, str(repeat)]
                for protocol in PROTOCOLS:
                    result = row.results[protocol][repeat]
                    scores = result.tally.scores()
                    cells += [str(result.epoch), *(number(scores[s]) for s in SCORES)]
                body.append(cells)
        return markdown_table(head, body)

    # CSV

    def csv(self) -> str:
        """A line for each protocol and row: means, deviations, differences, published numbers."""
        head = ["protocol", "method", "name", "repeats"]
        head += [f"{score}_{kind}" for score in SCORES for kind in ("mean", "std")]
        for name in self.references:
            head += [f"dice_minus_{name.replace(' ', '_')}_{key}" for key in KEYS]
        head += ["paper_dice", "paper_dice_std", "paper_acc"]
        lines: list[list[object]] = [list(head)]
        for protocol in PROTOCOLS:
            for row in self.rows:
                line: list[object] = [protocol, row.key, row.title, len(row.repeats())]
                for score in SCORES:
                    line += [exact(v) for v in mean_std(row.values(protocol, score))]
                for name in self.references:
                    found = self.difference(row, name, protocol)
                    line += [exact(v) for v in found] if found else [""] * len(KEYS)
                line += [exact(v) for v in row.published or (math.nan,) * 3]
                lines.append(line)
        return csv_text(lines)

    def values_csv(self) -> str:
        """A line for each row, repeat and protocol, with the scores of each class."""
        lines: list[list[object]] = []
        names: list[str] = []
        for row in self.rows:
            for repeat in row.repeats():
                for protocol in PROTOCOLS:
                    result = row.results[protocol][repeat]
                    scores = result.tally.scores()
                    names = list(scores)
                    line = [row.key, row.title, repeat, protocol, result.epoch]
                    lines.append([*line, *(exact(v) for v in scores.values())])
        return csv_text([["method", "name", "repeat", "protocol", "epoch", *names], *lines])


def number(value: float) -> str:
    """Four decimals; what is not known is a dash."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def exact(value: float) -> str:
    """Ten decimals at most, nothing for what is not known."""
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.10f}".rstrip("0").rstrip(".")


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = [head, rule, *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV with line feeds."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
