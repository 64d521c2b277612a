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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data import Sample, find_split, parse_name
from dataset.check import Problems, SetCheck, size_text
from dataset.layout import LAYOUT
from utils.drawing import colour_mask, overview, palette, save_picture
from utils.files import DataError, list_names
from utils.imagefile import Array, ImageStore, Pixels, read_image, read_mask
from utils.metrics import IGNORED
from utils.tables import text

SIDE = 32  # of the reduced pictures
BLUR = 4.0  # standard deviation, on the reduced picture, of the shading that is taken away
FLATTEST = 0.5  # gray levels: a reduced picture with less contrast is like any other
SHOWN = 10  # lines of one kind
TURNED = "rotated or mirrored too"
SIZE = "size; share of class 0, 1, ..."
MOST_PAIRS, PAIR = 24, 400  # on the contact sheet; its width and height in pixels
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What is kept of an image: no pixels."""

    split: str
    sample: Sample
    size: tuple[int, int]
    digest: str
    vector: Vectors
    counts: NDArray[np.int64] | None  # (256,) pixels of each mask value

    @property
    def name(self) -> str:
        """Folder and file name."""
        return f"{self.split}/{self.sample.name}"

    @property
    def ids(self) -> tuple[str, str]:
        """Production batch and sample id, see ``parse_name``."""
        return parse_name(self.sample.image.stem)


class Copy(NamedTuple):
    """A test image and the image elsewhere that is like it; correlation 1 when it is the same."""

    test: Seen
    other: Seen
    correlation: float


def check_set(
    root: Path, *, num_classes: int = 0, sheet: Path | None = None, near: float = 0.9
) -> tuple[list[str], Problems]:
    """Look at a set and draw its contact sheet.

    Args:
        root: the set's folder.
        num_classes: C; 0 takes the highest id + 1.
        sheet: PNG to write, None for none.
        near: correlation from which on two pictures are near copies.

    Returns:
        Lines of the report, and problems (files that training would refuse), a line each.

    Raises:
        UserError: there is no such set, or the sheet cannot be written.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; correct --check")
    splits = [p.name for p in list_names(root) if os.path.isdir(p / "img")]
    if not splits:
        raise DataError(f"{root}: no folder with img in it; the layout is\n{LAYOUT}")
    problems = Problems()
    seen = [s for split in splits for s in _look(root, split, num_classes, problems)]
    classes = num_classes or 1 + max((_highest(s) for s in seen), default=0)
    lines = [f"{root}: {classes} classes{'' if num_classes else ' (highest id + 1)'}", ""]
    lines += [*_table(splits, seen, classes), "", *_annotated(seen, classes)]
    lines += [*_leaks(seen, near), *_expected(splits)]
    if sheet is not None and any(s.counts is not None for s in seen):
        _draw_sheet(sheet, seen, classes)
        lines.append(f"contact sheet: {sheet}")
    return lines, problems


def _look(root: Path, split: str, num_classes: int, problems: Problems) -> Iterator[Seen]:
    """Read the images and masks of a folder."""
    check = SetCheck(root, num_classes or IGNORED, ImageStore(ignore_label=IGNORED))
    has_masks = os.path.isdir(root / split / "gt")
    for sample in find_split(root, split):
        with problems.collect():
            check.image(sample)
            counts = None
            if has_masks:
                with problems.collect():
                    check.mask(sample)
                if sample.mask is not None:
                    mask = check.store.mask(sample.mask).numpy()
                    counts = np.bincount(mask.ravel(), minlength=256)
            image = check.store.image(sample.image).permute(1, 2, 0).squeeze(2).numpy()
            size = check.store.file_size("image", sample.image)
            yield Seen(split, sample, size, same_in_any_orientation(image), reduce(image), counts)


def _highest(seen: Seen) -> int:
    if seen.counts is None:
        return 0
    return int(max(np.flatnonzero(seen.counts[:IGNORED]), default=0))


# ---------------------------------------------------------------- copies


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


def find_copies(tests: Sequence[Seen], others: Sequence[Seen], near: float) -> list[Copy]:
    """Test images that are copies of an image elsewhere, the closest first."""
    if not tests or not others:
        return []
    others = sorted(others, key=lambda s: s.split.startswith("sup"))  # copies of training images
    digests = {s.digest: s for s in reversed(others)}  # the first of the same wins
    best, which = best_correlation([s.vector for s in tests], [s.vector for s in others])
    copies = []
    for test, correlation, index in zip(tests, best.tolist(), which.tolist(), strict=True):
        if test.digest in digests:
            copies.append(Copy(test, digests[test.digest], 1.0))
        elif correlation >= near:
            copies.append(Copy(test, others[index], correlation))
    return sorted(copies, key=lambda copy: -copy.correlation)


