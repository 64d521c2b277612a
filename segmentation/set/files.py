"""The user's files, listed once, as they were before any of them was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.set_plan import Source
from imaging.imagefile import read_bytes, read_image
from imaging.index import stamp_of
from imaging.listing import Listing
from imaging.pages import images_of, page_name
from metallography.items import digest_of

# Hashes of a picture: of its pixels, and of its file if it has one page.
Fingerprint = Sequence[str]
Entry = list[Any]  # a file's path, bytes, and time of change in ns, as JSON gives them back


class UserFiles:
    """The files that a set is made of: ``images``, ``masks`` and ``corrected`` class maps.

    The images are listed at once; ``note`` lists the others, and notes sizes and times of all.
    DataError for a folder that may not be listed.
    """

    def __init__(self, images: Path, out: Path) -> None:
        self.out, self.images = out, Listing(images, [out]).images()
        self.masks: list[Path] = []
        self.corrected: Mapping[str, Path] = {}  # by the name of their image
        self._read: list[Entry] = []
        self._of_corrected: dict[str, Entry] = {}
        self._has_pages: dict[Path, bool] = {}

    def note(self, masks: Iterable[Path], corrected: Mapping[str, Path]) -> None:
        """Note sizes and times, before anything is read: what changes meanwhile has others then.

        ``masks`` are files and folders.
        """
        self.masks, self.corrected = [], corrected
        for path in masks:
            self.masks += Listing(path, [self.out]).files if path.is_dir() else [path]
        self._read = [_entry(path) for path in (*self.images, *self.masks)]
        self._of_corrected = {name: _entry(path) for name, path in corrected.items()}

    def entries(self) -> list[Entry]:
        """All files, as they were when they were noted."""
        return [*self._read, *self._of_corrected.values()]

    def entries_with(self, kept: Mapping[str, Path]) -> list[Entry]:
        """The same, with the corrected class maps where they are ``kept`` since they were read.

        One that changed in between, or came or went, has no size and time: the next run reads it.
        """
        found: list[Entry] = []
        for name, path in {**kept, **self.corrected, **kept}.items():  # the kept ones first
            read = self.corrected.get(name)
            same = read is not None and _entry(read) == self._of_corrected[name]
            found.append(_entry(path) if same and name in kept else [str(path.resolve()), 0, 0])
        return [*self._read, *found]

    @property
    def have_pages(self) -> bool:
        """Whether some image file has several pages, each of which is an image then."""
        return any(map(self.has_pages, self.images))

    def has_pages(self, path: Path) -> bool:
        """Whether an image file has several pages that are images; it is opened once for this."""
        if path not in self._has_pages:
            self._has_pages[path] = len(images_of(path)[0]) > 1
        return self._has_pages[path]

    def below(self, source: Source) -> str:
        """The path of an image below --images, with its page if its file has several."""
        path = Path(source.below)
        if not self.has_pages(source.image):
            return source.below
        return path.with_name(f"{page_name(path.stem, source.page)}{path.suffix}").as_posix()


def fingerprint_of(source: Source) -> Fingerprint:
    """By what a picture is known again, before a crop: it is the same if one of its hashes is.

    Its pixels, in 8 bits, stay when it is saved anew. Its file stays when decoders, which round in
    their own ways, become others.
    """
    pixels = read_image(source.image, page=source.page)  # (H, W), or (H, W, 3)
    one = source.pages == 1
    whole = [hashlib.sha256(read_bytes(source.image)).hexdigest()[:16]] if one else []
    return digest_of(pixels), *whole


def _entry(path: Path) -> Entry:
    return [str(path.resolve()), *stamp_of(path)]
