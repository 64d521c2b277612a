"""Result files are replaced as a whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.commandline import UserError
from utils.files import (
    Behind,
    confined,
    cut_name,
    inside,
    keep_times,
    left_by_kill,
    list_files,
    open_to_append,
    recover_folder,
    refuse_held,
    remove_leftovers,
    replace_file,
    replacing,
    replacing_folder,
    special_kind,
)

Held = Callable[[int, int], list[float]]  # the fixture ``held``


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


@pytest.mark.parametrize("number", [5, 32, 33])  # ERROR_ACCESS_DENIED, _SHARING_, _LOCK_VIOLATION
def test_a_file_that_is_held_for_a_moment_is_replaced(
    tmp_path: Path, held: Held, number: int
) -> None:
    (tmp_path / "set").mkdir()
    waits = held(number, 2)
    replace_file(tmp_path / "a.csv", "new")
    assert (tmp_path / "a.csv").read_text() == "new" and len(waits) == 2
    waits = held(number, 2)
    with replacing_folder(tmp_path / "set") as root:
        (root / "new").touch()
    assert os.listdir(tmp_path / "set") == ["new"] and len(waits) == 2


def test_a_file_that_stays_open_is_told_with_its_cure(tmp_path: Path, held: Held) -> None:
    path = tmp_path / "measurements.xlsx"
    path.write_text("old")
    waits = held(32, 1000)
    with pytest.raises(UserError, match=r"xlsx: cannot be replaced .* open in another.*Excel"):
        replace_file(path, "new", "--out")
    assert 2 <= sum(waits) <= 3  # seconds
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_what_a_system_forbids_for_good_is_not_tried_again(tmp_path: Path, held: Held) -> None:
    waits = held(0, 1)
    with pytest.raises(UserError, match="give an output_dir that may be written to"):
        replace_file(tmp_path / "a.csv", "new")
    assert waits == []


def test_an_open_table_is_told_before_the_work(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "measurements.csv"
    table.write_text("old")
    paths = [tmp_path / "missing.csv", table]
    monkeypatch.setattr("utils.files.WINDOWS", False)
    held(32, 1000)
    refuse_held(paths)  # no other system holds files
    monkeypatch.setattr("utils.files.WINDOWS", True)
    with pytest.raises(UserError, match=r"measurements\.csv: cannot be replaced"):
        refuse_held(paths)
    held(5, 1000)  # a network drive that does not rename so
    refuse_held(paths)
    assert table.read_text() == "old"


def test_the_files_of_a_folder_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/c.png", "a.txt", ".hidden.png", "Thumbs.db", "~$a.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in list_files(tmp_path, (".png",))] == ["b.PNG"]
    assert [path.name for path in list_files(tmp_path)] == ["a.txt", "b.PNG"]
    assert list_files(tmp_path / "missing") == []


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links cannot be made here")


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    link(tmp_path / "table.csv", tmp_path / "outside")
    link(tmp_path / f".table.csv.{os.getpid()}.tmp", tmp_path / "outside")
    replace_file(tmp_path / "table.csv", "new")
    assert (tmp_path / "outside").read_text() == "mine"
    assert (tmp_path / "table.csv").read_text() == "new"
    assert not (tmp_path / "table.csv").is_symlink()


def test_nothing_is_written_out_of_a_folder_through_a_link(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (run / "inside").mkdir(parents=True)
    link(run / "epoch_1", outside)
    link(run / "other", run / "inside")
    link(tmp_path / "scratch", run)
    for folder in (run, tmp_path / "scratch"):  # a folder that is itself a link is where it leads
        with confined(folder):
            for name in ("epoch_1/a.png", "epoch_1/new/a.png"):
                with pytest.raises(UserError, match=r"a link leads from .* remove the link"):
                    replace_file(folder / name, "new")
            replace_file(folder / "other" / "a.png", "new")
            replace_file(folder / "plain.png", "new")
            replace_file(outside.parent / "elsewhere.txt", "new")
    assert list(outside.iterdir()) == []
    replace_file(run / "epoch_1" / "a.png", "new")  # afterwards it is a folder like any other
    assert [path.name for path in outside.iterdir()] == ["a.png"]


def test_logs_are_appended_to_but_not_through_links(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with open_to_append(tmp_path / "log.txt") as file:
            assert file.tell() == (0 if text == b"one" else 3)
            file.write(text)
    assert (tmp_path / "log.txt").read_bytes() == b"onetwo"
    for name in ("log.txt", "missing.txt"):
        (tmp_path / "link.txt").unlink(missing_ok=True)
        link(tmp_path / "link.txt", tmp_path / name)
        with pytest.raises(UserError, match=r"link\.txt: a link to .*; remove the link"):
            open_to_append(tmp_path / "link.txt")
    assert not (tmp_path / "missing.txt").exists()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a pipe, not a file"):
        open_to_append(tmp_path / "pipe")


def test_what_may_not_be_opened_as_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    link(tmp_path / "link", tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    assert special_kind(tmp_path / "pipe") == special_kind(tmp_path / "link") == "a pipe"
    assert special_kind("/dev/zero") == special_kind("/dev/null") == "a device"
    assert [special_kind(tmp_path / name) for name in ("file", "", "nothing")] == ["", "", ""]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    name = "ä" * 120 + "x" * 11 + ".csv"  # 255 bytes in UTF-8
    replace_file(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    raw = os.fsdecode(b"\xff\xfe" + b"z" * 300)
    assert cut_name("short", 255) == "short" and len(os.fsencode(cut_name(raw, 255))) == 255
    assert cut_name(raw, 255) != cut_name(raw + "z", 255)
    for name in ("a" + "é" * 200, "é" * 200, "a" + "鋼" * 100, "a" + "\U0001f52c" * 80):
        cut = cut_name(name, 255)
        assert 255 - 3 <= len(cut.encode()) <= 255  # which half a letter has no bytes for
        assert name.startswith(cut[:-9]) and cut[-9] == "~"
    odd = os.fsdecode(b"a" + b"\xe9" * 300)  # Latin-1, as older systems wrote it
    assert len(os.fsencode(cut_name(odd, 255))) == 255


def test_leftovers_are_removed_without_following_links(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run, run / "epoch_1", outside):
        folder.mkdir()
        (folder / ".a.png.12.tmp").write_text("")
        (folder / ".mine.tmp").write_text("")
    link(run / "linked", outside)
    remove_leftovers(run)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*"))
    assert left == [
        "outside/.a.png.12.tmp", "outside/.mine.tmp", "run/.mine.tmp", "run/epoch_1/.mine.tmp",
    ]  # fmt: skip


def test_a_file_grows_in_its_temporary_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.csv") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_jobs_are_done_behind_one_after_the_other_and_none_pile_up():
    behind, begin, done = Behind(), threading.Event(), []

    def first() -> None:
        assert begin.wait(30)
        done.append(1)

    behind.do(first)
    assert done == []  # the program goes on
    threading.Timer(0.01, begin.set).start()
    behind.do(done.append, 2)  # waits for the first
    assert done[0] == 1
    behind.wait()
    assert done == [1, 2]


def test_an_error_behind_is_raised_and_what_follows_is_left_out():
    behind, done = Behind(), list[int]()
    behind.do(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        behind.do(done.append, 1)
    behind = Behind()
    behind.do(int, "y")
    with pytest.raises(ValueError, match="'y'"):
        behind.wait()
    assert done == []


def test_a_name_is_inside_a_folder_unless_it_leads_out(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (folder / "kept").mkdir(parents=True)
    elsewhere.mkdir()
    assert inside(folder, "kept/new/a.png") == folder / "kept" / "new" / "a.png"
    assert inside(folder, "..a/b..png") == folder / "..a" / "b..png"  # such names are no steps up
    for name in ("", ".", "../elsewhere/a", "kept/../../elsewhere/a", str(elsewhere / "a"),
                 str(folder / "kept" / "a"), "a\0b"):  # fmt: skip
        assert inside(folder, name) is None, name
    try:
        (folder / "link").symlink_to(elsewhere, target_is_directory=True)
        (folder / "own").symlink_to(folder / "kept", target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    assert inside(folder, "link/a") is None and inside(folder, "own/a") == folder / "own" / "a"


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path):
    for text in ("first", "second"):
        with replacing_folder(tmp_path / "above" / "set") as root:
            assert list(root.iterdir()) == []
            (root / text).write_text(text)
    assert os.listdir(tmp_path / "above") == ["set"]
    assert os.listdir(tmp_path / "above" / "set") == ["second"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_leaves_the_old_folder_and_nothing_else(tmp_path, stop):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    with (
        pytest.raises((KeyboardInterrupt, UserError)) as caught,
        replacing_folder(tmp_path / "set") as root,
    ):
        (root / "half").write_text("y")
        raise stop
    if caught.type is UserError:
        assert "set: cannot be written (No space left on device)" in str(caught.value)
        assert "--out" in str(caught.value)
    assert os.listdir(tmp_path) == ["set"] and os.listdir(tmp_path / "set") == ["mine"]


def test_a_stop_between_the_two_renames_brings_the_old_folder_back(
    tmp_path, stop_at_the_second_rename
):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    stop_at_the_second_rename()
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "set") as root:
        (root / "new").write_text("y")
    assert os.listdir(tmp_path) == ["set"] and os.listdir(tmp_path / "set") == ["mine"]


KILLED = """
import os, sys
from pathlib import Path
from utils.files import replacing_folder
rename, left = os.replace, int(sys.argv[2])
def stop(source, target):
    global left
    rename(source, target)
    left -= 1
    if not left:
        os._exit(9)
