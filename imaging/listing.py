"""Which files of a folder are images, and which are left out, with the reason.

One set of rules for all commands. Sub-folders are walked, and links to files and folders followed,
each file once. Left out are: what systems put beside files; this program's own results; masks, and
pictures drawn from masks, by their names or their folders; what is no regular file; and files with
a suffix that is not read.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from imaging.imagefile import read_image
from utils.files import IMAGE_SUFFIXES, DataError, is_of_system, name_key, special_kind

SHOWN = 10  # names in a line
SPLIT = re.compile(r"(train|test|sup)_numf|train_unlabelled|sup_num\d+_\d+")  # folders of a set
# Pictures, by their suffixes, that nothing here can read.
_UNREAD = """.gif .heic .heif .avif .jp2 .j2k .jxl .psd .xcf .raw .cr2 .cr3 .nef .arw .dng .ppm .pgm
.pbm .pnm .tga .dcm .dicom .svg .emf .wmf .eps .czi .zvi .lif .lsm .nd2 .oir .oib .vsi .svs .ndpi
.scn .dm3 .dm4 .ser .emd .mrc .btf .tf2 .tf8 .dib .plux .al3d"""
UNREAD_PICTURES = frozenset(_UNREAD.split())
HIDDEN = "hidden or of the system"
RESULTS = "results of this program"
COPIES = "copies of training images"
TWICE = "read already, under another name"
UPWARDS = "links to a folder above"
NOWHERE = "links that lead nowhere"
DRAWN = "named as masks or overlays of images are"
BESIDE = "by their folder masks or overlays of images"
LABELS = "by their few values masks of images of the same name"

# Files by which a folder is known to hold results, and which of its contents are pictures of them.
_PREDICTED = re.compile(
    r"classes|gray|overlay|probabilities|measured|outlines|corrected|set_aside|sheet\.png"
)
_TRAINED = re.compile(r"epoch_\d+|(curves|probe_\d+|sheet_\w+)\.png|tensorboard")
_MARKS: tuple[tuple[set[str], re.Pattern[str]], ...] = (
    ({"predicted.jsonl"}, _PREDICTED),
    ({"classes", "gray", "overlay"}, _PREDICTED),
    ({"measurements.csv", "summary.json"}, _PREDICTED),
    *(({f"{kind}_{stage}"}, _TRAINED) for kind, stage in [
        ("state", "self.pt"), ("state", "fine.pt"), ("state", "sup.pt"), ("log", "self.txt"),
        ("log", "fine.txt"), ("log", "sup.txt"), ("log", "forest.txt")]),
    ({"metrics.jsonl"}, _TRAINED),
    ({"ranking.csv"}, re.compile(r"ranking\.png")),
    ({"values.csv"}, re.compile(r"values\.png")),
    ({"train_numf"}, re.compile(r"sup_num(f|\d+_\d+)")),
)  # fmt: skip
# Files by which a whole folder is known to be made by dataset/prepare.py, or by segment.py.
MADE = ({"prepare_report.txt"}, {"rounds.json", "set"}, {"record.json", "train_numf"})

_WORDS = (
    r"masks?|overlays?|labels?|gt|ground[ _-]?truths?|seg|segmentations?|segmented|annotated"
    r"|annotations?|predictions?|pred|previews?|thumbs?|thumbnails?"
    r"|masken?|masques?|m[aá]scaras?|maschere?|etiquetas?|étiquettes?"
)
_DRAWN_WORDS = rf"{_WORDS}|classes|colou?rs?|colou?red"
# What follows, or precedes, the image's name in the name of a picture made of its labels.
_AFTER = re.compile(rf"[\W_]+({_DRAWN_WORDS})[\W_\d]*", re.IGNORECASE)
_BEFORE = re.compile(rf"({_DRAWN_WORDS})[\W_]+", re.IGNORECASE)
_FOLDER = re.compile(rf"(^|[\W_\d])({_WORDS})($|[\W_\d])|segmentation(class|object)", re.IGNORECASE)
MOST_LABELS = 16  # different values of a mask; any micrograph has more


class Listing:
    """The files of a folder and its sub-folders, without those that are nothing of the user's.

    ``leave_out`` are folders that are read for another purpose: they are not named. ``files`` are
    all others, of any suffix, sorted by path; ``left_out`` has paths by reason; ``unlisted`` has a
    line for each sub-folder that may not be listed. DataError if ``folder`` itself may not.
    """

    def __init__(self, folder: Path, leave_out: Collection[Path] = ()) -> None:
        self.folder, self._real = folder, folder.resolve()
        self.files: list[Path] = []
        self.left_out: defaultdict[str, list[Path]] = defaultdict(list)
        self.unlisted: list[str] = []
        apart = (path.resolve() for path in leave_out)
        self._apart = [path for path in apart if not self._real.is_relative_to(path)]
        self._seen: set[object] = set()
        self._links: list[Path] = []
        with suppress(OSError):
            self._seen.add(_identity(folder, os.stat(folder)))
        self._walk(folder)
        while self._links:  # after what they may lead to
            self._follow(self._links.pop(0))
        self.files.sort()

    def images(self) -> list[Path]:
        """Those of ``files`` with the suffix of an image."""
        return [path for path in self.files if is_image(path)]

    def say(self, reason: str, paths: Iterable[Path]) -> None:
        """Note that files are left out; they are no longer among ``files``."""
        self.left_out[reason] += paths
        gone = set(self.left_out[reason])
        self.files = [path for path in self.files if path not in gone]

    def lines(self) -> list[str]:
        """What is left out, a line for each reason."""
        lines = []
        for reason, paths in self.left_out.items():
            folders = sum(map(os.path.isdir, paths))
            what = {0: "file(s)", len(paths): "folder(s)"}.get(folders, "file(s) and folder(s)")
            if paths:
                found = f"{len(paths)} {what} left out, {reason}"
                lines.append(f"{self.folder}: {found}: {self.names(paths)}")
        return lines

    def names(self, paths: Iterable[Path]) -> str:
        """Up to ``SHOWN`` names below the folder, and how many more there are."""
        return some_names(path.relative_to(self.folder).as_posix() for path in sorted(paths))

    def _walk(self, top: Path) -> None:
        """List a folder and its sub-folders; links are kept for later."""
        waiting = [top]
        while waiting:
            place = waiting.pop()
            try:
                names = sorted(path.name for path in place.iterdir())
            except OSError as error:
                line = f"{place}: cannot be listed ({error.strerror}); check its permissions"
                if place == self.folder:
                    raise DataError(line) from None
                self.unlisted.append(line)
                continue
            if place != self.folder and _is_result(place, names):
                self.left_out[RESULTS].append(place)
                continue
            own = own_pictures(names)
            for name in names:
                path = place / name
                if is_of_system(name):
                    if is_image(path) or os.path.isdir(path):
                        self.left_out[HIDDEN].append(path)
                elif any(pattern.fullmatch(name) for pattern in own):
                    copies = name.startswith("sup_num")
                    self.left_out[COPIES if copies else RESULTS].append(path)
                elif own and place != self.folder and not (is_image(path) or os.path.isdir(path)):
                    continue  # tables and logs beside the results
                elif os.path.islink(path):  # pathlib's raises where it may not look
                    self._links.append(path)
                elif self._take(path):
                    waiting.append(path)

    def _take(self, path: Path) -> bool:
        """Note what a name stands for; True for a folder that is to be listed."""
        try:
            status = os.stat(path)
        except OSError:
            self.left_out[NOWHERE].append(path)
            return False
        folder = stat.S_ISDIR(status.st_mode)
        if not folder and not stat.S_ISREG(status.st_mode):
            self.left_out[f"{special_kind(path)}, no file"].append(path)
            return False
        if folder and self._apart and path.resolve() in self._apart:
            return False
        identity = _identity(path, status)
        if identity in self._seen:
            if folder or is_image(path):
                self.left_out[TWICE].append(path)
            return False
        self._seen.add(identity)
        if not folder:
            self.files.append(path)
        return folder

    def _follow(self, link: Path) -> None:
        """Take what a link leads to, unless it belongs to another purpose or leads upwards."""
        try:
            real = Path(os.path.realpath(link))
        except OSError:  # Python 3.11 reads a link, gone since it was listed, without a guard
            self.left_out[NOWHERE].append(link)
            return
        if any(real.is_relative_to(apart) for apart in self._apart):
            return
        if os.path.isdir(real) and real != self._real and self._real.is_relative_to(real):
            self.left_out[UPWARDS].append(link)
        elif any(_is_own(path) for path in (real, *real.parents[:3])):
            self.left_out[RESULTS].append(link)
        elif self._take(link):
            self._walk(link)


class Lookup:
    """Files below a folder that are named as others, such as the masks of images.

    A name counts as it is; else in another Unicode form, or with its suffix in other letter case;
    else in any letter case, if that makes it the name of just one of ``asked``: all paths that are
    looked for, without suffixes. What several files could be is none of them. Each folder is listed
    once, when it is first looked into.
    """

    def __init__(self, folder: Path, asked: Collection[Path] = ()) -> None:
        self.folder = folder
        self._asked = Counter(_any_case(path.as_posix()) for path in {*asked})
        self._listed: dict[Path, tuple[defaultdict[str, list[str]], ...]] = {}

    def find(self, below: Path, suffixes: Sequence[str]) -> Path | None:
        """What has a path below the folder and one of the suffixes, the first that is there."""
        any_case = self._asked[_any_case(below.as_posix())] == 1
        place = self.folder
        for part in below.parent.parts:
            place /= self._name(place, [part], any_case) or part
        names = [f"{below.name}{suffix}" for suffix in suffixes]
        found = self._name(place, names, any_case)
        # What cannot be listed may yet be opened, and some systems tell no letter cases apart.
        paths = (place / name for name in ([found] if found else names))
        return next((path for path in paths if path.exists()), None)

    def _name(self, place: Path, names: Sequence[str], any_case: bool) -> str | None:
        """What the first of ``names`` is called in a folder; None if it is not there."""
        keys: tuple[Callable[[str], str], ...] = (str, _one_form, _any_case)
        if place not in self._listed:
            self._listed[place] = tuple(defaultdict(list) for _ in keys)
            with suppress(OSError):
                for name in os.listdir(place):
                    for key, table in zip(keys, self._listed[place], strict=True):
                        table[key(name)].append(name)
        for key, table in zip(keys[: 2 + any_case], self._listed[place], strict=False):
            found = (table.get(key(name), []) for name in names)
            if own := next((same for same in found if len(same) == 1), None):
                return own[0]
        return None


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image that can be read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def natural_order(name: str) -> list[tuple[list[str | int], str]]:
    """A key that sorts names as people count: s_2 before s_10, sub-folder by sub-folder."""
    parts = (re.split("([0-9]+)", part) for part in name.split("/"))
    return [([int(p) if i % 2 else p for i, p in enumerate(each)], "".join(each)) for each in parts]


def some_names(names: Iterable[str]) -> str:
    """Up to ``SHOWN`` names, and how many more there are."""
    every: Sequence[str] = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def unread(files: Iterable[Path]) -> tuple[list[str], list[Path]]:
    """Of files without the suffix of an image: a line for each picture, and all others."""
    lines, others = [], []
    for path in files:
        if path.suffix.lower() in UNREAD_PICTURES:
            lines.append(f"{path}: {path.suffix} files are not read; export it as TIFF or PNG")
        elif not is_image(path):
            others.append(path)
    return lines, others


def own_pictures(names: Collection[str]) -> list[re.Pattern[str]]:
    """Which of a folder's contents are this program's pictures, by what else lies there."""
    there = set(names)
    return list(dict.fromkeys(pattern for marks, pattern in _MARKS if marks <= there))


def _is_result(place: Path, names: Collection[str]) -> bool:
    """Whether a whole folder was written by this program: a set, or predictions of an epoch."""
    if any(marks <= {*names} for marks in MADE):
        return True
    pictures = bool(names) and all(name.endswith(".png") for name in names)
    return pictures and re.fullmatch(r"epoch_\d+", place.name) is not None


def _is_own(path: Path) -> bool:
    """Whether a path, which a link leads to, is a picture of this program's results."""
    with suppress(OSError):
        if os.path.isdir(path) and _is_result(path, os.listdir(path)):
            return True
        return any(
            pattern.fullmatch(path.name) for pattern in own_pictures(os.listdir(path.parent))
        )
    return False


