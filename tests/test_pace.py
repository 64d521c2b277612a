"""Estimates of time, from seconds written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparison.pace import Pace, duration


def test_what_took_so_long_will_take_so_long_again(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "runs" / "seconds.json")
    pace.learn("pretraining", 30, share=0.25)
    pace.learn("fine-tuning", 10)
    pieces = [("pretraining", 1), ("fine-tuning", 2), ("unknown", 7), ("pretraining", 0.5)]
    assert pace.left(pieces) == 1.5 * 120 + 2 * 10
    again = Pace(tmp_path / "runs" / "seconds.json")
    assert again.seconds == pace.seconds == {"pretraining": 120, "fine-tuning": 10}


def test_what_another_process_learnt_is_kept(tmp_path: Path) -> None:
    one, other = Pace(tmp_path / "seconds.json"), Pace(tmp_path / "seconds.json")
    one.learn("a", 1)
    other.learn("b", 2)
    assert Pace(tmp_path / "seconds.json").seconds == {"a": 1, "b": 2}


def test_no_work_says_nothing(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "seconds.json")
    pace.learn("pretraining", 30, share=0)
    assert pace.seconds == {} and not (tmp_path / "seconds.json").exists()


@pytest.mark.parametrize("contents", [b"", b"[1", b"[1]", b'{"a": "b"}', b"\xff"])
def test_a_damaged_file_counts_for_none(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "seconds.json"
    path.write_bytes(contents)
    pace = Pace(path)
    assert pace.seconds == {}
    pace.learn("a", 1)
    assert Pace(path).seconds == {"a": 1}


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Pace(None).learn("a", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (12000, "3 h 20 min"),
        (47 * 3600 + 59 * 60, "47 h 59 min"),
        (53 * 3600, "2 d 5 h"),
    ],
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
