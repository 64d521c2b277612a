"""The training half of fine-tuning: optimizers, schedules, averaged weights, resuming, length."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_set
import torch
from tiny_set import files, make_set
from torch import nn

import config_run
from config import Config
from pscl.losses import supervised_loss
from stages import finetuning
from stages.finetuning import Supervised
from utils.checkpoint import load, save
from utils.log import RunLog, only_progress, read_metrics
from utils.training import Training, all_finite

RECIPE: dict[str, Any] = {
    "stages": "sup",
    "fine_steps": 6,
    "eval_every": 3,
    "fine_batch_size": 2,
    "fine_crop": 16,
    "fine_optimizer": "adamw",
    "fine_schedule": "onecycle",
    "fine_clip": 0.5,
    "fine_average": 0.9,
    "fine_noise": 0.05,
    "fine_blur": 1.0,
    "fine_illumination": 0.05,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of three batches instead of 32 at every evaluation."""
    monkeypatch.setattr(finetuning, "STATISTICS_BATCHES", 3)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(data: Path, out: Path, **settings: Any) -> Supervised:
    """A stage of supervised training, ready for its first step."""
    values = {**tiny_set.TINY, "data_dir": str(data), "output_dir": str(out), "num_classes": 3}
    config = Config(**{**values, **RECIPE, **settings}).resolved()
    stage = Supervised(config_run.open_set(config)[0][0])
    stage.seed()
    stage.build()
    stage.log = RunLog(out, "sup", enabled=False)
    return stage


def train(data: Path, out: Path, **settings: Any) -> int:
    """Train with the recipe of this file."""
    return tiny_set.train(data, out, **{**RECIPE, **settings})


