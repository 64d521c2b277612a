"""How many pages a file has: TIFF stacks, animated PNG and WebP; read from the headers alone."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from utils.files import special_kind

SUBFILE = 254  # the TIFF tag that tells a preview or a page of transparency from a page
MOST = 100_000


def count_pages(path: str | Path) -> int:
    """Number of pages of an image file, previews not counted; 1 for a file that cannot be read."""
    pages = 0
    with suppress(OSError, struct.error, OverflowError, ValueError):
        if not special_kind(path):
            with open(path, "rb") as file:
                start = file.read(16)
                if start[:2] in (b"II", b"MM"):
                    pages = _of_tiff(file, start)
                elif start.startswith(b"\x89PNG") or start[8:12] == b"WEBP":
                    pages = _of_animation(file, start)
    return max(1, pages)


def _of_tiff(file: BinaryIO, start: bytes) -> int:
    """Follow the chain of directories; stops where it turns in a circle or leaves the file."""
    order = "<" if start.startswith(b"II") else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    # Format of an offset and of the count of entries; length of an entry, and where its value is.
    offset, count, step, value = ("Q", "Q", 20, 12) if big else ("I", "H", 12, 8)
    (place,) = struct.unpack_from(order + offset, start, 8 if big else 4)
    seen: set[int] = set()
    pages = 0
    while place and place not in seen and len(seen) < MOST:
        seen.add(place)
        file.seek(place)
        (entries,) = struct.unpack(order + count, file.read(struct.calcsize(count)))
        if entries > 65_535:
            break
        table = file.read(entries * step)
        kind = 0
        for first in range(0, len(table) - step + 1, step):
            if struct.unpack_from(f"{order}H", table, first)[0] == SUBFILE:
                kind = struct.unpack_from(f"{order}I", table, first + value)[0]
        pages += kind & 0b101 == 0  # neither a smaller version nor a mask of transparency
        (place,) = struct.unpack(order + offset, file.read(struct.calcsize(offset)))
    return pages


def _of_animation(file: BinaryIO, start: bytes) -> int:
    """Frames of an animated PNG (its acTL chunk) or WebP (its ANMF chunks)."""
    png, frames = start.startswith(b"\x89PNG"), 0
    file.seek(8 if png else 12)
    while len(head := file.read(8)) == 8:
        if png:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"acTL":
                return int(struct.unpack(">I", file.read(4))[0])
            if kind == b"IDAT":
                break
            file.seek(length + 4, 1)
        else:
            kind, length = struct.unpack("<4sI", head)
            frames += kind == b"ANMF"
            file.seek(length + length % 2, 1)
    return frames
