"""Without a test set, or with learnt test images, a run says everywhere that there is no score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config_run
from tests.tiny_set import TINY, add, make_set
from utils.checkpoint import load


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_set(tmp_path / "steel")


def train(data: Path, stages: str = "sup") -> Path:
    """Run stages; returns the experiment's folder."""
    settings = {**TINY, "data_dir": str(data), "stages": stages, "output_dir": str(data.parent)}
    words = [w for name, value in settings.items() for w in (f"--{name}", _word(value))]
    assert config_run.main([*words, "--report"]) == 0
    return data.parent / ("tiny_sup" if stages == "sup" else "tiny_simclr")


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("left", ["nothing", "images alone", "an empty gt"])
def test_without_test_masks_there_is_no_score_and_the_last_network_is_kept(
    data: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(data / "test_numf" / "gt")
    if left == "nothing":
        shutil.rmtree(data / "test_numf")
    if left == "an empty gt":
        (data / "test_numf" / "gt").mkdir()
    folder = train(data)
    said = capsys.readouterr().out
    assert "No score:" in said and "1_0: no score" in said
    log = (folder / "1_0" / "log_sup.txt").read_text(encoding="utf-8")
    assert "No score:" in log and "ACC" not in log and "Scored on" not in log
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "tiny_sup, stage sup: no score"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "No score: the set has no test images" in page and "Dice <strong>" not in page
    kept, last = (load(folder / "1_0" / f"sup{end}.pt") for end in ("", "_last"))
    assert kept["epoch"] == TINY["fine_max_epoch"] - 1 == last["epoch"]
    assert all((kept["super"][k] == last["super"][k]).all() for k in last["super"])
    assert "acc" not in kept


def crop_of_the_annotated(data: Path) -> None:
    """Make the test set of crops of the annotated image, under other names."""
    shutil.rmtree(data / "test_numf")
    for kind in ("img", "gt"):
        pixels = np.array(Image.open(data / "sup_num1_0" / kind / "15_0.png"))
        (data / "test_numf" / kind).mkdir(parents=True)
        Image.fromarray(pixels).save(data / "test_numf" / kind / "99_whole.png")
        Image.fromarray(pixels[3:29, 5:35]).save(data / "test_numf" / kind / "99_part.png")


def test_a_fit_is_called_one_everywhere(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crop_of_the_annotated(data)
    folder = train(data)
    said = capsys.readouterr().out
    assert "1_0: a fit, no score" in said
    log = (folder / "1_0" / "log_sup.txt").read_text(encoding="utf-8")
    assert "No score but a fit" in log and "99_part.png in 15_0.png" in log
    assert "Scored on" not in log and "test set" not in log.partition("Epoch:")[0]
    assert any(line.startswith("ACC: ") for line in log.splitlines())
    assert any(line.startswith("Dice: ") for line in log.splitlines())
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    assert "no score" in text.splitlines()[0] and "on test" not in text
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "No score but a <strong>fit</strong>" in page and "after the last epoch.</p>" not in page
    lines = (folder / "1_0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [e["evaluation"] for e in map(json.loads, lines) if "evaluation" in e]
    assert found and all(entry["fit"] for entry in found)


def test_learnt_images_are_left_out_of_a_score_of_others(data: Path) -> None:
    alone = train(data)
    score = json.dumps(load(alone / "1_0" / "state_sup.pt")["evaluations"])
    other = make_set(data.parent / "more" / "steel")
    for kind in ("img", "gt"):
        source = other / "sup_num1_0" / kind / "15_0.png"
        shutil.copy(source, other / "test_numf" / kind / "15_s9.png")
    folder = train(other)
    assert json.dumps(load(folder / "1_0" / "state_sup.pt")["evaluations"]) == score
    log = (folder / "1_0" / "log_sup.txt").read_text(encoding="utf-8")
    assert "1 test image(s) left out of the score" in log and "15_s9.png in 15_0.png" in log


def test_images_seen_without_labels_are_scored_with_a_line(data: Path) -> None:
    add(data / "train_numf", "30_9", 100, 3, (32, 40))  # the picture of test image 15_t0
    folder = train(data, "self-fine")
    log = (folder / "1_0" / "log_fine.txt").read_text(encoding="utf-8")
    assert "Scored on 2 images" in log
    assert "1 of the test images are among the images of pretraining" in log and "15_t0.png" in log


def test_neighbouring_tiles_are_scored_as_ever(data: Path) -> None:
    # The annotated image and the test images are overlapping windows of one picture.
    rng = np.random.default_rng(0)
    wide = {"img": rng.integers(0, 256, (32, 80)), "gt": rng.integers(0, 3, (32, 80))}
    shutil.rmtree(data / "test_numf")
    for kind, pixels in wide.items():
        (data / "test_numf" / kind).mkdir(parents=True)
        for name, left in (("a_1", 20), ("a_2", 40)):
            picture = Image.fromarray(pixels[:, left : left + 40].astype(np.uint8))
            picture.save(data / "test_numf" / kind / f"{name}.png")
        Image.fromarray(pixels[:, :40].astype(np.uint8)).save(
            data / "sup_num1_0" / kind / "15_0.png"
        )
    log = (train(data) / "1_0" / "log_sup.txt").read_text(encoding="utf-8")
    assert "Scored on 2 images" in log and "fit" not in log.partition("Epoch:")[0].split("\n")[1]
