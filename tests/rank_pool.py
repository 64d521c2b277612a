"""Processes that are ranks: a pool that does one thing after another, and single commands."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch

from utils.ranks import group

PATIENCE = 250  # seconds, on a busy machine


def context() -> Any:
    """Processes forked from a server that has PyTorch loaded, so that starting one is cheap."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["rank_pool", "tiny_set", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules by this alone
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        forkserver.ensure_running()
    return made


def _end_with_the_tests() -> None:
    """End this process once the one that started it is gone, however that ended."""
    parent, leave = multiprocessing.parent_process(), os._exit
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        leave(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(processes: Iterable[Any]) -> None:
    """Kill those that still run: one that hangs hears no other signal."""
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def be_rank(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun tells a process."""
    _end_with_the_tests()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "localhost"}
    )
    torch.set_num_threads(1)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])


def _serve(rank: int, ranks: int, port: int, pipe: Any) -> None:
    be_rank(rank, ranks, port)
    with group.joined():
        while (task := pipe.recv()) is not None:
            function, words = task
            try:
                pipe.send((True, function(*words)))
            except Exception:
                pipe.send((False, traceback.format_exc()))


class Pool:
    """So many ranks of one group; ``run`` lets each do the same."""

    def __init__(self, ranks: int) -> None:
        port, made = free_port(), context()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = made.Pipe()
            process = made.Process(target=_serve, args=(rank, ranks, port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *words: Any) -> list[Any]:
        """What ``function(*words)`` returns on each rank."""
        for pipe in self.pipes:
            pipe.send((function, words))
        found = [
            pipe.recv() if pipe.poll(PATIENCE) else (False, "no answer") for pipe in self.pipes
        ]
        assert all(good for good, _ in found), "\n".join(str(v) for good, v in found if not good)
        return [value for _, value in found]

    def close(self) -> None:
        """End the ranks."""
        try:
            for pipe in self.pipes:
                pipe.send(None)
            for process in self.processes:
                process.join(PATIENCE)
        finally:
            _end(self.processes)


@contextmanager
def pool(ranks: int) -> Iterator[Pool]:
    """A pool that is closed at the end."""
    made = Pool(ranks)
    try:
        yield made
    finally:
        made.close()


def _one(
    rank: int, ranks: int, port: int, pipe: Any, function: Callable[..., Any], words: Any
) -> None:
    be_rank(rank, ranks, port)
    out, err = io.StringIO(), io.StringIO()
    pipe.send(os.getpid())
    real = os._exit

    def leave(code: int) -> None:
        pipe.send((code, out.getvalue(), err.getvalue()))
        real(code)

    os._exit = leave  # type: ignore[assignment]  # how a rank ends that another one told to
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = function(*words)
    pipe.send((code, out.getvalue(), err.getvalue()))


def command(
    function: Callable[..., Any], words: list[tuple[Any, ...]]
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank of a command of its own; ``words`` of each."""
    port, made, ranks = free_port(), context(), len(words)
    pipes, processes = [], []
    for rank, own in enumerate(words):
        here, there = made.Pipe()
        process = made.Process(target=_one, args=(rank, ranks, port, there, function, own))
        process.start()
        pipes.append(here)
        processes.append(process)
    found = []
    try:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.recv()
            assert pipe.poll(PATIENCE), "a rank hangs"
            found.append(pipe.recv())
            process.join(PATIENCE)
    finally:
        _end(processes)
    return found
