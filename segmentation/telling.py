"""What is said about an answer: on the terminal, and on its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from annotation.scribbles import FAR, far_from_labels
from imaging.field import visible
from imaging.imagefile import read_mask
from imaging.listing import sample_of
from metallography.items import Item
from metallography.measure import areas_of, class_words, fractions_of, over_fields
from metallography.particles import Array, Row
from metallography.segmenter import MODEL
from metallography.summary import Table, later_warnings
from report.laboratory import Told, own_name, place_of, write_laboratory
from segmentation import doubt
from segmentation.answers import Round, change_tables, changes
from segmentation.blocks import BLOCKS, HeldOut, stored
from segmentation.intake import Intake, Picture
from segmentation.predictors import (
    BEFORE,
    FOREST,
    NETWORK,
    AnswerFolder,
    Watched,
    annotated_words,
    part_text,
)
from segmentation.request import Request
from segmentation.schedule import Schedule
from stages.labels import labelled_share
from utils.metrics import IGNORED, mean_score
from utils.tables import digits

WITHIN = (
    "(1: every pixel right, 0: none). Within the annotated {image}: trained on {learnt} of the "
    "annotation and scored on {rest}, for each {part}. Other images may differ"
)
PART = (
    "Dice {dice} on labelled pixels alone, {share} of the annotated {image}: trained on {learnt} "
    "of them and scored on {rest}, for each {part}. Whole images may be far worse: with "
    "strokes on real sets this Dice was up to 0.41 above theirs (docs/annotation.md)"
)
LABELLED_IN_PART = (
    "Only {share} of the annotated {image} is labelled. How right whole images are is not known, "
    "whatever the Dice on these pixels: label {other} image, and across boundaries, and give the "
    "same command again"
)
CIRCULAR = (
    "Labels of {count} are corrected class maps: what was left there as it was predicted counts as "
    "right, so this Dice is too high"
)
KNEW = ", and pretraining knew the whole mask"

# By the number of blocks that are held out together: what is learnt, what is scored, and which
# part is held out in turn.
SHARES = {
    1: ("three quarters", "the remaining quarter", "quarter"),
    2: ("half", "the other half", "half"),
}
POOR = 0.5  # Dice of a phase, below which wrong pixels are more than twice those that are right
ENOUGH = 0.01  # gain in Dice from one more quarter of the annotation below which it hardly pays
SURE = 2.0  # standard errors that a gain has to be away from that: about 95 %
LABEL_HERE = f"label here: the most doubtful {100 * doubt.SHARE:.0f} % of all pixels"
PARTIAL = 0.5  # share of labelled pixels below which images count as labelled in part
FIRST = (
    "First look, by filters and a random forest. The last answer replaces it; that comes from a "
    "network if there is time for one and it does better on held-out blocks"
)
NOT_YET = (
    "Nothing has been checked yet: no part of the annotation was held out so far. How well this "
    "first look tells the phases apart is not known; it is measured next"
)
NO_BLOCK = (
    "Not checked: no image but the annotated one has a mask, and no part of the annotation could "
    "be held out, so nobody knows how well the phases are told apart"
)
FIRST_NOTE = "First look, which the last answer replaces"
NOT_CHECKED = "Nothing has been checked yet"
LABELS_WIN = (
    "Where an image has labels, they stand in its class map in the place of the prediction. To "
    "correct: change a class map in the folder classes (class ids, which look black in a viewer; "
    "255 where you do not know), or annotate another image, and give the same command again"
)


@dataclass(frozen=True)
class Result:
    """All that is told of one answer: what it was asked for, whence it comes, how it turned out."""

    request: Request
    intake: Intake
    schedule: Schedule
    rounds: Sequence[Round]  # all of the job
    this: Round
    before: Round | None  # whose answer this one replaces
    labelled: float  # share of labelled pixels of the annotated images
    corrected: int  # how many of them have a corrected class map for a mask
    folder: AnswerFolder
    doubts: Sequence[Row] = ()  # see ``doubt.doubts``
    places: Mapping[str, Array] = field(default_factory=dict)  # pixels worth a label, by image

    @property
    def annotated(self) -> Sequence[Picture]:
        """The images whose labels were learnt."""
        return self.intake.annotated

    @property
    def others(self) -> bool:
        """Whether there are images that nobody annotated."""
        return len(self.intake.pictures) > len(self.annotated)


class FirstOf(Mapping[str, Array]):
    """Two mappings read as one, the first before the second; places are read when asked for."""

    def __init__(self, first: Mapping[str, Array], second: Mapping[str, Array]) -> None:
        self.first, self.second = first, second

    def __getitem__(self, name: str) -> Array:
        return self.first[name] if name in self.first else self.second[name]

    def __iter__(self) -> Iterator[str]:
        yield from {**dict.fromkeys(self.second), **dict.fromkeys(self.first)}

    def __len__(self) -> int:
        return len({*self.first, *self.second})


def score_text(value: float) -> str:
    """A Dice with three decimals; '-' if there is none."""
    return digits(value, 3)


def comparison_lines(this: Round, labelled: float = 1.0) -> list[str]:
    """Who was compared on held-out blocks, and who is kept.

    Here and below ``labelled`` is the share of labelled pixels of the annotated images.
    """
    found = {name: stored(this.scores.get(name)) for name in this.scores}
    if not found:
        return [f"No comparison on held-out blocks; the {this.kept} answers"]
    parts = [f"{name} {score_text(own.mean)}" for name, own in found.items() if own]
    where = "within the annotated image(s)"
    if labelled < PARTIAL:
        where = f"on labelled pixels alone, {share_text(labelled)} of the annotated image(s)"
    lines = [f"Dice on held-out blocks, {where}: {', '.join(parts)}"]
    if this.shares:
        learns = (
            f". The network learns the strokes and {100 * this.sure:.0f} % of the pixels beside "
            f"them, of which the {FOREST} is sure"
        )
        lines.append(
            "Strokes show rare classes more often than the image does: each class counts by the "
            f"area that the {FOREST} expects it to have{learns if NETWORK in found else ''}"
        )
    said = f"Kept: the {this.kept}"
    old, kept = found.get(BEFORE), found.get(this.kept)
    if this.kept == BEFORE:
        said += ", which does best"
    elif old and kept and not math.isnan(old.mean):
        said += (
            f", which does {'better than' if kept.mean > old.mean else 'as well as'} the {BEFORE}"
        )
    if NETWORK in found and this.kept != NETWORK:
        said += "; the network gets no last training, as it did worse in its shorter ones"
    return [*lines, said]


def first_checked(
    found: HeldOut, schedule: Schedule, images: int, labelled: float = 1.0
) -> list[str]:
    """How the method of the first look did where parts of the annotation were held out."""
    line = within_line(found, schedule, images, labelled)
    first, last = schedule.reduce
    if first != last:
        line += f". There images were reduced by a factor of {last}, for this look by {first}"
    return [f"Checked since: {line}"]


def within_line(found: HeldOut, schedule: Schedule, images: int, labelled: float = 1.0) -> str:
    """The Dice on held-out blocks of ``images``, and what it was learnt from and scored on."""
    learnt, rest, part = SHARES[max(map(len, schedule.folds))]
    image, dice = "image" if images == 1 else "images", score_text(found.mean)
    about = {"learnt": learnt, "rest": rest, "part": part, "image": image}
    knew = KNEW if schedule.pretrain_steps else ""
    if labelled < PARTIAL:
        return PART.format(dice=dice, share=share_text(labelled), **about) + knew
    return f"Dice {dice} on held-out blocks {WITHIN.format(**about)}{knew}"


def partial_lines(labelled: float, images: int) -> list[str]:
    """A warning where most of the annotated images is not labelled."""
    if labelled >= PARTIAL:
        return []
    image, other = ("image", "a second") if images == 1 else ("images", "another")
    return [LABELLED_IN_PART.format(share=share_text(labelled), image=image, other=other)]


def share_text(share: float) -> str:
    """A share in percent, with two digits."""
    return "100 %" if share == 1 else part_text(share)


def poor_phases(found: HeldOut | None, names: Sequence[str]) -> dict[str, float]:
    """The phases of which more was wrong than right where they were held out, with their Dice."""
    dice = found.classes.tolist() if found else []
    return {name: value for name, value in zip(names, dice, strict=False) if value < POOR}


def poor_lines(found: HeldOut | None, names: Sequence[str], labelled: float = 1.0) -> list[str]:
    """A warning on the phases of which more was wrong than right where they were held out.

    Of all pixels that have a class in the labels or in the prediction, Dice / (2 - Dice) have it in
    both: that is the IoU.
    """
    poor = [
        f"{class_words(name)} {score_text(value)} ({share_text(value / (2 - value))} in both)"
        for name, value in poor_phases(found, names).items()
    ]
    if not poor:
        return []
    cure = "correct a class map, or annotate another image"
    return [
        f"Dice below {POOR:g} on held-out blocks of the annotation: {', '.join(poor)}. In both: of "
        "the pixels that have the phase in the labels or in the prediction, the share that has it "
        "in both. "
        "Do not rely on these area fractions and sizes; "
        + (cure if labelled >= PARTIAL else "more labels come first, see the other warning")
    ]


def annotated_line(annotated: Mapping[str, float], images: int) -> str:
    """Which of the measured images were learnt from, and that they count.

    ``annotated`` is that of the folder: the labelled share by the name of the image.
    """
    named = sorted(annotated.items())
    parts = (name if share == 1 else f"{part_text(share)} of {name}" for name, share in named)
    shown = ", ".join(parts)
    what = "is annotated" if len(named) == 1 else "are annotated"
    rest = "" if {*annotated.values()} <= {1.0} else "; their other pixels are predicted"
    return (
        f"{len(named)} of {images} images {what}, whose labels were learnt: {shown}. There labels "
        f"stand in the place of the prediction{rest}. These images count in all numbers as others"
    )


def curve_lines(this: Round, others: bool = True) -> list[str]:
    """Whether one mask is enough, by the learning curve of the pixel classifier.

    ``others``: whether there are images that nobody annotated.
    """
    curves = {int(n): stored(c) for n, c in this.curve.items()}  # none: nothing was held out
    known = {n: v for n, v in sorted(curves.items()) if v and not math.isnan(v.mean)}
    if len(known) < 2:
        return []
    shown = ", ".join(f"{score_text(v.mean)} by {n} of {BLOCKS}" for n, v in known.items())
    fewer, most = [known[n] for n in sorted(known)[-2:]]
    gain, error = most.mean - fewer.mean, gain_error(fewer, most)
    added = f"The last quarter learnt changed the Dice by {gain:+.3f} (standard error {error:.3f})"
    if gain - SURE * error > ENOUGH:
        cure = "annotate the first doubtful image" if others else "add images, and annotate one"
        verdict = f"{added}: more labels would still help; {cure}"
    elif gain + SURE * error < ENOUGH:
        such = ", such as the first doubtful one" if others else ""
        verdict = (
            f"{added}: more of the same image would bring little; what may help is a mask of "
            f"another image{such}"
        )
    else:
        verdict = f"{added}: whether another mask would add more than {ENOUGH:g} is open" + (
            "; if the first doubtful image looks wrong, correct that" if others else ""
        )
    learnt = f"Dice on held-out blocks, by how much of the annotation the {FOREST} learnt"
    return [f"{learnt}: {shown} blocks", verdict]


def gain_error(fewer: HeldOut, most: HeldOut) -> float:
    """Standard error of the gain in Dice, by its spread over the blocks; nan for fewer than two."""
    if fewer.counts.shape != most.counts.shape:
        return math.nan
    gains = mean_score(most.by_block) - mean_score(fewer.by_block)
    gains = gains[~np.isnan(gains)]
    return float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.nan


def fraction_rows(folder: AnswerFolder) -> list[Row]:
    """Area fraction of each class in percent: mean over the fields, smallest and largest."""
    found = []
    for c, name in enumerate(folder.segmenter.class_names):
        rows = [row for row in folder.rows if row["class"] == c]
        shares = [100 * row["area_fraction"] for row in rows]
        mean = over_fields(shares, areas_of(rows)).mean
        found.append({"class": name, "mean": mean, "least": min(shares), "most": max(shares)})
    return found


def result_lines(result: Result) -> list[str]:
    """The result in a few lines, with its doubts."""
    this, folder = result.this, result.folder
    lines = [f"{len(folder.items)} images segmented by the {this.by}"]
    for row in fraction_rows(folder):
        lines.append(
            f"  {row['class']}: {row['mean']:.1f} % (single images: {row['least']:.1f} to "
            f"{row['most']:.1f})"
        )
    lines += later_warnings(folder)  # first, as what is odd in the files may be why a Dice is low
    known = result.corrected, result.labelled, result.others
    lines += honest_lines(this, result.schedule, *known)
    marked = [row for row in result.doubts if row["reasons"]]
    lines += doubt_lines(result.doubts)
    lines += [f"  {row['image']}: {row['reasons']}" for row in marked[:5]]
    lines.append(new_images_line(this, result.request.out))
    moved = changes(this, result.before)
    if result.before is not None:
        lines.append(f"Changed since the answer before: {len(moved)} of {len(folder.items)} images")
    return lines


def warning_lines(
    intake: Intake, labelled: float, folder: AnswerFolder, found: HeldOut | None
) -> list[str]:
    """What a reader of an answer should know: the same in the log, on the page, in the summary.

    ``found`` are the scores of its method on held-out blocks. What all folders of images are warned
    of is said beside it (``metallography.summary.warnings``). What is odd in the files comes first:
    all the rest may follow from it.
    """
    names, annotated = list(folder.segmenter.class_names), [p.name for p in intake.annotated]
    own, counted = own_names(intake.pictures), folder.with_particles
    fractions = fractions_of(folder.rows, len(names))
    pixels = {row["image"]: row["field_px"] for row in folder.rows}
    far = [
        f"{own[name]}: {100 * place.sum() / pixels[name]:.0f} % of it is far from any label "
        "(hatched in the report); a few strokes there would help"
        for name, place in far_places(intake.annotated).items()
    ]
    return [
        *intake.warnings,
        *reduced_lines(folder.segmenter.reduce),
        *partial_lines(labelled, len(annotated)),
        *poor_lines(found, names, labelled),
        *doubt.missing_lines(fractions, names, annotated),
        *doubt.count_lines(folder.rows, names, folder.annotated, counted),
        *far,
    ]


def reduced_lines(factor: int) -> list[str]:
    """A warning if the pixel classifier saw images reduced by a factor above 1."""
    what = f"Images were reduced by a factor of {factor}, as the time was short: fine phases suffer"
    cure = "with enough --minutes the pixel classifier's last answer is of whole ones"
    return [f"{what}; {cure}"] if factor > 1 else []


def own_names(pictures: Sequence[Picture]) -> dict[str, str]:
    """The images as their files are called, with sub-folders, by the names that they have here."""
    return {p.name: own_name(Item(p.source, p.name)) for p in pictures}


def new_images_line(this: Round, out: Path) -> str:
    """How to have new images segmented: by the network, if one answers."""
    if this.network:
        return f"For new images: python predict.py --weights {out / MODEL} --images FOLDER"
    return (
        f"The {FOREST} answers, and no network: {MODEL} is not written, and predict.py has nothing "
        "to apply. For new images add them to the folder, and give the same command"
    )


def doubt_lines(doubts: Sequence[Row]) -> list[str]:
    """How unsure the answer is, and how many images are marked."""
    if not doubts:
        return []
    marked = sum(bool(row["reasons"]) for row in doubts)
    unsure = float(np.mean([row["unsure"] for row in doubts]))
    certainty = f"Its mean certainty is {doubt.certainty(unsure)}"
    lines = [f"{certainty} (probability of the likeliest class, by its own account)"]
    if math.isnan(doubts[0]["doubt"]):
        lines.append(
            f"No other method checks the {FOREST}: an image is marked where its mean certainty is "
            f"{doubt.certainty(doubt.UNSURE)} or less, or where its area fractions are outliers"
        )
    lines.append(f"Doubt: {marked} of {len(doubts)} images are marked, see doubt.csv")
    return lines


def honest_lines(
    this: Round,
    schedule: Schedule,
    corrected: int = 0,
    labelled: float = 1.0,
    others: bool = True,
) -> list[str]:
    """The figure on held-out blocks, the learning curve, and what they do not say.

    ``corrected`` is the number of images whose labels are corrected class maps, ``others`` whether
    there are images that nobody annotated.
    """
    found = stored(this.scores.get(this.kept))
    if found is None:
        return ["There is no score: no test images with masks, and no block could be held out"]
    said = within_line(found, schedule, len(this.labels), labelled)
    if this.kept == NETWORK and 0 < schedule.block_steps < schedule.fine_steps:
        own, all_ = schedule.block_steps, schedule.fine_steps
        said += f". These networks had {own} steps each, the one that answers {all_}"
    if corrected:
        count = f"{corrected} of {len(this.labels)} annotated images"
        said += f". {CIRCULAR.format(count=count)}"
    unknown = ["There is no score on other images: none of them has a mask"] if others else []
    return [said, *unknown, *curve_lines(this, others)]


def short_line(
    found: HeldOut, images: int, corrected: int = 0, labelled: float = 1.0, others: bool = True
) -> str:
    """The Dice on held-out blocks in a line, as it stands above the images; see ``honest_lines``.

    ``images`` is the number of annotated ones.
    """
    which, dice = "image" if images == 1 else "images", score_text(found.mean)
    where, but = f"held-out blocks of the annotated {which}", "other images may differ"
    if labelled < PARTIAL:
        where = f"labelled pixels alone, {share_text(labelled)} of the annotated {which}"
        but = "whole images may be far worse"
    said = f"Dice {dice} (overlap of prediction and labels; 1: every pixel right) on {where}; {but}"
    said += ", and no other image has a mask to score on" if others else ""
    if corrected:
        said += f"; too high, as {corrected} of {images} annotated images are corrected class maps"
    return f"{said}. More below: How it was made"


def fraction_lines(found: HeldOut, names: Sequence[str], labelled: float = 1.0) -> list[str]:
    """What a Dice means for area fractions: predicted and true ones on the held-out blocks.

    Nothing where most of the annotated images is not labelled: fractions of strokes are none.
    """
    counts = found.counts.sum(axis=0)
    if labelled < PARTIAL or not counts.sum():
        return []
    true, predicted = (100 * counts.sum(axis=axis) / counts.sum() for axis in (1, 0))
    parts = [
        f"{class_words(name)} {digits(p, 1)} % (labels: {digits(t, 1)} %)"
        for name, p, t in zip(names, predicted.tolist(), true.tolist(), strict=True)
    ]
    return [f"On these blocks the area fractions were predicted as: {', '.join(parts)}"]


def block_table(this: Round, names: list[str], labelled: float = 1.0) -> Table:
    """Dice of each block and class by who was compared."""
    rows: list[list[str]] = []
    for title in this.scores:
        found = stored(this.scores.get(title))
        if found is None:
            continue
        for number, dice in enumerate(found.by_block, start=1):
            rows.append([title, f"block {number}", *map(score_text, dice.tolist())])
        rows.append([title, "all blocks", *map(score_text, found.classes.tolist())])
    head = ["who", "held out", *(f"Dice of {class_words(name)}" for name in names)]
    what = "Held-out blocks" + (", labelled pixels alone" if labelled < PARTIAL else "")
    title = f"{what}; - where the block does not show the class"
    return {"title": title, "head": head, "rows": rows}


def far_places(annotated: Sequence[Picture]) -> dict[str, Array]:
    """Of images labelled in part: bool (H, W), true far from any label, by the image's name."""
    places = {}
    for picture in annotated:
        mask = read_mask(picture.labels) if picture.labels else None
        inside = None if mask is None else visible(picture.file, mask.shape)
        if mask is not None and labelled_share([mask], [inside]) < PARTIAL:
            place = far_from_labels(mask != IGNORED, FAR * min(mask.shape))
            places[picture.name] = place if inside is None else place & inside
    return {name: place for name, place in places.items() if place.any()}


