"""How long trainings take: seconds by kind, from a few timed steps, then from whole trainings."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from comparison.forest import ForestRun
from stages.finetuning import Supervised
from stages.job import Runner
from utils.files import read_plain, replace_file
from utils.log import RunLog


class Pace:
    """Seconds of a whole piece of work by kind, kept in a JSON file, with ``path`` None in memory.

    A file that cannot be read is ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds = self._read()

    def _read(self) -> dict[str, float]:
        if self.path is not None:
            with suppress(OSError, ValueError, TypeError):
                found = dict(json.loads(read_plain(self.path)))
                return {str(kind): float(seconds) for kind, seconds in found.items()}
        return {}

    def learn(self, kind: str, seconds: float, share: float = 1.0) -> None:
        """Keep how long a share (0 ... 1) of a piece of work took; a share of 0 is ignored."""
        if share > 0:
            self.seconds |= self._read()  # another process may have written
            self.seconds[kind] = seconds / share
            if self.path is not None:
                text = json.dumps({k: round(v, 3) for k, v in self.seconds.items()}, indent=1)
                replace_file(self.path, text + "\n", "--out")

    def left(self, pieces: Iterable[tuple[str, float]]) -> float:
        """Seconds of pieces of work, (kind, share) each; an unknown kind counts as 0."""
        return sum(self.seconds.get(kind, 0.0) * share for kind, share in pieces)


def timed(runner: Runner) -> float:
    """Seconds that a whole training will take, by a few of its steps; nothing is kept.

    A forest is trained, which is short, and predicts one image.
    """
    started = time.monotonic()
    if isinstance(runner, ForestRun):
        forest, _ = runner.taught()
        trained = time.monotonic()
        forest.predict(runner.job.store.image(runner.tested[0].image).numpy())
        return trained - started + (time.monotonic() - trained) * len(runner.tested)
    # Fine-tuning takes as long as training from scratch, which needs no pretrained network.
    trial = (Supervised if runner.stage == "fine" else type(runner))(runner.job)
    with tempfile.TemporaryDirectory() as folder:
        trial.run_dir, trial.log = Path(folder), RunLog(folder, trial.stage, enabled=False)
        torch.manual_seed(runner.config.seed)
        trial.build()
        steps = trial.epochs * len(trial.batches)
        seconds = steps * _step(trial, 2 if trial.stage == "self" else 6)
        if isinstance(trial, Supervised):
            started = time.monotonic()
            trial.evaluate(trial.epochs)  # no epoch of the training, so no contact sheet is drawn
            seconds += (time.monotonic() - started) * len(trial.due())
    return seconds


class _EnoughError(Exception):
    """All the steps were timed."""


def _step(runner: Runner, steps: int) -> float:
    """Mean seconds from one step to the next, after a first one."""
    ended: list[float] = []

    def step_done() -> None:
        next(runner.module.parameters()).sum().item()  # waits for the device
        ended.append(time.monotonic())
        if len(ended) > steps:
            raise _EnoughError

    most = steps + 1  # epochs, of one step or more
    with suppress(_EnoughError), runner.preparing(0, most):
        for epoch in range(most):
            runner.train_epoch(epoch, step_done)
    return (ended[-1] - ended[0]) / steps


def duration(seconds: float) -> str:
    """A time in words: '45 s', '12 min', '3 h 20 min', '2 d 5 h'."""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
