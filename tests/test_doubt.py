"""What speaks against a prediction: outliers and classes chosen by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metallography.measure import robust_z
from segmentation.doubt import (
    Places,
    count_lines,
    doubt_map,
    doubtful_lines,
    doubts,
    missing_lines,
)

NAMES = ["matrix", "carbide"]
FRACTIONS = {f"i{n}": [0.9 - 0.002 * n, 0.1 + 0.002 * n] for n in range(9)} | {"odd": [0.5, 0.5]}


def table(**changes: object) -> list[dict[str, object]]:
    given: dict[str, object] = {
        "annotated": ["i0"],
        "votes": {},
        "unsure": {},
        "differs": {},
        "places": {},
    }
    return doubts(FRACTIONS, NAMES, **{**given, **changes})  # type: ignore[arg-type]


def test_robust_z_by_hand() -> None:
    # Median 3, deviations 2 1 0 1 97, their median 1.
    found = robust_z([1, 2, 3, 4, 100])
    assert [round(v, 3) for v in found] == [round(v / 1.4826, 3) for v in (-2, -1, 0, 1, 97)]


def test_an_outlying_area_fraction_is_marked_first_and_labelled_images_are_not_listed() -> None:
    rows = table()
    assert rows[0]["image"] == "odd" and "50.00 % of carbide" in str(rows[0]["reasons"])
    assert [bool(r["reasons"]) for r in rows] == [True] + [False] * 8
    assert "i0" not in [r["image"] for r in rows]


def test_small_differences_are_no_outliers_however_alike_the_others_are() -> None:
    fractions = {f"i{n}": [0.9, 0.1] for n in range(9)} | {"near": [0.88, 0.12]}
    rows = doubts(fractions, NAMES, annotated=[], votes={}, unsure={}, differs={}, places={})
    assert not any(r["reasons"] for r in rows)


def test_without_votes_the_unsurer_image_comes_first() -> None:
    rows = table(unsure={"i3": 0.1, "i5": 0.15, "i7": 0.05})
    assert [r["image"] for r in rows[:4]] == ["odd", "i5", "i3", "i7"]


def test_doubt_adds_what_the_classifier_sees_otherwise_beyond_its_own_error() -> None:
    unsure = {"i3": 0.086, "i4": 0.05, "i5": 0.05, "i6": 0.05}
    differs = {"i3": 0.1, "i4": 0.1, "i5": 0.21, "i6": 0.24}
    rows = table(unsure=unsure, differs=differs, expected=0.2)
    found = {str(r["image"]): r for r in rows}
    assert found["i4"]["doubt"] == pytest.approx(0.05)
    assert found["i5"]["doubt"] == pytest.approx(0.06) and not found["i5"]["reasons"]
    assert found["i6"]["doubt"] == pytest.approx(0.09)
    assert "disagrees on 24 % of the pixels (20 % are expected)" in str(found["i6"]["reasons"])
    assert found["i3"]["doubt"] == pytest.approx(0.086)
    assert "mean certainty is 91 %, the" in str(found["i3"]["reasons"])
    assert [r["image"] for r in rows[:5]] == ["i6", "i3", "odd", "i5", "i4"]
    assert rows[0]["rank"] == 1 and math.isnan(float(str(found["i7"]["doubt"])))


def test_beside_a_twin_the_doubt_is_what_that_sees_otherwise() -> None:
    unsure, differs = {"i3": 0.5, "i4": 0.01}, {"i3": 0.5, "i4": 0.0}
    twin = {"i3": 0.039, "i4": 0.04}
    rows = table(unsure=unsure, differs=differs, twin=twin)
    found = {str(r["image"]): r for r in rows}
    assert found["i3"]["doubt"] == 0.039 and not found["i3"]["reasons"]
    assert found["i4"]["doubt"] == 0.04 and found["i4"]["twin_differs"] == 0.04
    assert found["i4"]["reasons"] == (
        "doubt 0.04: a twin network, trained the same way from other random numbers, disagrees on "
        "4 % of the pixels"
    )


def test_the_doubt_of_a_pixel_by_hand() -> None:
    unsure, own = np.array([[0, 51, 200]], np.uint8), np.array([[0, 1, 1]], np.uint8)
    assert doubt_map(unsure, own).tolist() == [[0, 51, 200]]
    other = np.array([[1, 1, 0]], np.uint8)  # half of 255 more: of 1.5 or 2 at most
    assert doubt_map(unsure, own, [other]).tolist() == [[85, 34, 218]]
    assert doubt_map(unsure, own, [own, other]).tolist() == [[63, 25, 163]]
    assert doubt_map(unsure, own, [other, other]).tolist() == [[127, 25, 227]]


def test_the_places_to_label_are_the_most_doubtful_of_all_images_together(tmp_path: Path) -> None:
    maps = {}
    for name, value in (("calm", 10), ("odd", 90)):
        pixels = np.full((40, 50), value, np.uint8)
        pixels[10:20, 10:20] = 3 * value - 20  # 100 of 2000 pixels: 10, and 250
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        maps[name] = tmp_path / f"{name}.png"
    places = Places(maps, share=0.03)  # 120 of 4000
    assert not places["calm"].any()
    assert 80 <= places["odd"].sum() <= 120 and places["odd"][12:18, 12:18].all()
    assert not Places({"calm": maps["calm"]}, share=0.01)["calm"].any()  # 100 alike are too many
    assert len(Places({})) == 0


def test_places_are_a_share_of_what_counts(tmp_path: Path) -> None:
    """Of 40 x 50 pixels the right half counts: 5 % of 1000 pixels are 50."""
    found, classes = np.zeros((40, 50), np.uint8), np.zeros((40, 50), np.uint8)
    classes[:, :25] = 255
    found[:, 25:] = np.arange(1, 41)[:, None]  # 25 of each level
    Image.fromarray(found).save(tmp_path / "doubt.png")
    Image.fromarray(classes).save(tmp_path / "classes.png")
    maps, fields = {"a": tmp_path / "doubt.png"}, {"a": tmp_path / "classes.png"}
    places = Places(maps, fields=fields)
    expected = np.zeros((40, 50), bool)
    expected[38:, 25:] = True
    assert (places["a"] == expected).all()
    none: dict[str, float] = {}
    given: dict[str, Any] = {"votes": none, "unsure": none, "differs": none, "annotated": []}
    (row,) = doubts({"a": [0.5, 0.5]}, ["0", "1"], places=places, field_px={"a": 1000}, **given)
    assert row["label_here"] == 0.05


def test_a_class_that_only_the_annotation_shows_is_said() -> None:
    fractions = {"a": [0.5, 0.5], "b": [1.0, 0.0], "c": [1.0, 0.0]}
    (line,) = missing_lines(fractions, NAMES, ["a"])
    assert line.startswith("carbide") and "no other image" in line
    assert missing_lines({**fractions, "b": [0.9, 0.1]}, NAMES, ["a"]) == []


def test_an_image_of_which_the_classifier_alone_is_unsure_is_marked_but_not_the_users_own() -> None:
    shares = {name: [0.5, 0.5] for name in ("own", "sure", "unsure")}
    unsure = {"own": 0.5, "sure": 0.19, "unsure": 0.2}
    none: dict[str, float] = {}
    given: dict[str, Any] = {"votes": none, "unsure": unsure, "differs": none, "places": {}}
    rows = doubts(shares, ["0", "1"], annotated=["own"], **given)
    told = {row["image"]: row["reasons"] for row in rows}
    assert told == {"unsure": "the pixel classifier's mean certainty is 80 %", "sure": ""}


def test_a_class_without_a_name_is_called_by_its_number() -> None:
    [line] = missing_lines({"a": [0.5, 0.5], "b": [1, 0]}, ["0 background", "1"], ["a"])
    assert line.startswith("class 1 is in the annotation")
    [line] = missing_lines({"a": [0.5, 0.5], "b": [1, 0]}, ["matrix", "pore"], ["a"])
    assert line.startswith("pore is in")


def counted(**numbers: tuple[float, int]) -> list[dict[str, Any]]:
    """Rows of carbide: particles and pixels of the field, by image."""
    return [
        {"image": name, "class": 1, "number": number, "field_px": pixels}
        for name, (number, pixels) in numbers.items()
    ]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        # 20, 30 and 100 in fields of the annotation's size: a median of 30, over 2.5 * 8 = 20.
        (
            {"b": (20, 100), "c": (15, 50), "d": (100, 100)},
            "8 particles in the annotation (cut by the frame: one half), 30 in",
        ),
        ({"b": (20, 100), "c": (5, 50), "d": (100, 100)}, ""),
        ({}, ""),
    ],
)
def test_many_more_particles_than_in_the_annotation_are_told(
    others: dict[str, tuple[float, int]], words: str
) -> None:
    lines = count_lines(counted(a=(8, 100), **others), NAMES, {"a": 1.0}, [1])
    assert [words in line for line in lines] == [True] * bool(words)
    few = counted(a=(4, 100), **others)  # too few to judge by
    assert count_lines(few, NAMES, {"a": 1.0}, [1]) == []
    # An image that is labelled in part is neither: of 15 in 50 and 100 in 100 the median is 65.
    part = count_lines(counted(a=(8, 100), **others), NAMES, {"a": 1.0, "b": 0.3}, [1])
    assert (
        not words or "8 particles in the annotation (cut by the frame: one half), 65 in" in part[0]
    )
    assert count_lines(counted(a=(8, 100), **others), NAMES, {"a": 0.9}, [1]) == []


def test_where_most_images_are_marked_the_answer_is_doubtful() -> None:
    def rows(*marked: bool) -> list[dict[str, Any]]:
        return [{"reasons": "odd" if each else ""} for each in marked]

    assert doubtful_lines([]) == doubtful_lines(rows(True, False)) == []
    (line,) = doubtful_lines(rows(True, False, True))
    assert line.startswith("2 of 3 images are marked as doubtful: the answer as a whole")
