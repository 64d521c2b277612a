"""Atomic writes, listing of folders, and their errors as messages for the user."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.commandline import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


# What systems and network drives put beside files, in lower case: thumbnails and deleted files.
SYSTEM_NAMES = ("thumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot", "@recycle",
                "$recycle.bin", "system volume information", "lost+found", "__macosx")  # fmt: skip


class DataError(UserError):
    """The user's image or mask files cannot be used; a line each: 'file: what; cure'."""


@contextmanager
def writing(path: str | Path, flag: str = "output_dir") -> Iterator[None]:
    """Turn OSErrors while ``path`` is written into a UserError, whose cure is another ``flag``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        cure = f"free disk space or give an {flag} that may be written to"
        raise UserError(f"{path}: cannot be written ({reason}); {cure}") from error


@contextmanager
def replacing(path: str | Path, flag: str = "output_dir", durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends without an error.

    Missing folders are made. ``durable`` syncs the bytes before the renaming, so that even after a
    power cut ``path`` is the old file or the whole new one. Errors and ``flag`` as for ``writing``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:  # after an interrupt, too
            with suppress(OSError):
                temporary.unlink()
        if durable:
            # Sync the renaming; Windows opens no folder, some network file systems sync none.
            with suppress(OSError):
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


def replace_file(
    path: str | Path, contents: str | bytes, flag: str = "output_dir", durable: bool = True
) -> None:
    """Write a file atomically (``replacing``), text as UTF-8 with line feeds on every system."""
    data = contents if isinstance(contents, bytes) else contents.encode("utf-8", "backslashreplace")
    with replacing(path, flag, durable) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed processes; the caller must hold the folder's lock."""
    for path in Path(folder).rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with writing(path):
                path.unlink(missing_ok=True)


def remove_orphans(folder: str | Path) -> None:
    """Remove from a folder without a lock the temporary files of processes that are no more."""
    for path in Path(folder).glob(".*.tmp"):
        named = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if named and not _runs(int(named[1])):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    """Whether a process of this machine may still run."""
    if os.name == "nt":  # signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def list_names(folder: str | Path) -> list[Path]:
    """The sorted contents of a folder (of a missing one: none), no hidden or ``SYSTEM_NAMES``.

    Raises DataError if the folder may not be listed.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        return []
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        reason = f"cannot be listed ({error.strerror}); check its permissions"
        raise DataError(f"{folder}: {reason}") from None
    return [p for p in names if not p.name.startswith(".") and p.name.lower() not in SYSTEM_NAMES]


def list_files(
    folder: str | Path,
    suffixes: Collection[str] = (),
    *,
    below: bool = False,
    leave_out: Collection[Path] = (),
) -> list[Path]:
    """The files among ``list_names``, sorted by path.

    ``suffixes`` are in lower case, such as ``IMAGE_SUFFIXES``; empty: files of any type. ``below``
    includes subfolders, but for links to folders (which may lead in circles) and ``leave_out``,
    resolved paths.
    """
    found: list[Path] = []
    for path in list_names(folder):
        if below and os.path.isdir(path):
            if not path.is_symlink() and path.resolve() not in leave_out:
                found += list_files(path, suffixes, below=True, leave_out=leave_out)
        elif os.path.isfile(path) and (not suffixes or path.suffix.lower() in suffixes):
            found.append(path)
    return sorted(found)
