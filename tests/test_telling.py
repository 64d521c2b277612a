"""What is said of held-out blocks: gains and their standard errors by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from segmentation import blocks, telling
from segmentation.answers import Round
from segmentation.blocks import HeldOut
from segmentation.doubt import doubt_words
from segmentation.job import Work
from segmentation.predictors import Watched
from segmentation.schedule import Schedule
from segmentation.telling import (
    PART,
    FirstOf,
    Result,
    annotated_line,
    block_table,
    comparison_lines,
    curve_lines,
    first_checked,
    fraction_lines,
    fraction_rows,
    gain_error,
    honest_lines,
    method_words,
    own_names,
    partial_lines,
    poor_lines,
    poor_phases,
    reduced_lines,
    result_lines,
    short_line,
    warning_lines,
)

Counts = list[list[list[int]]]


def found(*right: int) -> Counts:
    """Confusion matrices of blocks of 20 pixels, 10 of each class, of which some are right."""
    return [[[10, 0], [10 - r, r]] for r in right]


def dice(right: int) -> float:
    """Of class 1 of such a block: 10 true pixels, ``right`` predicted."""
    return 2 * right / (10 + right)


def round_of(fewer: Counts, most: Counts) -> Round:
    return Round(1, "", 2, {}, curve={"2": fewer, "3": most}, by="pixel classifier")


def test_the_error_of_a_gain_is_that_of_its_mean_over_the_blocks() -> None:
    fewer, most = found(5, 5, 5, 5), found(6, 10, 5, 8)
    gains = [dice(r) - dice(5) for r in (6, 10, 5, 8)]
    own = gain_error(HeldOut(np.array(fewer)), HeldOut(np.array(most)))
    assert own == pytest.approx(np.std(gains, ddof=1) / 2)
    assert math.isnan(gain_error(HeldOut(np.array(fewer[:1])), HeldOut(np.array(most[:1]))))


@pytest.mark.parametrize(
    ("fewer", "most", "words"),
    [
        (found(5, 5, 5, 5), found(8, 8, 8, 9), "would still help"),
        (found(8, 8, 8, 8), found(8, 8, 8, 8), "would bring little"),
        (found(5, 8, 2, 9), found(9, 5, 6, 8), "add more than 0.01 is open"),
        (found(5), found(9), "add more than 0.01 is open"),  # one block alone
        # Gains .083 and 0 in turn: mean .042, error .024; one error above .01, not two.
        (found(5, 5, 5, 5), found(6, 5, 6, 5), "add more than 0.01 is open"),
    ],
)
def test_one_mask_is_called_enough_only_where_the_blocks_agree(
    fewer: Counts, most: Counts, words: str
) -> None:
    assert words in curve_lines(round_of(fewer, most))[1]


def test_one_mask_is_judged_by_no_curve_where_a_block_alone_teaches_nothing() -> None:
    """As in images of which one side alone has labels."""
    assert curve_lines(round_of([], found(6, 6))) == []
    alone = curve_lines(round_of(found(5, 5), found(6, 6)), others=False)
    assert "doubtful" in curve_lines(round_of(found(5, 5), found(6, 6)))[1]
    assert "doubtful" not in alone[1]


def test_a_network_that_did_worse_is_said_to_get_no_last_training() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores = {"network": found(5, 5), "pixel classifier": found(6, 6)}
    for kept, told in (("pixel classifier", True), ("network", False)):
        this.kept = kept
        assert ("no last training" in comparison_lines(this)[-1]) == told


def test_a_number_of_blocks_that_could_not_be_learnt_from_is_left_out() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.curve["1"] = []  # labels lie in two blocks: of one alone nothing was learnt
    assert curve_lines(this) == curve_lines(round_of(found(5, 5), found(6, 6))) != []


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        (
            blocks.SINGLE,
            "trained on three quarters of the annotation and scored on the remaining quarter, "
            "for each quarter",
        ),
        (
            blocks.PAIRS,
            "trained on half of the annotation and scored on the other half, for each half",
        ),
    ],
)
def test_it_is_said_how_much_was_learnt_from(folds: tuple[blocks.Fold, ...], words: str) -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = {"pixel classifier": found(6, 6)}, "pixel classifier"
    lists = [list(fold) for fold in folds]
    schedule = Schedule({}, 0, 0, lists, 0, 0, {}, 1, [1, 1], {}, [])
    assert words in honest_lines(this, schedule)[0]


def test_a_dice_on_some_pixels_is_not_told_as_that_of_images() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = {"pixel classifier": found(6, 6)}, "pixel classifier"
    this.labels = {"a": ""}
    whole, strokes = (honest_lines(this, plan(), labelled=share)[0] for share in (0.5, 0.0493))
    assert whole.startswith("Dice 0.750 on held-out blocks") and "alone" not in whole
    # 2 * 6 / (10 + 6) on 4.93 % of the pixels; .754 told and .340 true on uhcs (results/scribbles).
    assert strokes.startswith("Dice 0.750 on labelled pixels alone, 4.9 % of the annotated image:")
    assert "up to 0.41 above theirs" in strokes and "held-out blocks" not in strokes
    (first,) = first_checked(HeldOut(np.array(found(6, 6))), plan(), 1, 0.0493)
    assert first == f"Checked since: {strokes}"
    assert "within" in comparison_lines(this)[0]
    assert "labelled pixels alone, 4.9 % of" in comparison_lines(this, 0.0493)[0]
    assert "labelled pixels alone" in block_table(this, ["a", "b"], 0.0493)["title"]


@pytest.mark.parametrize("others", [[], ["network"]])
def test_what_a_network_learns_beside_strokes_is_told_of_one_that_is_there(
    others: list[str],
) -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = (
        dict.fromkeys(["pixel classifier", *others], found(6)),
        "pixel classifier",
    )
    this.shares, this.sure = [0.5, 0.5], 0.57
    told = " ".join(comparison_lines(this, 0.05))
    assert "each class counts by the area" in told
    assert ("The network learns the strokes and 57 %" in told) == bool(others)


def test_images_that_were_reduced_are_warned_of() -> None:
    assert reduced_lines(1) == []
    (line,) = reduced_lines(4)
    # Also on the page of a first answer, which is soon whatever --minutes is.
    assert "reduced by a factor of 4" in line
    assert line.endswith(
        "with enough --minutes the pixel classifier's last answer is of whole ones"
    )


def test_corrections_of_images_that_are_not_given_are_not_counted() -> None:
    kept = SimpleNamespace(corrected=lambda: {"a": Path("a.png"), "gone": Path("gone.png")})
    work: Any = SimpleNamespace(answers=kept, annotated=[SimpleNamespace(name=n) for n in "ab"])
    assert Work.of_corrections.fget(work) == 1  # type: ignore[attr-defined]


def test_labels_of_some_pixels_are_warned_of_with_the_cure() -> None:
    assert partial_lines(1.0, 1) == partial_lines(0.5, 1) == []
    (line,) = partial_lines(0.0093, 1)
    assert line.startswith("Only 0.93 % of the annotated image is labelled")
    assert "label a second image, and across boundaries" in line
    assert "of the annotated images is labelled" in partial_lines(0.3, 2)[0]


def test_what_is_told_of_strokes_is_what_was_recorded() -> None:
    text = (Path(__file__).parents[1] / "results/scribbles/README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.endswith(".txt` |")]
    gaps = [float(row[4]) - float(row[5]) for row in rows]
    assert len(gaps) >= 8 and f"up to {max(gaps):.2f} above" in PART


def plan(**changed: object) -> Schedule:
    halves = [list(fold) for fold in blocks.PAIRS]
    own = {"folds": halves, "pretrain_steps": 0, "reduce": [1, 1], **changed}
    return Schedule({}, 0, 0, own["folds"], 0, own["pretrain_steps"], {}, 1, own["reduce"], {}, [])  # type: ignore[arg-type]


def test_a_phase_that_was_mostly_wrong_where_it_was_held_out_is_a_warning() -> None:
    # Of class 1 three of ten pixels are found: Dice 2 * 3 / (10 + 3) = .462; of class 0 .741.
    (line,) = poor_lines(HeldOut(np.array(found(3))), ["matrix", "2"])
    # Labels and prediction have 10 pixels of it together, 3 of them in both.
    assert "class 2 0.462 (30 % in both)" in line and "matrix" not in line
    assert "Do not rely" in line and "annotate another image" in line
    (line,) = poor_lines(HeldOut(np.array(found(3))), ["matrix", "2"], labelled=0.02)
    assert "annotate another image" not in line  # the warning of few labels has the cure
    assert poor_lines(HeldOut(np.array(found(4))), ["matrix", "2"]) == []  # 8 / 14 = .571
    assert poor_lines(None, ["matrix", "2"]) == []
    unseen = HeldOut(np.array([[[10, 0], [0, 0]]]))  # no block shows class 1: its Dice is unknown
    assert poor_lines(unseen, ["matrix", "2"]) == []


def test_a_phase_is_marked_where_it_is_warned_of() -> None:
    own = HeldOut(np.array(found(3)))
    assert poor_phases(own, ["matrix", "2"]) == {"2": pytest.approx(6 / 13)}
    assert poor_phases(None, ["matrix", "2"]) == {}


def test_a_column_of_dice_is_not_headed_as_a_value_of_it() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores = {"pixel classifier": found(6, 6)}
    assert block_table(this, ["matrix", "1"])["head"][2:] == ["Dice of matrix", "Dice of class 1"]


def test_the_check_of_the_first_look_says_at_which_size_it_was_made() -> None:
    (line,) = first_checked(HeldOut(np.array(found(10))), plan(), 1)
    assert line.startswith("Checked since: Dice 1.000 on held-out blocks") and "reduced" not in line
    (line,) = first_checked(HeldOut(np.array(found(10))), plan(reduce=[5, 2]), 2)
    assert line.endswith("reduced by a factor of 2, for this look by 5")
    assert "Within the annotated images:" in line


def test_pretraining_is_spoken_of_where_there_was_some() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = {"pixel classifier": found(6, 6)}, "pixel classifier"
    assert "pretraining" not in honest_lines(this, plan())[0]
    assert "pretraining knew the whole mask" in honest_lines(this, plan(pretrain_steps=9))[0]


def test_pages_of_a_stack_keep_their_numbers() -> None:
    pictures = [
        SimpleNamespace(name=name, source=Path("raw") / file)
        for name, file in (("a/s_page2", "a/s.tif"), ("a/t", "a/t.png"))
    ]
    found = own_names(pictures)  # type: ignore[arg-type]
    assert found == {"a/s_page2": "a/s_page2", "a/t": "a/t.png"}


def test_it_is_said_how_the_answer_before_did() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.kept = "network"
    for before, words in ((3, "better than"), (6, "as well as"), (0, "better than")):
        this.scores = {"network": found(6, 6), "answer before": found(before, before)}
        assert (
            comparison_lines(this)[-1] == f"Kept: the network, which does {words} the answer before"
        )
    this.scores["answer before"] = (0 * np.array(found(6, 6))).tolist()  # no score
    assert comparison_lines(this)[-1] == "Kept: the network"


def test_corrected_maps_are_said_to_raise_the_score() -> None:
    this = round_of(found(5, 5), found(6, 6))
    this.scores, this.kept = {"pixel classifier": found(6, 6)}, "pixel classifier"
    this.labels = {"a": "", "b": ""}
    assert "too high" not in honest_lines(this, plan())[0]
    said = honest_lines(this, plan(), corrected=1)[0]
    assert "Labels of 1 of 2 annotated images are corrected class maps" in said
    assert said.endswith("so this Dice is too high")


def test_above_the_images_one_line_tells_the_dice_and_what_it_does_not_say() -> None:
    own = HeldOut(np.array(found(6)))
    line = short_line(own, 1)
    overlap = "(overlap of prediction and labels; 1: every pixel right)"
    assert line.startswith(f"Dice 0.750 {overlap} on held-out blocks of the annotated")
    assert "other images may differ, and no other image has a mask to score on" in line
    assert "too high" not in line and "no other image" not in short_line(own, 1, others=False)
    assert "too high, as 1 of 2 annotated images are corrected" in short_line(own, 2, corrected=1)
    strokes = short_line(own, 1, labelled=0.0493)
    assert "on labelled pixels alone, 4.9 % of the annotated image; whole images may be" in strokes


def test_what_is_odd_in_the_files_is_warned_of_before_what_may_follow_from_it() -> None:
    picture = SimpleNamespace(name="a", source=Path("a.png"), labels=None)
    intake = SimpleNamespace(
        warnings=("mask: looks like scribbles",), annotated=[picture], pictures=[picture]
    )
    names = SimpleNamespace(class_names=["matrix", "pore"], reduce=1)
    folder = SimpleNamespace(segmenter=names, rows=[], with_particles=[1], annotated={})
    odd, few, low = warning_lines(intake, 0.05, folder, HeldOut(np.array(found(3))))  # type: ignore[arg-type]
    assert odd == intake.warnings[0] and few.startswith("Only 5 %") and low.startswith("Dice")


def test_the_terminal_tells_the_warnings_before_a_dice_that_may_be_low_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, lines in {
        "fraction_rows": [],
        "later_warnings": ["Warning: odd"],
        "doubt_lines": [],
    }.items():
        monkeypatch.setattr(telling, name, lambda *_, lines=lines: lines)
    monkeypatch.setattr(telling, "honest_lines", lambda *_: ["Dice 0.2", "annotate another image"])
    monkeypatch.setattr(telling, "new_images_line", lambda *_: "new")
    nothing: dict[str, Any] = {
        "request": SimpleNamespace(out=Path()),
        "others": False,
        "corrected": 0,
        "doubts": [],
        "before": None,
        "schedule": None,
    }
    result = SimpleNamespace(
        this=SimpleNamespace(by="me"),
        folder=SimpleNamespace(items=[]),
        labelled=1.0,
        **nothing,
    )
    said = result_lines(result)  # type: ignore[arg-type]
    assert said[1:] == ["Warning: odd", "Dice 0.2", "annotate another image", "new"]


def test_columns_that_the_table_lacks_are_not_explained() -> None:
    none = math.nan
    row = {"unsure": 0.3, "doubt": none, "vote_disagreement": none, "label_here": 0.1}
    row["twin_differs"] = none
    words = doubt_words([row, {**row, "label_here": none}])
    assert words.startswith("Unsure: 1 - probability") and "Label here" in words
    assert "Doubt:" not in words and "Votes" not in words
    whole = doubt_words([row, {**row, "doubt": 0.1, "vote_disagreement": 0.2}])
    assert "Doubt: unsure, plus the share" in whole and "Votes: share of the 8" in whole
    twin = doubt_words([{**row, "doubt": 0.1, "twin_differs": 0.1}])
    assert twin.count("Doubt: ") == 1 and "on which a twin network disagrees" in twin


def test_of_two_mappings_the_first_counts_before_the_second() -> None:
    near, far = np.zeros((1, 1), bool), np.ones((1, 1), bool)
    both = FirstOf({"a": near}, {"a": far, "b": far})
    assert both["a"] is near and both["b"] is far and "c" not in both
    assert sorted(both) == ["a", "b"] and len(both) == 2


def test_annotated_images_are_said_to_count() -> None:
    line = annotated_line({"b": 1.0}, 12)
    assert line.startswith("1 of 12 images is annotated, whose labels were learnt: b. There labels")
    assert line.endswith("These images count in all numbers as others") and "predicted" not in line
    line = annotated_line({"c": 0.17, "b": 1.0}, 12)
    assert "2 of 12 images are annotated, whose labels were learnt: b, 17 % of c. There" in line
    assert "; their other pixels are predicted." in line


def test_fractions_on_the_terminal_are_those_of_the_page() -> None:
    # Fields of 100 and 300 pixels: (20 * 100 + 40 * 300) / 400 = 35 %, on the page, too.
    class Measured:
        class segmenter:  # noqa: N801  the attribute of a folder
            class_names = ("matrix",)

        rows = [
            {"class": 0, "area_fraction": share, "field_px": pixels}
            for share, pixels in ((0.2, 100), (0.4, 300))
        ]

    (row,) = fraction_rows(Measured)  # type: ignore[arg-type]
    assert (row["mean"], row["least"], row["most"]) == pytest.approx((35, 20, 40))


def test_held_out_blocks_tell_what_a_dice_means_for_area_fractions() -> None:
    # Two blocks of 20 pixels, half of them of class 1, of which 4 and 6 of 10 are found: 10 of 40.
    own = HeldOut(np.array(found(4, 6)))
    (line,) = fraction_lines(own, ["matrix", "1"])
    assert line.endswith("matrix 75.0 % (labels: 50.0 %), class 1 25.0 % (labels: 50.0 %)")
    assert fraction_lines(own, ["matrix", "1"], labelled=0.1) == []


def test_the_method_is_told_with_its_labels_and_its_dice() -> None:
    folder: Any = SimpleNamespace(segmenter=object())
    own = HeldOut(np.array(found(6, 6)))  # 2 * 6 / (10 + 6)
    classifier = "a pixel classifier (filters and a random forest) trained on"
    by_labels = "; annotated fields count by their labels"
    assert method_words(folder, 1, own) == (
        f"{classifier} 1 annotated field (Dice 0.750 on held-out parts of it){by_labels}"
    )
    assert "on held-out labels of them" in method_words(folder, 2, own, 0.1)
    assert method_words(folder, 2, None) == f"{classifier} 2 annotated fields{by_labels}"
    network: Any = SimpleNamespace(segmenter=Watched.__new__(Watched))
    assert method_words(network, 1, None).startswith("a network (UNet) trained on 1 ")


@pytest.mark.parametrize("network", ["", "training/fine.pt"])
def test_a_plan_is_no_fact_and_its_settings_only_where_a_network_answers(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = Round(1, "", 2, {}, by="me", network=network)
    nobody: Any = SimpleNamespace(class_names=["a", "b"])
    folder = SimpleNamespace(segmenter=nobody, annotated={}, by="me")
    schedule = plan()
    schedule.asked["minutes"] = 1.0
    schedule.reasons.extend(["Preset auto: standardize True", "Fine-tuning has 226 steps"])
    request = SimpleNamespace(sample="x", images=Path("x"), out=Path())
    intake = SimpleNamespace(pictures=[], annotated=[], notes=["masks: class ids"])
    result = Result(request, intake, schedule, [this], this, None, 1.0, 0, folder)  # type: ignore[arg-type]
    given = list[Any]()
    monkeypatch.setattr(telling, "write_laboratory", lambda _, told, out: given.append(told))
    telling.write_page(result, final=True)
    (told,) = given
    facts = " ".join(told.notes)
    assert "226 steps" not in facts and "masks: class ids" not in facts
    assert ("standardize True" in facts) == bool(network)
    assert "To correct" not in " ".join(told.said) and "To correct" in facts
    started = " ".join(told.started)
    assert "masks: class ids" in started and "226 steps" in started and "Plan for" in started
