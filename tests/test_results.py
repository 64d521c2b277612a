"""The table of an experiment, from states written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from config import Config
from report.results import read_results, results_table, table, write_results
from stages.job import unused_settings
from utils.checkpoint import save
from utils.commandline import UserError
from utils.run_folder import StateFile


def evaluation(epoch: int, acc: float, dice: float, miou: float) -> dict[str, Any]:
    return {"epoch": epoch, "acc": acc, "dice": dice, "miou": miou}


def state(folder: Path, run: str, *evaluations: dict[str, Any], finished: bool = True) -> None:
    contents = {"settings": {}, "outputs": [], "finished": finished}
    contents |= {"config": {}, "environment": "", "about": []}
    save(folder / run / "state_fine.pt", {**contents, "evaluations": list(evaluations)})


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Two runs of data size 1, one of all images, and some that do not count."""
    folder = tmp_path / "steel_moco"
    state(folder, "1_0", evaluation(1, 0.5, 0.9, 0.8), evaluation(3, 0.75, 0.25, 0.125))
    state(folder, "1_1", evaluation(1, 0.5, 0.5, 0.25), evaluation(3, 0.5, 0.75, 0.5))
    state(folder, "f", evaluation(0, 1.0, math.nan, math.nan))
    state(folder, "1_2", evaluation(1, 0.9, 0.9, 0.9), finished=False)
    state(folder, "1_3")
    (folder / "1_4").mkdir()
    (folder / "1_4" / "state_fine.pt").write_bytes(b"PK damaged")
    (folder / "1_4" / "state_sup.pt").write_bytes(b"PK another stage")
    return folder


def test_the_best_is_by_acc_the_first_of_equals_and_the_last_is_the_last(experiment: Path) -> None:
    results = read_results(experiment, "fine")
    assert list(results) == ["1_0", "1_1", "f"]
    assert [(best["epoch"], last["epoch"]) for best, last in results.values()] == [
        (3, 3),
        (1, 3),
        (0, 0),
    ]


def test_a_state_is_read_once_and_again_when_it_was_replaced(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    others = {"1_4", "eval.txt"}  # damaged, so it may be whole next time; and no run
    load = StateFile.load
    monkeypatch.setattr(StateFile, "load", lambda f: read.append(f.path.parent.name) or load(f))
    for _ in range(2):
        write_results(experiment, "fine")
        assert sorted(set(read) - others) == ["1_0", "1_1", "1_2", "1_3", "f"]
    assert len([run for run in read if run not in others]) == 5
    state(experiment, "1_2", evaluation(7, 0.5, 0.5, 0.5))
    state(experiment, "f", evaluation(8, 0.5, 0.5, 0.5), finished=False)
    assert list(read_results(experiment, "fine")) == ["1_0", "1_1", "1_2"]
    assert read_results(experiment, "fine")["1_2"][1]["epoch"] == 7


def test_the_table_has_each_run_and_the_mean_of_each_size(experiment: Path) -> None:
    lines = table(experiment, "fine")
    assert len({len(line) for line in lines}) == 1
    # By hand: best ACC 0.75 and 0.5, mean 0.625, deviation 0.25 / sqrt(2) = 0.1768.
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "1_0 3 0.7500 0.2500 0.1250 3 0.7500 0.2500 0.1250",
        "1_1 1 0.5000 0.5000 0.2500 3 0.5000 0.7500 0.5000",
        "1: mean ± std 0.6250 ± 0.1768 0.3750 ± 0.1768 0.1875 ± 0.0884"
        " 0.6250 ± 0.1768 0.5000 ± 0.3536 0.3125 ± 0.2652",
        "f 0 1.0000 nan nan 0 1.0000 nan nan",
    ]


def test_eval_txt_says_what_was_chosen_on_what(experiment: Path) -> None:
    write_results(experiment, "fine")
    text = (experiment / "eval.txt").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "steel_moco, stage fine: scores on the test set"
    assert "chosen with the test set's labels" in text and "last: after the last epoch" in text
    without = "1_3: no score, the set has no test images with masks"  # finished, not evaluated
    assert text.splitlines()[-7:] == [*table(experiment, "fine"), "", without]
    printed = results_table({experiment: "fine"})
    assert printed.splitlines()[1].startswith(str(experiment))
    assert printed.splitlines()[2:] == [*table(experiment, "fine"), without]


