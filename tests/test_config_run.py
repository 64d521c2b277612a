"""Whole runs on a set of a few small pictures: what they write, and what they refuse."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_set import ROOT, add, command, files, make_set, run_process, train
from unseen_figures import figures_unseen

from metallography.segmenter import Segmenter
from networks import UNet
from stages.finetuning import Finetune, Supervised
from stages.job import Job
from stages.pretraining import SelfSupervised
from tests.holder import HOLD
from tests.test_recompute import Convolutions
from utils.checkpoint import load, save


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run with all stages; copy it before changing it."""
    out = tmp_path_factory.mktemp("finished")
    with figures_unseen(False):
        assert train(data, out, stages="self-fine-sup", repeats="01", fine_max_epoch=3) == 0
    return out


def entries(run: Path, stage: str, kind: str = "epoch") -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl``: of epochs, or of evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == stage]
    if kind == "evaluation":
        return [line["evaluation"] for line in lines if "evaluation" in line]
    return [line for line in lines if "epoch" in line]


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str, lines: int = 1) -> str:
    """The program said in so many lines what is wrong, and ended with 2."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert len(error.splitlines()) == lines, error
    assert all(word in error for word in words), error
    return error


# ---------------------------------------------------------------- what a run writes


def test_all_files_of_a_run_are_there_and_no_other(finished: Path) -> None:
    pictures = [f"epoch_{e}/{name}" for e in range(3) for name in ("15_t0.png", "30_t1.png")]
    both = ["curves.png", "metrics.jsonl", *pictures]
    fine = ["fine.pt", "fine_last.pt", "log_fine.txt", "sheet_fine.png", "state_fine.pt"]
    fine += ["sheet_fine_extremes.png"]
    own = ["log_self.txt", "moco0.pt", "moco1.pt", "moco2.pt", "state_self.pt"]
    sup = ["log_sup.txt", "sheet_sup.png", "state_sup.pt", "sup.pt", "sup_last.pt"]
    sup += ["sheet_sup_extremes.png"]
    expected = ["tiny_simclr/eval.txt", "tiny_sup/eval.txt"]
    for run in ("1_0", "1_1"):
        expected += [f"tiny_simclr/{run}/{name}" for name in both + fine + own]
        expected += [f"tiny_sup/{run}/{name}" for name in both + sup]
    assert sorted(files(finished)) == sorted(expected)


def test_checkpoints_have_the_published_form(finished: Path) -> None:
    run = finished / "tiny_simclr" / "1_0"
    moco, fine = load(run / "moco2.pt"), load(run / "fine.pt")
    assert moco["epoch"] == 2 and "encoder_q.encode.inc.con1.weight" in moco["moco"]
    scores = entries(run, "fine", "evaluation")
    best = max(scores, key=lambda e: e["acc"])
    assert fine["epoch"] == best["epoch"] and fine["acc"] == best["acc"]
    assert list(fine["finetune"]) == list(UNet(3, (4, 8, 16, 32)).state_dict())
    assert "super" in load(finished / "tiny_sup" / "1_0" / "sup.pt")
    assert load(run / "fine_last.pt")["epoch"] == 2


def test_a_model_knows_how_its_classes_are_called_and_drawn(data: Path, tmp_path: Path) -> None:
    look = {"class_names": ("steel", "a b", "β"), "class_colours": ("102030", "ff8000", "0000ff")}
    assert train(data, tmp_path, stages="sup", mapping=(7, 90, 200), **look) == 0
    run = tmp_path / "tiny_sup" / "1_0"
    settings = load(run / "sup.pt")["settings"]
    assert settings["mapping"] == [7, 90, 200] and settings["class_names"] == ["steel", "a b", "β"]
    assert settings["class_colours"] == list(look["class_colours"])
    assert settings["num_classes"] == 3 and settings["image_size"] == 0
    for name in ("sheet_sup.png", "sheet_sup_extremes.png"):
        pixels = np.asarray(Image.open(run / name)).reshape(-1, 3)
        seen = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
        assert {(16, 32, 48), (255, 128, 0), (0, 0, 255)} <= seen  # truth holds all classes
        assert (230, 159, 0) not in seen  # the default of class 1


def test_curves_are_drawn_at_the_end_of_each_stage(finished: Path) -> None:
    # A row of panels of 360 pixels and margins of 24 for each stage.
    for run, rows in (("tiny_simclr/1_0", 2), ("tiny_sup/1_1", 1)):
        with Image.open(finished / run / "curves.png") as picture:
            assert picture.height == 24 + rows * (360 + 24)


def test_the_sheet_of_extremes_shows_both_images_of_a_set_of_two(finished: Path) -> None:
    run = finished / "tiny_simclr" / "1_0"
    with Image.open(run / "sheet_fine_extremes.png") as sheet:
        extremes = sheet.size
    with Image.open(run / "sheet_fine.png") as sheet:
        assert sheet.size == extremes  # the worst and the best


def test_a_report_can_be_asked_for_at_any_time(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    settings = {"stages": "self-fine-sup", "repeats": "01", "fine_max_epoch": 3}
    assert train(data, out, report=True, **settings) == 0
    printed = capsys.readouterr().out
    assert "Epoch:" not in printed  # nothing is trained again
    for folder in ("tiny_simclr", "tiny_sup"):
        assert f"Report: {out / folder / 'report.html'}" in printed
        page = (out / folder / "report.html").read_text(encoding="utf-8")
        assert "worst, median and best test image by Dice" in page and "Run 1_1" in page


def test_the_saved_network_makes_the_pictures_and_scores_of_the_log(
    finished: Path, data: Path
) -> None:
    run = finished / "tiny_sup" / "1_1"
    network = UNet(3, (4, 8, 16, 32))
    network.load_state_dict(load(run / "sup_last.pt")["super"])
    network.eval()
    mean, std = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
    correct, overlap, area = [], np.zeros(3), np.zeros(3)
    for name in ("15_t0", "30_t1"):
        image = np.asarray(Image.open(data / "test_numf" / "img" / f"{name}.png")) / 255
        truth = np.asarray(Image.open(data / "test_numf" / "gt" / f"{name}.png"))
        pixels = (image[..., None] - np.array(mean)) / np.array(std)
        with torch.inference_mode():
            logits = network(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
        guess = logits[0].argmax(0).numpy()
        written = np.asarray(Image.open(run / "epoch_2" / f"{name}.png"))
        assert written.shape == (32, 40)
        assert np.array_equal(written, np.array([0, 128, 255])[guess])
        correct.append((guess == truth).mean())
        for c in range(3):
            overlap[c] += ((guess == c) & (truth == c)).sum()
            area[c] += (guess == c).sum() + (truth == c).sum()
    dice = 2 * overlap / area
    last = entries(run, "sup", "evaluation")[-1]
    assert last["acc"] == pytest.approx(np.mean(correct))
    assert [last["dice1"], last["dice2"]] == pytest.approx(dice[1:].tolist())
    log = (run / "log_sup.txt").read_text().splitlines()
    tail = log[-7:]
    assert tail[:4] == [
        f"ACC: {np.mean(correct):.4f}",
        f"Dice: {dice[1:].mean():.4f}",
        f"Dice1: {dice[1]:.4f}",
        f"Dice2: {dice[2]:.4f}",
    ]
    assert tail[4].startswith("mIoU: ") and tail[5].startswith("IoU1: ")


def test_the_log_has_one_head_and_one_line_an_epoch(finished: Path) -> None:
    log = (finished / "tiny_simclr" / "1_0" / "log_self.txt").read_text().splitlines()
    assert log[0].startswith("Pretraining with PSCL-SimCLR for 2 epochs on 4 images 40x32")
    assert sum("seed=0" in line for line in log) == 1
    assert sum(line.startswith("program ") and "torch" in line for line in log) == 1
    epochs = [line for line in log if line.startswith("Epoch: ")]
    assert [line[:17] for line in epochs] == ["Epoch: [0/2][2/2]", "Epoch: [1/2][2/2]"]
    assert re.search(r"Loss \d\.\d{4} \(avg:\d\.\d{4}\)", epochs[0])


def test_the_head_counts_the_images_that_a_batch_has(data: Path, tmp_path: Path) -> None:
    """Four images do not fill a batch of 8; the annotated one comes on top of them."""
    assert train(data, tmp_path, "-stages self --self_mode moco", self_batch_size=8) == 0
    log = (tmp_path / "tiny_moco" / "1_0" / "log_self.txt").read_text()
    assert "1 steps of 4 images an epoch" in log
    assert "is full of real keys after 2 steps" in log  # 10 keys, 5 a step


def test_eval_txt_agrees_with_a_hand_computation(finished: Path) -> None:
    for folder, stage in (("tiny_simclr", "fine"), ("tiny_sup", "sup")):
        text = (finished / folder / "eval.txt").read_text(encoding="utf-8")
        rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
        best, last = [], []
        for run in ("1_0", "1_1"):
            scores = entries(finished / folder / run, stage, "evaluation")
            assert [e["epoch"] for e in scores] == [0, 1, 2]
            top = scores[0]
            for e in scores:
                top = e if e["acc"] > top["acc"] else top
            best.append(top)
            last.append(scores[-1])
            cells = [
                cell
                for e in (top, scores[-1])
                for cell in (str(e["epoch"]), *(f"{e[s]:.4f}" for s in ("acc", "dice", "miou")))
            ]
            assert rows[run] == [run, *cells]
        numbers = re.findall(r"(\d\.\d{4}) ± (\d\.\d{4})", text)
        expected = []
        for group in (best, last):
            for score in ("acc", "dice", "miou"):
                values = [e[score] for e in group]
                mean, std = statistics.mean(values), statistics.stdev(values)
                expected.append((f"{mean:.4f}", f"{std:.4f}"))
        assert numbers == expected


def test_the_state_holds_the_confusion_matrix_of_each_test_image(
    finished: Path, data: Path
) -> None:
    run = finished / "tiny_sup" / "1_1"
    state = load(run / "state_sup.pt")
    for entry in state["evaluations"]:
        for name, matrix in zip(("15_t0", "30_t1"), entry["confusion"], strict=True):
            truth = np.asarray(Image.open(data / "test_numf" / "gt" / f"{name}.png"))
            gray = np.asarray(Image.open(run / f"epoch_{entry['epoch']}" / f"{name}.png"))
            guess = np.select([gray == 128, gray == 255], [1, 2])
            expected = [
                [int(((truth == t) & (guess == p)).sum()) for p in range(3)] for t in range(3)
            ]
            assert matrix == expected
    plain = [{n: v for n, v in e.items() if n != "confusion"} for e in state["evaluations"]]
    assert plain == entries(run, "sup", "evaluation")  # the log of numbers stays as it is
    assert "confusion" not in load(run / "sup_last.pt")


def test_data_sizes_run_one_after_the_other(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, data_size="15f", self_max_epoch=1, fine_max_epoch=1) == 0
    assert sorted(os.listdir(tmp_path / "tiny_simclr")) == ["1_0", "5_0", "eval.txt", "f"]
    for run, count in (("1_0", "1 image"), ("5_0", "5 images"), ("f", "4 images")):
        log = (tmp_path / "tiny_simclr" / run / "log_self.txt").read_text()
        one = "The annotated image" if count == "1 image" else "One of the annotated images"
        assert f"{one} rides along in every batch: " in log
        log = (tmp_path / "tiny_simclr" / run / "log_fine.txt").read_text()
        assert f"epochs on {count} " in log and f"{run}/moco1.pt" in log
    text = (tmp_path / "tiny_simclr" / "eval.txt").read_text(encoding="utf-8")
    first_words = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert first_words[first_words.index("run") + 1 :] == ["1_0", "5_0", "f"]


# ---------------------------------------------------------------- the same again


def test_one_seed_gives_the_same_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert train(data, Path("."), self_mode="moco") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def results(run: Path, stage: str, checkpoint: str, wrapper: str) -> tuple[Any, dict[str, bytes]]:
    """Metrics and weights of a run."""
    state = load(run / checkpoint)[wrapper]
    weights = {key: value.numpy().tobytes() for key, value in state.items()}
    return entries(run, stage), weights


@pytest.mark.parametrize("mode", [pytest.param("simclr", marks=pytest.mark.slow), "moco"])
def test_worker_processes_change_nothing_and_the_seed_does(
    data: Path, tmp_path: Path, mode: str
) -> None:
    found = []
    for i, (workers, seed) in enumerate([(0, 1), (2, 1), (0, 2)]):
        settings = {"self_mode": mode, "stages": "self", "workers": workers, "seed": seed}
        assert train(data, tmp_path / str(i), **settings) == 0
        run = tmp_path / str(i) / f"tiny_{mode}" / "1_0"
        found.append(results(run, "self", "moco2.pt", "moco"))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]


def test_a_finished_run_is_not_trained_again(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = files(out)
    assert train(data, out, stages="self-fine-sup", repeats="01", fine_max_epoch=3) == 0
    assert files(out) == before
    shown = capsys.readouterr().out
    assert shown.count("is finished already") == 6 and "Epoch:" not in shown
    assert "1: mean ± std" in shown


def test_a_set_that_was_moved_is_the_same_and_one_that_changed_is_not(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(data, out, stages="sup") == 0
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert train(moved, out, stages="sup") == 0
    add(moved / "test_numf", "15_t0", 7, 3, (32, 40))
    capsys.readouterr()
    refused(capsys, train(moved, out, stages="sup"), "tiny_sup/1_0", "files was", "--overwrite")


# ---------------------------------------------------------------- what training does


def job(data: Path, **settings: Any) -> Job:
    """A job whose parts can be looked at."""
    caught: list[Job] = []

    def problems(self: Any) -> list[str]:
        caught.append(self.job)
        return ["stop"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfSupervised, "problems", problems)
        patch.setattr(Supervised, "problems", problems)
        patch.setattr(Finetune, "problems", problems)
        assert train(data, data.parent / "never", **settings) == 2
    return caught[0]


def test_fine_tuning_has_two_learning_rates(finished: Path, data: Path) -> None:
    settings = {"stages": "fine", "pretrained": str(finished / "tiny_simclr/1_0/moco2.pt")}
    runner = Finetune(job(data, fine_lr_encoder=0.25, fine_lr_decoder=0.5, **settings))
    runner.build()
    rates = {id(p): g["lr"] for g in runner.optimizer.param_groups for p in g["params"]}
    network = runner.module
    assert isinstance(network, UNet)
    encode = network.encode
    slow = [encode.inc, encode.down1, encode.down2, encode.down3]
    fast = [encode.up1, encode.up2, encode.up3, network.decode]
    for modules, rate in ((slow, 0.25), (fast, 0.5)):
        for module in modules:
            assert {rates.pop(id(p)) for p in module.parameters()} == {rate}
    assert not rates


@pytest.mark.parametrize(("recompute", "again"), [(0, 0), (-1, 0), (1, 4)])
def test_fine_tuning_computes_again_only_what_is_asked_for(
    recompute: int, again: int, data: Path
) -> None:
    """The two convolutions of the stem and the two of the last decoder block, at one level."""
    runner = Supervised(job(data, stages="sup", recompute=recompute))
    runner.build()
    assert isinstance(runner.module, UNet)
    loss = runner.module.train()(torch.randn(1, 3, 16, 16)).sum()
    with Convolutions() as counted:
        loss.backward()
    assert counted.plain == again


def test_supervised_training_has_one_learning_rate(data: Path) -> None:
    runner = Supervised(job(data, stages="sup", sup_lr=0.125))
    runner.build()
    assert [g["lr"] for g in runner.optimizer.param_groups] == [0.125]
    assert len(runner.optimizer.param_groups[0]["params"]) == len(list(runner.module.parameters()))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_pretraining_learns_what_can_learn(data: Path, optimizer: str) -> None:
    runner = SelfSupervised(job(data, self_mode="moco", self_optimizer=optimizer))
    runner.build()
    method: Any = runner.module
    learning = {id(p) for p in method.encoder_q.parameters()}
    assert {id(p) for g in runner.optimizer.param_groups for p in g["params"]} == learning
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    assert type(runner.optimizer) is kind
    assert runner.optimizer.defaults["weight_decay"] == (1e-3 if optimizer == "adamw" else 0)


def test_the_schedule_drops_twice(data: Path, tmp_path: Path) -> None:
    settings = {"stages": "self", "self_max_epoch": 4, "save_every": 4, "self_lr": 0.01}
    assert train(data, tmp_path, self_schedule=True, **settings) == 0
    rates = [e["lr"] for e in entries(tmp_path / "tiny_simclr/1_0", "self")]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])


def test_images_without_labels_join_when_wanted(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "set"
    shutil.copytree(data, own)
    for i in range(4):
        add(own / "train_unlabelled", f"45_u{i}", 50 + i, 3, (32, 40))
    shutil.rmtree(own / "train_unlabelled" / "gt")
    logs = []
    for wanted in (False, True):
        out = tmp_path / str(wanted)
        assert train(own, out, stages="self", use_unlabelled=wanted) == 0
        logs.append((out / "tiny_simclr/1_0/log_self.txt").read_text())
    assert "on 4 images 40x32" in logs[0] and "2 steps of 2 images" in logs[0]
    assert "on 8 images 40x32" in logs[1] and "4 steps of 2 images" in logs[1]


@pytest.mark.parametrize(
    ("mode", "classes"),
    [
        ("simclr", 2),
        ("moco", 5),
        pytest.param("simclr", 5, marks=pytest.mark.slow),
        pytest.param("moco", 2, marks=pytest.mark.slow),
    ],
)
def test_other_numbers_of_classes(tmp_path: Path, mode: str, classes: int) -> None:
    own = make_set(tmp_path / "set", classes)
    assert train(own, tmp_path, self_mode=mode, num_classes=classes) == 0
    scores = entries(tmp_path / f"tiny_{mode}/1_0", "fine", "evaluation")[-1]
    assert len(scores["truth_pixels"]) == classes and sum(scores["truth_pixels"]) == 2 * 32 * 40


def test_sixteen_bits_colour_and_several_annotated_images(tmp_path: Path) -> None:
    own = make_set(tmp_path / "set")
    for i, path in enumerate(sorted((own / "train_numf" / "img").iterdir())):
        gray = np.asarray(Image.open(path))
        if i % 2:
            Image.fromarray(gray.astype(np.uint16) * 257).save(path)
        else:
            Image.fromarray(np.stack([gray, gray // 2, gray // 3], axis=2)).save(path)
    add(own / "sup_num1_0", "45_9", 9, 3, (32, 40))
    assert train(own, tmp_path / "out") == 0
    log = (tmp_path / "out" / "tiny_simclr/1_0/log_fine.txt").read_text()
    assert "on 2 images 40x32 with labels" in log and "15_0.png, 45_9.png" in log


def test_images_of_several_sizes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "set"
    shutil.copytree(data, own)
    add(own / "train_numf", "45_9", 9, 3, (33, 47))
    add(own / "test_numf", "45_t9", 10, 3, (25, 51))
    refused(capsys, train(own, tmp_path / "a"), "45_9.png", "47x33", "--image_size")
    assert not (tmp_path / "a").exists()
    assert train(own, tmp_path / "b", stages="sup") == 0
    picture = tmp_path / "b" / "tiny_sup" / "1_0" / "epoch_1" / "45_t9.png"
    assert Image.open(picture).size == (51, 25)
    assert train(own, tmp_path / "c", image_size=32) == 0
    picture = tmp_path / "c" / "tiny_simclr" / "1_0" / "epoch_1" / "45_t9.png"
    assert Image.open(picture).size == (32, 32)


def test_pixels_that_nobody_labelled_do_not_count(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "set"
    shutil.copytree(data, own)
    for split in ("test_numf", "sup_num1_0"):
        for path in (own / split / "gt").iterdir():
            mask = np.array(Image.open(path))
            mask[:16] = 200
            Image.fromarray(mask).save(path)
    assert train(own, tmp_path, ignore_label=200) == 0
    scores = entries(tmp_path / "tiny_simclr/1_0", "fine", "evaluation")[-1]
    assert sum(scores["truth_pixels"]) == 2 * 16 * 40


RECIPE: dict[str, Any] = {
    "standardize": True,
    "norm": "group",
    "fine_crop": 24,
    "fine_scale": 1.4,
    "fine_rotation": 45.0,
    "fine_contrast": 0.2,
    "fine_crops": 3,
}


@pytest.mark.parametrize("mode", ["simclr", "moco"])
def test_the_recipe_for_images_of_differing_contrast(
    data: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, stages="self-fine-sup", self_mode=mode, **RECIPE) == 0
    for kind, stage in ((mode, "fine"), ("sup", "sup")):
        run = tmp_path / f"tiny_{kind}" / "1_0"
        saved = load(run / f"{stage}_last.pt")
        assert saved["settings"]["standardize"] is True and saved["settings"]["fine_crops"] == 3
        network = Segmenter(run / f"{stage}_last.pt", device="cpu")
        assert network.standardize
        # What was written while training is what the program for prediction says.
        for name in ("15_t0", "30_t1"):
            image = np.asarray(Image.open(data / "test_numf" / "img" / f"{name}.png"))
            drawn = np.asarray(Image.open(run / "epoch_1" / f"{name}.png"))
            said = np.array(network.mapping, np.uint8)[network(image)]
            assert (drawn == said).mean() > 0.99
    capsys.readouterr()
    code = train(data, tmp_path, name="b", stages="sup", fine_crop=33)
    refused(capsys, code, "15_0.png: 40x32 pixels; fine_crop: found 33; give at most 32")
    code = train(data, tmp_path, stages="fine", self_mode=mode, overwrite=True)
    refused(capsys, code, "moco2.pt: norm: ", "--norm group")
    code = train(data, tmp_path, stages="sup", **{**RECIPE, "fine_crops": 4})
    refused(capsys, code, "fine_crops was 3, is 4")


def test_a_run_of_before_these_settings_goes_on_and_others_are_told_apart(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, stages="sup") == 0
    path = tmp_path / "tiny_sup" / "1_0" / "state_sup.pt"
    state = load(path)
    assert {*RECIPE} <= {*state["settings"]}
    for name in RECIPE:
        del state["settings"][name]
    save(path, state)
    capsys.readouterr()
    assert train(data, tmp_path, stages="sup", fine_rotation=0) == 0
    assert "finished already" in capsys.readouterr().out
    refused(capsys, train(data, tmp_path, stages="sup", norm="group"), "norm was batch, is group")


@pytest.mark.parametrize("mode", ["simclr", "moco"])
def test_mixed_precision_trains(data: Path, tmp_path: Path, mode: str) -> None:
    assert train(data, tmp_path, self_mode=mode, amp="bf16") == 0
    run = tmp_path / f"tiny_{mode}" / "1_0"
    assert "amp bf16" in (run / "log_self.txt").read_text()
    assert all(np.isfinite(e["loss"]) for s in ("self", "fine") for e in entries(run, s))
    for state in (load(run / "moco2.pt")["moco"], load(run / "fine.pt")["finetune"]):
        kinds = {v.dtype for v in state.values() if v.is_floating_point()}
        assert kinds == {torch.float32}


# ---------------------------------------------------------------- what fine-tuning starts from


def published(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A file such as the published program writes: with numbers of NumPy."""
    return {"moco": state, "epoch": np.int64(200), "acc": np.float64(0.5)}


