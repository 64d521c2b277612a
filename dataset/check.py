"""Check a set before training: every file that a run will read, and all problems at once."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from annotation.scribbles import unlabelled_value
from data import Sample, find_split, name_key
from dataset.layout import LAYOUT
from dataset.source_files import PaletteCheck, palette_of
from imaging.store import ImageStore
from utils.files import IMAGE_SUFFIXES, DataError, list_files, list_names
from utils.metrics import IGNORED

SMALLEST_SIDE = 16  # the UNet halves three times and its crops must keep a position at 1/4
MAX_LINES = 30

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
) -> DataReport:
    """Read, check and keep every file that a run will need, before anything is trained.

    Args:
        image_size, ignore_label: see ``ImageStore``.
        stages: any of 'self', 'fine', 'sup'.
        sizes, repeats: data sizes '1', '5', 'f', and see ``annotated_repeats``.
        self_mode_needs_groups: pretraining uses the production batches.
        needs_annotated: every batch of pretraining has an annotated image.
        probe: pretraining scores its features on the annotated images and the test set.

    Raises DataError of all problems found, see ``Problems.refuse``.
    """
    root = Path(data_dir)
    if not os.path.isdir(root):
        raise DataError(missing_set(root))
    check = SetCheck(root, num_classes, ImageStore(image_size, ignore_label))
    supervised = bool({"fine", "sup"} & set(stages))
    scored = supervised or (probe and "self" in stages)
    splits = check.annotated_splits(sizes, None if repeats is None else tuple(repeats))
    pretraining = []
    if "self" in stages:
        pretraining += check.folder("train_numf")
        pretraining += check.folder("train_unlabelled") if use_unlabelled else []
    probed = len(check.problems)
    for split in splits if scored or needs_annotated else ():
        annotated = check.folder(split, masks=True)
        check.classes(split, annotated, "annotated images")
        if supervised and len(annotated) > 1:
            check.one_size(split, annotated)
        if "self" in stages and needs_annotated:
            pretraining += annotated
    if scored:
        probed = len(check.problems) if needs_annotated else probed
        check.classes("test_numf", check.folder("test_numf", masks=True), "test set")
        if not supervised:
            check.problems[probed:] = [line + PROBE for line in check.problems[probed:]]
    check.one_size("pretraining", pretraining)
    if "self" in stages and self_mode_needs_groups:
        check.batches(pretraining)
    if check.palettes.differing:
        cure = "save all masks with one palette, or as 8-bit gray"
        check.problems.append(
            f"{root}: palettes of masks differ: {check.palettes.differing}; {cure}"
        )
    check.problems.refuse()
    return DataReport(check.store, tuple(dict.fromkeys([*check.warnings, *check.scribbles()])))


def missing_set(root: Path) -> str:
    """The message on a set's folder that is not there: several lines."""
    what = "a file, not a folder" if os.path.isfile(root) else "no such folder"
    cure = "give the folder of your set with --data_dir. Its layout:"
    if root.name in ("aluminum", "aluminium"):
        paper = "this is the paper's set (198 images of 376x376, academic use only)"
        ask = "ask its authors for it, or lay out your own:"
        cure = f"{paper}, which may not be redistributed; {ask}"
    return f"{root}: {what}; {cure}\n{LAYOUT}"


