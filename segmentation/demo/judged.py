"""The demo: synthetic micrographs, whose truth is known, with and without pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from imaging.imagefile import Pixels, read_mask
from segmentation.demo.micrographs import CLASSES, make_micrographs
from segmentation.job import Work, run
from segmentation.predictors import FOREST
from segmentation.request import Request
from utils.files import list_files
from utils.log import only_progress, to_terminal
from utils.metrics import IGNORED, SegmentationScores, dice, iou, mean_score
from utils.tables import text

MINUTES = 1.5  # of the job; the comparison without pretraining comes on top
SMALLEST_DICE = 0.3  # of a phase that counts as found


class Truth(NamedTuple):
    """How near an answer is to the truth."""

    dice: tuple[float, ...]  # of each class, pooled over images
    area_error: tuple[float, ...]  # mean absolute error of the area fraction, in points
    images: int
    worst: tuple[str, ...]  # names of the images, the worst first
    miou: float = float("nan")  # mean intersection over union of all classes, pooled over images

    @property
    def mean(self) -> float:
        """Mean Dice without the background."""
        return float(mean_score(np.array(self.dice)))

    def line(self) -> str:
        """The numbers in a line."""
        classes = " ".join(f"{value:.3f}" for value in self.dice)
        areas = " ".join(f"{value:.1f}" for value in self.area_error)
        mean = np.mean(self.area_error)
        return (
            f"true Dice {self.mean:.3f} (by class {classes}), mIoU {self.miou:.3f}, area fractions "
            f"{mean:.1f} points off (by class {areas}), {self.images} images"
        )


def judge(classes: Path, truth: Path, left_out: Sequence[str]) -> Truth:
    """Compare class maps with true masks of the same names, but for ``left_out``."""
    pairs: dict[str, tuple[Pixels, Pixels]] = {
        path.stem: (read_mask(path), read_mask(classes / path.name))
        for path in list_files(truth, (".png",))
        if path.stem not in left_out and (classes / path.name).exists()
    }
    count = 1 + max(int(mask[mask < IGNORED].max()) for pair in pairs.values() for mask in pair)
    scores = SegmentationScores(count)
    for mask, prediction in pairs.values():
        scores.add(torch.from_numpy(prediction), torch.from_numpy(mask))
    counts = scores.counts()
    areas = counts.sum(axis=1) - counts.sum(axis=2)  # (n, C): predicted - true
    error = np.abs(areas / counts.sum(axis=(1, 2))[:, None]).mean(axis=0) * 100
    own = {name: float(mean_score(dice(c))) for name, c in zip(pairs, counts, strict=True)}
    worst = sorted(own, key=lambda name: (np.isnan(own[name]), own[name]))
    pooled = dice(counts.sum(axis=0))
    numbers = tuple(pooled.tolist()), tuple(error.tolist()), len(pairs), tuple(worst)
    return Truth(*numbers, miou=float(np.nanmean(iou(counts.sum(axis=0)))))


def given() -> tuple[Path, tuple[Path, ...]]:
    """The synthetic set, drawn if it is not there: its images, and its masks."""
    folder = make_micrographs()
    return folder / "images", (folder / "masks",)


def demo(request: Request) -> int:
    """Segment the synthetic set and compare with its truth; 1 if a phase was not found."""
    work = run(request)
    found = compare(work, request.images.parent / "truth")
    answer = found[0][1]
    missed = [name for name, dice in zip(CLASSES, answer.dice, strict=True) if dice < SMALLEST_DICE]
    to_terminal(f"NOT found: {', '.join(missed)}" if missed else "Every phase was found")
    return int(bool(missed))


def compare(work: Work, truth: Path) -> list[tuple[str, Truth]]:
    """Print the true Dice and error of the area fraction of every phase, by who segmented."""
    annotated = [p.name for p in work.annotated]
    found = [(f"the answer: {work.this.by}", judge(work.out / "classes", truth, annotated))]
    found.append((FOREST, judge(work.first / "classes", truth, annotated)))
    steps = work.schedule.pretrain_steps
    for start, title in ((work.methods.start(work.this), f"network, {steps} steps of pretraining"),
                         (None, "network, no pretraining")):  # fmt: skip
        if work.schedule.fine_steps and (start or title.endswith("no pretraining")):
            found.append((title, judge(network_maps(work, start), truth, annotated)))
    for line in table(found):
        to_terminal(line)
    return found


def network_maps(work: Work, start: Path | None) -> Path:
    """Class maps of all images by a network with or without pretraining, fine-tuned alike."""
    name = work.places.training(work.this.number) if start else "without"
    title = "Fine-tuning, for comparison"
    file = work.learning.finetune(name, work.schedule.fine_steps, start, None, title)
    place = work.places.answer(f"comparison_{name}")
    with only_progress("Predictions, for comparison"):
        work.predict(work.methods.watched(file), place)
    return place / "classes"


def table(found: Sequence[tuple[str, Truth]]) -> list[str]:
    """Lines: true Dice, and mean error of the area fraction in points, of every phase."""
    rows: list[list[str]] = [["true Dice of", *CLASSES, "mean"]]
    rows += [[t, *(f"{v:.3f}" for v in own.dice), f"{own.mean:.3f}"] for t, own in found]
    areas: list[list[str]] = [["error of area fraction, points", *CLASSES, "mean"]]
    for title, own in found:
        mean = sum(own.area_error) / len(own.area_error)
        areas.append([title, *(f"{v:.1f}" for v in own.area_error), f"{mean:.1f}"])
    return ["", *text(rows), "", *text(areas), ""]
