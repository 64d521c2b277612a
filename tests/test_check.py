"""What a set must be before training: every problem in one line, all of them at once."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_set import NAMES, noise, noise_set

import data
from data import Sample, find_split
from dataset.check import Problems, check_data
from utils.files import DataError


@pytest.fixture
def root(tmp_path) -> Path:
    return noise_set(tmp_path)


def check(root: Path, **changes):
    settings = {"num_classes": 4, "stages": ("self", "fine"), "self_mode_needs_groups": True}
    return check_data(root, **(settings | changes))


def test_sound_set_passes(root):
    report = check(root, sizes="15f", repeats="0")
    assert report.warnings == ()


def test_files_are_decoded_once(root, monkeypatch):
    report = check(root)
    shutil.rmtree(root / "test_numf")
    monkeypatch.setattr("imaging.imagefile.read_image", None)
    samples = [Sample(root / "test_numf/img/15_t0_0_0.png", root / "test_numf/gt/15_t0_0_0.png")]
    assert len(list(data.items_of_test(samples, report.store))) == 1


def spoil_empty(root: Path) -> None:
    (root / "train_numf/img/15_s0_0_0.png").write_bytes(b"")


def spoil_size(root: Path) -> None:
    Image.fromarray(np.zeros((30, 32), np.uint8)).save(root / "test_numf/gt/15_t0_0_0.png")


def spoil_class(root: Path) -> None:
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(root / "sup_num1_0/gt/15_s0_0_0.png")


def spoil_colour(root: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 9, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(colours).save(root / "test_numf/gt/15_t0_0_0.png")


def spoil_mask(root: Path) -> None:
    (root / "test_numf/gt/30_t1_0_0.png").rename(root / "test_numf/gt/30_t1_0_0.jpg")


def spoil_folder(root: Path) -> None:
    shutil.rmtree(root / "sup_num1_0")


def spoil_images(root: Path) -> None:
    shutil.rmtree(root / "test_numf" / "img")
    (root / "test_numf" / "img").mkdir()
    (root / "test_numf" / "img" / "a_b.gif").write_bytes(b"x")


def spoil_twin(root: Path) -> None:
    noise(root / "train_numf", NAMES[0], suffix=".bmp")


def spoil_shape(root: Path) -> None:
    noise(root / "train_numf", NAMES[3], shape=(40, 32))


def spoil_tiny(root: Path) -> None:
    noise(root / "test_numf", "15_t0_0_0", shape=(15, 32))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_empty, ["15_s0_0_0.png: ", "0 bytes", "copy"]),
        (spoil_size, ["gt/15_t0_0_0.png: ", "32x30", "32x32"]),
        (spoil_class, ["gt/15_s0_0_0.png: ", "value 7", "0..3", "--num_classes"]),
        (spoil_colour, ["gt/15_t0_0_0.png: ", "coloured"]),
        (spoil_mask, ["img/30_t1_0_0.png: ", "no mask", "30_t1_0_0.jpg", "gt/30_t1_0_0.png"]),
        (spoil_folder, ["sup_num1_0/img: ", "no such folder", "--repeats"]),
        (spoil_images, ["test_numf/img: ", "no image", "a_b.gif", "put the test images"]),
        (spoil_twin, ["train_numf/img: ", "15_s0_0_0.bmp, 15_s0_0_0.png", "rename"]),
        (spoil_shape, [f"{NAMES[3]}.png: ", "32x40", "32x32", "--image_size N", "32"]),
        (spoil_tiny, ["15_t0_0_0.png: ", "32x15", "16"]),
    ],
)
def test_each_problem_is_one_line_with_file_and_cure(root, spoil, parts):
    spoil(root)
    with pytest.raises(DataError) as caught:
        check(root)
    message = str(caught.value).replace(os.sep, "/")
    assert "\n" not in message and message.startswith(str(root).replace(os.sep, "/"))
    assert [part for part in parts if part not in message] == []


def test_all_problems_are_listed_at_once(root):
    for spoil in (spoil_empty, spoil_class, spoil_mask):
        spoil(root)
    with pytest.raises(DataError) as caught:
        check(root)
    assert len(str(caught.value).splitlines()) == 3


def test_long_lists_are_cut(root):
    for number in range(40):
        noise(root / "test_numf", f"9_x{number}_0_0", mask=False)
    with pytest.raises(DataError) as caught:
        check(root)
    lines = str(caught.value).splitlines()
    assert len(lines) == 31 and lines[-1] == "and 10 more"


def test_different_sizes_matter_only_within_a_batch(root):
    noise(root / "test_numf", "15_t0_0_0", shape=(40, 32))
    check(root)
    noise(root / "sup_num5_0", NAMES[0], shape=(40, 32))
    with pytest.raises(DataError, match="sup_num5_0 has 32x32 too.*--image_size"):
        check(root, stages=("fine",), sizes="5")
    check(root, stages=("fine",), sizes="5", single=True)
    check(root, stages=("fine",), sizes="5", image_size=24)
    noise(root / "sup_num1_0", NAMES[0], shape=(40, 32))
    check(root, stages=("fine",))
    with pytest.raises(DataError, match="pretraining"):
        check(root)
    check(root, needs_annotated=False)


def test_only_what_a_run_needs_is_read(root):
    shutil.rmtree(root / "train_numf" / "gt")
    shutil.rmtree(root / "test_numf")
    check(root, stages=("self",))
    shutil.rmtree(root / "sup_num1_0")
    check(root, stages=("self",), needs_annotated=False)
    shutil.rmtree(root / "train_numf")
    with pytest.raises(DataError, match="train_numf"):
        check(root, stages=("self",), needs_annotated=False)
    with pytest.raises(DataError, match="train_unlabelled.*--use_unlabelled"):
        check(root, stages=("self",), use_unlabelled=True)


def test_warnings(root):
    noise(root / "train_numf", "plain")
    noise(root / "train_numf", "other")
    (root / "train_numf" / "img" / "scan.gif").write_bytes(b"x")
    noise(root / "sup_num1_0", NAMES[0], classes=2)
    for name in ("15_t0_0_0", "30_t1_0_0", "30_t2_0_0"):
        noise(root / "test_numf", name, classes=3)
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "test_numf/gt/lonely.png")
    warnings = check(root).warnings
    expected = [
        ("scan.gif", "left out"),
        ("sup_num1_0", "class 2, 3 does not occur"),
        ("lonely.png", "without an image"),
        ("test_numf", "class 3 does not occur"),
        ("other.png", "2 file name(s) without a production batch"),
    ]
    assert len(warnings) == len(expected)
    for line, parts in zip(warnings, expected, strict=True):
        assert all(part in line for part in parts) and "\n" not in line
    assert len(check(root, self_mode_needs_groups=False).warnings) == 4


def test_names_of_one_batch_alone_are_warned_about(root):
    """PSCL-MoCo would take every image for a positive of all others."""
    for path in sorted(root.rglob("*_*_*_*.*")):
        path.rename(path.with_name("NEU_" + path.name.split("_", 1)[1]))
    (line,) = check(root).warnings
    assert "all 7 images" in line and "the same, 'NEU'" in line and "--batches none" in line
    assert check(root, self_mode_needs_groups=False).warnings == ()


def test_missing_set_says_how_to_lay_one_out(tmp_path):
    with pytest.raises(DataError) as caught:
        check(tmp_path / "nowhere")
    for part in ("nowhere: no such folder", "--data_dir", "sup_num1_0", "train_defect.py"):
        assert part in str(caught.value)
    with pytest.raises(DataError) as caught:
        check(tmp_path / "dataset" / "aluminum")
    for part in ("paper's set", "376x376", "academic", "authors", "sup_num1_0", "train_defect.py"):
        assert part in str(caught.value)


@pytest.mark.skipif("PSCL_DATA" not in os.environ, reason="PSCL_DATA names no folder of real sets")
@pytest.mark.parametrize("name", ["uhcs", "neuseg", "metaldam", "superalloy", "ebc"])
def test_real_sets_pass_the_check(name):
    root = Path(os.environ["PSCL_DATA"]) / name
    if not root.is_dir():
        pytest.skip(f"PSCL_DATA has no {name}")
    classes = {"metaldam": 5, "superalloy": 3, "ebc": 3}.get(name, 4)
    report = check(root, num_classes=classes, sizes="15", repeats="012")
    for sample in find_split(root, "train_numf"):
        assert report.store.image(sample.image).shape[0] == 1  # all of them are gray
        assert sample.batch


def test_fewer_choices_of_the_annotated_image_than_usual_are_announced(root):
    shutil.rmtree(root / "sup_num1_1")
    shutil.copytree(root / "sup_num1_0", root / "sup_num1_3")
    warned = check_data(root, num_classes=4, repeats=None).warnings
    assert any("2 of the 5 folders sup_num1_0 ... sup_num1_4 are there" in line for line in warned)


def test_problems_are_collected_and_refused_together():
    problems = Problems()
    for number in range(3):
        with problems.collect():
            raise DataError(f"file {number % 2}: wrong\nfile {number % 2}: cut short")
    with pytest.raises(DataError) as caught:
        problems.refuse()
    assert str(caught.value).splitlines() == [
        "file 0: wrong",
        "file 0: cut short",
        "file 1: wrong",
        "file 1: cut short",
    ]
    Problems().refuse()  # without any nothing happens
    with pytest.raises(ValueError, match="ours"), problems.collect():
        raise ValueError("a fault of ours is no problem of the user's")


@pytest.mark.parametrize(
    ("stage", "read"),
    [
        ("self", ["train_numf", "train_unlabelled", "sup_num1_0"]),
        ("fine", ["sup_num1_0", "test_numf"]),
        ("sup", ["sup_num1_0", "test_numf"]),
    ],
)
def test_each_stage_names_the_sub_folders_that_it_does_not_read(
    tmp_path: Path, stage: str, read: list[str]
) -> None:
    root = noise_set(tmp_path)
    shutil.copytree(root / "train_numf" / "img", root / "train_unlabelled" / "img")
    splits = ["train_numf", "train_unlabelled", "sup_num1_0", "test_numf"]
    for split in splits:
        (root / split / "img" / "more").mkdir()
        image = next((root / split / "img").glob("*.png"))
        shutil.copy(image, root / split / "img" / "more" / f"{split}.png")
    warnings = check_data(root, num_classes=4, stages=[stage], use_unlabelled=True).warnings
    named = [line.partition("/img/more: sub-folder with 1 image(s), left out")[0]
             for line in warnings if "/img/more: sub-folder" in line]  # fmt: skip
    assert sorted(named) == sorted(str(root / split) for split in read)
