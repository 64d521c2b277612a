"""The numbers of a table, counted by hand from a few pixels; its Markdown and its CSV."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from comparison.table import Comparison, Result, Row, exact


def result(epoch: int, hits: int) -> Result:
    """Two images of 100 pixels, half of each of class 1, of which so many are found, nothing else.

    Dice is 2 * hits / (50 + hits), IoU is hits / 50, ACC is (50 + hits) / 100.
    """
    return Result(epoch, np.array([[[50, 0], [50 - hits, hits]]] * 2))


def row(key: str, hits: dict[int, tuple[int, int]], plain: bool = False, **more: object) -> Row:
    """A row whose repeats found so many at the best and at the last epoch."""
    results = {
        r: {"best": result(99, best), "last": result(299, last)} for r, (best, last) in hits.items()
    }
    return Row(key, f"The {key}", results, plain, **more)


# Dice by hits: 10 -> 1/3, 25 -> 2/3, 30 -> 3/4, 50 -> 1.
SUP = row("sup", {0: (30, 10), 1: (10, 10)}, published=(0.5134, 0.0609, math.nan))
GOOD = row("good", {0: (50, 25), 1: (30, 50)}, plain=True)
POOR = row("poor", {0: (10, 10), 1: (10, 30)}, plain=True)
EARLY = row("early", {1: (50, 50)}, plain=True)
PSCL = row("pscl", {0: (50, 50), 1: (50, 30)})
NOTHING = row("nothing", {})
ROWS = [SUP, GOOD, POOR, EARLY, PSCL, NOTHING]


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(ROWS, np.array([0, 1]), ["sup", "best plain"], [0, 1])


def cells(lines: list[str], title: str, number: int) -> list[str]:
    """Cells of the n-th line that begins with a title."""
    return [c.strip() for c in [x for x in lines if x.startswith(f"| {title} ")][number].split("|")]


def test_means_and_deviations_by_hand(comparison: Comparison) -> None:
    lines = comparison.markdown()
    # best: Dice 3/4 and 1/3, mean 13/24, deviation (5/12) / sqrt(2); ACC 0.8 and 0.6; IoU 0.6, 0.2.
    found = cells(lines, "The sup", 0)
    assert found[2:9] == ["2 of 2", "0.5417", "0.2946", "0.7000", "0.1414", "0.4000", "0.2828"]
    assert found[9:14] == ["-", "-0.3333 [-0.4167, -0.2500]", "0.5134", "0.0609", "-"]
    # last: 1/3 twice.
    assert cells(lines, "The sup", 1)[3:5] == ["0.3333", "0.0000"]
    # best of pscl: 1 twice; less sup 1/4 and 2/3; less good 0 and 1/4.
    found = cells(lines, "The pscl", 0)
    assert found[9:11] == ["+0.4583 [+0.2500, +0.6667]", "+0.1250 [+0.0000, +0.2500]"]
    assert found[11:14] == ["-", "-", "-"]


def test_the_best_plain_method_is_of_those_with_all_repeats(comparison: Comparison) -> None:
    for protocol in ("best", "last"):
        assert comparison.reference("best plain", protocol) is GOOD
    assert any("Dice − best plain (good) [95%]" in line for line in comparison.markdown())
    assert cells(comparison.markdown(), "The good", 0)[10] == "-"
    only_early = Comparison([EARLY, SUP], np.array([0, 1]), ["best plain"], [0])
    assert only_early.reference("best plain", "best") is EARLY
    assert Comparison([SUP], np.array([0, 1]), [], [0]).reference("best plain", "best") is None


def test_differences_are_of_the_repeats_that_both_have(comparison: Comparison) -> None:
    found = comparison.difference(EARLY, "sup", "best")
    assert found is not None
    assert found.value == pytest.approx(1 - 1 / 3) and found.repeats == 1
    assert comparison.difference(NOTHING, "sup", "best") is None
    assert comparison.difference(SUP, "nothing", "best") is None
    back = comparison.difference(GOOD, "early", "best")
    assert back is not None and back.value == pytest.approx(3 / 4 - 1)
    text = Comparison(ROWS, np.array([0, 1]), ["early"], [0, 1]).markdown()
    assert cells(text, "The good", 0)[9].endswith("(1 repeats)")


def test_what_is_not_finished_is_shown_as_such(comparison: Comparison) -> None:
    lines = comparison.markdown()
    assert cells(lines, "The nothing", 0)[2:11] == ["0 of 2", *["-"] * 8]
    assert cells(lines, "The early", 0)[2:5] == ["1 of 2", "1.0000", "-"]


def test_every_single_value_is_there(comparison: Comparison) -> None:
    lines = comparison.markdown()
    values = lines[lines.index("## All values") :]
    assert cells(values, "The sup", 0)[2:] == [
        *("0", "99", "0.7500", "0.8000", "0.6000"),
        *("299", "0.3333", "0.6000", "0.2000", ""),
    ]
    assert len([line for line in values if line.startswith("| The ")]) == 9


def test_the_csv_holds_the_same(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(comparison.csv())))
    assert [(x["protocol"], x["method"]) for x in lines[:2]] == [("best", "sup"), ("best", "good")]
    assert len(lines) == 2 * len(ROWS)
    found = next(x for x in lines if x["method"] == "pscl" and x["protocol"] == "best")
    assert float(found["dice_mean"]) == 1 and float(found["dice_std"]) == 0
    assert float(found["dice_minus_sup_mean"]) == pytest.approx(11 / 24)
    assert found["dice_minus_best_plain_repeats"] == "2" and found["paper_dice"] == ""
    assert float(lines[0]["paper_dice_std"]) == 0.0609 and lines[0]["paper_acc"] == ""
    values = list(csv.DictReader(io.StringIO(comparison.values_csv())))
    assert len(values) == 2 * 9
    assert [values[0][n] for n in ("method", "repeat", "protocol", "epoch")] == [
        *("sup", "0", "best", "99")
    ]
    assert float(values[0]["dice1"]) == 0.75 and float(values[0]["iou1"]) == 0.6


def test_the_papers_columns_are_for_its_own_set_only() -> None:
    lines = Comparison([GOOD], np.array([0, 1]), ["sup"], [0]).markdown()
    assert not any("paper:" in line for line in lines)


def test_numbers_have_ten_decimals_at_most() -> None:
    assert [exact(v) for v in (0.1, 1 / 3, math.nan, 3, -0.5, 10)] == [
        *("0.1", "0.3333333333", "", "3", "-0.5", "10")
    ]


def test_a_class_that_the_truth_lacks_has_no_score() -> None:
    # Class 1 is found in half of its pixels; class 2 is nowhere and predicted once.
    found = Result(0, np.array([[[5, 0, 1], [2, 2, 0], [0, 0, 0]]]))
    assert found.scores["dice"] == found.scores["dice1"] == pytest.approx(2 * 2 / (4 + 2))
    assert math.isnan(found.scores["dice2"]) and math.isnan(found.scores["iou2"])
    line = Comparison([Row("a", "A", {0: {"best": found, "last": found}})], np.array([0]), [], [0])
    values = list(csv.DictReader(io.StringIO(line.values_csv())))[0]
    assert values["dice1"] == values["dice"] == "0.6666666667" and values["dice2"] == ""


def test_a_difference_is_over_the_images_that_both_scored() -> None:
    """By hand: of image 0 both find 50 of 50; of image 1 one method 25, and the other has none."""
    matrices = np.array([[[50, 0], [0, 50]], [[50, 0], [25, 25]], [[50, 0], [40, 10]]])
    more = Result(0, matrices[[0, 1]], np.array([0, 1]))
    less = Result(0, matrices[[0, 2]], np.array([0, 2]))
    rows = [
        Row(key, key, {0: {"best": own, "last": own}}) for key, own in (("a", more), ("b", less))
    ]
    found = Comparison(rows, np.array([0, 1, 2]), ["b"], [0]).difference(rows[0], "b", "best")
    assert found is not None and found.value == 0 and found.ends() == "-"  # image 0 alone
    whole = Result(0, matrices)
    rows[1] = Row("b", "b", {0: {"best": whole, "last": whole}})
    found = Comparison(rows, np.array([0, 1, 2]), ["b"], [0]).difference(rows[0], "b", "best")
    assert found is not None and found.value == 0 and found.ends() == "+0.0000, +0.0000"


def test_images_of_some_repeats_count_in_those_alone() -> None:
    """Repeat 0 scores images 0 and 1, repeat 1 images 1 and 2; Dice by hand from the hits."""
    hits = np.array([[[50, 0], [50 - n, n]] for n in (50, 25, 10)])
    nothing = np.array([[[50, 0], [50, 0]]] * 3)
    places = {0: np.array([0, 1]), 1: np.array([1, 2])}

    def results(counts: np.ndarray) -> dict[int, dict[str, Result]]:
        own = {r: Result(0, counts[at], at) for r, at in places.items()}
        return {r: {"best": each, "last": each} for r, each in own.items()}

    rows = [Row("a", "a", results(hits)), Row("b", "b", results(nothing))]
    found = Comparison(rows, np.array([0, 1, 2]), ["b"], [0, 1]).difference(rows[0], "b", "best")
    # 2 * 75 / (100 + 75) and 2 * 35 / (100 + 35), less 0.
    assert found is not None and found.value == pytest.approx((150 / 175 + 70 / 135) / 2)
    assert found.low < found.value < found.high
