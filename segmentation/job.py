"""One job from the user's folder to the report: what ``segment.py`` does, in order."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from annotation.outlines import SUFFIX, packed
from dataset.batches import batches_of
from dataset.set_file import NAME, scale_by_set, set_of
from imaging.field import visible
from imaging.imagefile import read_mask
from imaging.index import stamp_of
from imaging.listing import some_names
from metallography.items import Item, in_order
from metallography.measure import check_terms, fractions_of
from metallography.particles import Row
from metallography.scales import Scales, find_scales
from metallography.segmenter import Segmenter
from metallography.summary import is_share, words, write_tables
from metallography.tiling import VIEWS
from report.provenance import how_measured
from report.sheets import predicted_sheet
from report.workbook import WORKBOOK, of_islands, sheets_of, today, write_workbook
from segmentation import blocks, doubt, telling
from segmentation.answers import OUTLINES, Answers, Round, Rounds, pair_digest
from segmentation.blocks import HeldOut
from segmentation.comparison import Comparison, Methods
from segmentation.intake import Intake, read
from segmentation.learning import Learning
from segmentation.predictors import (
    BEFORE,
    FOREST,
    MARK,
    NETWORK,
    AnswerFolder,
    Classifier,
    Watched,
    is_marked,
    take_over,
    write_maps,
)
from segmentation.request import Request
from segmentation.schedule import (
    Schedule,
    asked_of,
    load_schedule,
    make_schedule,
    minutes,
    save_schedule,
)
from segmentation.set.record import RECORD, SET
from stages.labels import in_strokes, label_counts, label_line, labelled_share
from utils.commandline import UserError
from utils.files import (
    DataError,
    list_names,
    recover_folder,
    remove_leftovers,
    replace_file,
    writing,
)
from utils.log import only_progress, to_terminal
from utils.metrics import IGNORED
from utils.run_folder import locked
from utils.tables import csv_of_rows

SOMETIMES = ("batches.csv", "particles.csv")  # tables that not every answer has
DONE = (
    "Everything is trained: only images that changed are predicted, and measurements, tables and "
    "the report are made again"
)
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
        recover_folder(request.out / SET)
        for leftover in request.out.glob(f".{SET}[.-]*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        remove_leftovers(request.out)
        intake = read(request, lambda read_in: check(request, read_in, Answers(request.out)))
        answers = Answers(request.out)  # now that what is read is kept: corrections, too
        intake, scales = check(request, intake, answers)
        names = request.class_names or intake.class_names or names_of_set(request, intake)
        request = replace(request, class_names=names)
        for note in intake.notes:
            to_terminal(note)
        for line in intake.warnings:
            to_terminal(f"Warning: {line}")
        learning = Learning(request, intake, started)
        schedule = scheduled(learning)
        with writing(request.out, "--out"):
            opened = open_round(learning, schedule)
            answered = opened.this.answer and (request.out / opened.this.answer).is_dir()
            for line in [DONE] if answered else schedule.lines():
                to_terminal(line)
            work = Work(learning, schedule, answers, scales, opened)
            work.run()
        to_terminal(f"Done, after {minutes(learning.spent())}")
        return work


def check_out(out: Path) -> None:
    """Refuse a folder of results that holds other files; UserError."""
    names = {path.name for path in list_names(out) if not path.name.startswith(".")}
    made_here = (out / SET / RECORD).is_file() or names & set(OWN_FILES)
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


def names_of_set(request: Request, intake: Intake) -> tuple[str, ...]:
    """The names that ``set.json`` gives the classes, if images and masks are of one set; else ().

    Masks from elsewhere, or whose values are read as other classes, may have them in another order.
    """
    known, answers = set_of(request.images), Answers(request.out)
    own = {answers.classes.resolve(), answers.outlines.resolve()}
    masks = [mask for mask in request.masks if mask.resolve() not in own]
    if not intake.holds_ids or known is None or any(set_of(mask) != known for mask in masks):
        return ()
    names = known.class_names[: intake.num_classes]
    if len(names) < intake.num_classes:
        return ()
    to_terminal(f"Names of the classes as {NAME} of the set says: {', '.join(names)}")
    return names


class Opened(NamedTuple):
    """The round that a run is about."""

    rounds: Rounds
    this: Round
    goes_on: bool  # an earlier run began it, and did not end


def with_batches(intake: Intake, request: Request) -> Intake:
    """What was read, with the production batches that ``--batch_from`` tells; DataError."""
    images = [picture.source for picture in intake.pictures]
    found, warned = batches_of(request.batch_from, images, request.images)
    pictures = tuple(p._replace(batch=found.get(p.source)) for p in intake.pictures)
    return intake._replace(pictures=pictures, warnings=(*intake.warnings, *warned))


def check(request: Request, intake: Intake, answers: Answers) -> tuple[Intake, Scales]:
    """What was read, with its production batches, and how large pixels are.

    UserError if the job cannot be done with it.
    """
    check_terms(intake.num_classes, grain_classes=request.grain_classes)
    return with_batches(intake, request), scales_of(request, intake, answers)


def scales_of(request: Request, intake: Intake, answers: Answers) -> Scales:
    """How large a pixel of each image is, as far as anybody told; UserError."""
    own = [Item(p.source, p.name) for p in intake.pictures]
    told = request.um_per_px, request.scales
    of_set = scale_by_set(request.images)
    return find_scales(own, request.images, *told, of_set, OTHER_SCALE, before=answers.scales)


def open_round(learning: Learning, schedule: Schedule) -> Opened:
    """The round of these labels, kept on the disk from now on."""
    intake, rounds = learning.intake, Rounds(learning.request.out)
    learning.values |= schedule.values
    decides = {name: getattr(schedule, name) for name in DECIDES}
    training = learning.config("key", stages="sup").training_settings("sup", "f")
    decides["training"] = {**training, "data_dir": ""}  # by preset and program, not by place
    labels = {p.name: pair_digest(p.file, p.labels) for p in intake.annotated if p.labels}
    known = len(rounds.all)
    this = rounds.open(labels, intake.num_classes, decides)
    return Opened(rounds, this, goes_on=len(rounds.all) == known and not this.answer)


class Work:
    """The steps of a job. Each is skipped if it is done, so a kill loses little."""

    def __init__(
        self,
        learning: Learning,
        schedule: Schedule,
        answers: Answers,
        scales: Scales,
        opened: Opened,
    ) -> None:
        self.learning, self.answers = learning, answers
        self.scales, (self.rounds, self.this, self.goes_on) = scales, opened
        self.before = self.rounds.before(self.this)
        self.methods = Methods(learning, schedule.lengthened(self.this.plan))
        self.request, self.intake = learning.request, learning.intake
        self.out, self.pictures = self.request.out, self.intake.pictures
        self.annotated = self.intake.annotated
        self.classes = self.intake.num_classes
        masks = [read_mask(p.labels) for p in self.annotated if p.labels]
        pairs = zip((p.file for p in self.annotated if p.labels), masks, strict=True)
        insides = [visible(file, mask.shape) for file, mask in pairs]
        self.strokes = in_strokes(masks, insides)
        self.labelled = labelled_share(masks, insides)
        self.label_line = label_line(masks, self.classes, self.request.class_names, insides)
        self.in_no_mask = np.flatnonzero(label_counts(masks, self.classes) == 0).tolist()
        self.places = learning.places
        self.first = self.places.answer("first")
        self.first_look: telling.Result | None = None  # made by this run
        self.compared = False  # by this run
        self.twin: Path | None = None  # folder of the class maps of the network's twin

    @property
    def schedule(self) -> Schedule:
        """The plan as it is now: ``Comparison`` may have made it longer."""
        return self.methods.schedule

    def run(self) -> None:
        """Everything in order."""
        self.answers.keep_scales(self.scales.given)
        for line in self.scales.lines:
            to_terminal(line)
        self.say_round()
        if not self.answers.by:
            self.first_answer()
        blocks.write_labels(self.places.labels(self.this.number), self.annotated, [])
        if not self.this.kept:
            self.compare()
        self.report(self.answer())

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
        by_hand = self.answers.corrections(self.classes)
        for name, (changed, labelled) in self.count_corrected().items():
            line = f"{name}: {changed} of {labelled} labelled pixels differ from the last answer"
            if name in by_hand and changed < FEW_CHANGED * labelled:
                others = f"the {labelled - changed} others are learnt, too"
                line += f"; {others}. Where you did not look, delete {by_hand[name]}, and save a "
                line += "map with 255 there"
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

    def first_answer(self) -> None:
        """All images by the pixel classifier, and a report on them."""
        with only_progress("First answer"):
            folder = self.predict_first()
        self.first_look = self.marked(folder)
        own = self.first, [p.name for p in self.pictures], FOREST, folder.segmenter.class_names
        self.answers.publish(*own, self.intake.crop, self.intake.fingerprints)
        path = telling.write_page(self.first_look, final=False)
        after = f"after {minutes(self.learning.spent())}"
        to_terminal(f"First answer of all images, by the {FOREST}, {after}: {path}")

    def compare(self) -> None:
        """Who does best on held-out blocks, and is kept."""
        own, self.compared = (self.rounds, self.this, self.before, self.strokes), True
        Comparison(self.methods, *own).run(self.check_first_answer)
        for line in telling.comparison_lines(self.this, self.labelled):
            to_terminal(line)

    def check_first_answer(self, found: HeldOut) -> None:
        """Tell with the first answer, if it was made now, how it was checked since."""
        late = self.strokes or math.isnan(found.mean)  # strokes count by area, which is known later
        if self.first_look is not None and not late:
            folder = self.first_look.folder
            checked = telling.first_checked(
                found, self.schedule, len(self.annotated), self.labelled
            )
            folder.notes = [*self.about_answer(folder), telling.FIRST_NOTE, *checked]
            self.write_tables(folder, found, self.first_look.doubts)
            telling.write_page(self.first_look, final=False, found=found)
            self.answers.publish_summary(self.first)
            dice = telling.score_text(found.mean)
            to_terminal(f"First answer checked on held-out blocks: Dice {dice}; its report has it")

    def predict_first(self) -> AnswerFolder:
        """The pixel classifier's answer of this round, anew: a first one, and a second opinion."""
        shutil.rmtree(self.first, ignore_errors=True)
        said = [telling.FIRST_NOTE, telling.NOT_CHECKED]
        folder = self.predict(self.methods.learnt(first=True), self.first, said)
        replace_file(self.first / MARK, self.first_mark(), "--out")
        return folder

    def first_mark(self) -> str:
        """Of what the pixel classifier's answer is: this round, and the images as they are."""
        images = "".join(f"{p.name} {stamp_of(p.file)}" for p in self.pictures)
        return f"{self.this.key} {hashlib.sha256(os.fsencode(images)).hexdigest()[:16]}"

    def second_opinion(self) -> None:
        """Have the pixel classifier's answer of this round beside a network's."""
        if not is_marked(self.first, self.first_mark()):
            with only_progress("Second opinion"):
                self.predict_first()

    def ask_twin(self) -> None:
        """Class maps of all images by the twin of the network that answers, if it has one."""
        name = self.places.twin(self.this.method)
        if self.this.kept == NETWORK and self.schedule.twin:
            labels = self.sure_labels if self.strokes else None
            own = self.schedule.fine_steps, self.methods.start(self.this), labels, "Twin network"
            self.learning.finetune(name, *own, seed=(self.request.seed + 1) % 2**32)
        file = self.methods.network_of(name)
        if file is None:
            return
        network = Watched(Segmenter(file, device=self.request.device), views=1)
        self.twin = self.places.answer("twin")
        with only_progress("Predictions of the twin network"):
            images = {p.name: p.file for p in self.pictures}
            write_maps(self.twin, network, images, f"{self.first_mark()} {network.digest}")

    def predict(
        self,
        predictor: Classifier | Watched,
        place: Path,
        said: Sequence[str] = (),
        scores: HeldOut | None = None,
    ) -> AnswerFolder:
        """Predict and measure all images in a folder of its own; go on where that was stopped.

        ``said`` are sentences for its ``summary.md``, which also warns by the ``scores`` of its
        method on held-out blocks.
        """
        items = in_order(
            [Item(p.file, p.name, stem=p.source.stem, told_batch=p.batch) for p in self.pictures]
        )
        labels = {p.name: p.labels for p in self.annotated if p.labels}
        um = self.scales.given.um_per_px
        told: dict[str, Any] = {"scales": self.scales.of, "min_px": self.request.min_px}
        told["in_no_mask"], told["grain_classes"] = self.in_no_mask, self.request.grain_classes
        told["particles"] = self.request.particles
        told["class_colours"] = self.intake.class_colours
        told["forget_scales"] = self.request.um_per_px == 0
        if isinstance(predictor, Watched):
            told["others"] = [self.first / "classes", *([self.twin] if self.twin else [])]
        folder = AnswerFolder(predictor, items, place, um_per_px=um, labels=labels, **told)
        folder.notes = [*self.about_answer(folder), *said]
        folder.head = self.request.head()
        folder.run()
        if folder.bad:
            raise UserError("\n".join(folder.bad))
        self.write_tables(folder, scores)
        predicted_sheet(folder)
        return folder

    def write_tables(
        self, folder: AnswerFolder, scores: HeldOut | None, doubts: Sequence[Row] = ()
    ) -> None:
        """Write an answer's tables and summary, which warns by its scores on held-out blocks.

        And by its ``doubts``, once they are known.
        """
        folder.warned = telling.warning_lines(self.intake, self.labelled, folder, scores)
        folder.warned += doubt.doubtful_lines(doubts)
        folder.poor = [*telling.poor_phases(scores, folder.segmenter.class_names)]
        learnt = self.rounds.all[self.this.method - 1] if self.this.method else self.this
        folder.by = telling.method_words(folder, len(learnt.labels), scores, self.labelled)
        write_tables(folder, how_measured(folder, folder.by))

    def about_answer(self, folder: AnswerFolder) -> list[str]:
        """What the summary of every answer says: scales, and which images were learnt from."""
        return [*self.scales.lines, telling.annotated_line(folder.annotated, len(folder.items))]

    def answer(self) -> telling.Result:
        """The final answer, by whoever was kept, published over the one before."""
        predictor = self.final()
        if isinstance(predictor, Watched):
            self.second_opinion()
            self.ask_twin()
        labels = hashlib.sha256("".join(sorted(self.this.labels.values())).encode()).hexdigest()
        place = self.places.answer(self.places.training(self.this.number))
        bare, predictor.digest = predictor.digest, f"{predictor.digest}-{labels[:8]}"
        if isinstance(predictor, Classifier) and is_marked(self.first, self.first_mark()):
            own = {p.name: p.labels is not None for p in self.pictures}
            take_over(self.first, place, own, bare, predictor.digest)
        with only_progress("Predictions"):
            scores = blocks.stored(self.this.scores.get(self.this.kept))
            known = self.schedule, self.of_corrections, self.labelled
            checked = telling.honest_lines(self.this, *known)[:1]
            folder = self.predict(predictor, place, checked, scores)
        self.this.fractions = fractions_of(folder.rows, self.classes)
        self.this.answer = place.relative_to(self.out).as_posix()
        self.rounds.save()
        result = self.marked(folder)
        self.draw_outlines(folder)
        names, seen = [p.name for p in self.pictures], (self.intake.crop, self.intake.fingerprints)
        self.answers.publish(place, names, self.this.by, predictor.class_names, *seen)
        for name in SOMETIMES:
            if not (place / name).exists():  # of an answer before
                (self.out / name).unlink(missing_ok=True)
        network = self.out / self.this.network if self.this.network else None
        self.answers.publish_model(network, self.request.class_names, self.facts(folder))
        # Corrections that were made meanwhile are kept since.
        return replace(result, corrected=self.of_corrections)

    def final(self) -> Classifier | Watched:
        """Who answers, trained on all labels, or kept from the round before."""
        this, before = self.this, self.before
        if this.kept == BEFORE and before is not None:
            this.network, this.by, this.method = before.network, before.by, before.method
            this.views = before.views or self.schedule.views
            if before.network:
                return self.methods.watched(self.out / before.network, this.views)
            return self.methods.learnt(self.places.labels(before.method))
        this.by, this.method, this.views = this.kept, this.number, self.schedule.views
        if this.kept == NETWORK:
            name, steps = self.places.training(this.number), self.schedule.fine_steps
            labels = self.sure_labels if self.strokes else None
            file = self.learning.finetune(
                name, steps, self.methods.start(this), labels, "Fine-tuning"
            )
            this.network = file.relative_to(self.out).as_posix()
            return self.methods.watched(file)
        return self.methods.learnt()

    @property
    def of_corrections(self) -> int:
        """How many of the annotated images have a corrected class map."""
        corrected = self.answers.corrected()
        return sum(picture.name in corrected for picture in self.annotated)

    @property
    def sure_labels(self) -> Path:
        """The folder of strokes with the sure labels beside them; ``Comparison`` writes it."""
        return self.places.sure(self.places.training(self.this.number))

    def marked(self, folder: AnswerFolder) -> telling.Result:
        """Write ``doubt.csv`` and the workbook into a predicted folder: with it all is known."""
        annotated = {p.name for p in self.annotated}
        others = [item for item in folder.items if item.name not in annotated]
        maps, classes = (
            {i.name: folder.file(kind, i) for i in others} for kind in ("doubt", "classes")
        )
        places = doubt.Places(maps, fields=classes)
        forest = blocks.stored(self.this.scores.get(FOREST))
        rows = doubt.doubts(
            fractions_of(folder.rows, self.classes),
            folder.segmenter.class_names,
            annotated=sorted(annotated),
            votes=folder.noted("votes"),
            unsure=folder.noted("unsure"),
            differs=self.differing(folder, self.first / "classes"),
            twin=self.differing(folder, self.twin),
            places=places,
            field_px={row["image"]: row["field_px"] for row in folder.rows},
            expected=forest.error if forest else math.nan,
        )
        if doubtful := doubt.doubtful_lines(rows):
            folder.warned = [*folder.warned, *doubtful]
            write_tables(folder, how_measured(folder, folder.by))
        path = folder.out / "doubt.csv"
        replace_file(path, csv_of_rows(rows, ["rank", "image", "reasons"]))
        for line in write_workbook(
            folder.out / WORKBOOK,
            sheets_of(folder, doubt=path),
            lambda column: doubt.DOUBT_WORDS.get(column, words(column)),
            lambda column: column in doubt.DOUBT_WORDS or is_share(column),
            of_islands(folder),
            today(),
        ):
            to_terminal(line)
        return telling.Result(
            self.request,
            self.intake,
            self.schedule,
            self.rounds.all,
            self.this,
            self.before,
            self.labelled,
            corrected=self.of_corrections,
            folder=folder,
            doubts=rows,
            places=places,
        )

    def facts(self, folder: AnswerFolder) -> dict[str, Any]:
        """What a network's file has to know, so that new images are read and predicted alike."""
        facts: dict[str, Any] = {"views": VIEWS if folder.segmenter.tta else 1}
        facts |= {"class_colours": [*c]} if (c := self.intake.class_colours) else {}
        if any(self.intake.crop):
            sizes = sorted({done.size for done in folder.done})
            facts |= {"crop": list(self.intake.crop), "cropped_sizes": [list(s) for s in sizes]}
        if self.intake.gray_range is not None:
            facts["gray_range"] = self.intake.gray_range
        known = sorted(um for item in folder.items if (um := folder.scale_of(item)) is not None)
        return {**facts, "um_per_px": [known[0], known[-1]]} if known else facts

    def draw_outlines(self, folder: AnswerFolder) -> None:
        """Write the outlines of an answer for other programs, if they are asked for."""
        shutil.rmtree(folder.out / OUTLINES, ignore_errors=True)
        kind, s, crop = self.request.outlines, folder.segmenter, self.intake.crop
        for done in folder.done if kind else ():
            ids = folder.measured(done.item)
            path = folder.file(OUTLINES, done.item, SUFFIX[kind])
            whole = np.asarray(crop.back(ids, crop.uncut(ids.shape), 0), np.uint8)  # as the user's
            try:
                drawn = packed(whole, kind, s.class_names, s.colours.tolist())
            except DataError as error:
                to_terminal(f"Warning: {done.item.name}: {error}")
                continue
            replace_file(path, drawn, "--out", durable=False)

    def differing(self, folder: AnswerFolder, maps: Path | None) -> dict[str, float]:
        """Share of each image's pixels that a network's answer has otherwise than class maps."""
        if maps is None or not isinstance(folder.segmenter, Watched):
            return {}
        names = [p.name for p in self.pictures if (maps / f"{p.name}.png").exists()]
        own = folder.out / "classes"
        pairs = ((read_mask(at / f"{name}.png") for at in (own, maps)) for name in names)
        return {n: doubt.unlike(a, b) for n, (a, b) in zip(names, pairs, strict=True)}

    def report(self, result: telling.Result) -> None:
        """The page on everything, and its first lines on the terminal."""
        for line in telling.result_lines(result):
            to_terminal(line)
        lost = self.this.kept == FOREST and NETWORK in self.this.scores
        if lost and self.compared and not self.goes_on:  # whose time this run knows
            for line in self.schedule.early_lines(self.learning.spent()):
                to_terminal(line)
        path = telling.write_page(result, final=True)
        to_terminal(f"Report: {path}")
        for line in self.answers.told:
            to_terminal(f"Warning: {line}")
        for name in dict.fromkeys(self.answers.kept):
            kept = f"corrected while this run went on, kept in {self.answers.place(name)}"
            to_terminal(f"{name}: {kept}; give the same command again, which learns from it")