def test_fine_tuning_starts_from_any_file(finished: Path, data: Path, tmp_path: Path) -> None:
    run = finished / "tiny_simclr" / "1_0"
    copy = published(load(run / "moco2.pt")["moco"])
    torch.save(copy, tmp_path / "published.pt")
    total = sum(key.startswith("encode.") for key in UNet(3, (4, 8, 16, 32)).state_dict())
    starts = [run / "moco2.pt", run / "fine.pt", finished / "tiny_sup/1_0/sup.pt"]
    for i, path in enumerate([*starts, tmp_path / "published.pt"]):
        assert train(data, tmp_path / str(i), stages="fine", pretrained=str(path)) == 0
        log = (tmp_path / str(i) / "tiny_simclr/1_0/log_fine.txt").read_text()
        assert f"Fine-tuning from {path} ({total} of {total} tensors loaded" in log


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"standardize": True}, ["(standardize was False, is True); give --standardize False"]),
        ({"image_size": 24}, ["(image_size was 0, is 24); give --image_size 0 unless you mean"]),
        ({"fine_lr_encoder": 1e-5}, []),
    ],
)
def test_the_log_warns_of_pretraining_on_images_in_another_form(
    finished: Path, data: Path, tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    start = finished / "tiny_simclr" / "1_0" / "moco2.pt"
    assert train(data, tmp_path, stages="fine", pretrained=str(start), **change) == 0
    run = tmp_path / "tiny_simclr" / "1_0"
    text = (run / "log_fine.txt").read_text()
    assert text.splitlines()[: 3 + len(said)] == load(run / "state_fine.pt")["about"]
    warned = [line for line in text.splitlines() if line.startswith("Warning: ")]
    assert len(warned) == len(said)
    assert all(words in line for words, line in zip(said, warned, strict=True))


def test_a_published_file_in_the_folder_is_the_start_of_fine_tuning(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tiny_simclr" / "1_0"
    run.mkdir(parents=True)
    torch.save(published(load(finished / "tiny_simclr/1_0/moco2.pt")["moco"]), run / "moco200.pt")
    before = (run / "moco200.pt").read_bytes()
    assert train(data, tmp_path, stages="fine", self_max_epoch=200) == 0
    capsys.readouterr()
    for epochs in (2, 200):
        code = train(data, tmp_path, stages="self", self_max_epoch=epochs)
        refused(capsys, code, "moco200.pt", "state_self.pt", "--overwrite")
    assert (run / "moco200.pt").read_bytes() == before
    assert sorted(run.glob("log_*")) == [run / "log_fine.txt"]


@pytest.mark.parametrize(("stage", "name"), [("fine", "fine.pt"), ("sup", "sup.pt")])
def test_a_trained_model_without_a_state_is_not_overwritten(
    finished: Path, data: Path, tmp_path: Path, capsys: Any, stage: str, name: str
) -> None:
    folder = "tiny_simclr" if stage == "fine" else "tiny_sup"
    run = tmp_path / folder / "1_0"
    run.mkdir(parents=True)
    shutil.copy(finished / folder / "1_0" / name, run)
    before = files(tmp_path)
    pretrained = str(finished / "tiny_simclr/1_0/moco2.pt") if stage == "fine" else ""
    settings = {"stages": stage, "pretrained": pretrained}
    refused(capsys, train(data, tmp_path, **settings), f"1_0/{name}", "--overwrite")
    assert files(tmp_path) == before
    assert train(data, tmp_path, **settings, overwrite=True) == 0
    assert load(run / name)["epoch"] in (0, 1)


def test_fine_tuning_without_a_start_trains_nothing(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, train(data, tmp_path, stages="fine"), "1_0/moco2.pt", "pretrain first")
    assert files(tmp_path) == {} and os.listdir(tmp_path) == []
    run = tmp_path / "tiny_simclr" / "1_1"
    run.mkdir(parents=True)
    shutil.copy(finished / "tiny_simclr/1_1/moco1.pt", run)
    code = train(data, tmp_path, stages="fine-sup", repeats="10", self_max_epoch=1)
    refused(capsys, code, "1_0/moco1.pt")
    code = train(data, tmp_path, stages="fine", repeats="1")
    refused(capsys, code, "1_1/moco2.pt", "there is moco1.pt")
    assert list(files(tmp_path)) == ["tiny_simclr/1_1/moco1.pt"]


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other network", "no network"])
def test_a_start_that_does_not_fit_is_one_line(
    finished: Path, data: Path, tmp_path: Path, capsys: Any, damage: str
) -> None:
    whole, path = (finished / "tiny_simclr/1_0/moco2.pt"), tmp_path / "start.pt"
    if damage == "cut":
        path.write_bytes(whole.read_bytes()[:20000])
    elif damage == "no network":
        save(path, {"epoch": 3})
    elif damage != "other network":
        path.write_bytes(b"nothing" if damage == "text" else b"")
    else:
        state = load(whole)["moco"]
        del state["encoder_q.encode.up1.up.bias"]
        save(path, {"moco": state})
    code = train(data, tmp_path / "out", stages="fine", pretrained=str(path))
    refused(capsys, code, str(path))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- other settings, the same folder


def test_other_settings_are_refused_before_anything_is_trained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, stages="self", repeats="1") == 0
    before = files(tmp_path)
    capsys.readouterr()
    code = train(data, tmp_path, repeats="01", self_lr=3e-4, self_batch_size=3)
    line = refused(capsys, code, "tiny_simclr/1_1", "--overwrite", "--name")
    assert "self_lr was 0.0001, is 0.0003" in line and "self_batch_size was 2, is 3" in line
    assert files(tmp_path) == before


def test_another_pretraining_is_another_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path) == 0
    assert train(data, tmp_path, stages="self", seed=5, overwrite=True) == 0
    capsys.readouterr()
    code = train(data, tmp_path, stages="fine", seed=5)
    refused(capsys, code, "stage fine", "pretrained weights was")


