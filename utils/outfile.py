"""A small result file, replaced as a whole: whoever reads it meanwhile has the old one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from utils.results import ResultsError


def replace_file(path: str | Path, contents: str | bytes) -> None:
    """Write a file, text as UTF-8, by way of a temporary one beside it; missing folders are made.

    Raises:
        ResultsError: it cannot be written; an older one is as it was.
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
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or give an "
            "--out that may be written to"
        ) from error
