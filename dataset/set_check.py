"""Look at a set that is laid out: counts, class shares, leaks between training and test, a sheet.

A leak is a test image that training has seen: the same pixels in any of the eight orientations
(rotated, mirrored), or nearly the same ones. Near copies are found by the correlation of pictures
reduced to 32x32 without their broad shading. Parts of an image, and shifted crops of one field, are
not found; a sample id that occurs in training and in test tells of those.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data import Sample, find_split, parse_name
from dataset.check import LAYOUT, Problems, SetCheck, size_text, where_left
from dataset.set_file import SetFile, read_set_file
from imaging.data_bar import Bar, bar_lines
from imaging.drawing import (
    blend,
    default_names,
    legend,
    over_image,
    overview,
    palette,
    save_picture,
    sized,
)
from imaging.imagefile import Array, Pixels, read_image, read_mask
from imaging.store import ImageStore
from utils.files import DataError, left_by_kill, list_names
from utils.metrics import IGNORED
from utils.tables import text

AT_ONCE = 2**28  # bytes of decoded images that are kept: each is looked at once
SIDE = 32  # of the reduced pictures
BLUR = 4.0  # standard deviation, on them, of the Gaussian blur that gives their broad shading
FLATTEST = 0.5  # gray levels: a reduced picture with less contrast resembles any other
SHOWN = 10  # lines of one kind
TURNED = "rotated or mirrored too"
MOST_PAIRS, PANEL = 24, 196  # on the contact sheet; side of a picture in pixels
Vectors = NDArray[np.float32]
Counts = NDArray[np.int64]


class Entry(NamedTuple):
    """An image for the table of splits: where it comes from, (H, W), pixels of each mask value."""

    batch: str
    sample: str
    size: tuple[int, ...]
    counts: Counts | None  # (256,); None without a mask


@dataclass(frozen=True)
class Seen:
    """What is kept of an image: no pixels."""

    split: str
    sample: Sample
    entry: Entry
    digest: str
    vector: Vectors

    @property
    def name(self) -> str:
        """Folder and file name."""
        return f"{self.split}/{self.sample.name}"


def check_set(
    root: Path, num_classes: int = 0, sheet: Path | None = None, near: float = 0.9
) -> tuple[list[str], Problems]:
    """Look at a set; the lines of the report, and problems: files that training would refuse.

    ``num_classes`` 0 takes the highest id + 1; ``sheet`` is the PNG of the contact sheet; pictures
    correlated by ``near`` or more are near copies. Raises UserError if there is no such
    set, or the sheet cannot be written.
    """
    if not os.path.isdir(root):
        old = left_by_kill(root)
        cure = where_left(old) if old else "correct --check"
        raise DataError(f"{root}: no such folder; {cure}")
    splits = [p.name for p in list_names(root) if os.path.isdir(p / "img")]
    if not splits:
        raise DataError(f"{root}: no folder with img in it; the layout is\n{LAYOUT}")
    problems, bars = Problems(), dict[Path, list[Bar]]()
    seen = {split: list(_look(root, split, num_classes, problems, bars)) for split in splits}
    everything = [s for own in seen.values() for s in own]
    masks = [s.entry.counts for s in everything if s.entry.counts is not None]
    highest = max((int(np.flatnonzero(m[:IGNORED]).max(initial=0)) for m in masks), default=0)
    classes = num_classes or highest + 1
    lines = [f"{root}: {classes} classes{'' if num_classes else ' (highest id + 1)'}", ""]
    lines += splits_table({split: [s.entry for s in own] for split, own in seen.items()}, classes)
    lines += ["", *_annotated(seen, classes), *_leaks(everything, near)]
    lines += bar_lines(bars)
    wanted = ("train_numf", "test_numf", "sup_num1_0")
    lines += [f"{name}: not there; some stages need it" for name in wanted if name not in splits]
    known = None
    with problems.collect():
        known = read_set_file(root)
    if sheet is not None and masks and _draw_sheet(sheet, everything, classes, known):
        lines.append(f"contact sheet: {sheet}")
    return lines, problems


def _look(
    root: Path, split: str, num_classes: int, problems: Problems, bars: dict[Path, list[Bar]]
) -> Iterator[Seen]:
    """Read the images and masks of a folder; ``bars`` gets the data bars of each image."""
    store = ImageStore(ignore_label=IGNORED, cache=AT_ONCE)
    check = SetCheck(root, num_classes or IGNORED, store)
    has_masks = os.path.isdir(root / split / "gt")
    for sample in find_split(root, split):
        with problems.collect():
            check.image(sample)
            bars |= check.bars
            counts = None
            if has_masks:
                with problems.collect():
                    check.mask(sample)
                if sample.mask is not None:
                    mask = check.store.mask(sample.mask).numpy()
                    counts = np.bincount(mask.ravel(), minlength=256)
            image = check.store.image(sample.image).permute(1, 2, 0).squeeze(2).numpy()
            batch, number = parse_name(sample.image.stem)
            entry = Entry(batch, f"{batch}_{number}", image.shape[:2], counts)
            yield Seen(split, sample, entry, same_in_any_orientation(image), reduce(image))


def orientations(pixels: Array) -> list[Array]:
    """The picture (H, W, ...) turned by 0, 90, 180, 270 degrees, and the same mirrored."""
    return [np.rot90(p, k) for p in (pixels, pixels[:, ::-1]) for k in range(4)]


def same_in_any_orientation(image: Pixels) -> str:
    """A hash that is the same for a picture and its seven rotated and mirrored copies."""
    return min(
        hashlib.sha256(repr(p.shape).encode() + np.ascontiguousarray(p).tobytes()).hexdigest()
        for p in orientations(image)
    )


def reduce(image: Pixels) -> Vectors:
    """Picture (H, W) or (H, W, 3) -> (32, 32) without broad shading, of length 1 (or all 0)."""
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    fine = small - cv2.GaussianBlur(small, (0, 0), BLUR)
    fine = np.asarray(fine - fine.mean(), np.float32)
    if fine.std() < FLATTEST:
        return np.zeros_like(fine)
    return np.asarray(fine / np.linalg.norm(fine), np.float32)


def best_correlation(
    ours: Sequence[Vectors], others: Sequence[Vectors], block: int = 32
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For each of ``ours``, in any orientation: the highest correlation and which of ``others``.

    The products are made for ``block`` pictures at once, so memory stays small.
    """
    columns = np.array(others, np.float32).reshape(len(others), -1).T
    best, which = [], []
    for start in range(0, len(ours), block):
        turned = np.array([orientations(v) for v in ours[start : start + block]])
        products = turned.reshape(-1, SIDE * SIDE) @ columns
        values = products.reshape(len(turned), 8, -1).max(axis=1)
        best.append(values.max(axis=1))
        which.append(values.argmax(axis=1))
    return np.concatenate(best), np.concatenate(which)


