"""What a table needs and how far it is, from folders laid out by hand; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_set import files, make_set

import reproduce
from comparison.options import read_options
from comparison.plan import Plan, Work
from utils import run_folder
from utils.checkpoint import save
from utils.metrics import Scores


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_set(tmp_path / "steel")


TOLD: dict[str, Any] = {"config": {}, "environment": "", "about": []}


def plan_of(data: Path, *words: str) -> Plan:
    own = ["--data_dir", str(data), "--out", str(data.parent / "out"), "--num_classes=3"]
    return Plan(read_options([*own, "--device=cpu", "--threads=1", *words]))


def finish(work: Work) -> None:
    """Leave the state of a finished run that says nothing of its settings."""
    state = {"settings": {}, "finished": True, "evaluations": [], "outputs": []} | TOLD
    save(work.runner.state.path, state)


def test_repeat_by_repeat_a_shared_pretraining_once(data: Path) -> None:
    plan = plan_of(data, "--methods=sup,forest,plain-simclr,moco", "--repeats=10")
    assert [work.title for work in plan.works()] == [
        "no pretraining, repeat 1, supervised",
        "forest (no network), repeat 1, fit",
        "SimCLR, pretraining for all repeats",
        "SimCLR, repeat 1, fine-tuning",
        "PSCL-MoCo, repeat 1, pretraining",
        "PSCL-MoCo, repeat 1, fine-tuning",
        "no pretraining, repeat 0, supervised",
        "forest (no network), repeat 0, fit",
        "SimCLR, repeat 0, fine-tuning",
        "PSCL-MoCo, repeat 0, pretraining",
        "PSCL-MoCo, repeat 0, fine-tuning",
    ]
    assert all(share == 1 for share in plan.to_do().values())
    tuned = [w.runner.config.pretrained for w in plan.works() if w.runner.stage == "fine"]
    shared = data.parent / "out" / "runs" / "steel_plain-simclr" / "1_0" / "moco200.pt"
    assert tuned == [str(shared), "", "", ""]


def test_another_fine_tuning_takes_the_pretrainings_of_a_table(data: Path) -> None:
    words = ("--methods=sup,plain-simclr,moco", "--repeats=01")
    runs = f"--runs={data.parent / 'out' / 'runs'}"
    own = plan_of(data, *words, runs)
    plan = plan_of(data, *words, runs, "--name=robust", "--preset=robust", "--pretraining=steel")

    def folders(plan: Plan, stage: str) -> list[str]:
        return [w.runner.run_dir.parent.name for w in plan.works() if w.runner.stage == stage]

    assert (
        folders(plan, "self") == folders(own, "self") == ["steel_plain-simclr"] + 2 * ["steel_moco"]
    )
    assert folders(plan, "sup") == 2 * ["robust_sup"]
    assert set(folders(plan, "fine")) == {"robust_plain-simclr", "robust_moco"}
    tuned = [Path(w.runner.config.pretrained) for w in plan.works() if w.runner.stage == "fine"]
    assert [path.parts[-3:-1] for path in tuned] == [
        ("steel_plain-simclr", "1_0"),
        ("steel_moco", "1_0"),
        ("steel_plain-simclr", "1_0"),  # of all repeats
        ("steel_moco", "1_1"),
    ]
    (problem,) = plan.problems()  # nothing of that table is there, and nothing is trained for it
    assert problem.startswith("--pretraining: found steel, but ")
    assert "has no steel_moco, steel_plain-simclr; train the table steel first" in problem
    # A pretraining that is finished there is the same one: its settings are equal.
    for work in own.works():
        if work.runner.stage == "self":
            state = {"settings": work.runner.decisive_settings(), "finished": True}
            save(work.runner.state.path, state | {"evaluations": [], "outputs": []} | TOLD)
    left = {work.runner.stage for work in plan.to_do()}
    assert left == {"sup", "fine"} and not plan.problems()


def test_a_pretraining_whose_fine_tuning_is_finished_is_not_wanted(data: Path) -> None:
    words = ("--methods=plain-simclr,moco", "--repeats=01")
    for work in plan_of(data, *words).works():
        if work.runner.stage == "fine" and (work.variant.method, work.repeat) != ("moco", 1):
            finish(work)
    assert [w.title for w in plan_of(data, *words).to_do()] == [
        "PSCL-MoCo, repeat 1, pretraining",
        "PSCL-MoCo, repeat 1, fine-tuning",
    ]


@pytest.mark.parametrize(("epoch", "left"), [(0, 1.0), (150, 0.25), (250, 0.0)])
def test_the_share_that_is_left_is_of_the_epochs(data: Path, epoch: int, left: float) -> None:
    work = plan_of(data, "--methods=moco", "--repeats=0").works()[0]
    state = {
        "settings": {},
        "finished": False,
        "evaluations": [],
        "outputs": [],
        "epoch": epoch,
        "module": {},
        **TOLD,
    }
    save(work.runner.state.path, state)
    assert work.left() == left


def test_a_damaged_state_is_named_and_overwrite_begins_again(data: Path) -> None:
    words = ("--methods=sup,moco", "--repeats=0")
    for work in plan_of(data, *words).works():
        work.runner.run_dir.mkdir(parents=True, exist_ok=True)
        work.runner.state.path.write_bytes(b"PK damaged")
    lines = plan_of(data, *words).problems()
    assert len(lines) == 3 and all("which --overwrite does" in line for line in lines)
    afresh = plan_of(data, *words, "--overwrite")
    assert afresh.problems() == [] and list(afresh.to_do().values()) == [1, 1, 1]
    assert afresh.results(afresh.options.variants[0], 0) == {}


def test_the_state_of_a_finished_run_is_read_once_until_it_changes(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is written after each training, from all that are finished."""
    plan = plan_of(data, "--methods=sup", "--repeats=0")
    (work,), (variant,) = plan.works(), plan.options.variants
    read: list[Path] = []
    load = run_folder.load
    monkeypatch.setattr(run_folder, "load", lambda path: read.append(path) or load(path))
    settings = json.loads(json.dumps(work.runner.decisive_settings()))  # as in a run's own
    assert plan.results(variant, 0) == {}
    for number, finished in enumerate((False, True, True), 1):
        counts = np.full((2, 3, 3), number)
        scores = {**Scores.from_confusion(counts).as_dict(), "confusion": counts.tolist()}
        state: dict[str, Any] = {"settings": settings, "finished": finished, "outputs": []}
        state |= {"evaluations": [{"epoch": 0, **scores}], **TOLD}
        save(work.runner.state.path, state)
        read.clear()
        for _ in range(3):
            found = plan.results(variant, 0)
            assert finished == bool(found)
            assert not found or (found["last"].counts == number).all()
        assert len(read) == (1 if finished else 3)


