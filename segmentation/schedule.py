"""From minutes to numbers of steps: once, at the start; stored, so that going on gives the same.

A few steps are timed. What the time is spent on is printed before anything is trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from segmentation import blocks
from segmentation.intake import Intake
from segmentation.learning import Learning
from segmentation.predictors import Costs
from segmentation.request import Request
from stages.finetuning import Supervised
from stages.pretraining import SelfSupervised
from utils.files import replace_file

FILE = "plan.json"
RATE = "per "  # began the names of rates in files of earlier versions
FIRST_LOOK = 60.0  # seconds for the first answer, measurements and pictures of large sets aside
FIRST_SHARE = 0.6  # of these, in which the pixel classifier predicts all images
RESERVE = 0.1  # of the time, for what was not foreseen
# Times longer than timed that the pixel classifier may take and still be in time. On two cores that
# five programs wanted, the minute after a second that was timed was slower by 1.05 in half of 44
# cases, by up to 1.22 in nine of ten, and by up to 1.59 in all.
LATER = 1.25
FINE_STEP = "step of fine-tuning"  # its rate
FASTER = 0.7  # of the seconds that were planned: what a step takes where a plan is made longer
MORE = 1.5  # times as many steps, for which networks that lost are trained again
EARLY = 0.5  # of the time: who is done in less had time for more
HELD_OUT_SHARE = 0.25  # of the time, for held-out blocks
FOREST_SHARE = 0.15  # of the time, for the pixel classifier's last answer beside a network
PRETRAINING_SHARE = 0.5
LITTLE_SHARE = 0.35  # the same where not even ENOUGH steps fit into that
LONGER = (3.0, 2.0, 1.5)  # times the usual steps, where there is time
FEWEST_STEPS = 60  # of fine-tuning, with half of the labels half; with fewer there is no network
ENOUGH = 2000  # steps of pretraining, with fewer of which crops are made smaller
GAINS = "in our tests it did not improve such a network of one annotated image measurably"
MORE_MINUTES = "more --minutes give that time"
MOST_MINUTES = 10_000
MOST_REDUCED = 16  # times a side, for the pixel classifier's last answer
# Seconds on the core that ``Costs.slower`` compares with:
MEASURING = 1.5  # a megapixel, for measurements, overlays and files
PAGE = 2.3  # a page, whatever the images
SHORT_CROP = 96  # pixels a side, in pretraining that has little time
VIEWS_SHARE = 0.2  # of the time that averaging over 8 views may take


@dataclass(frozen=True)
class Schedule:
    """How the time is used, in steps; equal schedules give equal results."""

    asked: dict[str, Any]  # minutes and options that it was made for
    fine_steps: int  # of the final fine-tuning; 0: the time is too short for a network
    block_steps: int  # of each fine-tuning that leaves a fold out; 0: none
    folds: list[list[int]]  # blocks that are held out together
    pretrain_epochs: int  # 0: no pretraining
    pretrain_steps: int
    values: dict[str, Any]  # settings that differ from the preset's, because the time is short
    views: int  # of which predictions are averages: 1 or 8
    reduce: list[
        int
    ]  # factors by which the pixel classifier reduces images: first, and last answer
    seconds: dict[str, float]  # that each part will take
    reasons: list[str]
    twin: bool = False  # whether a twin of the network is trained, for the doubt
    rates: dict[str, float] = field(default_factory=dict)  # seconds per step ..., as timed

    @property
    def expected(self) -> float:
        """Seconds until the end."""
        return sum(self.seconds.values())

    def _end(self) -> str:
        """When the end is expected, and whether that is later than was asked for."""
        given, end = self.asked["minutes"], minutes(self.expected)
        asked = f"{given:g} minute" + ("s" if given != 1 else "")
        if self.expected <= 60 * given:
            return f"Plan for {asked}: the end is expected about {end} after the start"
        late = f"about {end} after the start, later than the {asked} given"
        alone = ": here these images take longer even without a network"
        return f"Plan: the end is expected {late}{'' if self.fine_steps else alone}"

    def longer(self, step: float) -> dict[str, int]:
        """Steps of the trainings for networks that lost after few of them; {} for the same.

        ``step`` is how many seconds one took: on a machine that was busy when steps were timed
        there is time for more, whose comparison is fairer. What is left is counted by the plan, not
        by the clock, so that it does not depend on when a run was stopped.
        """
        planned, count = self.rates.get(FINE_STEP, 0.0), len(self.folds) * self.block_steps
        if self._is_fair or step > FASTER * planned:
            return {}
        left = (1 - RESERVE) * 60 * self.asked["minutes"] - self.expected
        left += (count + self.fine_steps) * planned - count * step
        for factor in (*LONGER, 1.0):
            fine = int(factor * self.fine_steps)
            block = int(fine * self._learnt)
            if (fine + len(self.folds) * block) * step <= left:
                more = block >= MORE * self.block_steps
                return {"fine_steps": fine, "block_steps": block} if more else {}
        return {}

    def lengthened(self, plan: dict[str, int]) -> Schedule:
        """The schedule with the steps that ``longer`` gave, which its lines say."""
        if not plan:
            return self
        fine, block = plan["fine_steps"], plan["block_steps"]
        line = (
            f"The networks that were compared lost after {self.block_steps} steps, which took less "
            f"time than when they were timed: compared again after {block} steps, for a last "
            f"training of {fine}"
        )
        return replace(self, fine_steps=fine, block_steps=block, reasons=[*self.reasons, line])

    @property
    def _learnt(self) -> float:
        """The share of the labels that a network learns which is compared."""
        return 1 - len(self.folds[0]) / blocks.BLOCKS

    @property
    def _is_fair(self) -> bool:
        """Whether such a network has that share of the steps; or there is none."""
        return not 0 < self.block_steps < int(self.fine_steps * self._learnt)

    def early_lines(self, spent: float) -> list[str]:
        """A line where a network that lost had few steps, though most of the time is left."""
        wanted, given = int(self.fine_steps * self._learnt), self.asked["minutes"]
        if self._is_fair or spent > EARLY * 60 * given:
            return []
        return [
            f"This took {minutes(spent)} of the {given:g} minutes. Networks were judged after "
            f"{self.block_steps} steps, where {wanted} would be fair, by what a step took at the "
            f"start: --minutes {2 * given:g} gives them a fairer trial"
        ]

    def lines(self) -> list[str]:
        """The plan for the terminal and the report."""
        parts = [f"  {name}: about {minutes(v)}" for name, v in self.seconds.items() if v >= 0.5]
        return [
            self._end(),
            *parts,
            *(f"  {reason}" for reason in self.reasons),
        ]


def asked_of(request: Request, intake: Intake) -> dict[str, Any]:
    """What a schedule is made for; with other values another one is made."""
    names = ("minutes", "preset", "pretrain", "seed")
    wanted = {name: getattr(request, name) for name in names}
    own = {"classes": intake.num_classes, "images": len(intake.pictures), "pixels": intake.pixels}
    return {**wanted, **own}


def load_schedule(out: Path, asked: dict[str, Any]) -> Schedule | None:
    """The stored schedule, if it was made for the same."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        stored = Schedule(**_with_rates(json.loads((out / FILE).read_text(encoding="utf-8"))))
        if stored.asked == asked:
            return stored
    return None