def _leaks(seen: list[Seen], near: float) -> list[str]:
    """Lines on test images that are elsewhere too, and on copies within a split."""
    tests = [s for s in seen if s.split.startswith("test")]
    others = [s for s in seen if not s.split.startswith("test")]
    others.sort(key=lambda s: s.split.startswith("sup"))  # they are copies of training images
    digests = {s.digest: s for s in reversed(others)}  # the first of the same wins
    same, alike = [], list[tuple[float, str]]()
    if tests and others:
        best, which = best_correlation([s.vector for s in tests], [s.vector for s in others])
        for test, correlation, index in zip(tests, best.tolist(), which.tolist(), strict=True):
            if test.digest in digests:
                same.append(f"{test.name} = {digests[test.digest].name}")
            elif correlation >= near:
                text = f"{test.name} ~ {others[index].name} ({correlation:.3f})"
                alike.append((-correlation, text))
    alike.sort(key=lambda copy: copy[0])  # the closest first
    named = ({s.entry.sample for s in part if s.entry.batch} for part in (tests, others))
    both = sorted(set.intersection(*named))
    head = f"copies of training images in test, {TURNED}: {len(same)} of {len(tests)}"
    lines = _listed(head, same)
    head = f"near copies in test, correlation {near:g} and more: {len(alike)} of {len(tests)}"
    lines += _listed(head, [text for _, text in alike])
    lines += _listed(f"samples (batch_sampleID) both in test and elsewhere: {len(both)}", both)
    for split in dict.fromkeys(s.split for s in seen if not s.split.startswith("sup")):
        own = [s.digest for s in seen if s.split == split]
        extra = len(own) - len(set(own))
        if extra:
            lines.append(f"copies within {split}, {TURNED}: {extra}")
    return lines


def _listed(head: str, items: list[str]) -> list[str]:
    """A line, and the first items indented below it."""
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [head, *(f"  {item}" for item in items[:SHOWN] + more)]