class SetCheck:
    """Decode the files of a set into a store, and note problems and warnings, a line each."""

    def __init__(self, root: Path, num_classes: int, store: ImageStore) -> None:
        self.root, self.num_classes, self.store = root, num_classes, store
        self.problems = Problems()
        self.warnings: list[str] = []
        self.palettes = PaletteCheck()
        self.scribbled: dict[Path, int] = {}  # masks of strokes, and the value round them

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

    def folder(self, split: str, masks: bool = False) -> list[Sample]:
        """Check the images of a folder, and their masks if wanted; return the sound ones."""
        sound: list[Sample] = []
        with self.problems.collect():
            samples = find_split(self.root, split)
            self._names(split, samples, masks)
            for sample in samples:
                with self.problems.collect():
                    self.image(sample)
                    if masks:
                        self.mask(sample)
                    sound.append(sample)
        return sound

    def _names(self, split: str, samples: list[Sample], masks: bool) -> None:
        """Note a missing or empty folder, equal names, names without a file, and stray masks."""
        folder, purpose = self.root / split / "img", PURPOSE.get(split, ANNOTATED)
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder; {purpose}")
        images = [p for p in list_names(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
        others = [p for p in list_files(folder) if p not in images]
        self.problems += [_not_a_file(path) for path in images if not os.path.isfile(path)]
        for path in (path for path in list_names(folder) if os.path.isdir(path)):
            with suppress(DataError):  # it need not be readable
                if inside := list_files(path, IMAGE_SUFFIXES, below=True):
                    found = f"{path}: sub-folder with {len(inside)} image(s), left out"
                    self.warnings.append(f"{found}; move them into {folder}")
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
            raise DataError(f"{found}; at least {SMALLEST_SIDE} a side are needed")

    def mask(self, sample: Sample) -> None:
        """Decode the mask of a sound image; raises DataError if it cannot be used."""
        if sample.mask is None:
            raise DataError(_no_mask(sample.image))
        mask = self.store.mask(sample.mask).numpy()
        if colours := palette_of(sample.mask):
            unlabelled = {IGNORED} if self.store.ignore_label is not None else set()
            self.palettes.add(sample.mask, colours, set(np.unique(mask).tolist()) - unlabelled)
        size = self.store.file_size("mask", sample.mask)
        image_size = self.store.file_size("image", sample.image)
        if size != image_size:
            found = f"{sample.mask}: {size_text(size)}, its image is {size_text(image_size)}"
            raise DataError(f"{found}; a mask has the size of its image")
        labelled = mask[mask != IGNORED] if self.store.ignore_label is not None else mask
        highest = int(labelled.max(initial=0))
        if highest >= self.num_classes:
            found = f"value {highest} in a mask of {self.num_classes} classes"
            rule = f"class ids are 0..{self.num_classes - 1}"
            cure = "give --num_classes or, for unlabelled pixels, --ignore_label"
            raise DataError(f"{sample.mask}: {found}; {rule}: correct the mask, or {cure}")
        image = self.store.image(sample.image).permute(1, 2, 0).squeeze(2).numpy()
        value = unlabelled_value(mask, image)
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

    def classes(self, split: str, samples: list[Sample], what: str) -> None:
        """Masks must have labels; warn of classes that none of these masks shows."""
        seen: set[int] = set()
        for path in (s.mask for s in samples if s.mask is not None):
            shown = set(np.flatnonzero(np.bincount(self.store.mask(path).numpy().ravel())).tolist())
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

    def one_size(self, what: str, samples: list[Sample]) -> None:
        """Images of one batch must have one size."""
        sizes = {s.image: self.store.file_size("image", s.image) for s in samples}
        if self.store.image_size or len(set(sizes.values())) < 2:
            return
        most = Counter(sizes.values()).most_common(1)[0][0]
        odd = next(path for path, size in sizes.items() if size != most)
        side = min(min(size) for size in sizes.values())
        found = f"{odd}: {size_text(sizes[odd])} where {what} has {size_text(most)} too"
        cure = f"give --image_size N (for instance {side}) to make all images N x N"
        self.problems.append(f"{found}; {cure}")

    def batches(self, samples: list[Sample]) -> None:
        """Warn once when names carry no production batch."""
        nameless = list(dict.fromkeys(s.image for s in samples if not s.batch))
        if nameless:
            found = (
                f"{len(nameless)} file name(s) without a production batch (<batch>_<sample>_x_x)"
            )
            self.warnings.append(f"{nameless[0]}: {found}; every such image is its own batch")


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
