"""TensorBoard files, read back by TensorBoard itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny_set import make_set, train

from utils import events
from utils.commandline import UserError
from utils.events import Events, clear, scalars
from utils.log import RunLog

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) of every curve in a folder, in the order written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                (number,) = value.tensor.float_val
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_the_numbers_of_a_line() -> None:
    epoch: dict[str, Any] = {"stage": "self", "epoch": 3, "loss": 0.5, "image": None, "lr": 1e-4}
    assert list(scalars(epoch)) == [("train/loss", 3, 0.5), ("train/lr", 3, 1e-4)]
    scored: dict[str, Any] = {"stage": "fine", "evaluation": {"epoch": 9, "acc": 1, "dice": None}}
    assert list(scalars(scored)) == [("test/acc", 9, 1.0)]
    assert list(scalars({"stage": "self", "loss": 1.0})) == []


@needs_tensorboard
def test_a_run_that_goes_on_shows_no_epoch_twice(tmp_path: Path) -> None:
    with RunLog(tmp_path, "self", tensorboard=True) as log:
        for epoch in range(4):
            log.metrics({"epoch": epoch, "loss": epoch / 4})
            if epoch == 1:
                saved = log.offsets()
    with RunLog(tmp_path, "fine", tensorboard=True) as log:
        log.metrics({"evaluation": {"epoch": 0, "acc": 0.25}})
    with RunLog(tmp_path, "self", saved, tensorboard=True) as log:
        log.metrics({"epoch": 2, "loss": 8.0})
    folder = tmp_path / "tensorboard"
    assert read(folder / "self") == {"train/loss": [(0, 0.0), (1, 0.25), (2, 8.0)]}
    assert read(folder / "fine") == {"test/acc": [(0, 0.25)]}


@needs_tensorboard
def test_only_own_files_are_removed(tmp_path: Path) -> None:
    Events(tmp_path, "self").close()
    Events(tmp_path, "fine").close()
    (tmp_path / "tensorboard" / "fine" / "mine.txt").write_text("mine")
    clear(tmp_path, "self")
    clear(tmp_path, "fine")
    clear(tmp_path, "sup")  # was never there
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert left == ["tensorboard/fine/mine.txt"]
    assert not (tmp_path / "tensorboard" / "self").exists()


@needs_tensorboard
def test_a_training_writes_them_and_another_removes_them(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    assert train(data, tmp_path, stages="sup", tensorboard=True) == 0
    found = read(tmp_path / "tiny_sup" / "1_0" / "tensorboard" / "sup")
    assert [epoch for epoch, _ in found["train/loss"]] == [0, 1]
    assert [epoch for epoch, _ in found["test/dice"]] == [0, 1]
    assert train(data, tmp_path, stages="sup", overwrite=True) == 0
    assert not (tmp_path / "tiny_sup" / "1_0" / "tensorboard").exists()


def test_without_tensorboard_nothing_is_trained(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(events.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "set", tmp_path / "out", tensorboard=True) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        Events(tmp_path, "self")
