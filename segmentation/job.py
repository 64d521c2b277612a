"""One job from the user's folder to the report: what ``segment.py`` does, in order."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from annotation.outlines import SUFFIX, packed
from dataset.layout import write_png
from imaging.imagefile import read_image, read_mask
from imaging.index import stamp_of
from imaging.listing import some_names
from metallography.items import Item
from metallography.measure import check_terms
from metallography.ranking import fractions_of
from metallography.scales import find_scales
from metallography.segmenter import Segmenter
from metallography.summary import is_share, phases_csv, words, write_tables
from report.sheets import predicted_sheet
from report.workbook import WORKBOOK, tables_of, write_workbook
from segmentation import blocks, doubt, telling
from segmentation.answers import OUTLINES, Answers, Round, Rounds, pair_digest
from segmentation.blocks import Fold, HeldOut
from segmentation.intake import RECORD as SET_RECORD
from segmentation.intake import SET, Request, read
from segmentation.learning import TRAINING, Learning
from segmentation.predictors import (
    BEFORE,
    FOREST,
    MARK,
    NETWORK,
    Answer,
    Classifier,
    Watched,
    beside_strokes,
    is_marked,
    write_maps,
)
from segmentation.schedule import (
    Schedule,
    asked_of,
    load_schedule,
    make_schedule,
    minutes,
    save_schedule,
)
from stages.labels import in_strokes, label_counts, label_line, labelled_share
from utils.commandline import UserError
from utils.files import DataError, list_names, replace_file, writing
from utils.log import only_progress, progress, to_terminal
from utils.metrics import IGNORED
from utils.run_folder import locked
from utils.tables import csv_of_rows

BATCHES = "batches.csv"
FEW_CHANGED = 0.25  # share of a map: with fewer, somebody may not have looked at the rest
OTHER_SCALE = "segment those of one magnification at a time, each with a mask of its own"
OWN_FILES = ("rounds.json", "answer.json")
DECIDES = ("asked", "fine_steps", "block_steps", "folds", "pretrain_epochs", "values", "views",
           "reduce")  # fmt: skip


def run(request: Request) -> Work:
    """Do the job, or go on with it; returns what was done. UserError."""
    started = time.monotonic()
    check_out(request.out)
    with locked(request.out, "--out", "segmenting", "--out"):
        for leftover in request.out.glob(f".{SET}-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        intake = read(request)
        check_terms(intake.num_classes, grain_classes=request.grain_classes)
        request = replace(request, class_names=request.class_names or intake.class_names)
        for note in intake.notes:
            to_terminal(note)
        for line in intake.warnings:
            to_terminal(f"Warning: {line}")
        learning = Learning(request, intake, started)
        schedule = scheduled(learning)
        for line in schedule.lines():
            to_terminal(line)
        work = Work(learning, schedule)
        with writing(request.out, "--out"):
            work.run()
        to_terminal(f"Done, after {minutes(learning.spent())}")
        return work


def check_out(out: Path) -> None:
    """Refuse a folder of results that holds other files; UserError."""
    names = {path.name for path in list_names(out) if not path.name.startswith(".")}
    made_here = (out / SET / SET_RECORD).is_file() or names & set(OWN_FILES)
    if names and not made_here:
        raise UserError(f"{out}: holds other files, such as {min(names)}; give another --out")


def scheduled(learning: Learning) -> Schedule:
    """The stored schedule, or a new one, stored before anything is trained."""
    out = learning.request.out
    asked = asked_of(learning.request, learning.intake)
    schedule = load_schedule(out, asked)
    if schedule is None:
        to_terminal("Timing a few steps ...")
        schedule = make_schedule(learning, asked)
        save_schedule(out, schedule)
    return schedule


class Work:
    """The steps of a job. Each is skipped if it is done, so a kill loses little."""

    def __init__(self, learning: Learning, schedule: Schedule) -> None:
        self.learning, self.schedule = learning, schedule
        learning.values |= schedule.values
        self.request, self.intake = learning.request, learning.intake
        self.out, self.pictures = self.request.out, self.intake.pictures
        self.annotated = self.intake.annotated
        self.classes = self.intake.num_classes
        self.answers, self.rounds = Answers(self.out), Rounds(self.out)
        own, r = [Item(p.source, p.name) for p in self.pictures], self.request
        told, earlier = (r.um_per_px, r.scales), self.answers.scales
        self.scales = find_scales(own, r.images, *told, cure=OTHER_SCALE, before=earlier)
        masks = [read_mask(p.labels) for p in self.annotated if p.labels]
        self.strokes, self.labelled = in_strokes(masks), labelled_share(masks)
        self.label_line = label_line(masks, self.classes, r.class_names)
        self.in_no_mask = np.flatnonzero(label_counts(masks, self.classes) == 0).tolist()
        decides = {name: getattr(schedule, name) for name in DECIDES}
        training = learning.config("key", stages="sup").training_settings("sup", "f")
        decides["training"] = {**training, "data_dir": ""}  # by preset and program, not by place
        labels = {p.name: pair_digest(p.file, p.labels) for p in self.annotated if p.labels}
        known = len(self.rounds.all)
        self.this = self.rounds.open(labels, self.classes, decides)
        self.goes_on = len(self.rounds.all) == known and not self.this.answer
        self.before = self.rounds.before(self.this)
        self.place = self.out / TRAINING / f"round_{self.this.number}"
        self.first = self.out / TRAINING / "answers" / "first"
        self.first_look: tuple[Answer, list[dict[str, Any]]] | None = None  # made now
        self.twin: Path | None = None  # folder of the class maps of the network's twin

    def run(self) -> None:
        """Everything in order."""
        self.answers.keep_scales(self.scales.given)
        for line in self.scales.lines:
            to_terminal(line)
        self.say_round()
        if not self.answers.by:
            self.first_answer()
        blocks.write_labels(self.place / "labels", self.annotated, [])
        if not self.this.kept:
            self.compare()
        self.answer()
        self.report()

    def say_round(self) -> None:
        """What this round learns from."""
        names = some_names(p.name for p in self.annotated)
        count = f"labels of {len(self.annotated)} image(s)"
        to_terminal(f"Round {self.this.number}: {count}, {names}")
        to_terminal(self.label_line)
        if self.goes_on:
            to_terminal("Going on: an earlier run of this round was stopped; what it did is kept")
        if self.before is None:
            return
        gone = sorted(self.before.labels.keys() - self.this.labels.keys())
        if gone:
            to_terminal(f"Not given any more, so not learnt from: labels of {', '.join(gone)}")
        by_hand = self.answers.corrections()
        for name, (changed, labelled) in self.count_corrected().items():
            line = f"{name}: {changed} of {labelled} labelled pixels differ from the last answer"
            if name in by_hand and changed < FEW_CHANGED * labelled:
                others = f"the {labelled - changed} others are learnt, too"
                line += f"; {others}: set 255 where you did not look"
            to_terminal(line)

    def count_corrected(self) -> dict[str, list[int]]:
        """Of each image with new labels: pixels that the last answer had otherwise, and all."""
        assert self.before is not None
        if not self.this.corrected and self.answers.crop == self.intake.crop:
            folder = self.out / self.before.answer / "classes"
            for picture in self.annotated:
                path = folder / f"{picture.name}.png"
                if self.before.labels.get(picture.name) == self.this.labels[picture.name]:
                    continue
                if path.exists() and picture.labels:
                    old, new = read_mask(path), read_mask(picture.labels)
                    if old.shape == new.shape:  # else another image of the same name
                        known = new != IGNORED
                        pair = [int((known & (old != new)).sum()), int(known.sum())]
                        self.this.corrected[picture.name] = pair
            self.rounds.save()
        return self.this.corrected

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

    def beside(self, labels: Path, name: str) -> Path:
        """A folder of strokes, with the labels of which a classifier that learns them is sure.

        What learns from strokes alone hardly sees boundaries, and each class by the share that
        somebody drew of it. Also notes the share of the area that each class is expected to have.
        """
        given = [p for p in self.annotated if p.labels and (labels / p.labels.name).is_file()]
        strokes = [read_mask(labels / p.labels.name) for p in given if p.labels]
        images = [read_image(p.file) for p in given]
        found, shares = beside_strokes(self.learnt(labels), images, strokes)
        for picture, ids in zip(given, found, strict=True):
            write_png(self.out / TRAINING / name / f"{picture.file.stem}.png", ids)
        self.this.shares = shares.tolist()
        added = sum(int((a != b).sum()) for a, b in zip(found, strokes, strict=True))
        self.this.sure = added / sum(ids.size for ids in found)
        return self.out / TRAINING / name

    def annotations(self) -> list[blocks.Annotation]:
        """Pixels and labels of the annotated images."""
        return [(read_image(p.file), read_mask(p.labels)) for p in self.annotated if p.labels]

    def first_answer(self) -> None:
        """All images by the pixel classifier, and a report on them."""
        with only_progress("First answer"):
            folder = self.predict_first()
        self.first_look = folder, self.mark(folder)
        own = self.first, [p.name for p in self.pictures], FOREST, folder.segmenter.class_names
        self.answers.publish(*own, self.intake.crop)
        path = telling.write_page(self, *self.first_look, final=False)
        after = f"after {minutes(self.learning.spent())}"
        to_terminal(f"First answer of all images, by the {FOREST}, {after}: {path}")

    def check_first_answer(self, found: HeldOut) -> None:
        """Tell with the first answer, if it was made now, how it was checked since."""
        late = self.strokes or math.isnan(found.mean)  # strokes count by area, which is known later
        if self.first_look is not None and not late:
            folder = self.first_look[0]
            checked = telling.first_checked(
                found, self.schedule, len(self.annotated), self.labelled
            )
            folder.notes = [*self.about_answer(folder), telling.FIRST_NOTE, *checked]
            self.write_tables(folder, found)
            telling.write_page(self, *self.first_look, final=False, found=found)
            self.answers.publish_summary(self.first)
            dice = telling.score_text(found.mean)
            to_terminal(f"First answer checked on held-out blocks: Dice {dice}; its report has it")

    def predict_first(self) -> Answer:
        """The pixel classifier's answer of this round, anew: a first one, and a second opinion."""
        shutil.rmtree(self.first, ignore_errors=True)
        said = [telling.FIRST_NOTE, telling.NOT_CHECKED]
        folder = self.predict(self.learnt(first=True), self.first, said)
        replace_file(self.first / MARK, self.first_mark(), "--out")
        return folder

    def first_mark(self) -> str:
        """Of what the pixel classifier's answer is: this round, and the images as they are."""
        images = "".join(f"{p.name} {stamp_of(p.file)}" for p in self.pictures)
        return f"{self.this.key} {hashlib.sha256(images.encode()).hexdigest()[:16]}"

    def second_opinion(self) -> None:
        """Have the pixel classifier's answer of this round beside a network's."""
        if not is_marked(self.first, self.first_mark()):
            with only_progress("Second opinion"):
                self.predict_first()

    def ask_twin(self) -> None:
        """Class maps of all images by the twin of the network that answers, if it has one."""
        name = f"round_{self.this.method}_twin"
        if self.this.kept == NETWORK and self.schedule.twin:
            labels = self.sure_labels if self.strokes else None
            own = self.schedule.fine_steps, self.start(self.this), labels, "Twin network"
            self.learning.finetune(name, *own, seed=(self.request.seed + 1) % 2**32)
        file = self.network_of(name)
        if file is None:
            return
        network = Watched(Segmenter(file, device=self.request.device), views=1)
        self.twin = self.out / TRAINING / "answers" / "twin"
        with only_progress("Predictions of the twin network"):
            images = {p.name: p.file for p in self.pictures}
            write_maps(self.twin, network, images, f"{self.first_mark()} {network.digest}")

    def predict(
        self,
        predictor: Classifier | Watched,
        place: Path,
        said: Sequence[str] = (),
        scores: HeldOut | None = None,
    ) -> Answer:
        """Predict and measure all images in a folder of its own; go on where that was stopped.

        ``said`` are sentences for its ``summary.md``, which also warns by the ``scores`` of its
        method on held-out blocks.
        """
        items = [Item(p.file, p.name, stem=p.source.stem) for p in self.pictures]
        labels = {p.name: p.labels for p in self.annotated if p.labels}
        um = self.scales.given.um_per_px
        told: dict[str, Any] = {"scales": self.scales.of, "min_px": self.request.min_px}
        told["in_no_mask"] = self.in_no_mask
        told["grain_classes"] = self.request.grain_classes
        if isinstance(predictor, Watched):
            told["others"] = [self.first / "classes", *([self.twin] if self.twin else [])]
        folder = Answer(predictor, items, place, um_per_px=um, labels=labels, **told)
        folder.notes = [*self.about_answer(folder), *said]
        folder.run()
        if folder.bad:
            raise UserError("\n".join(folder.bad))
        self.write_tables(folder, scores)
        predicted_sheet(folder)
        return folder

    def write_tables(self, folder: Answer, scores: HeldOut | None) -> None:
        """Write an answer's tables and summary, which warns by its scores on held-out blocks."""
        folder.warned = telling.warning_lines(self, folder, scores)
        folder.poor = [*telling.poor_phases(scores, folder.segmenter.class_names)]
        write_tables(folder)

    def about_answer(self, folder: Answer) -> list[str]:
        """What the summary of every answer says: scales, and which images were learnt from."""
        return [*self.scales.lines, telling.annotated_line(folder.annotated, len(folder.items))]

    def compare(self) -> None:
        """Who does best on held-out blocks: network, pixel classifier, or the answer before."""
        folds = blocks.usable(self.annotations(), self.schedule.folds)
        if not folds:
            to_terminal("No held-out blocks: the labels lie in one quarter of the image alone")
        scores: dict[str, HeldOut] = {}
        if folds:
            scores[FOREST] = self.forest_blocks(folds)
            self.check_first_answer(scores[FOREST])
        if self.schedule.fine_steps:
            self.this.start = self.pretrained()
            if folds and self.schedule.block_steps:
                scores[NETWORK] = self.network_blocks(folds)
        if self.before is not None and folds:
            scores |= self.before_blocks(folds, self.before)
        if self.strokes:
            self.beside(self.place / "labels", f"round_{self.this.number}_sure")
            scores = {name: found.by_area(self.this.shares) for name, found in scores.items()}
            by = {size: blocks.stored(counts) for size, counts in self.this.curve.items()}
            areas = {size: own.by_area(self.this.shares) for size, own in by.items() if own}
            self.this.curve = {size: own.counts.tolist() for size, own in areas.items()}
        self.this.scores = {name: found.counts.tolist() for name, found in scores.items()}
        means = {name: found.mean for name, found in scores.items() if not np.isnan(found.mean)}
        usual = NETWORK if self.schedule.fine_steps else FOREST
        order = [NETWORK, FOREST, BEFORE]  # of equals the first
        self.this.kept = max(means, key=lambda n: (means[n], -order.index(n))) if means else usual
        self.rounds.save()
        for line in telling.comparison_lines(self.this, self.labelled):
            to_terminal(line)

    def forest_blocks(self, folds: list[Fold]) -> HeldOut:
        """Held-out scores of the pixel classifier, and its learning curve."""

        def learn(images: Any, labels: Any) -> blocks.Predict:
            model = self.classifier()
            model.fit(images, labels)
            return model.ids

        tries = len(blocks.curve_sizes(folds)) * len(folds)
        title = "Held-out blocks, pixel classifier"
        with only_progress(title), progress(tries, title) as bar:
            found = blocks.curve(self.annotations(), folds, self.classes, learn, bar.update)
        self.this.curve = {str(size): own.counts.tolist() for size, own in found.items()}
        return found[max(found)]

    def pretrained(self) -> str:
        """The pretrained file, of an earlier round if there is one; '' for random weights."""
        epochs = self.schedule.pretrain_epochs
        old = self.before.start if self.before else ""
        if old and (self.out / old).is_file():
            return old
        if not epochs:
            return ""
        path = self.learning.pretrain(epochs, self.this.number)
        return path.relative_to(self.out).as_posix()

    def start(self, of: Round) -> Path | None:
        """The pretrained file of a round."""
        return self.out / of.start if of.start else None

    def network_blocks(self, folds: list[Fold]) -> HeldOut:
        """Held-out scores of networks that start as the final one, each without a fold."""
        predictors: dict[Fold, blocks.Predict] = {}
        for turn, fold in enumerate(folds, start=1):
            name = blocks.without_name(self.this.number, fold)
            labels = blocks.write_labels(self.out / TRAINING / name, self.annotated, fold)
            if self.strokes:
                labels = self.beside(labels, f"{name}_sure")
            title = f"Held-out blocks, network {turn} of {len(folds)}"
            steps, start = self.schedule.block_steps, self.start(self.this)
            file = self.learning.finetune(name, steps, start, labels, title)
            predictors[fold] = self.network_ids(file)
        return blocks.score(self.annotations(), predictors, self.classes)

    def network_ids(self, file: Path) -> blocks.Predict:
        """A network as a function from an image's pixels to class ids."""
        return self.watched(file).ids

    def watched(self, file: Path) -> Watched:
        """A network, ready to predict, with the names that the classes have now."""
        found = Watched(Segmenter(file, device=self.request.device), self.schedule.views)
        found.class_names = list(self.request.class_names) or found.class_names
        return found

    def before_blocks(self, folds: list[Fold], before: Round) -> dict[str, HeldOut]:
        """The answer before on blocks that it did not learn either, of every mask given now.

        Nothing if it did not leave out the same blocks together, if its networks are gone, or if it
        learnt labels that are not given any more.
        """
        if self.rounds.all[before.method - 1].labels.keys() - self.this.labels.keys():
            return {}  # it learnt labels that were taken back
        if not self.same_blocks(before):
            return {}  # strokes were added, which are grouped otherwise
        predictors: dict[Fold, blocks.Predict] = {}
        for fold in folds:
            if before.network:
                file = self.network_without(before.method, fold)
                learnt = self.network_ids(file) if file else None
            else:
                labels = self.out / TRAINING / f"round_{before.method}" / "labels"
                learnt = self.forest_without(labels, fold)
            if learnt is None:
                return {}
            predictors[fold] = learnt
        return {BEFORE: blocks.score(self.annotations(), predictors, self.classes)}

    def same_blocks(self, before: Round) -> bool:
        """Whether the labels that the answer before learnt had the blocks that they have now."""
        for picture in self.annotated:
            name = picture.labels.name if picture.labels else ""
            path = self.out / TRAINING / f"round_{before.method}" / "labels" / name
            if picture.labels and path.is_file():
                old, new = read_mask(path), read_mask(picture.labels)
                if old.shape != new.shape:
                    return False
                known = (old != IGNORED) & (new != IGNORED)
                if (blocks.numbers(old) != blocks.numbers(new))[known].any():
                    return False
        return True

    def network_without(self, number: int, fold: Fold) -> Path | None:
        """The network of a round that left out just this fold; None if there is none."""
        return self.network_of(blocks.without_name(number, fold))

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

    def answer(self) -> None:
        """The final answer, by whoever was kept, published over the one before."""
        predictor = self.final()
        if isinstance(predictor, Watched):
            self.second_opinion()
            self.ask_twin()
        labels = hashlib.sha256("".join(sorted(self.this.labels.values())).encode()).hexdigest()
        predictor.digest = f"{predictor.digest}-{labels[:8]}"
        place = self.out / TRAINING / "answers" / f"round_{self.this.number}"
        with only_progress("Predictions"):
            scores = blocks.stored(self.this.scores.get(self.this.kept))
            folder = self.predict(predictor, place, [telling.checked_line(self)], scores)
        self.this.fractions = fractions_of(folder.rows, self.classes)
        self.this.answer = place.relative_to(self.out).as_posix()
        self.rounds.save()
        rows = self.mark(folder)
        self.draw_outlines(folder)
        names, crop = [p.name for p in self.pictures], self.intake.crop
        self.answers.publish(place, names, self.this.by, predictor.class_names, crop)
        if not (place / BATCHES).exists():  # of an answer before
            (self.out / BATCHES).unlink(missing_ok=True)
        network = self.out / self.this.network if self.this.network else None
        self.answers.publish_model(network, self.request.class_names, self.facts(folder))
        self.folder, self.doubts = folder, rows

    def final(self) -> Classifier | Watched:
        """Who answers, trained on all labels, or kept from the round before."""
        this, before = self.this, self.before
        if this.kept == BEFORE and before is not None:
            this.network, this.by, this.method = before.network, before.by, before.method
            if before.network:
                return self.watched(self.out / before.network)
            return self.learnt(self.out / TRAINING / f"round_{before.method}" / "labels")
        this.by, this.method = this.kept, this.number
        if this.kept == NETWORK:
            name, steps = f"round_{this.number}", self.schedule.fine_steps
            labels = self.sure_labels if self.strokes else None
            file = self.learning.finetune(name, steps, self.start(this), labels, "Fine-tuning")
            this.network = file.relative_to(self.out).as_posix()
            return self.watched(file)
        return self.learnt()

    @property
    def sure_labels(self) -> Path:
        """The folder of strokes with the sure labels beside them; ``compare`` writes it."""
        return self.out / TRAINING / f"round_{self.this.number}_sure"

    def mark(self, folder: Answer) -> list[dict[str, Any]]:
        """Write ``doubt.csv`` and the workbook into a predicted folder; returns the doubts."""
        annotated = {p.name for p in self.annotated}
        others = {i.name: folder.file("doubt", i) for i in folder.items if i.name not in annotated}
        self.places = doubt.Places(others)
        forest = blocks.stored(self.this.scores.get(FOREST))
        rows = doubt.doubts(
            fractions_of(folder.rows, self.classes),
            folder.segmenter.class_names,
            annotated=sorted(annotated),
            votes=folder.noted("votes"),
            unsure=folder.noted("unsure"),
            differs=self.differing(folder, self.first / "classes"),
            twin=self.differing(folder, self.twin),
            places=self.places,
            expected=forest.error if forest else math.nan,
        )
        path = folder.out / "doubt.csv"
        replace_file(path, csv_of_rows(rows, ["rank", "image", "reasons"]))
        tables = tables_of(folder.out, phases=phases_csv(folder), doubt=path)
        for line in write_workbook(
            folder.out / WORKBOOK,
            tables,
            lambda column: telling.DOUBT_WORDS.get(column, words(column)),
            lambda column: column in telling.DOUBT_WORDS or is_share(column),
        ):
            to_terminal(line)
        return rows

    def facts(self, folder: Answer) -> dict[str, Any]:
        """What a network's file has to know of its images, so that new ones are read alike."""
        facts: dict[str, Any] = {}
        if any(self.intake.crop):
            sizes = sorted({done.size for done in folder.done})
            facts |= {"crop": list(self.intake.crop), "cropped_sizes": [list(s) for s in sizes]}
        if self.intake.gray_range is not None:
            facts["gray_range"] = self.intake.gray_range
        known = sorted(um for item in folder.items if (um := folder.scale_of(item)) is not None)
        return {**facts, "um_per_px": [known[0], known[-1]]} if known else facts

    def draw_outlines(self, folder: Answer) -> None:
        """Write the outlines of an answer for other programs, if they are asked for."""
        shutil.rmtree(folder.out / OUTLINES, ignore_errors=True)
        kind, s, crop = self.request.outlines, folder.segmenter, self.intake.crop
        for done in folder.done if kind else ():
            ids = read_mask(folder.file("classes", done.item))
            path = folder.file(OUTLINES, done.item, SUFFIX[kind])
            whole = np.asarray(crop.back(ids, crop.uncut(ids.shape), 0), np.uint8)  # as the user's
            try:
                drawn = packed(whole, kind, s.class_names, s.colours.tolist())
            except DataError as error:
                to_terminal(f"Warning: {done.item.name}: {error}")
                continue
            replace_file(path, drawn, "--out", durable=False)

    def differing(self, folder: Answer, maps: Path | None) -> dict[str, float]:
        """Share of each image's pixels that a network's answer has otherwise than class maps."""
        if maps is None or not isinstance(folder.segmenter, Watched):
            return {}
        names = [p.name for p in self.pictures if (maps / f"{p.name}.png").exists()]
        own = folder.out / "classes"
        pairs = ((read_mask(at / f"{name}.png") for at in (own, maps)) for name in names)
        return {n: doubt.unlike(a, b) for n, (a, b) in zip(names, pairs, strict=True)}

    def report(self) -> None:
        """The page on everything, and its first lines on the terminal."""
        for line in telling.result_lines(self):
            to_terminal(line)
        path = telling.write_page(self, self.folder, self.doubts, final=True)
        to_terminal(f"Report: {path}")
