"""What is said about an answer: on the terminal, and on its page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imaging.drawing import blend, overview
from imaging.imagefile import read_image, read_mask
from metallography.folder import SUMMARY
from metallography.particles import Row
from metallography.summary import DEFINITIONS, Table
from report.page import REPORT
from report.segmentation import write_segmentation
from segmentation import doubt
from segmentation.answers import Round
from segmentation.blocks import BLOCKS, HeldOut, stored
from segmentation.predictors import FOREST, NETWORK, Answer
from segmentation.schedule import Schedule
from utils.tables import digits

if TYPE_CHECKING:
    from segmentation.job import Work

WITHIN = (
    "Within the annotated image: learnt from three blocks of the annotation, scored on the fourth, "
    "each in turn. Other images may differ, and pretraining, if any, knew the whole mask"
)
ENOUGH = 0.01  # gain in Dice from one more quarter of the annotation below which it hardly pays
NEW_LABELS = ("image", "pixels that the last answer had otherwise", "labelled pixels")
SHOWN = 60  # pictures on the page


def score_text(value: float) -> str:
    """A Dice with three decimals; '-' if there is none."""
    return digits(value, 3)


def comparison_lines(this: Round, before: Round | None) -> list[str]:
    """Who was compared on held-out blocks, and who is kept."""
    found = {name: stored(this.scores.get(name)) for name in this.scores}
    if not found:
        return [f"No comparison on held-out blocks; the {this.kept} answers"]
    parts = [f"{name} {score_text(own.mean)}" for name, own in found.items() if own]
    lines = [f"Dice on held-out blocks, within the annotated image(s): {', '.join(parts)}"]
    said = f"Kept: the {this.kept}"
    if before is not None and "answer before" in found:
        better = this.kept != "answer before"
        said += ", which does better than the answer before" if better else ", which does best"
    return [*lines, said]


def curve_lines(this: Round) -> list[str]:
    """Whether one mask is enough, by the learning curve of the pixel classifier."""
    means = {int(n): HeldOut(np.asarray(c, np.int64)).mean for n, c in this.curve.items()}
    known = {n: v for n, v in sorted(means.items()) if not math.isnan(v)}
    if len(known) < 2:
        return []
    shown = ", ".join(f"{n} of {BLOCKS}: {score_text(v)}" for n, v in known.items())
    last, one_less = known[max(known)], known[sorted(known)[-2]]
    gain = last - one_less
    if gain < ENOUGH:
        verdict = (
            "The last quarter added hardly anything: more of the same image would bring little; "
            "what helps is a mask of another image, such as the first of the doubtful ones"
        )
    else:
        verdict = (
            f"The last quarter still added {gain:.3f}: a second mask would help; annotate the "
            "first of the doubtful images"
        )
    return [f"Dice by blocks of the annotation learnt from ({FOREST}): {shown}", verdict]


def fraction_rows(folder: Answer) -> list[Row]:
    """Area fraction of each class over the images, in percent: mean, smallest and largest."""
    names = folder.segmenter.class_names
    shares = np.array(list(doubt.fractions_of(folder.rows, len(names)).values()))
    return [
        {"class": name, "mean": 100 * own.mean(), "least": 100 * own.min(), "most": 100 * own.max()}
        for name, own in zip(names, shares.T, strict=True)
    ]


def changes(this: Round, before: Round | None, names: list[str]) -> list[list[str]]:
    """Images whose area fractions changed, the most first: a line of cells each."""
    if before is None:
        return []
    rows = []
    for image, now in this.fractions.items():
        was = before.fractions.get(image)
        if was and len(was) == len(now):
            moved = [abs(a - b) for a, b in zip(was, now, strict=True)]
            rows.append((max(moved), image, was, now))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [
        [image, *(f"{100 * a:.1f} → {100 * b:.1f}" for a, b in zip(was, now, strict=True))]
        for most, image, was, now in rows
        if most >= 0.0005
    ]


def result_lines(work: Work) -> list[str]:
    """The result in a few lines, with its doubts."""
    this, folder, names = work.this, work.folder, work.folder.segmenter.class_names
    lines = [f"{len(folder.items)} images segmented by the {this.by}"]
    for row in fraction_rows(folder):
        lines.append(
            f"  {row['class']}: {row['mean']:.1f} % ({row['least']:.1f} to {row['most']:.1f})"
        )
    lines += honest_lines(this, work.schedule)
    annotated = [p.name for p in work.annotated]
    lines += [f"Doubt: {line}" for line in doubt.missing_lines(this.fractions, names, annotated)]
    marked = [row for row in work.doubts if row["reasons"]]
    lines.append(f"Doubt: {len(marked)} of {len(work.doubts)} images are marked, see doubt.csv")
    lines += [f"  {row['image']}: {row['reasons']}" for row in marked[:5]]
    moved = changes(this, work.before, names)
    if work.before is not None:
        lines.append(f"Changed since the answer before: {len(moved)} of {len(folder.items)} images")
    return lines


def honest_lines(this: Round, schedule: Schedule) -> list[str]:
    """The figure on held-out blocks, the learning curve, and what they do not say."""
    found = stored(this.scores.get(this.kept))
    if found is None:
        return ["There is no score: no test images with masks, and no block could be held out"]
    said = f"Dice {score_text(found.mean)} on held-out blocks. {WITHIN}"
    if NETWORK in this.by and 0 < schedule.block_steps < schedule.fine_steps:
        own, all_ = schedule.block_steps, schedule.fine_steps
        said += f". These networks had {own} steps each, the one that answers {all_}"
    return [said, "There is no score on other images: none of them has a mask", *curve_lines(this)]


def block_table(this: Round, names: list[str]) -> Table:
    """Dice of each block and class by who was compared."""
    rows: list[list[str]] = []
    for title in this.scores:
        found = stored(this.scores.get(title))
        if found is None:
            continue
        for number, dice in enumerate(found.by_block, start=1):
            rows.append([title, f"block {number}", *map(score_text, dice.tolist())])
        rows.append([title, "all blocks", *map(score_text, found.classes.tolist())])
    head = ["who", "held out", *(f"Dice {name}" for name in names)]
    return {"title": "Held-out blocks; - where the block does not show the class", "head": head,
            "rows": rows}  # fmt: skip


def picture_of_all(work: Work, folder: Answer) -> Any:
    """All images, at most ``SHOWN``, with their classes in colour: RGB uint8 (H, W, 3)."""
    items = folder.items
    chosen = np.linspace(0, len(items) - 1, min(SHOWN, len(items))).round().astype(int).tolist()
    annotated = {p.name for p in work.annotated}
    pictures, titles = [], []
    for item in (items[i] for i in chosen):
        mask = read_mask(folder.file("classes", item))
        pictures.append(blend(read_image(item.path), mask, folder.segmenter.colours, 360))
        titles.append(f"{item.name} (annotated)" if item.name in annotated else item.name)
    return overview(pictures, titles)


def write_page(work: Work, folder: Answer, doubts: list[Row], *, final: bool) -> Path:
    """Write ``report.html`` of a job."""
    this, names = work.this, list(folder.segmenter.class_names)
    summary = json.loads((folder.out / SUMMARY).read_text(encoding="utf-8"))
    annotated = [p.name for p in work.annotated]
    fractions = doubt.fractions_of(folder.rows, len(names))
    head = ["image", "doubt", "votes that differ, %", "differs from the pixel classifier, %"]
    percent = ("vote_disagreement", "differs")
    rows = [
        [r["image"], r["reasons"] or "-", *(digits(100 * r[name], 1) for name in percent)]
        for r in doubts
    ]
    areas: Table = {
        "title": "Area fraction over all images, %",
        "head": ["class", "mean", "least", "most"],
        "rows": [
            [r["class"], *(f"{r[n]:.1f}" for n in ("mean", "least", "most"))]
            for r in fraction_rows(folder)
        ],  # fmt: skip
    }
    corrected = [[name, str(n), str(all_)] for name, (n, all_) in this.corrected.items()]
    moved = changes(this, work.before, names) if final else []
    content: dict[str, Any] = {
        "name": work.out.resolve().name,
        "final": final,
        "by": this.by if final else FOREST,
        "images": len(folder.items),
        "annotated": annotated,
        "areas": areas,
        "honest": honest_lines(this, work.schedule) if final else [],
        "blocks": block_table(this, names) if final and this.scores else None,
        "comparison": comparison_lines(this, work.before) if final else [],
        "missing": doubt.missing_lines(fractions, names, annotated),
        "doubts": {"title": "All images without labels, the most doubtful first", "head": head,
                   "rows": rows} if rows else None,
        "marked": sum(bool(r["reasons"]) for r in doubts),
        "before": work.before is not None and final,
        "moved": {"title": "Area fraction before → after, %", "head": ["image", *names],
                  "rows": moved} if moved else None,
        "corrected": {"title": "Labels that are new", "head": NEW_LABELS, "rows": corrected}
        if corrected
        else None,
        "plan": work.schedule.lines(),
        "notes": list(work.intake.notes),
        "definitions": DEFINITIONS,
        "summary": summary,
    }  # fmt: skip
    picture = picture_of_all(work, folder)
    return write_segmentation(work.out / REPORT, content, picture)