def test_what_is_no_setting_of_the_result_may_change(finished: Path, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    settings = {"workers": 1, "save_seconds": 9.0, "threads": 0, "fine_max_epoch": 3}
    assert train(data, out, stages="fine-sup", **settings) == 0


def test_overwriting_starts_anew_and_removes_only_what_a_run_wrote(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"repeats": "0", "self_max_epoch": 1, "fine_max_epoch": 2}
    assert train(data, Path("fresh"), **settings) == 0
    shutil.copytree(finished / "tiny_simclr" / "1_0", "old/tiny_simclr/1_0")
    run = Path("old/tiny_simclr/1_0")
    (run / "notes.txt").write_text("mine")
    (run / "epoch_2" / "mine.png").write_text("mine")
    assert train(data, Path("old"), **settings, overwrite=True) == 0
    old, fresh = files(Path("old")), files(Path("fresh"))
    extra = {"tiny_simclr/1_0/notes.txt", "tiny_simclr/1_0/epoch_2/mine.png"}
    assert set(old) - set(fresh) == extra and set(fresh) <= set(old)
    weights = [load(Path(p) / "tiny_simclr/1_0/fine.pt")["finetune"] for p in ("old", "fresh")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_never_resume_means_again(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert train(data, out, stages="sup", fine_max_epoch=3, resume="never") == 0
    assert "Epoch: [2/3]" in capsys.readouterr().out
    run = "tiny_sup/1_0/sup_last.pt"
    assert files(finished)[run] == files(out)[run]


def test_names_in_a_state_cannot_reach_out_of_the_folder(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "victim").write_text("")
    (tmp_path / "victim").write_text("")
    path = out / "tiny_sup" / "1_0" / "state_sup.pt"
    state = load(path)
    state["outputs"] += ["../../victim", str(tmp_path / "victim"), "epoch_0/../../../victim"]
    save(path, state)
    assert train(data, out, stages="sup", overwrite=True) == 0
    assert (out / "victim").exists() and (tmp_path / "victim").exists()


# ---------------------------------------------------------------- trouble


def test_two_processes_do_not_share_a_folder(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    run = tmp_path / "out" / "tiny_simclr" / "1_1"
    words = [sys.executable, "-c", HOLD, str(run), str(ROOT)]
    settings = {"repeats": "01", "fine_max_epoch": 3, "overwrite": True}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = files(tmp_path)
        refused(capsys, train(data, tmp_path / "out", **settings), str(run), "another process")
        assert files(tmp_path) == before
        holder.send_signal(signal.SIGKILL)
    assert train(data, tmp_path / "out", **settings) == 0
    assert set(files(tmp_path / "out")) == set(files(finished))


@pytest.mark.parametrize(("call", "at"), [("fsync", 1), ("replace", 4)])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, call: str, at: int
) -> None:
    monkeypatch.chdir(tmp_path)
    real, calls = getattr(os, call), []

    def full(*words: Any) -> Any:
        calls.append(words)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        code = train(data, Path("out"), stages="self")
        refused(capsys, code, "No space left", "tiny_simclr/1_0")
    assert not list(Path("out").rglob("*.tmp"))
    assert train(data, Path("out"), stages="self") == 0
    os.rename("out", "first")
    assert train(data, Path("out"), stages="self") == 0
    assert files(Path("out")) == files(Path("first"))


def test_a_full_disk_at_the_table_is_one_line(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = files(out)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code = train(data, out, stages="sup", repeats="01", fine_max_epoch=3)
    refused(capsys, code, "eval.txt", "No space left")
    assert files(out) == before


def test_a_folder_that_cannot_be_written_to_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, train(data, tmp_path / "file"), "file/tiny_simclr/1_0", "--output_dir")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o555)
        refused(capsys, train(data, tmp_path / "closed"), "closed/tiny_simclr/1_0", "--output_dir")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("--self_lr nought", "self_lr"),
        ("--stages self-test", "stages"),
        ("--colour blue", "--colour"),
        ("--data_dir absent", "absent"),
        ("--device cuda:99", "cuda:99"),
        ("--repeats 7", "sup_num1_7"),
        ("--num_classes 2", "value 2"),
    ],
)
def test_bad_input_ends_with_2_and_without_a_traceback(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, word: str
) -> None:
    assert train(data, tmp_path, argv) == 2
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error and "File " not in error
    assert os.listdir(tmp_path) == []


def test_too_little_memory_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def losses(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore words")

    monkeypatch.setattr(SelfSupervised, "losses", losses)
    refused(capsys, train(data, tmp_path), "Tried to allocate 3 GiB", "--image_size")


@pytest.mark.slow  # tests/test_readme.py runs it so, too
def test_the_script_runs_in_a_process_of_its_own(data: Path, tmp_path: Path) -> None:
    done = run_process(command(data, stages="sup", fine_max_epoch=1), tmp_path / "run")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "Epoch: [0/1][1/1]" in done.stdout and "\r" not in done.stdout
    assert (tmp_path / "run/tiny_sup/1_0/sup.pt").exists()