def _leaks(seen: list[Seen], near: float) -> list[str]:
    tests = [s for s in seen if s.split.startswith("test")]
    others = [s for s in seen if not s.split.startswith("test")]
    same, alike = [], []
    for test, other, correlation in find_copies(tests, others, near):
        if test.digest == other.digest:
            same.append(f"{test.name} = {other.name}")
        else:
            alike.append(f"{test.name} ~ {other.name} ({correlation:.3f})")
    in_test, elsewhere = ({s.ids for s in part if s.sample.batch} for part in (tests, others))
    both = sorted("_".join(ids) for ids in in_test & elsewhere)
    count = f"of {len(tests)}"
    lines = _listed(f"copies of training images in test, {TURNED}: {len(same)} {count}", same)
    lines += _listed(
        f"near copies in test, correlation {near:g} and more: {len(alike)} {count}", alike
    )
    lines += _listed(f"samples (batch_sampleID) both in test and elsewhere: {len(both)}", both)
    for split in sorted({s.split for s in seen if not s.split.startswith("sup")}):
        own = [s.digest for s in seen if s.split == split]
        extra = len(own) - len(set(own))
        if extra:
            lines.append(f"copies within {split}, {TURNED}: {extra}")
    return lines


def _listed(head: str, items: list[str]) -> list[str]:
    """A line, and the first items indented below it."""
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [head, *(f"  {item}" for item in items[:SHOWN] + more)]


# ---------------------------------------------------------------- report


def share_text(counts: NDArray[np.int64]) -> str:
    """Shares of the pixels (C,) as text, such as ``.729 .146 .125``; '-' when there is none."""
    total = int(counts.sum())
    if not total:
        return "-"
    return " ".join(f"{v / total:.3f}".removeprefix("0") for v in counts.tolist())


def _table(splits: list[str], seen: list[Seen], classes: int) -> list[str]:
    rows: list[tuple[object, ...]] = [("split", "images", "masks", "samples", "batches", SIZE)]
    for split in splits:
        own = [s for s in seen if s.split == split]
        ids = {s.ids for s in own}
        batches = {batch for batch, _ in ids if batch}
        sizes = [size for size, _ in Counter(size_text(s.size) for s in own).most_common()]
        size = ", ".join(sizes[:2] + ["..."] * (len(sizes) > 2))
        masks = [s.counts for s in own if s.counts is not None]
        if masks:
            total = np.sum(masks, axis=0)
            size += f"; {share_text(total[:classes])}"
            if total[IGNORED] and classes <= IGNORED:
                size += f"; {total[IGNORED]} pixels without a label (255)"
        rows.append((split, len(own), len(masks), len(ids), len(batches), size))
    return text(rows)


def _annotated(seen: list[Seen], classes: int) -> list[str]:
    """Classes that annotated images miss, and annotated images that training does not have."""
    lines = []
    train = {s.digest for s in seen if s.split == "train_numf"}
    splits = sorted({s.split for s in seen if s.split.startswith("sup_")})
    for split in splits:
        own = [s for s in seen if s.split == split]
        masks = [s.counts for s in own if s.counts is not None]
        absent = _absent(np.sum(masks, axis=0) if masks else np.zeros(256, int), classes)
        if absent:
            lines.append(f"{split}: class {absent} does not occur")
        for s in own:
            if s.counts is not None:
                if len(own) > 1 and _absent(s.counts, classes):
                    lines.append(f"  {s.name}: without class {_absent(s.counts, classes)}")
                if s.digest not in train:
                    lines.append(f"  {s.name}: is not in train_numf")
    if not splits:
        return ["no folder of annotated images (sup_num1_0, ...)"]
    return lines or ["every annotated image shows every class"]


def _absent(counts: NDArray[np.int64], classes: int) -> str:
    return ", ".join(str(c) for c in range(classes) if not counts[c])


def _expected(splits: list[str]) -> list[str]:
    wanted = ("train_numf", "test_numf", "sup_num1_0")
    return [f"{name}: not there; some stages need it" for name in wanted if name not in splits]


# ---------------------------------------------------------------- contact sheet


def overlay(image: Pixels, mask: Pixels, classes: int) -> Pixels:
    """The image in gray with the classes above 0 coloured, white where a value is no class."""
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    shown = np.repeat(gray[..., None], 3, axis=2).astype(np.float32)
    inside = mask < classes
    colours = colour_mask(np.where(inside, mask, 0), classes).astype(np.float32)
    marked = inside & (mask > 0)
    shown[marked] = 0.45 * shown[marked] + 0.55 * colours[marked]
    shown[~inside] = 255
    return shown.astype(np.uint8)


def _draw_sheet(path: Path, seen: list[Seen], classes: int) -> None:
    """Pairs image | overlay, taken evenly from the images with masks outside sup_*."""
    with_masks = [s for s in seen if s.counts is not None]
    choice = [s for s in with_masks if not s.split.startswith("sup")] or with_masks
    take = np.linspace(0, len(choice) - 1, min(MOST_PAIRS, len(choice))).round().astype(int)
    pictures = [palette(classes).repeat(PAIR // classes or 1, axis=0)[None].repeat(40, axis=0)]
    titles = [f"colours of class 0 ... {classes - 1}"]
    for s in (choice[i] for i in take.tolist()):
        image, mask = read_image(s.sample.image), read_mask(s.sample.mask)
        if mask.shape == image.shape[:2]:  # otherwise it is reported as a problem
            plain = np.asarray(Image.fromarray(image).convert("RGB"))
            pair = Image.fromarray(np.hstack([plain, overlay(image, mask, classes)]))
            pictures.append(np.asarray(ImageOps.contain(pair, (PAIR, PAIR))))
            titles.append(s.name)
    save_picture(path, overview(pictures, titles), "--sheet")
