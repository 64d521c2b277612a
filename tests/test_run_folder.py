"""The lock of a run's folder, against processes that really hold it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import run_folder as lock
from utils.commandline import UserError
from utils.run_folder import LOCK_FILE, locked

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from utils.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


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
