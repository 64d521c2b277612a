"""How many pages a file has: TIFF stacks, animated PNG and WebP; read from the headers alone."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from imaging.listing import some_names
from utils.files import special_kind

SUBFILE = 254  # the TIFF tag that tells a preview or a page of transparency from a page
PREVIEW, TRANSPARENCY = 1, 4
WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 256, 257, 258, 262, 277, 339
KIND = (WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT)  # alike in pages of one kind
DEFAULTS = {BITS: (1,), SAMPLES: (1,), SAMPLE_FORMAT: (1,)}
NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of TIFF that are whole numbers
MOST = 100_000
MOST_VALUES = 8  # of a tag: a number for each sample of a pixel

Directory = dict[int, tuple[int, ...]]  # tags of a page


class Page(NamedTuple):
    """An image of a file."""

    path: Path
    number: int  # counted from 1, previews not counted
    below: Path  # path below a folder, with the page where the file has several


def count_pages(path: str | Path) -> int:
    """Number of pages of an image file, previews not counted; 1 for a file that cannot be read."""
    return max(1, sum(not _is_preview(tags) for tags in _directories(path)))


def page_name(stem: str, number: int) -> str:
    """What a page of a file of several pages is called."""
    return f"{stem}-p{number}"


def page_names(path: str | Path) -> list[str]:
    """What the images of a file of several are called, in order; none of a file of one image."""
    numbers = images_of(path)[0]
    return [page_name(Path(path).stem, n) for n in numbers] if len(numbers) > 1 else []


def place_of(path: str | Path, number: int) -> int:
    """Where a page lies among all of a file, previews counted, from 0."""
    places = [place for place, tags in enumerate(_directories(path)) if not _is_preview(tags)]
    return places[number - 1] if number <= len(places) else number - 1


def images_of(path: str | Path) -> tuple[list[int], list[str]]:
    """Numbers of the pages that are images, and words on each other page.

    These are previews, and pages of another size or kind (bits, channels, colours) than most; of
    kinds that are equally frequent the larger one counts.
    """
    directories = list(_directories(path))
    pages = [tags for tags in directories if not _is_preview(tags)]
    kinds = [tuple(tags.get(tag, DEFAULTS.get(tag, ())) for tag in KIND) for tags in pages]
    count = Counter(kinds)
    most = max(count, key=lambda kind: (count[kind], _area(kind)), default=None)
    numbers = [number for number, kind in enumerate(kinds, start=1) if kind == most]
    others = [f"preview {_size(tags)}" for tags in directories if _is_preview(tags)]
    others += [
        f"page {number} {_size(pages[number - 1])}"
        for number, kind in enumerate(kinds, start=1)
        if kind != most
    ]
    return numbers or [1], others


def by_page(paths: Iterable[Path], top: Path) -> tuple[list[Page], list[str]]:
    """The pages of image files below a folder, and lines on files of several pages."""
    found: list[Page] = []
    several: list[str] = []
    left_out: list[str] = []
    for path in paths:
        below = path.relative_to(top)
        numbers, others = images_of(path)
        for number in numbers:
            name = f"{page_name(below.stem, number)}{below.suffix}"
            own = below.with_name(name) if len(numbers) > 1 else below
            found.append(Page(path, number, own))
        several += [f"{below.as_posix()} ({len(numbers)} pages)"] if len(numbers) > 1 else []
        left_out += [f"{below.as_posix()} ({', '.join(others)})"] if others else []
    lines = []
    if several:
        lines.append(f"{top}: every page is an image of its own: {some_names(several)}")
    if left_out:
        what = "previews, and pages of another size or kind than the others of their file"
        lines.append(f"{top}: left out, {what}: {some_names(left_out)}")
    return found, lines


def _is_preview(tags: Directory) -> bool:
    return bool(tags.get(SUBFILE, (0,))[0] & (PREVIEW | TRANSPARENCY))


def _area(kind: tuple[tuple[int, ...], ...]) -> int:
    (width,), (height,) = (side or (0,) for side in kind[:2])
    return width * height


def _size(tags: Directory) -> str:
    return "x".join(str(tags.get(tag, ("?",))[0]) for tag in (WIDTH, HEIGHT))


def _directories(path: str | Path) -> Iterator[Directory]:
    """The tags of each page, as far as they can be read; of what is no TIFF none."""
    with suppress(OSError, struct.error, OverflowError, ValueError):
        if not special_kind(path):
            with open(path, "rb") as file:
                start = file.read(16)
                if start[:2] in (b"II", b"MM"):
                    yield from _of_tiff(file, start)
                elif start.startswith(b"\x89PNG") or start[8:12] == b"WEBP":
                    yield from ({} for _ in range(min(_of_animation(file, start), MOST)))


def _of_tiff(file: BinaryIO, start: bytes) -> Iterator[Directory]:
    """Follow the chain of directories; stops where it turns in a circle or leaves the file."""
    order = "<" if start.startswith(b"II") else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    # Format of an offset and of the count of entries, length of an entry.
    offset, count, step = ("Q", "Q", 20) if big else ("I", "H", 12)
    (place,) = struct.unpack_from(order + offset, start, 8 if big else 4)
    seen: set[int] = set()
    while place and place not in seen and len(seen) < MOST:
        seen.add(place)
        file.seek(place)
        (entries,) = struct.unpack(order + count, file.read(struct.calcsize(count)))
        if entries > 65_535:
            break
        table = file.read(entries * step)
        (place,) = struct.unpack(order + offset, file.read(struct.calcsize(offset)))
        yield dict(_tags(file, table, order, offset, step))


def _tags(
    file: BinaryIO, table: bytes, order: str, offset: str, step: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The numbers of the tags that tell kinds of pages apart."""
    head = step - struct.calcsize(offset)  # bytes of an entry before its value
    for first in range(0, len(table) - step + 1, step):
        tag, kind = struct.unpack_from(f"{order}HH", table, first)
        if tag not in (SUBFILE, *KIND) or kind not in NUMBERS:
            continue
        (number,) = struct.unpack_from(order + offset, table, first + 4)
        number = min(number, MOST_VALUES)
        form = f"{order}{number}{NUMBERS[kind]}"
        value = table[first + head : first + step]
        if struct.calcsize(form) > len(value):  # it stands elsewhere
            file.seek(*struct.unpack(order + offset, value))
            value = file.read(struct.calcsize(form))
        if number:
            yield tag, struct.unpack_from(form, value)


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
