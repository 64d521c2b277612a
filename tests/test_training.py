"""Trainings that go wrong or are stopped: what is kept, and how they go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_set import files, make_set, train

from config import Config
from stages.finetuning import Supervised
from stages.pretraining import SelfSupervised
from utils import log, training
from utils.checkpoint import load, save
from utils.commandline import UserError
from utils.training import Training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


# --- numbers that are not finite ------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int, weights: bool) -> None:
    """Make the loss of one step not a number, or the weights after it."""
    original = SelfSupervised.train_epoch
    now = {"epoch": -1, "step": -1}

    def train_epoch(self: Any, number: int, step_done: Any) -> None:
        now.update(epoch=number, step=-1)
        original(self, number, step_done)

    def losses(self: Any, batch: Any) -> Any:
        now["step"] += 1
        found = self.module(batch)
        if (now["epoch"], now["step"]) == (epoch, step):
            parameter = next(self.module.parameters())
            if weights:
                parameter.register_hook(lambda gradient: gradient * float("nan"))
            else:
                found["loss"] = found["loss"] * float("nan")
        return found

    monkeypatch.setattr(SelfSupervised, "train_epoch", train_epoch)
    monkeypatch.setattr(SelfSupervised, "losses", losses)


@pytest.mark.parametrize("mode", ["moco", "simclr"])
def test_views_finished_on_the_device_train_alike(data: Path, tmp_path: Path, mode: str) -> None:
    """And ``--deterministic`` changes nothing on a CPU."""
    losses = []
    more: tuple[dict[str, Any], ...] = ({}, {"augment_on": "device"}, {"deterministic": True})
    for number, settings in enumerate(more):
        out = tmp_path / str(number)
        assert train(data, out, "", stages="self", self_mode=mode, **settings) == 0
        lines = (out / f"tiny_{mode}" / "1_0" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == losses[0]


@pytest.mark.parametrize("weights", [False, True])
def test_numbers_that_are_not_finite_stop_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, weights: bool
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    settings = {"stages": "self", "self_max_epoch": 4}
    with monkeypatch.context() as patch:
        poison(patch, epoch=2, step=1, weights=weights)
        assert train(data, Path("."), **settings) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "tiny_simclr/1_0" in error
    assert "epoch 2, step 1 (15_0.png, " in error and "--amp off" in error
    run = Path("tiny_simclr/1_0")
    assert sorted(p.name for p in run.glob("moco*")) == ["moco0.pt", "moco1.pt", "moco2.pt"]
    assert all(v.isfinite().all() for v in load(run / "moco2.pt")["moco"].values())
    assert all(v.isfinite().all() for v in load(run / "state_self.pt")["module"].values())
    if weights:
        return
    assert train(data, Path("."), **settings) == 0
    monkeypatch.chdir(tmp_path / "b")
    assert train(data, Path("."), **settings) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(("stage", "rate"), [("self", "self_lr"), ("sup", "sup_lr")])
def test_a_rate_far_too_high_stops_the_run(
    data: Path, tmp_path: Path, capsys: Any, stage: str, rate: str
) -> None:
    assert train(data, tmp_path, stages=stage, fine_max_epoch=6, **{rate: 1e30}) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(r"the numbers are not finite in epoch [01], step [01] \(", error)
    assert "15_0.png" in error and "lower learning rate" in error
    for path in tmp_path.rglob("*.pt"):
        tensors = [v for v in load(path).get("moco", {}).values() if v.is_floating_point()]
        assert all(v.isfinite().all() for v in tensors), path


# --- runs that are stopped ------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4000])


def interrupted(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """A run of pretraining that was stopped in the middle of an epoch."""

    def stop(self: Any, number: int, step_done: Any) -> None:
        if number == epoch:
            raise KeyboardInterrupt
        original(self, number, step_done)

    original = SelfSupervised.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(SelfSupervised, "train_epoch", stop)
        assert train(data, out, stages="self", self_max_epoch=4) == 130


def test_a_damaged_state_is_replaced_by_the_one_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(data, Path("whole"), stages="self", self_max_epoch=4) == 0
    os.rename("whole", "expected")
    run = Path("whole/tiny_simclr/1_0")
    interrupted(data, Path("whole"), monkeypatch, 3)
    assert sorted(p.name for p in run.glob("state*")) == [
        "state_self.previous.pt",
        "state_self.pt",
    ]
    assert [load(p)["epoch"] for p in sorted(run.glob("state*"))] == [2, 3]
    cut(run / "state_self.pt")
    capsys.readouterr()
    assert train(data, Path("whole"), stages="self", self_max_epoch=4) == 0
    shown = capsys.readouterr().out
    line = "state_self.pt: damaged; going on from state_self.previous.pt"
    assert shown.count(line) == 1 and "Epoch: [2/4]" in shown and "Epoch: [1/4]" not in shown
    assert files(Path("whole")) == files(Path("expected"))


def test_a_state_that_does_not_fit_is_named_tensor_by_tensor(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Training.save_state

    def stop(self: Any, epoch: int) -> None:
        original(self, epoch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save_state", stop)
        assert train(data, tmp_path, stages="sup") == 130
    path = tmp_path / "tiny_sup" / "1_0" / "state_sup.pt"
    state = load(path)
    module = state["module"]
    module["decode.outc.fc1.weight"] = module["decode.outc.fc1.weight"][:2]
    module["strange"] = module.pop("decode.outc.fc1.bias")
    save(path, state)
    capsys.readouterr()
    assert train(data, tmp_path, stages="sup") == 2
    lines = capsys.readouterr().err.splitlines()
    for part in (
        "1 tensors missing in the file: decode.outc.fc1.bias",
        "1 tensors unknown to the network: strange",
        "decode.outc.fc1.weight has shape (2, 4), in the network (3, 4)",
        "does not fit this program; train again with --overwrite",
    ):
        assert sum(line.startswith(f"{path}: ") and part in line for line in lines) == 1, part
    assert len(lines) == 4


def test_two_damaged_states_are_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    interrupted(data, tmp_path, monkeypatch, 3)
    run = tmp_path / "tiny_simclr" / "1_0"
    for path in run.glob("state*"):
        cut(path)
    capsys.readouterr()
    settings = {"stages": "self", "self_max_epoch": 4}
    assert train(data, tmp_path, **settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "state_self.pt" in line and "damaged" in line and "--overwrite" in line
    assert train(data, tmp_path, **settings, overwrite=True) == 0


def test_a_run_stopped_before_its_first_save_goes_on_by_the_same_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(data, tmp_path, monkeypatch, 0)
    assert (tmp_path / "tiny_simclr/1_0/moco0.pt").exists()
    assert train(data, tmp_path, stages="self", self_max_epoch=4) == 0


def test_another_machine_is_named_in_the_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(data, tmp_path, monkeypatch, 2)
    log = tmp_path / "tiny_simclr" / "1_0" / "log_self.txt"
    before = log.read_text()
    monkeypatch.setattr(training, "environment_line", lambda *_: "another machine")
    assert train(data, tmp_path, stages="self", self_max_epoch=4) == 0
    assert log.read_text().startswith(before + "From epoch 2 on with another machine\nEpoch: [2/4]")


def test_a_changed_method_is_named_where_a_run_goes_on_and_where_it_is_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(data, tmp_path, monkeypatch, 2)
    before = log.source_digest()
    monkeypatch.setattr(log, "source_digest", lambda: "0123abcd")
    assert train(data, tmp_path, stages="self", self_max_epoch=4) == 0
    text = (tmp_path / "tiny_simclr/1_0/log_self.txt").read_text()
    assert f"source {before}," in text
    assert "From epoch 2 on with program 1.0.0, source 0123abcd, " in text
    monkeypatch.setattr(log, "source_digest", lambda: "4567abcd")
    capsys.readouterr()
    assert train(data, tmp_path, stages="self", self_max_epoch=4) == 0
    shown = capsys.readouterr().out
    assert "stage self was computed by another program (source 0123abcd, now 4567abcd)" in shown


def test_states_are_saved_only_so_often(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    original = Training.save_state
    monkeypatch.setattr(
        Training,
        "save_state",
        lambda self, epoch: saved.append(epoch) or original(self, epoch),
    )
    epoch_done = SelfSupervised.epoch_done

    def slow(self: Any, epoch: int) -> None:
        epoch_done(self, epoch)
        now[0] += 4 * (epoch >= 0)  # an epoch takes four seconds

    monkeypatch.setattr(SelfSupervised, "epoch_done", slow)
    settings = {"stages": "self", "self_max_epoch": 9, "save_every": 9}
    assert train(data, tmp_path, **settings, save_seconds=10.0) == 0
    assert saved == [3, 6]


class _KilledError(Exception):
    """The process ends here."""


def killed_within(monkeypatch: pytest.MonkeyPatch, epoch: int, steps: int) -> None:
    """A run saves a state after every step, and dies when it has saved a certain one."""
    saves = Training.save_within

    def save_and_die(self: Training, number: int, done: int, meter: Any) -> None:
        saves(self, number, done, meter)
        if (number, done) == (epoch, steps):
            raise _KilledError

    monkeypatch.setattr(Training, "save_within", save_and_die)


WITHIN: dict[str, dict[str, Any]] = {
    "simclr": {"self_mode": "simclr"},
    "moco": {"self_mode": "moco", "workers": 1},
    "labels": {"stages": "sup", "data_size": "5", "fine_batch_size": 2, "fine_average": 0.9}
    | {"fine_schedule": "cosine", "fine_warmup": 0.5},
}


@pytest.mark.parametrize("name", WITHIN)
def test_a_run_killed_within_an_epoch_ends_with_the_same_bytes(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Queues, averages, generators and the means of the log go on where they were."""
    monkeypatch.chdir(tmp_path)
    settings = {"stages": "self", "save_seconds": 1e-9, **WITHIN[name]}
    assert train(data, Path("run"), **settings) == 0
    Path("run").rename("kept")
    with monkeypatch.context() as patch:
        killed_within(patch, 1, 1)
        with pytest.raises(_KilledError):
            train(data, Path("run"), **settings)
    capsys.readouterr()
    assert train(data, Path("run"), **settings) == 0
    steps = 3 if name == "labels" else 2
    assert f"Going on in epoch 1, after 1 of {steps} steps, of the run" in capsys.readouterr().out
    assert files(Path("run")) == files(Path("kept"))


