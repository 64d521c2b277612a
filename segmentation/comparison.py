"""The methods that can answer, each trained, and who does best on held-out blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imaging.drawing import write_png
from imaging.field import read_visible
from imaging.imagefile import read_mask
from metallography.segmenter import Segmenter
from segmentation import blocks
from segmentation.answers import Round, Rounds
from segmentation.blocks import Fold, HeldOut
from segmentation.learning import Learning
from segmentation.predictors import BEFORE, FOREST, NETWORK, Classifier, Watched, beside_strokes
from segmentation.schedule import Schedule
from utils.log import only_progress, progress, to_terminal
from utils.metrics import IGNORED


class Beside(NamedTuple):
    """Strokes, and the labels beside them of which a pixel classifier is sure."""

    folder: Path  # of both together
    shares: list[float]  # of the area, that each class is expected to have
    sure: float  # share of the pixels that have a label more


def annotation(image: Path, labels: Path) -> blocks.Annotation:
    """An image of the set, and labels of it; DataError."""
    pixels, inside = read_visible(image)
    return blocks.Annotation(pixels, read_mask(labels), inside)


class Methods:
    """Makes what predicts: untrained, trained on the labels of a folder, or of an earlier round."""

    def __init__(self, learning: Learning, schedule: Schedule) -> None:
        self.learning, self.schedule = learning, schedule
        self.request, self.out = learning.request, learning.request.out
        self.places = learning.places
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
        images, insides = zip(*map(read_visible, there), strict=True)
        model.fit(images, [read_mask(path) for path in there.values()], insides)
        return model

    def beside(self, labels: Path, name: str) -> Beside:
        """A training's folder of strokes, with the labels of which a classifier of them is sure.

        What learns from strokes alone hardly sees boundaries, and each class by the share that
        somebody drew of it.
        """
        given = [p for p in self.annotated if p.labels and (labels / p.labels.name).is_file()]
        strokes = [annotation(p.file, labels / p.labels.name) for p in given if p.labels]
        found, shares = beside_strokes(self.learnt(labels), strokes)
        folder = self.places.sure(name)
        for picture, ids in zip(given, found, strict=True):
            write_png(folder / f"{picture.file.stem}.png", ids)
        added = sum(int((a != b.labels).sum()) for a, b in zip(found, strokes, strict=True))
        sure = added / sum(own.labels.size if own.inside is None else int(own.inside.sum())
                           for own in strokes)  # fmt: skip
        return Beside(folder, shares.tolist(), sure)

    def annotations(self) -> list[blocks.Annotation]:
        """Pixels and labels of the annotated images."""
        return [annotation(p.file, p.labels) for p in self.annotated if p.labels]

    def start(self, of: Round) -> Path | None:
        """The pretrained file of a round."""
        return self.out / of.start if of.start else None

    def watched(self, file: Path, views: int = 0) -> Watched:
        """A network, ready to predict, with the names that the classes have now.

        Its answer is the average over ``views``; 0: as many as the plan says.
        """
        found = Watched(Segmenter(file, device=self.request.device), views or self.schedule.views)
        found.class_names = list(self.request.class_names) or found.class_names
        return found

    def network_of(self, name: str) -> Path | None:
        """The network that a training gave; None if there is none."""
        return next((path for path in self.places.networks(name) if path.is_file()), None)

    def forest_without(self, labels: Path, fold: Fold) -> blocks.Predict | None:
        """A pixel classifier of a folder's labels but for a fold; None if none are left."""
        given = []
        for picture in self.annotated:
            path = labels / f"{picture.file.stem}.png"
            left = blocks.without(read_mask(path), fold) if path.is_file() else None
            if left is not None and (left != IGNORED).any():
                given.append(annotation(picture.file, path)._replace(labels=left))
        if not given:
            return None
        model = self.classifier()
        model.fit(*zip(*given, strict=True))
        return model.ids


