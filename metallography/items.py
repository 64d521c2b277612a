"""What is to be predicted: images, their true masks, fields; the record of what is done."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import parse_name
from imaging.drawing import is_intact
from imaging.field import NO_RULE, SMALLEST_SIDE, Crop, FieldRule, read_crop, read_visible
from imaging.gray_range import Conversion
from imaging.imagefile import has_more_bits, read_header, read_image, read_mask, reading_of
from imaging.listing import (
    BESIDE,
    DRAWN,
    LABELS,
    Listing,
    Lookup,
    by_drawn_names,
    in_mask_folders,
    labels_of_twins,
    natural_order,
    some_names,
    unread,
)
from imaging.pages import Page, by_page, count_pages
from metallography.particles import Array, Row
from utils.commandline import UserError
from utils.files import (
    IMAGE_SUFFIXES,
    MOST_BYTES,
    DataError,
    cut_name,
    name_key,
    open_to_append,
    replace_file,
    special_kind,
    writing,
)
from utils.log import progress, read_metrics, to_terminal
from utils.metrics import IGNORED
from utils.ranks import group

Truth = tuple[Path, int]
"""The file of a true mask, and which page of it."""
RECORD, SUMMARY, MEASUREMENTS = "predicted.jsonl", "summary.json", "measurements.csv"
SET_ASIDE = "set_aside"  # folder of class maps that --overwrite found not to be as predicted
TABLES = (SUMMARY, MEASUREMENTS, "batches.csv", "particles.csv", "comparison.csv",
          "sizes.csv")  # fmt: skip
KNOWN_SCALE = "known_um"  # in ``RECORD``, of an image without a scale: the last one that a run knew
# In ``RECORD``, beside what decides a prediction: digests of the class map as predicted, of one
# that is being written, as last drawn, of a corrected one older than its image; of outlines, and
# of what they outline.
WRITTEN = ("map", "writing", "drawn", "outdated", "outlines", "outlined")
BARS, BOOK = "bars", "workbook"  # in ``RECORD``: data bars of an image; the workbook's digest
TRUTHS = (".png", ".tif", ".tiff")  # suffixes that a true mask may have; of several the first


class Item(NamedTuple):
    """An image to predict."""

    path: Path
    name: str  # what its results are called below each output folder
    truth: Path | None = None  # where its true mask would lie; None without --masks
    page: int = 1  # of the file
    truth_page: int = 1  # of the true mask's file
    stem: str = ""  # of the user's own file, where ``path`` is a copy
    told_batch: str | None = None  # its production batch; None: as its name says

    @property
    def batch(self) -> str:
        """The production batch, '' where none is known."""
        named = parse_name(self.stem or self.path.stem)[0]
        return named if self.told_batch is None else self.told_batch

    @property
    def own_path(self) -> Path:
        """The path of its file, with the page if that has several."""
        own, suffix = Path(self.name).name, self.path.suffix
        return self.path.with_name(own if own.endswith(suffix) else own + suffix)

    def read(self, gray: Conversion) -> Array:
        """Its pixels, as ``imaging.imagefile.read_image``."""
        if has_more_bits(self.path):  # what is hidden must not decide the range of the others
            return read_visible(self.path, gray, self.page)[0]
        return read_image(self.path, gray, self.page)


class Items(list[Item]):
    """Images to predict, and what was found beside them."""

    def __init__(
        self, items: Iterable[Item] = (), left_out: Sequence[str] = (), bad: Sequence[str] = ()
    ) -> None:
        super().__init__(items)
        self.left_out = list(left_out)  # a line for each reason for which files are left out
        self.bad = list(bad)  # a line for each picture, or sub-folder, that cannot be read


def list_images(folder: Path, out: Path, masks: Path | None = None) -> Items:
    """Images of a folder and its sub-folders (or one file), in the order of their paths.

    A name is the path without its suffix, or with it where two would be alike; each page of a file
    is an image. A true mask is a .png or TIFF with the image's name, below ``masks``, found as
    ``imaging.listing.Lookup`` does. Files in ``out`` and ``masks`` are not images, nor are those
    that ``imaging.listing`` leaves out. Raises DataError if there is no such folder, or no image in
    it.
    """
    cure = f"give a folder with images ({' '.join(IMAGE_SUFFIXES)})"
    if kind := special_kind(folder):
        raise DataError(f"{folder}: {kind}, no folder; {cure}")
    if folder.is_file():
        pages, lines = by_page([folder], folder.parent)
        return Items(_items(pages, _find_truths(pages, masks)), lines)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {cure}")
    listing = Listing(folder, [path for path in (out, masks) if path])
    pages, page_lines = by_page(listing.images(), folder)
    own = masks is not None and masks.resolve() == folder.resolve()
    truths = _find_truths(pages, folder if own else masks, own)
    if own:
        masked = {path for path, _ in truths.values()}
        listing.say("masks of --masks", sorted(masked & {*listing.images()}))
    listing.say(BESIDE, in_mask_folders(listing.images(), folder))
    listing.say(LABELS, labels_of_twins(listing.images()))
    listing.say(DRAWN, by_drawn_names(listing.images()))
    bad, others = unread(listing.files)
    listing.say("no images by their suffix", others)
    paths = listing.images()
    if not paths:
        reasons = [*bad, *listing.unlisted, *listing.lines()]
        raise DataError("; ".join([f"{folder}: no image in it", *reasons, cure]))
    if {page.path for page in pages} != {*paths}:
        pages, page_lines = by_page(paths, folder)
    below = [path.relative_to(folder) for path in paths]
    lines = [*listing.lines(), *_twin_lines(folder, below), *page_lines]
    return Items(_items(pages, truths), lines, [*listing.unlisted, *bad])


def in_order(items: Sequence[Item]) -> list[Item]:
    """Images as people count them, s_2 before s_10: so results are listed."""
    return sorted(items, key=lambda item: natural_order(item.name))


def _items(pages: Sequence[Page], truths: Mapping[Page, Truth]) -> Iterator[Item]:
    """The images to predict, with their names."""
    names = result_names([page.below for page in pages])
    for page, name in zip(pages, names, strict=True):
        truth, own = truths.get(page, (None, 1))
        yield Item(page.path, name, truth, page.number, own)


def _find_truths(pages: Sequence[Page], masks: Path | None, own: bool = False) -> dict[Page, Truth]:
    """Where the true mask of each image would lie: by its page's name, or by the file's.

    A mask of one page with the file's name is the first page's, one of several has a page for each.
    Masks in the folder of the images (``own``) are PNGs, and have none themselves.
    """
    truths: dict[Page, Truth] = {}
    if masks is None:
        return truths
    first = {page.path: page for page in reversed(pages)}
    suffixes = TRUTHS[:1] if own else TRUTHS
    by_page = {page: page.below.with_suffix("") for page in pages}
    by_file = {page: page.below.with_name(page.path.stem) for page in pages}
    lookup = Lookup(masks, () if own else {*by_page.values(), *by_file.values()})
    for page in pages:
        found = lookup.find(by_page[page], suffixes)
        whole = lookup.find(by_file[page], suffixes)
        if found is None and whole and count_pages(whole) > 1:
            truths[page] = whole, page.number
            continue
        if found is None and first[page.path] == page:
            found = whole or masks / f"{by_file[page]}{suffixes[0]}"
        elif found is None:
            found = masks / f"{by_page[page]}{suffixes[0]}"
        if found != page.path:
            truths[page] = found, 1
    return truths


def _twin_lines(folder: Path, below: Sequence[Path]) -> list[str]:
    """A line if images differ from one another in their suffix alone."""
    same = Counter(name_key(path.with_suffix("").as_posix()).casefold() for path in below)
    twins = [p for p in below if same[name_key(p.with_suffix("").as_posix()).casefold()] > 1]
    names = some_names(path.as_posix() for path in twins)
    what = f"{folder}: {len(twins)} files differ from another in their suffix alone ({names})"
    return [f"{what}; each is measured: remove copies"] if twins else []


def result_names(below: Sequence[Path]) -> list[str]:
    """Names for the results of images, given their paths below the folder; no two are alike.

    A name is the path without its suffix; with it where two would be alike, or one a folder of
    another's; numbered where they differ in the case of letters alone. Too long ones are cut.
    """

    def key(path: Path) -> str:
        return name_key(path.as_posix()).casefold()

    bare = [path.with_suffix("") for path in below]
    shared = Counter(map(key, bare))
    folders = {key(parent) for path in below for parent in path.parents}
    whole = {
        path
        for path, short in zip(below, bare, strict=True)
        if shared[key(short)] > 1 or {f"{key(short)}.png", f"{key(short)}.npy"} & folders
    }
    taken = {key(path) for path in whole}
    names, used = [], set[str]()
    for path, short in zip(below, bare, strict=True):
        name = path if path in whole or key(short) in taken else short
        name = name.with_name(cut_name(name.name, MOST_BYTES - len(".png")))
        number = 1
        while key(name) in used:
            number += 1
            name = name.with_name(f"{name.name.removesuffix(f'~{number - 1}')}~{number}")
        used.add(key(name))
        names.append(name.as_posix())
    return names


def field_rule(
    items: Sequence[Item],
    given: str | None,
    roi: Path | None,
    own: Crop,
    own_sizes: Iterable[tuple[int, int]],
    prepared: bool,
) -> tuple[FieldRule, list[str]]:
    """Which part of each image counts, and lines on it.

    ``given`` is the text of ``--crop``, None without, ``roi`` the folder of ``--roi``. ``own`` was
    cut off the model's training images, which had ``own_sizes`` then; ``prepared`` images are those
    of a set, from which everything is cut already. Images smaller than the network can use are
    refused, cut or not. UserError if the flags are wrong.
    """
    if roi and not roi.is_dir():
        raise UserError(f"--roi: {roi} is no folder; give the folder of the masks")
    regions = FieldRule(roi=roi)
    if roi and items and all(regions.lacks_region(item.name) for item in items):
        raise UserError(
            f"--roi: {roi}: no image has a mask in it (such as {items[0].name}.png); name the "
            "masks as their images, PNGs in the same sub-folders"
        )
    if given is not None:
        crop, lines = read_crop(given), []
        if any(own) and crop != own and not prepared:
            lines = [f"Warning: --crop {crop} where the training images were cut by {own}; "
                     f"{crop} is used"]  # fmt: skip
        lines += _cut_lines(FieldRule(crop), items)
        return FieldRule(crop, roi=roi, least_side=SMALLEST_SIDE), lines
    if prepared or not any(own):
        return FieldRule(roi=roi, least_side=SMALLEST_SIDE), []
    said = "as the training images were; --crop 0,0,0,0 cuts nothing"
    rule = FieldRule(own, frozenset(own_sizes), roi, SMALLEST_SIDE)
    return rule, [f"{line}, {said}" for line in _cut_lines(rule, items)]


def _cut_lines(rule: FieldRule, items: Sequence[Item]) -> list[str]:
    """What is cut off which of the images: some may have been cut before."""
    if not any(rule.crop):
        return []
    sizes = [_size_of(item) for item in items] if rule.cropped_sizes else []
    known = [size for size in sizes if size is not None]
    cut = sum(any(rule.crop_of(size)) for size in known)
    which = "each image" if cut == len(known) else f"{cut} of {len(known)} images"
    before = "" if cut == len(known) else " (the others have the size of images that were cut)"
    return [f"Cut off {which}{before}: {rule.crop.words()}"]


def _size_of(item: Item) -> tuple[int, int] | None:
    """Height and width of an image, by its header where that tells them; None: it is unusable."""
    with suppress(DataError):
        header = None if reading_of(item.path, item.page) else read_header(item.path)
        height, width = (header or read_image(item.path, page=item.page).shape)[:2]
        return height, width
    return None


def unusable(items: Sequence[Item], gray: Conversion, field: FieldRule) -> set[str]:
    """Names of the images that cannot be read, or of which nothing can be used.

    Each rank reads its share, and all get the names.
    """
    names = []
    with progress(len(items), "images looked at") as bar:
        for item in group.share(items):
            try:
                field.outside(item.path, item.name, item.read(gray).shape, item.page)
            except DataError:  # whoever uses the image reports it
                names.append(item.name)
            bar.update(1)
    return {name for own in group.gather_objects(names) for name in own}


def read_truth(
    item: Item,
    shape: tuple[int, ...],
    num_classes: int,
    crop: Crop = NO_RULE.crop,
    ignore_label: int = IGNORED,
) -> Array | None:
    """Read an image's true mask (H, W), None where there is none; DataError if it does not fit.

    It has the image's shape, before or after ``crop``; what is cut off is ``IGNORED``, and so are
    pixels of ``ignore_label``.
    """
    if item.truth is None or not item.truth.exists():
        return None
    pages, own = count_pages(item.truth), count_pages(item.path)
    if pages > 1 and (pages != own or item.truth_page != item.page):
        found = f"{item.truth}: {pages} pages, its image has {own}"
        raise DataError(f"{found}; save as many pages in both")
    truth = read_mask(item.truth, item.truth_page)
    cut = truth.shape != shape and truth.shape == crop.size(shape)
    if truth.shape != shape and not cut:
        raise DataError(
            f"{item.truth}: {truth.shape[1]}x{truth.shape[0]}, its image is "
            f"{shape[1]}x{shape[0]}; a mask has the size of its image: export it so"
        )
    truth = crop.back(truth if cut else crop.of(truth), shape, IGNORED)
    if num_classes <= ignore_label != IGNORED:
        truth = np.where(truth == ignore_label, np.uint8(IGNORED), truth)
    wrong = truth[(truth >= num_classes) & (truth != IGNORED)]
    if wrong.size:
        raise DataError(
            f"{item.truth}: value {wrong.max()} where the model has {num_classes} classes; class "
            f"ids are 0..{num_classes - 1}, and {IGNORED} where nobody labelled: correct the mask"
        )
    return truth


def digest_of(ids: Array) -> str:
    """A short hash of a class map, however its file is packed."""
    return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()[:16]


def equal_lines(groups: Iterable[Sequence[str]], keep: Collection[str] = ()) -> list[str]:
    """A line on images that are equal, and which to take away: of each group all but one.

    That is one of ``keep`` (the annotated ones), else the one of the shortest name.
    """
    pairs: dict[str, str] = {}
    for names in groups:
        kept = min(names, key=lambda name: (name not in keep, len(name), name))
        pairs |= {name: kept for name in names if name != kept}
    if not pairs:
        return []
    shown = some_names(f"{name} (as {kept})" for name, kept in pairs.items())
    what = f"{len(pairs)} image(s) equal to another one, pixel by pixel: {shown}"
    return [f"{what}; each counts as a field, so intervals are too narrow: take these away"]


def strange_ids(ids: Array, num_classes: int) -> Array:
    """The ids in a class map that are no class of the model."""
    return np.asarray(ids[(ids >= num_classes) & (ids != IGNORED)])


def is_readable(path: Path, num_classes: int) -> bool:
    """Whether a result can be read: a PNG, or class probabilities (H, W, C)."""
    if path.suffix != ".npy":
        return is_intact(path)
    if path.is_file():
        with suppress(OSError, ValueError):
            values: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            return values.ndim == 3 and values.shape[2] == num_classes
    return False


class ClassMap(Enum):
    """Whose the class map is that lies where that of an image belongs."""

    MISSING = "there is none that can be read"
    PREDICTED = "as this program wrote it, by its digest"
    UNKNOWN = "the record has no digest of what this program wrote"
    CORRECTED = "another one than this program wrote: somebody's work"


class Results(NamedTuple):
    """What an earlier run left of an image, in as much as it decides what this run does."""

    noted: bool  # the record has them as done, and --overwrite has not begun to make them anew
    same: bool  # of the image and the settings of now
    map: ClassMap
    classes_fit: bool = True  # all classes of the map are the model's
    size_fits: bool = True  # the map has the size of its image; until that is read nobody knows
    complete: bool = True  # all files are there
    damaged: bool = False  # one cannot be read; looked at only where all else would serve
    drawn: bool = True  # the pictures show this map, at the scale of now


class Decision(Enum):
    """What a run does with an image."""

    SKIP = "nothing is left to do"
    REDRAW = "its class map stays, its pictures are drawn again"
    KEEP_CORRECTED = "its class map is somebody's and stays, its pictures are drawn again"
    PREDICT = "all is made, or made anew"
    REFUSE = "its class map is somebody's, and cannot be measured as it is"


def decide(left: Results) -> Decision:
    """What to do with an image of which an earlier run left these results, or none.

    A correction outlives whatever becomes of its image. What this program made serves only while it
    is of the same image and settings.
    """
    if not left.noted:
        return Decision.PREDICT
    if left.map is ClassMap.CORRECTED:
        if not (left.classes_fit and left.size_fits):
            return Decision.REFUSE
        return Decision.SKIP if left.drawn and left.complete else Decision.KEEP_CORRECTED
    readable = left.map is not ClassMap.MISSING and left.classes_fit and not left.damaged
    if not (left.same and left.complete and readable and left.size_fits):
        return Decision.PREDICT
    return Decision.SKIP if left.drawn else Decision.REDRAW


def looks_of(class_names: Sequence[str], colours: Array, um_per_px: float | None) -> Row:
    """What an image's pictures show beside its class map, as ``Noted.decides`` has it."""
    classes = json.dumps([list(class_names), colours.tolist()])
    digest = hashlib.sha256(classes.encode()).hexdigest()
    return {"um_per_px": um_per_px, "classes": digest[:16]}