def test_what_a_stage_cannot_do_is_said_before_anything_is_run(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(data.parent)
    words = ["--data_dir", str(data), "--out", str(data.parent / "out"), "--num_classes=3"]
    words += ["--methods=sup,plain-simclr", "--self_batch_size=1", "--repeats=0", "--device=cpu"]
    assert reproduce.main(words) == 2
    assert "self_batch_size: found 1" in capsys.readouterr().err
    assert files(data.parent) == before


def test_a_report_needs_no_images_to_pretrain_on(data: Path, tmp_path: Path) -> None:
    for path in sorted((data / "train_numf").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    words = ("--methods=sup,moco", "--repeats=0", "--report")
    assert plan_of(data, *words).problems() == []


def test_another_length_or_size_of_images_is_timed_anew(data: Path) -> None:
    def paces(*words: str) -> list[str]:
        return [w.pace for w in plan_of(data, "--methods=sup,moco", "--repeats=0", *words).works()]

    usual = paces()
    for words, changed in (
        (["--self_max_epoch=3"], [False, True, False]),
        (["--fine_max_epoch=3"], [True, False, True]),
        (["--fine_steps=3"], [True, False, True]),
        (["--image_size=16"], [True, True, True]),
        (["--fine_jitter=0"], [False, False, False]),
    ):
        assert [a != b for a, b in zip(usual, paces(*words), strict=True)] == changed
    assert usual[0] == usual[2] != usual[1]  # training with labels takes equal time