class Comparison:
    """The comparison of one round: ``run`` notes in it the scores, and whose answer is kept."""

    def __init__(
        self, methods: Methods, rounds: Rounds, this: Round, before: Round | None, strokes: bool
    ) -> None:
        self.methods, self.rounds, self.this, self.before = methods, rounds, this, before
        self.strokes = strokes  # whether so few pixels are labelled that sure ones are added
        self.learning = methods.learning
        self.step = 0.0  # seconds that one of the last training took; 0: not known
        self.places, self.annotated = methods.places, methods.annotated

    @property
    def schedule(self) -> Schedule:
        """The plan as it is now."""
        return self.methods.schedule

    def run(self, checked: Callable[[HeldOut], None]) -> None:
        """Score all methods; ``checked`` is told the pixel classifier's scores as soon as known."""
        folds = blocks.usable(self.methods.annotations(), self.schedule.folds)
        if not folds:
            to_terminal("No held-out blocks: the labels lie in one quarter of the image alone")
        scores: dict[str, HeldOut] = {}
        if folds:
            scores[FOREST] = self.forest_blocks(folds)
            checked(scores[FOREST])
        if self.schedule.fine_steps:
            self.this.start = self.pretrained()
            if folds and self.schedule.block_steps:
                scores[NETWORK] = self.network_blocks(folds)
                if scores[NETWORK].mean < scores[FOREST].mean and self.takes_longer():
                    scores[NETWORK] = self.network_blocks(folds)
        if self.before is not None and folds:
            scores |= self.before_blocks(folds, self.before)
        if self.strokes:
            scores = self.by_area(scores)
        self.this.scores = {name: found.counts.tolist() for name, found in scores.items()}
        means = {name: found.mean for name, found in scores.items() if not np.isnan(found.mean)}
        usual = NETWORK if self.schedule.fine_steps else FOREST
        order = [NETWORK, FOREST, BEFORE]  # of equals the first
        self.this.kept = max(means, key=lambda n: (means[n], -order.index(n))) if means else usual
        self.rounds.save()

    def takes_longer(self) -> bool:
        """Give networks that lost more steps, if there is time; see ``Schedule.longer``."""
        plan = self.schedule.longer(self.step) if self.step and not self.this.plan else {}
        if not plan:
            return False
        self.this.plan = plan
        self.rounds.save()
        self.methods.schedule = self.schedule.lengthened(plan)
        to_terminal(self.schedule.reasons[-1])
        return True

    def by_area(self, scores: dict[str, HeldOut]) -> dict[str, HeldOut]:
        """Scores of strokes, in which each class counts by the area that it is expected to have.

        So does the learning curve then. Writes the labels beside the strokes, for the last
        training.
        """
        name = self.places.training(self.this.number)
        found = self.methods.beside(self.places.labels(self.this.number), name)
        self.this.shares, self.this.sure = found.shares, found.sure
        by = {size: blocks.stored(counts) for size, counts in self.this.curve.items()}
        areas = {size: own.by_area(found.shares) for size, own in by.items() if own}
        self.this.curve = {size: own.counts.tolist() for size, own in areas.items()}
        return {name: own.by_area(found.shares) for name, own in scores.items()}

    def forest_blocks(self, folds: list[Fold]) -> HeldOut:
        """Held-out scores of the pixel classifier, and its learning curve."""

        def learn(annotated: Sequence[blocks.Annotation]) -> blocks.Predict:
            model = self.methods.classifier()
            model.fit(*zip(*annotated, strict=True))
            return model.ids

        tries = len(blocks.curve_sizes(folds)) * len(folds)
        title = "Held-out blocks, pixel classifier"
        own = self.methods.annotations(), folds, self.methods.classes
        with only_progress(title), progress(tries, title) as bar:
            found = blocks.curve(*own, learn, bar.update)
        self.this.curve = {str(size): each.counts.tolist() for size, each in found.items()}
        return found[max(found)]

    def pretrained(self) -> str:
        """The pretrained file, of an earlier round if there is one; '' for random weights."""
        epochs = self.schedule.pretrain_epochs
        old, out = self.before.start if self.before else "", self.methods.out
        if old and (out / old).is_file():
            return old
        if not epochs:
            return ""
        return self.learning.pretrain(epochs, self.this.number).relative_to(out).as_posix()

    def network_blocks(self, folds: list[Fold]) -> HeldOut:
        """Held-out scores of networks that start as the final one, each without a fold."""
        predictors: dict[Fold, blocks.Predict] = {}
        for turn, fold in enumerate(folds, start=1):
            name = self.places.without(self.this.number, fold, longer=bool(self.this.plan))
            labels = blocks.write_labels(self.places.labels_of(name), self.annotated, fold)
            if self.strokes:
                labels = self.methods.beside(labels, name).folder
            title = f"Held-out blocks, network {turn} of {len(folds)}"
            steps, start = self.schedule.block_steps, self.methods.start(self.this)
            runs = {network.parent for network in self.places.networks(name)}
            whole, began = not any(run.exists() for run in runs), time.monotonic()
            file = self.learning.finetune(name, steps, start, labels, title)
            if whole:  # else an earlier run did some of it, and its time is not known
                self.step = (time.monotonic() - began) / steps
            predictors[fold] = self.methods.watched(file).ids
        return blocks.score(self.methods.annotations(), predictors, self.methods.classes)

    def before_blocks(self, folds: list[Fold], before: Round) -> dict[str, HeldOut]:
        """The answer before on blocks that it did not learn either, of every mask given now.

        Nothing if it did not leave out the same blocks together, if its networks are gone, or if it
        learnt labels that are not given any more.
        """
        if self.rounds.all[before.method - 1].labels.keys() - self.this.labels.keys():
            return {}  # it learnt labels that were taken back
        labels = self.places.labels(before.method)
        if not self.same_blocks(labels):
            return {}  # strokes were added, which are grouped otherwise
        predictors: dict[Fold, blocks.Predict] = {}
        for fold in folds:
            learnt: blocks.Predict | None
            if before.network:
                longer = bool(self.rounds.all[before.method - 1].plan)
                file = self.methods.network_of(self.places.without(before.method, fold, longer))
                learnt = self.methods.watched(file).ids if file else None
            else:
                learnt = self.methods.forest_without(labels, fold)
            if learnt is None:
                return {}
            predictors[fold] = learnt
        found = blocks.score(self.methods.annotations(), predictors, self.methods.classes)
        return {BEFORE: found}

    def same_blocks(self, labels: Path) -> bool:
        """Whether the labels in a folder, an earlier round's, had the blocks that they have now."""
        for picture in self.annotated:
            path = labels / picture.labels.name if picture.labels else None
            if picture.labels and path and path.is_file():
                old, new = read_mask(path), read_mask(picture.labels)
                if old.shape != new.shape:
                    return False
                known = (old != IGNORED) & (new != IGNORED)
                if (blocks.numbers(old) != blocks.numbers(new))[known].any():
                    return False
        return True
