"""What went wrong in the published program, one test for each fault: it is gone."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_set import ROOT, files, make_set, train

import predict
from stages.pretraining import SelfSupervised
from utils.checkpoint import load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


def sources() -> dict[str, ast.Module]:
    """The program's own files outside tests."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "utils").glob("*.py")]
    return {p.name: ast.parse(p.read_text(encoding="utf-8")) for p in sorted(paths)}


def functions_that_call(name: str) -> list[str]:
    """'file:function' of each function with a call of ``something.name`` or ``name`` in it."""
    found = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
                names = [getattr(f, "attr", getattr(f, "id", "")) for f in called]
                found += [f"{file}:{node.name}"] * (name in names)
    return found


def test_the_two_methods_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, self_mode="simclr", stages="self") == 0
    first = files(tmp_path)
    assert train(data, tmp_path, self_mode="moco", stages="self") == 0
    both = files(tmp_path)
    assert {name: both[name] for name in first} == first
    assert {name.split("/")[0] for name in set(both) - set(first)} == {"tiny_moco"}


def test_five_annotated_images_are_all_trained_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.finetuning import Supervised

    seen: list[list[str]] = []
    original = Supervised.losses

    def losses(self: Any, batch: Any) -> Any:
        seen.append(batch["name"])
        return original(self, batch)

    monkeypatch.setattr(Supervised, "losses", losses)
    assert train(data, tmp_path, stages="sup", data_size="5") == 0
    names = sorted(path.name for path in (data / "sup_num5_0" / "img").iterdir())
    assert len(names) == 5 and [sorted(batch) for batch in seen] == [names, names]


def test_it_runs_where_there_is_no_cuda(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "cuda", absent)
    monkeypatch.setattr(torch.nn.Module, "cuda", absent)
    assert train(data, tmp_path, device="auto", stages="self") == 0
    assert "device cpu" in (tmp_path / "tiny_simclr/1_0/log_self.txt").read_text()
    assert functions_that_call("cuda") == []


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "nan", "half"])
def test_a_wrong_ratio_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: str
) -> None:
    assert train(data, tmp_path, f"--global_local_ratio={ratio}") == 2
    assert "global_local_ratio" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_run_that_was_stopped_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    original = SelfSupervised.train_epoch
    trained: list[int] = []

    def train_epoch(self: Any, epoch: int, step_done: Any) -> None:
        if epoch == 2 and trained == [0, 1]:
            raise KeyboardInterrupt
        trained.append(epoch)
        original(self, epoch, step_done)

    monkeypatch.setattr(SelfSupervised, "train_epoch", train_epoch)
    settings = {"stages": "self", "self_max_epoch": 4}
    assert train(data, tmp_path, **settings) == 130
    assert "same command" in capsys.readouterr().err
    trained.append(-1)
    assert train(data, tmp_path, **settings) == 0
    assert trained == [0, 1, -1, 2, 3]


def test_standard_output_stays_what_it_is(data: Path, tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    assert train(data, tmp_path, stages="self") == 0
    assert (sys.stdout, sys.stderr) == before
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                written = [ast.unparse(target) for target in targets]
                assert not {"sys.stdout", "sys.stderr"} & set(written), file


def test_there_is_one_training_loop_and_one_sampler() -> None:
    trained = [name for name in functions_that_call("backward") if "_norm" not in name]
    assert trained == ["training.py:passes"]  # the kernels have backward passes of their own
    assert functions_that_call("sample_patches") == ["model.py:sample"]


@pytest.mark.parametrize("mode", ["simclr", "moco"])
def test_names_without_two_fields_work(tmp_path: Path, mode: str) -> None:
    own = make_set(tmp_path / "set", train=3)
    for path in [*own.rglob("15_*.png"), *own.rglob("30_*.png")]:
        path.rename(path.with_name(path.name.replace("_", "").replace("0", "o")))
    assert train(own, tmp_path, self_mode=mode) == 0


def test_more_than_six_production_batches_work(tmp_path: Path) -> None:
    batches = tuple(str(minutes) for minutes in (15, 30, 45, 60, 90, 120, 180, 240))
    own = make_set(tmp_path / "set", train=8, batches=batches)
    assert train(own, tmp_path, self_mode="moco", stages="self", queue_size=24) == 0
    state = load(tmp_path / "tiny_moco/1_0/moco2.pt")["moco"]
    assert set(state["queue_group"].tolist()) == set(range(8))


def test_a_mask_value_that_is_no_class_is_reported_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "set"
    shutil.copytree(data, own)
    path = own / "test_numf" / "gt" / "30_t1.png"
    mask = np.array(Image.open(path))
    mask[3, 5] = 3
    Image.fromarray(mask).save(path)
    assert train(own, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(path) in error and "value 3" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "size"), [("simclr", (24, 53)), ("moco", (47, 30))])
