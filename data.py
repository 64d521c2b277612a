"""Images and masks of a set: their paths, their augmentation and the batches made of them.

Every random number of a sample comes from a generator seeded by (seed, stream, epoch, number), so
batches depend neither on the number of worker processes nor on what was drawn before.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imaging.store import ImageStore
from pscl.augmentation import Blur, ColorJitter, ContrastJitter, Illumination, Noise
from pscl.geometry import ViewGeometry, Window, warp
from utils.device import upload
from utils.files import IMAGE_SUFFIXES, DataError, list_files, name_key
from utils.metrics import IGNORED
from utils.ranks import group

MASK_SUFFIX = ".png"
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)
SMALLEST_DEVIATION = 1 / 255  # of an image normalised by its own pixels: one gray level
TRIES = 8  # of drawing a crop that shows labels
MOST_REPEATS = 5  # choices of the annotated images that are run when --repeats is not given
# Streams of random numbers, one for each purpose.
TRAIN, ANNOTATED, FINE, TRAIN_ORDER, ANNOTATED_CHOICE, FINE_ORDER, STATISTICS = range(1, 8)

Batch = dict[str, Any]
Statistics = tuple[float, float]
"""Mean and standard deviation of an image's own pixels, 0 = black, 1 = white."""


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
    """Production batch and sample id of ``<ProductionBatch>_<sampleID>_x_x``, a file name's stem.

    The separator is '-' when there is no '_'. A name without two fields has no batch: ('', stem).
    """
    fields = stem.split("_" if "_" in stem else "-")
    if len(fields) < 2 or not fields[0] or not fields[1]:
        return "", stem
    return fields[0], fields[1]


def find_split(data_dir: str | Path, split: str) -> list[Sample]:
    """Images of ``data_dir/split/img``, sorted by name, with their masks in ``gt``.

    A missing folder has no images; one that may not be listed raises DataError.
    """
    folder = Path(data_dir) / split
    masks = {name_key(p.stem): p for p in list_files(folder / "gt", [MASK_SUFFIX])}
    images = list_files(folder / "img", IMAGE_SUFFIXES)
    return [Sample(path, masks.get(name_key(path.stem))) for path in images]


def samples_of_test(store: ImageStore, data_dir: str | Path) -> list[Sample]:
    """The test set; empty where ``test_numf`` holds no image, or no file at all in its ``gt``.

    Images alone are no test set: nothing can be scored on them. As ``listed_split``.
    """
    key = (Path(data_dir, "test_numf"), "scored")
    if key not in store.lists:
        masks = list_files(Path(data_dir) / "test_numf" / "gt")
        store.lists[key] = listed_split(store, data_dir, "test_numf") if masks else []
    return store.lists[key]


def listed_split(store: ImageStore, data_dir: str | Path, split: str) -> list[Sample]:
    """``find_split``, once for a store: whoever asks again gets the images that were checked."""
    key = Path(data_dir, split)
    if key not in store.lists:
        store.lists[key] = find_split(data_dir, split)
    return store.lists[key]


def pretraining_samples(
    store: ImageStore, data_dir: str | Path, use_unlabelled: bool
) -> list[Sample]:
    """All training images, and those of ``train_unlabelled`` if wanted, as ``listed_split``."""
    splits = ["train_numf", *["train_unlabelled"] * use_unlabelled]
    return [sample for split in splits for sample in listed_split(store, data_dir, split)]


def annotated_split(data_dir: str | Path, size: str, repeat: int = 0) -> str:
    """Folder name of the annotated images: data size '1', '5', ..., or 'f' (all images)."""
    if size == "f":
        return "sup_numf" if (Path(data_dir) / "sup_numf").is_dir() else "train_numf"
    return f"sup_num{size}_{repeat}"


def annotated_repeats(
    data_dir: str | Path, size: str, repeats: Iterable[int | str] | None = None
) -> tuple[int, ...]:
    """Numbers of the choices of annotated images to run; data size 'f' (all images) has 0 only.

    ``repeats`` None: those of 0 ... 4 that have a folder, or 0 if none has.
    """
    if size == "f":
        return (0,)
    if repeats is not None:
        return tuple(int(r) for r in repeats)
    root = Path(data_dir)
    there = [r for r in range(MOST_REPEATS) if (root / annotated_split(root, size, r)).is_dir()]
    return tuple(there) or (0,)


