"""Logs: bytes that repeat, resuming exactly, valid JSON, event files, meters, lines."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_set import make_set, train

from metallography.items import Record
from utils import log
from utils.commandline import UserError
from utils.log import (
    AverageMeter,
    RunLog,
    environment_line,
    evaluation_lines,
    format_epoch,
    only_progress,
    print_result,
    progress,
    scalars,
    to_terminal,
)
from utils.metrics import Scores


def entries(folder: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def run(folder: Path, stage: str, epochs: range, resume_at: dict[str, int] | None = None) -> None:
    with RunLog(folder, stage, resume_at) as run_log:
        run_log.header(["first", "second"])
        for epoch in epochs:
            run_log.line(f"Epoch {epoch} µ")
            run_log.metrics({"epoch": epoch})


def test_every_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path / "run" / "1_0", "self")
    run_log.header(["head"])
    run_log.line("钢 ± 1")
    run_log.metrics({"loss": 0.5})
    text = (tmp_path / "run" / "1_0" / "log_self.txt").read_bytes()
    assert text == "head\n钢 ± 1\n".encode()
    assert entries(tmp_path / "run" / "1_0") == [{"stage": "self", "loss": 0.5}]
    assert run_log.offsets() == {"text": len(text), "metrics_lines": 1}
    run_log.close()


def test_a_fresh_start_drops_this_stage_and_keeps_the_others(tmp_path: Path) -> None:
    run(tmp_path, "self", range(2))
    run(tmp_path, "fine", range(3))
    run(tmp_path, "self", range(5, 6))
    assert entries(tmp_path) == [
        *({"stage": "fine", "epoch": e} for e in range(3)),
        {"stage": "self", "epoch": 5},
    ]
    assert (tmp_path / "log_self.txt").read_text("utf-8") == "first\nsecond\nEpoch 5 µ\n"
    assert (tmp_path / "log_fine.txt").read_text("utf-8").count("Epoch") == 3
    assert sorted(os.listdir(tmp_path)) == ["log_fine.txt", "log_self.txt", "metrics.jsonl"]


def test_a_resumed_run_writes_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, "self", range(6))
    run(broken, "self", range(3))
    with RunLog(broken, "self", {"text": 10**6, "metrics_lines": 10**6}) as run_log:
        saved = run_log.offsets()
    run(broken, "self", range(3, 5), saved)  # goes on for two epochs and is killed ...
    with open(broken / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "self", "epo')  # ... in the middle of a line
    with open(broken / "log_self.txt", "ab") as file:
        file.write(b"Epo")
    run(broken, "self", range(3, 6), saved)
    for name in ("log_self.txt", "metrics.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_resuming_keeps_what_another_stage_wrote_in_between(tmp_path: Path) -> None:
    run(tmp_path, "self", range(2))
    with RunLog(tmp_path, "self", {"text": 10**6, "metrics_lines": 2}) as run_log:
        saved = run_log.offsets()
        run_log.metrics({"epoch": 99})
    run(tmp_path, "fine", range(1))
    run(tmp_path, "self", range(2, 3), saved)
    assert [(e["stage"], e["epoch"]) for e in entries(tmp_path)] == [
        ("self", 0),
        ("self", 1),
        ("fine", 0),
        ("self", 2),
    ]


def test_resuming_without_the_old_logs_begins_new_ones(tmp_path: Path) -> None:
    run(tmp_path, "self", range(4, 5), {"text": 500, "metrics_lines": 4})
    first, second, *warnings, last = (tmp_path / "log_self.txt").read_text("utf-8").splitlines()
    assert (first, second, last) == ("first", "second", "Epoch 4 µ")
    assert [line.split(" was ")[0] for line in warnings] == [
        f"Warning: {tmp_path / name}" for name in ("log_self.txt", "metrics.jsonl")
    ]
    assert entries(tmp_path) == [{"stage": "self", "epoch": 4}]


def test_half_lines_of_a_killed_run_are_dropped(tmp_path: Path) -> None:
    whole = b'{"stage": "fine", "epoch": 1}'
    (tmp_path / "metrics.jsonl").write_bytes(b'ne", "epoch": 0}\n' + whole + b'\n{"stage": "fi')
    RunLog(tmp_path, "self").close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole + b"\n"


def test_metrics_are_always_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, "sup") as run_log:
        run_log.metrics(
            {
                "nan": math.nan,
                "inf": -math.inf,
                "list": [1, math.nan, (2.5,)],
                "numpy": np.float64("nan"),
                "int": np.int64(3),
                "array": np.array([1.0, np.inf]),
                "tensor": torch.tensor([0.5, math.nan]),
                "nested": {1: torch.tensor(2)},
                "text": 'ü "钢" \udc80',
                "none": None,
                "bool": True,
            }
        )
    assert entries(tmp_path) == [
        {
            "stage": "sup",
            "nan": None,
            "inf": None,
            "list": [1, None, [2.5]],
            "numpy": None,
            "int": 3,
            "array": [1.0, None],
            "tensor": [0.5, None],
            "nested": {"1": 2},
            "text": 'ü "钢" \udc80',
            "none": None,
            "bool": True,
        }
    ]


def test_the_terminal_shows_lines_and_the_file_holds_no_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, "self") as run_log:
        run_log.header(["head"])
        run_log.line("line")
        run_log.note("took 3 s")
    assert capsys.readouterr().out == "head\nline\ntook 3 s\n"
    assert (tmp_path / "log_self.txt").read_text() == "head\nline\n"


def test_a_disabled_log_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "other_process", "self", enabled=False) as run_log:
        run_log.header(["head"])
        run_log.line("line")
        run_log.metrics({"epoch": 1})
        assert run_log.offsets() == {"text": 0, "metrics_lines": 0}
    assert not (tmp_path / "other_process").exists()
    assert capsys.readouterr().out == ""


def test_a_terminal_without_the_signs_or_gone_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascii_terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_terminal)
    with RunLog(tmp_path, "self") as run_log:
        run_log.line("1 ± 2")
        assert ascii_terminal.buffer.getvalue() == b"1 \\xb1 2\n"  # type: ignore[attr-defined]
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as gone:
            monkeypatch.setattr(sys, "stdout", gone)
            run_log.line("nobody reads this")
            monkeypatch.undo()
            with pytest.raises(BrokenPipeError):
                gone.close()
    assert (tmp_path / "log_self.txt").read_text("utf-8") == "1 ± 2\nnobody reads this\n"


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        RunLog(tmp_path / "file" / "1_0", "self")
    assert str(tmp_path / "file" / "1_0" / "log_self.txt") in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        RunLog(tmp_path / "run", "self")


@pytest.mark.parametrize("name", ["log_self.txt", "metrics.jsonl"])
def test_a_log_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text('{"stage": "fine"}\n')
    try:
        (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    except OSError:
        pytest.skip("links cannot be made here")
    with pytest.raises(UserError, match=rf"{name}: a link to .*outside, .*remove the link"):
        RunLog(tmp_path / "run", "self")
    assert (tmp_path / "outside").read_text() == '{"stage": "fine"}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, "self")
    run_log._files[run_log.text_path] = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match=r"log_self\.txt: cannot be written.*free disk space"):
        run_log.line("text")
    with pytest.raises(UserError):
        run_log.close()


def test_a_failed_cut_leaves_the_metrics_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "self", range(2))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        RunLog(tmp_path, "self")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["log_self.txt", "metrics.jsonl"]


# --- event files, read back by TensorBoard itself -------------------------------------------------

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
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
    with RunLog(tmp_path, "self", tensorboard=True) as run_log:
        for epoch in range(4):
            run_log.metrics({"epoch": epoch, "loss": epoch / 4})
            if epoch == 1:
                saved = run_log.offsets()
    with RunLog(tmp_path, "fine", tensorboard=True) as run_log:
        run_log.metrics({"evaluation": {"epoch": 0, "acc": 0.25}})
    with RunLog(tmp_path, "self", saved, tensorboard=True) as run_log:
        run_log.metrics({"epoch": 2, "loss": 8.0})
    folder = tmp_path / "tensorboard"
    assert events(folder / "self") == {"train/loss": [(0, 0.0), (1, 0.25), (2, 8.0)]}
    assert events(folder / "fine") == {"test/acc": [(0, 0.25)]}


@needs_tensorboard
def test_a_fresh_start_removes_the_events_of_its_stage_and_nothing_else(tmp_path: Path) -> None:
    for stage in ("self", "fine"):
        with RunLog(tmp_path, stage, tensorboard=True) as run_log:
            run_log.metrics({"epoch": 0, "loss": 1.0})
            saved = run_log.offsets()
    RunLog(tmp_path, "self", saved).close()  # goes on without: what was written stays
    assert events(tmp_path / "tensorboard" / "self")
    (tmp_path / "tensorboard" / "fine" / "mine.txt").write_text("mine")
    for stage in ("self", "fine", "sup"):
        RunLog(tmp_path, stage).close()
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("tensorboard/**/*")]
    assert sorted(left) == ["tensorboard/fine", "tensorboard/fine/mine.txt"]


@needs_tensorboard
def test_a_training_writes_events_and_another_removes_them(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    assert train(data, tmp_path, stages="sup", tensorboard=True) == 0
    found = events(tmp_path / "tiny_sup" / "1_0" / "tensorboard" / "sup")
    assert [epoch for epoch, _ in found["train/loss"]] == [0, 1]
    assert [epoch for epoch, _ in found["test/dice"]] == [0, 1]
    assert train(data, tmp_path, stages="sup", overwrite=True) == 0
    assert not (tmp_path / "tiny_sup" / "1_0" / "tensorboard").exists()


def test_without_tensorboard_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "set", tmp_path / "out", tensorboard=True) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_tensorboard
def test_events_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        RunLog(tmp_path, "self", tensorboard=True)


# --- meters ---------------------------------------------------------------------------------------


def test_meters_give_last_and_average() -> None:
    meters = AverageMeter()
    assert meters.read() == {}
    for value in (1.0, 2.0, 6.0):
        meters.add("loss", torch.tensor(value, requires_grad=True) * 1)
        meters.add("rate", value / 2)
    meters.add("rare", torch.tensor(4, dtype=torch.int64))
    assert meters.read() == {"loss": (6.0, 3.0), "rate": (3.0, 1.5), "rare": (4.0, 4.0)}
    assert list(meters.read()) == ["loss", "rate", "rare"]


def test_meters_copy_what_they_are_given_and_keep_no_graph() -> None:
    meters = AverageMeter()
    loss = torch.tensor(1.0, requires_grad=True)
    buffer = (loss * 1).detach()
    meters.add("loss", buffer)
    buffer.fill_(100.0)  # as a replayed graph does
    meters.add("loss", loss * 3)
    assert meters.read() == {"loss": (3.0, 2.0)}
    buffer.fill_(8.0)
    meters.add("loss", buffer)
    buffer.fill_(100.0)
    assert meters.read() == {"loss": (8.0, 4.0)}
    assert not any(t.requires_grad for t in (*meters._sum.values(), *meters._last.values()))


def test_meters_add_half_precision_in_single() -> None:
    meters = AverageMeter()
    for _ in range(1000):
        meters.add("loss", torch.tensor(1.0, dtype=torch.bfloat16))  # bfloat16 stalls at 256
    assert meters.read()["loss"] == (1.0, 1.0)


def test_reading_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meters = AverageMeter()
    for name in "abcd":
        meters.add(name, torch.tensor(1.0))
    waits = []
    for way in ("item", "tolist", "cpu", "__float__"):
        real = getattr(torch.Tensor, way)

        def count(self: torch.Tensor, *args: object, real: object = real) -> object:
            waits.append(1)
            return real(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(torch.Tensor, way, count)
    meters.add("a", torch.tensor(2.0))
    assert len(waits) == 0
    meters.read()
    assert len(waits) == 1


# --- bar and lines --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shows in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress(3, "epochs") as bar:
            for _ in range(3):
                bar.update()
            bar.refresh()
        assert ("epochs" in stream.getvalue()) == shows


def test_log_lines_stay_whole_beside_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with RunLog(tmp_path, "self") as run_log, progress(3, "epochs") as bar:
        bar.update()
        run_log.line("Loss 1")
    # The bar is wiped with blanks before the line begins at the left edge.
    before, _, _ = screen.getvalue().partition("Loss 1\n")
    assert before.endswith("\r") and before.rstrip("\r").endswith(" ")


def test_the_epoch_line_has_the_published_form() -> None:
    meters = {"loss": (0.5, 1.25), "image_loss": (2.0, 2.0), "rate": (1e-4, math.nan)}
    assert format_epoch(3, 200, 24, 25, meters) == (
        "Epoch: [3/200][24/25] Loss 0.5000 (avg:1.2500) Image_loss 2.0000 (avg:2.0000) "
        "Rate 0.0001 (avg:nan)"
    )
    assert format_epoch(0, 1, 0, 1, {"x": (0.0, 2.5e-5)}).endswith("X 0.0000 (avg:2.5e-05)")


def scores(dice3: float, scored: int) -> Scores:
    return Scores(0.95, 0.7, (0.6, 0.8, dice3), 0.55, (0.5, 0.6, 0.25), (9, 1, 1, 1), scored, 2)


def test_evaluation_lines_stand_alone() -> None:
    assert evaluation_lines(scores(0.7, 3)) == [
        "ACC: 0.9500",
        "Dice: 0.7000",
        "Dice1: 0.6000",
        "Dice2: 0.8000",
        "Dice3: 0.7000",
        "mIoU: 0.5500",
        "IoU1: 0.5000",
        "IoU2: 0.6000",
        "IoU3: 0.2500",
    ]
    absent = dataclasses.replace(
        scores(math.nan, 2), truth_pixels=(9, 1, 1, 0), predicted_pixels=(3, 1, 0, 7)
    )
    lines = evaluation_lines(absent)
    assert "Dice3: nan" in lines and lines[-2:] == [
        "Classes scored: 2 of 3",
        "Class 3 is not scored: no pixel of it in the truth, 7 predicted",
    ]


def test_the_environment_is_one_line_without_a_clock() -> None:
    line = environment_line(torch.device("cpu"), "bf16")
    assert line == environment_line("cpu", "bf16") and "\n" not in line
    for part in (f"torch {torch.__version__}", f"numpy {np.__version__}", "amp bf16", "cpu ("):
        assert part in line
    assert f"threads {torch.get_num_threads()}" in line
    assert environment_line("cpu").endswith("amp off")


def test_the_environment_tells_the_sources_that_decide_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another byte in a loss, or another file beside it, is another program; a test is not."""
    for name in ("model.py", "pscl/losses.py", "tests/test_log.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(log, "ROOT", tmp_path)

    def told() -> str:
        log.source_digest.cache_clear()
        return environment_line("cpu")

    first = told()
    (tmp_path / "tests/test_log.py").write_text("2")
    assert told() == first and not log.changed_source(first)
    (tmp_path / "pscl/losses.py").write_text("2")
    before, now = log.source_of(first), log.source_of(told())
    assert log.changed_source(first) == (
        f"computed by another program (source {before}, now {now})"
    )
    (tmp_path / "pscl/losses.py").write_text("1")
    assert told() == first
    (tmp_path / "pscl/more.py").write_text("")
    assert told() != first
    assert not log.changed_source("program 1.0.0, python 3.11.7")  # of a run that told none
    log.source_digest.cache_clear()


def test_only_progress_hides_what_a_log_has_and_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_progress("Fine-tuning"), RunLog(tmp_path, "sup") as log:
        log.line("Epoch: [0/4]")
        log.line("Warning: 2 test images are left out")
        to_terminal("predicted.jsonl: damaged; made anew")
    shown = capsys.readouterr().out
    assert shown == "Warning: 2 test images are left out\npredicted.jsonl: damaged; made anew\n"
    assert (tmp_path / "log_sup.txt").read_text().startswith("Epoch: [0/4]\n")


def test_a_folder_predicted_behind_a_bar_tells_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predicted.jsonl"
    path.write_text("\x00{]\n")
    with only_progress("Predictions"):
        Record(path, {"weights": "w"}, overwrite=False)
    assert capsys.readouterr().out == f"{path}: damaged; made anew, with all predictions\n"


def test_what_a_command_is_run_for_is_whole_or_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        error: OSError = OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            raise self.error

    print_result("a\nb")
    assert capsys.readouterr().out == "a\nb\n"
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(UserError, match=r"standard output: cannot be written \(No space left"):
        print_result("a")
    closed = Full()
    closed.error = BrokenPipeError()
    monkeypatch.setattr(sys, "stdout", closed)
    print_result("a")  # whoever read it has enough
    monkeypatch.setattr(sys, "stdout", None)
    to_terminal("a scheduler closed it")
