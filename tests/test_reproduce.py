"""The whole table on a tiny set: order, sharing, kills, reports, plans, ablations, refusals."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_set
import torch
from PIL import Image
from tiny_set import files, make_set
from unseen_figures import figures_unseen

import config_run
import reproduce
import stages.forest
from comparison.options import DECIDED, OPTIONS
from model import METHODS
from tests.holder import HOLD
from utils import log
from utils.checkpoint import load, save

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills as Unix knows them")

SMALL = [
    *("--num_classes", "3", "--channels", "4,8,16,32", "--hidden_dim", "16", "--embed_dim", "8"),
    *("--queue_size", "10", "--self_batch_size", "2", "--self_max_epoch", "2"),
    *("--fine_max_epoch", "2", "--eval_every", "1", "--device", "cpu", "--amp", "off"),
    *("--threads", "1", "--save_seconds", "0"),
]
TABLES = ("table.md", "table.csv", "values.csv", "values.png")


@contextlib.contextmanager
def only_small() -> Iterator[None]:
    """A forest of five trees; three methods, one of which sees no annotated image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.forest, "TREES", 5)
        for name in METHODS.keys() - {"moco", "simclr", "plain-simclr"}:
            patch.delitem(METHODS, name)
        yield


def run(data: Path, out: Path, *words: str, methods: str = "sup,forest,plain-simclr,moco") -> int:
    """The script in this process; returns its exit code."""
    own = ["--data_dir", str(data), "--out", str(out), f"--methods={methods}"]
    with only_small():
        return reproduce.main([*own, *SMALL, *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("sets") / "steel")


class Finished:
    """An uninterrupted run of the table: what it wrote, and which trainings it did in turn."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.order: list[tuple[str, str, str]] = []
        real = config_run.run

        def noted(config: Any, *notes: Any, **more: Any) -> None:
            mode = "sup" if config.stages == "sup" else config.self_mode
            self.order.append((config.stages, mode, config.repeats))
            real(config, *notes, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config_run, "run", noted)
            assert run(data, out, "--repeats", "01") == 0
        self.files = files(out)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(data, tmp_path_factory.mktemp("finished") / "steel")


def evaluations(out: Path, run_dir: str, stage: str) -> list[dict[str, Any]]:
    found = load(out / "runs" / run_dir / f"state_{stage}.pt")["evaluations"]
    return list(found)


# ---------------------------------------------------------------- what is run


def test_all_methods_of_a_repeat_come_before_the_next_repeat(finished: Finished) -> None:
    assert finished.order == [
        ("sup", "sup", "0"),
        ("self", "plain-simclr", "0"),
        ("fine", "plain-simclr", "0"),
        ("self", "moco", "0"),
        ("fine", "moco", "0"),
        ("sup", "sup", "1"),
        ("fine", "plain-simclr", "1"),  # of the shared pretraining
        ("self", "moco", "1"),
        ("fine", "moco", "1"),
    ]
    assert "runs/steel_forest/1_1/epoch_0/15_t0.png" in finished.files


def test_a_shared_pretraining_is_trained_once_and_changes_no_number(
    finished: Finished, tmp_path: Path
) -> None:
    assert "runs/steel_plain-simclr/1_0/moco2.pt" in finished.files
    assert not any("steel_plain-simclr/1_1/moco" in name for name in finished.files)
    assert "runs/steel_moco/1_1/moco2.pt" in finished.files  # it saw another annotated image
    log = finished.files["runs/steel_plain-simclr/1_1/log_fine.txt"].decode()
    assert "steel_plain-simclr/1_0/moco2.pt (81 of 81 tensors loaded" in log
    # train.py, which pretrains each repeat, gets the same.
    settings = {"repeats": "1", "stages": "self-fine", "save_every": 2, "top_k": None}
    settings |= {"name": "steel", "self_mode": "plain-simclr"}
    assert tiny_set.train(finished.data, tmp_path, **settings) == 0
    alone = load(tmp_path / "steel_plain-simclr" / "1_1" / "state_fine.pt")["evaluations"]
    assert alone == evaluations(finished.out, "steel_plain-simclr/1_1", "fine")
    weights = [
        load(folder / "steel_plain-simclr" / "1_1" / "fine_last.pt")["finetune"]
        for folder in (tmp_path, finished.out / "runs")
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_what_is_finished_is_not_run_again(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished.data, finished.out, "--repeats", "01") == 0
    shown = capsys.readouterr().out
    assert "11 of 11 pieces of work are finished" in shown and "another program" not in shown
    assert files(finished.out) == finished.files


def test_finished_work_of_a_changed_program_is_named(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished.out, tmp_path / "out")
    monkeypatch.setattr(log, "source_digest", lambda: "0123abcd")
    assert run(finished.data, tmp_path / "out", "--repeats", "01", "--report") == 0
    shown = capsys.readouterr().out
    assert re.search(r"Warning: 11 finished pieces of work, as .*, now 0123abcd\); --over", shown)


def test_progress_is_told_with_an_estimate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path, "--repeats=0", methods="sup") == 0
    said = capsys.readouterr().out
    assert "0 of 1 pieces of work are finished" in said
    assert (
        "[1 of 1] no pretraining, repeat 0, supervised: about " in said and "that are left" in said
    )


# ---------------------------------------------------------------- the table


def test_the_table_holds_what_the_runs_scored(finished: Finished) -> None:
    lines = {
        (line["protocol"], line["method"]): line
        for line in csv.DictReader(finished.files["table.csv"].decode().splitlines())
    }
    assert [m for p, m in lines if p == "best"] == ["sup", "forest", "plain-simclr", "moco"]
    stages = {"sup": "sup", "forest": "forest", "moco": "fine", "plain-simclr": "fine"}
    for method, stage in stages.items():
        runs = [evaluations(finished.out, f"steel_{method}/1_{r}", stage) for r in (0, 1)]
        chosen = {"best": [max(e, key=lambda x: x["acc"]) for e in runs]}
        chosen["last"] = [e[-1] for e in runs]
        for protocol, found in chosen.items():
            line = lines[protocol, method]
            for score in ("dice", "acc", "miou"):
                values = [e[score] for e in found]
                mean, std = statistics.mean(values), statistics.stdev(values)
                assert float(line[f"{score}_mean"]) == pytest.approx(mean, abs=1e-9)
                assert float(line[f"{score}_std"]) == pytest.approx(std, abs=1e-9)
    last = {m: float(lines["last", m]["dice_mean"]) for m in stages}
    line = lines["last", "moco"]
    assert float(line["dice_minus_sup_mean"]) == pytest.approx(last["moco"] - last["sup"])
    assert float(line["dice_minus_best_plain_mean"]) == pytest.approx(
        last["moco"] - last["plain-simclr"]
    )


def test_the_notes_say_what_a_reader_must_know(finished: Finished) -> None:
    text = finished.files["table.md"].decode()
    assert "No annotated image in pretraining: SimCLR. So one pretraining per seed is" in text
    assert "over the 2 test images, 10000 replicates, seed 0" in text
    assert "pretraining 2 epochs, fine-tuning and supervised 2, evaluated every 1; seed 0" in text
    assert "paper: Dice" not in text and "Not finished" not in text and "Not scored" not in text


def test_how_the_numbers_came_about_is_kept(finished: Finished) -> None:
    record = json.loads(finished.files["run.json"])
    assert record["commands"] == [
        f"python reproduce.py --data_dir {finished.data} --out {finished.out} "
        f"--methods=sup,forest,plain-simclr,moco {' '.join(SMALL)} --repeats 01"
    ]
    assert record["seed"] == 0 and record["settings"]["self_max_epoch"] == 2
    assert record["annotated"] == {"sup_num1_0": ["15_0.png"], "sup_num1_1": ["30_1.png"]}
    assert record["data"]["test_numf"]["images"] == 2
    assert f"torch {torch.__version__}" in record["environments"][0]
    text = finished.files["run.md"].decode()
    assert record["commands"][0] in text and record["data"]["test_numf"]["hash"] in text


def test_the_hash_changes_with_one_pixel(finished: Finished, tmp_path: Path) -> None:
    hashes = [json.loads(finished.files["run.json"])["data"]["test_numf"]["hash"]]
    other = make_set(tmp_path / "steel")
    for change in (0, 1):
        if change:
            path = other / "test_numf" / "img" / "15_t0.png"
            pixels = np.array(Image.open(path))
            pixels[0, 0] ^= 1
            Image.fromarray(pixels).save(path)
        assert run(other, tmp_path / f"out{change}", "--report", "--repeats=0") == 0
        record = json.loads((tmp_path / f"out{change}" / "run.json").read_text())
        assert record["commands"] == []  # a report is not what the numbers come from
        hashes.append(record["data"]["test_numf"]["hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_tiles_of_one_sample_are_resampled_together(data: Path, tmp_path: Path) -> None:
    tiled = make_set(tmp_path / "tiled")
    for kind in ("img", "gt"):
        folder = tiled / "test_numf" / kind
        (folder / "15_t0.png").rename(folder / "15_t_0_0.png")
        (folder / "30_t1.png").rename(folder / "15_t_0_1.png")
    assert run(tiled, tmp_path / "out", "--repeats=0", methods="sup") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert 'by their names (batch "15", sample "t") all 2 test images are tiles of one' in text
    assert "percentile bootstrap" not in text and "BATCH_SAMPLE_ROW_COLUMN" in text


def with_learnt_images(data: Path, *repeats: int) -> None:
    """Put the annotated images of some repeats into the test set, one of them cut."""
    for repeat in repeats:
        name = ("15_0", "30_1")[repeat]
        for kind in ("img", "gt"):
            pixels = np.array(Image.open(data / f"sup_num1_{repeat}" / kind / f"{name}.png"))
            cut = pixels[repeat * 4 :]
            Image.fromarray(cut).save(data / "test_numf" / kind / f"15_s{repeat}.png")


def test_test_images_that_a_repeat_learns_are_left_out_of_all_its_rows(tmp_path: Path) -> None:
    root, out = make_set(tmp_path / "steel"), tmp_path / "out"
    with_learnt_images(root, 0, 1)
    assert run(root, out, "--repeats=01", methods="sup,forest") == 0
    for folder, stage in (("steel_forest", "forest"), ("steel_sup", "sup")):
        for repeat in (0, 1):
            (last, *_) = evaluations(out, f"{folder}/1_{repeat}", stage)[::-1]
            assert len(last["confusion"]) == 3  # of two and two, without its own
            tested = {
                path.name for path in (out / "runs" / folder / f"1_{repeat}").glob("epoch_0/*")
            }
            assert tested == {"15_t0.png", "30_t1.png", f"15_s{1 - repeat}.png"}
    line = next(x for x in (out / "table.md").read_text().splitlines() if "| forest" in x)
    assert "| 2 of 2 |" in line and ", " in line.split("|")[9]  # with an interval
    again = {name: (out / name).read_bytes() for name in TABLES}
    assert run(root, out, "--repeats=01", "--report", methods="sup,forest") == 0
    assert all((out / name).read_bytes() == contents for name, contents in again.items())


def test_a_forest_once_scored_on_learnt_images_is_made_anew_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_set(tmp_path / "steel"), tmp_path / "out"
    with_learnt_images(root, 0)
    assert run(root, out, "--repeats=0", methods="sup,forest") == 0
    tables = {name: (out / name).read_bytes() for name in TABLES}
    path = out / "runs/steel_forest/1_0/state_forest.pt"
    network = (out / "runs/steel_sup/1_0/state_sup.pt").stat().st_mtime_ns
    state = load(path)
    del state["settings"]["learnt test images"]
    save(path, state)
    capsys.readouterr()
    assert run(root, out, "--repeats=0", "--report", methods="sup,forest") == 0
    assert capsys.readouterr().out.count("is left out; without --report it is made anew") == 1
    rows = [line for line in (out / "table.csv").read_text().splitlines() if "forest" in line]
    assert rows and all(",0," in line for line in rows)  # of no repeat
    assert run(root, out, "--repeats=0", methods="sup,forest") == 0
    assert "stage forest is made anew, because learnt test images was" in capsys.readouterr().out
    assert tables == {name: (out / name).read_bytes() for name in TABLES}
    assert (out / "runs/steel_sup/1_0/state_sup.pt").stat().st_mtime_ns == network
    # Another difference is refused as ever.
    del state["settings"]["files"]
    save(path, state)
    assert run(root, out, "--repeats=0", methods="sup,forest") == 2


def test_a_fit_to_learnt_labels_is_no_score(tmp_path: Path) -> None:
    root, out = make_set(tmp_path / "steel"), tmp_path / "out"
    shutil.rmtree(root / "test_numf")
    for kind in ("img", "gt"):
        (root / "test_numf" / kind).mkdir(parents=True)
    with_learnt_images(root, 0)
    assert run(root, out, "--repeats=01", methods="sup,forest") == 0
    text = (out / "table.md").read_text()
    fits = "repeats in brackets: no pretraining (0); forest (no network) (0)."
    assert sum(line.endswith(fits) and "No scores but fits" in line for line in text.splitlines())
    assert "Not finished" not in text
    lines = list(csv.DictReader((out / "values.csv").open()))
    assert {line["repeat"] for line in lines} == {"1"}
    means = {x["method"]: float(x["dice_mean"]) for x in csv.DictReader((out / "table.csv").open())}
    for method in ("sup", "forest"):  # of the only score
        (last, *_) = evaluations(out, f"steel_{method}/1_1", method)[::-1]
        assert means[method] == pytest.approx(last["dice"], abs=1e-9)


def test_the_papers_numbers_stand_beside_its_own_set(data: Path, tmp_path: Path) -> None:
    (tmp_path / "aluminum").symlink_to(data)
    # A link would be resolved to the set's own name: the folder itself has to be called so.
    papers = make_set(tmp_path / "papers" / "aluminum")
    assert run(papers, tmp_path / "out", "--report", "--repeats=01") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| no pretraining "))
    assert line.endswith("| 0.5134 | 0.0609 | 0.9167 |") and "0 of 2" in line


def forget_counts(out: Path) -> None:
    """Make the states of all runs what they were before evaluations held confusion matrices."""
    for path in (out / "runs").glob("*/*/state_*.pt"):
        state = load(path)
        state["evaluations"] = [
            {name: value for name, value in entry.items() if name != "confusion"}
            for entry in state["evaluations"]
        ]
        save(path, state)


def test_runs_without_stored_counts_are_counted_from_their_pictures(
    finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished.out, tmp_path / "steel")
    forget_counts(tmp_path / "steel")
    assert run(finished.data, tmp_path / "steel", "--report", "--repeats=01") == 0
    for name in TABLES:
        assert (tmp_path / "steel" / name).read_bytes() == finished.files[name]


def test_pictures_that_were_changed_are_noticed(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished.data, tmp_path, "--repeats=0", methods="forest") == 0
    forget_counts(tmp_path)
    path = tmp_path / "runs" / "steel_forest" / "1_0" / "epoch_0" / "15_t0.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(np.where(pixels == 255, 128, pixels).astype(np.uint8)).save(path)
    capsys.readouterr()
    assert run(finished.data, tmp_path, "--repeats=0", "--report", methods="forest") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "its pictures score" in error and "--overwrite" in error


def test_all_scores_agree_when_the_test_set_lacks_a_class(tmp_path: Path) -> None:
    root, out = make_set(tmp_path / "steel"), tmp_path / "out"
    for path in (root / "test_numf" / "gt").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    assert run(root, out, "--repeats=0", methods="sup,forest") == 0
    written = {name: (out / name).read_bytes() for name in TABLES}
    forget_counts(out)
    assert run(root, out, "--repeats=0", "--report", methods="sup,forest") == 0
    assert all((out / name).read_bytes() == contents for name, contents in written.items())
    folder = out / "runs" / "steel_forest"
    # The class is predicted, and has no score for all that.
    pictures = [np.array(Image.open(p)) for p in (folder / "1_0" / "epoch_0").iterdir()]
    assert any((picture == 255).any() for picture in pictures)
    log = (folder / "1_0" / "log_forest.txt").read_text().splitlines()
    logged = dict(line.split(": ") for line in log if line.startswith(("ACC", "Dice", "mIoU")))
    assert logged["Dice2"] == "nan" and logged["Dice"] == logged["Dice1"]
    lines = [line.split() for line in (folder / "eval.txt").read_text().splitlines()]
    of_run = next(cells for cells in lines if cells[:1] == ["1_0"])
    assert of_run[2:5] == [logged[name] for name in ("ACC", "Dice", "mIoU")]
    cells = next(x for x in (out / "table.md").read_text().splitlines() if "| forest" in x)
    assert [c.strip() for c in cells.split("|")][3:9:2] == [
        logged[name] for name in ("Dice", "ACC", "mIoU")
    ]
    values = {
        (line["method"], line["protocol"]): line
        for line in csv.DictReader((out / "values.csv").open())
    }
    line = values["forest", "last"]
    assert line["dice2"] == line["iou2"] == "" and line["dice"] == line["dice1"]
    for score, name in (("acc", "ACC"), ("dice", "Dice"), ("miou", "mIoU")):
        assert f"{float(line[score]):.4f}" == logged[name]
    table = (out / "table.md").read_text()
    assert "Not scored, because no test image shows it: class 2." in table


# ---------------------------------------------------------------- at any time


def test_a_report_is_of_what_is_finished(finished: Finished, tmp_path: Path) -> None:
    words = ("--runs", str(finished.out / "runs"), "--report")
    assert run(finished.data, tmp_path, *words, "--repeats=01") == 0
    assert all((tmp_path / name).read_bytes() == finished.files[name] for name in TABLES)
    # Asked for one method and one repeat, it shows whatever else is finished.
    assert run(finished.data, tmp_path / "b", *words, "--repeats=0", methods="sup") == 0
    assert (tmp_path / "b" / "table.csv").read_bytes() == finished.files["table.csv"]
    assert files(finished.out) == finished.files


def test_a_plan_says_how_long_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run(data, tmp_path / "out", "--repeats=01", "--plan") == 0
    said = capsys.readouterr().out
    assert "11 of 11 pieces of work are to do" in said
    for line in ("training with labels: 6 x", "forest: 2 x", "PSCL-MoCo: 2 x", " SimCLR: 1 x"):
        assert line in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_counts_what_is_left(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished.data, finished.out, "--repeats=01", "--plan") == 0
    assert "0 of 11 pieces of work are to do" in capsys.readouterr().out
    assert files(finished.out) == finished.files


def test_other_settings_are_refused_before_anything_is_run(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ((), ("--report",)):
        words = ("--repeats=01", "--fine_jitter", "0.3", *more)
        assert run(finished.data, finished.out, *words) == 2
        error = capsys.readouterr().err
        assert "steel_sup/1_0: holds a run of stage sup with other settings" in error
        assert "fine_jitter was 0.1, is 0.3" in error and "--name" in error
    assert files(finished.out) == finished.files


@pytest.mark.slow
def test_a_longer_table_goes_on_and_is_none_before(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "steel"
    shutil.copytree(finished.out, out)
    words = ("--repeats=0", "--self_max_epoch", "3")
    assert run(finished.data, out, *words, "--report") == 2
    assert "self_max_epoch was 2, is 3" in capsys.readouterr().err
    assert run(finished.data, out, *words) == 0
    said = capsys.readouterr().out
    # Of six pieces of work, supervised training and the forest are as before.
    assert "2 of 6 pieces of work are finished" in said
    assert said.count("of a run that is made longer") == 2
    assert said.count("stage fine is made anew") == 2
    assert "0 of 6 pieces of work are to do" in planned(finished.data, out, words, capsys)


def planned(
    data: Path, out: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> str:
    """What ``--plan`` prints."""
    assert run(data, out, *words, "--plan") == 0
    return capsys.readouterr().out


def test_a_folder_in_use_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "steel_forest" / "1_0"
    words = [sys.executable, "-c", HOLD, str(folder), str(tiny_set.ROOT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert run(data, tmp_path, "--repeats=0", methods="forest") == 2
        holder.kill()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "steel_forest/1_0: another process is training there" in error


# ---------------------------------------------------------------- kills


def run_in(data: str, out: str, kill_at: int) -> None:
    """A process that dies at the n-th time that a file is put in its place."""
    real, calls = os.replace, []

    def deadly(*words: Any) -> None:
        calls.append(words)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*words)

    os.replace = deadly  # type: ignore[assignment]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with figures_unseen():
            code = run(Path(data), Path(out), "--repeats=01")
        sys.exit(code)


@pytest.mark.slow  # seconds: 13 and 40; a longer table goes on beside it
@pytest.mark.parametrize("kills", [(25,), (9, 25, 31, 40)])
def test_a_killed_table_ends_as_an_unbroken_one(
    finished: Finished, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_set", "reproduce", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        forkserver.ensure_running()
    out = tmp_path / "steel"
    for kill_at in (*kills, 0):
        process = context.Process(target=run_in, args=(str(finished.data), str(out), kill_at))
        process.start()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    for name in TABLES:
        assert (out / name).read_bytes() == finished.files[name]
    # The runs themselves, too, are those of an unbroken table.
    for name, contents in finished.files.items():
        if name.endswith((".png", "moco2.pt", "metrics.jsonl")):
            assert (out / name).read_bytes() == contents, name


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_being_stopped_is_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setattr(config_run, "run", lambda *_, **__: os.kill(os.getpid(), how))
    assert run(data, tmp_path, "--repeats=0", methods="sup") == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "The same command goes on" in error


# ---------------------------------------------------------------- ablations


def test_an_ablation_varies_one_setting(finished: Finished, tmp_path: Path) -> None:
    words = ("--repeats=0", "--ablate", "temperature", "--runs", str(finished.out / "runs"))
    before = files(finished.out)
    assert run(finished.data, tmp_path, *words, methods="moco") == 0
    table = (tmp_path / "ablate_temperature_moco.md").read_text()
    assert "| PSCL-MoCo, temperature 0.07 | 1 of 2 |" in table
    assert "| PSCL-MoCo, temperature 0.5 | 2 of 2 |" in table  # the table's own runs
    assert "| no pretraining | 2 of 2 |" in table
    lines = list(csv.DictReader((tmp_path / "ablate_temperature_moco.csv").open()))
    assert {x["method"] for x in lines} == {"sup", "moco 0.07", "moco 0.5"}
    assert "dice_minus_moco_0.5_mean" in lines[0]
    state = load(finished.out / "runs" / "steel-temperature-0.07_moco" / "1_0" / "state_self.pt")
    assert state["settings"]["temperature"] == 0.07
    after = files(finished.out)
    assert {n: b for n, b in after.items() if n in before and "seconds" not in n} == {
        n: b for n, b in before.items() if "seconds" not in n
    }
    for name in after.keys() - before.keys():
        assert "steel-temperature-0.07_moco" in name
        (finished.out / name).unlink()
    (finished.out / "runs" / "steel_seconds.json").write_bytes(before["runs/steel_seconds.json"])


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--methods sup simclrr", ("--methods: found 'simclrr'", "did you mean simclr?")),
        ("--budget big", ("--budget: found 'big'", "paper, cpu")),
        ("--ablate ratios", ("--ablate: found 'ratios'", "did you mean ratio?")),
        ("--ablate negatives --methods moco", ("moco does not use intra_view_negatives",)),
        ("--ablate ratio --methods sup", ("--methods: found 'sup'",)),
        ("--ablate ratio --methods moco simclr", ("--ablate takes one method",)),
        ("--pretraining steel --name steel", ("--pretraining: found steel, this table",)),
        ("--pretraining other --ablate ratio", ("--pretraining: not with --ablate",)),
        ("--plan yes --image_sise 3", ("--image_sise", "did you mean --image_size?")),
        ("--method sup", ("unknown flag --method", "did you mean --methods?")),
        ("--plan=yes", ("--plan: found 'yes'; it takes no value",)),
        ("--out", ("--out: no value found",)),
        ("--stages self", ("--stages: decided by reproduce.py itself",)),
        ("--self_mode moco", ("--self_mode: decided by reproduce.py itself", "--methods")),
        ("--output_dir x", ("--output_dir: decided by reproduce.py itself; choose folders with",)),
        ("--pretrained x.pt", ("--pretrained: decided by reproduce.py itself; --pretraining ",)),
        (
            "--multi_round False",
            ("--multi_round: decided by reproduce.py itself; give --repeats 0",),
        ),
        ("--data_size 15", ("data_size: found 15; give one",)),
        ("--data_dir nowhere", ("nowhere: no such folder",)),
        ("--name a/b", ("name: found 'a/b'",)),
        ("stray", ("unexpected word 'stray'",)),
    ],
)
def test_wrong_words_are_named(
    words: str,
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(words.split()) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts) and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_help_lists_each_flag_once_and_none_that_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["-h"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.split("\n") if "  --" in line[:4]]
    assert len(set(listed)) == len(listed)
    assert {"--report", "--device", "--methods", "--data_size", "--repeats"} <= set(listed)
    assert "--tensorboard" in listed and "--self_max_epoch" in listed
    assert not {f"--{name}" for name in DECIDED} & set(listed)
    assert "multi_round" not in text and "15f" not in text


def test_the_texts_of_help_stand_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["-h"])
    own = capsys.readouterr().out.split("\nExperiment:")[0]
    lines = [line for line in own.split("\n") if line.startswith("  --")]
    assert len(lines) == len(OPTIONS) + 2
    assert {len(re.match(r" *\S+ +", line)[0]) for line in lines} == {16}  # type: ignore[index]


def test_colours_and_unlabelled_pixels_reach_the_forest(tmp_path: Path) -> None:
    root = make_set(tmp_path / "steel")
    mask = root / "sup_num1_0" / "gt" / "15_0.png"
    pixels = np.array(Image.open(mask))
    pixels[:5] = 255
    Image.fromarray(pixels).save(mask)
    image = root / "test_numf" / "img" / "15_t0.png"
    gray = np.array(Image.open(image))
    Image.fromarray(np.stack([gray, gray // 2, gray], axis=-1)).save(image)
    words = ("--repeats=0", "--ignore_label=255")
    assert run(root, tmp_path / "out", *words, methods="forest") == 0
    log = (tmp_path / "out" / "runs" / "steel_forest" / "1_0" / "log_forest.txt").read_text()
    assert f"Learnt from {27 * 40} pixels" in log
