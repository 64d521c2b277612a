"""What a run does with an image that an earlier one knew, state by state; and its record."""

from __future__ import annotations

import json
import unicodedata
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from metallography.items import (
    ClassMap,
    Decision,
    Record,
    Results,
    decide,
    list_images,
    noted_of,
)

OURS = (ClassMap.PREDICTED, ClassMap.UNKNOWN)


@pytest.mark.parametrize(
    ("left", "decision"),
    [
        # Nothing is noted, or --overwrite has begun: whatever lies there.
        *[({"noted": False, "map": kind}, Decision.PREDICT) for kind in ClassMap],
        *[({"noted": False, "map": kind, "same": False}, Decision.PREDICT) for kind in ClassMap],
        # What this program made serves as long as all of it is as it should be.
        *[({"map": kind}, Decision.SKIP) for kind in OURS],
        *[({"map": kind, "drawn": False}, Decision.REDRAW) for kind in OURS],
        *[({"map": kind, "same": False}, Decision.PREDICT) for kind in OURS],
        *[({"map": kind, "same": False, "drawn": False}, Decision.PREDICT) for kind in OURS],
        *[({"map": kind, "complete": False}, Decision.PREDICT) for kind in OURS],
        *[({"map": kind, "damaged": True}, Decision.PREDICT) for kind in OURS],
        *[({"map": kind, "classes_fit": False}, Decision.PREDICT) for kind in OURS],
        *[({"map": kind, "drawn": False, "size_fits": False}, Decision.PREDICT) for kind in OURS],
        ({"map": ClassMap.MISSING}, Decision.PREDICT),
        ({"map": ClassMap.MISSING, "drawn": False, "complete": False}, Decision.PREDICT),
        # Somebody's work is kept, whatever became of its image and of the pictures.
        ({"map": ClassMap.CORRECTED}, Decision.SKIP),
        ({"map": ClassMap.CORRECTED, "drawn": False}, Decision.KEEP_CORRECTED),
        ({"map": ClassMap.CORRECTED, "complete": False}, Decision.KEEP_CORRECTED),
        ({"map": ClassMap.CORRECTED, "same": False, "drawn": False}, Decision.KEEP_CORRECTED),
        ({"map": ClassMap.CORRECTED, "classes_fit": False}, Decision.REFUSE),
        ({"map": ClassMap.CORRECTED, "size_fits": False}, Decision.REFUSE),
        ({"map": ClassMap.CORRECTED, "same": False, "size_fits": False}, Decision.REFUSE),
    ],
    ids=str,
)
def test_what_becomes_of_an_image(left: dict[str, Any], decision: Decision) -> None:
    assert decide(Results(**{"noted": True, "same": True, **left})) is decision


def test_no_state_at_all_has_a_correction_predicted_over_or_old_results_kept() -> None:
    for kind, *flags in product(ClassMap, *[(True, False)] * 7):
        same, classes_fit, size_fits, complete, damaged, drawn, noted = flags
        left = Results(noted, same, kind, classes_fit, size_fits, complete, damaged, drawn)
        found = decide(left)
        if noted and kind is ClassMap.CORRECTED:
            assert found not in (Decision.PREDICT, Decision.REDRAW), left
        elif found is not Decision.PREDICT:
            assert noted and same and complete and not damaged and size_fits, left


def test_an_entry_is_known_by_its_parts() -> None:
    entry = {"name": "a", "bytes": 3, "um_per_px": None, "known_um": 0.5, "map": "m", "drawn": "d",
             "bars": [[1, 2]]}  # fmt: skip
    found = noted_of(entry)
    assert found.decides == {"name": "a", "bytes": 3, "um_per_px": None}
    assert found.written == {"map": "m", "drawn": "d"} and found.own == {"m"}
    assert found.bars == [[1, 2]] and found.known_scale == 0.5
    assert noted_of({}) == ({}, {}, [], None)


def test_the_workbook_has_an_entry_of_its_own_that_outlives_overwriting(tmp_path: Path) -> None:
    path, settings = tmp_path / "predicted.jsonl", {"weights": "w"}
    record = Record(path, settings, overwrite=False)
    record.add({"name": "a", "bytes": 1, "map": "m"})
    for digest in ("one", "two"):
        record.add_workbook(digest)
    for overwrite in (False, True):
        again = Record(path, settings, overwrite=overwrite)
        assert again.workbook == "two" and [*again.done] == ["a"]
    assert json.loads(path.read_text().splitlines()[-1]) == {"workbook": "two"}


def test_of_a_workbook_that_an_earlier_version_noted_nothing_is_known(tmp_path: Path) -> None:
    """So it is left where it is, and the user is told; its predictions stay."""
    path = tmp_path / "predicted.jsonl"
    lines = [{"weights": "w"}, {"name": "a", "bytes": 1}, {"name": "", "workbook": "old"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = Record(path, {"weights": "w"}, overwrite=False)
    assert record.workbook == "" and [*record.done] == ["a"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("Prüf_1.tif", unicodedata.normalize("NFD", "Prüf_1.png")),
        (unicodedata.normalize("NFD", "Prüf_1.tif"), "Prüf_1.TIF"),
        ("p1.PNG", "p1.PNG"),
        ("P1.tif", "p1.png"),
    ],
)
def test_a_true_mask_is_found_whatever_form_its_name_has(
    tmp_path: Path, image: str, mask: str
) -> None:
    for name in ("img", "gt"):
        (tmp_path / name).mkdir()
    (tmp_path / "img" / image).touch()
    (tmp_path / "gt" / mask).touch()
    (item,) = list_images(tmp_path / "img", tmp_path / "out", tmp_path / "gt")
    assert item.truth is not None and item.truth.samefile(tmp_path / "gt" / mask)
