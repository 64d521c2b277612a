"""The stand-in set: the same every time, complete, and laid out as the program reads it."""

import hashlib
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data import find_split, parse_name
from dataset import make_demo
from dataset.check import check_data
from dataset.make_demo import make_demo_set
from utils.commandline import UserError


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo_set(tmp_path_factory.mktemp("a") / "NEU_Seg-standin")


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def ids(path: Path | None) -> np.ndarray:
    assert path is not None
    return np.asarray(Image.open(path))


def test_layout(demo):
    count = {p.name: len(find_split(demo, p.name)) for p in demo.iterdir() if p.is_dir()}
    expected = {"train_numf": 24, "test_numf": 12, "sup_num5_0": 5, "sup_num5_1": 5}
    assert count == expected | {f"sup_num1_{k}": 1 for k in range(5)}
    assert "SYNTHETIC" in (demo / "README.txt").read_text()
    batches = {parse_name(s.image.stem)[0] for s in find_split(demo, "train_numf")}
    assert batches == {"coil11", "coil12", "coil13", "coil14"}


def test_it_passes_the_check_without_a_warning(demo):
    report = check_data(
        demo,
        num_classes=4,
        stages=("self", "fine", "sup"),
        sizes="1f",
        repeats="01234",
        self_mode_needs_groups=True,
    )
    assert report.warnings == ()
    assert check_data(demo, num_classes=4, sizes="5", repeats="01").warnings == ()


def test_pictures_and_masks(demo):
    for split in ("train_numf", "test_numf", *(f"sup_num1_{k}" for k in range(5))):
        for sample in find_split(demo, split):
            image, mask = ids(sample.image), ids(sample.mask)
            assert image.shape == mask.shape == (200, 200)
            assert image.dtype == mask.dtype == np.uint8 and mask.max() <= 3
            assert image.std() > 5 and np.mean((image == 0) | (image == 255)) < 0.2
            share = np.bincount(mask.ravel(), minlength=4) / mask.size
            assert share[0] > 0.4 and (share[1:] > 0).any()
            if split.startswith("sup"):
                assert (share > 0.002).all()


def test_annotated_images_are_copies_of_training_images(demo):
    train = {s.name: s for s in find_split(demo, "train_numf")}
    chosen = []
    for split in ("sup_num1_0", "sup_num1_1", "sup_num1_2", "sup_num1_3", "sup_num1_4"):
        chosen += find_split(demo, split)
    assert len({s.name for s in chosen}) == 5
    for sample in [*chosen, *find_split(demo, "sup_num5_0"), *find_split(demo, "sup_num5_1")]:
        np.testing.assert_array_equal(ids(sample.image), ids(train[sample.name].image))
        np.testing.assert_array_equal(ids(sample.mask), ids(train[sample.name].mask))


def test_defects_look_as_their_class_says(demo):
    """Streaks and blotches are darker than what surrounds them, scratches brighter."""
    difference: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for sample in find_split(demo, "train_numf"):
        image, mask = ids(sample.image), ids(sample.mask)
        for c, values in difference.items():
            near = cv2.dilate((mask == c).astype(np.uint8), np.ones((9, 9))) > 0
            if (mask == c).any():
                values.append(image[mask == c].mean() - image[near & (mask == 0)].mean())
    for c, sign in ((1, -1), (2, -1), (3, 1)):
        assert np.mean(np.array(difference[c]) * sign > 3) > 0.85


def test_same_seed_same_bytes_other_seed_other_pictures(demo, tmp_path):
    assert digest(make_demo_set(tmp_path / "b")) == digest(demo)
    before = digest(tmp_path / "b")
    assert make_demo_set(tmp_path / "b", seed=1) == tmp_path / "b"  # replaces its own work
    after = digest(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(before[k] != after[k] for k in before if k.endswith(".png"))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_complete_set_is_left_as_it_is_and_a_partial_one_made_again(demo):
    stamp = (demo / "README.txt").stat().st_mtime_ns
    start = time.perf_counter()
    make_demo_set(demo)
    assert (demo / "README.txt").stat().st_mtime_ns == stamp and time.perf_counter() - start < 1
    before = digest(demo)
    next((demo / "train_numf" / "gt").iterdir()).unlink()
    make_demo_set(demo)
    assert digest(demo) == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(make_demo, "write_png", fail)
    with pytest.raises(UserError, match="c: cannot be written .disk full"):
        make_demo_set(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_not_touched(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="mine: holds other files"):
        make_demo_set(tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--out", str(tmp_path / "mine")])
    assert make_demo.main() == 2
    captured = capsys.readouterr()
    assert "mine: holds other files" in captured.err and captured.out == ""
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_record_names_version_and_seed(demo):
    record = json.loads((demo / "standin.json").read_text())
    assert record == {"version": make_demo.VERSION, "seed": 0, "files": 2 * (24 + 12 + 5 + 10)}
