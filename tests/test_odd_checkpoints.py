"""Checkpoints that are damaged or odd, in every command that reads them: one line, or the cure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_set import make_set, train

import predict
from stages.pretraining import SelfSupervised
from tests.trained_model import write_images, write_weights
from utils.checkpoint import load, save

Change = Callable[[dict[str, Any]], object]
WEIGHT = "decode.outc.fc1.weight"


def nan(state: dict[str, Any]) -> None:
    state[WEIGHT] = state[WEIGHT] * float("nan")


def expand(state: dict[str, Any]) -> None:
    state["encode.inc.con1.weight"] = torch.zeros(1).expand(10**8, 3, 3, 3)


def quantise(state: dict[str, Any]) -> None:
    state[WEIGHT] = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.quint8)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: value})


ODD_NETWORKS: dict[str, Change] = {
    "nan": nan,
    "repeated": expand,
    "complex": put(WEIGHT, torch.zeros(3, 4, dtype=torch.complex64)),
    "whole": put(WEIGHT, torch.ones(3, 4, dtype=torch.int64)),
    "sparse": put(WEIGHT, torch.ones(3, 4).to_sparse()),
    "quantised": quantise,
    "meta": put(WEIGHT, torch.ones(3, 4, device="meta")),
    "no shape": put(WEIGHT, torch.tensor(1.0)),
    "wrong shape": put(WEIGHT, torch.ones(3, 4, 1, 1)),
    "one class": put(WEIGHT, torch.ones(1, 4)),
    "many classes": put(WEIGHT, torch.ones(10**6, 4)),
    "many channels": put("encode.inc.con1.weight", torch.ones(10**5, 1, 1, 1)),
    "a channel without shape": put("encode.inc.con1.weight", torch.tensor(1.0)),
    "text": put(WEIGHT, "text"),
}
ODD_SETTINGS: dict[str, Any] = {
    "settings as text": "text",
    "size as text": {"image_size": "many"},
    "size nan": {"image_size": float("nan")},
    "size huge": {"image_size": 10**12},
    "size tensor": {"image_size": torch.ones(3)},
    "size below 0": {"image_size": -5},
    "standardize tensor": {"standardize": torch.ones(2)},
    "standardize as text": {"standardize": "no"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), "a.png", "b.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


def odd_weights(path: Path, change: Change) -> Path:
    contents = load(write_weights(path))
    change(contents)
    torch.save(contents, path)
    return path


def refused(error: str, path: Path) -> str:
    """The lines of an error, each of which must name the file and a cure."""
    assert error
    for line in error.splitlines():
        assert line.startswith(f"{path}: ") and ";" in line and line.isprintable(), line
    return error


ODD_MODELS = [(kind, "images") for kind in (*ODD_NETWORKS, *ODD_SETTINGS)]
ODD_MODELS += [(kind, task) for kind in ("nan", "size huge") for task in ("rank", "export")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantised tensors are on their way out
@pytest.mark.parametrize(("kind", "task"), ODD_MODELS)
def test_an_odd_model_is_refused(
    tmp_path: Path, images: Path, kind: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fine.pt"
    if kind in ODD_NETWORKS:
        odd_weights(path, lambda contents: ODD_NETWORKS[kind](contents["finetune"]))
    else:
        odd_weights(path, put("settings", ODD_SETTINGS[kind]))
    target = str(tmp_path / "model.pt2") if task == "export" else str(images)
    assert predict.main(["--weights", str(path), f"--{task}", target, "--device", "cpu"]) == 2
    refused(capsys.readouterr().err, path)
    assert [p.name for p in tmp_path.iterdir()] == ["fine.pt"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_other_precision_predicts(
    tmp_path: Path, images: Path, dtype: torch.dtype
) -> None:
    def convert(contents: dict[str, Any]) -> None:
        state = contents["finetune"]
        state |= {k: v.to(dtype) for k, v in state.items() if v.is_floating_point()}

    path = odd_weights(tmp_path / "fine.pt", convert)
    assert predict.main(["--weights", str(path), "--images", str(images), "--device", "cpu"]) == 0
    assert len(list(tmp_path.rglob("classes/*.png"))) == 2


@pytest.mark.parametrize("kind", ["nan", "repeated", "whole", "sparse", "meta", "text"])
def test_fine_tuning_starts_from_no_odd_file(
    tmp_path: Path, data: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(contents: dict[str, Any]) -> None:
        state = contents["finetune"]
        weight, state[WEIGHT] = state[WEIGHT], state["encode.inc.con2.weight"]
        ODD_NETWORKS[kind](state)
        state["encode.inc.con2.weight"], state[WEIGHT] = state[WEIGHT], weight

    path = odd_weights(tmp_path / "moco.pt", change)
    assert train(data, tmp_path / "out", stages="fine", pretrained=str(path)) == 2
    line = refused(capsys.readouterr().err, path)
    assert "con1" in line if kind == "repeated" else "con2" in line
    assert not (tmp_path / "out").exists()


ODD_STATES: dict[str, Change] = {
    "settings": put("settings", "text"),
    "settings tensor": put("settings", {"seed": torch.ones(2)}),
    "outputs": put("outputs", [3]),
    "outputs text": put("outputs", "fine.pt"),
    "evaluations": put("evaluations", [{"epoch": 1}]),
    "evaluation text": put("evaluations", [dict.fromkeys(("epoch", "acc", "dice", "miou"), "a")]),
    "finished": put("finished", "no"),
    "config": put("config", [1]),
    "no config": lambda s: s.pop("config"),
    "no about": lambda s: s.pop("about"),
    "epoch": put("epoch", float("nan")),
    "epoch huge": put("epoch", 10**30),
    "epoch below 0": put("epoch", -3),
    "log": put("log", {"text": "many"}),
    "about": put("about", 3),
    "module text": put("module", "text"),
    "module empty": put("module", {}),
    "module nan": lambda s: s["module"].update(
        {k: v * float("nan") for k, v in s["module"].items() if v.is_floating_point()}
    ),
    "module sparse": lambda s: s["module"].update(
        {k: v.to_sparse() for k, v in s["module"].items() if "weight" in k}
    ),
    "optimizer text": put("optimizer", "text"),
    "optimizer rate": lambda s: s["optimizer"]["param_groups"][0].update(lr="high"),
    "optimizer betas": lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.5, 0.5)),
    "optimizer nan": lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(float("nan")),
    "optimizer shape": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    "optimizer number": lambda s: s["optimizer"]["state"].update({10**6: {}}),
}


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pretraining that was stopped after its first epoch."""
    out = tmp_path_factory.mktemp("stopped")
    original = SelfSupervised.train_epoch

    def stop(self: Any, epoch: int, step_done: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(self, epoch, step_done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfSupervised, "train_epoch", stop)
        assert train(data, out, stages="self") == 130
    return out


@pytest.mark.parametrize("kind", ODD_STATES)
def test_an_odd_state_is_one_line_and_overwrite_the_cure(
    data: Path, stopped: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    path = out / "tiny_simclr" / "1_0" / "state_self.pt"
    for previous in path.parent.glob("*.previous.pt"):
        previous.unlink()
    state = load(path)
    ODD_STATES[kind](state)
    torch.save(state, path)
    capsys.readouterr()
    assert train(data, out, stages="self") == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"{path}: "), line
    assert "overwrite" in line or "train it again" in line
    assert train(data, out, stages="self", overwrite=True, self_max_epoch=1) == 0


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 and no more", b"text", None])
def test_overwrite_cures_any_broken_state(
    data: Path, tmp_path: Path, contents: bytes | None
) -> None:
    run = tmp_path / "tiny_simclr" / "1_0"
    run.mkdir(parents=True)
    for name in ("state_self.pt", "state_self.previous.pt", "state_fine.pt"):
        if contents is None:
            save(run / name, {"settings": 1, "finished": True, "outputs": [0], "evaluations": [0]})
        else:
            (run / name).write_bytes(contents)
    assert train(data, tmp_path, stages="self-fine", self_max_epoch=1) == 2
    assert train(data, tmp_path, stages="self-fine", self_max_epoch=1, overwrite=True) == 0
    assert all(load(run / f"state_{stage}.pt")["finished"] for stage in ("self", "fine"))
