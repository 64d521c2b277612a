"""The runs of a table as commands of their own: side by side on several devices, or elsewhere.

A *piece* is what a process does from beginning to end: a row's run with one repeat, or the
pretraining that all repeats of a row share, which comes before them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import torch

from comparison.plan import NAMES, Plan, Work
from config import ConfigError
from utils.commandline import FLAG, UserError, found, plain_flag
from utils.device import is_here
from utils.log import to_terminal

NOT_PASSED_ON = ("devices", "commands", "report", "plan")  # flags of the whole table
PAUSE = 0.1  # seconds between looks at the processes


@dataclass(frozen=True)
class Piece:
    """Work for one process, in order."""

    key: str  # 'simclr:0', 'byol:pretraining'
    works: tuple[Work, ...]

    @property
    def title(self) -> str:
        """For people."""
        first, *others = self.works
        return ", ".join([first.title, *(NAMES[work.runner.stage] for work in others)])

    @property
    def after(self) -> str:
        """The key of the piece that has to be finished before."""
        work = self.works[0]
        return f"{work.variant.key}:pretraining" if work.variant.shared and not work.for_all else ""


def pieces_of(works: Iterable[Work]) -> list[Piece]:
    """Work by the processes that do it, those first that others wait for."""
    by_key: dict[str, list[Work]] = {}
    for work in works:
        part = "pretraining" if work.for_all else work.repeat
        by_key.setdefault(f"{work.variant.key}:{part}", []).append(work)
    pieces = [Piece(key, tuple(own)) for key, own in by_key.items()]
    return sorted(pieces, key=lambda piece: not piece.works[0].for_all)


def do_piece(plan: Plan, key: str) -> None:
    """Do one piece, or what is left of it; the table is written by others."""
    pieces = {piece.key: piece for piece in pieces_of(plan.works())}
    if key not in pieces:
        raise ConfigError(f"--piece: found {found(key)}; allowed: {', '.join(pieces)}")
    for work in pieces[key].works:
        to_terminal(work.title)
        work.do()


def passed_on(argv: Sequence[str]) -> list[str]:
    """The words of a command line without the flags that concern the whole table."""
    words, mine = [], False
    for word in argv:
        flag = FLAG.fullmatch(plain_flag(word))
        if flag:
            mine = flag[2] in NOT_PASSED_ON
        if not mine:
            words.append(word)
    return words


def device_names(text: str) -> list[str]:
    """The devices of ``--devices``: '0,cuda:1,cpu' is cuda:0, cuda:1, cpu.

    ConfigError of one that is none, or is not here.
    """
    names = [f"cuda:{word}" if word.isdigit() else word for word in text.split(",")]
    wrong = [name for name in names if not re.fullmatch(r"cpu|mps|cuda:\d{1,3}", name)]
    if wrong:
        legal = "numbers of GPUs such as 0,1,2,3, or cpu,cpu for two processes"
        raise ConfigError(f"--devices: found {found(wrong[0])}; allowed: {legal}")
    absent = [name for name in names if not is_here(torch.device(name))]
    if absent:
        what = f"found {absent[0]}, which PyTorch does not see on this machine"
        raise ConfigError(f"--devices: {what}; give cpu,cpu for two processes, or leave it out")
    return names


def words_for(device: str, devices: Sequence[str], threads: int) -> list[str]:
    """Flags that put a run on a device; processes on the CPU share its cores."""
    shared = max((os.cpu_count() or 1) // max(devices.count("cpu"), 1), 1)
    own = [] if threads or device != "cpu" else ["--threads", str(shared)]
    return ["--device", device, *own]


@dataclass
class Process:
    """A piece at work."""

    piece: Piece
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    started: float

    def last_line(self) -> str:
        """What it said last of what went wrong."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


def run_side_by_side(
    pieces: Sequence[Piece],
    devices: Sequence[str],
    command: Callable[[Piece, str], list[str]],
    done: Callable[[Piece], object],
) -> None:
    """Do the pieces, on each device one at a time; UserError at the end if some failed.

    ``command`` gives the words of the process of a piece on a device, ``done`` is called when a
    piece is finished. An interruption ends the processes, whose work is resumed later.
    """
    waiting, running, failed = list(pieces), dict[str, Process](), dict[str, str]()
    names = [f"{device} #{n}" for n, device in enumerate(devices)]
    try:
        while waiting or running:
            for name, device in zip(names, devices, strict=True):
                if name in running and running[name].process.poll() is not None:
                    finished = running.pop(name)
                    if code := finished.process.returncode:
                        failed[finished.piece.key] = f"{finished.last_line()} (exit code {code})"
                    else:
                        took = time.monotonic() - finished.started
                        to_terminal(f"Done on {device} in {took:.0f} s: {finished.piece.title}")
                        done(finished.piece)
                ready = _ready(waiting, [p.piece for p in running.values()], failed)
                if name not in running and ready:
                    to_terminal(f"On {device}: {ready.title}")
                    running[name] = _start(ready, command(ready, device))
                    waiting.remove(ready)
            if not running and waiting and _ready(waiting, [], failed) is None:
                break  # all wait for one that failed
            time.sleep(PAUSE)
    finally:
        for each in running.values():
            each.process.terminate()
        for each in running.values():
            each.process.wait()
    lines = [f"{key}: {why}" for key, why in failed.items()]
    lines += [f"{piece.key}: not begun, because {piece.after} failed" for piece in waiting]
    if lines:
        raise UserError("\n".join(lines))


def _ready(
    waiting: Sequence[Piece], running: Sequence[Piece], failed: dict[str, str]
) -> Piece | None:
    """The first piece that waits for no other one."""
    unfinished = {piece.key for piece in (*waiting, *running)} | failed.keys()
    return next((piece for piece in waiting if piece.after not in unfinished), None)


def _start(piece: Piece, words: Sequence[str]) -> Process:
    errors = tempfile.TemporaryFile()  # noqa: SIM115  it is read when the process has ended
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
    return Process(piece, process, errors, time.monotonic())


def command_words(piece: Piece, argv: Sequence[str], script: str, *more: str) -> list[str]:
    """The words of the command that does a piece."""
    return [sys.executable, script, *passed_on(argv), "--piece", piece.key, *more]
