"""Real kills: a run that was killed and started again ends with the bytes of an unbroken one.

Processes are forked from a server that has the program loaded, so that starting one is cheap.
"""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import tiny_set
from tiny_set import files, make_set
from unseen_figures import figures_unseen

SETTINGS: dict[str, Any] = {
    "self_max_epoch": 3,
    "fine_max_epoch": 3,
    "eval_every": 2,
    "save_every": 2,
}
STAGES = {"simclr": "self-fine", "moco": "self-fine-sup"}
PATIENCE = 250  # seconds for a run of one, on a busy machine
ENDS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills as Unix knows them")


def run_in(folder: str, data: str, mode: str, kill_at: tuple[str, int] | None) -> None:
    """The process: the program in a folder, dying at the n-th call of a function of ``os``."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if kill_at is not None:
        name, number = kill_at
        real, calls = getattr(os, name), []

        def deadly(*words: Any) -> Any:
            calls.append(words)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words)

        setattr(os, name, deadly)
    with (
        open("../out.txt", "w") as out,
        open("../err.txt", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        figures_unseen(),
    ):
        settings = {**SETTINGS, "self_mode": mode, "stages": STAGES[mode]}
        code = tiny_set.train(Path(data), Path("."), **settings)
    sys.exit(code)


class Lab:
    """A set, the bytes of unbroken runs, and processes to kill."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = make_set(root / "set")
        self.context = multiprocessing.get_context("forkserver")
        # The optimizers import torch._dynamo at their first step.
        self.context.set_forkserver_preload(["tiny_set", "torch._dynamo"])
        with pytest.MonkeyPatch.context() as patch:  # the server finds modules by this alone
            patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
            forkserver.ensure_running()
        self.unbroken: dict[str, dict[str, bytes]] = {}

    def start(self, folder: Path, mode: str, kill_at: tuple[str, int] | None = None) -> Any:
        """A process that runs the program in ``folder/run``."""
        (folder / "run").mkdir(parents=True, exist_ok=True)
        (folder / "err.txt").unlink(missing_ok=True)
        words = (str(folder / "run"), str(self.data), mode, kill_at)
        process = self.context.Process(target=run_in, args=words)
        process.start()
        return process

    def finish(self, folder: Path, mode: str) -> None:
        """The same command again, to its end, which must be that of the unbroken run."""
        process = self.start(folder, mode)
        process.join(PATIENCE)
        assert process.exitcode == 0, (folder / "err.txt").read_text()
        found, expected = files(folder / "run"), self.expected(mode)
        assert set(found) == set(expected)
        assert [name for name in expected if found[name] != expected[name]] == []

    def expected(self, mode: str) -> dict[str, bytes]:
        """Files of the unbroken run."""
        if mode not in self.unbroken:
            folder = self.root / f"unbroken_{mode}"
            process = self.start(folder, mode)
            process.join(PATIENCE)
            assert process.exitcode == 0, (folder / "err.txt").read_text()
            self.unbroken[mode] = files(folder / "run")
        return self.unbroken[mode]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield Lab(tmp_path_factory.mktemp("lab"))


def lines_written(folder: Path) -> int:
    """Lines of all metrics of a run, a measure of how far it is."""
    count = 0
    for path in (folder / "run").rglob("metrics.jsonl"):
        with contextlib.suppress(OSError):
            count += path.read_bytes().count(b"\n")
    return count


class Kill(enum.Enum):
    """What a signal sent at a random moment met."""

    ENDED = enum.auto()  # nothing: the run had come to its end, so this was no kill
    EARLY = enum.auto()  # a process that had not begun to train
    INTERRUPTED = enum.auto()  # a training


def kill_at_random(lab: Lab, folder: Path, mode: str, how: signal.Signals, seed: int) -> Kill:
    """Kill a run at a random moment: after a random line of its metrics, and a little longer."""
    expected = lab.expected(mode)
    total = sum(b.count(b"\n") for name, b in expected.items() if name.endswith(".jsonl"))
    rng = random.Random(seed)
    wanted, delay = rng.randrange(total), rng.uniform(0, 0.3)
    process = lab.start(folder, mode)
    while process.is_alive() and lines_written(folder) < wanted:
        time.sleep(0.002)
    process.join(delay)
    with contextlib.suppress(ProcessLookupError):  # it has just ended, as its exit code tells
        if process.exitcode is None:
            os.kill(process.pid, how)
    process.join(PATIENCE)
    said = folder / "err.txt"
    error = said.read_text() if said.exists() else ""
    if process.exitcode == 0:
        assert not error, error
        return Kill.ENDED
    if process.exitcode == ENDS[how]:
        assert how == signal.SIGKILL or (error.count("\n") == 1 and "same command" in error), error
    else:  # the signal came before the program had begun, and ended it as it ends any program
        assert process.exitcode in (-how, 1) and not error, (process.exitcode, error)
    return Kill.INTERRUPTED if list((folder / "run").rglob("state_*.pt")) else Kill.EARLY


@pytest.mark.parametrize(
    ("mode", "how"),
    [("simclr", signal.SIGKILL), ("moco", signal.SIGTERM), ("simclr", signal.SIGINT)],
)
def test_a_killed_run_ends_as_an_unbroken_one(
    lab: Lab, tmp_path: Path, mode: str, how: signal.Signals
) -> None:
    for seed in range(20):  # until one is interrupted: a busy machine decides what a kill meets
        folder = tmp_path / str(seed)
        met = kill_at_random(lab, folder, mode, how, seed)
        lab.finish(folder, mode)
        if met is Kill.INTERRUPTED:
            return
    pytest.fail("of 20 kills none came while the run trained")


@pytest.mark.parametrize(("call", "number"), [("replace", 2), ("fsync", 7)])
def test_a_kill_between_writing_and_renaming_harms_nothing(
    lab: Lab, tmp_path: Path, call: str, number: int
) -> None:
    process = lab.start(tmp_path, "simclr", (call, number))
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "run").rglob(".*.tmp"))  # what was half done lies there
    lab.finish(tmp_path, "simclr")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills(lab: Lab, tmp_path: Path) -> None:
    met: Counter[Kill] = Counter()
    for seed in range(100):
        mode = ("simclr", "moco")[seed % 2]
        how = list(ENDS)[seed % 3]
        folder = tmp_path / str(seed)
        for again in range(1 + seed % 3):  # some runs are killed two and three times
            met[kill_at_random(lab, folder, mode, how, 1000 * seed + again)] += 1
        lab.finish(folder, mode)
        if met[Kill.INTERRUPTED] >= 25 and met[Kill.INTERRUPTED] + met[Kill.EARLY] >= 30:
            return
    pytest.fail(f"fewer than 30 kills, or fewer than 25 of runs that trained: {met}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_kill_at_every_step_of_saving(lab: Lab, tmp_path: Path, call: str) -> None:
    for number in range(1, 200, 3):
        folder = tmp_path / str(number)
        process = lab.start(folder, "moco", (call, number))
        process.join(PATIENCE)
        if process.exitcode == 0:
            assert number > 10
            return
        assert process.exitcode == -signal.SIGKILL
        lab.finish(folder, "moco")
    pytest.fail("no end")
