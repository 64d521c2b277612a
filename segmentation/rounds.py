"""The rounds of a job: each time that the labels have changed, everything learns again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imaging.imagefile import read_image, read_mask
from segmentation.blocks import HeldOut
from segmentation.intake import Intake
from utils.files import replace_file

FILE = "rounds.json"


@dataclass
class Round:
    """One set of labels, and what came of it."""

    number: int
    key: str  # hash of the labels, and of what else decides the result
    classes: int
    labels: dict[str, str]  # hash of the labels of each annotated image
    scores: dict[str, list[Any]] = field(default_factory=dict)  # name: held-out confusion matrices
    curve: dict[str, list[Any]] = field(default_factory=dict)  # blocks learnt from: the same
    kept: str = ""  # the name of the scores that won
    start: str = ""  # the pretrained file; '' for random weights
    answer: str = ""  # folder of the predictions
    network: str = ""  # file of the network that answers; '' if the pixel classifier does
    by: str = ""  # who answers, in words
    method: int = 0  # number of the round whose training answers
    fractions: dict[str, list[float]] = field(default_factory=dict)  # area fractions by image
    corrected: dict[str, list[int]] = field(default_factory=dict)  # pixels changed, and labelled

    def held_out(self, name: str) -> HeldOut | None:
        """The held-out scores of this name."""
        found = self.scores.get(name)
        return HeldOut(np.asarray(found, np.int64)) if found else None


class Rounds:
    """All rounds of a job, in a file that survives a kill."""

    def __init__(self, out: Path) -> None:
        self.path = out / FILE
        self.all: list[Round] = []
        with suppress(OSError, ValueError, TypeError):
            self.all = [Round(**each) for each in json.loads(self.path.read_text(encoding="utf-8"))]

    def open(self, intake: Intake, decides: Mapping[str, Any]) -> Round:
        """The round of these labels: the last one if nothing has changed, else a new one."""
        labels = {p.name: _hash(p.file, p.labels) for p in intake.annotated if p.labels}
        text = json.dumps([labels, intake.num_classes, dict(decides)], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not self.all or self.all[-1].key != key:
            self.all.append(Round(len(self.all) + 1, key, intake.num_classes, labels))
            self.save()
        return self.all[-1]

    def before(self, this: Round) -> Round | None:
        """The last finished round before this one, if it knew the same classes."""
        finished = [r for r in self.all[: this.number - 1] if r.answer]
        return finished[-1] if finished and finished[-1].classes == this.classes else None

    def save(self) -> None:
        """Store all rounds."""
        text = json.dumps([asdict(each) for each in self.all], indent=1)
        replace_file(self.path, text + "\n", "--out")


def _hash(image: Path, labels: Path) -> str:
    pixels, ids = read_image(image), read_mask(labels)
    return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes() + pixels.tobytes()).hexdigest()[
        :16
    ]
