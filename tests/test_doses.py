"""Dice by length of pretraining: which runs are made, and what stands in the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import doses
from tests.tiny_set import TINY, make_set, train
from utils.checkpoint import load


def flags(data: Path, out: Path) -> list[str]:
    """The tiny settings as words of a command line."""
    values = {**TINY, "data_dir": data, "output_dir": out, "num_classes": 3, "repeats": "01"}
    lists = {
        k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in values.items()
    }
    return [f"--{name}={text}" for name, text in lists.items()]


@pytest.mark.slow
def test_each_dose_starts_from_its_checkpoint_and_none_stands_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, runs, out = make_set(tmp_path / "set"), tmp_path / "runs", tmp_path / "out"
    shared = {"stages": "self", "self_mode": "plain-simclr"}
    assert train(data, runs, **shared) == 0
    assert train(data, runs, stages="self", repeats="01") == 0
    folders = [f"SimCLR={runs}/tiny_plain-simclr/1_0", f"PSCL={runs}/tiny_simclr/1_{{repeat}}"]
    words = ["--pretrained", *folders, "--epochs", "2,0,1", "--steps_an_epoch", "25", "--out"]
    assert doses.main([*words, str(out), *flags(data, runs)]) == 0
    lines = (out / "table.md").read_text().splitlines()
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x.startswith("| ")][1:]
    rows = [row for row in rows if set(row[0]) != {"-"}]
    names = [(row[0], row[1]) for row in rows]
    expected = {("no pretraining", "0")} | {
        (m, s) for m in ("SimCLR", "PSCL") for s in ("25", "50")
    }
    assert set(names) == expected and len(names) == len(expected)
    for row in rows:
        one, two, mean = map(float, row[2:])
        assert mean == pytest.approx((one + two) / 2, abs=0.0011)
    state = load(runs / "tiny-doses-PSCL-1_simclr" / "1_1" / "state_fine.pt")
    last = state["evaluations"][-1]["dice"]
    assert next(row[3] for row in rows if row[:2] == ["PSCL", "25"]) == f"{last:.3f}"
    head = (runs / "tiny-doses-PSCL-1_simclr" / "1_1" / "log_fine.txt").read_text()
    assert f"Fine-tuning from {runs}/tiny_simclr/1_1/moco1.pt" in head
    assert (out / "doses.png").read_bytes().startswith(b"\x89PNG")
    before = (out / "table.md").read_bytes()
    assert doses.main([*words, str(out), *flags(data, runs)]) == 0  # nothing is trained again
    assert (out / "table.md").read_bytes() == before
    capsys.readouterr()


def test_a_dose_that_was_not_saved_is_named_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, runs = make_set(tmp_path / "set"), tmp_path / "runs"
    assert train(data, runs, stages="self") == 0
    before = sorted(runs.rglob("*"))
    words = ["--pretrained", f"PSCL={runs}/tiny_simclr/1_0", "--epochs=0,7", "--out"]
    capsys.readouterr()
    assert doses.main([*words, str(tmp_path / "out"), *flags(data, runs)]) == 2
    error = capsys.readouterr().err
    assert "moco7.pt: no such file (there: moco0.pt, moco1.pt, moco2.pt)" in error
    assert error.count("\n") == 1 and sorted(runs.rglob("*")) == before


def test_all_annotated_images_are_one_run_in_a_folder_of_its_own(tmp_path: Path) -> None:
    data, runs, out = make_set(tmp_path / "set"), tmp_path / "runs", tmp_path / "out"
    for path in (data / "sup_num5_0").rglob("*.png"):  # masks of all training images
        kind = data / "train_numf" / path.parent.name
        kind.mkdir(exist_ok=True)
        (kind / path.name).write_bytes(path.read_bytes())
    words = ["--pretrained", f"A={runs}/a", "--epochs", "0", "--out", str(out), "--data_size", "f"]
    assert doses.main([*words, *(f for f in flags(data, runs) if "repeats" not in f)]) == 0
    state = load(runs / "tiny-doses_sup" / "f" / "state_sup.pt")
    last = f"{state['evaluations'][-1]['dice']:.3f}"
    assert f"| no pretraining | 0 | {last} | {last} |" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["A=x", "A=y"], "found A, A; give names that differ"),
        (["A+B=x", "A B=y"], "found A+B, A B; give names that differ"),
        (["No pretraining=x"], "found no pretraining, No pretraining; give names"),
    ],
)
def test_methods_that_would_be_taken_for_one_are_refused(
    names: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "set")
    words = ["--pretrained", *names, "--epochs=0", "--out", str(tmp_path / "out")]
    assert doses.main([*words, *flags(data, tmp_path / "runs")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_set_without_a_test_mask_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "set")
    for path in (data / "test_numf" / "gt").iterdir():
        path.unlink()
    words = ["--pretrained=A=x", "--epochs=0", "--out", str(tmp_path / "out")]
    assert doses.main([*words, *flags(data, tmp_path / "runs")]) == 2
    assert "test_numf: no image with a mask" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [("--pretrained=x", "give NAME=FOLDER"), ("--epochs=a", "give numbers such as 0,40,200")],
)
def test_wrong_words_are_refused(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["--pretrained=a=b", "--epochs=1", "--out=x"]
    words = [w for w in good if w.split("=")[0] != word.split("=")[0]] + [word]
    with pytest.raises(SystemExit, match="2"):
        doses.main(words)
    assert told in capsys.readouterr().err
