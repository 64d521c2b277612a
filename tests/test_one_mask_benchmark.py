"""The benchmark of one mask never touches a folder that it did not make, and passes failures on."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_set import files, make_set

from benchmarks import one_mask


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sets"
    make_set(folder / "steel")
    monkeypatch.setenv("PSCL_DATA", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("out", ["sets", "sets/new", "link", "."])
def test_folders_of_others_are_left_alone(
    sets: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(sets, sets.parent / "link")
    (sets.parent / "steel").mkdir()  # for '.': a folder of that name without the marker
    before = files(sets.parent)
    assert one_mask.main(["steel", "--out", out]) == 2
    error = capsys.readouterr().err
    assert "--out: " in error
    assert error.count("\n") == 1 and files(sets.parent) == before


def test_a_failing_segment_ends_the_benchmark(
    sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def segment(words: list[str]) -> int:
        calls.append(words)
        return 0 if len(calls) == 1 else 7

    found = SimpleNamespace(line=lambda: "Dice .5", worst=["image001"])
    monkeypatch.setattr(one_mask.segment, "main", segment)
    monkeypatch.setattr(one_mask, "judge", lambda *_: found)
    assert one_mask.main(["steel", "--out", "out", "--correct", "1"]) == 2
    assert "steel: segment.py ended with 7" in capsys.readouterr().err and len(calls) == 2
    made = {path.name for path in (sets.parent / "out" / "steel").iterdir()}
    assert {"images", "masks", "truth", one_mask.MARKER} <= made
    # The same command goes on in its own folder.
    calls.clear()
    assert one_mask.main(["steel", "--out", "out"]) == 0
