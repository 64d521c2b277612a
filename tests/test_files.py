"""Result files are replaced as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.commandline import UserError
from utils.files import list_files, replace_file


def test_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.md"
    replace_file(path, "Dice − sup ±\n")
    assert path.read_bytes() == "Dice − sup ±\n".encode()
    replace_file(path, b"\x89PNG")
    assert path.read_bytes() == b"\x89PNG"
    assert [p.name for p in path.parent.iterdir()] == ["table.md"]


def test_a_failure_is_one_line_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.md"
    replace_file(path, "old")

    def full(*words: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"table\.md: cannot be written \(No space.*--out"):
            replace_file(path, "new", "--out")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        replace_file(tmp_path / "file" / "table.md", "new")


def test_the_files_of_a_folder_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/c.png", "a.txt", ".hidden.png", "Thumbs.db", "~$a.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in list_files(tmp_path, (".png",))] == ["b.PNG"]
    assert [path.name for path in list_files(tmp_path)] == ["a.txt", "b.PNG"]
    assert list_files(tmp_path / "missing") == []
