"""Scores of finished runs: ``eval.txt`` of an experiment and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpoint import load
from utils.metrics import format_mean_std

COLUMNS = ("best on test: epoch", "ACC", "Dice", "mIoU", "last: epoch", "ACC", "Dice", "mIoU")
SCORES = ("acc", "dice", "miou")


def read_results(experiment: Path, stage: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Best and last evaluation of each finished run below an experiment's folder.

    Args:
        experiment: such as ``aluminum_simclr``.
        stage: 'fine' or 'sup'.

    Returns:
        Folder name of the run -> (evaluation with the best ACC on the test set, the last one).
    """
    results = {}
    for path in sorted(experiment.glob(f"*/state_{stage}.pt")):
        state = load(path)
        evaluations = state["evaluations"]
        if state["finished"] and evaluations:
            best = max(evaluations, key=lambda e: e["acc"])  # the first of equals, as it was kept
            results[path.parent.name] = (best, evaluations[-1])
    return results


def table(experiment: Path, stage: str) -> list[str]:
    """Lines of a table: each finished run, then mean and deviation over each data size."""
    results = read_results(experiment, stage)
    rows: list[tuple[str, ...]] = [("run", *COLUMNS)]
    for size in dict.fromkeys(name.split("_")[0] for name in results):
        group = [results[name] for name in results if name.split("_")[0] == size]
        for name, pair in results.items():
            if name.split("_")[0] == size:
                cells = [[str(e["epoch"]), *(f"{e[s]:.4f}" for s in SCORES)] for e in pair]
                rows.append((name, *cells[0], *cells[1]))
        if len(group) > 1:
            means = [
                ["", *(format_mean_std([pair[i][s] for pair in group]) for s in SCORES)]
                for i in (0, 1)
            ]
            rows.append((f"{size}: mean ± std", *means[0], *means[1]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def write_results(experiment: Path, stage: str) -> None:
    """Write ``eval.txt`` of an experiment from the runs that are finished."""
    lines = [
        f"{experiment.name}, stage {stage}: scores on the test set",
        "best on test: the evaluation with the highest ACC on the test set, as in the paper's "
        "protocol (chosen with the test set's labels)",
        "last: after the last epoch, nothing chosen",
        "Dice and mIoU: pooled over the set, mean over the non-background classes; ACC: mean over "
        "images; ± sample standard deviation over runs",
        "",
        *table(experiment, stage),
    ]
    (experiment / "eval.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def results_table(folders: Mapping[Path, str]) -> str:
    """The tables of several experiments, folder -> stage, as printed at the end."""
    parts = []
    for folder, stage in folders.items():
        parts += ["", f"{folder} (also in {folder / 'eval.txt'})", *table(folder, stage)]
    return "\n".join(parts)
