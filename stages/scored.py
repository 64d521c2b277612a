"""What a run is scored on: the test images, but those whose labels it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

import data
from data import Sample
from imaging.imagefile import read_image
from report.results import FIT
from stages.job import Job, Runner
from stages.overlap import parts_of
from utils.files import DataError


class Scored(Runner):
    """A run that learns labels and is scored on the test set."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.annotated = job.annotated()
        self.test = data.samples_of_test(job.store, self.config.data_dir)

    def samples(self) -> list[Sample]:
        """Annotated images and test images."""
        return self.annotated + self.test

    @cached_property
    def learnt(self) -> dict[int, int]:
        """Numbers of the test images that are, or are cut from, annotated ones: and which ones."""
        return self.cut_from(self.test, self.annotated, self.file_pixels)

    @property
    def fit(self) -> bool:
        """Whether the evaluations are no score, because all test images have labels learnt here."""
        return bool(self.test) and len(self.learnt) == len(self.test)

    @property
    def places(self) -> list[int]:
        """Numbers, among the test images, of those that are evaluated, see ``tested``."""
        learnt = {} if self.fit else self.learnt
        return [number for number in range(len(self.test)) if number not in learnt]

    @cached_property
    def tested(self) -> list[Sample]:
        """The images that are evaluated: the test images whose labels are not learnt, or a fit."""
        return [self.test[number] for number in self.places]

    def cut_from(
        self,
        some: Sequence[Sample],
        others: Sequence[Sample],
        pixels_of: Callable[[Sample], NDArray[np.uint8]],
    ) -> dict[int, int]:
        """``parts_of`` some images in others, which ``pixels_of`` reads one by one."""
        both, kept = (some, others), self.job.store.lists
        key = ("parts", self.config.image_size, *(tuple(s.image for s in own) for own in both))
        if key not in kept:  # once for a store, as runs of one set are many
            parts = parts_of(map(self.file_pixels, some), map(pixels_of, others))
            kept[key] = list(parts.items())
        return dict(kept[key])

    def file_pixels(self, sample: Sample) -> NDArray[np.uint8]:
        """An image's pixels as its file has them."""
        if self.config.image_size:
            with suppress(DataError):  # it may be gone: the set was decoded before
                return read_image(sample.image)
        return self.pixels(sample)

    def about_test(self, when: str) -> list[str]:
        """What is evaluated, and whether that is a score."""
        if not self.test:
            where = self.config.data_dir
            return [f"No score: {where} has no test images with masks; nothing is chosen by one"]
        hits = [f"{self.test[i].name} in {self.annotated[k].name}" for i, k in self.learnt.items()]
        shown = ", ".join(hits[:5]) + (" ..." if hits[5:] else "")
        if self.fit:
            return [
                f"No score but a {FIT}: every test image is, or is cut from, an image whose labels "
                f"are learnt here ({shown}). ACC and Dice {when} say how well these were learnt, "
                "nothing about other images"
            ]
        lines = [
            f"Scored on {self.images(self.tested)} of the test set {when}; Dice is pooled over the "
            "set, without background"
        ]
        if hits:
            lines.append(
                f"Warning: {len(hits)} test image(s) left out of the score, which are, or are cut "
                f"from, images whose labels are learnt here: {shown}"
            )
        return lines
