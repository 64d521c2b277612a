"""What presets take from images: made pictures whose mean, spread and sharpness are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_set import make_set, train

from config import Config, ConfigError
from presets import ROBUST
from stages import presets
from stages.presets import Choice, look, read_config

Pixels = NDArray[np.uint8]


def choose(images: Sequence[Pixels], annotated: Sequence[Pixels]) -> Choice:
    """``presets.choose`` of images (H, W)."""
    return presets.choose([look(image) for image in images], [look(image) for image in annotated])


def chessboard(low: int, high: int, size: tuple[int, int] = (300, 300), square: int = 4) -> Pixels:
    """Squares of two gray levels, as many of either."""
    rows, columns = np.indices(size) // square
    return np.where((rows + columns) % 2, high, low).astype(np.uint8)


def test_look_measures_what_can_be_worked_out() -> None:
    found = look(chessboard(51, 153))  # 0.2 and 0.6
    assert found.size == (300, 300)
    assert (found.mean, found.spread) == pytest.approx((0.4, 0.2), abs=1e-3)
    colour = np.repeat(chessboard(51, 153)[..., None], 3, axis=2)
    assert look(colour)[1:] == pytest.approx(found[1:])


def test_sharpness_does_not_depend_on_contrast_and_falls_by_blur() -> None:
    sharp, weak = look(chessboard(0, 200)), look(chessboard(100, 140))
    assert weak.sharpness == pytest.approx(sharp.sharpness, rel=1e-3)
    blurred = cv2.GaussianBlur(chessboard(0, 200), (0, 0), 1.0)
    assert look(np.asarray(blurred, np.uint8)).sharpness < sharp.sharpness / 2


def test_alike_images_need_nothing_more() -> None:
    image = chessboard(50, 150)
    values, reasons = choose([image] * 4, [image])
    assert values == {}
    assert reasons["standardize"].startswith("standardize False: a quarter of the 4 images")


@pytest.mark.parametrize(
    "others", [chessboard(80, 180), chessboard(20, 180)], ids=["brighter", "stronger"]
)
def test_images_of_other_brightness_or_contrast_are_standardised(others: Pixels) -> None:
    image = chessboard(50, 150)
    values, _ = choose([image, others, others], [image])
    assert values == {"standardize": True}
    Config(**values)  # of the types that settings have
    assert choose([image] * 9 + [others], [image])[0] == {}  # one odd image does not decide


def test_plain_images_beside_full_ones_are_not_standardised() -> None:
    image, plain = chessboard(50, 150), chessboard(140, 150)
    values, reasons = choose([plain] * 3, [image])
    assert values == {}
    assert any(line.endswith(", as images of other content do") for line in reasons.values())


def test_images_of_other_sharpness_get_more_blur() -> None:
    image = chessboard(0, 200)
    blurred = np.asarray(cv2.GaussianBlur(image, (0, 0), 1.5), np.uint8)
    wide = cv2.normalize(blurred, None, 0, 200, cv2.NORM_MINMAX)  # type: ignore[call-overload]
    values, reasons = choose([np.asarray(wide, np.uint8)] * 3, [image])
    assert values["fine_blur"] > ROBUST["fine_blur"]
    assert reasons["fine_blur"].startswith("fine_blur 1.5: a quarter differ by a factor of")


def test_small_and_unequal_images_get_smaller_crops() -> None:
    annotated, other = chessboard(50, 150, (64, 80)), chessboard(50, 150, (48, 300))
    values, reasons = choose([annotated, other], [annotated])
    assert values == {"self_crop": 48, "fine_crop": 64}
    assert reasons["fine_crop"] == "fine_crop 64: the smallest image has a side of 64 pixels"


def test_small_images_of_one_size_are_seen_whole_in_pretraining() -> None:
    image = chessboard(50, 150, (200, 200))
    values, reasons = choose([image, image], [image])
    assert values == {"self_crop": 0} and "self_crop" not in reasons


def test_large_annotated_images_get_more_steps() -> None:
    image = chessboard(50, 150, (1536, 2048), 16)
    values, _ = choose([image], [image])
    # 20 times 3,145,728 pixels, in steps of 8 crops of 96 x 96 pixels: 853.3 steps
    assert values == {"fine_steps": 854}


def test_without_images_nothing_is_chosen() -> None:
    assert choose([], [chessboard(0, 9)]) == ({}, {}) == choose([chessboard(0, 9)], [])


def test_flags_win_over_what_the_images_ask_for(tmp_path: Path) -> None:
    data = str(make_set(tmp_path / "set"))  # 32 x 40 pixels
    words = ["--data_dir", data, "--num_classes", "3", "--preset", "robust"]
    config, notes = read_config(words)
    assert (config.fine_crop, config.self_crop, config.use_unlabelled) == (32, 0, False)
    assert notes == ["Preset robust: fine_crop 32: the smallest image has a side of 32 pixels"]
    config, notes = read_config([*words, "--fine_crop", "16"])
    assert config.fine_crop == 16 and notes == []
    assert read_config(words[:4]) == read_config([*words[:4], "--preset", "paper"])


@pytest.mark.parametrize("preset", ["robust", "auto"])
def test_a_length_in_epochs_wins_over_the_steps_of_a_preset(tmp_path: Path, preset: str) -> None:
    root = make_set(tmp_path / "set", size=(1000, 1000))  # 2 * 20 * 1000**2 / (8 * 96**2) = 542.5
    words = ["--data_dir", str(root), "--num_classes", "3", "--preset", preset]
    assert read_config(words)[0].epochs_for("1") == {"robust": 400, "auto": 543}[preset]
    config, notes = read_config([*words, "--fine_max_epoch", "7", "--fine_crops", "4"])
    assert config.epochs_for("1") == 7 and config.fine_steps == 0 and config.fine_crops == 4
    assert config.fine_schedule == "onecycle" and not any("fine_steps" in line for line in notes)
    # A script's own default is no flag: the preset wins over it.
    assert read_config(words, fine_max_epoch=7)[0].fine_steps in (400, 543)


@pytest.mark.parametrize("words", ["--preset robust", "--preset auto", "--fine_steps 3"])
def test_what_steps_would_make_useless_is_refused(words: str) -> None:
    own = ["--data_dir", "nowhere", *words.split()]
    with pytest.raises(ConfigError, match="^fine_crops: found 4, .*no effect with fine_steps .*$"):
        read_config([*own, "--fine_crops", "4"])
    both = [*own, "--fine_steps", "3", "--fine_max_epoch", "5"]
    with pytest.raises(ConfigError, match="^fine_max_epoch: found 5, .* fine_steps 3; give one"):
        read_config(both)
    assert read_config([*both, "--fine_steps", "0"])[0].epochs_for("1") == 5
    assert read_config([*own, "--fine_crops", "1"])[0].fine_crops == 1


@pytest.mark.parametrize("stages", ["self", "sup", "self-fine", "self-sup"])
def test_a_pretrained_file_that_nothing_starts_from_is_refused(stages: str) -> None:
    words = ["-stages", stages, "--pretrained", "moco200.pt", "--data_dir", "nowhere"]
    with pytest.raises(
        ConfigError, match=f"^pretrained: found moco200.pt, .* {stages} .*-stages fine"
    ):
        read_config(words)
    assert read_config([*words, "--pretrained", ""])[0].pretrained == ""
    assert read_config([*words, "-stages", "fine-sup"])[0].pretrained == "moco200.pt"


def test_the_preset_of_a_set_that_is_not_there_changes_nothing() -> None:
    config, notes = read_config(["--preset", "auto", "--data_dir", "nowhere"])
    assert notes == [] and config.fine_steps == 400 and not config.use_unlabelled


def test_unlabelled_images_are_used_where_there_are_some(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    (data / "train_unlabelled").mkdir()
    (data / "train_numf" / "img").rename(data / "train_unlabelled" / "img")
    config, notes = read_config(["--preset", "robust", "--data_dir", str(data)])
    assert config.use_unlabelled
    assert "Preset robust: use_unlabelled True: train_unlabelled has 4 images" in notes


@pytest.mark.parametrize(("preset", "classes"), [("robust", 2), ("robust", 5), ("auto", 4)])
def test_a_preset_trains_with_any_number_of_classes(
    tmp_path: Path, preset: str, classes: int
) -> None:
    data = make_set(tmp_path / "set", classes=classes, size=(33, 47))
    settings: dict[str, Any] = {"stages": "self-fine", "self_max_epoch": 1, "num_classes": classes}
    words = f"--preset {preset} --fine_steps 2 --eval_every 2"
    assert train(data, tmp_path / "out", words, **settings) == 0
    text = (tmp_path / "out/tiny_simclr/1_0/log_fine.txt").read_text()
    assert f"preset = {preset}\n" in text and "fine_optimizer = adamw\n" in text
    assert f"Preset {preset}: fine_crop 33: " in text
    assert "class_weight = balanced_sqrt\n" in text and "Class weights, balanced_sqrt: " in text


def test_what_auto_saw_is_in_both_logs(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    words = "--preset auto --fine_steps 1 --self_max_epoch 1"
    assert train(data, tmp_path / "out", words, stages="self-fine") == 0
    for stage in ("self", "fine"):
        text = (tmp_path / f"out/tiny_simclr/1_0/log_{stage}.txt").read_text()
        assert "Preset auto: standardize " in text


def test_what_is_hidden_is_not_looked_at() -> None:
    pixels = np.array([[10, 30, 200], [30, 10, 90]], np.uint8)
    inside = np.array([[True, True, False]] * 2)
    found = look(pixels, inside)
    assert found.mean == pytest.approx(20 / 255) and found.spread == pytest.approx(10 / 255)