def test_no_state_within_an_epoch_has_numbers_that_are_not_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, epoch=1, step=0, weights=False)
    assert train(data, tmp_path, stages="self", save_seconds=1e-9) == 1
    state = load(tmp_path / "tiny_simclr/1_0/state_self.pt")
    assert state["epoch"] == 1 and "within" not in state
    assert all(v.isfinite().all() for v in state["module"].values())


@pytest.mark.parametrize(
    "damage",
    [{"steps": 2}, {"steps": None}, {"random": torch.zeros(3)}, {"meter": {"count": {"loss": 1}}}],
)
def test_a_damaged_state_within_an_epoch_is_one_line(
    damage: dict[str, Any],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    with monkeypatch.context() as patch:
        killed_within(patch, 0, 1)
        with pytest.raises(_KilledError):
            train(data, tmp_path, stages="self", save_seconds=1e-9)
    path = tmp_path / "tiny_simclr/1_0/state_self.pt"
    state = load(path)
    save(path, {**state, "within": {**state["within"], **damage}})
    capsys.readouterr()
    assert train(data, tmp_path, stages="self") == 2
    assert "does not fit this program" in capsys.readouterr().err


# --- files that vanish ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", "moved"])
@pytest.mark.parametrize("when", ["in an epoch", "at the end"])
def test_a_run_whose_folder_vanishes_ends_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, how: str, when: str
) -> None:
    run = tmp_path / "out" / "tiny_simclr" / "1_0"

    def vanish() -> None:
        shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "elsewhere")

    name = "train_epoch" if when == "in an epoch" else "finish"
    original = getattr(SelfSupervised, name)

    def method(self: Any, *words: Any) -> Any:
        result = original(self, *words)
        if not words or words[0] == 1:
            vanish()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(SelfSupervised, name, method)
        assert train(data, tmp_path / "out", stages="self", self_max_epoch=4) == 2
    error = capsys.readouterr().err
    (line,) = error.splitlines()
    assert line.startswith(f"{run / 'log_self.txt'}: was removed or moved while") and ";" in line
    assert not run.exists()