def write_page(result: Result, *, final: bool, found: HeldOut | None = None) -> Path:
    """Write ``report.html`` of a job; ``found`` are held-out scores of the first answer's method.

    Its warnings are those of its tables (``AnswerFolder.warned``): an answer that nothing was held
    out for says so among them.
    """
    this, folder, doubts = result.this, result.folder, result.doubts
    names, request = list(folder.segmenter.class_names), result.request
    own, annotated = own_names(result.intake.pictures), [p.name for p in result.annotated]
    far_away, whole = far_places(result.annotated), final and bool(this.scores)
    part, all_ = result.labelled, len(annotated)
    count, others = result.corrected, result.others
    found = stored(this.scores.get(this.kept)) if final else found
    said = [] if final else [FIRST]
    if found and not math.isnan(found.mean):
        said += [short_line(found, all_, count if final else 0, part, others)]
        said += fraction_lines(found, names, part)
    elif final:
        said += honest_lines(this, result.schedule)
    told_how = "" if found and not math.isnan(found.mean) else NO_BLOCK if final else NOT_YET
    told = Told(
        request.sample or sample_of(request.images),
        place=place_of(request.images),
        annotated={name: annotated_words(share) for name, share in folder.annotated.items()},
        unchecked=told_how,
        poor=[*poor_phases(found, names)],
        names=own,
        by=by_words(result, own, final),
        how=folder.by,
        said=said,
        doubts=doubt.doubt_table(doubts, own) if doubts else None,
        doubt_words=doubt.doubt_words(doubts),
        marks={row["image"]: row["reasons"] for row in doubts if row["reasons"]},
        marked_places=FirstOf(far_away, result.places),
        places=" or ".join([LABEL_HERE, *(["far from any label"] if far_away else [])]),
        changed=change_tables(this, result.before, names, own) if final else [],
        trained=[block_table(this, names, part)] if whole else [],
        notes=[
            *(curve_lines(this, others) if final else []),
            *(comparison_lines(this, part) if final else []),
            *(preset_lines(result.schedule) if final and this.network else []),
            LABELS_WIN,
            *([new_images_line(this, request.out)] if final else []),
        ],
        started=[*result.intake.notes, *result.schedule.lines()],
    )
    return write_laboratory(folder, told, request.out)


