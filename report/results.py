"""Scores of finished runs: ``eval.txt`` of an experiment and the table at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from config import FIELDS
from utils.checkpoint import CheckpointError
from utils.files import list_names, replace_file
from utils.metrics import format_mean_std
from utils.run_folder import StateFile
from utils.tables import digits, text

COLUMNS = ("best on test: epoch", "ACC", "Dice", "mIoU", "last: epoch", "ACC", "Dice", "mIoU")
SCORES = ("acc", "dice", "miou")
BEST = "the evaluation with the highest ACC on the test set, as in the paper's protocol"
LAST = "after the last epoch, nothing chosen"
FIT = "fit"  # an evaluation on images whose labels were learnt: never a score

OWN_IMAGES = {"files", "pretrained weights", "learnt test images"}  # each repeat has others
RUN = re.compile("f|[15]_[0-9]")  # folder name of a run; a copy of one has another name

Evaluation = dict[str, Any]
Results = dict[str, tuple[Evaluation, Evaluation]]


def read_results(experiment: Path, stage: str, fit: bool = False) -> Results:
    """Finished runs of an experiment, in stage 'fine' or 'sup': by name, (best, last) evaluation.

    The best one has the highest ACC on the test set. Runs without a test set have none; those
    that were evaluated on learnt labels are read if ``fit``, instead of the others. A run whose
    state cannot be read is left out: its own training reports that.
    """
    results = {}
    for run, (evaluations, _) in _finished(experiment, stage).items():
        if evaluations and bool(evaluations[-1].get(FIT)) == fit:
            best = max(evaluations, key=lambda e: e["acc"])  # of equals the first, as in *.pt
            results[run] = (best, evaluations[-1])
    return results


def unscored(experiment: Path, stage: str) -> list[str]:
    """Names of the finished runs without any evaluation: their set has no test images."""
    return [run for run, (scores, _) in _finished(experiment, stage).items() if not scores]


def differing(experiment: Path, stage: str, unused: Collection[str] = ()) -> list[str]:
    """A warning for each data size whose scored runs differ in more than their images.

    A run older than a setting has its default; ``unused`` are settings that their method does not
    take.
    """
    sizes: dict[str, list[Mapping[str, Any]]] = {}
    found = _finished(experiment, stage)
    for run in read_results(experiment, stage):
        sizes.setdefault(run.split("_")[0], []).append(found[run][1])
    lines = []
    for size, each in sizes.items():
        names = sorted({name for settings in each for name in settings} - {*OWN_IMAGES, *unused})
        usual = {name: FIELDS[name].default if name in FIELDS else None for name in names}
        values = [{**usual, **settings} for settings in each]
        if unlike := [n for n in names if any(own[n] != values[0][n] for own in values)]:
            lines.append(f"Warning: runs of data size {size} differ in {', '.join(unlike)}")
    return lines


def _finished(
    experiment: Path, stage: str
) -> dict[str, tuple[list[Evaluation], Mapping[str, Any]]]:
    """By the runs' names, evaluations and settings of those finished whose states can be read."""
    found = {}
    for run in list_names(experiment):
        if not RUN.fullmatch(run.name):
            continue
        file = StateFile(run / f"state_{stage}.pt")
        with suppress(CheckpointError):
            about = _evaluations(file.path, _version(file.path), _version(file.previous))
            if about is not None:
                found[run.name] = about
    return found


@lru_cache(maxsize=1000)
def _evaluations(
    path: Path, *_versions: tuple[int, ...]
) -> tuple[list[Evaluation], Mapping[str, Any]] | None:
    """Evaluations and settings of a run, None if it is not finished.

    One table asks for them several times: a state, which holds all weights, is read only when its
    files have changed.
    """
    state = StateFile(path).load()
    if state is None or not state["finished"]:
        return None
    return list(state["evaluations"]), state["settings"]


def _version(path: Path) -> tuple[int, ...]:
    """What changes whenever a file is replaced or written to; empty if there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ()


def read_state(run: Path, stage: str) -> dict[str, Any] | None:
    """What training keeps of a run's stage; None if there is nothing that can be read."""
    with suppress(CheckpointError):
        return StateFile(run / f"state_{stage}.pt").load()
    return None


def by_size(results: Results) -> dict[str, Results]:
    """Group results by data size, with which the name of a run begins: ``1``, ``5`` or ``f``."""
    sizes: dict[str, Results] = {}
    for run, pair in results.items():
        sizes.setdefault(run.split("_")[0], {})[run] = pair
    return sizes


