"""Which production batch an image is of: by its name, an expression, or a table (``--batch_from``).

Also which sample and specimen, and which part of a set, where the expression or the table says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data import parse_name
from dataset.check import Problems
from utils.files import DataError, name_key
from utils.tables import read_csv

Table = Mapping[str, dict[str, str]]
Rule = re.Pattern[str] | Table | None
"""An expression with a group for the batch; rows of a table by file; or None: ``parse_name``."""

SPLITS = {"train": "train_numf", "test": "test_numf", "unlabelled": "train_unlabelled"}


def read_rule(words: str) -> Rule:
    """What ``--batch_from`` asks for; '' is None. DataError."""
    if words.lower().endswith(".csv"):
        return _read_table(Path(words))
    if not words:
        return None
    try:
        pattern = re.compile(words)
    except re.error as error:
        raise DataError(f"--batch_from {words!r}: {error}; correct the expression") from None
    if not pattern.groups or (pattern.groupindex and "batch" not in pattern.groupindex):
        raise DataError(rf"--batch_from {words!r}: no group; put ( ) around the batch: (\d+)min")
    return pattern


def _read_table(path: Path) -> Table:
    head, rows = read_csv(path, "--batch_from")
    if not {"file", "batch"} <= set(head):
        found = f"{path}: columns {','.join(head)}"
        raise DataError(f"{found}; the first line names them: file,batch,...")
    table: dict[str, dict[str, str]] = {}
    problems = Problems()
    for number, values in rows:
        name, split = name_key(values["file"]), values.get("split", "")
        line = f"{path}: line {number}"
        if split not in ("", *SPLITS):
            problems.append(f"{line}: split {split!r}; give {', '.join(SPLITS)} or none")
        if name in table:
            problems.append(f"{line}: {name} a second time; remove one")
        table[name] = values
    problems.refuse()
    return table


class ProductionBatches:
    """Batch, sample, specimen and split of the images of a folder."""

    def __init__(self, rule: Rule, images: Iterable[Path], folder: Path) -> None:
        self.rule, self.folder = rule, folder
        self.stems = Counter(name_key(path.stem) for path in images)
        self.unused = set() if rule is None or isinstance(rule, re.Pattern) else {*rule}

    def of(self, image: Path) -> dict[str, str]:
        """What is known of an image, by ``batch``, ``sample``, ``specimen``, ``split``.

        An expression is tried on the file name, then on the path below the folder. A table may
        call an image by its path below the folder or, if no other has it, by its name, each with
        or without the suffix. DataError if neither tells of the image.
        """
        below, rule = self.below(image), self.rule
        if rule is None:
            return dict(zip(("batch", "sample"), parse_name(image.stem), strict=True))
        if isinstance(rule, re.Pattern):
            match = rule.search(image.name) or rule.search(below)
            if match is None:
                shown = f"--batch_from {rule.pattern!r}"
                raise DataError(f"{image}: {shown} does not match this name; correct it")
            row = dict(zip(("batch", "sample"), match.groups(""), strict=False))
            named = match.groupdict().items()  # "split" is for tables only
            return row | {name: value for name, value in named if value and name != "split"}
        stem = name_key(image.stem)
        names = [name_key(below), name_key(below.removesuffix(image.suffix))]
        names += [name_key(image.name), stem] if self.stems[stem] == 1 else []
        self.unused -= {*names}
        row = next((rule[name] for name in names if rule.get(name)), {})
        if not row:
            raise DataError(f"{image}: not in the table of --batch_from; add a row for it")
        return row

    def below(self, image: Path) -> str:
        """The path of an image below the folder."""
        return image.relative_to(self.folder).as_posix()

    def lines(self) -> list[str]:
        """A line if rows of the table are of no image, after all were asked for."""
        count = len(self.unused)
        rows = f"{count} row(s) without an image, as {min(self.unused, default='')}"
        return [f"--batch_from: {rows}"] if count else []


def batches_of(
    words: str, images: Sequence[Path], folder: Path
) -> tuple[dict[Path, str], list[str]]:
    """The batch of each image as ``--batch_from`` tells it, and warnings; {} where it is ''.

    DataError, a line for each image of which it tells nothing.
    """
    rule, problems, found = read_rule(words), Problems(), dict[Path, str]()
    if rule is None:
        return {}, []
    files = dict.fromkeys(images)  # once, however many pages
    batches = ProductionBatches(rule, files, folder)
    for image in files:
        with problems.collect():
            found[image] = batches.of(image)["batch"]
    problems.refuse()
    return found, batches.lines()