def test_images_that_are_not_square_train(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    own = make_set(tmp_path / "set", size=size, train=2)
    assert train(own, tmp_path, self_mode=mode, self_max_epoch=3) == 0
    picture = Image.open(tmp_path / f"tiny_{mode}/1_0/epoch_1/15_t0.png")
    assert picture.size == size[::-1]


def test_the_last_epoch_is_saved_and_scored(data: Path, tmp_path: Path) -> None:
    settings = {"self_max_epoch": 3, "save_every": 2, "fine_max_epoch": 3, "eval_every": 2}
    assert train(data, tmp_path, **settings) == 0
    run = tmp_path / "tiny_simclr" / "1_0"
    assert sorted(p.name for p in run.glob("moco*.pt")) == ["moco0.pt", "moco2.pt", "moco3.pt"]
    assert load(run / "moco3.pt")["epoch"] == 3 and load(run / "fine_last.pt")["epoch"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["evaluation"]["epoch"] for e in lines if "evaluation" in e] == [1, 2]
    assert sorted(p.name for p in run.glob("epoch_*")) == ["epoch_1", "epoch_2"]
    assert (run / "epoch_2" / "30_t1.png").exists()


@pytest.mark.parametrize("name", ["epoch_0", "log_sup.txt", "metrics.jsonl", "tensorboard"])
def test_nothing_outside_is_touched_through_a_link(data: Path, tmp_path: Path, name: str) -> None:
    """A run with --overwrite, where an output is a link to somebody's file or folder."""
    settings = {"stages": "sup", "fine_max_epoch": 1}
    assert train(data, tmp_path, **settings) == 0
    run, outside = tmp_path / "tiny_sup" / "1_0", tmp_path / "outside"
    outside.mkdir()
    for mine in (*(path.name for path in (run / "epoch_0").iterdir()), "log"):
        (outside / mine).write_text("mine")
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    target = outside / "log" if "." in name else outside
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target, target_is_directory=target.is_dir())
    before = files(outside)
    wanted = 0 if "." in name else 2  # a link to a file is replaced
    tensorboard = {"tensorboard": True} if name == "tensorboard" else {}
    if tensorboard:
        pytest.importorskip("tensorboard")
    assert train(data, tmp_path, "--overwrite", **settings, **tensorboard) == wanted
    assert files(outside) == before


@pytest.mark.parametrize("what", ["--pretrained", "--weights"])
def test_weights_that_are_a_pipe_are_refused(data: Path, tmp_path: Path, capsys, what: str) -> None:
    os.mkfifo(tmp_path / "w.pt")
    if what == "--pretrained":
        words = f"-stages fine --pretrained {tmp_path / 'w.pt'}"
        assert train(data, tmp_path, words) == 2
    else:
        images = data / "test_numf" / "img"
        assert predict.main([what, str(tmp_path / "w.pt"), "--images", str(images)]) == 2
        assert predict.main([what, "x.pt", "--images", str(tmp_path / "w.pt")]) == 2
    assert "w.pt: a pipe, not a file; give the path" in capsys.readouterr().err