def splits_table(
    splits: Mapping[str, Sequence[Entry]], classes: int, samples: str = "samples"
) -> list[str]:
    """Lines of a table: images, sizes and shares of the C classes in each split, sup_* last.

    ``samples`` is the head of the column that counts ``Entry.sample``.
    """
    share = "size; share of class 0, 1, ..."
    rows: list[tuple[object, ...]] = [("split", "images", "masks", samples, "batches", share)]
    for split, own in sorted(splits.items(), key=lambda s: (s[0].startswith("sup"), s[0])):
        sizes = [n for n, _ in Counter(size_text(entry.size) for entry in own).most_common()]
        about = ", ".join(sizes[:2] + ["..."] * (len(sizes) > 2))
        masks = [entry.counts for entry in own if entry.counts is not None]
        if masks:
            total = np.sum(masks, axis=0)
            about += f"; {share_text(total[:classes])}"
            if total[IGNORED] and classes <= IGNORED:
                about += f"; {total[IGNORED]} pixels without a label (255)"
        ids, batches = {e.sample for e in own}, {e.batch for e in own if e.batch}
        rows.append((split, len(own), len(masks), len(ids), len(batches), about))
    return text(rows)


def share_text(counts: Counts) -> str:
    """Shares of the pixels (C,) as text, such as ``.729 .146 .125``; '-' when there is none."""
    shares = counts / counts.sum() if counts.any() else []
    return " ".join(f"{share:.3f}".removeprefix("0") for share in shares) or "-"


def missing_classes(splits: Mapping[str, Sequence[Entry]], classes: int) -> list[str]:
    """A line for each split with masks of which none shows one of the C classes."""
    lines = []
    for split, own in sorted(splits.items()):
        masks = [entry.counts for entry in own if entry.counts is not None]
        absent = np.flatnonzero(np.sum(masks, axis=0)[:classes] == 0).tolist() if masks else []
        if absent:
            lines.append(f"{split}: class {', '.join(map(str, absent))} does not occur")
    return lines


def _annotated(seen: Mapping[str, list[Seen]], classes: int) -> list[str]:
    """Classes that annotated images miss, and annotated images that training does not have."""
    lines = []
    train = {s.digest for s in seen.get("train_numf", [])}
    annotated = [(split, own) for split, own in seen.items() if split.startswith("sup_")]
    for split, own in annotated:
        lines += missing_classes({split: [s.entry for s in own]}, classes)
        for s in own:
            if len(own) > 1:
                lines += [f"  {line}" for line in missing_classes({s.name: [s.entry]}, classes)]
            if s.entry.counts is not None and s.digest not in train:
                lines.append(f"  {s.name}: is not in train_numf")
    if not annotated:
        return ["no folder of annotated images (sup_num1_0, ...)"]
    return lines or ["every annotated image shows every class"]


def _draw_sheet(path: Path, seen: list[Seen], classes: int, known: SetFile | None) -> bool:
    """Pairs of image and classes above 0 in colour (no class: white), evenly from outside sup_*.

    It has a legend and a scale, and says how many images it leaves out. False if there is nothing
    to draw.
    """
    masked = [s for s in seen if s.entry.counts is not None]
    choice = [s for s in masked if not s.split.startswith("sup")] or masked
    colours = np.full((256, 3), 255, np.uint8)
    colours[:classes] = palette(classes)
    pictures, names, scales, widths = [], [], [], []
    take = np.linspace(0, len(choice) - 1, min(MOST_PAIRS, len(choice))).round().astype(int)
    for s in (choice[i] for i in take.tolist()):
        image, mask = read_image(s.sample.image), read_mask(str(s.sample.mask))
        if mask.shape != image.shape[:2]:
            continue  # reported as a problem
        gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        pair = blend(image, np.zeros_like(mask), colours, PANEL), blend(gray, mask, colours, PANEL)
        pictures.append(np.hstack(pair))
        names.append(s.name)
        scales.append((mask.shape[1], known.scale_of(s.sample.name) if known else None))
        widths.append(pair[0].shape[1])
    if not pictures:
        return False
    titles, bar = sized(names, scales, widths)
    evenly = ", taken evenly" if len(pictures) < len(choice) else ""
    heading = f"{len(pictures)} of {len(choice)} images with masks{evenly}"
    heading += "; their copies in sup_* left out" if len(choice) < len(masked) else ""
    sheet = overview(pictures, titles, heading)
    words = known.class_names if known else ()
    named = list(words) if len(words) == classes else default_names(classes)
    key = legend([*over_image(named), "no class"], colours[: classes + 1], sheet.shape[1], bar)
    save_picture(path, np.vstack([sheet, key]), "--sheet")
    return True
