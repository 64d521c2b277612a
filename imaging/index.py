"""What is known of the files of a large set, kept so that later starts need not read them all.

The index, a file of JSON, holds of each file its length and time of change, and what a check of
the set asks for: size, ids of a mask, a checksum of its pixels; and the hashes of lists of files. A
file of another length or time is read anew; one that is read has to have the pixels of the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from utils.commandline import UserError
from utils.files import replace_file

FORMAT = 3  # to be raised where files become other pixels than before
LARGE = 1000  # files: smaller sets are read in seconds

Key = tuple[str, Path]  # 'image' or 'mask', and the file
Stamp = tuple[int, int]  # bytes, and time of the last change in nanoseconds


class Seen(NamedTuple):
    """What is remembered of a file that was read."""

    size: tuple[int, int]  # H, W in the file
    shape: tuple[int, ...]  # of its pixels in memory
    checksum: int  # of these pixels
    ids: tuple[int, ...]  # the values that occur in a mask; of an image none
    stamp: Stamp
    deep: str = ""  # number type of an image with more than 8 bits
    orientation: int = 1  # by EXIF, of an image

    def same_pixels(self, other: Seen) -> bool:
        """Whether two readings gave the same, whatever the file's time."""
        return self._replace(stamp=other.stamp) == other


def stamp_of(path: Path) -> Stamp:
    """A file's length and time of change; of a missing one (0, 0)."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def index_file(folder: str | Path, data_dir: str | Path) -> Path:
    """Where the index of a set is kept: hidden in ``folder``, named by the set's own place."""
    place = os.path.abspath(data_dir).encode(errors="backslashreplace")
    return Path(folder) / f".set_{hashlib.sha256(place).hexdigest()[:12]}.json"


def read_index(path: Path | None, terms: Sequence[Any]) -> tuple[dict[Key, Seen], dict[str, str]]:
    """Files that are as they were, and hashes of lists; none of a damaged or missing index.

    ``terms`` is how files become pixels; an index of other terms is none.
    """
    seen: dict[Key, Seen] = {}
    if path is None:
        return {}, {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["terms"] != [FORMAT, *terms]:
            return {}, {}
        for kind, name, size, shape, checksum, ids, stamp, deep, orientation in found["files"]:
            known = (tuple(size), tuple(shape), int(checksum), tuple(ids), tuple(stamp))
            entry = Seen(*known, str(deep), int(orientation))
            if stamp_of(Path(name)) == entry.stamp:
                seen[kind, Path(name)] = entry
        return seen, {str(key): str(value) for key, value in found["hashes"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}, {}


def write_index(
    path: Path, terms: Sequence[Any], seen: dict[Key, Seen], hashes: dict[str, str]
) -> None:
    """Write the index of a large set; where that cannot be done, the next start is slower."""
    if len(seen) < LARGE:
        return
    files = [[kind, str(file), *entry] for (kind, file), entry in seen.items()]
    text = json.dumps({"terms": [FORMAT, *terms], "hashes": hashes, "files": files})
    with suppress(UserError):
        replace_file(path, text, durable=False)
