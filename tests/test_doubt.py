"""What speaks against a prediction: outliers and classes chosen by hand."""

from __future__ import annotations

import math

from metallography.ranking import robust_z
from segmentation.doubt import doubts, missing_lines
from stages.presets import Look

NAMES = ["matrix", "carbide"]
FRACTIONS = {f"i{n}": [0.9 - 0.002 * n, 0.1 + 0.002 * n] for n in range(9)} | {"odd": [0.5, 0.5]}
LOOK = Look((10, 10), 0.5, 0.2, 1.0)


def table(**changes: object) -> list[dict[str, object]]:
    given: dict[str, object] = {
        "annotated": ["i0"],
        "votes": {},
        "unsure": {},
        "differs": {},
        "looks": {},
    }
    return doubts(FRACTIONS, NAMES, **{**given, **changes})  # type: ignore[arg-type]


def test_robust_z_by_hand() -> None:
    # Median 3, deviations 2 1 0 1 97, their median 1.
    found = robust_z([1, 2, 3, 4, 100])
    assert [round(v, 3) for v in found] == [round(v / 1.4826, 3) for v in (-2, -1, 0, 1, 97)]


def test_an_outlying_area_fraction_is_marked_first_and_labelled_images_are_not_listed() -> None:
    rows = table()
    assert rows[0]["image"] == "odd" and "50.0 % of carbide" in str(rows[0]["reasons"])
    assert [bool(r["reasons"]) for r in rows] == [True] + [False] * 8
    assert "i0" not in [r["image"] for r in rows]


def test_small_differences_are_no_outliers_however_alike_the_others_are() -> None:
    fractions = {f"i{n}": [0.9, 0.1] for n in range(9)} | {"near": [0.88, 0.12]}
    rows = doubts(fractions, NAMES, annotated=[], votes={}, unsure={}, differs={}, looks={})
    assert not any(r["reasons"] for r in rows)


def test_without_votes_the_unsurer_image_comes_first() -> None:
    rows = table(unsure={"i3": 0.2, "i5": 0.3, "i7": 0.1})
    assert [r["image"] for r in rows[:4]] == ["odd", "i5", "i3", "i7"]


def test_votes_order_what_is_not_marked_and_differing_methods_mark() -> None:
    rows = table(votes={"i5": 0.3, "i6": math.nan}, differs={"i7": 0.5})
    assert [r["image"] for r in rows[:2]] == ["i7", "odd"] or rows[0]["image"] == "odd"
    assert "50 % of the pixels" in str(next(r for r in rows if r["image"] == "i7")["reasons"])
    assert rows[2]["image"] == "i5"


def test_contrast_and_sharpness_unlike_the_annotated_are_named_brightness_is_not() -> None:
    looks = {f"i{n}": LOOK for n in range(9)} | {"odd": LOOK._replace(spread=0.05, mean=0.9)}
    rows = table(looks=looks)
    assert "contrast" in str(rows[0]["reasons"]) and "bright" not in str(rows[0]["reasons"])


def test_a_class_that_only_the_annotation_shows_is_said() -> None:
    fractions = {"a": [0.5, 0.5], "b": [1.0, 0.0], "c": [1.0, 0.0]}
    (line,) = missing_lines(fractions, NAMES, ["a"])
    assert line.startswith("carbide") and "no other image" in line
    assert missing_lines({**fractions, "b": [0.9, 0.1]}, NAMES, ["a"]) == []
