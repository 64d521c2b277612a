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
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data import LAYOUT, Sample, find_split, parse_name
from utils.drawing import colour_mask, palette
from utils.imagefile import DataError, Pixels, read_image, read_mask
from utils.metrics import IGNORED

SIDE = 32  # of the reduced pictures
BLUR = 4.0  # standard deviation, on the reduced picture, of the shading that is taken away
FLATTEST = 0.5  # gray levels: a reduced picture with less contrast is like any other
SHOWN = 10  # lines of one kind
MOST_PAIRS, PAIRS_A_ROW, PANEL, GAP, LINE = 24, 3, 176, 8, 20
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


@dataclass(frozen=True)
class Copy:
    """A test image and the image elsewhere that is like it; correlation 1 when it is the same."""

    test: Seen
    other: Seen
    correlation: float


def check_set(
    root: Path, *, num_classes: int = 0, sheet: Path | None = None, near: float = 0.9
) -> tuple[list[str], list[str]]:
    """Look at a set and draw its contact sheet.

    Args:
        root: the set's folder.
        num_classes: C; 0 takes the highest id + 1.
        sheet: PNG to write, None for none.
        near: correlation from which on two pictures are near copies.

    Returns:
        Lines of the report, and problems (files that training would refuse), a line each.

    Raises:
        DataError: there is no such set, or the sheet cannot be written.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; correct --check")
    try:
        splits = sorted(p.name for p in root.iterdir() if os.path.isdir(p / "img"))
    except OSError as error:
        raise DataError(
            f"{root}: cannot be listed ({error.strerror}); check its permissions"
        ) from None
    if not splits:
        raise DataError(f"{root}: no folder with img in it; the layout is\n{LAYOUT}")
    problems: list[str] = []
    seen = [s for split in splits for s in _look(root, split, problems)]
    highest = max((_highest(s) for s in seen), default=0)
    classes = num_classes or highest + 1
    for s in seen:
        if _highest(s) >= classes:
            text = f"{s.sample.mask}: value {_highest(s)} in a mask of {classes} classes"
            problems.append(f"{text}; correct the mask or --num_classes")
    lines = [f"{root}: {classes} classes{'' if num_classes else ' (highest id + 1)'}", ""]
    lines += [*_table(splits, seen, classes), "", *_annotated(seen, classes)]
    lines += [*_leaks(seen, near), *_expected(splits)]
    if sheet is not None and any(s.counts is not None for s in seen):
        _draw_sheet(sheet, seen, classes)
        lines.append(f"contact sheet: {sheet}")
    return lines, problems


def _look(root: Path, split: str, problems: list[str]) -> Iterator[Seen]:
    """Read the images and masks of a folder."""
    has_masks = os.path.isdir(root / split / "gt")
    for sample in find_split(root, split):
        try:
            image = read_image(sample.image)
            counts = None
            if sample.mask is not None:
                mask = read_mask(sample.mask)
                counts = np.bincount(mask.ravel(), minlength=256)
                if mask.shape != image.shape[:2]:
                    text = f"{sample.mask}: {_size(mask.shape)}, its image {_size(image.shape)}"
                    problems.append(f"{text}; a mask has the size of its image")
        except DataError as error:
            problems.append(str(error))
            continue
        if sample.mask is None and has_masks:
            wanted = root / split / "gt" / f"{sample.image.stem}.png"
            problems.append(f"{sample.image}: no mask; save it as {wanted}")
        size = image.shape[0], image.shape[1]
        yield Seen(split, sample, size, same_in_any_orientation(image), reduce(image), counts)


def _highest(seen: Seen) -> int:
    if seen.counts is None:
        return 0
    return int(max(np.flatnonzero(seen.counts[:IGNORED]), default=0))


# ---------------------------------------------------------------- copies


def orientations(pixels: NDArray[Any]) -> list[NDArray[Any]]:
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
    ours: Sequence[Vectors], others: Sequence[Vectors], block: int = 256
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For each of ``ours``, in any orientation: the highest correlation and which of ``others``.

    The products are made in blocks of 8 * ``block`` by 8 * ``block``, so memory stays small.
    """
    best = np.full(len(ours), -1, np.float32)
    which = np.zeros(len(ours), np.int64)
    columns = np.array(others, np.float32).reshape(len(others), -1)
    for start in range(0, len(ours), block):
        turned = np.array([orientations(v) for v in ours[start : start + block]])
        rows = turned.reshape(len(turned) * 8, -1)
        for first in range(0, len(others), 8 * block):
            part = rows @ columns[first : first + 8 * block].T
            values = part.reshape(len(turned), 8, -1).max(1)
            top = values.max(1)
            better = np.flatnonzero(top > best[start : start + block])
            best[start + better] = top[better]
            which[start + better] = first + values.argmax(1)[better]
    return best, which


def find_copies(seen: Sequence[Seen], near: float) -> list[Copy]:
    """Test images (folders test*) that are copies of an image elsewhere, the closest first."""
    tests = [s for s in seen if s.split.startswith("test")]
    others = [s for s in seen if not s.split.startswith("test")]
    others.sort(key=lambda s: s.split.startswith("sup"))  # copies of training images come last
    if not tests or not others:
        return []
    digests = {s.digest: s for s in reversed(others)}  # the first of the same wins
    best, which = best_correlation([s.vector for s in tests], [s.vector for s in others])
    copies = []
    for i, test in enumerate(tests):
        if test.digest in digests:
            copies.append(Copy(test, digests[test.digest], 1.0))
        elif best[i] >= near:
            copies.append(Copy(test, others[which[i]], float(best[i])))
    return sorted(copies, key=lambda c: -c.correlation)


