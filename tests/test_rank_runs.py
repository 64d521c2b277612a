"""Whole commands by two ranks: what they write, what they share, and how they end together."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_set
import torch
from rank_pool import command
from tiny_set import ROOT, environment, files, make_set

import predict
import reproduce
from config import Config
from stages.pretraining import SelfSupervised
from utils.commandline import AGAIN, UserError
from utils.ranks import group, stopping

SETTINGS: dict[str, Any] = {"norm": "group", "fine_batch_size": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("ranks") / "set", size=(32, 32))


def train_in(folder: Path, images: Path, settings: dict[str, Any]) -> int:
    """The program in a folder, so that no log holds the folder's name."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    return tiny_set.train(images, Path("."), **{**SETTINGS, **settings})


def both(
    folder: Path, images: Path | list[Path], *of_rank: dict[str, Any], **settings: Any
) -> list[tuple[int, str, str]]:
    """The program by two ranks, each with settings of its own if there are any."""
    sets = images if isinstance(images, list) else [images] * 2
    own = of_rank or ({}, {})
    words = [(folder, data, settings | more) for data, more in zip(sets, own, strict=True)]
    return command(train_in, words)


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = next(folder.rglob("metrics.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if not isinstance(value, str)}


@pytest.mark.slow  # seconds: 11
def test_runs_of_two_ranks_are_those_of_one_process(tmp_path: Path, images: Path) -> None:
    """Pretraining to rounding, shared fine-tuning from it byte by byte; no rank writes twice."""
    settings = {"stages": "self-fine", "repeats": "01", "self_max_epoch": 1}
    found = both(tmp_path / "two", images, **settings)
    assert [code for code, *_ in found] == [0, 0], found
    assert "Pretraining" in found[0][1] and "Pretraining" not in found[1][1]
    assert "2 ranks, 1 of the 2 images of a step each" in found[0][1]
    (whole,) = command(train_in, [(tmp_path / "one", images, settings)])
    assert whole[0] == 0, whole[2]
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("metrics.jsonl"):
            pairs = (map(json.loads, text.splitlines()) for text in (one[name], two[name]))
            for entry, own in zip(*pairs, strict=True):
                if entry["stage"] == "self":
                    assert numbers(own) == pytest.approx(numbers(entry), rel=1e-5)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    for path in [*(tmp_path / "again").rglob("*fine*"), *(tmp_path / "again").rglob("epoch_*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (alone,) = command(
        train_in, [(tmp_path / "again", images, settings | {"stages": "fine"})]
    )  # from the weights of the two
    assert alone[0] == 0, alone[2]
    again = files(tmp_path / "again")
    shared = [n for n in two if re.search(r"(/fine|epoch_.*png|log_fine|eval)", n)]
    assert len(shared) > 8
    for name in shared:
        if "log_fine" not in name and not name.endswith(".pt"):  # these tell the stages, too
            assert again[name] == two[name], name
    for run in ("1_0", "1_1"):
        weights = [
            torch.load(tmp_path / where / f"tiny_simclr/{run}/fine.pt", weights_only=True)
            for where in ("two", "again")
        ]
        for name, value in weights[0]["finetune"].items():
            assert torch.equal(value, weights[1]["finetune"][name])


@pytest.mark.slow  # seconds: 8; a single run whose batches are shared is beside it
def test_one_run_with_labels_is_trained_by_rank_0_and_evaluated_by_all(
    tmp_path: Path, images: Path
) -> None:
    settings = {"stages": "sup", "repeats": "0"}
    found = both(tmp_path / "two", images, **settings)
    assert [code for code, *_ in found] == [0, 0], found
    (whole,) = command(train_in, [(tmp_path / "one", images, settings)])
    assert whole[0] == 0, whole[2]
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    differing = {n.rpartition("/")[2] for n in one if one[n] != two.get(n)}
    assert one.keys() == two.keys()
    assert differing <= {"log_sup.txt", "state_sup.pt"}  # both say how many ranks there were
    log = two["tiny_sup/1_0/log_sup.txt"].decode()
    assert log.replace(", 2 ranks", "") == one["tiny_sup/1_0/log_sup.txt"].decode()


LABELS: dict[str, Any] = {"stages": "sup", "data_size": "5", "fine_batch_size": 4}
LABELS |= {"fine_average": 0.9, "class_weight": (1.0, 2.0, 3.0)}


@pytest.mark.slow
def test_a_single_run_with_batches_of_several_images_is_shared(
    tmp_path: Path, images: Path
) -> None:
    """Stopped within its second epoch, it goes on by one process, as if by one throughout."""
    words = (tmp_path / "two", images, LABELS | {"save_seconds": 1e-9})
    stopped = command(_train_one_epoch_and_a_step, [words] * 2)
    assert [code for code, *_ in stopped] == [2, 2], stopped
    for name in ("two", "one"):
        (done,) = command(train_in, [(tmp_path / name, images, LABELS)])
        assert done[0] == 0, done[2]
        assert ("Going on in epoch 1, after 1 of 2 steps" in done[1]) == (name == "two")
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4  # two epochs, two evaluations
    for entry, own in zip(one, two, strict=True):
        if "evaluation" not in entry:
            assert numbers(own) == pytest.approx(numbers(entry), rel=1e-5)
    log = (tmp_path / "two/tiny_sup/5_0/log_sup.txt").read_text()
    assert "\n2 ranks, 2 of the 4 images of a step each\n" in log
    assert "amp off, 2 ranks\n" in log and "From epoch 1 on with program" in log


@pytest.mark.parametrize("stage", ["self", "sup"])
@pytest.mark.slow
def test_two_ranks_that_were_stopped_within_an_epoch_end_with_the_same_bytes(
    stage: str, tmp_path: Path, images: Path
) -> None:
    own = LABELS if stage == "sup" else {"stages": "self", "self_mode": "moco"}
    words = [(tmp_path / "run", images, own | {"save_seconds": 1e-9})] * 2
    assert {code for code, *_ in command(train_in, words)} == {0}
    (tmp_path / "run").rename(tmp_path / "kept")
    assert {code for code, *_ in command(_train_one_epoch_and_a_step, words)} == {2}
    found = command(train_in, words)
    assert {code for code, *_ in found} == {0} and "Going on in epoch 1" in found[0][1]
    one, two = (files(tmp_path / name) for name in ("kept", "run"))
    assert one.keys() == two.keys() and [n for n in one if one[n] != two[n]] == []


def _train_one_epoch_and_a_step(folder: Path, images: Path, settings: dict[str, Any]) -> int:
    """Both ranks end in the second step of the second epoch; rank 0 has saved the first."""
    from utils.training import Training

    whole = Training.train_epoch

    def train_epoch(self: Any, epoch: int, step_done: Any) -> None:
        done = []

        def stop() -> None:
            step_done()
            done.append(1)
            if (epoch, len(done)) == (1, 2):
                group.refuse_together("stopped here")

        whole(self, epoch, stop)

    Training.train_epoch = train_epoch  # type: ignore[method-assign]
    return train_in(folder, images, settings)


def test_fewer_runs_than_ranks_share_batches_and_others_share_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 1, 2 and 3 runs on four ranks: all take part in 1 and 2, each has its own of 3."""
    import config_run

    seen: list[int] = []

    class Stage:
        stage = "sup"

        def __init__(self, job: Any) -> None:
            self.job = job

        def fits_ranks(self) -> bool:
            return self.job.fits

        def run(self) -> None:
            seen.append(group.size())

    monkeypatch.setattr(group, "_group", SimpleNamespace(rank=0, size=4, alone=0, meet=lambda: 0))
    monkeypatch.setattr(config_run.results, "write_results", lambda *_: None)
    monkeypatch.setattr(config_run, "experiment_dir", lambda *_: Path())
    for runs, fits, expected in (
        (1, True, [4]),
        (1, False, [4]),
        (2, True, [4, 4]),
        (2, False, [1]),
        (3, True, [1]),
        (5, True, [1, 1]),
    ):
        seen.clear()
        job = SimpleNamespace(fits=fits, config=Config())
        config_run.train([(job, Stage)] * runs)  # type: ignore[list-item]
        assert seen == expected, (runs, fits)


@pytest.mark.parametrize("self_mode", ["simclr", "moco"])
def test_a_run_goes_on_with_another_number_of_ranks(
    self_mode: str, tmp_path: Path, images: Path
) -> None:
    """One epoch by two ranks, the second by one: as both by one, and the log says it."""
    settings = {"stages": "self", "self_mode": self_mode, "self_max_epoch": 2}
    stopped = command(_train_one_epoch, [(tmp_path / "two", images, settings) for _ in range(2)])
    assert [code for code, *_ in stopped] == [2, 2]
    for name in ("two", "one"):
        (done,) = command(train_in, [(tmp_path / name, images, settings)])
        assert done[0] == 0, done[2]
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [entry["epoch"] for entry in two] == [0, 1]
    for entry, own in zip(one, two, strict=True):
        assert numbers(own) == pytest.approx(numbers(entry), rel=1e-4)
    log = next((tmp_path / "two").rglob("log_self.txt")).read_text()
    assert "amp off, 2 ranks\n" in log and "From epoch 1 on with program" in log


def _train_one_epoch(folder: Path, images: Path, settings: dict[str, Any]) -> int:
    whole = SelfSupervised.train_epoch

    def train_epoch(self: Any, epoch: int, step_done: Any) -> None:
        if epoch == 1:
            group.refuse_together("stopped here")
        whole(self, epoch, step_done)

    SelfSupervised.train_epoch = train_epoch  # type: ignore[method-assign]
    return train_in(folder, images, settings)


# --- ending together ------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused_on_all_ranks(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path, images, stages="self", self_batch_size=3)
    line = "self_batch_size: found 3 images, which do not divide among 2 ranks; allowed: "
    assert [(code, err) for code, _, err in found] == [(2, f"{line}multiples of 2\n")] * 2
    assert not list(tmp_path.rglob("*.pt"))


def test_byol_needs_two_images_a_rank(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path, images, stages="self", self_mode="byol")
    assert [code for code, *_ in found] == [2, 2]
    assert "self_batch_size: found 2; allowed: at least 4 for 2 images a rank" in found[1][2]


def test_synchronised_batchnorm_needs_cuda(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path, images, stages="self", norm="batch", batch_norm_ranks="sync")
    assert [code for code, *_ in found] == [2, 2]
    assert all("SyncBatchNorm needs CUDA; give own, or --norm group" in err for *_, err in found)


def test_synchronised_batchnorm_needs_cuda_with_labels_too(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path, images, **LABELS | {"norm": "batch", "batch_norm_ranks": "sync"})
    line = "batch_norm_ranks: found sync on cpu; PyTorch's SyncBatchNorm needs CUDA; give own, or "
    assert [(code, err) for code, _, err in found] == [(2, f"{line}--norm group\n")] * 2


def test_a_rank_without_the_set_ends_all_with_its_message(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path / "run", [images, tmp_path / "none"], stages="self")
    assert [code for code, *_ in found] == [2, 2]
    for _, _, err in found:
        assert err.startswith("rank 1 of 2 (") and f"{tmp_path / 'none'}: no such folder" in err


def test_ranks_with_other_images_are_refused(tmp_path: Path, images: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(images, other)
    tiny_set.add(other / "train_numf", "15_0", 99, 3, (32, 32))
    found = both(tmp_path / "run", [images, other], stages="self")
    line = "data_dir: the images of rank 1 are not those of rank 0; copy the same set to all"
    assert all(code == 2 and err.startswith(line) for code, _, err in found), found


def test_ranks_with_other_settings_are_refused(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path, images, {"self_lr": 1e-3}, {"self_lr": 1e-2}, stages="self")
    line = "self_lr: rank 0 has 0.001, rank 1 0.01; give the same command on all machines\n"
    assert [(code, err) for code, _, err in found] == [(2, line)] * 2


def test_ranks_on_mixed_devices_are_refused(tmp_path: Path, images: Path) -> None:
    found = command(_with_another_device, [(tmp_path, images)] * 2)
    line = "device: rank 0 has cpu, rank 1 meta; give --device cpu, or start ranks only where"
    assert all(code == 2 and err.startswith(line) for code, _, err in found), found


def _with_another_device(folder: Path, images: Path) -> int:
    import config_run

    if os.environ["RANK"] == "1":
        config_run.choose_device = lambda name: torch.device("meta")
        config_run.choose_precision = lambda amp, device: None
    return train_in(folder, images, {"stages": "self"})


def test_a_run_folder_in_use_ends_all_ranks(tmp_path: Path, images: Path) -> None:
    from holder import HOLD

    folder = tmp_path / "tiny_simclr/1_0"
    words = [sys.executable, "-c", HOLD, str(folder), str(ROOT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        found = both(tmp_path, images, stages="self")
        holder.kill()
    assert [code for code, *_ in found] == [2, 2]
    assert all("another process is training there" in err for *_, err in found)


def test_numbers_that_are_not_finite_end_all_ranks(tmp_path: Path, images: Path) -> None:
    found = both(tmp_path, images, stages="self", self_lr=1e25)
    for code, _, err in found:
        assert code == 1 and "the numbers are not finite in epoch 0, step" in err
        names = err.partition("(15_0.png, ")[2].partition(")")[0]  # of both ranks
        assert len(names.split(", ")) == 3 and "what was saved before is kept" in err


def _failing(what: str) -> int:
    from utils.commandline import exit_code

    def work() -> None:
        with group.joined():
            if group.rank() == 1:
                time.sleep(0.3)
                if what == "killed":
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(30)
                raise UserError(f"{what} on rank 1")
            if what == "alone":
                with group.alone():
                    time.sleep(60)
            group.gather_objects(1)

    return exit_code(work)


def test_a_rank_that_is_ended_tells_the_others() -> None:
    first, second = command(_failing, [("killed",)] * 2)
    assert (first[0], second) == (143, (143, "", ""))
    assert re.fullmatch(rf"rank 1 of 2 \(.*\): Terminated\. {AGAIN}\.\n", first[2])


@pytest.mark.parametrize("what", ["waiting", "alone"])
def test_a_rank_that_fails_ends_the_others_wherever_they_are(what: str) -> None:
    started = time.monotonic()
    first, second = command(_failing, [(what,)] * 2)
    assert second == (2, "", f"{what} on rank 1\n")
    assert first[0] == 2 and first[2].endswith(f": {what} on rank 1\n")
    assert time.monotonic() - started < 30


def _told_to_stop(number: int, where: str) -> int:
    """Get a signal while the ranks are in collectives that never end, or at Python's own work."""
    import torch.distributed as dist

    from utils.commandline import exit_code

    stopping.GRACE = 0.5

    def work() -> None:
        with group.joined():
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
            if where == "waiting" or group.rank() == 1:
                dist.recv(torch.zeros(1), 1 - group.rank())
            time.sleep(60)

    return exit_code(work)


@pytest.mark.parametrize("where", ["waiting", "working"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ranks_that_are_told_to_stop_end_soon_with_one_line(
    number: int, code: int, where: str
) -> None:
    started = time.monotonic()
    first, second = command(_told_to_stop, [(number, where)] * 2)
    word = {130: "Interrupted", 143: "Terminated"}[code]
    assert (first[0], first[2]) == (code, f"{word}. {AGAIN}.\n")
    assert second == (code, "", "")
    assert time.monotonic() - started < 20


# --- prediction and the table ---------------------------------------------------------------------


@functools.cache
def _model(folder: Path, images: Path) -> Path:
    (done,) = command(train_in, [(folder, images, {"stages": "sup", "repeats": "0"})])
    assert done[0] == 0
    return folder / "tiny_sup/1_0/sup.pt"


def _predict(words: list[str]) -> int:
    return predict.main([*words, "--device", "cpu", "--threads", "1"])


@pytest.mark.parametrize("task", ["--images", "--rank"])
def test_ranks_predict_what_one_process_does(
    task: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, images: Path
) -> None:
    weights = _model(tmp_path_factory.getbasetemp() / "model", images)
    pictures = tmp_path / "pictures"
    shutil.copytree(images / "train_numf/img", pictures)
    (pictures / "15_1_broken.png").write_bytes(b"no image")
    found = {}
    for name, ranks in (("one", 1), ("two", 2)):
        words = ["--weights", str(weights), task, str(pictures), "--out", str(tmp_path / name)]
        words += ["--masks", str(images / "train_numf/gt")]
        words += ["--particles", "--probabilities"] if task == "--images" else []
        found[name] = command(_predict, [(words,)] * ranks)
        assert {code for code, *_ in found[name]} == {1}, found[name]
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and [n for n in one if one[n] != two[n]] == []
    said = [found["one"][0][1].replace("/one", "/two"), found["two"][0][1]]
    assert said[0] == said[1] and "15_1_broken.png" in found["two"][0][2]


TABLE = (
    "--channels 4,8,16,32 --hidden_dim 8 --embed_dim 8 --top_k 2 --queue_size 8 --num_classes 3 "
    "--self_batch_size 2 --self_max_epoch 1 --fine_max_epoch 1 --device cpu --amp off --threads 1 "
    "--methods sup plain-simclr --repeats 01 --name t"
)


def _table(folder: Path, images: Path, more: str) -> int:
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    words = [*TABLE.split(), "--data_dir", str(images), "--out", "out", *more.split()]
    return reproduce.main(words)


def results_of(folder: Path) -> dict[str, bytes]:
    """What the table and its runs say, without how they came about."""
    left_out = ("run.json", "run.md", "t_seconds.json")
    return {n: v for n, v in files(folder).items() if n.rpartition("/")[2] not in left_out}


@pytest.mark.timeout(900)
@pytest.mark.slow  # seconds: 30, of several tables
def test_a_table_is_the_same_by_ranks_and_on_devices(tmp_path: Path, images: Path) -> None:
    (one,) = command(_table, [(tmp_path / "one", images, "")])
    assert one[0] == 0, one[2]
    ranks = command(_table, [(tmp_path / "ranks", images, "")] * 2)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    (side,) = command(_table, [(tmp_path / "side", images, "--devices cpu,cpu")])
    assert side[0] == 0, side[2]
    expected = results_of(tmp_path / "one")
    assert any(name.endswith("table.md") for name in expected)
    for name in ("ranks", "side"):
        found = results_of(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [n for n in expected if found[n] != expected[n]] == []


@pytest.mark.parametrize("words", ["--devices cpu,cpu", "--commands", "--piece any"])
def test_devices_and_schedulers_are_no_business_of_ranks(
    tmp_path: Path, images: Path, words: str
) -> None:
    found = command(_table, [(tmp_path / "ranks", images, words)] * 2)
    line = f"{words.split()[0]}: torchrun shares the runs already; leave it out\n"
    assert [code for code, *_ in found] == [2, 2]
    assert all(err.endswith(line) and err.count("\n") == 1 for *_, err in found), found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_shares_repeats(tmp_path: Path, images: Path) -> None:
    """Two ranks, one repeat each: byte by byte what one process does."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = SETTINGS | {"stages": "sup", "repeats": "01"}
    own = tiny_set.command(images, **settings)[1:]
    for name, start in (("two", words), ("one", [sys.executable])):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            start + own, cwd=tmp_path / name, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and [n for n in one if one[n] != two[n]] == []


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path: Path, images: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += tiny_set.command(images, stages="self", **SETTINGS)[1:]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert np.isfinite([entry["loss"] for entry in metrics(tmp_path)]).all()
    assert "amp off, 2 ranks" in done.stdout


@pytest.mark.slow  # seconds: 40, two starts of three processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_that_is_stopped_ends_its_ranks_and_goes_on(
    number: int, tmp_path: Path, images: Path
) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = SETTINGS | {"stages": "self", "self_max_epoch": 60, "save_every": 60}
    words += tiny_set.command(images, **settings)[1:]
    pipe, own = subprocess.PIPE, environment()
    with subprocess.Popen(words, cwd=tmp_path, env=own, stderr=pipe, text=True) as running:
        while not any("[1/60]" in p.read_text() for p in tmp_path.rglob("log_self.txt")):
            time.sleep(0.05)
            assert running.poll() is None
        running.send_signal(number)
        said = running.communicate(timeout=250)[1]
    assert said.count(f"ed. {AGAIN}.\n") == 1, said
    assert "forcefully" not in said  # torchrun's word, after 30 s
    again = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert again.returncode == 0 and "Going on after epoch" in again.stdout, again.stderr
    assert [entry["epoch"] for entry in metrics(tmp_path)] == list(range(60))


@pytest.mark.slow  # seconds: 50, two starts of three processes and one more of ranks
@pytest.mark.timeout(600)
def test_torchrun_restarts_ranks_one_of_which_was_killed(tmp_path: Path, images: Path) -> None:
    """With ``--max_restarts``, from the last state, with the bytes of a run that nobody killed."""
    settings = SETTINGS | {"stages": "self", "self_max_epoch": 60, "save_every": 60}
    settings |= {"save_seconds": 0}
    own = tiny_set.command(images, **settings)[1:]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    left, pipe = tmp_path / "left", subprocess.PIPE
    killed = tmp_path / "killed"
    for folder in (left, killed):
        folder.mkdir()
    done = subprocess.run(
        start + own, cwd=left, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    words = [*start, "--max_restarts", "1", *own]
    with subprocess.Popen(
        words, cwd=killed, env=environment(), stdout=pipe, stderr=pipe, text=True
    ) as running:
        while not any("[5/60]" in p.read_text() for p in killed.rglob("log_self.txt")):
            time.sleep(0.05)
            assert running.poll() is None
        ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        told, said = running.communicate(timeout=250)
    assert running.returncode == 0, said
    assert "Going on after epoch" in told
    assert [entry["epoch"] for entry in metrics(killed)] == list(range(60))
    one, two = (next(folder.rglob("moco60.pt")).read_bytes() for folder in (left, killed))
    assert one == two
