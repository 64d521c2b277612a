"""Told once to prepare.py, known to training, the table and prediction: no flag is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from comparison.options import read_options
from dataset import prepare
from dataset.set_file import read_set_file
from imaging.field import Crop
from imaging.gray_range import GrayRange
from predict import main as predict
from stages.presets import read_config
from tests.test_data_bar import micrograph, strip
from tests.tiny_set import TINY, train
from tests.trained_model import rows_of

COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
BAR = 12


def raw(folder: Path, number: int = 5, depth: Any = np.uint8) -> Path:
    """Raw images with a bar of 12 rows, and coloured masks: class 1 is bright, class 2 dark."""
    for kind in ("img", "gt"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for k in range(number):
        rng = np.random.default_rng(k)
        ids = np.zeros((32, 48), np.uint8)
        ids[4:14, 2 + k : 14 + k], ids[18:28, 20 : 34 + k] = 1, 2
        gray = np.array([120, 220, 30])[ids] + rng.integers(0, 9, ids.shape)
        image = (gray * (16 if depth == np.uint16 else 1)).astype(depth)
        bar: np.ndarray = np.zeros((BAR, 48), depth)
        bar[3:8, 5:30] = np.iinfo(depth).max
        how = {"resolution": (4, 4), "metadata": {"unit": "micron"}}
        path = folder / "img" / f"{k}_a.tif"
        tifffile.imwrite(path, np.vstack([image, bar]), imagej=True, **how)
        Image.fromarray(COLOURS[ids]).save(folder / "gt" / f"{k}_a.png")
    return folder


def prepared(folder: Path, *words: str) -> int:
    base = ["--images", folder / "img", "--masks", folder / "gt", "--out", folder / "set"]
    return prepare.main([*map(str, base), "--crop", f"0,{BAR},0,0", *words])


def test_prepare_writes_what_it_was_told_and_found(tmp_path: Path) -> None:
    assert prepared(raw(tmp_path, depth=np.uint16), "--class_names", "matrix, γ', void") == 0
    known = read_set_file(tmp_path / "set")
    assert known is not None
    assert known.num_classes == 3 and known.class_names == ("matrix", "γ'", "void")
    assert known.class_colours == ("000000", "0000ff", "ff0000")  # numbered from dark to bright
    assert known.palette == "0=0,0,0 1=0,0,255 2=255,0,0" and known.ignore_label is None
    assert known.crop == Crop(bottom=BAR) and known.cropped_sizes == ((32, 48),)
    assert known.um_per_px == 0.25
    assert isinstance(known.gray_range, GrayRange)
    # The bar's white, 65535, is no pixel of the field.
    assert known.gray_range.low >= 30 * 16 and known.gray_range.high <= 228 * 16
    report = (tmp_path / "set" / "prepare_report.txt").read_text(encoding="utf-8")
    assert "pixel size: 0.25 µm" in report


def test_no_later_command_is_told_again(tmp_path: Path, capsys) -> None:
    assert prepared(raw(tmp_path, depth=np.uint16), "--class_names", "matrix,dark,bright") == 0
    root = tmp_path / "set"
    config, _ = read_config(["--data_dir", str(root)])
    assert config.num_classes == 3 and config.class_names == ("matrix", "dark", "bright")
    options = read_options(["--data_dir", str(root)])
    assert options.config.num_classes == 3 and any("From " in line for line in options.notes)
    assert train(root, tmp_path, "-stages sup --fine_max_epoch 1", num_classes=3) == 0
    assert "matrix,dark,bright" in capsys.readouterr().out
    run = tmp_path / "tiny_sup" / "1_0"
    words = ["--weights", run, "--images", tmp_path / "img", "--out", tmp_path / "out"]
    assert predict([*map(str, words), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"{BAR} rows at the bottom, as the training images were" in said
    rows = rows_of(tmp_path / "out" / "measurements.csv")
    assert {row["class_name"] for row in rows} == {"matrix", "dark", "bright"}
    assert {row["um_per_px"] for row in rows} == {"0.25"}
    assert {row["field_px"] for row in rows} == {str(32 * 48)}
    # The raw images through predict.py are the images of the set: converted and cut alike.
    words[3:] = [root / "train_numf" / "img", "--out", tmp_path / "o2"]
    assert predict([*map(str, words), "--device", "cpu"]) == 0
    for path in (tmp_path / "o2" / "classes").iterdir():
        whole = np.asarray(Image.open(tmp_path / "out" / "classes" / path.name))
        assert (whole[:32] == np.asarray(Image.open(path))).all() and (whole[32:] == 255).all()
    assert {row["um_per_px"] for row in rows_of(tmp_path / "o2" / "measurements.csv")} == {"0.25"}


def test_unlabelled_pixels_are_known_to_training(tmp_path: Path) -> None:
    raw(tmp_path)
    for path in (tmp_path / "gt").iterdir():
        mask = np.array(Image.open(path))
        mask[:2] = 255
        Image.fromarray(mask).save(path)
    palette = "0=0,0,0 1=0,0,255 2=255,0,0 ignore=255,255,255"
    assert prepared(tmp_path, "--palette", palette) == 0
    assert read_config(["--data_dir", str(tmp_path / "set")])[0].ignore_label == 255
    assert train(tmp_path / "set", tmp_path, "-stages sup --fine_max_epoch 1") == 0


def test_scales_that_differ_are_kept_by_image(tmp_path: Path) -> None:
    raw(tmp_path)
    how = {"resolution": (8, 8), "metadata": {"unit": "micron"}, "imagej": True}
    image = tifffile.imread(tmp_path / "img" / "1_a.tif")
    tifffile.imwrite(tmp_path / "img" / "1_a.tif", image, **how)
    tifffile.imwrite(tmp_path / "img" / "2_a.tif", image)
    assert prepared(tmp_path) == 0
    known = read_set_file(tmp_path / "set")
    expected = {"0_a.png": 0.25, "1_a.png": 0.125, "3_a.png": 0.25, "4_a.png": 0.25}
    assert known is not None and known.um_per_px == expected


def test_a_given_scale_is_the_sets_and_a_contradiction_is_told(tmp_path: Path, capsys) -> None:
    raw(tmp_path)
    assert prepared(tmp_path, "--um_per_px", "0.5") == 0
    assert "--um_per_px 0.5 against 0.25 µm" in capsys.readouterr().out
    assert json.loads((tmp_path / "set" / "set.json").read_text())["um_per_px"] == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--class_names", "a,b"], "--class_names: found 2 values; allowed"),
        (["--class_colours", "red,green,blue"], "--class_colours: found ('red'"),
        (["--um_per_px", "0"], "--um_per_px 0.0: give micrometres per pixel"),
        (["--um_per_px", "nan"], "--um_per_px nan: give micrometres per pixel"),
    ],
)
def test_what_a_set_cannot_remember_is_one_line(tmp_path: Path, capsys, words, said) -> None:
    assert prepared(raw(tmp_path), *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_a_bar_that_nobody_cut_is_told_by_prepare_its_check_and_training(
    tmp_path: Path, capsys
) -> None:
    for kind in ("img", "gt"):
        (tmp_path / kind).mkdir()
    for k in range(3):
        image = np.vstack([micrograph(k), strip(26, 300, 0)]) if k < 2 else micrograph(k)
        Image.fromarray(image).save(tmp_path / "img" / f"{k}_a.png")
        mask = (image > 150).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "gt" / f"{k}_a.png")
    base = ["--images", tmp_path / "img", "--masks", tmp_path / "gt", "--out", tmp_path / "set"]
    assert prepare.main([*map(str, base), "--test", "0"]) == 0
    line = "2 image(s) with a data bar that is not cut off (26 rows at the bottom): 0_a"
    said = capsys.readouterr().out
    assert f"warning: {line}.png, 1_a.png; give --crop 0,26,0,0" in said
    assert prepare.main(["--check", str(tmp_path / "set"), "--sheet", str(tmp_path / "s.png")]) == 0
    assert "with a data bar that is not cut off" in capsys.readouterr().out
    settings = {**TINY, "num_classes": 2, "image_size": 32, "self_max_epoch": 1}
    words = "-stages self --self_mode plain-simclr"
    assert train(tmp_path / "set", tmp_path, words, **settings) == 0
    assert f"{line}.png, 1_a.png; give --crop 0,26,0,0 to dataset/prepare.py" in (
        capsys.readouterr().out
    )


def test_transparent_pixels_of_an_image_have_no_label(tmp_path: Path) -> None:
    for kind in ("img", "gt"):
        (tmp_path / kind).mkdir()
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:, 40:] = 0
    for k in range(3):
        gray, ids = micrograph(k, 32, 48), np.zeros((32, 48), np.uint8)
        ids[:, :20] = 1
        Image.fromarray(np.dstack([gray] * 3 + [alpha])).save(tmp_path / "img" / f"{k}_a.png")
        Image.fromarray(ids).save(tmp_path / "gt" / f"{k}_a.png")
    base = ["--images", tmp_path / "img", "--masks", tmp_path / "gt", "--out", tmp_path / "set"]
    assert prepare.main([*map(str, base), "--test", "0"]) == 0
    written = np.asarray(Image.open(tmp_path / "set" / "train_numf" / "gt" / "0_a.png"))
    assert (written[:, 40:] == 255).all() and (written[:, :20] == 1).all()
    known = read_set_file(tmp_path / "set")
    assert known is not None and known.ignore_label == 255