def number_groups(
    train: Sequence[Sample], annotated: Iterable[Sample] = (), by_batch: bool = True
) -> dict[Path, int]:
    """Image file -> number of its production batch, from 0 in the order of the batches' names.

    Each image without a batch is a group of its own, after the batches; so is every image, if
    ``by_batch`` is False. An annotated image is the first of the training images with its name.
    """
    first = {s.name: s.image for s in reversed(train)}
    files = [(s, s.image) for s in train]
    files += [(s, first.get(s.name, s.image)) for s in annotated]
    keys = {
        s.image: (0, s.batch, "") if s.batch and by_batch else (1, s.name, str(file))
        for s, file in files
    }
    numbers = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {image: numbers[key] for image, key in keys.items()}


def to_input(image: Tensor, own: Statistics | None = None) -> Tensor:
    """Network input of an image: uint8 (1 or 3, H, W) to normalised float32 (3, H, W)."""
    return normalise(image.float() / 255, own)


def normalise(image: Tensor, own: Sequence[Any] | None = None) -> Tensor:
    """Subtract the mean and divide by the standard deviation: float (1 or 3, H, W) to (3, H, W).

    ``own`` is for all channels; None: ``MEAN`` and ``STD`` of each channel. Also for batches.
    """
    if own is not None:
        return ((image - own[0]) / own[1]).expand(*image.shape[:-3], 3, -1, -1)
    mean, std = (upload(torch.tensor(numbers), image.device) for numbers in (MEAN, STD))
    return (image - mean[:, None, None]) / std[:, None, None]


def own_statistics(image: Tensor, inside: Tensor | None = None) -> Statistics:
    """Mean and standard deviation over all values of uint8 (c, H, W); at least one gray level.

    With ``inside``, bool (H, W), over those where it is true. Integer sums make them independent of
    the number of threads.
    """
    values = image if inside is None else image[..., inside]
    counts = torch.bincount(values.flatten(), minlength=256).tolist()
    pixels, total = values.numel(), sum(level * n for level, n in enumerate(counts))
    squares = sum(level * level * n for level, n in enumerate(counts))
    deviation = math.sqrt(pixels * squares - total * total) / pixels
    return total / pixels / 255, max(deviation / 255, SMALLEST_DEVIATION)


def one_hot(mask: Tensor, num_classes: int) -> Tensor:
    """Class ids (..., H, W) to one-hot label maps, float (..., C, H, W), 0 or 255.

    Unlabelled pixels are all 0.
    """
    classes = torch.arange(num_classes, device=mask.device)[:, None, None]
    return (mask[..., None, :, :] == classes).float() * 255  # F.one_hot would wait for a device


