"""Images and masks: finding, reading, checking, and the batches made of them.

Files are decoded once into 8-bit tensors (``ImageStore``) and stay in memory. Every random number
of a sample comes from a generator made of (seed, stream, epoch, number), so batches depend neither
on the number of worker processes nor on what was drawn before.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pscl.geometry import ViewGeometry, Window
from utils.augmentation import ColorJitter, ContrastJitter
from utils.files import IMAGE_SUFFIXES, DataError, list_files, list_names
from utils.imagefile import ImageStore, read_image, read_mask
from utils.metrics import IGNORED

MASK_SUFFIX = ".png"
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)
SMALLEST_DEVIATION = 1 / 255  # of an image that is standardised: one gray level
SMALLEST_SIDE = 16  # the UNet halves three times and its crops must keep a position at 1/4
MAX_LINES = 30
MOST_REPEATS = 5  # annotated images in turn, when nobody says which

# Streams of random numbers: the first number after the seed.
TRAIN, ANNOTATED, FINE, TRAIN_ORDER, ANNOTATED_CHOICE, FINE_ORDER = range(1, 7)

LAYOUT = """\
  <data_dir>/train_numf/img/*.png    all training images; gt/ beside img/ holds their masks
  <data_dir>/test_numf/{img,gt}/     test images and masks
  <data_dir>/sup_num1_0/{img,gt}/    one annotated image (sup_num1_1 ... for other choices)
  A mask has its image's name, .png, one channel, pixel value = class id 0, 1, 2, ...
  `python train_defect.py` runs now, with a small set that it makes here."""

Batch = dict[str, Any]
Statistics = tuple[float, float]
"""Mean and deviation of an image's own pixels, as shares of white."""

__all__ = [
    "Batches",
    "DataError",
    "DataReport",
    "ImageStore",
    "Sample",
    "SegmentationDataset",
    "TwoViewDataset",
    "annotated_split",
    "check_data",
    "find_split",
    "finetuning_batches",
    "image_input",
    "number_groups",
    "one_hot",
    "own_statistics",
    "parse_name",
    "pretraining_batches",
    "pretraining_samples",
    "read_image",
    "read_mask",
    "test_items",
    "to_input",
]


# ---------------------------------------------------------------- names and folders


class Sample(NamedTuple):
    """Paths of an image and of its mask (None where there is none)."""

    image: Path
    mask: Path | None

    @property
    def name(self) -> str:
        """The image's file name."""
        return self.image.name

    @property
    def batch(self) -> str:
        """The production batch, '' when the name carries none."""
        return parse_name(self.image.stem)[0]


def parse_name(stem: str) -> tuple[str, str]:
    """Production batch and sample id of a file name without its suffix.

    ``<ProductionBatch>_<sampleID>_x_x``, with '-' as the separator when there is no '_'. A name
    without two fields has no batch: ('', stem).
    """
    fields = stem.split("_" if "_" in stem else "-")
    if len(fields) < 2 or not fields[0] or not fields[1]:
        return "", stem
    return fields[0], fields[1]


def find_split(data_dir: str | Path, split: str) -> list[Sample]:
    """Images of ``data_dir/split/img`` in the order of their names, each with its mask in ``gt``.

    Hidden files, ``Thumbs.db`` and files of other types are left out; a missing folder is empty.

    Raises:
        DataError: a folder that may not be listed.
    """
    folder = Path(data_dir) / split
    masks = {_key(p): p for p in list_files(folder / "gt") if p.suffix.lower() == MASK_SUFFIX}
    images = (p for p in list_files(folder / "img") if p.suffix.lower() in IMAGE_SUFFIXES)
    return [Sample(path, masks.get(_key(path))) for path in images]


def annotated_split(data_dir: str | Path, size: str, repeat: int = 0) -> str:
    """Folder name of the annotated images: data size '1', '5', ..., or 'f' (all of them)."""
    if size != "f":
        return f"sup_num{size}_{repeat}"
    return "sup_numf" if (Path(data_dir) / "sup_numf").is_dir() else "train_numf"


def annotated_repeats(
    data_dir: str | Path, size: str, repeats: Iterable[int | str] | None = None
) -> tuple[int, ...]:
    """Which annotated images of a data size to run: those asked for, else those that are there.

    Left open (None), these are the ones of 0 ... 4 that have a folder, and number 0 in any case;
    data size 'f' takes all images at once and has number 0 only.
    """
    if size == "f":
        return (0,)
    if repeats is not None:
        return tuple(int(r) for r in repeats)
    root = Path(data_dir)
    there = [r for r in range(MOST_REPEATS) if (root / annotated_split(root, size, r)).is_dir()]
    return tuple(there) or (0,)


def pretraining_samples(data_dir: str | Path, use_unlabelled: bool) -> list[Sample]:
    """All training images, with those of ``train_unlabelled`` when wanted."""
    extra = find_split(data_dir, "train_unlabelled") if use_unlabelled else []
    return find_split(data_dir, "train_numf") + extra


def number_groups(samples: Iterable[Sample]) -> dict[str, int]:
    """Number the production batches: file name -> group, counted from 0 in the batches' order.

    Names without a batch come after those with one, and every such name is a group of its own.
    """
    keys = {s.name: (0, s.batch) if s.batch else (1, s.name) for s in samples}
    numbers = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {name: numbers[key] for name, key in keys.items()}


def _key(path: Path) -> str:
    """By which images and masks find each other: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", path.stem)


# ---------------------------------------------------------------- checking


@dataclass(frozen=True)
class DataReport:
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
        data_dir: the set's folder.
        num_classes: C; a class id of C or more in a mask is an error.
        image_size, ignore_label: see ``ImageStore``.
        stages: any of 'self', 'fine', 'sup'.
        sizes, repeats: which annotated images: data sizes '1', '5', 'f', and numbers of repeats,
            see ``annotated_repeats``.
        use_unlabelled: pretraining reads ``train_unlabelled`` too.
        self_mode_needs_groups: pretraining uses the production batches.
        needs_annotated: an annotated image rides along in pretraining.
        probe: pretraining looks at its features by the annotated images and the test set.

    Raises:
        DataError: all problems found, one line each (after 30 lines only their number).
    """
    root = Path(data_dir)
    if not os.path.isdir(root):
        raise DataError(missing_set(root))
    check = _Check(root, num_classes, ImageStore(image_size, ignore_label))
    supervised = bool({"fine", "sup"} & set(stages))
    scored = supervised or (probe and "self" in stages)
    splits = check.annotated_splits(sizes, None if repeats is None else tuple(repeats))
    pretraining = []
    if "self" in stages:
        for split in ("train_numf", *(["train_unlabelled"] if use_unlabelled else [])):
            pretraining += check.folder(split)
    start = len(check.problems)
    for split in splits if scored or needs_annotated else ():
        annotated = check.folder(split, masks=True)
        check.classes(split, annotated, "annotated images")
        if supervised and len(annotated) > 1:
            check.one_size(split, annotated)
        if "self" in stages and needs_annotated:
            pretraining += annotated
    if scored:
        start = len(check.problems) if needs_annotated else start
        check.classes("test_numf", check.folder("test_numf", masks=True), "test set")
        check.only_probed(start, supervised)
    check.one_size("pretraining", pretraining)
    if "self" in stages and self_mode_needs_groups:
        check.batches(pretraining)
    return check.report()


def missing_set(root: Path) -> str:
    """What to do when the set's folder is not there: several lines."""
    what = "a file, not a folder" if os.path.isfile(root) else "no such folder"
    lines = [f"{root}: {what}; give the folder of your set with --data_dir. Its layout:"]
    if root.name in ("aluminum", "aluminium"):
        lines = [
            f"{root}: no such folder; this is the paper's set (198 images of 376x376, academic use"
            " only), which may not be redistributed; ask its authors for it, or lay out your own:"
        ]
    return "\n".join([*lines, LAYOUT])


class _Check:
    """Collects problems and warnings, a line each, while the files are decoded into a store."""

    def __init__(self, root: Path, num_classes: int, store: ImageStore) -> None:
        self.root, self.num_classes, self.store = root, num_classes, store
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def annotated_splits(
        self, sizes: Iterable[str], repeats: Sequence[int | str] | None
    ) -> list[str]:
        """Folders of annotated images that a run reads; warns when nobody chose and some lack."""
        splits = []
        for size in sizes:
            numbers = annotated_repeats(self.root, size, repeats)
            splits += [annotated_split(self.root, size, number) for number in numbers]
            if repeats is None and size != "f" and len(numbers) < MOST_REPEATS:
                self.warnings.append(
                    f"{self.root}: {len(numbers)} of the {MOST_REPEATS} folders sup_num{size}_0 "
                    f"... sup_num{size}_{MOST_REPEATS - 1} are there; as many repeats are run"
                )
        return list(dict.fromkeys(splits))

    def folder(self, split: str, masks: bool = False) -> list[Sample]:
        """Check the images of a folder, and their masks if wanted; return the sound ones."""
        folder = self.root / split / "img"
        try:
            samples = find_split(self.root, split)
        except DataError as error:
            self.problems.append(str(error))
            return []
        others = [p for p in list_files(folder) if p.suffix.lower() not in IMAGE_SUFFIXES]
        no_files = [p for p in list_names(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
        no_files = [p for p in no_files if not os.path.isfile(p)]
        self.problems += [_not_a_file(path) for path in no_files]
        if not os.path.isdir(folder):
            self.problems.append(f"{folder}: no such folder; {_purpose(split)}")
        elif not samples and not no_files:
            found = f" (only files like {others[0].name})" if others else ""
            self.problems.append(f"{folder}: no image in it{found}; {_purpose(split)}")
        elif others:
            self.warnings.append(
                f"{others[0]}: {len(others)} file(s) in this folder left out; "
                f"read are {' '.join(IMAGE_SUFFIXES)}"
            )
        self._twins([s.image for s in samples])
        if masks:
            gt = self.root / split / "gt"
            self._twins([p for p in list_files(gt) if p.suffix.lower() == MASK_SUFFIX])
            self._stray_masks(split, samples)
        return [s for s in samples if self._image(s.image) and (not masks or self._mask(s))]

    def only_probed(self, start: int, supervised: bool) -> None:
        """Add a cure to the problems from ``start`` on, of files that only the probe reads."""
        if not supervised:
            cure = ", or leave out --probe, which alone reads it"
            self.problems[start:] = [line + cure for line in self.problems[start:]]

    def classes(self, split: str, samples: list[Sample], what: str) -> None:
        """Warn of classes that no mask of these samples shows."""
        masks = [self.store.mask(s.mask) for s in samples if s.mask is not None]
        seen = {c for mask in masks for c in np.flatnonzero(np.bincount(mask.numpy().ravel()))}
        absent = [str(c) for c in range(self.num_classes) if c not in seen]
        if samples and absent:
            self.warnings.append(
                f"{self.root / split}: class {', '.join(absent)} does not occur in the {what}; "
                f"check the masks or --num_classes {self.num_classes}"
            )

    def one_size(self, what: str, samples: list[Sample]) -> None:
        """Images of one batch must have one size."""
        sizes = {s.image: self.store.file_size("image", s.image) for s in samples}
        if self.store.image_size or len(set(sizes.values())) < 2:
            return
        most = Counter(sizes.values()).most_common(1)[0][0]
        odd = next(path for path, size in sizes.items() if size != most)
        side = min(min(size) for size in sizes.values())
        self.problems.append(
            f"{odd}: {_size_text(sizes[odd])} where {what} has {_size_text(most)} too; "
            f"give --image_size N (for instance {side}) to make all images N x N"
        )

    def batches(self, samples: list[Sample]) -> None:
        """Warn once when names carry no production batch."""
        nameless = list(dict.fromkeys(s.image for s in samples if not s.batch))
        if nameless:
            self.warnings.append(
                f"{nameless[0]}: {len(nameless)} file name(s) without a production batch "
                "(<batch>_<sample>_x_x); every such image is its own batch"
            )

    def report(self) -> DataReport:
        """Raise the problems, if any, each once: a folder may have been looked at twice."""
        lines = list(dict.fromkeys(self.problems))
        if len(lines) > MAX_LINES:
            lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES} more"]
        if lines:
            raise DataError("\n".join(lines))
        return DataReport(self.store, tuple(dict.fromkeys(self.warnings)))

    def _twins(self, paths: list[Path]) -> None:
        """No two images, or masks, of one folder may differ by their suffix alone."""
        by_key = defaultdict(list)
        for path in paths:
            by_key[_key(path)].append(path)
        for same in by_key.values():
            if len(same) > 1:
                names = ", ".join(path.name for path in same)
                self.problems.append(
                    f"{same[0].parent}: {names} share one name; rename or remove one"
                )

    def _stray_masks(self, split: str, samples: list[Sample]) -> None:
        keys = {_key(s.image) for s in samples}
        for path in list_files(self.root / split / "gt"):
            if _key(path) not in keys:
                self.warnings.append(f"{path}: mask without an image; not used")

    def _image(self, path: Path) -> bool:
        try:
            size = self.store.file_size("image", path)
        except DataError as error:
            self.problems.append(str(error))
            return False
        if not self.store.image_size and min(size) < SMALLEST_SIDE:
            self.problems.append(
                f"{path}: {_size_text(size)} pixels; at least {SMALLEST_SIDE} a side are needed"
            )
            return False
        return True

    def _mask(self, sample: Sample) -> bool:
        if sample.mask is None:
            folder = sample.image.parent.parent / "gt"
            wanted = folder / f"{sample.image.stem}{MASK_SUFFIX}"
            if os.path.lexists(wanted):
                self.problems.append(_not_a_file(wanted))
                return False
            other = [p.name for p in list_files(folder) if _key(p) == _key(sample.image)]
            found = f" (there is {other[0]})" if other else ""
            self.problems.append(f"{sample.image}: no mask{found}; save its mask as {wanted}")
            return False
        try:
            mask = self.store.mask(sample.mask).numpy()
            labelled = mask[mask != IGNORED] if self.store.ignore_label is not None else mask
            highest = int(labelled.max(initial=0))
            size = self.store.file_size("mask", sample.mask)
        except DataError as error:
            self.problems.append(str(error))
            return False
        image_size = self.store.file_size("image", sample.image)
        if size != image_size:
            self.problems.append(
                f"{sample.mask}: {_size_text(size)}, its image is {_size_text(image_size)}; "
                "a mask has the size of its image"
            )
            return False
        if not labelled.size:
            self.problems.append(
                f"{sample.mask}: no pixel has a class, all are {self.store.ignore_label}; label "
                "some, or correct --ignore_label"
            )
            return False
        if highest >= self.num_classes:
            self.problems.append(
                f"{sample.mask}: value {highest} in a mask of {self.num_classes} classes; "
                f"class ids are 0..{self.num_classes - 1}: correct the mask, or give --num_classes "
                "or, for pixels that nobody labelled, --ignore_label"
            )
            return False
        return True


def _purpose(split: str) -> str:
    """What belongs into a folder, for messages about one that is missing or empty."""
    if split == "train_unlabelled":
        return "put images without masks there, or leave out --use_unlabelled"
    if split == "train_numf":
        return "put all training images there"
    if split == "test_numf":
        return "put the test images there, their masks in gt beside it"
    return "put annotated images there (masks in gt beside it), or choose other --repeats"


def _not_a_file(path: Path) -> str:
    """What is wrong with a name that stands for no file."""
    if os.path.isdir(path):
        return f"{path}: a folder, not a file; rename or remove it"
    if os.path.islink(path):
        return f"{path}: a link to {os.readlink(path)}, which is not there; mend or remove it"
    return f"{path}: not a regular file; remove it"


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


# ---------------------------------------------------------------- samples


def to_input(image: Tensor, own: Statistics | None = None) -> Tensor:
    """Network input of an image: uint8 (1 or 3, H, W) to normalised float32 (3, H, W)."""
    return normalise(image.float() / 255, own)


def normalise(image: Tensor, own: Statistics | None = None) -> Tensor:
    """Subtract the mean and divide by the deviation: float (1 or 3, H, W) to (3, H, W).

    They are the fixed ones, or the image's own, the same for its three channels.
    """
    if own is not None:
        return ((image - own[0]) / own[1]).expand(3, -1, -1)
    mean, std = image.new_tensor(MEAN), image.new_tensor(STD)
    return (image - mean[:, None, None]) / std[:, None, None]


def own_statistics(image: Tensor) -> Statistics:
    """Mean and deviation over all pixels and channels of a whole image, uint8 (c, H, W).

    They are counted in whole numbers, so that they depend neither on the order of the pixels nor
    on the number of threads. The deviation is at least one gray level.
    """
    counts = torch.bincount(image.flatten(), minlength=256).tolist()
    pixels, total = image.numel(), sum(level * n for level, n in enumerate(counts))
    squares = sum(level * level * n for level, n in enumerate(counts))
    deviation = math.sqrt(pixels * squares - total * total) / pixels
    return total / pixels / 255, max(deviation / 255, SMALLEST_DEVIATION)


def one_hot(mask: Tensor, num_classes: int) -> Tensor:
    """Class ids (H, W) to a label map: float (C, H, W), 255 where the class is, else 0.

    A pixel that nobody labelled is of no class.
    """
    ids = mask.long().where(mask != IGNORED, num_classes)
    return F.one_hot(ids, num_classes + 1)[..., :num_classes].permute(2, 0, 1).float() * 255


def generator(seed: int, stream: int, epoch: int, number: int = 0) -> np.random.Generator:
    """The random numbers of one sample of one epoch."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, epoch, number]))


class Draw(NamedTuple):
    """Which sample to make: image number ``image``, by the generator (stream, epoch, number)."""

    stream: int
    epoch: int
    number: int
    image: int


class TwoViewDataset(Dataset[dict[str, Any]]):
    """Two views of an image (paper: data augmentation; published loader).

    View q is the image with its colours jittered; view k has another jitter, then flip, quarter
    turns, crop and resize. An item is {"view_q", "view_k": float (3, H, W), "geometry":
    ViewGeometry of view k, "group": production-batch number, "name"}, and for an annotated image
    also "label": float (C, H, W), its one-hot label map (0..255) through view k's geometry.

    Args:
        train: the images without labels, drawn by stream ``TRAIN``.
        annotated: images with masks, drawn by stream ``ANNOTATED``; may be empty.
        store: decoded files.
        num_classes: C.
        seed: seed of the run.
        jitter_strength: d of the colour jitter.
        random_crop: largest part of a side that the crop removes.
        standardize: normalise by the image's own mean and deviation, taken before the jitter, which
            would have no effect otherwise.
    """

    def __init__(
        self,
        train: Sequence[Sample],
        annotated: Sequence[Sample],
        store: ImageStore,
        *,
        num_classes: int,
        seed: int,
        jitter_strength: float = 0.2,
        random_crop: float = 0.2,
        standardize: bool = False,
    ) -> None:
        self.samples = {TRAIN: tuple(train), ANNOTATED: tuple(annotated)}
        self.groups = number_groups([*train, *annotated])
        self.store, self.num_classes, self.seed = store, num_classes, seed
        self.jitter_strength, self.random_crop = jitter_strength, random_crop
        self.standardize = standardize

    def __len__(self) -> int:
        return len(self.samples[TRAIN])

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng = generator(self.seed, draw.stream, draw.epoch, draw.number)
        sample = self.samples[draw.stream][draw.image]
        image = self.store.image(sample.image)
        view_q = ColorJitter.draw(rng, self.jitter_strength).apply(image)
        view_k = ColorJitter.draw(rng, self.jitter_strength).apply(image)
        geometry = ViewGeometry.draw(rng, self.random_crop)
        own = own_statistics(image) if self.standardize else None
        item = {
            "view_q": to_input(view_q, own),
            "view_k": normalise(geometry.apply(view_k.float() / 255), own),
            "geometry": geometry,
            "group": self.groups[sample.name],
            "name": sample.name,
        }
        if draw.stream == ANNOTATED and sample.mask is not None:
            label = one_hot(self.store.mask(sample.mask), self.num_classes)
            item["label"] = geometry.apply(label)
        return item


class Augmentation(NamedTuple):
    """What is done to images trained on with labels, besides flip and quarter turns.

    Attributes:
        jitter: d of the colour jitter.
        contrast: d of the change of contrast after normalisation.
        crop: side of the random crops in pixels; 0: the whole image.
        scale: largest factor by which they are enlarged or reduced.
        rotation: largest angle by which they are turned, in degrees.
    """

    jitter: float = 0.1
    contrast: float = 0.0
    crop: int = 0
    scale: float = 1.0
    rotation: float = 0.0


PUBLISHED_AUGMENTATION = Augmentation()


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Annotated images for fine-tuning and supervised training.

    An item is {"image": float (3, H, W), "mask": int64 (H, W), "name"}: colour jitter, flip and
    quarter turns, and what else is asked for.

    Args:
        samples: images with masks.
        store: decoded files.
        seed: seed of the run.
        augmentation: strengths.
        standardize: normalise by the whole image's own mean and deviation, taken before the jitter.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        store: ImageStore,
        *,
        seed: int,
        augmentation: Augmentation = PUBLISHED_AUGMENTATION,
        standardize: bool = False,
    ) -> None:
        self.samples = tuple(samples)
        self.store, self.seed = store, seed
        self.augmentation, self.standardize = augmentation, standardize

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng = generator(self.seed, draw.stream, draw.epoch, draw.number)
        sample, a = self.samples[draw.image], self.augmentation
        pixels = self.store.image(sample.image)
        jittered = ColorJitter.draw(rng, a.jitter).apply(pixels)
        geometry = ViewGeometry.draw(rng, random_crop=0.0)
        image = geometry.apply(jittered.float() / 255)
        mask = geometry.apply_mask(_mask_of(sample, self.store))
        if a.crop or a.scale != 1 or a.rotation:
            size = (image.shape[-2], image.shape[-1])
            window = Window.draw(rng, size, a.crop, a.scale, a.rotation)
            image, mask = window.apply(image), window.apply_mask(mask)
        image = normalise(image, own_statistics(pixels) if self.standardize else None)
        if a.contrast:
            image = ContrastJitter.draw(rng, a.contrast).apply(image)
        return {"image": image, "mask": mask, "name": sample.name}


def test_items(
    samples: Iterable[Sample], store: ImageStore, standardize: bool = False
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Image float (3, H, W), mask int64 (H, W) and file name of each test image, unchanged."""
    for sample in samples:
        image = image_input(sample, store, standardize)
        yield image, _mask_of(sample, store), sample.name


def image_input(sample: Sample, store: ImageStore, standardize: bool = False) -> Tensor:
    """Network input of a sample's image, unchanged: float (3, H, W)."""
    image = store.image(sample.image)
    return to_input(image, own_statistics(image) if standardize else None)


def _mask_of(sample: Sample, store: ImageStore) -> Tensor:
    if sample.mask is None:
        raise DataError(f"{sample.image}: no mask; save it in gt beside img, same name, .png")
    return store.mask(sample.mask).long()


# ---------------------------------------------------------------- batches


class PretrainingOrder:
    """The keys of an epoch's batches: shuffled training images, after one annotated image if any.

    Fewer images than ``batch_size`` make one batch of all; a last partial batch is left out.
    """

    def __init__(self, num_images: int, num_annotated: int, batch_size: int, seed: int) -> None:
        self.num_images, self.num_annotated, self.seed = num_images, num_annotated, seed
        self.batch_size = min(batch_size, num_images)
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size if self.num_images else 0

    def __iter__(self) -> Iterator[list[Draw]]:
        order = generator(self.seed, TRAIN_ORDER, self.epoch).permutation(self.num_images).tolist()
        for step in range(len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            keys = [Draw(TRAIN, self.epoch, index, index) for index in chosen]
            if self.num_annotated:
                rng = generator(self.seed, ANNOTATED_CHOICE, self.epoch, step)
                ride_along = int(rng.integers(self.num_annotated))
                keys.insert(0, Draw(ANNOTATED, self.epoch, step, ride_along))
            yield keys


class FinetuningOrder:
    """The keys of an epoch's batches: all annotated images shuffled, a last partial batch kept.

    Each image of a batch is in it ``crops`` times, by other random numbers each time.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, crops: int = 1) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.crops = crops
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = generator(self.seed, FINE_ORDER, self.epoch).permutation(self.num_images).tolist()
        for start in range(0, self.num_images, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield [
                Draw(FINE, self.epoch, crop * self.num_images + index, index)
                for index in chosen
                for crop in range(self.crops)
            ]


class Batches:
    """Batches of a dataset, epoch by epoch: ``for batch in batches.epoch(3)``.

    Without worker processes a thread prepares the next batch while the current one is used; with
    them, they live as long as this object. The batches are the same.
    """

    def __init__(
        self,
        dataset: TwoViewDataset | SegmentationDataset,
        order: PretrainingOrder | FinetuningOrder,
        workers: int = 0,
    ) -> None:
        self.dataset, self.order = dataset, order
        self._loader: DataLoader[dict[str, Any]] | None = None
        if workers:
            # DataLoader takes any iterable of lists of keys.
            self._loader = DataLoader(
                dataset,
                batch_sampler=order,
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=True,
            )

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch (counted from 0); ask for one epoch at a time."""
        self.order.epoch = epoch
        if self._loader is not None:
            yield from self._loader
        else:
            yield from _prefetch(self._make, self.order)

    def _make(self, keys: list[Draw]) -> Batch:
        return collate([self.dataset[key] for key in keys])


def _prefetch(make: Callable[[list[Draw]], Batch], keys: Iterable[list[Draw]]) -> Iterator[Batch]:
    """Yield ``make(key)`` in order, one call ahead of the consumer in a single thread."""
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for key in keys:
            following = thread.submit(make, key)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Join items to a batch.

    Tensors are stacked, "group" becomes int64 (B,), "name" and "geometry" lists; "label", which
    only the annotated image at index 0 has, becomes (1, C, H, W).
    """
    batch: Batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items if key in item]
        if isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "group" else values
    return batch


def pretraining_batches(
    train: Sequence[Sample],
    annotated: Sequence[Sample],
    store: ImageStore,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    jitter_strength: float = 0.2,
    random_crop: float = 0.2,
    standardize: bool = False,
    workers: int = 0,
) -> Batches:
    """Batches of {"view_q", "view_k", "geometry", "group", "name"}, see ``TwoViewDataset``.

    When ``annotated`` is not empty, each batch begins with one of its images, drawn anew for every
    step, and has its "label" (1, C, H, W) too; B is then ``batch_size`` + 1.
    """
    dataset = TwoViewDataset(
        train,
        annotated,
        store,
        num_classes=num_classes,
        seed=seed,
        jitter_strength=jitter_strength,
        random_crop=random_crop,
        standardize=standardize,
    )
    return Batches(dataset, PretrainingOrder(len(train), len(annotated), batch_size, seed), workers)


def finetuning_batches(
    samples: Sequence[Sample],
    store: ImageStore,
    *,
    batch_size: int,
    seed: int,
    augmentation: Augmentation = PUBLISHED_AUGMENTATION,
    crops: int = 1,
    standardize: bool = False,
    workers: int = 0,
) -> Batches:
    """Batches of {"image", "mask", "name"}, see ``SegmentationDataset`` and ``FinetuningOrder``."""
    dataset = SegmentationDataset(
        samples, store, seed=seed, augmentation=augmentation, standardize=standardize
    )
    return Batches(dataset, FinetuningOrder(len(samples), batch_size, seed, crops), workers)
