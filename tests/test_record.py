"""What is kept of a folder's commands and machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparison.record import write_record


def test_commands_and_environments_are_collected(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_record(path, "first", "here", {"seed": 0}, ["Seed: 0"])
    write_record(path, "second", "there", {"seed": 1}, ["Seed: 1"])
    write_record(path, "first", "here", {"seed": 1}, ["Seed: 1"])
    write_record(path, "", "here", {"seed": 1}, ["Seed: 1"])
    assert json.loads(path.read_text()) == {
        "commands": ["first", "second"],
        "environments": ["here", "there"],
        "seed": 1,
    }
    text = (tmp_path / "run.md").read_text()
    assert text.index("    first\n    second\n") < text.index("- here\n- there\n")
    assert text.endswith("\nSeed: 1\n")


@pytest.mark.parametrize("contents", [b"", b"[1]", b'{"commands": 3}', b"\xff\xfe"])
def test_a_damaged_record_is_written_anew(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(contents)
    write_record(path, "first", "here", {}, [])
    assert json.loads(path.read_text())["commands"] == ["first"]
