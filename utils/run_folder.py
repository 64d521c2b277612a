"""What a run is on disk: its lock, its state, the files it wrote, and what is somebody else's.

A folder of runs belongs to one process at a time, by a lock that the system drops when its process
dies. Each stage of a run has a state there, which says what decides its result and what it writes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.checkpoint import CheckpointError, load, save
from utils.commandline import UserError
from utils.files import writing
from utils.imagefile import ImageStore

Say = Callable[[str], object]
Compare = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
"""In what the settings of the run on disk and of this one differ, in words."""


class RunFolder:
    """The part of a run's folder that belongs to one stage.

    Args:
        path: the folder, such as ``aluminum_simclr/1_0``.
        stage: ``self``, ``fine`` or ``sup``; its state is in ``state_<stage>.pt``.
    """

    def __init__(self, path: str | Path, stage: str) -> None:
        self.path, self.stage = Path(path), stage
        self.state = StateFile(self.path / f"state_{stage}.pt")

    def conflicts(
        self, settings: Mapping[str, Any], foreign: Iterable[Path], compare: Compare
    ) -> list[str]:
        """Why what is there must be neither gone on with nor written over, a line each.

        Args:
            settings: what decides the result of the run that is wanted.
            foreign: files that are somebody's own, or published ones, if there is no state.
            compare: says in what the settings in the state and these differ.
        """
        try:
            state = self.state.load()
        except CheckpointError as error:
            return [str(error)]
        if state is None:
            found = [path for path in foreign if path.exists()][:1]
            return [
                f"{path}: would be overwritten or mixed up with this run, which has left no "
                f"{self.state.path.name}; give --overwrite, or another --name"
                for path in found
            ]
        lines = compare(state["settings"], settings)
        return lines and [
            f"{self.path}: holds a run of stage {self.stage} with other settings "
            f"({'; '.join(lines)}); give --overwrite to train anew, or another --name"
        ]

    def begin(self, state: Mapping[str, Any]) -> None:
        """Mark the folder as that of the run in ``state``; remove what an earlier one wrote."""
        old: dict[str, Any] | None = None
        with suppress(CheckpointError):
            old = self.state.load()
        names = list(dict.fromkeys([*(old["outputs"] if old else []), *state["outputs"]]))
        self.state.begin({**state, "outputs": names})
        remove_outputs(self.path, names)


class StateFile:
    """What a training needs to go on after it was killed, and the same from one save before.

    A state is a dict with at least ``settings`` (what decides the result), ``finished``,
    ``evaluations`` and ``outputs`` (names of the files that the training writes, relative to its
    folder). Those of older programs lack ``config`` (all settings), ``environment`` and, in each
    evaluation, ``confusion`` (matrices of the test images, (n, C, C)). While a training lasts there
    are two files, so that one that was damaged costs little; a finished one leaves a small one.

    Args:
        path: such as ``1_0/state_self.pt``; the older one is ``1_0/state_self.previous.pt``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
        self._damaged = False

    def load(self, say: Say | None = None) -> dict[str, Any] | None:
        """The newest state that can be read; None if there is none.

        Args:
            say: told in one line when the newest is damaged and the one before is taken.

        Raises:
            CheckpointError: there is a state, and none can be read.
        """
        problems = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = load(path)
                if not {"settings", "finished", "evaluations", "outputs"} <= state.keys():
                    raise CheckpointError(f"{path}: not the state of a training; train it again")
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
        """Save the first state of a training; those of an earlier one go."""
        save(self.path, state)
        self.remove_previous()
        self._damaged = False

    finish = begin  # the last one, too, stands alone

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state and keep the one before, unless it is damaged."""
        if not self._damaged and self.path.exists():
            with writing(self.path):
                os.replace(self.path, self.previous)
        save(self.path, state)
        self._damaged = False

    def remove_previous(self) -> None:
        """Remove the older state, of which a finished training has no use."""
        with writing(self.previous):
            self.previous.unlink(missing_ok=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'name was old, is new' for each setting that differs; a list equals its tuple."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        pair = (old.get(name), new.get(name))
        before, now = (list(value) if isinstance(value, tuple) else value for value in pair)
        if before != now:
            lines.append(f"{name} was {before}, is {now}")
    return lines


def fingerprint(samples: Iterable[Any], store: ImageStore) -> str:
    """A short hash of names and decoded pixels: two sets that differ have different ones.

    Args:
        samples: images with their ``name``, the path ``image``, and ``mask``, a path or None.
        store: decodes them.
    """
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.name.encode(errors="backslashreplace"))
        files = [store.image(sample.image)]
        files += [store.mask(sample.mask)] if sample.mask is not None else []
        for pixels in files:
            digest.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
    return digest.hexdigest()[:16]


def remove_outputs(run_dir: str | Path, names: Iterable[str]) -> None:
    """Remove the files of these names, relative to ``run_dir``, and folders that are then empty.

    Names that lead out of the folder are left alone: they may come out of somebody else's file.

    Raises:
        UserError: a file cannot be removed.
    """
    run_dir = Path(run_dir)
    inside = [Path(n) for n in names if not Path(n).is_absolute() and ".." not in Path(n).parts]
    for name in inside:
        with writing(run_dir / name):
            (run_dir / name).unlink(missing_ok=True)
    folders = {folder for name in inside for folder in name.parents if folder.parts}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):  # somebody put more into it, or it was never made
            (run_dir / folder).rmdir()


# --- one process at a time ------------------------------------------------------------------------

LOCK_FILE = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder, which is made if missing, for this process alone.

    The lock is the system's, on the file ``.lock``: a process that is killed holds nothing, and
    the file itself means nothing. Worker processes that are forked do not inherit it. It is removed
    at the end, as is the folder if nothing was put into it.

    Raises:
        UserError: another process holds the folder, or it cannot be written to.
    """
    folder = Path(folder)
    path = folder / LOCK_FILE
    try:
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror or error}); give an --output_dir "
            "that may be written to"
        ) from error
    if descriptor is None:
        raise UserError(
            f"{folder}: another process is training there; wait for it, or give another --name"
        )
    try:
        yield
    finally:
        _release(path, descriptor)
        for empty in made:
            with suppress(OSError):  # not empty, as a rule
                empty.rmdir()


def _open_locked(path: Path) -> int | None:
    """A descriptor of the file with the lock on it; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if not taken:
            os.close(descriptor)
            return None
        # Whoever held it may have removed the file after it was opened here: then it is no lock.
        with suppress(FileNotFoundError):
            if os.name == "nt" or os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Ask for the lock without waiting; file systems that have none give it to everybody."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock: a worker process that outlives a killed training would hold that on.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _release(path: Path, descriptor: int) -> None:
    """Remove the file while it is still held; Windows can remove it only afterwards."""
    if os.name == "nt":
        os.close(descriptor)
    with suppress(OSError):
        path.unlink()
    if os.name != "nt":
        os.close(descriptor)