os.replace = stop
with replacing_folder(Path(sys.argv[1])) as root:
    (root / "next").write_text("y")
    if not left:
        os._exit(9)
"""


def killed(folder: Path, renames: int) -> list[Path]:
    """A process that dies in ``replacing_folder`` after so many renames; what it left beside."""
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(renames)]) as process:
        assert process.wait(60) == 9
    return [path for path in folder.parent.iterdir() if path != folder]


def test_a_folder_that_a_kill_left_nowhere_is_found_and_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "mine").write_text("x")
    assert left_by_kill(folder) is None and not recover_folder(folder)
    (left,) = killed(folder, 1)
    assert not folder.exists() and left_by_kill(folder) == left / "old"
    assert left_by_kill(tmp_path / "se") is None
    assert recover_folder(folder) and not recover_folder(folder)
    assert os.listdir(tmp_path) == ["set"] and os.listdir(folder) == ["mine"]
    killed(folder, 1)
    with pytest.raises(RuntimeError), replacing_folder(folder):
        raise RuntimeError  # what is there before anything is made: as it was
    assert os.listdir(tmp_path) == ["set"] and os.listdir(folder) == ["mine"]


@pytest.mark.parametrize("renames", [0, 2])
def test_what_a_killed_process_left_beside_a_folder_is_removed_by_the_next(
    tmp_path: Path, renames: int
) -> None:
    """Half a new folder, or the one that was replaced: neither is put in its place."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "mine").write_text("x")
    assert len(killed(folder, renames)) == 1
    shutil.rmtree(folder)
    assert left_by_kill(folder) is None and not recover_folder(folder)
    host = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:16]
    own = [f".set.pscl-{host}.{os.getpid()}.abcdefgh", f".set.pscl-{host}.1.abcdefghi"]
    own += [".set.pscl-elsewhere.1.abcdefgh", ".set.1.abcdefgh", f".set.pscl-{host}.x.abcdefgh"]
    for name in own:  # of a process that runs, of another machine's, and of somebody else
        (tmp_path / name / "new").mkdir(parents=True)
    own.append(f".set.pscl-{host}.{2**30}.abcdefgh")  # no system counts processes so far
    (tmp_path / own[-1] / "mine").mkdir(parents=True)
    with replacing_folder(folder) as root:
        (root / "last").write_text("z")
    assert sorted(os.listdir(tmp_path)) == sorted(["set", *own])
    assert os.listdir(folder) == ["last"]


def test_files_that_are_as_they_were_keep_their_times(tmp_path: Path) -> None:
    for name, contents in (("old/a/x", "1"), ("old/y", "2"), ("new/a/x", "1"), ("new/y", "3"),
                           ("new/z", "4")):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents)
        os.utime(path, (1e9, 1e9 if name[0] == "o" else 2e9))
    keep_times(tmp_path / "new", tmp_path / "old")
    times = {name: (tmp_path / "new" / name).stat().st_mtime for name in ("a/x", "y", "z")}
    assert times == {"a/x": 1e9, "y": 2e9, "z": 2e9}


def test_a_folder_that_goes_while_it_is_written_to_is_not_said_to_be_full(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, replacing(tmp_path / "out" / "a.csv", "--out") as file:
        shutil.rmtree(file.parent)
        file.write_text("half")
    for part in ("a.csv: cannot be written", "removed or moved meanwhile", "same command", "--out"):
        assert part in str(caught.value)
    assert "disk space" not in str(caught.value)
