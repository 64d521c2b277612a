"""Read images and masks before they are a set: values as they are stored, colours of palettes."""

from __future__ import annotations

import difflib
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from imaging.imagefile import Array, decode
from imaging.listing import Listing, is_drawn, unread
from imaging.pages import count_pages, page_names
from utils.files import IMAGE_SUFFIXES, DataError, name_key, special_kind

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


def check_palettes(folders: Sequence[Path]) -> None:
    """DataError if palette files of different folders give one index several colours."""
    check = PaletteCheck()
    for folder in folders:
        for path in Listing(folder, []).images():
            if colours := palette_of(path):
                check.add(path, colours, np.unique(read_pixels(path)).tolist())
    if check.differing and len(folders) > 1:
        cure = "save them with one palette, or put them into one folder"
        raise DataError(f"--masks: palettes differ: {check.differing}; {cure}")


def as_folder(masks: Path, images: Path, out: Path, place: Path) -> Path:
    """A folder of masks itself; of a single file one that holds a copy by the name of its image.

    ``images`` is the folder of images, ``out`` one within it that is not read, ``place`` a folder
    for the copies. DataError if no image has the mask's name, or several have it.
    """
    if masks.is_dir():
        return masks
    listing = Listing(images, [out])
    below = listing.images()
    if not below:
        empty = f"{images}: no image in it ({' '.join(IMAGE_SUFFIXES)})"
        there = [*listing.lines(), *unread(listing.files)[0]]
        raise DataError("; ".join([empty, *there, "give another --images"]))
    stems = defaultdict[str, list[tuple[str, Path]]](list)
    for path in (p for p in below if p.resolve() != masks.resolve()):
        for stem in dict.fromkeys((*page_names(path), path.stem)):
            stems[name_key(stem)].append((stem, path))
    own = name_key(masks.stem)
    found = [s for s in stems if own == s or is_drawn(own, {s})]
    found = found or [s for s in stems if own.casefold() == s.casefold()]
    if not found:
        like = difflib.get_close_matches(own, stems, 1, cutoff=0)
        wanted = stems[like[0]][0][0] if like else "image"
        if masks.resolve() in (path.resolve() for path in below):
            itself = f"{masks}: this is an image of {images} itself, not a mask of one"
            cure = f"give the mask that was drawn on it, such as {masks.stem}_mask.png"
            raise DataError(f"{itself}; {cure}")
        raise DataError(
            f"{masks}: no image of {images} has its name; name the mask as its image, such "
            f"as {wanted}.png or {wanted}_mask.png"
        )
    named, at = stems[max(found, key=len)], masks.parent.resolve()
    named = [(s, p) for s, p in named if p.parent.resolve() == at] or named
    (stem, image), *others = named
    if others:
        several = ", ".join(path.relative_to(images).as_posix() for _, path in named)
        such = image.relative_to(images).with_name(masks.name).as_posix()
        cure = f"give a folder in which it lies as its image does, such as {such}"
        cure = "rename one" if all(path.parent == image.parent for _, path in others) else cure
        raise DataError(f"{masks}: {len(named)} images have its name ({several}); {cure}")
    folder = place / f"{len(list(place.iterdir()))}"
    copied = folder / image.relative_to(images).with_name(stem + masks.suffix.lower())
    copied.parent.mkdir(parents=True)
    shutil.copyfile(masks, copied)
    return folder
