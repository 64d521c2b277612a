"""One process at a time in a folder, by a lock that the system drops when its process dies."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.commandline import UserError

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