def generator(seed: int, stream: int, epoch: int, number: int = 0) -> np.random.Generator:
    """The random numbers of one sample of one epoch."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, epoch, number]))


class Draw(NamedTuple):
    """Which sample to make: image number ``image``, by the generator (stream, epoch, number)."""

    stream: int
    epoch: int
    number: int
    image: int


@dataclass(eq=False)
class TwoViewDataset(Dataset[dict[str, Any]]):
    """Two views of an image (paper: data augmentation; published loader).

    View q is the image with its colours jittered; view k has another jitter, then flip, quarter
    turns, crop and resize. An item is {"view_q", "view_k": float (3, H, W), "geometry":
    ViewGeometry of view k, "group": production-batch number, "name"}, and for an image of
    ``annotated`` also "label": float (C, H, W), its one-hot label map through view k's geometry.
    Without ``by_batch`` every image is a production batch of its own.
    With ``seen``, class ids (H, W) of every image by its file, "seen" is the same of these.

    ``jitter_strength`` is d of the colour jitter, ``random_crop`` the largest part of a side that
    the crop removes. ``standardize`` normalises by the image's own mean and standard deviation,
    taken before the colour jitter, whose brightness and contrast they would undo.

    With ``unfinished`` the views and the mask stay what they are after the colour jitter, uint8
    (c, H, W) and (H, W), with ``own`` beside them; ``finish_views`` makes batches of them complete.
    With ``kept`` items of gray images have no views but what ``stages.kept_images`` makes them of:
    the image's "file", the "corner" (top, left) of its crop, the jitters' "tables", uint8 (2, 256).

    With ``crop`` the views are made of a crop of so many pixels a side, not of the whole image, at
    a place drawn for each item: of an annotated image by ``place_showing_classes``.
    """

    train: Sequence[Sample]
    annotated: Sequence[Sample]
    store: ImageStore
    _: KW_ONLY
    num_classes: int
    seed: int
    jitter_strength: float = 0.2
    random_crop: float = 0.2
    standardize: bool = False
    crop: int = 0
    unfinished: bool = False
    seen: Mapping[Path, Tensor] | None = None
    kept: bool = False
    by_batch: bool = True

    def __post_init__(self) -> None:
        self.groups = number_groups(self.train, self.annotated, self.by_batch)
        self.own: dict[Path, Statistics] = {}  # of whole images, taken once
        self.levels: dict[Path, Tensor] = {}  # likewise how many pixels have each gray level

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng = generator(self.seed, draw.stream, draw.epoch, draw.number)
        sample = (self.annotated if draw.stream == ANNOTATED else self.train)[draw.image]
        path, mask = sample.image, None
        if self.standardize and path not in self.own:
            self.own[path] = own_statistics(self.store.image(path), self.store.inside(path))
        own = self.own.get(path)
        if draw.stream == ANNOTATED and sample.mask is not None:
            mask = self.store.mask(sample.mask)
        ids = {} if self.seen is None else {"seen": self.seen[path]}
        window = self._window(rng, path, mask) if self.crop else (slice(0, None), slice(0, None))
        ids |= {} if mask is None else {"label": mask}
        ids = {key: each[window] for key, each in ids.items()}
        jitters = [ColorJitter.draw(rng, self.jitter_strength) for _ in range(2)]
        geometry = ViewGeometry.draw(rng, self.random_crop)
        item = {"geometry": geometry, "group": self.groups[sample.image], "name": sample.name}
        item |= {"own": torch.tensor(own)} if own and self.unfinished else {}
        if self.kept:
            tables = torch.stack([each.table(self._levels(path, window)) for each in jitters])
            item |= {"file": path, "corner": (window[0].start, window[1].start), "tables": tables}
            return item | ids
        image = self.store.image(path)[(..., *window)]
        view_q, view_k = (each.apply(image) for each in jitters)
        if self.unfinished:
            return item | {"view_q": view_q, "view_k": view_k} | ids
        item["view_q"] = to_input(view_q, own)
        item["view_k"] = normalise(geometry.apply(view_k.float() / 255), own)
        for key, each in ids.items():
            item[key] = geometry.apply(one_hot(each, self.num_classes))
        return item

    def _levels(self, path: Path, window: tuple[slice, slice]) -> Tensor:
        """How many pixels of a gray image's window have each level, (256,)."""
        if path in self.levels:
            return self.levels[path]
        pixels = self.store.image(path)[(..., *window)].flatten()
        counts = torch.bincount(pixels, minlength=256)
        if not self.crop:  # the next time it need not be read
            self.levels[path] = counts
        return counts

    def _window(
        self, rng: np.random.Generator, path: Path, mask: Tensor | None
    ) -> tuple[slice, slice]:
        """Rows and columns of the crop of an image."""
        size = self.store.shape(path)[-2:]
        if mask is None:
            top, left = (int(rng.integers(side - self.crop + 1)) for side in size)
        else:
            top, left = place_showing_classes(rng, mask.numpy(), self.crop)
        return slice(top, top + self.crop), slice(left, left + self.crop)

    def draws(self, epoch: int, batch_size: int) -> list[list[Draw]]:
        """What each batch holds: one annotated image, if there are any, and ``batch_size`` others.

        Fewer images than ``batch_size`` make one batch of all; a last partial batch is left out.
        """
        count = len(self.train)
        order = generator(self.seed, TRAIN_ORDER, epoch).permutation(count).tolist()
        batches = []
        for step in range(count // batch_size or min(count, 1)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            draws = [Draw(TRAIN, epoch, index, index) for index in chosen]
            if self.annotated:
                rng = generator(self.seed, ANNOTATED_CHOICE, epoch, step)
                draws.insert(
                    0, Draw(ANNOTATED, epoch, step, int(rng.integers(len(self.annotated))))
                )
            batches.append(draws)
        return batches


def finish_views(batch: Batch, num_classes: int) -> Batch:
    """A batch of an ``unfinished`` TwoViewDataset as it would be of one that is not.

    Flip, rotation, crop and normalisation are done at once, on the device of the batch. Pixels
    agree within rounding.
    """
    own = batch["own"][:, :, None, None, None].unbind(1) if "own" in batch else None  # (B,1,1,1)
    pixels, geometry = batch["view_k"].float() / 255, batch["geometry"]
    done = {k: v for k, v in batch.items() if k != "own"}
    views = {"view_q": batch["view_q"].float() / 255, "view_k": warp(pixels, geometry)}
    for key, view in views.items():
        done[key] = normalise(view, own).contiguous(memory_format=torch.channels_last)
    for key in {"label", "seen"} & batch.keys():
        label = one_hot(batch[key], num_classes)
        done[key] = warp(label, geometry[: len(label)])
    return done


def place_showing_classes(
    rng: np.random.Generator, mask: NDArray[np.uint8], side: int
) -> tuple[int, int]:
    """Top and left of a crop of ``side`` pixels that shows as many classes of a mask as it can.

    One of the classes, all equally likely, is sure to be in it: of ``TRIES`` crops around pixels of
    that class, the one that shows most classes. ``IGNORED`` is no class.
    """
    shown = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:IGNORED])
    rows, columns = mask.shape
    if not shown.size:
        return int(rng.integers(rows - side + 1)), int(rng.integers(columns - side + 1))
    pixels = np.flatnonzero(mask.ravel() == rng.choice(shown))
    best, most = (0, 0), 0
    for pixel in rng.choice(pixels, TRIES).tolist():
        within = rng.integers(side, size=2).tolist()  # where in the crop the pixel is to be
        middle = zip(divmod(pixel, columns), within, mask.shape, strict=True)
        top, left = (min(max(at - offset, 0), whole - side) for at, offset, whole in middle)
        found = np.bincount(mask[top : top + side, left : left + side].ravel(), minlength=256)
        if (classes := int(np.count_nonzero(found[:IGNORED]))) > most:
            best, most = (top, left), classes
    return best


