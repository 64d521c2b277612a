"""A small result file, replaced as a whole: whoever reads it meanwhile has the old one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class ResultsError(ValueError):
    """A result file cannot be written; the message names it and the cure."""


def replace_file(
    path: str | Path,
    contents: str | bytes,
    error: type[ValueError] = ResultsError,
    flag: str = "--out",
) -> None:
    """Write a file, text as UTF-8, by way of a temporary one beside it; missing folders are made.

    Args:
        path: the file.
        contents: all of it.
        error: what is raised.
        flag: the setting that says where it goes, for the message.

    Raises:
        ResultsError, or ``error``: it cannot be written; an older one is as it was.
    """
    path = Path(path)
    data = contents if isinstance(contents, bytes) else contents.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as why:
        raise error(
            f"{path}: cannot be written ({why.strerror or why}); free disk space or give an "
            f"{flag} that may be written to"
        ) from why
