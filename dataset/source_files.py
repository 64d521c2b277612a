"""Read images and masks before they are a set: values as they are stored, colours of palettes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from imaging.imagefile import Array, decode
from imaging.pages import count_pages
from utils.files import DataError, special_kind

Colour = tuple[int, int, int]
Colours = tuple[Colour, ...]


def read_pixels(path: Path, page: int = 1, colours: bool = False) -> Array:
    """Read the values as the file holds them: (H, W), or (H, W, 3) RGB; any dtype.

    Transparency and orientation are treated as in ``imaging.imagefile``. A palette file gives its
    indices, or its colours if ``colours``. Raises DataError.
    """
    picture = decode(path, page, seen=False)
    return (
        picture.palette[picture.values]
        if colours and picture.palette is not None
        else picture.values
    )


def palette_of(path: Path, page: int = 1) -> Colours:
    """The colours of a palette file by index; () for a file without a palette."""
    try:
        if not _may_have_palette(path):
            return ()
        own = page if count_pages(path) > 1 else 1  # one page is of any page
        palette = decode(path, own, seen=False).palette
    except DataError:
        return ()  # reading it says what is wrong with it
    return () if palette is None else tuple((r, g, b) for r, g, b in palette.tolist())


def _may_have_palette(path: Path) -> bool:
    """Whether the head of a file leaves a palette possible; no pixel is decoded."""
    if not special_kind(path):  # opening a pipe would wait
        with suppress(Exception), Image.open(path, formats=("PNG", "BMP", "JPEG")) as picture:
            return picture.mode in ("P", "PA")
    return True


class PaletteCheck:
    """Whether the palette indices of several masks mean the same: one index, one colour.

    Only indices that occur in a mask count, so that palettes may differ in what no pixel has.
    """

    def __init__(self) -> None:
        self.differing = ""  # the first two files that differ, and in what
        self.found = False  # there is a palette file
        self._colours: dict[int, tuple[Colour, Path]] = {}  # of each index
        self._indices: dict[Colour, tuple[set[int], Path, Colours]] = {}

    def add(self, path: Path, colours: Colours, used: Iterable[int]) -> None:
        """Compare a mask's palette, of which it uses some indices, with those before."""
        self.found = True
        own: defaultdict[Colour, set[int]] = defaultdict(set)
        for index in (index for index in used if index < len(colours)):
            colour = colours[index]
            own[colour].add(index)
            known, other = self._colours.setdefault(index, (colour, path))
            if known != colour:
                self._differ(f"index {index} is {known} in {other.name}, {colour} in {path.name}")
        for colour, indices in own.items():
            numbers, other, whole = self._indices.setdefault(colour, (set(), path, colours))
            if numbers and not numbers & indices and whole != colours:
                each = f"{min(numbers)} in {other.name}, {min(indices)} in {path.name}"
                self._differ(f"colour {colour} has index {each}")
            numbers |= indices

    def _differ(self, what: str) -> None:
        self.differing = self.differing or what

    @property
    def grays(self) -> set[int]:
        """Gray levels among the colours that occur."""
        return {colour[0] for colour in self._indices if len(set(colour)) == 1}

    @property
    def coloured(self) -> bool:
        """Whether a colour that occurs is no gray level."""
        return any(len(set(colour)) > 1 for colour in self._indices)