class Augmentation(NamedTuple):
    """Augmentation of annotated images, besides flip and quarter turns."""

    jitter: float = 0.1  # d of the colour jitter
    contrast: float = 0.0  # d of the contrast jitter, which follows the normalisation
    crop: int = 0  # side of the random crops in pixels; 0: the whole image
    scale: float = 1.0  # largest factor by which they are enlarged or reduced
    rotation: float = 0.0  # largest angle by which they are turned, in degrees
    noise: float = 0.0  # largest standard deviation, in parts of the gray range
    blur: float = 0.0  # largest standard deviation, in pixels
    illumination: float = 0.0  # standard deviation, in parts of the gray range


@dataclass(eq=False)
class SegmentationDataset(Dataset[dict[str, Any]]):
    """Annotated images for fine-tuning and supervised training.

    An item is {"image": float (3, H, W), "mask": int64 (H, W), "name"}; ``standardize`` as for
    ``TwoViewDataset``, by the whole image even if it is cropped. An image is in its batch
    ``crops`` times, with different augmentations.

    With ``steps``, an epoch is one step of the images in turn, in an order drawn anew for every
    round, and a window that shows no label is drawn again, at most ``TRIES`` times. Whole images
    that are not square are brought back to their size when turned, so that they make a batch.
    """

    samples: Sequence[Sample]
    store: ImageStore
    _: KW_ONLY
    seed: int
    augmentation: Augmentation = Augmentation()
    standardize: bool = False
    crops: int = 1
    steps: bool = False

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng = generator(self.seed, draw.stream, draw.epoch, draw.number)
        sample, a = self.samples[draw.image], self.augmentation
        pixels, mask = self.store.image(sample.image), _mask_of(sample, self.store)
        jitter, geometry = ColorJitter.draw(rng, a.jitter), ViewGeometry.draw(rng, random_crop=0.0)
        if self.steps and (a.crop or mask.shape[0] == mask.shape[1]):
            image, mask = self._crop(rng, geometry.cut(pixels), geometry.cut(mask), jitter)
        else:
            image = geometry.apply(jitter.apply(pixels).float() / 255)
            mask = geometry.apply_mask(mask)
            if a.crop or a.scale != 1 or a.rotation:
                window = self._window(rng, mask)
                image, mask = window.apply(image), window.apply_mask(mask)
        if a.illumination:
            image = Illumination.draw(rng, a.illumination).apply(image)
        if a.blur:
            image = Blur.draw(rng, a.blur).apply(image)
        if a.noise:
            image = Noise.draw(rng, a.noise).apply(image)
        own = own_statistics(pixels, self.store.inside(sample.image)) if self.standardize else None
        image = normalise(image, own)
        if a.contrast:
            image = ContrastJitter.draw(rng, a.contrast).apply(image)
        return {"image": image, "mask": mask.long(), "name": sample.name}

    def _window(self, rng: np.random.Generator, mask: Tensor) -> Window:
        """A window of an image; with ``steps`` one that shows a label."""
        a, size = self.augmentation, (mask.shape[0], mask.shape[1])
        window = Window.draw(rng, size, a.crop, a.scale, a.rotation)
        for _ in range(TRIES if self.steps else 0):
            if (window.apply_mask(mask) != IGNORED).any():
                break
            window = Window.draw(rng, size, a.crop, a.scale, a.rotation)
        return window

    def _crop(
        self, rng: np.random.Generator, pixels: Tensor, mask: Tensor, jitter: ColorJitter
    ) -> tuple[Tensor, Tensor]:
        """A crop of uint8 (c, H, W) that shows a label, float (c, h, w), and of its mask.

        Only the part of the image that the crop needs is jittered and resampled.
        """
        window = self._window(rng, mask)
        part, window = window.part(mask.shape[0], mask.shape[1])
        image = jitter.apply(pixels[(..., *part)].contiguous()).float() / 255
        return window.apply(image), window.apply_mask(mask[part])

    def draws(self, epoch: int, batch_size: int) -> list[list[Draw]]:
        """What each batch of an epoch holds: images, shuffled, a last partial batch kept."""
        count = len(self.samples)
        if self.steps:
            places = range(epoch * batch_size, (epoch + 1) * batch_size)
            rounds = {n: self._order(n, count) for n in {place // count for place in places}}
            images = [rounds[place // count][place % count] for place in places]
            return [[Draw(FINE, epoch, number, image) for number, image in enumerate(images)]]
        order = self._order(epoch, count)
        chosen = (order[start : start + batch_size] for start in range(0, count, batch_size))
        crops = range(self.crops)
        return [[Draw(FINE, epoch, c * count + i, i) for i in own for c in crops] for own in chosen]

    def _order(self, number: int, count: int) -> list[int]:
        return generator(self.seed, FINE_ORDER, number).permutation(count).tolist()

    def for_statistics(self, batch_size: int, batches: int) -> Iterator[Tensor]:
        """Images (B, 3, H, W) of as many batches, always the same, that no step is trained on."""
        epochs = chain.from_iterable(self.draws(epoch, batch_size) for epoch in range(batches))
        for draws in islice(epochs, batches):
            own = [self[draw._replace(stream=STATISTICS)]["image"] for draw in draws]
            yield torch.stack(own)


def items_of_test(
    samples: Iterable[Sample], store: ImageStore, standardize: bool = False
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Network input (3, H, W), mask int64 (H, W) and file name of each test image."""
    for sample in samples:
        mask = _mask_of(sample, store).long()
        yield image_input(sample, store, standardize), mask, sample.name


def image_input(sample: Sample, store: ImageStore, standardize: bool = False) -> Tensor:
    """Network input of a sample's image without augmentation: float (3, H, W)."""
    image, inside = store.image(sample.image), store.inside(sample.image)
    return to_input(image, own_statistics(image, inside) if standardize else None)


def _mask_of(sample: Sample, store: ImageStore) -> Tensor:
    if sample.mask is None:
        raise DataError(f"{sample.image}: no mask; save it in gt beside img, same name, .png")
    return store.mask(sample.mask)


class Batches:
    """Batches of a dataset, epoch by epoch: ``for batch in batches.epoch(3)``.

    Without worker processes a thread prepares the next batch while the current one is used, with
    ``epochs`` beyond the end of an epoch. Worker processes live as long as this object; the batches
    are the same. Ranks get their parts of each batch (``part_of_rank``).
    """

    def __init__(
        self, dataset: TwoViewDataset | SegmentationDataset, batch_size: int, workers: int = 0
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.order = dataset.draws(0, batch_size)  # of the epoch that is drawn
        self.steps = len(self.order)
        self._loader: DataLoader[dict[str, Any]] | None = None
        if workers:  # a batch sampler may be any iterable of lists of keys
            processes: dict[str, Any] = {"num_workers": workers, "persistent_workers": True}
            processes["multiprocessing_context"] = _start_method()
            self._loader = DataLoader(
                dataset, batch_sampler=self.order, collate_fn=collate, **processes
            )

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from ``first`` on (from 0); ask for one epoch at a time."""
        if self._loader is None:
            yield from self.epochs([epoch], first)
            return
        self.order[:] = self._draws(epoch, first)
        try:
            yield from self._loader
        except DataError as error:  # with the traceback of the process in front
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix("utils.files.DataError: ")) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "Caught" in str(error):
                raise
            what = "a process that prepares batches was ended by the system"
            raise MemoryError(f"{what}, which it does where memory runs out") from error

    def epochs(self, numbers: Iterable[int], first: int = 0) -> Generator[Batch, None, None]:
        """The batches of epochs in turn, of the first one from ``first`` on, by no worker process.

        Each is prepared in one thread while the one before it is used, be it of another epoch.
        """
        starts = chain([first], repeat(0))
        drawn = (self._draws(n, start) for n, start in zip(numbers, starts, strict=False))
        with ThreadPoolExecutor(1) as thread:
            coming = (thread.submit(self._make, draws) for draws in chain.from_iterable(drawn))
            for pending, _ in pairwise(chain(coming, [Future[Batch]()])):  # the next is submitted
                yield pending.result()

    def _draws(self, epoch: int, first: int) -> list[list[Draw]]:
        """What this rank's part of each batch holds, from ``first`` on."""
        return [part_of_rank(d) for d in self.dataset.draws(epoch, self.batch_size)[first:]]

    def _make(self, draws: list[Draw]) -> Batch:
        return collate([self.dataset[draw] for draw in draws])


def _start_method() -> str | None:
    """How worker processes start: forked on Linux, unless the process chose; else Python's way.

    Forked ones share the decoded images (of 200 MB, two workers had 240 MB each and a batch after
    0.1 s; by Python 3.14's fork server 720 MB and 7 s, and outlived a training that was killed).
    Python 3.12 warns of locks of other threads; when an epoch begins none of ours reads images.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return "fork" if sys.platform == "linux" and chosen is None else None


def part_of_rank(draws: list[Draw]) -> list[Draw]:
    """The part of a batch that is this rank's: its share of the images, in the order of the ranks.

    In pretraining an annotated image in front is every rank's, and the others have to divide among
    the ranks. In training with labels some ranks may have one image more; a batch of fewer images
    than ranks is everybody's as a whole, so that its mean over the ranks is its own.
    """
    shared = [draw for draw in draws[:1] if draw.stream == ANNOTATED]
    others, rank, ranks = draws[len(shared) :], group.rank(), group.size()
    count = len(others)
    if count % ranks and draws[-1].stream != FINE:
        raise ValueError(f"{count} images do not divide among {ranks} ranks")
    if count < ranks:
        return draws
    return shared + others[rank * count // ranks : (rank + 1) * count // ranks]


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Join items to a batch: tensors are stacked, "group" becomes int64 (B,), others are lists.

    "label", which only the annotated image at index 0 has, becomes (1, C, H, W). Gray 8-bit images
    beside colour ones get three channels.
    """
    batch: Batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items if key in item]
        if isinstance(first, Tensor):
            if key in ("view_q", "view_k"):
                channels = max(len(value) for value in values)
                values = [value.expand(channels, -1, -1) for value in values]
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "group" else values
    return batch
