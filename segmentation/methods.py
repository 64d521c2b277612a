"""The methods that can answer, trained on labels of choice: the pixel classifier, and networks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dataset.layout import write_png
from imaging.imagefile import read_image, read_mask
from metallography.segmenter import Segmenter
from segmentation import blocks
from segmentation.answers import Round
from segmentation.blocks import Fold
from segmentation.learning import TRAINING, Learning
from segmentation.predictors import Classifier, Watched, beside_strokes
from segmentation.schedule import Schedule
from utils.metrics import IGNORED


class Beside(NamedTuple):
    """Strokes, and the labels beside them of which a pixel classifier is sure."""

    folder: Path  # of both together
    shares: list[float]  # of the area, that each class is expected to have
    sure: float  # share of the pixels that have a label more


class Methods:
    """Makes what predicts: untrained, trained on the labels of a folder, or of an earlier round."""

    def __init__(self, learning: Learning, schedule: Schedule) -> None:
        self.learning, self.schedule = learning, schedule
        self.request, self.out = learning.request, learning.request.out
        self.annotated, self.classes = learning.intake.annotated, learning.intake.num_classes

    def classifier(self, first: bool = False) -> Classifier:
        """A pixel classifier that has learnt nothing yet, for the first answer or later ones."""
        r = self.request
        reduce, threads = self.schedule.reduce[0 if first else 1], self.learning.threads
        return Classifier(self.classes, r.class_names, reduce, r.seed, threads)

    def learnt(self, labels: Path | None = None, first: bool = False) -> Classifier:
        """A pixel classifier that has learnt the labels, or those of a folder."""
        model = self.classifier(first)
        files = {p.file: (labels / p.labels.name if labels else p.labels)
                 for p in self.annotated if p.labels}  # fmt: skip
        there = {image: path for image, path in files.items() if path.is_file()}
        model.fit([read_image(i) for i in there], [read_mask(path) for path in there.values()])
        return model

    def beside(self, labels: Path, name: str) -> Beside:
        """A folder of strokes, with the labels of which a classifier that learns them is sure.

        What learns from strokes alone hardly sees boundaries, and each class by the share that
        somebody drew of it.
        """
        given = [p for p in self.annotated if p.labels and (labels / p.labels.name).is_file()]
        strokes = [read_mask(labels / p.labels.name) for p in given if p.labels]
        images = [read_image(p.file) for p in given]
        found, shares = beside_strokes(self.learnt(labels), images, strokes)
        for picture, ids in zip(given, found, strict=True):
            write_png(self.out / TRAINING / name / f"{picture.file.stem}.png", ids)
        added = sum(int((a != b).sum()) for a, b in zip(found, strokes, strict=True))
        sure = added / sum(ids.size for ids in found)
        return Beside(self.out / TRAINING / name, shares.tolist(), sure)

    def annotations(self) -> list[blocks.Annotation]:
        """Pixels and labels of the annotated images."""
        return [(read_image(p.file), read_mask(p.labels)) for p in self.annotated if p.labels]

    def start(self, of: Round) -> Path | None:
        """The pretrained file of a round."""
        return self.out / of.start if of.start else None

    def watched(self, file: Path) -> Watched:
        """A network, ready to predict, with the names that the classes have now."""
        found = Watched(Segmenter(file, device=self.request.device), self.schedule.views)
        found.class_names = list(self.request.class_names) or found.class_names
        return found

    def network_of(self, name: str) -> Path | None:
        """The network that a training gave; None if there is none."""
        found = [self.out / TRAINING / f"{name}_{stage}" / "f" for stage in ("simclr", "sup")]
        files = [path / file for path in found for file in ("fine.pt", "sup.pt")]
        return next((path for path in files if path.is_file()), None)

    def forest_without(self, labels: Path, fold: Fold) -> blocks.Predict | None:
        """A pixel classifier of a folder's labels but for a fold; None if none are left."""
        images, masks = [], []
        for picture in self.annotated:
            path = labels / f"{picture.file.stem}.png"
            left = blocks.without(read_mask(path), fold) if path.is_file() else None
            if left is not None and (left != IGNORED).any():
                images.append(read_image(picture.file))
                masks.append(left)
        if not images:
            return None
        model = self.classifier()
        model.fit(images, masks)
        return model.ids
