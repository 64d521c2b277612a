"""Methods side by side: what each repeat scored, means, paired differences; Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from comparison.bootstrap import LEVEL, Interval, interval, number_clusters
from utils.metrics import Counts, Scores, mean_std
from utils.tables import csv_of_rows, digits, markdown

PROTOCOLS = {
    "best": "Best epoch on the test set (the paper's protocol)",
    "last": "Last epoch (nothing chosen)",
}
SCORES = {"dice": "Dice", "acc": "ACC", "miou": "mIoU"}
PAPER = {"paper_dice": "paper: Dice", "paper_dice_std": "std", "paper_acc": "ACC"}


@dataclass(frozen=True, eq=False)
class Result:
    """What a run scored at an evaluation: its epoch, from 0; confusion matrices, (n, C, C).

    ``places`` (n,) are the numbers, among the test images, of those that were scored; None: all.
    """

    epoch: int
    counts: Counts
    places: Counts | None = None

    @cached_property
    def scores(self) -> dict[str, float]:
        """The scores by their names in ``metrics.jsonl``: acc, dice, dice1 ..., miou, iou1 ..."""
        found = Scores.from_confusion(self.counts).as_dict()
        return {name: value for name, value in found.items() if isinstance(value, float)}


@dataclass(frozen=True, eq=False)
class Row:
    """A method, or a variant of one, with the results of its finished repeats."""

    key: str
    title: str  # for people
    results: Mapping[int, Mapping[str, Result]]  # repeat -> protocol -> result, both in order
    plain: bool = False  # a pretraining method that sees no annotated image
    published: tuple[float, ...] = (math.nan,) * 3  # as in ``PAPER``; nan where it gives none
    fits: Sequence[int] = ()  # repeats that were evaluated on learnt labels: no scores

    def values(self, protocol: str, score: str) -> dict[int, float]:
        """A score of each finished repeat."""
        return {repeat: found[protocol].scores[score] for repeat, found in self.results.items()}


@dataclass(eq=False)
class Comparison:
    """Rows, in the order of the table, with their differences to some of them.

    The reference ``best plain`` stands for the plain method with the highest mean Dice of those
    with the most repeats.
    """

    rows: list[Row]
    clusters: Counts  # number of the cluster that each test image is resampled with, (n,)
    references: list[str]  # keys of the rows to subtract
    repeats: Sequence[int]  # those that were asked for; the finished ones are added

    def __post_init__(self) -> None:
        self.repeats = sorted({*self.repeats}.union(*(row.results for row in self.rows)))
        self.difference = cache(self._difference)  # every file of the table asks for it

    def reference(self, name: str, protocol: str) -> Row | None:
        """The row that a reference stands for, None without a finished repeat."""

        def rank(row: Row) -> tuple[int, float]:
            return len(row.results), mean_std([*row.values(protocol, "dice").values()])[0]

        plain = name == "best plain"
        rows = [row for row in self.rows if (row.plain if plain else row.key == name)]
        return max((row for row in rows if row.results), key=rank, default=None)

    def _difference(self, row: Row, name: str, protocol: str) -> Interval | None:
        """Dice of a row minus that of a reference over their shared repeats; None without any."""
        other = self.reference(name, protocol) or row
        shared = sorted(row.results.keys() & other.results.keys())
        if not shared or other is row:  # a row does not differ from itself
            return None
        runs, others = ([each.results[r][protocol] for r in shared] for each in (row, other))
        return interval(*of_shared_images(runs, others, self.clusters))

    def summary(self, row: Row, protocol: str) -> dict[str, float]:
        """The numbers of a row by their columns in ``table.csv``; nan where unknown."""
        found: dict[str, float] = {}
        for score in SCORES:
            numbers = mean_std([*row.values(protocol, score).values()])
            found[f"{score}_mean"], found[f"{score}_std"] = numbers
        for name in self.references:
            difference = self.difference(row, name, protocol) or (math.nan,) * 4
            for kind, value in zip(("mean", "low", "high", "repeats"), difference, strict=True):
                found[f"dice_minus_{name.replace(' ', '_')}_{kind}"] = value
        return found | dict(zip(PAPER, row.published, strict=True))

    def markdown(self) -> list[str]:
        """Both protocols as tables, then every single value."""
        lines: list[str] = []
        head, body = ["method", "repeat"], []
        for protocol, title in PROTOCOLS.items():
            lines += [f"## {title}", "", *self._table(protocol), ""]
            head += [f"{protocol}: epoch", *SCORES.values()]
        for row in self.rows:
            for repeat, found in row.results.items():
                cells: list[object] = [row.title, repeat]
                for result in found.values():
                    cells += [result.epoch, *(digits(result.scores[s]) for s in SCORES)]
                body.append(cells)
        return [*lines, "## All values", "", *markdown(head, body, right=True)]

    def _table(self, protocol: str) -> list[str]:
        published = PAPER if any(row.published[0] > 0 for row in self.rows) else {}
        head, body = ["method", "repeats"], []
        for title in SCORES.values():
            head += [title, "std"]
        for name in self.references:
            other = self.reference(name, protocol)
            named = f"{name} ({other.key})" if name == "best plain" and other else name
            head.append(f"Dice − {named} [{LEVEL:.0%}]")
        for row in self.rows:
            numbers = self.summary(row, protocol)
            cells = [row.title, f"{len(row.results)} of {len(self.repeats)}"]
            cells += [digits(numbers[f"{s}_{kind}"]) for s in SCORES for kind in ("mean", "std")]
            for found in (self.difference(row, name, protocol) for name in self.references):
                text = f"{found.value:+.4f} [{found.ends()}]" if found else "-"
                if found and found.repeats < len(row.results):
                    text += f" ({found.repeats} repeats)"
                cells.append(text)
            body.append(cells + [digits(numbers[name]) for name in published])
        return markdown([*head, *published.values()], body, right=True)

    def csv(self) -> str:
        """A line for each protocol and row: means, deviations, differences, published numbers."""
        lines = []
        for protocol in PROTOCOLS:
            for row in self.rows:
                names = {"protocol": protocol, "method": row.key, "name": row.title}
                numbers = {"repeats": len(row.results), **self.summary(row, protocol)}
                lines.append(names | {name: exact(value) for name, value in numbers.items()})
        return csv_of_rows(lines)

    def values_csv(self) -> str:
        """A line for each row, repeat and protocol, with the scores of each class."""
        head = ("method", "name", "repeat", "protocol", "epoch")
        lines = []
        for row in self.rows:
            for repeat, found in row.results.items():
                for protocol, result in found.items():
                    cells = (row.key, row.title, repeat, protocol, result.epoch)
                    scores = {name: exact(value) for name, value in result.scores.items()}
                    lines.append({**dict(zip(head, cells, strict=True)), **scores})
        return csv_of_rows(lines, head)


def of_shared_images(
    runs: Sequence[Result], others: Sequence[Result], clusters: Counts
) -> tuple[list[Counts], list[Counts], Counts]:
    """Confusion matrices of both methods, and clusters, of the images that they both scored.

    An image that some repeats alone were scored on has no pixels in the others.
    """
    every = np.arange(len(clusters))

    def places(result: Result) -> Counts:
        return every if result.places is None else result.places

    pairs = zip(runs, others, strict=True)
    both = [np.intersect1d(places(one), places(other)) for one, other in pairs]
    kept = np.unique(np.concatenate(both))

    def spread(result: Result, shared: Counts) -> Counts:
        found = np.zeros((len(every), *result.counts.shape[1:]), result.counts.dtype)
        found[shared] = result.counts[np.isin(places(result), shared)]
        return found[kept]

    mine, theirs = (list(map(spread, each, both)) for each in (runs, others))
    return mine, theirs, number_clusters(clusters[kept].tolist())


def exact(value: float) -> str:
    """At most ten decimals; empty for nan."""
    return "" if math.isnan(value) else f"{value:.10f}".rstrip("0").rstrip(".")