def _leaks(seen: list[Seen], near: float) -> list[str]:
    copies = find_copies(seen, near)
    same = [c for c in copies if c.test.digest == c.other.digest]
    alike = [c for c in copies if c.test.digest != c.other.digest]
    tests = sum(s.split.startswith("test") for s in seen)
    lines = [f"copies of training images in test, rotated or mirrored too: {len(same)} of {tests}"]
    lines += _first([f"  {c.test.name} = {c.other.name}" for c in same])
    lines.append(f"near copies in test, correlation {near:g} and more: {len(alike)} of {tests}")
    lines += _first([f"  {c.test.name} ~ {c.other.name} ({c.correlation:.3f})" for c in alike])
    ids: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for s in seen:
        batch, sample = parse_name(s.sample.image.stem)
        if batch:
            ids[s.split.startswith("test")].add((batch, sample))
    both = sorted("_".join(pair) for pair in ids[True] & ids[False])
    lines.append(f"samples (batch_sampleID) both in test and elsewhere: {len(both)}")
    lines += _first([f"  {name}" for name in both])
    for split in sorted({s.split for s in seen if not s.split.startswith("sup")}):
        own = Counter(s.digest for s in seen if s.split == split)
        extra = sum(own.values()) - len(own)
        if extra:
            lines.append(f"copies within {split}, rotated or mirrored too: {extra}")
    return lines


def _first(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


# ---------------------------------------------------------------- report


def share_text(counts: NDArray[np.int64]) -> str:
    """Shares of the pixels (C,) as text, such as ``.729 .146 .125``; '-' when there is none."""
    total = int(counts.sum())
    if not total:
        return "-"
    return " ".join(f"{v / total:.3f}".removeprefix("0") for v in counts.tolist())


def _table(splits: list[str], seen: list[Seen], classes: int) -> list[str]:
    lines = [f"{'split':17}images  masks samples batches  size; share of class 0, 1, ..."]
    for split in splits:
        own = [s for s in seen if s.split == split]
        pairs = {parse_name(s.sample.image.stem) for s in own}
        batches = {batch for batch, _ in pairs if batch}
        sizes = Counter(_size(s.size) for s in own).most_common()
        size = ", ".join(text for text, _ in sizes[:2]) + (", ..." if len(sizes) > 2 else "")
        masks = [s.counts for s in own if s.counts is not None]
        shares = ""
        if masks:
            total = np.sum(masks, axis=0)
            shares = f"; {share_text(total[:classes])}"
            if total[IGNORED] and classes <= IGNORED:
                shares += f"; {total[IGNORED]} pixels without a label (255)"
        row = f"{split:17}{len(own):6}{len(masks):7}{len(pairs):8}{len(batches):8}  {size}{shares}"
        lines.append(row.rstrip())
    return lines


def _annotated(seen: list[Seen], classes: int) -> list[str]:
    """Classes that annotated images miss, and annotated images that training does not have."""
    lines = []
    train = {s.digest for s in seen if s.split == "train_numf"}
    for split in sorted({s.split for s in seen if s.split.startswith("sup_")}):
        own = [s for s in seen if s.split == split]
        shown = sum((s.counts for s in own if s.counts is not None), np.zeros(256, np.int64))
        absent = [str(c) for c in range(classes) if not shown[c]]
        if absent:
            lines.append(f"{split}: class {', '.join(absent)} does not occur")
        for s in own:
            if s.counts is None:
                continue
            own_absent = [str(c) for c in range(classes) if not s.counts[c]]
            if own_absent and len(own) > 1:
                lines.append(f"  {s.name}: without class {', '.join(own_absent)}")
            if s.digest not in train:
                lines.append(f"  {s.name}: is not in train_numf")
    if not any(s.split.startswith("sup_") for s in seen):
        return ["no folder of annotated images (sup_num1_0, ...)"]
    return lines or ["every annotated image shows every class"]


def _expected(splits: list[str]) -> list[str]:
    wanted = ("train_numf", "test_numf", "sup_num1_0")
    return [f"{name}: not there; some stages need it" for name in wanted if name not in splits]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


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
    cell = PANEL + GAP
    rows = -(-len(take) // PAIRS_A_ROW)
    size = GAP + PAIRS_A_ROW * (2 * cell + GAP), GAP + LINE + rows * (LINE + cell)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    for c, colour in enumerate(palette(classes)[:24].tolist()):
        left = GAP + 34 * c
        draw.rectangle((left, GAP, left + 12, GAP + 12), fill=tuple(colour))
        draw.text((left + 16, GAP - 1), str(c), fill="black", font=font)
    for place, index in enumerate(take.tolist()):
        s = choice[index]
        left = GAP + place % PAIRS_A_ROW * (2 * cell + GAP)
        top = GAP + LINE + place // PAIRS_A_ROW * (LINE + cell)
        name = s.name.encode("ascii", "replace").decode()[-50:]
        draw.text((left, top), name, fill="black", font=font)
        image = read_image(s.sample.image)
        assert s.sample.mask is not None
        mask = read_mask(s.sample.mask)
        if mask.shape != image.shape[:2]:
            continue  # reported as a problem
        for column, pixels in enumerate((image, overlay(image, mask, classes))):
            picture = Image.fromarray(pixels).convert("RGB")
            factor = PANEL / max(picture.size)
            height, width = (max(1, round(n * factor)) for n in pixels.shape[:2])
            page.paste(picture.resize((width, height)), (left + column * cell, top + LINE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path, format="PNG")
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written ({reason}); give another --sheet") from None
