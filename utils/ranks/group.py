"""The ranks of a command: who writes, waiting for one another, and ending together.

``torchrun`` starts the processes and tells them who they are; PyTorch connects them, by NCCL on
CUDA and by gloo elsewhere. For a process of its own everything here is the identity.

There are two ways of waiting. In a collective all ranks are at work, so it has a time-out. Before
one they meet, for as long as one of them works alone. A rank that fails leaves its message in
PyTorch's store, where every other rank looks once a second, and ends with it wherever it is.
So does one that is told to stop; of all that are stopped together rank 0 alone prints a line.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.commandline import (
    INTERRUPTED,
    TERMINATED,
    Termination,
    TrainingError,
    UserError,
    lack_of_memory,
)
from utils.ranks.stopping import STOPPED, Stopping

T = TypeVar("T")
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
TIMEOUT = timedelta(minutes=30)  # of a collective: longer than any step
LOOK = 1.0  # seconds between looks for the message of a rank that failed
LAST_WORDS = 10.0  # seconds that rank 0 waits at its end for the others, whatever they do
ENDED, LEFT = "ended", "left"  # names in the store


class Group:
    """The ranks that this process is one of."""

    def __init__(self, stopping: Stopping) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.stopping = stopping
        cuda = torch.cuda.is_available()
        # torchrun keeps its store when it restarts the ranks, with the addresses of those before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"pytorch/{attempt}", store),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )
        # A connection of its own: that of PyTorch is busy while a collective is set up.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
        self.store = dist.PrefixStore(f"ranks/{attempt}", store)
        self.met, self.alone, self.of_all = 0, 0, False
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def meet(self) -> None:
        """Wait for all ranks, without a time-out."""
        self.met += 1
        name, pause = f"met/{self.met}", 0.001
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.size:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.2)

    def watch(self) -> None:
        """End this process, wherever it is, once another rank has failed."""
        while not self.done.wait(LOOK):
            try:
                found = self.heard()
            except RuntimeError:
                found = {"text": "rank 0 is gone without a message", "code": 1}
            if found and not (self.done.is_set() or self.stopping.told):
                if self.rank == 0 or found["code"] not in STOPPED:
                    print(found["text"], file=sys.stderr, flush=True)
                with suppress(RuntimeError):
                    self.leave()
                os._exit(found["code"])

    def heard(self) -> dict[str, Any] | None:
        """The message of the first rank that failed; None if none has, or if that is this one."""
        if not self.store.check([ENDED]):
            return None
        found: dict[str, Any] = json.loads(self.store.get(ENDED))
        return None if found["rank"] == self.rank else found

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends; or raise what another one told before."""
        self.done.set()
        if isinstance(error, SystemExit):  # after --help, on all ranks
            return
        with suppress(RuntimeError):  # the store may be gone
            if not self.of_all:
                lost = isinstance(error, RuntimeError) and lack_of_memory(error) is None
                self.adopt(error, patience=3 * LOOK if lost else 0.0)
                self.store.compare_set(ENDED, "", json.dumps(self.last_words(error)))
            self.leave(LOOK if isinstance(error, KeyboardInterrupt) else LAST_WORDS)
        if lost_peer(error):
            cure = "the same command goes on from the last saved state"
            raise TrainingError(f"rank {self.rank}: another rank is gone; {cure}") from error

    def leave(self, patience: float = LAST_WORDS) -> None:
        """Let the last one go last that others ask: rank 0, whose process may hold the store."""
        self.done.set()
        until = time.monotonic() + patience
        if self.rank:
            self.store.add(LEFT, 1)
        while (
            not self.rank and time.monotonic() < until and self.store.add(LEFT, 0) < self.size - 1
        ):
            time.sleep(0.02)

    def adopt(self, error: BaseException, patience: float) -> None:
        """Raise the message of a rank that failed before: this one failed because of it."""
        until = time.monotonic() + (patience or LOOK * isinstance(error, Termination))
        while (found := self.heard()) is None and time.monotonic() < until:
            time.sleep(0.05)
        if found and not (found["code"] in STOPPED and self.stopping.told):
            self.leave()
            kind = UserError if found["code"] == 2 else TrainingError
            raise kind(found["text"]) from error

    def last_words(self, error: BaseException) -> dict[str, Any]:
        """What the other ranks print, and their exit code."""
        text, code = str(error), 2
        if lack_of_memory(error) is not None:
            text = f"Out of memory ({lack_of_memory(error)})"
        elif isinstance(error, KeyboardInterrupt):
            code = TERMINATED if isinstance(error, Termination) else INTERRUPTED
            text = STOPPED[code]
        elif not isinstance(error, UserError):
            text, code = str(error) or type(error).__name__, 1
        return {"rank": self.rank, "text": f"{self.name()}: {text}", "code": code}

    def name(self) -> str:
        """'rank 1 of 2 (node7)'."""
        return f"rank {self.rank} of {self.size} ({socket.gethostname()})"


