"""Masks of strokes are told from masks that were drawn in full."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from tiny_set import make_set, train

from annotation.scribbles import far_from_labels, unlabelled_value
from benchmarks.scribbles import main, scribble
from data import find_split
from dataset.check import check_data
from dataset.set_file import SetFile, read_set_file
from imaging.drawing import write_png
from imaging.imagefile import read_image, read_mask
from tests.masks import blobs

SIDE = 200
COARSE = blobs(0, (SIDE // 5, SIDE // 5)) + 2 * blobs(3, (SIDE // 5, SIDE // 5), 0.2)
WHOLE = np.kron(np.minimum(COARSE, 2), np.ones((5, 5), int)).astype(np.uint8)


def picture(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 12, ids.shape)
    return np.clip(np.array([120, 200, 60])[ids % 3] + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("width", [1, 3, 6])
def test_scribbles_are_seen_whatever_their_share_and_width(share: float, width: int) -> None:
    kept = scribble(WHOLE, share, width, np.random.default_rng(1))
    labelled = kept != 255
    assert (kept[labelled] == WHOLE[labelled]).all()
    assert labelled.mean() == pytest.approx(share, abs=0.002)
    of_class = np.bincount(kept[labelled], minlength=3)
    assert of_class.min() > 0.2 * of_class.max()
    as_ilastik = np.where(labelled, kept + 1, 0).astype(np.uint8)
    assert unlabelled_value(as_ilastik, picture(WHOLE)) == 0
    assert unlabelled_value(np.where(labelled, kept, 7).astype(np.uint8), picture(WHOLE)) == 7


def test_strokes_within_their_classes_are_seen_by_the_image() -> None:
    strokes = np.zeros((SIDE, SIDE), np.uint8)
    ids = np.zeros_like(strokes)
    ids[:, 100:] = 1
    strokes[20:24, 10:90], strokes[60:64, 110:190] = 1, 2
    assert unlabelled_value(strokes, picture(ids)) == 0
    # The same strokes, where the image shows bright and dark scratches: drawn in full.
    assert unlabelled_value(strokes, picture(strokes)) is None


def test_masks_drawn_in_full_are_not_warned_about() -> None:
    network = np.zeros((SIDE, SIDE), np.uint8)
    network[::20], network[:, ::25] = 1, 1  # boundaries of one pixel
    noise = picture(np.zeros_like(network))
    assert unlabelled_value(network, noise) is None
    pores = network.copy()
    pores[5:8, 5:8] = 2
    assert unlabelled_value(pores, noise) is None
    slanted = np.zeros_like(network)
    for row in range(0, SIDE, 2):
        slanted[row : row + 2, (row // 2) % 30 :: 30] = 1
    slanted[50:150:13] = 1
    assert unlabelled_value(slanted, noise) is None
    assert unlabelled_value(WHOLE, noise) is None
    assert unlabelled_value(np.zeros_like(network), noise) is None


def test_far_from_labels_is_a_distance_in_pixels() -> None:
    labelled = np.zeros((7, 9), bool)
    labelled[3, 4] = True
    y, x = np.mgrid[:7, :9] - np.array([3, 4])[:, None, None]
    np.testing.assert_array_equal(far_from_labels(labelled, 2.5), np.hypot(y, x) > 2.5)
    assert far_from_labels(np.zeros((2, 2), bool), 5).all()


def test_training_warns_with_both_cures_and_tells_how_much_is_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "steel", size=(64, 64))
    assert main(["--data_dir", str(data), "--out", str(tmp_path / "few"), "--share", "0.05"]) == 0
    assert "sup_num1_0/15_0.png: 5.0% labelled; class 0: " in capsys.readouterr().out
    few, whole = (find_split(tmp_path / name, "sup_num1_0")[0].mask for name in ("few", "steel"))
    assert few is not None and whole is not None
    kept, ids = read_mask(few), read_mask(whole)
    counts = np.bincount(kept.ravel(), minlength=256)
    assert (kept[kept != 255] == ids[kept != 255]).all() and counts[:3].sum() == 205
    assert (
        train(tmp_path / "few", tmp_path / "out", "-stages sup", ignore_label=255, name="few") == 0
    )
    (log,) = (tmp_path / "out").rglob("log_sup.txt")
    classes = ", ".join(f"class {c} {counts[c]}" for c in range(3))
    line = f"Labelled: 205 pixels, 5.0% of them: {classes}"
    text = log.read_text(encoding="utf-8")
    assert line in text and "15_0.png: 0.0%" not in text


def test_what_is_known_of_the_set_is_known_of_its_scribbles(tmp_path: Path) -> None:
    data, few = make_set(tmp_path / "steel", size=(64, 64)), tmp_path / "few"
    known = SetFile(num_classes=3, class_names=("matrix", "pore", "carbide"), um_per_px=0.25)
    known.write(data)
    assert main(["--data_dir", str(data), "--out", str(few)]) == 0
    assert read_set_file(few) == dataclasses.replace(known, ignore_label=255)
    assert read_set_file(data) == known


def test_a_set_of_scribbles_is_warned_about(tmp_path: Path) -> None:
    data = make_set(tmp_path / "steel", size=(64, 64))
    for sample in find_split(data, "sup_num1_0"):
        strokes = np.zeros((64, 64), np.uint8)
        strokes[10:12, 5:50], strokes[30:32, 5:25], strokes[30:32, 25:50] = 1, 1, 2
        write_png(sample.mask, strokes)
    report = check_data(data, num_classes=3)
    (line,) = [x for x in report.warnings if "scribbles" in x]
    assert "1 mask(s)" in line and "--ignore_label 0" in line and "drawn in full" in line


REAL = os.environ.get("PSCL_DATA", "")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="PSCL_DATA is not set")
def test_no_real_mask_is_warned_about() -> None:
    checked = 0
    for split in sorted(path.parent for path in Path(REAL).glob("*/*/gt")):
        for sample in find_split(split.parent, split.name):
            if sample.mask is not None:
                checked += 1
                image, mask = read_image(sample.image), read_mask(sample.mask)
                assert unlabelled_value(mask, image) is None, sample.mask
    assert checked
