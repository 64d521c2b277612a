"""Scores of finished runs: ``eval.txt`` of an experiment and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from utils.checkpoint import CheckpointError
from utils.files import list_names, replace_file
from utils.metrics import format_mean_std
from utils.run_folder import StateFile
from utils.tables import text

COLUMNS = ("best on test: epoch", "ACC", "Dice", "mIoU", "last: epoch", "ACC", "Dice", "mIoU")
SCORES = ("acc", "dice", "miou")

Evaluation = dict[str, Any]
Results = dict[str, tuple[Evaluation, Evaluation]]


def read_results(experiment: Path, stage: str) -> Results:
    """Best and last evaluation of each finished run below an experiment's folder.

    Args:
        experiment: such as ``aluminum_simclr``.
        stage: 'fine' or 'sup'.

    Returns:
        Folder name of the run -> (evaluation with the best ACC on the test set, the last one). A
        run whose state cannot be read is not among them: its own training says so.
    """
    results = {}
    for run in list_names(experiment):
        with suppress(CheckpointError):
            state = StateFile(run / f"state_{stage}.pt").load()
            if state is not None and state["finished"] and state["evaluations"]:
                evaluations = state["evaluations"]
                best = max(evaluations, key=lambda e: e["acc"])  # of equals the first, as in *.pt
                results[run.name] = (best, evaluations[-1])
    return results


def by_size(results: Results) -> dict[str, Results]:
    """The same by data size, which is how the name of a run begins: ``1``, ``5`` or ``f``."""
    sizes: dict[str, Results] = {}
    for run, pair in results.items():
        sizes.setdefault(run.split("_")[0], {})[run] = pair
    return sizes


def table(experiment: Path, stage: str) -> list[str]:
    """Lines of a table: each finished run, then mean and deviation over each data size."""
    rows: list[list[str]] = [["run", *COLUMNS]]
    for size, group in by_size(read_results(experiment, stage)).items():
        for name, pair in group.items():
            cells = ([str(e["epoch"]), *(f"{e[s]:.4f}" for s in SCORES)] for e in pair)
            rows.append([name, *chain(*cells)])
        if len(group) > 1:
            choices = zip(*group.values(), strict=True)  # the best of all runs, the last of all
            means = (["", *(format_mean_std([e[s] for e in es]) for s in SCORES)] for es in choices)
            rows.append([f"{size}: mean ± std", *chain(*means)])
    return text(rows)


def scored_classes(experiment: Path, stage: str) -> str:
    """Over which classes the means are; '' where the runs do not tell (or there are none)."""
    for best, _ in read_results(experiment, stage).values():
        pixels = best.get("truth_pixels", [])[1:]
        if pixels:
            absent = [str(c) for c, count in enumerate(pixels, start=1) if not count]
            lacking = f": no pixel of class {', '.join(absent)} in the test set" if absent else ""
            return f"{len(pixels) - len(absent)} of {len(pixels)} classes scored{lacking}"
    return ""


def write_results(experiment: Path, stage: str) -> None:
    """Write ``eval.txt`` of an experiment from the runs that are finished.

    Raises:
        UserError: it cannot be written; an older one is as it was.
    """
    lines = [
        f"{experiment.name}, stage {stage}: scores on the test set",
        "best on test: the evaluation with the highest ACC on the test set, as in the paper's "
        "protocol (chosen with the test set's labels)",
        "last: after the last epoch, nothing chosen",
        "Dice and mIoU: pooled over the set, mean over the non-background classes; ACC: mean over "
        "images; ± sample standard deviation over runs",
        *filter(None, [scored_classes(experiment, stage)]),
        "",
        *table(experiment, stage),
    ]
    replace_file(experiment / "eval.txt", "\n".join(lines) + "\n")


def results_table(folders: Mapping[Path, str]) -> str:
    """The tables of several experiments, folder -> stage, as printed at the end."""
    parts = []
    for folder, stage in folders.items():
        parts += ["", f"{folder} (also in {folder / 'eval.txt'})", *table(folder, stage)]
        scored = scored_classes(folder, stage)
        parts += [scored] if ":" in scored else []
    return "\n".join(parts)