def _identity(path: Path, status: os.stat_result) -> object:
    """What tells a file or folder from all others, whatever its name."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def longest_start(stem: str, stems: Collection[str]) -> str:
    """The longest of ``stems`` that ``stem`` goes on from with a separator; '' if there is none."""
    ends = [match.start() for match in re.finditer(r"[\W_]", stem)]
    return next((stem[:end] for end in reversed(ends) if stem[:end] in stems), "")


def is_drawn(stem: str, stems: Collection[str]) -> bool:
    """Whether a name says 'mask of' or 'overlay of' one of the names ``stems``."""
    base = longest_start(stem, stems)
    if base and _AFTER.fullmatch(stem[len(base) :]):
        return True
    before = _BEFORE.match(stem)
    return before is not None and stem[before.end() :] in stems


def in_mask_folders(images: Iterable[Path], root: Path) -> list[Path]:
    """Images in a folder such as ``masks`` or ``gt`` whose names are those of images elsewhere."""
    elsewhere, inside = set(), []
    for path in images:
        if any(_FOLDER.search(part) for part in path.relative_to(root).parts[:-1]):
            inside.append(path)
        else:
            elsewhere.add(_stem(path))
    return [p for p in inside if _stem(p) in elsewhere or is_drawn(_stem(p), elsewhere)]


def by_drawn_names(images: Sequence[Path]) -> list[Path]:
    """Images whose names say that they are masks or overlays of others among them."""
    stems = {_stem(path) for path in images}
    return [path for path in images if is_drawn(_stem(path), stems)]


def labels_of_twins(images: Iterable[Path]) -> list[Path]:
    """Of images that differ in their suffix alone: those that have the values of a mask.

    They have at most ``MOST_LABELS`` different values or colours, and another one has more.
    """
    by_place: defaultdict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in images:
        by_place[path.parent, _stem(path)].append(path)
    found: list[Path] = []
    for twins in (own for own in by_place.values() if len(own) > 1):
        few = [path for path in twins if _values(path) <= MOST_LABELS]
        found += few if len(few) < len(twins) else []
    return found


def _values(path: Path) -> int:
    """Number of different values or colours; of a file that cannot be read more than of a mask."""
    try:
        pixels = read_image(path)
    except DataError:
        return MOST_LABELS + 1
    flat = pixels.reshape(-1) if pixels.ndim == 2 else pixels.reshape(-1, 3) @ (65536, 256, 1)
    return len(np.unique(flat))


def _stem(path: Path) -> str:
    return _any_case(path.stem)


def _one_form(name: str) -> str:
    stem, suffix = os.path.splitext(name_key(name))
    return stem + suffix.lower()


def _any_case(name: str) -> str:
    return name_key(name).casefold()


def names_of(images: Path) -> list[str]:
    """What tells a folder of images (or one image) from others, as sets name their folders alike.

    Its own name; before that of a folder ``img`` the folder's above, before a split the set's:
    steel, test_numf, img.
    """
    first = images.resolve()
    names = [first.name or "images"]
    if first.name.lower() == "img" and first.parent.name:
        first = first.parent
        names.insert(0, first.name)
    split = SPLIT.fullmatch(first.name) or first.name.endswith("_numf")
    if split and first.parent.name:
        names.insert(0, first.parent.name)
    return names


def sample_of(images: Path) -> str:
    """What a folder of images (or one image) is called: its own name, but never ``img`` alone."""
    *above, own = names_of(images)
    return "_".join(above if above and own.lower() == "img" else [*above, own])