class Noted(NamedTuple):
    """What the record has of an image, by what it is good for."""

    decides: Row  # of what the prediction was made, and what its pictures show: ``looks_of``
    written: Row  # digests of what was written: ``WRITTEN``
    bars: list[Any]  # data bars that nobody cut
    known_scale: float | None  # the last one that a run knew

    @property
    def own(self) -> set[str]:
        """Digests of class maps that this program wrote, or was about to write."""
        return {self.written[name] for name in ("map", "writing") if name in self.written}


def noted_of(entry: Mapping[str, Any]) -> Noted:
    """An entry of the record by its parts; of an image that it does not know all are empty."""
    apart = (BARS, KNOWN_SCALE, *WRITTEN)
    decides = {name: value for name, value in entry.items() if name not in apart}
    written = {name: entry[name] for name in WRITTEN if name in entry}
    scale = entry.get(KNOWN_SCALE) or entry.get("um_per_px")
    return Noted(decides, written, entry.get(BARS, []), scale)


class Record:
    """Which images are done, and with which settings: a line of JSON each; one on the workbook.

    A damaged one is made anew, line by line. Without a ``readable`` one nobody knows whose the
    ``others`` are, the files that a run replaces. UserError if there are any, if the folder holds
    predictions made with other settings or of another folder of images (``images`` among the
    settings), or cannot be written to. Files that are
    ``replaceable`` are the program's own. With ``overwrite`` nothing is done, and of what was
    ``WRITTEN`` before the digests stay known. Until it has come to its ``finish`` the first line
    says ``overwrite``, and a run goes on with it, whether it is told to overwrite or not: entries
    without ``bytes`` are of before.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, object],
        overwrite: bool,
        replaceable: bool = False,
        others: Iterable[Path] = (),
    ) -> None:
        self.path = path
        self.done: dict[str, Row] = {}
        self.workbook = ""  # digest of the one that this program wrote last; '': none is known
        self.settings = settings
        self.held: list[Row] | None = None  # entries that are written later; None: at once
        lines = self._lines(overwrite)
        head = (lines or [{}])[0]
        self.readable = "weights" in head
        begun = self.readable and head.get("overwrite") is True and settings.items() <= head.items()
        self.unfinished = overwrite or begun
        # A name is never empty: earlier versions noted the workbook so, which is then not known.
        entries = [line for line in lines if isinstance(line.get("name"), str) and line["name"]]
        books = [line[BOOK] for line in lines if isinstance(line.get(BOOK), str) and len(line) == 1]
        if overwrite and begun:
            to_terminal(f"{path.parent}: goes on with what --overwrite began")
        elif overwrite:
            known = ("name", *WRITTEN)
            entries = [{n: line[n] for n in known if n in line} for line in entries]
        elif not self.readable:
            entries = books = []
            if not replaceable:
                self._refuse(others)
            if path.exists() and path.stat().st_size > 0:
                to_terminal(f"{path}: damaged; made anew, with all predictions")
        elif changed := self._changed(head, settings, replaceable):
            if not replaceable:
                raise UserError(
                    f"{path.parent}: holds predictions made with other settings "
                    f"({'; '.join(changed)}); give --overwrite or another --out"
                )
            entries = books = []
        self.workbook = books[-1] if books else ""
        self.done = {line["name"]: line for line in entries}
        # Rewritten, because the next line would be appended to one that a kill cut off.
        self._write()

    def _write(self) -> None:
        """Write all lines anew."""
        head = {**self.settings, **({"overwrite": True} if self.unfinished else {})}
        book = [{BOOK: self.workbook}] if self.workbook else []
        text = "".join(json.dumps(line) + "\n" for line in [head, *self.done.values(), *book])
        replace_file(self.path, text, "--out")

    def finish(self) -> None:
        """Note that what ``overwrite`` began is complete: the next one begins anew."""
        if self.unfinished:
            self.unfinished = False
            self._write()

    def _lines(self, overwrite: bool) -> list[Row]:
        """The lines of an earlier run, none where there are none; UserError."""
        if kind := special_kind(self.path):
            raise UserError(f"{self.path}: {kind}, not a file; remove it, or give another --out")
        with writing(self.path, "--out"):
            try:
                return read_metrics(self.path) if self.path.exists() else []
            except OSError:
                if overwrite:
                    return []
                raise

    def _changed(self, old: Row, settings: Mapping[str, object], replaceable: bool) -> list[str]:
        """In words, in which settings the predictions that are there were made otherwise.

        UserError if they are of another folder of images.
        """
        images = settings.get("images")
        others = images is not None and old.get("images") != images
        if others and not replaceable:
            raise UserError(
                f"{self.path.parent}: holds predictions of the images in {old.get('images')}, not "
                f"of those in {images}; give another --out, or --overwrite"
            )
        pairs = ((key, old.get(key), settings[key]) for key in settings if key != "images")
        return [f"{key} was {was}, is {now}" for key, was, now in pairs if was != now]

    def _refuse(self, others: Iterable[Path]) -> None:
        """UserError if one of the files that a run replaces is there; of a link nothing is lost."""
        first = next((p for p in others if p.is_file() and not p.is_symlink()), None)
        if first is not None:
            raise UserError(
                f"{first}: would be replaced, and without a readable {RECORD} it may be yours; "
                f"give another --out, or --overwrite, which moves class maps to {SET_ASIDE}/"
            )

    def add(self, entry: Row) -> None:
        """Note that an image is done; see ``held``."""
        self.done[entry["name"]] = entry
        if self.held is not None:
            self.held.append(entry)
            return
        self._append(entry)

    def add_workbook(self, digest: str) -> None:
        """Note the digest of the workbook that was written."""
        self.workbook = digest
        self._append({BOOK: digest})

    def _append(self, line: Row) -> None:
        with open_to_append(self.path) as file:
            file.write(f"{json.dumps(line)}\n".encode())
