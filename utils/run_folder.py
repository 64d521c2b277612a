"""A run on disk: its lock, the state of each stage, its outputs, and files that are not its own.

The operating system drops the lock of a process that dies. A state names the settings that decide
the stage's result, and the files that the stage writes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint import CheckpointError, is_plain, load, save
from utils.commandline import UserError
from utils.files import confined, inside, leads_out, rename, special_kind, writing

LOCK_FILE = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
Settings = Mapping[str, Any]


class Difference(NamedTuple):
    """A setting that differs; as text, the line that people read."""

    name: str
    was: Any
    now: Any
    reason: str = ""  # why it may differ though nobody changed it

    def __str__(self) -> str:
        line = f"{self.name} was {self.was}, is {self.now}"
        return f"{line} ({self.reason})" if self.reason else line


Compare = Callable[[Settings, Settings], list[Difference]]  # as ``differences``


def pretrained_name(epochs: int | str) -> str:
    """File name of a network after so many epochs of pretraining; '*' for the names of all."""
    return f"moco{epochs}.pt"


class RunFolder:
    """The part of a run's folder, such as ``aluminum_simclr/1_0``, that belongs to one stage."""

    def __init__(self, path: str | Path, stage: str) -> None:
        self.path, self.stage = Path(path), stage
        self.state = StateFile(self.path / f"state_{stage}.pt")

    def conflicts(self, settings: Settings, foreign: Iterable[Path], compare: Compare) -> list[str]:
        """What forbids to resume or to overwrite this stage's run, a line each; empty: go on.

        ``settings`` are the decisive ones of the new run. If there is no state, the files
        ``foreign`` are a user's own or published ones.
        """
        try:
            state = self.state.load()
        except CheckpointError as error:
            return [str(error)]
        if state is None:
            present = [path for path in foreign if path.exists()]
            return [
                f"{path}: would be overwritten or mixed up with this run, which has left no "
                f"{self.state.path.name}; give --overwrite, or another --name"
                for path in present[:1]
            ]
        changed = "; ".join(map(str, compare(state["settings"], settings)))
        return [
            f"{self.path}: holds a run of stage {self.stage} with other settings "
            f"({changed}); give --overwrite to train anew, or another --name"
        ] * bool(changed)

    def links_out(self, names: Iterable[str]) -> list[str]:
        """A line for each folder of the outputs ``names`` that is elsewhere, through a link."""
        places = dict.fromkeys((self.path / name).parent for name in names)
        return [
            f"{place}: a link to {place.resolve()}, and nothing is written out of the run's folder "
            "through links; remove the link"
            for place in places
            if leads_out(place / "file", self.path)
        ]

    def begin(self, state: Mapping[str, Any]) -> None:
        """Save the first state of a run and remove the outputs of an earlier one."""
        names = list(state["outputs"])
        with suppress(CheckpointError):
            names = list(dict.fromkeys([*(self.state.load() or state)["outputs"], *names]))
        self.state.begin({**state, "outputs": names})
        remove_outputs(self.path, names)


class StateFile:
    """The state from which a killed training resumes, and the one saved before it.

    A state is a dict with at least ``settings`` (those that decide the result), ``config`` (all),
    ``finished``, ``evaluations``, ``outputs`` (file names relative to the folder), ``environment``
    and ``about`` (header lines). The state before, in
    ``<stem>.previous.pt``, replaces a damaged one; a finished training leaves one file only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
        self._damaged = False

    def load(self, say: Callable[[str], object] | None = None) -> dict[str, Any] | None:
        """The newest readable state, None if there is no file; CheckpointError if all are damaged.

        ``say`` gets one line if the newest is damaged and the one before is used.
        """
        problems = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = load(path)
                if fault := _fault(state):
                    what = f"{path}: not the state of a training ({fault})"
                    raise CheckpointError(f"{what}; train it again")
            except CheckpointError as error:
                problems.append(str(error))
                continue
            self._damaged = path != self.path
            if problems and say is not None:
                say(f"{self.path}: damaged; going on from {self.previous.name}")
            return state
        if problems:
            raise CheckpointError(f"{problems[0]}, which --overwrite does")
        return None

    def begin(self, state: Mapping[str, Any]) -> None:
        """Save the first state of a training and remove the one before."""
        save(self.path, state)
        self.remove_previous()
        self._damaged = False

    finish = begin  # the last state needs none before it

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state and keep the one before unless that is damaged."""
        if not self._damaged and self.path.exists():
            with writing(self.path):
                rename(self.path, self.previous)
        save(self.path, state)
        self._damaged = False

    def remove_previous(self) -> None:
        """Remove the state before."""
        with writing(self.previous):
            self.previous.unlink(missing_ok=True)