def test_steps_are_those_of_a_loop_in_plain_torch(
    data: Path, tmp_path: Path, one_thread: None
) -> None:
    stage = built(data, tmp_path)
    twin, weight = copy.deepcopy(stage.module), torch.ones(3)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=6, pct_start=0.3, cycle_momentum=False
    )
    twin.train()
    for epoch in range(6):
        (batch,) = list(stage.batches.epoch(epoch))
        optimizer.zero_grad()
        supervised_loss(twin(batch["image"]), batch["mask"], weight)["loss"].backward()
        squares = [(p.grad**2).sum() for p in twin.parameters() if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt()
        for p in twin.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
        schedule.step()
        stage.train_epoch(epoch, lambda: None)
    for (name, mine), (_, other) in zip(
        stage.module.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, msg=name, rtol=2e-4, atol=2e-6)


def test_steps_prepared_while_others_are_computed_are_the_same(
    data: Path, tmp_path: Path, one_thread: None
) -> None:
    """Also where other images of the set are read in between."""
    alone, ahead = (built(data, tmp_path / name, data_size="5") for name in ("a", "b"))
    for epoch in range(4):
        alone.train_epoch(epoch, lambda: None)
        alone.take_statistics()
    others = threading.active_count()
    with ahead.preparing(0, 4):
        for epoch in range(4):
            ahead.train_epoch(epoch, lambda: None)
            ahead.take_statistics()
    assert threading.active_count() == others
    for name, value in alone.scored.state_dict().items():
        assert torch.equal(value, ahead.scored.state_dict()[name]), name


@pytest.mark.parametrize("how", [KeyboardInterrupt, MemoryError, None])
def test_a_training_that_ends_early_leaves_no_thread(
    data: Path, tmp_path: Path, how: type[BaseException] | None
) -> None:
    stage, others = built(data, tmp_path), threading.active_count()

    def step_done() -> None:
        assert threading.active_count() > others
        if how:
            raise how

    with pytest.raises(how) if how else nullcontext(), stage.preparing(0, 9):
        stage.train_epoch(0, step_done)
    assert threading.active_count() == others and stage.coming is None


def test_large_weights_are_finite_and_others_are_found() -> None:
    """Of large ones a sum is not, of squares all the more."""
    module = nn.Linear(3, 2)
    most = torch.finfo(torch.float32).max
    with torch.no_grad():
        module.weight.fill_(-most)
        assert module.weight.sum().isinf() and all_finite(module)
        for bad in (float("inf"), float("-inf"), float("nan")):
            for parameter in (module.weight, module.bias):
                before = parameter.clone()
                parameter.view(-1)[1] = bad
                assert not all_finite(module)
                parameter.copy_(before)
        assert all_finite(module)


def test_the_averaged_network_is_scored_and_saved_with_statistics_of_its_own(
    data: Path, tmp_path: Path, one_thread: None
) -> None:
    stage = built(data, tmp_path)
    for epoch in range(4):
        stage.train_epoch(epoch, lambda: None)
    assert stage.scored is not stage.module
    stage.take_statistics()
    norm = stage.scored.get_submodule("encode.inc.norm1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    # By hand: the mean over batches of each batch's mean behind the first convolution.
    first = stage.scored.get_submodule("encode.inc.con1")
    images = list(stage.dataset.for_statistics(2, finetuning.STATISTICS_BATCHES))
    with torch.no_grad():
        means = [first(x).mean(dim=(0, 2, 3)) for x in images]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(dim=0))
    assert len(images) == finetuning.STATISTICS_BATCHES and norm.momentum == 0.1


def test_statistics_leave_the_training_as_it_is(
    data: Path, tmp_path: Path, one_thread: None
) -> None:
    plain, disturbed = built(data, tmp_path / "a"), built(data, tmp_path / "b")
    for epoch in range(3):
        plain.train_epoch(epoch, lambda: None)
        disturbed.take_statistics()
        disturbed.train_epoch(epoch, lambda: None)
    for name, value in plain.module.state_dict().items():
        assert torch.equal(value, disturbed.module.state_dict()[name]), name


def test_what_is_saved_is_what_was_scored(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path) == 0
    run = tmp_path / "tiny_sup" / "1_0"
    state, saved = load(run / "state_sup.pt"), load(run / "sup_last.pt")["super"]
    average = {k.removeprefix("module."): v for k, v in state["average"].items()}
    for name, value in saved.items():
        assert torch.equal(value, average[name]), name
    weight = "encode.inc.con1.weight"
    assert not torch.equal(saved[weight], state["module"][weight])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_recipe_trains_with_either_norm_and_test_time_augmentation(
    data: Path, tmp_path: Path, norm: str
) -> None:
    assert train(data, tmp_path, norm=norm, eval_tta=True, fine_schedule="cosine") == 0


def test_evaluation_by_views_differs_and_is_another_run(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path) == 0
    assert train(data, tmp_path, eval_tta=True) == 2
    assert train(data, tmp_path, eval_tta=True, name="views") == 0
    plain, views = (
        load(tmp_path / f"{name}_sup/1_0/state_sup.pt")["evaluations"][-1]["confusion"]
        for name in ("tiny", "views")
    )
    assert plain != views


def test_the_log_has_the_rate_that_a_step_used(data: Path, tmp_path: Path) -> None:
    words = {"fine_schedule": "cosine", "fine_steps": 4, "fine_warmup": 0.5, "sup_lr": 0.01}
    assert train(data, tmp_path, **words) == 0
    run = tmp_path / "tiny_sup" / "1_0"
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Two steps up by equal parts, then half a cosine down: its first step and its middle.
    by_hand = [0.005, 0.01, 0.01, 0.005]
    assert [e["lr"] for e in entries if "lr" in e] == pytest.approx(by_hand)
    lines = (run / "log_sup.txt").read_text().splitlines()
    shown = [float(line.rpartition(" lr ")[2]) for line in lines if " lr " in line]
    assert shown == pytest.approx(by_hand)


class _KilledError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_a_killed_run_ends_with_the_same_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(data, Path("whole"), fine_schedule=schedule) == 0
    saves = Training.save_state

    def save_and_die(self: Training, epoch: int) -> None:
        saves(self, epoch)
        if epoch == 4:
            raise _KilledError

    Path("whole").rename("kept")
    with monkeypatch.context() as patch:
        patch.setattr(Training, "save_state", save_and_die)
        with pytest.raises(_KilledError):
            train(data, Path("whole"), fine_schedule=schedule)
    assert train(data, Path("whole"), fine_schedule=schedule) == 0
    assert files(Path("whole")) == files(Path("kept"))


def test_workers_change_nothing(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(data, Path("none"), workers=0, data_size="5") == 0
    assert train(data, Path("two"), workers=2, data_size="5") == 0
    one, two = (load(Path(f"{n}/tiny_sup/5_0/sup_last.pt"))["super"] for n in ("none", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# Longer training

CONSTANT: dict[str, Any] = {"fine_schedule": "constant", "stages": "self-fine"}


def weights(out: Path, name: str) -> dict[str, Any]:
    """A checkpoint of the tiny run."""
    return load(out / "tiny_simclr" / "1_0" / name)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(out: Path, stage: str) -> list[float]:
    """The loss of every epoch in the metrics."""
    text = (out / "tiny_simclr" / "1_0" / "metrics.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    return [e["loss"] for e in entries if e["stage"] == stage and "loss" in e]


def test_longer_pretraining_goes_on_and_fine_tuning_is_made_anew(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    assert train(data, longer, **CONSTANT, self_max_epoch=1) == 0
    capsys.readouterr()
    assert train(data, longer, **CONSTANT, self_max_epoch=3) == 0
    said = capsys.readouterr().out
    assert "Going on after epoch 0 of a run that is made longer" in said
    assert "stage fine is made anew, because" in said and "self_max_epoch was 1, is 3" in said
    assert train(data, straight, **CONSTANT, self_max_epoch=3) == 0
    for name, wrapper in (
        ("moco3.pt", "moco"),
        ("fine.pt", "finetune"),
        ("fine_last.pt", "finetune"),
    ):
        assert same(weights(longer, name)[wrapper], weights(straight, name)[wrapper]), name
    for stage in ("self", "fine"):
        assert losses(longer, stage) == losses(straight, stage)


@pytest.mark.parametrize("unit", ["fine_steps", "fine_max_epoch"])
def test_longer_fine_tuning_at_constant_rates_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str
) -> None:
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    common = {**CONSTANT, "self_max_epoch": 1, "eval_every": 2}
    short, long = ({"fine_steps": 0, unit: length} for length in (2, 4))
    assert train(data, longer, **{**common, **short}) == 0
    assert train(data, longer, **{**common, **long}) == 0
    assert "Going on after epoch 1 of a run that is made longer" in capsys.readouterr().out
    log = (longer / "tiny_simclr" / "1_0" / "log_fine.txt").read_text(encoding="utf-8")
    assert log.count(f"\nFrom epoch 2 on: {unit} was 2, is 4\n") == 1
    assert train(data, straight, **{**common, **long}) == 0
    for name in ("fine.pt", "fine_last.pt"):
        assert same(weights(longer, name)["finetune"], weights(straight, name)["finetune"]), name
    scores = [weights(out, "state_fine.pt")["evaluations"] for out in (longer, straight)]
    assert scores[0] == scores[1] and losses(longer, "fine") == losses(straight, "fine")
    capsys.readouterr()
    assert train(data, longer, **{**common, **long}) == 0
    assert capsys.readouterr().out.count("is finished already") == 2


def test_grays_that_change_within_a_run_are_logged_and_told_of_a_finished_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {**CONSTANT, "stages": "sup", "eval_every": 1, "fine_steps": 0}
    assert train(data, tmp_path, **common, fine_max_epoch=1) == 0
    again = {**common, "fine_max_epoch": 2, "mapping": (0, 1, 2)}
    assert train(data, tmp_path, **again) == 0
    log = tmp_path / "tiny_sup" / "1_0" / "log_sup.txt"
    line = "mapping was [0, 128, 255], is [0, 1, 2]"
    assert log.read_text(encoding="utf-8").count(f"\nFrom epoch 1 on: {line}\n") == 1
    before = log.read_bytes()
    capsys.readouterr()
    assert train(data, tmp_path, **{**again, "mapping": ()}) == 0
    line = "mapping was [0, 1, 2], is [0, 128, 255]"
    assert f"Of no effect, as it is finished: {line}\n" in capsys.readouterr().out
    assert log.read_bytes() == before
    with only_progress("Fine-tuning"):  # of a job, whose answer has the new ones
        assert train(data, tmp_path, **{**again, "mapping": ()}) == 0
    assert "Of no effect" not in capsys.readouterr().out


def test_longer_fine_tuning_with_a_schedule_is_made_anew(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    common = {**CONSTANT, "self_max_epoch": 1, "fine_schedule": "cosine"}
    assert train(data, longer, **common, fine_steps=3) == 0
    capsys.readouterr()
    assert train(data, longer, **{**common, "fine_steps": 5}) == 0
    assert "stage fine is made anew, because fine_max_epoch was 3, is 5" in capsys.readouterr().out
    assert train(data, straight, **{**common, "fine_steps": 5}) == 0
    one, two = (weights(out, "fine_last.pt")["finetune"] for out in (longer, straight))
    assert same(one, two)


@pytest.mark.parametrize("best", ["the only one", "an earlier one", "the extra one"])
def test_the_last_evaluation_of_a_shorter_run_is_dropped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], best: str
) -> None:
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    every = 4 if best == "the only one" else 2
    common = {**CONSTANT, "stages": "sup", "eval_every": every}
    run, state = longer / "tiny_sup" / "1_0", longer / "tiny_sup" / "1_0" / "state_sup.pt"
    assert train(data, longer, **common, fine_steps=3) == 0
    saved = load(state)
    extra = saved["evaluations"][-1]
    assert extra["epoch"] == 2 and (run / "epoch_2").is_dir()
    extra["acc"] = 2.0 if best == "the extra one" else -1.0  # as it might have been
    save(state, saved)
    capsys.readouterr()
    assert train(data, longer, **{**common, "fine_steps": 5}) == 0
    said = capsys.readouterr().out
    anew = "the best evaluation was one that the longer run has not" in said
    assert anew == (best == "the extra one")
    assert ("Going on after epoch 2 of a run that is made longer" in said) != anew
    assert train(data, straight, **{**common, "fine_steps": 5}) == 0
    for name in ("sup.pt", "sup_last.pt"):
        one, two = (load(out / "tiny_sup/1_0" / name)["super"] for out in (longer, straight))
        assert same(one, two), name
    found = [load(out / "tiny_sup/1_0/state_sup.pt")["evaluations"] for out in (longer, straight)]
    assert found[0] == found[1] and not (run / "epoch_2").exists()
    logs = [read_metrics(out / "tiny_sup/1_0/metrics.jsonl") for out in (longer, straight)]
    assert [list(entry) for entry in logs[0]] == [list(entry) for entry in logs[1]]
    epochs = [[e["evaluation"]["epoch"] for e in log if "evaluation" in e] for log in logs]
    assert epochs[0] == epochs[1] and 2 not in epochs[0]
    assert "cut short" not in said


def test_a_shorter_run_or_another_one_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {**CONSTANT, "self_max_epoch": 2, "fine_steps": 2}
    assert train(data, tmp_path, **common) == 0
    before = files(tmp_path)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"self_max_epoch": 1}, "self_max_epoch was 2, is 1"),
        ({"fine_steps": 1}, "fine_steps was 2, is 1"),
        ({"fine_steps": 0}, "fine_steps was 2, is 0"),
        ({"self_max_epoch": 3, "self_lr": 0.5}, "self_max_epoch was 2, is 3"),
        ({"self_max_epoch": 3, "self_schedule": True}, "self_schedule was False, is True"),
    ]
    for change, said in changes:
        assert train(data, tmp_path, **{**common, **change}) == 2
        assert said in capsys.readouterr().err
        assert files(tmp_path) == before


def test_pretraining_with_a_schedule_cannot_be_made_longer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"stages": "self", "self_schedule": True}
    assert train(data, tmp_path, **common, self_max_epoch=1) == 0
    assert train(data, tmp_path, **common, self_max_epoch=2) == 2
    assert "self_max_epoch was 1, is 2" in capsys.readouterr().err


def test_a_stage_that_has_run_lets_go_of_graphs_and_gradients(data: Path, tmp_path: Path) -> None:
    """They hold most of a device's memory, which the next stage wants."""
    stage = built(data, tmp_path / "out")
    stage.run()
    assert stage.graphs is None
    assert all(parameter.grad is None for parameter in stage.module.parameters())
