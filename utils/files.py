"""Files written as a whole, folders listed: a reader meanwhile has the old file, or the new one."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.commandline import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


class DataError(UserError):
    """Something is wrong with the user's image or mask files, a line each: 'file: what; cure'."""


@contextmanager
def writing(path: str | Path, flag: str = "output_dir") -> Iterator[None]:
    """Turn what the system refuses while the file or folder ``path`` is written into a UserError.

    ``flag`` is the setting that says where it goes, for the message.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or give an "
            f"{flag} that may be written to"
        ) from error


@contextmanager
def replacing(path: str | Path, flag: str = "output_dir", durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error.

    Missing folders are made. With ``durable`` the bytes are on the disk before the name is, so that
    after a power cut, too, ``path`` holds the old file or the whole new one.

    Raises:
        UserError: it cannot be written; ``path`` is as it was. ``flag`` as for ``writing``.
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
        finally:  # an interrupt, too, must not leave the temporary file behind
            with suppress(OSError):
                temporary.unlink()
        if durable:
            # The renaming, too. Windows opens no folder, some network file systems sync none.
            with suppress(OSError):
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


def replace_file(path: str | Path, contents: str | bytes, flag: str = "output_dir") -> None:
    """Write a file as a whole, see ``replacing``; text as UTF-8 with line feeds on every system."""
    data = contents if isinstance(contents, bytes) else contents.encode("utf-8", "backslashreplace")
    with replacing(path, flag) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed processes; only for who holds the folder's lock."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with writing(path):
                path.unlink(missing_ok=True)


def list_names(folder: str | Path) -> list[Path]:
    """What a folder holds, in the order of the names; nothing hidden, no ``Thumbs.db``.

    Raises:
        DataError: the folder may not be listed. A missing one is empty.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        return []
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from None
    return [p for p in names if not p.name.startswith(".") and p.name.lower() != "thumbs.db"]


def list_files(
    folder: str | Path,
    suffixes: Collection[str] = (),
    *,
    below: bool = False,
    leave_out: Collection[Path] = (),
) -> list[Path]:
    """The files of a folder that ``list_names`` lists, in the order of their paths.

    Args:
        folder: a missing one is empty.
        suffixes: in lower case, such as ``IMAGE_SUFFIXES``; empty: files of any type.
        below: the files of its folders too, but not of links to folders, which may lead in circles.
        leave_out: folders that are not looked at, resolved.
    """
    found: list[Path] = []
    for path in list_names(folder):
        if below and os.path.isdir(path):
            if not path.is_symlink() and path.resolve() not in leave_out:
                found += list_files(path, suffixes, below=True, leave_out=leave_out)
        elif os.path.isfile(path) and (not suffixes or path.suffix.lower() in suffixes):
            found.append(path)
    return sorted(found)