@pytest.mark.parametrize("name", ["log_self.txt", "metrics.jsonl", "moco1.pt"])
def test_what_was_deleted_between_a_kill_and_its_resume_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str
) -> None:
    interrupted(data, tmp_path, monkeypatch, 3)
    run = tmp_path / "tiny_simclr" / "1_0"
    (run / name).unlink()
    capsys.readouterr()
    assert train(data, tmp_path, stages="self", self_max_epoch=4) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Warning")]
    assert name in line and "was removed" in line and line in (run / "log_self.txt").read_text()
    head = (run / "log_self.txt").read_text().startswith("Pretraining with PSCL-SimCLR")
    assert head and load(run / "state_self.pt")["finished"]


def test_a_finished_run_tells_what_was_deleted(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(data, tmp_path, stages="sup") == 0
    (tmp_path / "tiny_sup" / "1_0" / "sup.pt").unlink()
    assert train(data, tmp_path, stages="sup") == 0
    shown = capsys.readouterr().out
    assert "1_0: sup.pt was removed since this run wrote it; --overwrite trains anew" in shown


def test_a_checkpoint_of_finished_pretraining_that_was_removed_is_named(
    data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert train(data, tmp_path, stages="self") == 0
    for path in tmp_path.rglob("moco*.pt"):
        path.unlink()
    assert train(data, tmp_path, stages="self-fine") == 2
    error = capsys.readouterr().err
    assert "moco2.pt: no such file; it was removed after pretraining was finished: give" in error
    assert "pretrain first" not in error
    assert train(data, tmp_path, stages="self-fine", overwrite=True) == 0


def test_leftovers_of_a_kill_beside_the_runs_are_removed(data: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "tiny_sup"
    folder.mkdir()
    left = folder / f".eval.txt.{dead.pid}.tmp"
    alive, own = folder / f".eval.txt.{os.getpid()}.tmp", folder / ".mine.tmp"
    for path in (left, alive, own):
        path.write_text("")
    assert train(data, tmp_path, stages="sup") == 0
    assert not left.exists() and own.exists()


def test_scores_are_kept_where_the_sheets_cannot_be_drawn(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("sheet_sup.png: cannot be written (No space left on device); free some")

    with monkeypatch.context() as patch:
        patch.setattr("report.sheets.write_sheets", fail)
        assert train(data, tmp_path, stages="sup") == 2
    run = tmp_path / "tiny_sup" / "1_0"
    assert (run / "log_sup.txt").read_text().count("ACC: ") == 2
    assert (run / "metrics.jsonl").read_text().count('"evaluation"') == 2
    assert (run / "sup_last.pt").exists()
    assert train(data, tmp_path, stages="sup") == 0


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["self", "sup"])
def test_a_processor_that_lacks_memory_is_a_line_with_the_cure(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stage: str
) -> None:
    kind = {"self": SelfSupervised, "sup": Supervised}[stage]
    monkeypatch.setattr(kind, "losses", lambda *_: torch.empty(2**55))
    assert train(data, tmp_path, stages=stage) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Out of memory (DefaultCPUAllocator: can't allocate memory: you tried")
    assert line.endswith("bytes); give a smaller batch, --top_k or --image_size")


# --- states ---------------------------------------------------------------------------------------


def test_without_batches_every_image_is_its_own_for_pscl_moco(data: Path, tmp_path: Path) -> None:
    few = dict(self_mode="moco", batches="none", self_max_epoch=1, queue_size=8)
    assert train(data, tmp_path, stages="self", **few) == 0
    state = load(tmp_path / "tiny_moco" / "1_0" / "state_self.pt")
    assert "No production batches (--batches none): every image is its own" in state["about"]
    groups = state["module"]["queue_group"]
    assert sorted({*groups.tolist()} - {-1}) == [0, 1, 2, 3]  # four images of two batches


def test_every_state_tells_its_settings_and_its_machine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(data, tmp_path, monkeypatch, 2)
    path = tmp_path / "tiny_simclr" / "1_0" / "state_self.pt"
    for finished in (False, True):
        state = load(path)
        assert state["finished"] is finished
        assert state["config"]["self_max_epoch"] == 4 and state["config"]["name"] == "tiny"
        assert Config.from_dict(state["config"]).top_k == 2
        assert "torch" in state["environment"]
        first, second, *_ = state["about"]
        assert first.startswith("Pretraining with PSCL-SimCLR for 4 epochs on 4 images 40x32")
        assert second == "The annotated image rides along in every batch: 15_0.png"
        assert train(data, tmp_path, stages="self", self_max_epoch=4) == 0


LATER = {"standardize", "norm", "fine_contrast", "fine_crop", "fine_scale", "fine_rotation"}
LATER |= {"fine_crops"}


def as_of_old(path: Path) -> dict[str, Any]:
    """Write a state as a run had it before some settings were there."""
    state = load(path)
    for name in ("settings", "config"):
        state[name] = {n: value for n, value in state[name].items() if n not in LATER}
    save(path, state)
    return state


def test_an_old_run_that_is_finished_counts_as_finished(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"stages": "self-fine-sup"}
    assert train(data, tmp_path, **settings) == 0
    paths = sorted(tmp_path.glob("tiny_*/1_0/state_*.pt"))
    assert len(paths) == 3 and all(as_of_old(path)["finished"] for path in paths)
    before = files(tmp_path)
    capsys.readouterr()
    assert train(data, tmp_path, **settings) == 0
    shown = capsys.readouterr().out
    assert shown.count("is finished already") == 3 and "Epoch:" not in shown
    assert files(tmp_path) == before
    assert train(data, tmp_path, stages="sup", fine_rotation=5) == 2  # no default: another run
    assert "fine_rotation was 0.0, is 5.0" in capsys.readouterr().err


def test_an_old_run_that_was_stopped_goes_on_and_ends_alike(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"stages": "sup", "fine_max_epoch": 4}
    assert train(data, tmp_path / "whole", **settings) == 0

    def stop(self: Any, epoch: int, step_done: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        original(self, epoch, step_done)

    original = Supervised.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "train_epoch", stop)
        assert train(data, tmp_path / "old", **settings) == 130
    run = tmp_path / "old" / "tiny_sup" / "1_0"
    for path in run.glob("state_*.pt"):
        as_of_old(path)
    assert train(data, tmp_path / "old", **settings) == 0
    runs = [files(tmp_path / name / "tiny_sup" / "1_0") for name in ("whole", "old")]
    differ = {name for name in runs[0] if runs[0][name] != runs[1][name]}
    # The head of the log and the state name the folder.
    assert differ == {"log_sup.txt", "state_sup.pt"} and runs[0].keys() == runs[1].keys()