def score_rows(
    group: Results, choice: int, names: Sequence[str], show: Callable[[float], str] = digits
) -> list[list[str]]:
    """Name, epoch and scores of each run of one data size, then mean and standard deviation.

    Choice 0 is the best evaluation, 1 the last. Scores are named as in ``metrics.jsonl``; one that
    a run lacks is nan.
    """
    chosen = {run: pair[choice] for run, pair in group.items()}
    scores = {run: [e.get(name, math.nan) for name in names] for run, e in chosen.items()}
    rows = [[run, str(e["epoch"]), *map(show, scores[run])] for run, e in chosen.items()]
    if len(group) > 1:
        means = map(format_mean_std, zip(*scores.values(), strict=True))
        rows.append(["mean ± std", "", *means])
    return rows


def table(experiment: Path, stage: str, fit: bool = False) -> list[str]:
    """Lines of a table: each finished run, then mean and standard deviation by data size."""
    columns = [name.replace("on test", f"({FIT})") for name in COLUMNS] if fit else COLUMNS
    rows: list[list[str]] = [["run", *columns]]
    for size, group in by_size(read_results(experiment, stage, fit)).items():
        best, last = (score_rows(group, choice, SCORES, "{:.4f}".format) for choice in (0, 1))
        if len(group) > 1:
            best[-1][0] = f"{size}: {best[-1][0]}"
        rows += [[*left, *right[1:]] for left, right in zip(best, last, strict=True)]
    return text(rows)


def scored_classes(experiment: Path, stage: str) -> str:
    """Over which classes the means are taken; '' if the runs, if any, do not tell."""
    for best, _ in read_results(experiment, stage).values():
        pixels = best.get("truth_pixels", [])[1:]
        if pixels:
            absent = [str(c) for c, count in enumerate(pixels, start=1) if not count]
            lacking = f": no pixel of class {', '.join(absent)} in the test set" if absent else ""
            return f"{len(pixels) - len(absent)} of {len(pixels)} classes scored{lacking}"
    return ""


def write_results(experiment: Path, stage: str, unused: Collection[str] = ()) -> None:
    """Write ``eval.txt`` of an experiment's finished runs; UserError if it cannot be written.

    ``unused`` as for ``differing``.
    """
    lines = [f"{experiment.name}, stage {stage}: scores on the test set"]
    others = no_scores(experiment, stage)
    if read_results(experiment, stage) or not others:
        lines += [
            f"best on test: {BEST} (chosen with the test set's labels)",
            f"last: {LAST}",
            "Dice and mIoU: pooled over the set, mean over the non-background classes; ACC: mean "
            "over images; ± sample standard deviation over runs",
            *filter(None, [scored_classes(experiment, stage)]),
            "",
            *differing(experiment, stage, unused),
            *table(experiment, stage),
        ]
        others = others and ["", *others]
    else:
        lines[0] = f"{experiment.name}, stage {stage}: no score"
    lines += others
    # Not forced to the disk: it is written anew from the states whenever a run ends.
    replace_file(experiment / "eval.txt", "\n".join(lines) + "\n", durable=False)


def no_scores(experiment: Path, stage: str) -> list[str]:
    """Lines on the runs that have no score, and the table of those that were tested by a fit."""
    lines = []
    if runs := unscored(experiment, stage):
        lines.append(f"{', '.join(runs)}: no score, the set has no test images with masks")
    if runs := [*read_results(experiment, stage, fit=True)]:
        lines += [
            f"{', '.join(runs)}: a {FIT}, no score: the test images are, or are cut from, images "
            "whose labels were learnt; how other images fare is not known",
            *table(experiment, stage, fit=True),
        ]
    return lines


def results_table(folders: Mapping[Path, str], unused: Collection[str] = ()) -> str:
    """The tables of several experiments, folder -> stage, as printed at the end.

    ``unused`` as for ``differing``.
    """
    parts = []
    for folder, stage in folders.items():
        others = no_scores(folder, stage)
        found = [*differing(folder, stage, unused), *table(folder, stage)]
        found = found if read_results(folder, stage) or not others else []
        parts += ["", f"{folder} (also in {folder / 'eval.txt'})", *found, *others]
        scored = scored_classes(folder, stage)
        parts += [scored] if ":" in scored else []
    return "\n".join(parts)
