"""Runs of a table in processes of their own: which, on which device, in which order."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_set import ROOT, make_set

import reproduce
from comparison.devices import (
    Piece,
    command_words,
    device_names,
    passed_on,
    pieces_of,
    run_side_by_side,
    words_for,
)
from config import ConfigError
from utils.commandline import UserError


def work(row: str, repeat: int, stage: str, shared: bool = False) -> Any:
    """What stands for a piece of work here."""
    return SimpleNamespace(
        variant=SimpleNamespace(key=row, shared=shared),
        repeat=repeat,
        for_all=shared and stage == "self",
        runner=SimpleNamespace(stage=stage),
        title=f"{row}, repeat {repeat}",
    )


WORKS = [
    work("sup", 0, "sup"),
    work("byol", 0, "self", True),
    work("byol", 0, "fine", True),
    work("simclr", 0, "self"),
    work("simclr", 0, "fine"),
    work("byol", 1, "fine", True),
]


def test_a_run_is_one_piece_and_a_shared_pretraining_another_before_it() -> None:
    pieces = {piece.key: piece for piece in pieces_of(WORKS)}
    assert [*pieces] == ["byol:pretraining", "sup:0", "byol:0", "simclr:0", "byol:1"]
    assert [w.runner.stage for w in pieces["simclr:0"].works] == ["self", "fine"]
    assert pieces["byol:1"].after == "byol:pretraining" and not pieces["sup:0"].after
    assert pieces["simclr:0"].title == "simclr, repeat 0, fine-tuning"


def test_flags_of_the_whole_table_are_not_passed_on() -> None:
    words = "--data_dir x --devices 0,1 --methods sup simclr --commands -devices=cpu --seed 3"
    assert " ".join(passed_on(words.split())) == "--data_dir x --methods sup simclr --seed 3"


@pytest.mark.parametrize("text", ["0,x", "cuda", "", "0;1"])
def test_devices_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--devices: found .*; allowed: numbers of GPUs"):
        device_names(text)


def test_devices_by_number_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_names("0,3,cuda:1,cpu") == ["cuda:0", "cuda:3", "cuda:1", "cpu"]
    assert words_for("cuda:0", ["cuda:0", "cpu"], 0) == ["--device", "cuda:0"]
    assert words_for("cpu", ["cpu", "cpu"], 3) == ["--device", "cpu"]
    words = words_for("cpu", ["cpu"] * 1000, 0)
    assert words == ["--device", "cpu", "--threads", "1"]


@pytest.mark.parametrize("text", ["0", "cuda:0", "cpu,1"])
def test_devices_that_are_not_here_are_refused_at_once(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(reproduce, "Plan", None)  # nothing is read before
    assert reproduce.main(["--devices", text]) == 2
    name = f"cuda:{text[-1]}"
    assert capsys.readouterr() == (
        "",
        f"--devices: found {name}, which PyTorch does not see on this machine; "
        "give cpu,cpu for two processes, or leave it out\n",
    )


def side_by_side(folder: Path, code: str, devices: int = 2) -> list[str]:
    """Do the pieces by a program that notes when it began and ended; the order of their ends."""
    done: list[str] = []

    def command(piece: Piece, device: str) -> list[str]:
        return [sys.executable, "-c", code, str(folder / piece.key)]

    run_side_by_side(pieces_of(WORKS), ["cpu"] * devices, command, lambda p: done.append(p.key))
    return done


NOTE = (
    "import sys, time, pathlib; p = pathlib.Path(sys.argv[1]); a = time.time(); time.sleep(0.2); "
)
NOTE += "p.write_text(f'{a} {time.time()}')"


def test_two_at_a_time_and_none_before_what_it_waits_for(tmp_path: Path) -> None:
    done = side_by_side(tmp_path, NOTE)
    assert sorted(done) == ["byol:0", "byol:1", "byol:pretraining", "simclr:0", "sup:0"]
    times = {p.name: tuple(map(float, p.read_text().split())) for p in tmp_path.iterdir()}
    for repeat in ("byol:0", "byol:1"):
        assert times[repeat][0] >= times["byol:pretraining"][1]
    for begun, _ in times.values():
        assert sum(a <= begun < b for a, b in times.values()) <= 2


def test_one_that_fails_is_told_at_the_end_and_what_waits_for_it(tmp_path: Path) -> None:
    code = "import sys; bad = 'pretraining' in sys.argv[1]; print('why', file=sys.stderr); "
    code += "sys.exit(2 * bad)"
    with pytest.raises(UserError) as error:
        side_by_side(tmp_path, code)
    assert str(error.value).splitlines() == [
        "byol:pretraining: why (exit code 2)",
        "byol:0: not begun, because byol:pretraining failed",
        "byol:1: not begun, because byol:pretraining failed",
    ]


def test_an_interruption_ends_the_processes(tmp_path: Path) -> None:
    started = time.monotonic()
    begun: list[Any] = []

    def command(piece: Piece, device: str) -> list[str]:
        if begun:
            raise KeyboardInterrupt
        begun.append(piece)
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(pieces_of(WORKS), ["cpu", "cpu"], command, lambda piece: None)
    assert time.monotonic() - started < 30


TABLE = (
    "--channels 4,8,16,32 --hidden_dim 8 --embed_dim 8 --top_k 2 --queue_size 8 --num_classes 3 "
    "--self_batch_size 2 --self_max_epoch 1 --fine_max_epoch 1 --device cpu --amp off --threads 1 "
    "--methods sup plain-simclr --repeats 0 --out out"
)


def test_printed_commands_do_the_table_and_the_report_collects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "steel", size=(32, 32))
    monkeypatch.chdir(tmp_path)
    words = ["--data_dir", str(data), *TABLE.split()]
    assert reproduce.main([*words, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# first") and lines[2] == "# then:"
    commands = [line for line in lines if not line.startswith("#")]
    keys = [command.split()[-1] for command in commands]
    assert keys == ["plain-simclr:pretraining", "sup:0", "plain-simclr:0"]
    program = f"{sys.executable} {ROOT / 'reproduce.py'} --data_dir "
    assert all(command.startswith(f"cd {tmp_path} && {program}") for command in commands)
    for command in commands:
        assert reproduce.main(command.split()[5:]) == 0
    assert not (tmp_path / "out/table.md").exists()
    assert reproduce.main([*words, "--report"]) == 0
    table = (tmp_path / "out/table.csv").read_text()
    rows = [line.split(",") for line in table.splitlines()[1:]]
    assert [row[1] for row in rows] == ["sup", "plain-simclr"] * 2
    assert all(float(row[4]) >= 0 for row in rows)
    assert reproduce.main([*words, "--piece", "simclr:0"]) == 2
    assert "--piece: found 'simclr:0'; allowed: plain-simclr:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_printed_command_finds_all_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths relative to where it was printed, in a folder whose name has a blank."""
    here = tmp_path / "my sets"
    make_set(here / "steel", size=(32, 32))
    monkeypatch.chdir(here)
    words = ["--data_dir", "steel", *TABLE.split(), "--commands"]
    assert reproduce.main(words) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    run = command.rpartition(" ")[0] + " none"  # refused, once the set was found
    done = subprocess.run(run, shell=True, cwd="/", capture_output=True, text=True)
    assert done.returncode == 2
    assert "--piece: found 'none'; allowed: plain-simclr:pretraining" in done.stderr
    assert command.startswith(f"cd '{here}' && ")


def test_words_of_a_command() -> None:
    piece = pieces_of(WORKS)[1]
    words = command_words(
        piece, ["--seed", "1", "--devices", "0"], "reproduce.py", "--device", "cpu"
    )
    assert words[1:] == ["reproduce.py", "--seed", "1", "--piece", "sup:0", "--device", "cpu"]
