"""Does the doubt of a prediction follow its true error? The truth is for judging alone.

``python benchmarks/doubt.py --weights steel_sup/1_0/sup.pt --annotated dataset/steel/sup_num1_0
--test dataset/steel/test_numf --out doubt_steel`` predicts the test images with a network and with
the pixel classifier, which learns the annotated images, and marks them as ``segment.py`` does
(``segmentation/doubt.py``); ``--twin`` is a network that was trained alike with another ``--seed``,
and the images are then marked with it, too. Printed are: Spearman's rank correlation of each
measure with the share of wrong pixels; how many images whose area fraction is wrong by more than 10
points are marked, and how many of the others; and the share of all wrong pixels in the places
marked "label here".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import numpy as np

from imaging.imagefile import read_mask
from metallography.items import Item
from metallography.measure import fractions_of
from metallography.ranking import correlation
from metallography.segmenter import Segmenter
from segmentation import doubt
from segmentation.comparison import annotation
from segmentation.predictors import (
    AnswerFolder,
    Watched,
    second_opinion,
    taught,
    write_maps,
)
from utils.commandline import Parser, exit_code
from utils.files import IMAGE_SUFFIXES, list_files
from utils.metrics import IGNORED

DESCRIPTION = "Does the doubt of a prediction follow its true error?"
WRONG = 0.1  # of the area fraction of some class
BOUNDS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.085, 0.1, 0.15)
MEASURES = ("doubt", "unsure", "differs", "vote_disagreement")


def pairs(split: Path) -> list[tuple[Path, Path]]:
    """The images of a split and their masks."""
    images = list_files(split / "img", IMAGE_SUFFIXES)
    return [(path, split / "gt" / f"{path.stem}.png") for path in images]


def answers(
    network: Segmenter, twin: Path | None, annotated: Path, test: Path, out: Path
) -> tuple[AnswerFolder, AnswerFolder]:
    """The test images by the pixel classifier, in ``out/first``, and by the network beside it.

    Also writes the class maps of a ``twin`` into ``out/twin``.
    """
    given = pairs(annotated)
    forest = taught([annotation(*pair) for pair in given], network.num_classes)
    items = [Item(image, image.stem) for image, _ in pairs(test)]
    first = AnswerFolder(forest, items, out / "first")
    first.run()
    others = [out / "first" / "classes"]
    if twin:
        other = Watched(Segmenter(twin, device=str(network.device)), views=1)
        write_maps(out / "twin", other, {i.name: i.path for i in items}, other.digest)
        others.append(out / "twin")
    found = AnswerFolder(Watched(network, 8), items, out / "network", others=others)
    found.run()
    return first, found


def judge(found: AnswerFolder, test: Path, expected: float, by_twin: bool = False) -> list[str]:
    """Lines on how well doubt follows the truth; of the pixel classifier it has no second."""
    names = list(found.segmenter.class_names)
    masks = {image.stem: mask for image, mask in pairs(test)}
    shares: list[dict[str, float]] = [{} for _ in found.others]  # that others see otherwise
    wrong, off, inside, total = {}, {}, 0, 0
    maps, classes = (
        {item.name: found.file(kind, item) for item in found.items} for kind in ("doubt", "classes")
    )
    places = doubt.Places(maps, fields=classes)
    for item in found.items:
        ids, truth = read_mask(found.file("classes", item)), read_mask(masks[item.name])
        known = truth != IGNORED
        for folder, share in zip(found.others, shares, strict=True):
            share[item.name] = float((ids != read_mask(folder / f"{item.name}.png")).mean())
        errors = known & (ids != truth)
        wrong[item.name] = float(errors.sum() / known.sum())
        off_by = [float(((ids == c) & known).sum() - (truth == c).sum()) for c in range(len(names))]
        off[item.name] = max(map(abs, off_by)) / float(known.sum())
        inside, total = inside + int((errors & places[item.name]).sum()), total + int(errors.sum())
    rows = doubt.doubts(
        fractions_of(found.rows, len(names)),
        names,
        annotated=[],
        votes=found.noted("votes"),
        unsure=found.noted("unsure"),
        differs=shares[0] if shares else {},
        places=places,
        field_px={row["image"]: row["field_px"] for row in found.rows},
        expected=expected,
        twin=shares[1] if by_twin else {},
    )
    own = {row["image"]: row for row in rows}
    bad = {name for name, value in off.items() if value > WRONG}
    marked = {name for name, row in own.items() if row["reasons"]}
    here = np.mean([float(row["label_here"]) for row in rows])
    good = off.keys() - bad
    lines = [f"{len(rows)} images, {100 * np.mean(list(wrong.values())):.1f} % of the pixels wrong"]
    for name in MEASURES if found.others else ("unsure",):
        rho, p, _ = correlation([own[n][name] for n in wrong], list(wrong.values()))
        lines.append(f"Spearman, {name} and the share of wrong pixels: {rho:.2f} (p = {p:.1g})")
    lines.append(
        f"Area fraction wrong by more than 10 points: {len(bad)}, marked {len(bad & marked)}"
    )
    lines.append(f"Of the {len(good)} others are marked {len(marked - bad)}")
    for bound in BOUNDS if found.others else ():
        over = {name for name, row in own.items() if row["doubt"] >= bound}
        parts = [f"{len(over & kind)} of {len(kind)}" for kind in (bad, good)]
        lines.append(f"  doubt of {bound:.3g} and more: {parts[0]}, of the others {parts[1]}")
    held = 100 * inside / max(total, 1)
    lines.append(
        f"{100 * here:.1f} % of the pixels, marked to label, hold {held:.0f} % of the wrong"
    )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="doubt.py", description=DESCRIPTION)
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="weights of the network")
    add(
        "--annotated",
        type=Path,
        required=True,
        help="folder with img and gt that it was trained on",
    )
    add("--test", type=Path, required=True, help="folder with img and gt of other images")
    add("--twin", type=Path, help="weights trained the same way with another seed")
    add("--out", type=Path, required=True, help="folder of the predictions")
    add("--device", default="auto", help="auto, cpu, cuda, mps (auto)")
    given = parser.parse_args(argv)

    def work() -> None:
        network = Segmenter(given.weights, device=given.device)
        first, found = answers(network, given.twin, given.annotated, given.test, given.out)
        expected = second_opinion(given.annotated, network).error
        print(f"The pixel classifier is wrong in {100 * expected:.1f} % of held-out halves")
        print("", "The network answers:", *judge(found, given.test, expected), sep="\n")
        if given.twin:
            print("", "The same, beside its twin:", sep="\n")
            print(*judge(found, given.test, expected, by_twin=True), sep="\n")
        print("", "The pixel classifier answers:", sep="\n")
        print(*judge(first, given.test, expected), sep="\n")

    return exit_code(work, "The same command goes on")


if __name__ == "__main__":
    sys.exit(main())