def preset_lines(schedule: Schedule) -> list[str]:
    """What a preset took from the images: settings of a network, and facts only where one answers.

    All other lines of the plan are what was meant to be done.
    """
    return [line for line in schedule.reasons if line.startswith("Preset ")]


def method_words(
    folder: AnswerFolder, learnt: int, found: HeldOut | None, labelled: float = 1.0
) -> str:
    """Who segmented, for ``provenance.how_measured``: the method, its labels, its Dice on others.

    ``learnt`` is the number of images whose labels it learnt.
    """
    by_network = isinstance(folder.segmenter, Watched)
    who = "a network (UNet)" if by_network else "a pixel classifier (filters and a random forest)"
    said = f"{who} trained on {learnt} annotated field{'s' if learnt > 1 else ''}"
    if found and not math.isnan(found.mean):
        where = "parts" if labelled >= PARTIAL else "labels"
        of = "it" if learnt == 1 else "them"
        said += f" (Dice {score_text(found.mean)} on held-out {where} of {of})"
    return f"{said}; annotated fields count by their labels"


def by_words(result: Result, own: Mapping[str, str], final: bool) -> str:
    """Who answers, and which images that has learnt; ``own`` is that of ``own_names``."""
    this, learnt = result.this, [p.name for p in result.annotated]
    if final and this.method:
        learnt = [*result.rounds[this.method - 1].labels]
    count = f"{len(learnt)} annotated image{'s' if len(learnt) > 1 else ''}"
    by = f"{this.by if final else FOREST}, which learnt from {count}: "
    return by + ", ".join(own.get(name, name) for name in learnt)
