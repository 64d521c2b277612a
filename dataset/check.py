"""Check a set before training: every file that a run will read, and all problems at once."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import data
from annotation.scribbles import unlabelled_value
from data import Sample
from dataset.set_file import read_set_file
from dataset.source_files import PaletteCheck, palette_of
from imaging.data_bar import Bar, bar_lines, find_bars
from imaging.field import SMALLEST_SIDE, filled, visible
from imaging.gray_range import EACH_IMAGE, Conversion, GrayPool
from imaging.imagefile import decode, has_more_bits, read_image, turn_text
from imaging.listing import DRAWN, Listing, by_drawn_names
from imaging.pages import count_pages
from imaging.store import Hashing, ImageStore
from utils.device import size_of
from utils.files import IMAGE_SUFFIXES, DataError, left_by_kill, list_files, list_names, name_key
from utils.log import progress, to_terminal
from utils.metrics import IGNORED

MAX_LINES = 30
TURNED_MASK = "draw the mask on the upright image, or remove the orientation from the image file"

LAYOUT = """\
  <data_dir>/train_numf/img/*.png    all training images; gt/ beside img/ holds their masks
  <data_dir>/test_numf/{img,gt}/     test images and masks
  <data_dir>/sup_num1_0/{img,gt}/    one annotated image (sup_num1_1 ... for other choices)
  A mask has its image's name, .png, one channel, pixel value = class id 0, 1, 2, ...
  `python train_defect.py` runs now, with a small set that it makes here."""

# What belongs into a folder, for messages about one that is missing or empty.
PURPOSE = {
    "train_unlabelled": "put images without masks there, or leave out --use_unlabelled",
    "train_numf": "put all training images there",
    "test_numf": "put the test images there, their masks in gt beside it",
}
ANNOTATED = "put annotated images there (masks in gt beside it), or choose other --repeats"
PROBE = ", or leave out --probe, which alone reads it"


class Problems(list[str]):
    """What is wrong with files and options, a line each: 'file: what was found; cure'."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """End the block at a DataError and note its lines."""
        try:
            yield
        except DataError as error:
            self += str(error).splitlines()

    def refuse(self) -> None:
        """Raise a DataError of all different lines, if any: 30, and how many more there are."""
        lines = list(dict.fromkeys(self))
        if len(lines) > MAX_LINES:
            lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES} more"]
        if lines:
            raise DataError("\n".join(lines))


def size_text(shape: Sequence[int]) -> str:
    """Width x height of a shape (H, W, ...), as image programs write it."""
    return f"{shape[1]}x{shape[0]}"


class DataReport(NamedTuple):
    """What ``check_data`` found: the decoded files, and one line per warning."""

    store: ImageStore
    warnings: tuple[str, ...]


def check_data(
    data_dir: str | Path,
    *,
    num_classes: int,
    image_size: int = 0,
    ignore_label: int | None = None,
    stages: Sequence[str] = ("self", "fine"),
    sizes: Iterable[str] = ("1",),
    repeats: Iterable[int | str] | None = (0,),
    use_unlabelled: bool = False,
    self_mode_needs_groups: bool = False,
    needs_annotated: bool = True,
    probe: bool = False,
    needs_test: bool = False,
    self_crop: int = 0,
    fine_crop: int = 0,
    single: bool = False,
    gray: Conversion | None = None,
    cache: int | None = None,
    index: Path | None = None,
) -> DataReport:
    """Read and check every file that a run will need; DataError of all problems found.

    Args:
        image_size, ignore_label, cache, index: see ``ImageStore``.
        stages: any of 'self', 'fine', 'sup'.
        sizes, repeats: data sizes '1', '5', 'f', and see ``annotated_repeats``.
        self_mode_needs_groups: pretraining uses the production batches.
        needs_annotated: every batch of pretraining has an annotated image.
        probe: pretraining scores its features on the annotated images and the test set.
        needs_test: a set without test masks is refused; else it is one that gives no score.
        self_crop, fine_crop, single: sides of crops; 0: images of one size, or single in a step.
        gray: makes 8 bits of images with more; None: by ``set_conversion``.
    """
    root = Path(data_dir)
    if not os.path.isdir(root):
        raise DataError(missing_set(root))
    store = ImageStore(image_size, ignore_label, cache, index, gray=gray or set_conversion(root))
    check = SetCheck(root, num_classes, store)
    supervised = bool({"fine", "sup"} & set(stages))
    scored = supervised or (probe and "self" in stages)
    splits = check.annotated_splits(sizes, None if repeats is None else tuple(repeats))
    unmasked = ("train_numf", "train_unlabelled")[: 1 + use_unlabelled] if "self" in stages else ()
    masked = splits if scored or needs_annotated else []
    check.tell_memory(unmasked, [*masked, *(["test_numf"] if scored else [])])
    pretraining = check.folders(unmasked)
    probed = len(check.problems)
    for split in masked:
        annotated = check.folder(split, masks=True)
        check.classes(split, annotated, "annotated images")
        check.one_size(split, annotated if supervised else [], fine_crop=fine_crop or single)
        pretraining += annotated if "self" in stages and needs_annotated else []
    if scored:
        probed = len(check.problems) if needs_annotated else probed
        check.test_set(needed=needs_test or (probe and "self" in stages))
        if not supervised:
            check.problems[probed:] = [line + PROBE for line in check.problems[probed:]]
    check.one_size("pretraining", pretraining, self_crop=self_crop)
    check.batches(pretraining if self_mode_needs_groups else [])
    return check.report()


def set_conversion(root: Path) -> Conversion:
    """How images of a set with more than 8 bits become 8: by one range for the set.

    It is the one that ``set.json`` tells, else that of the training images, or where they are not
    there, of the annotated ones. Where none of these has more than 8 bits, each image is converted
    by its own range.
    """
    known = read_set_file(root)
    if known and known.gray_range:
        return known.gray_range
    folders = [root / "train_numf"]
    if not os.path.isdir(folders[0] / "img"):
        folders = [path for path in list_names(root) if path.name.startswith("sup_")]
    pool = GrayPool()
    for folder in folders:
        for path in list_files(folder / "img", IMAGE_SUFFIXES):
            with suppress(DataError):  # the check of the set names it, if it is needed
                if has_more_bits(path):
                    values = decode(path).values
                    pool.add(filled(values, visible(path, values.shape)))
    return pool.range() or EACH_IMAGE


def turned_images(found: Mapping[Path, int]) -> list[str]:
    """A warning on images that an EXIF orientation turned, and whose masks have none."""
    if not found:
        return []
    path, orientation = next(iter(found.items()))
    more = f", and {len(found) - 1} other(s)" if len(found) > 1 else ""
    cure = "look whether they fit (prepare.py --check draws them), else"
    return [f"{path}: {turn_text(orientation)}{more}, their masks were not; {cure} {TURNED_MASK}"]


def missing_set(root: Path) -> str:
    """The message on a set's folder that is not there: several lines."""
    what = "a file, not a folder" if os.path.isfile(root) else "no such folder"
    if old := left_by_kill(root):
        return f"{root}: {what}; {where_left(old)}"
    cure = "give the folder of your set with --data_dir. Its layout:"
    if root.name in ("aluminum", "aluminium"):
        paper = "this is the paper's set (198 images of 376x376, academic use only)"
        ask = "ask its authors for it, or lay out your own:"
        cure = f"{paper}, which may not be redistributed; {ask}"
    return f"{root}: {what}; {cure}\n{LAYOUT}"


def where_left(old: Path) -> str:
    """The cure for a set that is missing, as a kill left it at ``old`` (``left_by_kill``)."""
    return f"a kill while it was replaced left it in {old}: move that back, or make the set anew"


class SetCheck:
    """Decode the files of a set into a store, and note problems and warnings, a line each."""

    def __init__(self, root: Path, num_classes: int, store: ImageStore) -> None:
        self.root, self.num_classes, self.store = root, num_classes, store
        self.problems = Problems()
        self.warnings: list[str] = []
        self.palettes = PaletteCheck()
        self.masked: list[Sample] = []  # sound images with sound masks
        self.bars: dict[Path, list[Bar]] = {}
        self.scribbled: dict[Path, int] = {}  # masks of strokes, and the value round them

    def report(self) -> DataReport:
        """What was found in the whole set; raises DataError of all problems."""
        self.one_palette()
        self.turned()
        self.tell_bars()
        self.warnings += self.scribbles()
        self.problems.refuse()
        return DataReport(self.store, tuple(dict.fromkeys(self.warnings)))

    def tell_memory(self, unmasked: Iterable[str], masked: Iterable[str]) -> None:
        """Say before anything is decoded if these folders take more memory than they may."""
        if self.store.cache is None:
            return
        files: dict[tuple[str, Path], int] = {}
        for split, masks in [*((s, False) for s in unmasked), *((s, True) for s in masked)]:
            with suppress(DataError):  # of a folder; its check tells
                for sample in data.listed_split(self.store, self.root, split):
                    both = [("image", sample.image), ("mask", sample.mask if masks else None)]
                    for kind, path in both:
                        if path is not None:
                            files[kind, path] = self.store.bytes_expected(kind, path)
        needed, kept = sum(files.values()), self.store.cache
        if needed > kept:
            what = f"about {size_of(needed)}, of which {size_of(kept)} are kept in memory"
            again = "the others are read again whenever they are needed; --cache changes that"
            to_terminal(f"{self.root}: its {len(files)} images and masks take {what}; {again}")

    def test_set(self, needed: bool) -> None:
        """Check the test set; if it is not ``needed``, images without any mask are none."""
        split = self.root / "test_numf"
        images = [p for p in list_names(split / "img") if p.suffix.lower() in IMAGE_SUFFIXES]
        others = {*list_files(split / "img")} - {*images}
        if needed or list_files(split / "gt") or (not images and others):
            self.classes("test_numf", self.folder("test_numf", masks=True), "test set")

    def annotated_splits(
        self, sizes: Iterable[str], repeats: Sequence[int | str] | None
    ) -> list[str]:
        """Folders of annotated images that a run reads; warns if fewer are there than usual."""
        splits = []
        for size in sizes:
            numbers = data.annotated_repeats(self.root, size, repeats)
            splits += [data.annotated_split(self.root, size, number) for number in numbers]
            if repeats is None and size != "f" and len(numbers) < data.MOST_REPEATS:
                names = f"sup_num{size}_0 ... sup_num{size}_{data.MOST_REPEATS - 1}"
                found = f"{len(numbers)} of the {data.MOST_REPEATS} folders {names} are there"
                self.warnings.append(f"{self.root}: {found}; as many repeats are run")
        return list(dict.fromkeys(splits))

    def folders(self, splits: Iterable[str]) -> list[Sample]:
        """Check the images of folders that are hashed one after another; the sound ones."""
        sound: list[Sample] = []
        for split in splits:
            sound += self.folder(split, before=sound)
        return sound

    def folder(
        self, split: str, masks: bool = False, before: Sequence[Sample] = ()
    ) -> list[Sample]:
        """Check the images of a folder, and their masks if wanted; return the sound ones.

        ``before`` are the images that precede them where the set is hashed.
        """
        sound: list[Sample] = []
        with self.problems.collect():
            samples = data.listed_split(self.store, self.root, split)
            self._names(split, samples, masks)
            hashing = Hashing(self.store, before)
            with progress(len(samples), f"Reading {split}", lines=True) as bar:
                for sample in samples:
                    with self.problems.collect():
                        self.image(sample)
                        if masks:
                            self.mask(sample)
                            self.masked.append(sample)
                        hashing.add(sample)
                        sound.append(sample)
                    bar.update(1)
            hashing.keep()
        return sound

    def _names(self, split: str, samples: list[Sample], masks: bool) -> None:
        """Note a missing or empty folder, equal names, names without a file, and stray masks."""
        folder, purpose = self.root / split / "img", PURPOSE.get(split, ANNOTATED)
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder; {purpose}")
        images = [p for p in list_names(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
        others = sorted({*list_files(folder)} - {*images})
        self.problems += [_not_a_file(path) for path in images if not os.path.isfile(path)]
        self.warnings += left_out_lines(folder, images)
        if not images:
            found = f" (only files like {others[0].name})" if others else ""
            self.problems.append(f"{folder}: no image in it{found}; {purpose}")
        elif others:
            left_out = f"{others[0]}: {len(others)} file(s) in this folder left out"
            self.warnings.append(f"{left_out}; read are {' '.join(IMAGE_SUFFIXES)}")
        beside = list_files(self.root / split / "gt") if masks else []
        by_name = defaultdict(list)
        for path in [s.image for s in samples] + beside:
            if path.parent == folder or path.suffix.lower() == data.MASK_SUFFIX:
                by_name[path.parent, name_key(path.stem)].append(path.name)
        for (parent, _), same in by_name.items():
            if len(same) > 1:
                names = ", ".join(same)
                self.problems.append(f"{parent}: {names} share one name; rename or remove one")
        stray = [path for path in beside if (folder, name_key(path.stem)) not in by_name]
        self.warnings += [f"{path}: mask without an image; not used" for path in stray]

    def image(self, sample: Sample) -> None:
        """Decode an image; raises DataError if it cannot be used."""
        size = self.store.file_size("image", sample.image)
        if not self.store.image_size and min(size) < SMALLEST_SIDE:
            found = f"{sample.image}: {size_text(size)} pixels"
            raise DataError(f"{found}; at least {SMALLEST_SIDE} a side are needed: leave it out")
        if sample.image not in self.bars and ("image", sample.image) not in self.store.indexed:
            whole = self.store.image(sample.image).permute(1, 2, 0).squeeze(2).numpy()
            resized = self.store.image_size > 0  # a bar of a few rows is lost then
            pixels = read_image(sample.image, self.store.gray) if resized else whole
            self.bars[sample.image] = find_bars(pixels)

    def mask(self, sample: Sample) -> None:
        """Decode the mask of a sound image; raises DataError if it cannot be used."""
        if sample.mask is None:
            raise DataError(_no_mask(sample.image))
        ids = set(self.store.ids(sample.mask))
        if colours := palette_of(sample.mask):
            unlabelled = {IGNORED} if self.store.ignore_label is not None else set()
            self.palettes.add(sample.mask, colours, ids - unlabelled)
        size = self.store.file_size("mask", sample.mask)
        image_size = self.store.file_size("image", sample.image)
        if size != image_size:
            found = f"{sample.mask}: {size_text(size)}, its image is {size_text(image_size)}"
            rule = "a mask has the size of its image: export it so"
            if sample.image in self.store.turned:
                found += f", {turn_text(self.store.turned[sample.image])}"
                rule = TURNED_MASK
            raise DataError(f"{found}; {rule}")
        highest = max(
            ids - ({IGNORED} if self.store.ignore_label is not None else set()), default=0
        )
        if highest >= self.num_classes:
            found = f"value {highest} in a mask of {self.num_classes} classes"
            rule = f"class ids are 0..{self.num_classes - 1}"
            cure = "give --num_classes or, for unlabelled pixels, --ignore_label"
            raise DataError(f"{sample.mask}: {found}; {rule}: correct the mask, or {cure}")
        if ("mask", sample.mask) in self.store.indexed:
            return  # it was looked at when it was first read
        image = self.store.image(sample.image).permute(1, 2, 0).squeeze(2).numpy()
        value = unlabelled_value(self.store.mask(sample.mask).numpy(), image)
        if value is not None and value < self.num_classes:
            self.scribbled[sample.mask] = value

    def scribbles(self) -> list[str]:
        """A warning of masks in which only strokes seem to be labelled, with both cures."""
        if not self.scribbled:
            return []
        path, value = next(iter(self.scribbled.items()))
        found = f"{path}: {len(self.scribbled)} mask(s) look like scribbles: strokes on {value}"
        cure = f"if nobody labelled the rest, give --ignore_label {value}"
        return [f"{found}; {cure}; if class {value} is drawn in full, all is well"]

    def turned(self) -> None:
        """Warn of images that were turned upright where their masks were not."""
        found = {
            sample.image: self.store.turned[sample.image]
            for sample in self.masked
            if sample.image in self.store.turned
            and self.store.turned[sample.image] != decode(str(sample.mask), seen=False).orientation
        }
        self.warnings += turned_images(found)

    def tell_bars(self) -> None:
        """Warn of data bars that nobody cut off."""
        cure = "to dataset/prepare.py, which makes the set again"
        self.warnings += [f"{self.root}: {line} {cure}" for line in bar_lines(self.bars)]

    def classes(self, split: str, samples: list[Sample], what: str) -> None:
        """Masks must have labels; warn of classes that none of these masks shows."""
        seen: set[int] = set()
        for path in (s.mask for s in samples if s.mask is not None):
            shown = set(self.store.ids(path))
            seen |= shown
            unlabelled = self.store.ignore_label
            if unlabelled is not None and shown == {IGNORED}:
                found = f"{path}: no pixel has a class, all are {unlabelled}"
                self.problems.append(f"{found}; label some, or correct --ignore_label")
        absent = [str(c) for c in range(self.num_classes) if c not in seen]
        if samples and absent:
            found = f"{self.root / split}: class {', '.join(absent)} does not occur in the {what}"
            cure = f"check the masks or --num_classes {self.num_classes}"
            self.warnings.append(f"{found}; {cure}")

    def one_size(self, what: str, samples: list[Sample], **crop: int) -> None:
        """Images of one batch must have one size, unless the setting in ``crop`` is above 0."""
        if any(crop.values()):
            return
        sizes = {s.image: self.store.file_size("image", s.image) for s in samples}
        if self.store.image_size or len(set(sizes.values())) < 2:
            return
        most = Counter(sizes.values()).most_common(1)[0][0]
        odd = next(path for path, size in sizes.items() if size != most)
        side = min(min(size) for size in sizes.values())
        found = f"{odd}: {size_text(sizes[odd])} where {what} has {size_text(most)} too"
        resized = f"give --image_size N (for instance {side}) to make all images N x N"
        cure = f"{resized}, or --{''.join(crop)} N, at most {side}, for crops of them"
        cure += ", or --fine_batch_size 1" if "fine_crop" in crop else ""
        self.problems.append(f"{found}; {cure}")

    def one_palette(self) -> None:
        """Masks with palettes must have the same one."""
        if self.palettes.differing:
            cure = "save all masks with one palette, or as 8-bit gray"
            found = f"{self.root}: palettes of masks differ: {self.palettes.differing}"
            self.problems.append(f"{found}; {cure}")

    def batches(self, samples: list[Sample]) -> None:
        """Warn once when names carry no production batch, or all of them the same one."""
        images = {s.name: s for s in reversed(samples)}  # those of a name are one group
        nameless = list(dict.fromkeys(s.image for s in samples if not s.batch))
        named = [s for s in images.values() if s.batch]
        if len(named) > 1 and len({s.batch for s in named}) == 1:
            self.warnings.append(
                f"{self.root}: all {len(named)} images whose names have a production batch have "
                f"the same, '{named[0].batch}', so PSCL-MoCo takes each for a positive of all "
                "others; if the names tell no batch, give --batches none"
            )
        if nameless:
            found = (
                f"{len(nameless)} file name(s) without a production batch (<batch>_<sample>_x_x)"
            )
            self.warnings.append(f"{nameless[0]}: {found}; every such image is its own batch")


def left_out_lines(folder: Path, images: Sequence[Path]) -> list[str]:
    """What below a folder of a set is left out, and what is read though it may be no image."""
    listing = Listing(folder)
    inside: defaultdict[Path, int] = defaultdict(int)
    for path in listing.images():
        if path.parent != folder:
            inside[folder / path.relative_to(folder).parts[0]] += 1
    lines = [
        f"{place}: sub-folder with {n} image(s), left out; move them into {folder}"
        for place, n in inside.items()
    ]
    read = {*images}
    doubtful = {
        f"read though {reason}": [path for path in paths if path in read]
        for reason, paths in (*listing.left_out.items(), (DRAWN, by_drawn_names(images)))
    }
    listing.left_out = defaultdict(
        list, {why: [p for p in paths if p not in read] for why, paths in listing.left_out.items()}
    )
    doubtful["of several pages, of which the first is read"] = [
        path for path in images if os.path.isfile(path) and count_pages(path) > 1
    ]
    lines += listing.unlisted + listing.lines()
    lines += [
        f"{folder}: {len(paths)} file(s) {what}: {listing.names(paths)}"
        for what, paths in doubtful.items()
        if paths
    ]
    return lines


def _no_mask(image: Path) -> str:
    """Why an image has no mask: the wanted name is no file, has another suffix, or is not there."""
    folder = image.parent.parent / "gt"
    wanted = folder / f"{image.stem}{data.MASK_SUFFIX}"
    if os.path.lexists(wanted):
        return _not_a_file(wanted)
    other = [p.name for p in list_files(folder) if name_key(p.stem) == name_key(image.stem)]
    found = f" (there is {other[0]})" if other else ""
    return f"{image}: no mask{found}; save its mask as {wanted}"


def _not_a_file(path: Path) -> str:
    """What is wrong with a name that stands for no file."""
    if os.path.isdir(path):
        return f"{path}: a folder, not a file; rename or remove it"
    if os.path.islink(path):
        return f"{path}: a link to {os.readlink(path)}, which is not there; mend or remove it"
    return f"{path}: not a regular file; remove it"
