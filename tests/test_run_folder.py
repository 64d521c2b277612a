"""A run on disk: its state, its files and those of others, and its lock, really held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.holder import HOLD
from utils import run_folder as lock
from utils.checkpoint import CheckpointError, load
from utils.commandline import UserError
from utils.run_folder import (
    LOCK_FILE,
    RunFolder,
    StateFile,
    differences,
    locked,
    remove_outputs,
)

ROOT = Path(__file__).resolve().parents[1]


def state(epoch: int = 0, finished: bool = False, outputs: tuple[str, ...] = ()) -> dict[str, Any]:
    """A state that could be real."""
    common: dict[str, Any] = {"settings": {"seed": 1}, "evaluations": [], "finished": finished}
    common |= {"config": {}, "environment": "", "about": []}
    return {**common, "outputs": list(outputs), "epoch": epoch}


# --- the state ------------------------------------------------------------------------------------


def test_the_newest_state_is_loaded_and_the_one_before_is_kept(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state_self.pt")
    assert file.load() is None
    file.begin(state(0))
    for epoch in (1, 2):
        file.save(state(epoch))
    assert file.load() == state(2)
    assert load(tmp_path / "state_self.previous.pt") == state(1)
    file.finish(state(3, finished=True))
    assert file.load() == state(3, finished=True)
    assert os.listdir(tmp_path) == ["state_self.pt"]


def test_a_damaged_state_gives_way_to_the_one_before_and_never_takes_its_place(
    tmp_path: Path,
) -> None:
    file = StateFile(tmp_path / "state_self.pt")
    said: list[str] = []
    for epoch in (1, 2):
        file.save(state(epoch))
    file.path.write_bytes(b"PK\x03\x04 and no more")
    assert file.load(said.append) == state(1)
    assert said == [f"{file.path}: damaged; going on from state_self.previous.pt"]
    file.save(state(3))
    assert file.load() == state(3) and load(file.previous) == state(1)
    for path in (file.path, file.previous):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state_self\.pt: the file is empty.*--overwrite"):
        file.load()


# --- the folder -----------------------------------------------------------------------------------


def conflicts(folder: RunFolder, **settings: Any) -> list[str]:
    return folder.conflicts(settings, [folder.path / "fine.pt"], differences)


def test_a_state_that_a_scanner_holds_for_a_moment_is_saved(
    tmp_path: Path, held: Callable[[int, int], list[float]]
) -> None:
    file = StateFile(tmp_path / "state_sup.pt")
    file.save(state(1))
    waits = held(32, 1)
    file.save(state(2))
    assert file.load() == state(2) and load(file.previous) == state(1) and len(waits) == 1


def test_a_folder_may_be_used_if_it_is_empty_or_holds_the_same_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "fine")
    assert conflicts(folder, seed=1) == []
    folder.state.begin(state())
    (tmp_path / "fine.pt").write_text("of this run")
    assert conflicts(folder, seed=1) == []
    (line,) = conflicts(folder, seed=2)
    assert "stage fine" in line and "(seed was 1, is 2)" in line and "--overwrite" in line


def test_files_without_a_state_are_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "fine.pt").write_text("mine")
    (line,) = conflicts(RunFolder(tmp_path, "fine"), seed=1)
    assert line.startswith(f"{tmp_path / 'fine.pt'}: would be overwritten")
    assert "state_fine.pt" in line and "--name" in line


def test_a_state_that_cannot_be_read_is_a_conflict(tmp_path: Path) -> None:
    (tmp_path / "state_fine.pt").write_bytes(b"")
    (line,) = conflicts(RunFolder(tmp_path, "fine"), seed=1)
    assert "state_fine.pt: the file is empty" in line


def test_a_run_that_begins_removes_what_the_one_before_wrote(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "fine")
    folder.begin(state(outputs=("old.png", "epoch_9/a.png")))
    for name in ("old.png", "epoch_9/a.png", "new.png", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    folder.begin(state(outputs=("new.png",)))
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", "state_fine.pt"]
    # Killed now, the next one still knows what to remove.
    assert load(folder.state.path)["outputs"] == ["old.png", "epoch_9/a.png", "new.png"]


def test_names_that_lead_out_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "a" / "b").mkdir(parents=True)
    for path in (tmp_path / "victim", run / "a" / "b" / "own", run / "kept"):
        path.write_text("")
    remove_outputs(run, ["../victim", str(tmp_path / "victim"), "a/../../victim", "a/b/own", "no"])
    assert (tmp_path / "victim").exists() and os.listdir(run) == ["kept"]


def test_outputs_behind_a_link_are_neither_removed_nor_written(tmp_path: Path) -> None:
    run, outside = tmp_path / "1_0", tmp_path / "outside"
    (run / "kept").mkdir(parents=True)
    outside.mkdir()
    for path in (outside / "a.png", outside / "log.txt", run / "kept" / "b.png"):
        path.write_text("mine")
    try:
        (run / "epoch_1").symlink_to(outside, target_is_directory=True)
        (run / "epoch_2").symlink_to(run / "kept", target_is_directory=True)
        (run / "log.txt").symlink_to(outside / "log.txt")
    except OSError:
        pytest.skip("links cannot be made here")
    names = ["epoch_1/a.png", "epoch_2/b.png", "log.txt"]
    (line,) = RunFolder(run, "fine").links_out(names)
    assert line.startswith(f"{run / 'epoch_1'}: a link to {outside}") and "remove the link" in line
    remove_outputs(run, names)
    assert sorted(path.name for path in outside.iterdir()) == ["a.png", "log.txt"]
    assert not (run / "log.txt").is_symlink()  # the link is the run's, what it leads to is not
    assert not (run / "kept" / "b.png").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    try:
        (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "outside")
    except OSError:
        pytest.skip("links cannot be made here")
    with pytest.raises(UserError, match="a link or no file"), locked(tmp_path / "run"):
        raise AssertionError
    assert not (tmp_path / "outside").exists()


def test_differences_name_each_setting() -> None:
    old = {"a": [1, 2], "b": 1, "c": None, "d": 4}
    new = {"a": (1, 2), "b": 2, "c": None, "e": 5}
    changed = differences(old, new)
    lines = ["b was 1, is 2", "d was 4, is None", "e was None, is 5"]
    assert [str(difference) for difference in changed] == lines
    assert [difference.name for difference in changed] == ["b", "d", "e"]
    assert str(changed[0]._replace(reason="of old")) == "b was 1, is 2 (of old)"
    assert differences(old, old) == []


# --- the lock -------------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> object:
    """A process that holds ``tmp_path / 'run'``."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(ROOT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_gets_one_line(tmp_path: Path, holder: object) -> None:
    with pytest.raises(UserError) as error, locked(tmp_path / "run"):
        pytest.fail("got in")
    assert str(tmp_path / "run") in str(error.value) and "another process" in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "run") == [LOCK_FILE]


def test_a_killed_process_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").joinpath(LOCK_FILE).exists()


def test_nothing_is_left_of_a_folder_that_stayed_empty(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).exists()
    assert os.listdir(tmp_path) == []
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"), locked(tmp_path / "d"):
        (tmp_path / "d" / "log").write_text("")
    assert sorted(os.listdir(tmp_path)) == ["c", "d"] and os.listdir(tmp_path / "d") == ["log"]


def test_an_error_inside_comes_through_and_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, calls = lock._take, []

    def slow(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:  # its holder ends between opening and asking
            (tmp_path / LOCK_FILE).unlink()
        return take(descriptor)

    monkeypatch.setattr(lock, "_take", slow)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert len(calls) == 2


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error, locked(tmp_path / "file" / "run"):
        pytest.fail("got in")
    assert str(tmp_path / "file" / "run") in str(error.value)
    assert "--output_dir" in str(error.value) and "\n" not in str(error.value)


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    start = time.monotonic()
    with locked(tmp_path / "run"):
        assert time.monotonic() - start < 5