# What every state holds besides tensors, and what one holds that a training goes on from.
_ENTRIES: dict[str, type] = {
    "settings": dict, "config": dict, "finished": bool, "evaluations": list, "outputs": list,
    "environment": str, "about": list,
}  # fmt: skip
_TO_GO_ON: dict[str, type] = {"epoch": int, "log": dict, "written": list}
_SCORES = {"epoch", "acc", "dice", "miou"}


def _fault(state: Mapping[str, Any]) -> str:
    """What is wrong with the entries of a state; '' if nothing is."""
    for name, kind in (_ENTRIES | _TO_GO_ON).items():
        if name not in state and name in _ENTRIES:
            return f"{name} is missing"
        value = state.get(name, kind())
        if not isinstance(value, kind) or not is_plain(value):
            return f"{name} is no {kind.__name__} of numbers and texts"
    numbers = [state.get("epoch", 0), *state.get("log", {}).values()]
    if not all(isinstance(n, int) and 0 <= n < 2**53 for n in numbers):
        return "epoch or log is no count"
    if not all(isinstance(n, str) for n in [*state["outputs"], *state.get("written", [])]):
        return "outputs are no file names"
    for entry in state["evaluations"]:
        if not isinstance(entry, Mapping) or not entry.keys() >= _SCORES:
            return "evaluations are no scores"
        if not all(isinstance(entry[name], int | float) for name in _SCORES):
            return "evaluations are no scores"
    return ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ, by name in order; a list equals its tuple."""
    was, now = (
        {name: list(value) if isinstance(value, tuple) else value for name, value in each.items()}
        for each in (old, new)
    )
    changed = [name for name in sorted(was | now) if was.get(name) != now.get(name)]
    return [Difference(name, was.get(name), now.get(name)) for name in changed]


def remove_outputs(run_dir: str | Path, names: Iterable[str]) -> None:
    """Remove files by their names relative to ``run_dir``, and folders that are then empty.

    Names that lead out of ``run_dir``, also through links, are ignored: the state that lists them
    may be anyone's.
    Raises UserError if a file cannot be removed.
    """
    run_dir = Path(run_dir)
    paths = [path for name in names if (path := inside(run_dir, name)) is not None]
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)
    folders = {folder for path in paths for folder in path.relative_to(run_dir).parents}
    for folder in sorted(folders - {Path()}, reverse=True):  # what is inside another comes first
        with suppress(OSError):  # somebody put more into it, or it was never made
            (run_dir / folder).rmdir()


@contextmanager
def locked(
    folder: str | Path, flag: str = "--output_dir", work: str = "training", other: str = "--name"
) -> Iterator[None]:
    """Lock a folder, made if missing, for this process; it is removed at the end if empty.

    Meanwhile nothing is written out of it through links (``confined``). ``flag``, ``work`` and
    ``other`` are for messages: what gives the folder, what is done there, what gives another one.

    The lock is the operating system's, on the file ``.lock``, whose mere presence means nothing: a
    killed process holds no lock, and forked worker processes do not inherit it.

    Raises:
        UserError: another process holds the folder, or it cannot be written to.
    """
    folder, path = Path(folder), Path(folder) / LOCK_FILE
    try:
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except OSError as error:
        reason = error.strerror or error
        cure = f"give an {flag} that may be written to"
        raise UserError(f"{folder}: cannot be written to ({reason}); {cure}") from error
    if descriptor is None:
        cure = f"wait for it, or give another {other}"
        raise UserError(f"{folder}: another process is {work} there; {cure}")
    try:
        with confined(folder):
            yield
    finally:
        if os.name == "nt":  # Windows cannot remove an open file
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if os.name != "nt":  # removed while the lock is still held
            os.close(descriptor)
        for empty in made:
            with suppress(OSError):  # not empty, as a rule
                empty.rmdir()


def _open_locked(path: Path) -> int | None:
    """The descriptor of the locked file; None if another process has the lock."""
    while True:
        if path.is_symlink() or special_kind(path):
            raise UserError(f"{path}: a link or no file, so no lock; remove it")
        no_link = getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | no_link, 0o666)
        with ExitStack() as stack:
            stack.callback(os.close, descriptor)
            if not _take(descriptor):
                return None
            # Its holder may have removed the file after it was opened here: then lock a new one.
            with suppress(FileNotFoundError):
                if os.name == "nt" or os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    stack.pop_all()
                    return descriptor


def _take(descriptor: int) -> bool:
    """Try to lock without waiting; always succeeds on file systems that have no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock, which a worker process that outlives a killed training would still hold.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True