def _with_rates(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored schedule with its rates apart, which earlier versions had among the seconds."""
    if "rates" in stored:
        return stored
    parts: tuple[dict[str, float], ...] = ({}, {})
    for name, value in stored["seconds"].items():
        rate = name.startswith(RATE)
        parts[rate][name.removeprefix(RATE)] = value
    return {**stored, "seconds": parts[False], "rates": parts[True]}


def save_schedule(out: Path, schedule: Schedule) -> None:
    """Store it for the next run of the same command."""
    replace_file(out / FILE, json.dumps(asdict(schedule), indent=1) + "\n", "--out")


def make_schedule(learning: Learning, asked: dict[str, Any]) -> Schedule:
    """Time a few steps and share the minutes out."""
    usual = dict(learning.values)
    try:
        return _shared_out(learning, asked)
    finally:
        learning.values = usual  # what was tried is not decided; ``Work`` adds what is


def _shared_out(learning: Learning, asked: dict[str, Any]) -> Schedule:
    """See ``make_schedule``; changes values of ``learning`` to time steps with others."""
    request, total = learning.request, 60.0 * learning.request.minutes
    reasons, pretraining = list[str](), list[str]()
    step, predict = learning.seconds_per_step(Supervised), learning.seconds_per_megapixel()
    forest = learning.classifier_costs()
    images = Images(asked["pixels"], predict, forest, learning.spent())
    reduce, views, first, last = images.fixed(total)
    free = images.free(total)
    epochs, steps, self_seconds = _pretraining(learning, free, step, pretraining)
    free -= self_seconds + learning.spent() - images.spent  # pretraining was timed, too
    time = Time(free, HELD_OUT_SHARE * total, forest, reduce[1])
    values, step, shares = _with_labels(learning, step, time)
    reasons += pretraining if shares.suffice else []
    if values and shares.suffice:
        given = ", ".join(f"{name} {value}" for name, value in values.items())
        reasons.append(
            f"The time is short: the network sees fewer crops in a step ({given}), and so has time "
            "for more steps"
        )
    if not shares.suffice:
        reasons.append(
            "The time is too short to train a network: the pixel classifier answers alone; for a "
            f"network give --minutes {_enough(learning, images, step)} or more"
        )
        shares, epochs, steps, values = shares._replace(fine=0, block=0), 0, 0, {}
        left_out = shares.folds
        reduce[1], last = images.alone(
            total, lambda factor: time._replace(reduce=factor).of_classifier(left_out)
        )
        time = time._replace(reduce=reduce[1])
    fine = shares.fine
    twin = fine * step + images.by_network(1)
    has_twin = bool(fine) and shares.left(step, time) >= twin
    reasons += shares.lines(has_twin) if fine else []
    folds = "two held-out halves" if shares.folds == blocks.PAIRS else "four held-out blocks"
    rates = {
        FINE_STEP: step,
        "megapixel predicted": predict,
        "megapixel of the pixel classifier": forest.megapixel,
    }
    seconds = {
        "reading and timing": learning.spent(),
        "first answer by the pixel classifier": first,
        "pretraining": self_seconds if epochs else 0.0,
        folds: shares.held_seconds(step, time),
        "fine-tuning": fine * step,
        "twin network": twin if has_twin else 0.0,
        "predictions, measurements, report": last,
    }
    kept = [f"Preset {request.preset}: {line}" for line in learning.reasons if fine]
    values |= {"self_crop": learning.values["self_crop"]} if epochs else {}
    lists = [list(fold) for fold in shares.folds]
    told = [*kept, *images.lines(reduce, views if fine else 0), *reasons]
    return Schedule(
        asked, fine, shares.block, lists, epochs, steps, values, views, reduce, seconds, told,
        has_twin, rates,
    )  # fmt: skip


class Images(NamedTuple):
    """What all images cost."""

    pixels: float
    predict: float  # seconds a megapixel, by a network in one view
    forest: Costs
    spent: float  # seconds since the start, for reading and timing

    @property
    def whole(self) -> float:
        """Seconds in which the pixel classifier predicts all images, not reduced."""
        return self.forest.megapixel * self.pixels / 1e6

    @property
    def measuring(self) -> float:
        """Seconds that it takes to measure and draw an answer, and to write its page."""
        return self.forest.slower * (MEASURING * self.pixels / 1e6 + PAGE)

    def by_network(self, views: int) -> float:
        """Seconds in which a network predicts all images."""
        return views * self.predict * self.pixels / 1e6

    def by_classifier(self, reduce: int, known: int = 0) -> float:
        """Seconds of an answer by the pixel classifier: learnt, predicted and measured.

        That on images reduced by ``known`` is there already: it is measured again, not predicted.
        """
        predicting = 0.0 if reduce == known else self.whole / reduce**2
        return self.forest.fit(reduce=reduce) + predicting + self.measuring

    def fixed(self, total: float) -> tuple[list[int], int, float, float]:
        """What of ``total`` seconds is spent on all images, whatever is trained.

        Factors by which the pixel classifier reduces images, views of a network, seconds of the
        first answer and of the last one.
        """
        budget = min(FIRST_LOOK, 0.25 * total)
        shares = FIRST_SHARE * budget, FOREST_SHARE * total
        reduce = [reduction(self.whole, seconds) for seconds in shares]
        views = 8 if self.by_network(8) <= VIEWS_SHARE * total else 1
        own = self.by_classifier(reduce[1], known=reduce[0])
        last = max(self.by_network(views) + self.measuring, own)
        return reduce, views, self.by_classifier(reduce[0]), last

    def free(self, total: float) -> float:
        """Seconds of ``total`` that are left for training."""
        _, _, first, last = self.fixed(total)
        return (1 - RESERVE) * total - self.spent - first - last

    def alone(self, total: float, held_out: Callable[[int], float]) -> tuple[int, float]:
        """The factor of the last answer where no network is trained, and its seconds.

        All of the time is its own, but for the first answer and what the ``held_out`` blocks take
        at a factor. Where no factor is in time, it is the one beside a network.
        """
        reduce, _, first, _ = self.fixed(total)
        left = (total - self.spent) / LATER - first
        needed = partial(self.by_classifier, known=reduce[0])
        factors = range(1, MOST_REDUCED + 1)
        factor = next((f for f in factors if held_out(f) + needed(f) <= left), reduce[1])
        return factor, needed(factor)

    def lines(self, reduce: Sequence[int], views: int) -> list[str]:
        """Which answers are computed on reduced images, and in one view (0: by no network)."""
        in_time = reduction(self.whole, FIRST_SHARE * FIRST_LOOK) == 1  # with more minutes
        sooner = "the first answer is to come sooner, whatever --minutes is"
        answers = {
            "first answer": MORE_MINUTES if in_time else sooner,
            "last answer of a pixel classifier": MORE_MINUTES,
        }
        found = [
            f"The {name} is computed on images reduced by a factor of {factor}: whole ones would "
            f"take about {minutes(self.whole - self.whole / factor**2)} longer, but keep fine "
            f"phases; {cure}"
            for (name, cure), factor in zip(answers.items(), reduce, strict=True)
            if factor > 1
        ]
        if views == 1:
            found.append("Predictions are not averaged over 8 views, which would take too long")
        return found


class Time(NamedTuple):
    """Seconds for what learns from labels."""

    free: float
    held_out: float  # of these for held-out blocks, at most
    forest: Costs
    reduce: int  # factor by which the pixel classifier reduces images

    def of_classifier(self, folds: Sequence[blocks.Fold]) -> float:
        """Seconds in which the pixel classifier is held out, learning curve and page included."""
        return self.forest.held(folds, self.reduce) + self.forest.slower * PAGE


class Shares(NamedTuple):
    """Steps of the final fine-tuning, and of each one that leaves a fold out."""

    folds: tuple[blocks.Fold, ...]
    fine: int
    block: int

    @property
    def suffice(self) -> bool:
        """Whether they are enough for a network, and for one to compare, of fewer labels."""
        learnt = 1 - len(self.folds[0]) / blocks.BLOCKS
        return self.fine >= FEWEST_STEPS and self.block >= FEWEST_STEPS * learnt

    @property
    def fair(self) -> bool:
        """Whether those have the share of the steps that they have of the labels."""
        return self.block >= int(self.fine * (1 - len(self.folds[0]) / blocks.BLOCKS))

    def lines(self, has_twin: bool) -> list[str]:
        """The trainings of networks, for the plan."""
        held = ("block", "half")[self.folds == blocks.PAIRS]
        return [
            f"Fine-tuning has {self.fine} steps; for the comparison a network is trained without "
            f"each {held} of the annotation in turn, for {self.block} steps",
            "A twin network, trained the same way from other random numbers, shows which images to "
            "check first"
            if has_twin
            else "There is no time for a twin network, which would find doubtful images better",
        ]

    def left(self, step: float, time: Time) -> float:
        """Seconds that nothing of this takes."""
        return time.free - self.held_seconds(step, time) - self.fine * step

    def held_seconds(self, step: float, time: Time) -> float:
        """Of the held-out blocks: networks, and the pixel classifiers of the learning curve."""
        return time.of_classifier(self.folds) + len(self.folds) * self.block * step


def _shares(step: float, most: int, time: Time) -> Shares:
    """Share the time out between the final fine-tuning, of ``most`` steps, and held-out blocks.

    What learns from three quarters or from half of the labels has that share of the steps, too: it
    sees each label as often as the final network does. If four blocks cannot be held out in this
    way, two halves are.
    """
    for folds in (blocks.SINGLE, blocks.PAIRS):
        fits = time.of_classifier(folds)
        held = min(time.held_out, time.free / 2) - fits
        wanted = int(most * (1 - len(folds[0]) / blocks.BLOCKS))
        block = max(0, min(wanted, int(held / step / len(folds))))
        fine = max(0, min(most, int((time.free - fits) / step) - len(folds) * block))
        shares = Shares(folds, fine, min(block, fine))
        if fine == most and shares.fair:
            break
    return shares


def _with_labels(
    learning: Learning, step: float, time: Time
) -> tuple[dict[str, Any], float, Shares]:
    """The batch of fine-tuning if it is not the preset's, seconds of a step, and the shares.

    A half or a quarter of the preset's batch where its usual steps do not fit: many small steps
    learn more in a given time. Smaller steps are more, so that as many crops are seen. Where time
    is left, up to three times the usual steps are taken (``results/step_sizes``).
    """
    usual, batch = learning.usual_steps, learning.values.get("fine_batch_size")
    for factor in LONGER:
        most = int(factor * usual)
        shares = _shares(step, most, time)
        if shares.fine == most and shares.fair:
            return {}, step, shares
    for divisor in (1, 2, 4) if batch else (1,):
        shares = _shares(step / divisor, usual * divisor, time)
        if shares.fine >= usual:
            break
    if divisor == 1 or not batch:
        return {}, step, shares
    values = {"fine_batch_size": max(1, batch // divisor)}
    learning.values |= values
    step = learning.seconds_per_step(Supervised)
    return values, step, _shares(step, usual * divisor, time)


def _enough(learning: Learning, images: Images, step: float) -> int:
    """How many minutes give a network its fewest steps, by the same plan for longer times.

    So do all times up to twice as long. With more minutes images are reduced less, so that a little
    more may leave a network no time.
    """
    taken, found = PRETRAINING_SHARE if learning.request.pretrain == "always" else 0.0, 0
    for more in range(math.ceil(learning.request.minutes) + 1, MOST_MINUTES):
        total = 60.0 * more
        free, reduce = (1 - taken) * images.free(total), images.fixed(total)[0]
        time = Time(free, HELD_OUT_SHARE * total, images.forest, reduce[1])
        if not _shares(step, learning.usual_steps, time).suffice:
            found = 0
        elif more >= 2 * (found := found or more):
            return found
    return MOST_MINUTES


def _pretraining(
    learning: Learning, free: float, step: float, reasons: list[str]
) -> tuple[int, int, float]:
    """Epochs, steps and seconds of pretraining, 0 without; says why."""
    gains = "" if learning.request.preset == "paper" else GAINS
    if learning.request.pretrain == "never":
        reasons.append(f"No pretraining: {gains or 'not asked for'}; --pretrain always does it")
        return 0, 0, 0.0
    share, crops = PRETRAINING_SHARE * free, ""
    each, short = learning.seconds_per_step(SelfSupervised), min(SHORT_CROP, learning.smallest_side)
    if each * ENOUGH > share and learning.values.get("self_crop") != short:
        learning.values["self_crop"] = short
        each = learning.seconds_per_step(SelfSupervised)
        crops = f", of crops of {short} pixels, as the time is short"
    if each * ENOUGH > share:
        share = LITTLE_SHARE * free
    images = len(learning.intake.pictures)
    per_epoch = max(images // min(8, images), 1)
    epochs = max(0, int(share / each / per_epoch))
    steps = epochs * per_epoch
    if not epochs:
        reasons.append(f"No pretraining: not one epoch fits into {share / free:.0%} of the time")
        return 0, 0, 0.0
    told = f", though {gains}" if gains else ""
    reasons.append(f"Pretraining has {steps} steps in {epochs} epochs{crops}{told}")
    return epochs, steps, steps * each


def reduction(whole: float, seconds: float) -> int:
    """The whole factor by which images must be reduced to be predicted in ``seconds``.

    ``whole`` is how long they take otherwise.
    """
    return max(1, math.ceil(math.sqrt(whole / max(seconds, 1.0))))


def minutes(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds / 60:.1f} min"