def test_a_fit_is_never_among_the_scores(tmp_path: Path) -> None:
    folder = tmp_path / "steel_simclr"
    state(folder, "1_0", {**evaluation(1, 0.5, 0.9, 0.8), "fit": True})
    write_results(folder, "fine")
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "steel_simclr, stage fine: no score"
    assert "1_0: a fit, no score" in text and "on test" not in text and "0.9000" in text
    assert read_results(folder, "fine") == {} and list(read_results(folder, "fine", True)) == [
        "1_0"
    ]
    state(folder, "1_1", evaluation(1, 0.5, 0.25, 0.125))
    write_results(folder, "fine")
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    scores, fit = text.split("1_0: a fit")
    assert "0.2500" in scores and "0.9000" not in scores and "0.2500" not in fit


def test_without_any_score_none_is_promised(tmp_path: Path) -> None:
    folder = tmp_path / "steel_simclr"
    state(folder, "1_0")
    write_results(folder, "fine")
    assert (folder / "eval.txt").read_text(encoding="utf-8").splitlines() == [
        "steel_simclr, stage fine: no score",
        "1_0: no score, the set has no test images with masks",
    ]
    assert "no score" in results_table({folder: "fine"})


def test_it_says_over_which_classes_the_means_are(tmp_path: Path) -> None:
    folder = tmp_path / "steel_sup"
    state(folder, "1_0", {**evaluation(1, 0.5, 0.9, 0.8), "truth_pixels": [9, 0, 4, 1, 0]})
    write_results(folder, "fine")
    line = "2 of 4 classes scored: no pixel of class 1, 4 in the test set"
    assert line in (folder / "eval.txt").read_text(encoding="utf-8").splitlines()
    assert results_table({folder: "fine"}).splitlines()[-1] == line
    state(folder, "1_0", {**evaluation(1, 0.5, 0.9, 0.8), "truth_pixels": [0, 7, 4, 1]})
    write_results(folder, "fine")
    assert "3 of 3 classes scored" in (folder / "eval.txt").read_text(encoding="utf-8").splitlines()


def test_no_finished_run_is_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "steel_sup").mkdir()
    write_results(tmp_path / "steel_sup", "sup")
    assert len(table(tmp_path / "steel_sup", "sup")) == 1


def test_a_table_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "no_folder").write_text("")
    with pytest.raises(UserError) as error:
        write_results(tmp_path / "no_folder", "fine")
    assert "eval.txt" in str(error.value) and "\n" not in str(error.value)


def test_copies_of_a_run_do_not_count(experiment: Path) -> None:
    before = table(experiment, "fine")
    for name in ("1_0 copy", "1_0_old", "old", "2_0", "15_0", "1_10", "F"):
        state(experiment, name, evaluation(1, 0.5, 0.1, 0.1))
    assert table(experiment, "fine") == before


def settle(run: Path, **settings: Any) -> None:
    """Give a run settings."""
    path = run / "state_fine.pt"
    save(path, {**StateFile(path).load(), "settings": settings})  # type: ignore[dict-item]


def test_runs_of_other_settings_are_averaged_with_a_warning(experiment: Path) -> None:
    common = {"fine_lr_decoder": 1e-3, "channels": [4, 8, 16, 32]}
    settle(experiment / "1_0", files="a", **{"pretrained weights": "c"}, **common)
    settle(experiment / "1_1", files="b", **{"pretrained weights": "d"}, eval_tta=False, **common)
    settle(experiment / "f", fine_lr_decoder=0.5)  # of another size, so of another mean
    write_results(experiment, "fine")
    assert "Warning" not in (experiment / "eval.txt").read_text(encoding="utf-8")
    settle(experiment / "1_1", files="b", **{**common, "fine_lr_decoder": 0.5, "seed": 3})
    write_results(experiment, "fine")
    warning = "Warning: runs of data size 1 differ in fine_lr_decoder, seed"
    for text in (
        (experiment / "eval.txt").read_text(encoding="utf-8"),
        results_table({experiment: "fine"}),
    ):
        lines = text.splitlines()
        mean = next(i for i, line in enumerate(lines) if "mean ± std" in line)
        assert lines.count(warning) == 1 and lines.index(warning) < mean


def test_settings_that_the_method_does_not_take_are_no_difference(experiment: Path) -> None:
    settle(experiment / "1_0", queue_size=504, temperature=0.5)
    settle(experiment / "1_1", queue_size=100, temperature=0.5)
    unused = unused_settings(Config(self_mode="simclr"))
    write_results(experiment, "fine", unused)
    assert "Warning" not in (experiment / "eval.txt").read_text(encoding="utf-8")
    assert "Warning" not in results_table({experiment: "fine"}, unused)
    settle(experiment / "1_1", queue_size=100, temperature=0.1)
    assert "differ in temperature\n" in results_table({experiment: "fine"}, unused)
    unused = unused_settings(Config(self_mode="moco"))
    assert "differ in queue_size, temperature" in results_table({experiment: "fine"}, unused)