# PyTorch's groups that were left, kept until the process ends. With PyTorch 2.6 such an object at
# its end waits for gloo's threads, holding Python's lock; one of them may need the lock to let go
# of a tensor, and then both wait for ever.
_ended: list[Any] = []
_group: Group | None = None


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is not there any more."""
    text = str(error)
    known = ("gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in text for word in known)
    )


def rank() -> int:
    """The number of this process, from 0."""
    return _group.rank if _group and not _group.alone else 0


def size() -> int:
    """The number of processes that compute together."""
    return _group.size if _group and not _group.alone else 1


def writes() -> bool:
    """Whether this process writes files and lines: rank 0, or one that is ``alone``."""
    return rank() == 0


def shows_progress() -> bool:
    """Whether this process has the terminal's last line: rank 0."""
    return _group is None or _group.rank == 0


def on_this_machine() -> int:
    """The number of ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _group.size)) if _group else 1


def names_ranks() -> str:
    """'' for one process; ', 4 ranks' for the line on the environment."""
    return f", {size()} ranks" if size() > 1 else ""


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that torchrun started, if it did, until the block ends on all of them.

    UserError and TrainingError of one rank end all, with its message. Ranks that are told to stop
    do not come back but rank 0, which has something to say.
    """
    global _group
    if _group or not all(os.environ.get(name) for name in TOLD) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    with Stopping(speaks=os.environ["RANK"] == "0") as stopping:
        _group = Group(stopping)
        try:
            yield
            _group.meet()
            _group.leave()
        except BaseException as error:
            # A collective fails, too, when other ranks are stopped a moment sooner.
            why = stopping.interrupt() if stopping.told and lost_peer(error) else error
            _group.fail(why)
            if _group.rank and isinstance(why, KeyboardInterrupt):
                sys.stdout.flush()
                os._exit(TERMINATED if isinstance(why, Termination) else INTERRUPTED)
            if why is not error:
                raise why from error
            raise
        finally:
            _group.done.set()
            _group = None
            if not stopping.told:  # else it may wait for ranks that are gone
                with suppress(RuntimeError):
                    _ended.append(dist.group.WORLD)
                    dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process is one of its own: what it does there, it does for itself."""
    if _group is None:
        yield
        return
    _group.alone += 1
    try:
        yield
    finally:
        _group.alone -= 1


def meet() -> None:
    """Wait for all ranks, however long that takes."""
    if _group and size() > 1:
        _group.meet()


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in their order, on all of them."""
    if size() == 1:
        return [value]
    meet()
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def agreed() -> Iterator[None]:
    """All ranks do the block; a UserError of one of them is raised by all."""
    if size() == 1:
        yield
        return
    text = ""
    try:
        yield
    except UserError as error:
        text = str(error)
    refuse_together(text)


def refuse_together(text: str, named: bool = True) -> None:
    """Raise on all ranks what is wrong with one of them, '' if nothing is: UserError.

    ``named``: with the name of the rank, where it is not the same with all.
    """
    texts = gather_objects((text, _group.name() if _group else ""))
    wrong = [(found, name) for found, name in texts if found]
    if wrong:
        if _group and size() > 1:
            _group.of_all = True
        same = not named or (len({found for found, _ in wrong}) == 1 and len(wrong) == len(texts))
        raise UserError(wrong[0][0] if same else f"{wrong[0][1]}: {wrong[0][0]}")


def by_writer(work: Callable[[], T]) -> T:
    """What the work returns that rank 0 does alone, on all ranks; its UserError, too."""
    if size() == 1:
        return work()
    result: list[Any] = [None]
    text = ""
    if writes():
        try:
            with alone():
                result = [work()]
        except UserError as error:
            text = str(error)
    refuse_together(text, named=False)
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]  # type: ignore[no-any-return]


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, for n ranks: those of this one."""
    return items[rank() :: size()]


def own_device(name: str) -> str:
    """The name of this rank's device on its machine; UserError if it has none of its own.

    ``name`` is that of ``--device``.
    """
    if _group is None:
        return name
    if name.startswith("cuda:") or name == "mps":
        raise UserError(f"--device: found {name} with {_group.size} ranks; give cuda, cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return name
    number, there = int(os.environ.get("LOCAL_RANK", _group.rank)), torch.cuda.device_count()
    if number >= there:
        cure = f"give torchrun --nproc_per_node {there}, or --device cpu"
        raise UserError(f"{there} GPU(s) for process {number} of this machine; {cure}")
    torch.cuda.set_device(number)
    return f"cuda:{number}"
