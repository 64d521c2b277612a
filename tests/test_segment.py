"""segment.py from a user's folder to the report: small pictures, few steps, a plan made by hand."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import html
import json
import math
import os
import re
import shlex
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import segment
import segmentation.job
from annotation.files import read_annotation
from imaging.data_bar import Bar
from metallography.scales import NOT_GIVEN
from presets import ROBUST
from segmentation import blocks
from segmentation.answers import Answers
from segmentation.comparison import Comparison
from segmentation.demo.micrographs import draw_micrograph
from segmentation.intake import read
from segmentation.learning import Learning
from segmentation.predictors import AnswerFolder
from segmentation.schedule import Schedule
from tests.test_annotations import roi, roi_set
from tests.trained_model import rows_of

SIDE, IMAGES = 48, 4


def few_steps(
    learning: Learning, asked: dict[str, Any], steps: int = 2, epochs: int = 0
) -> Schedule:
    """A plan that takes a second."""
    seconds = {"fine-tuning": 1.0}
    folds = [[0], [1], [2], [3]]
    return Schedule(asked, steps, steps, folds, epochs, epochs, {}, 1, [1, 1], seconds, ["by hand"])


def draw(root: Path) -> None:
    """Four images in a folder with a sub-folder, and masks in colours, one where it is given."""
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 0)], np.uint8)
    for number in range(IMAGES):
        image, mask = draw_micrograph(np.random.default_rng(number), SIDE)
        folder = root / "raw" / ("sample b" if number == 3 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"é{number}.png")
        (root / "truth").mkdir(exist_ok=True)
        Image.fromarray(colours[mask]).save(root / "truth" / f"é{number}.png")
    shutil.copy(root / "truth" / "é0.png", root / "é0_mask.png")


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Work that takes no time: a plan of two steps, little networks, few trees."""
    patch.setattr(segmentation.job, "make_schedule", few_steps)
    patch.setattr("stages.forest.QUICK", (3, 5))
    patch.setattr("stages.finetuning.STATISTICS_BATCHES", 2)
    patch.setitem(ROBUST, "channels", (4, 8, 16, 32))
    patch.setitem(ROBUST, "fine_batch_size", 2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``raw``, ``truth`` and a mask, in which work takes no time."""
    draw(tmp_path)
    shorten(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder after the job; copy it before changing it."""
    root = tmp_path_factory.mktemp("finished")
    draw(root)
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.chdir(root)
        assert run(root) == 0
    return root


@pytest.fixture
def done(finished: Path, place: Path) -> Path:
    """``place`` after the job."""
    shutil.copytree(finished / "out", place / "out")
    return place


def run(place: Path, *words: str, masks: tuple[str, ...] = ("é0_mask.png",)) -> int:
    given = ["--images", "raw", "--masks", *masks, "--out", "out", "--device", "cpu"]
    return segment.main([*given, "--threads", "1", *words])


def read_in(place: Path, *words: str, masks: tuple[str, ...]) -> None:
    """The job as far as the labels: what is learnt from them is not computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation.job.Work, "run", lambda work: None)
        run(place, *words, masks=masks)


def ids(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_from_a_folder_and_one_mask_to_a_report(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(place / "raw") | hashes(place / "truth")
    assert run(place, "--outlines", "roi", "--sample", "Steel 42", "--particles") == 0
    out = place / "out"
    for name in ("é0", "é1", "é2", "sample b/é3"):
        assert ids(out / "classes" / f"{name}.png").shape == (SIDE, SIDE)
        assert (out / "overlay" / f"{name}.png").is_file()
    for name in ("report.html", "measurements.csv", "doubt.csv", "summary.md"):
        assert (out / name).stat().st_size
    said = capsys.readouterr().out
    lines = said.splitlines()
    plan = next(i for i, line in enumerate(lines) if line.startswith("Plan for 20 minutes"))
    first = next(i for i, line in enumerate(lines) if line.startswith("First answer"))
    assert plan < first < len(lines) - 1 and "Epoch:" not in said
    assert "within the annotated image" in said and "There is no score on other images" in said
    counts = np.bincount(ids(out / "set" / "sup_numf" / "gt" / "é0.png").ravel(), minlength=4)
    each = ", ".join(f"class {c} {count}" for c, count in enumerate(counts))
    assert f"Labelled: {SIDE * SIDE} pixels, 100.0% of them: {each}" in lines
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "on held-out blocks" in summary and "First look" not in summary
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Within the annotated image:" in page and "test set" not in page and "Steel 42" in page
    before_images, _, rest = page.partition('<h2 id="images">')
    assert before_images.count("on held-out blocks of the annotated image") == 1
    made = rest.partition('<h2 id="how">')[2]
    assert "Within the annotated image:" in made and "Within the annotated" not in before_images
    for words in ("Dice on held-out blocks, by how much", "The last quarter learnt"):
        assert words in made and page.count(words) == 1 and words in said
    for text in (said, page):  # no network, no file of one, and that is said
        assert ("model.pt is not written" in text) != (out / "model.pt").is_file()
    names = [f"class {c}" for c in range(4)]
    for name in ("é0", "sample b/é3"):
        drawn = read_annotation(out / "outlines" / f"{name}.zip", (SIDE, SIDE), names)
        assert (drawn == ids(out / "classes" / f"{name}.png")).all()
    with zipfile.ZipFile(out / "measurements.xlsx") as book:
        sheets = re.findall(r'sheet name="([a-z]+)"', book.read("xl/workbook.xml").decode())
        cells = re.findall(r"<t>([^<]*)</t>", book.read("xl/worksheets/sheet2.xml").decode())
    assert sheets == ["about", "measurements", "particles", "sizes", "phases", "doubt"]
    listed = rows_of(out / "particles.csv")
    sized = [row for row in rows_of(out / "sizes.csv") if row["particles_whole"]]
    whole = sum(row["cut_by_frame"] == "0" for row in listed)
    assert listed and whole == sum(int(row["particles_whole"]) for row in sized)
    head = json.loads((out / "summary.json").read_text(encoding="utf-8"))["head"]
    assert head["Program"].startswith("segment.py of ") and head["Sample"] == "Steel 42"
    assert "--outlines roi --particles" in head["Options"]
    assert not (out / "batches.csv").exists()  # no file name tells a batch
    assert cells.count("annotated") == 1 and cells.count("yes") == 4  # a row for each class
    # The user's labels stand in the class map of the annotated image: colours from dark to bright.
    colours = {(0, 0, 0): 0, (0, 0, 255): 1, (255, 0, 0): 2, (255, 255, 0): 3}
    truth = [[colours[tuple(p)] for p in row] for row in ids(place / "é0_mask.png").tolist()]
    assert (ids(out / "classes" / "é0.png") == np.array(truth)).all()
    assert hashes(place / "raw") | hashes(place / "truth") == before


def test_names_and_colours_of_a_coloured_mask_are_on_the_page(done: Path, capsys) -> None:
    assert run(done, "--class_names", "matrix,carbide,pore,net") == 0
    said = "Names in the order of the colours, dark to bright: matrix = black (0,0,0)"
    page = html.unescape((done / "out/report.html").read_text(encoding="utf-8"))
    for text in (capsys.readouterr().out, page, (done / "out/summary.md").read_text()):
        assert said in text
    assert all(colour in page.lower() for colour in ("#333333", "#0000ff", "#ff0000", "#ffff00"))
    for path in (done / "out/overlay").rglob("*.png"):
        assert {(0, 0, 255), (255, 255, 0)} <= {*map(tuple, ids(path).reshape(-1, 3).tolist())}
    if (done / "out/model.pt").exists():
        colours = torch.load(done / "out/model.pt")["settings"]["class_colours"]
        assert colours == ["333333", "0000ff", "ff0000", "ffff00"]


def test_every_page_is_an_image_and_a_mask_of_one_page_is_the_first_ones(place: Path) -> None:
    pages = [Image.open(path).copy() for path in sorted((place / "raw").glob("*.png"))]
    for path in (place / "raw").rglob("*.png"):
        path.unlink()
    pages[0].save(place / "raw" / "é0.tif", save_all=True, append_images=pages[1:])
    request = segment.request_of(
        segment.parser().parse_args(["--images", "raw", "--masks", "é0_mask.png", "--out", "out"])
    )
    found = read(request)
    assert [p.name for p in found.pictures] == ["é0-p1", "é0-p2", "é0-p3"]
    assert [p.name for p in found.annotated] == ["é0-p1"]
    assert {p.source for p in found.pictures} == {Path("raw/é0.tif")}
    for picture, page in zip(found.pictures, pages, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(picture.file)), np.asarray(page))
    assert read(request) == found  # as it was laid out


@pytest.mark.parametrize(
    ("masks", "more"),
    [
        ({"m/é0-p2.png": 2}, []),
        ({"m/é0-p2.png": 2}, ["--mask_pattern", "{stem}-p2.png"]),
        ({"m/É0-P2.PNG": 2}, []),
        ({"é0-p3_mask.png": 3}, []),
        ({"m/é0.png": 1, "m/é0-p3.png": 3}, []),
        ({"m/é0_mask.png": 1, "m/é0-p2_mask.png": 2}, ["--mask_pattern", "{stem}_mask.png"]),
    ],
)
def test_masks_of_single_pages(place: Path, masks: dict[str, int], more: list[str]) -> None:
    pages = [Image.open(path).copy() for path in sorted((place / "raw").glob("*.png"))]
    for path in (place / "raw").rglob("*.png"):
        path.unlink()
    pages[0].save(place / "raw" / "é0.tif", save_all=True, append_images=pages[1:])
    truth = ids(place / "é0_mask.png")
    (place / "m").mkdir()
    for name, number in masks.items():
        Image.fromarray(np.roll(truth, number, axis=0)).save(place / name)
    given = sorted({name.split("/")[0] for name in masks})
    request = segment.request_of(
        segment.parser().parse_args(["--images", "raw", "--masks", *given, "--out", "out", *more])
    )
    found = read(request)
    assert [p.name for p in found.annotated] == [f"é0-p{n}" for n in sorted(masks.values())]
    for picture, number in zip(found.annotated, sorted(masks.values()), strict=True):
        assert picture.labels is not None
        labels, drawn = ids(picture.labels), np.roll(truth, number, axis=0)
        pairs = np.concatenate([drawn.reshape(-1, drawn.shape[-1]), labels.reshape(-1, 1)], axis=1)
        assert len(np.unique(pairs, axis=0)) == len(np.unique(labels))  # one class, one colour


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"é0.png": 1, "é0-p1.png": 1}, "both are of page 1; remove one"),
        ({"é0.tif": 3, "é0-p2.png": 1}, "both are of page 2; remove one"),
        ({"é0-p2.tif": 3}, "3 pages in a mask of page 2; save that page alone"),
    ],
)
def test_two_masks_of_one_page_are_refused(
    place: Path, names: dict[str, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [Image.open(path).copy() for path in sorted((place / "raw").glob("*.png"))][:3]
    for path in (place / "raw").rglob("*.png"):
        path.unlink()
    pages[0].save(place / "raw" / "é0.tif", save_all=True, append_images=pages[1:])
    (place / "m").mkdir()
    mask = Image.open(place / "é0_mask.png").convert("L")
    for name, number in names.items():
        more = {"save_all": True, "append_images": [mask] * (number - 1)} if number > 1 else {}
        mask.save(place / "m" / name, **more)
    assert segment.main(["--images", "raw", "--masks", "m", "--out", "out"]) == 2
    assert said in capsys.readouterr().err


def test_masks_of_pages_may_lie_beside_their_image(place: Path) -> None:
    pages = [Image.open(path).copy() for path in sorted((place / "raw").glob("*.png"))][:3]
    for path in (place / "raw").rglob("*.png"):
        path.unlink()
    pages[0].save(place / "raw" / "é0.tif", save_all=True, append_images=pages[1:])
    shutil.copy(place / "é0_mask.png", place / "raw" / "é0-p2.png")
    words = ["--images", "raw", "--masks", "raw", "--out", "out"]
    found = read(segment.request_of(segment.parser().parse_args(words)))
    assert [p.name for p in found.pictures] == ["é0-p1", "é0-p2", "é0-p3"]
    assert [p.name for p in found.annotated] == ["é0-p2"]


def test_a_mask_of_a_page_that_is_not_there_is_refused(place: Path, capsys) -> None:
    pages = [Image.open(path).copy() for path in sorted((place / "raw").glob("*.png"))][:3]
    pages[0].save(place / "raw" / "é0.tif", save_all=True, append_images=pages[1:])
    for path in (place / "raw").rglob("*.png"):
        path.unlink()
    (place / "m").mkdir()
    shutil.copy(place / "é0_mask.png", place / "m" / "é0-p7.png")
    words = ["--images", "raw", "--masks", "m", "--out", "out"]
    assert segment.main(words) == 2
    assert "(there is é0-p7.png)" in capsys.readouterr().err
    assert segment.main([*words, "--mask_pattern", "{stem}-p7.png"]) == 2
    said = capsys.readouterr().err
    assert "a mask of page 7; raw/é0.tif has the pages 1, 2, 3" in said


def test_the_same_command_again_changes_nothing_and_a_kill_is_made_good(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place) == 0
    whole = hashes(place / "out")
    assert "\nPlan for 20 minutes" in capsys.readouterr().out
    assert run(place) == 0
    same, said = hashes(place / "out"), capsys.readouterr().out
    assert same == whole and "Going on" not in said
    assert "Everything is trained" in said and "Plan" not in said
    shutil.rmtree(place / "out")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # Each time a little further: the first answer is made and published, then the final one.
    for stop in ("predict", "publish", "compare", "final", "predict", "publish"):
        owner = segmentation.job.Answers if stop == "publish" else segmentation.job.Work
        with monkeypatch.context() as patch:
            patch.setattr(owner, stop, killed)
            assert run(place) == 130
    assert "Going on: an earlier run of this round was stopped" in capsys.readouterr().out
    assert run(place) == 0
    classes = {n[8:]: h for n, h in whole.items() if n.startswith("classes/")}
    assert hashes(place / "out" / "classes") == classes


def forest_alone(patch: pytest.MonkeyPatch, reduce: Sequence[int]) -> list[str]:
    """Have the pixel classifier answer alone; returns a list that gets an entry per prediction."""

    def plan(learning: Learning, asked: dict[str, Any]) -> Schedule:
        return dataclasses.replace(few_steps(learning, asked, steps=0), reduce=list(reduce))

    asked, predict = list[str](), AnswerFolder.predict

    def counted(folder: AnswerFolder, item: Any, image: Any) -> Any:
        asked.append(item.name)
        return predict(folder, item, image)

    patch.setattr(segmentation.job, "make_schedule", plan)
    patch.setattr(AnswerFolder, "predict", counted)
    return asked


@pytest.mark.slow
def test_an_answer_that_is_the_first_one_is_taken_over_and_equal_to_the_byte(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = forest_alone(monkeypatch, (2, 2)), []
    out = place / "out"
    for shortcut in (False, True):
        with monkeypatch.context() as patch:
            if not shortcut:
                patch.setattr(segmentation.job, "take_over", lambda *_: None)
            asked.clear()
            assert run(place) == 0
        assert len(asked) == (IMAGES if shortcut else 2 * IMAGES)
        found.append(hashes(out))
        if not shortcut:  # but for the images, which have times of their own in the records
            (out / "set").rename(place / "set")
            shutil.rmtree(out)
            out.mkdir()
            (place / "set").rename(out / "set")
    assert found[0] == found[1] and "training/answers/round_1/predicted.jsonl" in found[0]
    # A correction is a new round, of which nothing is known before.
    path = out / "classes" / "é1.png"
    corrected = (ids(path) + 1) % 4
    Image.fromarray(corrected).save(path)
    asked.clear()
    assert run(place) == 0
    assert len(asked) == IMAGES and (ids(path) == corrected).all()
    assert hashes(out)["classes/é2.png"] != found[1]["classes/é2.png"]


@pytest.mark.slow
def test_an_answer_that_was_taken_over_in_part_is_completed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = forest_alone(monkeypatch, (1, 1))
    assert run(place) == 0
    whole = hashes(place / "out")
    copy, copied = shutil.copyfile, []

    def killed(source: Path, target: Path) -> None:
        copied.append(source)
        if "first" in source.parts and len(copied) == 7:
            raise KeyboardInterrupt
        copy(source, target)

    shutil.rmtree(place / "out")
    with monkeypatch.context() as patch:
        patch.setattr(segmentation.job.Work, "answer", killed_at_once)
        assert run(place) == 130
    first = place / "out" / "training" / "answers" / "first"
    with monkeypatch.context() as patch:
        patch.setattr("segmentation.predictors.shutil.copyfile", killed)
        assert run(place) == 130
    assert copied and not (first.parent / "round_1" / "predicted.jsonl").exists()
    # What somebody changed or removed in the first answer since is predicted.
    path = first / "classes" / "é1.png"
    Image.fromarray((ids(path) + 1) % 4).save(path)
    (first / "doubt" / "é2.png").unlink()
    asked.clear()
    assert run(place) == 0
    assert sorted(asked) == ["é1", "é2"]
    now = hashes(place / "out")
    published = ("classes", "overlay", "doubt.csv", "measurements.csv")
    shown = {name for name in whole if name.split("/")[0] in published}
    assert len(shown) == 2 * IMAGES + 2
    assert all(now[name] == whole[name] for name in shown)


def killed_at_once(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [(2, 1), (1, 2)])
def test_an_answer_of_images_reduced_otherwise_is_predicted(
    place: Path, monkeypatch: pytest.MonkeyPatch, reduce: tuple[int, int]
) -> None:
    asked = forest_alone(monkeypatch, reduce)
    assert run(place) == 0
    assert len(asked) == 2 * IMAGES


def test_torchrun_is_refused_in_a_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run(place) == 2 and not (place / "out").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "without torchrun" in said


def test_a_set_that_a_kill_left_nowhere_is_put_back_and_what_it_left_removed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill between the two renames leaves it; ``--crop`` is remembered in the set alone."""
    masks, out = ("é0_mask.png",), place / "out"
    read_in(place, "--crop", "0,8,0,0", masks=masks)
    left = [out / ".set.pscl-x.1.abcdefgh/new", out / ".set-masks-abcdefgh", out / "classes/b"]
    for folder in left:
        folder.mkdir(parents=True)
    (out / "set").rename(out / ".set.pscl-x.1.abcdefgh/old")
    for path in (out / ".answer.json.12.tmp", out / "classes/b/.a.png.345.tmp"):
        path.write_text("half")
    capsys.readouterr()
    read_in(place, masks=masks)
    assert "--crop 0,8,0,0, as an earlier run was told" in capsys.readouterr().out
    assert ids(out / "set/sup_numf/gt/é0.png").shape == (SIDE - 8, SIDE)
    hidden = {path.name for path in out.rglob(".*")}
    assert hidden <= {".lock"}, hidden


def test_the_first_answer_says_that_nothing_was_checked_until_something_was(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def page() -> str:
        return (place / "out" / "report.html").read_text(encoding="utf-8")

    def summary() -> str:
        return (place / "out" / "summary.md").read_text(encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation.job.Work, "compare", killed)
        assert run(place) == 130
    assert "Nothing has been checked yet" in page() and "No warnings" not in page()
    assert "First look" in summary() and "Nothing has been checked yet" in summary()
    assert (place / "out" / "measurements.xlsx").is_file()
    assert "é0.png (annotated)" in page() and "1 of 4 images is annotated" in page()
    shutil.rmtree(place / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "pretrained", killed)
        assert run(place) == 130
    assert "Checked since: Dice" in page() and "Nothing has been checked" not in page()
    assert "Checked since: Dice" in summary() and "Nothing has been checked" not in summary()
    assert "First look" in summary()
    assert "First answer checked on held-out blocks: Dice" in capsys.readouterr().out


def test_what_masks_may_mean_otherwise_is_a_warning_of_the_page(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbered = np.zeros((SIDE, SIDE), np.uint8)
    for number in range(1, 4):
        numbered[4:20, 12 * number : 12 * number + 8] = number
    Image.fromarray(numbered).save(place / "é0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation.job.Work, "compare", lambda work: sys.exit(0))
        with pytest.raises(SystemExit):
            run(place, masks=("é0.png",))
    page = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert '<p class="warn">' in page and page.count("number particles of one phase") == 1
    said = capsys.readouterr().out
    assert "Warning: " in said and "--mask_kind particles" in said


def test_a_corrected_class_map_is_a_mask_from_then_on_and_is_never_lost(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = done / "out" / "classes" / "é1.png"
    corrected = ids(path).copy()
    old = corrected[:10, :10].copy()
    corrected[:10, :10] = 3
    Image.fromarray(corrected).save(path)
    assert run(done) == 0
    said = capsys.readouterr().out
    assert f"é1: {(old != 3).sum()} of {SIDE * SIDE} labelled pixels differ" in said
    assert "Round 2: labels of 2 image(s)" in said and "answer before" in said
    assert "while this run went on" not in said
    laid = hashes(done / "out" / "set")
    assert run(done) == 0 and hashes(done / "out" / "set") == laid  # read once, kept, and known
    assert "while this run went on" not in capsys.readouterr().out
    assert (ids(path)[:10, :10] == 3).all() and (ids(path) == corrected).all()
    assert (ids(done / "out" / "corrected" / "é1.png") == corrected).all()
    page = (done / "out" / "report.html").read_text(encoding="utf-8")
    assert "What changed" in page and "Labels that are new" in page
    shutil.rmtree(done / "out" / "corrected")  # taken back: who learnt it cannot answer any more
    assert run(done) == 0
    said = capsys.readouterr().out
    assert "not learnt from: labels of é1" in said
    (_, _, last) = json.loads((done / "out" / "rounds.json").read_text(encoding="utf-8"))
    assert last["method"] == 3 and "answer before" not in last["scores"]


def test_more_masks_in_another_form_mean_the_same_classes(done: Path) -> None:
    more = done / "more"
    more.mkdir()
    # Two of the four colours only: numbered by themselves they would be 0 and 1.
    image = ids(done / "truth" / "é1.png").copy()
    image[(image == (0, 0, 255)).all(axis=2) | (image == (0, 0, 0)).all(axis=2)] = (255, 0, 0)
    Image.fromarray(image).save(more / "é1.png")
    plain = np.zeros((SIDE, SIDE), np.uint8)
    plain[:, 24:] = 2
    (done / "even more").mkdir()
    Image.fromarray(plain).save(done / "even more" / "é2.png")
    assert run(done, masks=("é0_mask.png", "more", "even more")) == 0
    assert set(np.unique(ids(done / "out" / "classes" / "é1.png")).tolist()) <= {2, 3}
    assert (ids(done / "out" / "classes" / "é2.png") == plain).all()


def test_outlines_bring_the_names_of_their_classes(place: Path) -> None:
    """A name may hold a comma: it is one all the same, to the network's file."""
    shapes = [
        {"label": name, "shape_type": "rectangle", "points": [[x, x], [x + 12, x + 9]]}
        for name, x in (("pore", 4), ("M/A, blocky", 24))
    ]
    about = {"imageHeight": SIDE, "imageWidth": SIDE, "imagePath": "é0.png"}
    (place / "é0.json").write_text(json.dumps({**about, "shapes": shapes}), encoding="utf-8")
    assert run(place, masks=("é0.json",)) == 0
    labels = ids(place / "out" / "classes" / "é0.png")
    assert (labels[30, 30], labels[8, 8], labels[0, 0]) == (1, 2, 0)  # M/A, pore, the rest
    with (place / "out" / "measurements.csv").open(encoding="utf-8", newline="") as file:
        found = Counter((row["class"], row["class_name"]) for row in csv.DictReader(file))
    own = ("0", "background"), ("1", "M/A, blocky"), ("2", "pore")
    assert found == dict.fromkeys(own, IMAGES)
    read_in(place, "--class_names", 'steel,"M/A, blocky", pore', masks=("é0.json",))
    record = json.loads((place / "out" / "set" / "record.json").read_text(encoding="utf-8"))
    assert record["class_names"] == ["steel", "M/A, blocky", "pore"]


def test_unlabelled_pixels_are_predicted_and_log_page_and_summary_warn_alike(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.full((SIDE, SIDE), 255, np.uint8)
    mask[:, :14] = 0
    mask[:, 14:20] = 1
    Image.fromarray(mask).save(place / "é0.png")
    assert run(place, masks=("é0.png",)) == 0
    found = ids(place / "out" / "classes" / "é0.png")
    assert (found[:, :20] == mask[:, :20]).all() and found.max() == 1
    log, out = capsys.readouterr().out, place / "out"
    said = log[log.index(" images segmented by the ") :].splitlines()
    told = [line.removeprefix("Warning: ") for line in said if line.startswith("Warning: ")]
    (far,) = (line for line in told if "far from any label" in line)
    assert far.startswith("é0.png: ") and any(line.startswith("Only ") for line in told)
    summary = (out / "summary.md").read_text(encoding="utf-8").splitlines()
    assert [f"- Warning: {line}" for line in told] == [s for s in summary if "- Warning: " in s]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('class="warn"') == len(told)
    shown = html.unescape(page)
    assert all(f'<p class="warn">{line}' in shown for line in told)


@pytest.mark.parametrize(
    ("words", "masks", "parts"),
    [
        (["--images", "nowhere"], ("é0_mask.png",), ["nowhere", "--images"]),
        ([], ("no.png",), ["no.png", "no such file", "--masks"]),
        ([], ("strange.png",), ["strange.png", "no image", "name the mask as its image"]),
        ([], ("raw/é1.png",), ["raw/é1.png", "image of raw itself", "é1_mask.png"]),
        (["--images", "empty"], ("é0_mask.png",), ["empty: no image in it", "another --images"]),
        ([], ("two",), ["é1.png: 2 masks (é1.png and é1_mask.png in two)", "{stem}_mask.png"]),
        (["--out", "raw"], ("é0_mask.png",), ["--out", "raw"]),
        (["--out", "."], ("é0_mask.png",), ["--out", "--images"]),
        (["--out", "truth"], ("é0_mask.png",), ["truth: holds other files"]),
        (["--minutes", "0"], ("é0_mask.png",), ["--minutes", "0"]),
        (["--um_per_px", "-1"], ("é0_mask.png",), ["--um_per_px"]),
        (["--class_names", "a,b"], ("é0_mask.png",), ["--class_names", "2 names", "4 classes"]),
        (["--demo"], ("é0_mask.png",), ["--demo: brings its own images and mask", "--masks out"]),
        (["--palette", "0=x"], ("é0_mask.png",), ["--palette: '0=x' is not id=gray"]),
        (["--tolerance", "-1"], ("é0_mask.png",), ["--tolerance -1: give 0 or more"]),
        (["--mask_pattern", "x"], ("é0_mask.png",), ["--mask_pattern 'x': give {stem}"]),
        (["--device", "cuda:77"], ("é0_mask.png",), ["device"]),
    ],
)
def test_bad_input_is_one_line_and_harms_nothing(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    masks: tuple[str, ...],
    parts: list[str],
) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(place / "strange.png")
    (place / "empty").mkdir()
    (place / "two").mkdir()
    for name in ("é1.png", "é1_mask.png"):
        shutil.copy(place / "truth" / "é1.png", place / "two" / name)
    before = hashes(place / "raw") | hashes(place / "truth")
    assert run(place, *words, masks=masks) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and [p for p in parts if p not in err] == [], err
    assert "Traceback" not in err
    assert hashes(place / "raw") | hashes(place / "truth") == before


@pytest.mark.parametrize("words", [["--images", "raw"], ["--masks", "m.png"]])
def test_the_demo_takes_neither_images_nor_masks(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert segment.main(["--demo", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--demo: brings its own images and mask; leave --images and --masks out")


def test_a_corrected_map_that_is_no_class_map_is_refused(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = done / "out" / "classes" / "é1.png"
    published = path.read_bytes()
    Image.fromarray(np.full((SIDE, SIDE), 9, np.uint8)).save(path)
    assert run(done) == 2
    err = capsys.readouterr().err
    assert "value 9" in err and "0..3" in err and (ids(path) == 9).all()
    assert str(Path("out", "classes", "é1.png")) in err and not (done / "out/corrected").exists()
    Image.fromarray(np.zeros((SIDE, SIDE + 1), np.uint8)).save(path)
    assert run(done) == 2
    err = capsys.readouterr().err
    assert str(Path("out", "classes", "é1.png")) in err and f"{SIDE + 1}x{SIDE}" in err
    path.write_bytes(published)
    kept = done / "out" / "corrected" / "é1.png"  # as if its image had been another one
    kept.parent.mkdir()
    Image.fromarray(np.zeros((SIDE, SIDE + 1), np.uint8)).save(kept)
    assert run(done) == 2
    assert f"{Path('out', 'corrected', 'é1.png')}: {SIDE + 1}x{SIDE}, its image is" in (
        err := capsys.readouterr().err
    )
    assert err.endswith("; delete it\n")
    shutil.rmtree(kept.parent)
    Image.fromarray(ids(path)).save(path.with_suffix(".jpg"))
    read_in(done, masks=("é0_mask.png",))  # what was put back is no correction
    assert [p.name for p in (done / "out" / "set" / "sup_numf" / "gt").iterdir()] == ["é0.png"]
    (line,) = (t for t in capsys.readouterr().out.splitlines() if t.startswith("Warning: out"))
    assert "é1.jpg: not taken" in line and "save it as out/classes/é1.png" in line


def test_the_answer_that_does_better_on_held_out_blocks_is_kept(done: Path) -> None:
    (found,) = json.loads((done / "out" / "rounds.json").read_text(encoding="utf-8"))
    counts = {name: np.array(own).sum(axis=0) for name, own in found["scores"].items()}
    dice = {
        name: np.mean([2 * c[k, k] / (c[k].sum() + c[:, k].sum()) for k in (1, 2, 3) if c[k].sum()])
        for name, c in counts.items()
    }
    assert set(dice) == {"network", "pixel classifier"}
    assert found["kept"] == max(dice, key=lambda name: dice[name])
    answer = json.loads((done / "out" / "answer.json").read_text(encoding="utf-8"))
    assert answer["by"] == found["kept"]


def test_without_a_terminal_the_progress_is_a_line_now_and_then(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.log.SECONDS_BETWEEN_LINES", 0.0)
    assert run(place) == 0
    err = capsys.readouterr().err
    assert re.search(r"^[A-Z][\w ,]+: \d+ of \d+, [\d:]+ left$", err, re.MULTILINE)


def paint(place: Path, name: str, values: Sequence[Any]) -> str:
    """A mask of image ``name``: bands of equal height, a value each."""
    bands = np.repeat(np.array(values, np.uint8), SIDE // len(values), axis=0)
    pixels = np.repeat(bands[:, None], SIDE, axis=1)
    (place / "more" / name).mkdir(parents=True, exist_ok=True)
    path = place / "more" / name / f"é{name}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def learnt(place: Path, name: str) -> list[int]:
    """The class of each band (three to four) in the labels that are learnt."""
    mask = ids(place / "out" / "set" / "sup_numf" / "gt" / f"é{name}.png")
    return list(dict.fromkeys(mask[:, 0].tolist()))


RED, BLUE, BLACK = (255, 0, 0), (0, 0, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 255], [0, 128, 255], ([0, 1], [0, 2, 1])),
        ([BLACK, RED], [BLACK, BLUE], ([0, 1], [0, 2])),
        ([BLACK, RED], [BLUE, RED], ([0, 1], [2, 1])),
    ],
)
def test_several_masks_have_one_meaning(
    place: Path, first: list[Any], second: list[Any], expected: tuple[list[int], list[int]]
) -> None:
    masks = paint(place, "1", first), paint(place, "2", second)
    read_in(place, masks=masks)
    assert (learnt(place, "1"), learnt(place, "2")) == expected


def test_a_correction_keeps_its_class_when_a_mask_brings_another_one(place: Path) -> None:
    first, second = paint(place, "1", [BLACK, RED]), paint(place, "2", [BLACK, BLUE, RED])
    assert run(place, masks=(first,)) == 0
    corrected = np.zeros((SIDE, SIDE), np.uint8)
    corrected[SIDE // 2 :] = 1  # red
    Image.fromarray(corrected).save(place / "out" / "classes" / "é0.png")
    assert run(place, masks=(first, second)) == 0
    assert (learnt(place, "1"), learnt(place, "2")) == ([0, 1], [0, 2, 1])
    assert learnt(place, "0") == [0, 1]


def test_a_mask_of_one_unknown_value_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = paint(place, "1", [0, 1, 2]), paint(place, "2", [77, 77])
    assert run(place, masks=masks) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "é2.png" in line and "77" in line and "--palette" in line


def outlines(place: Path, name: str, *drawn: str) -> str:
    """A LabelMe file for image ``name`` with a rectangle of each class, from the left."""
    shapes = [
        {"label": label, "shape_type": "rectangle", "points": [[x, 4], [x + 9, 24 + x]]}
        for label, x in zip(drawn, (2, 14, 26), strict=False)
    ]
    about = {"imageHeight": SIDE, "imageWidth": SIDE, "imagePath": f"é{name}.png"}
    path = place / f"é{name}.json"
    path.write_text(json.dumps({**about, "shapes": shapes}), encoding="utf-8")
    return str(path)


def test_outlines_in_several_files_share_their_names(place: Path) -> None:
    masks = outlines(place, "1", "pore"), outlines(place, "2", "carbide")
    read_in(place, masks=masks)
    gt = place / "out" / "set" / "sup_numf" / "gt"
    assert (ids(gt / "é1.png")[8, 5], ids(gt / "é2.png")[8, 5]) == (2, 1)  # by the alphabet


def test_names_that_are_known_are_read_whole_in_the_next_files(place: Path) -> None:
    squares = [[(x, 4), (x + 8, 4), (x + 8, 12), (x, 12)] for x in (2, 14, 26, 38)]
    for name, labels in ("1", "1122"), ("2", "21"):  # each number of two regions, then of one
        found = [roi(1, at, f"phase {n}") for n, at in zip(labels, squares, strict=False)]
        (place / f"é{name}.zip").write_bytes(roi_set(**{f"r{i}": r for i, r in enumerate(found)}))
    gt = place / "out" / "set" / "sup_numf" / "gt"
    read_in(place, masks=("é1.zip",))
    assert ids(gt / "é1.png")[8, [5, 17, 29, 41]].tolist() == [1, 1, 2, 2]
    read_in(place, masks=("é2.zip",))
    assert ids(gt / "é2.png")[8, [5, 17, 29]].tolist() == [2, 1, 0]
    record = json.loads((place / "out" / "set" / "record.json").read_text(encoding="utf-8"))
    assert record["class_names"] == ["background", "phase 1", "phase 2"]


def test_numbered_outlines_are_refused_or_read_as_one_class(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [
        {"label": str(n), "shape_type": "rectangle", "points": [[4 * n, 4], [4 * n + 2, 9]]}
        for n in range(1, 10)
    ]
    about = {"imageHeight": SIDE, "imageWidth": SIDE, "imagePath": "é1.png"}
    (place / "é1.json").write_text(json.dumps({**about, "shapes": shapes}), encoding="utf-8")
    assert run(place, masks=("é1.json",)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "every class is one outline, a numbered particle" in line and "é1.json" in line
    read_in(place, "--mask_kind", "particles", masks=("é1.json",))
    labels = ids(place / "out" / "set" / "sup_numf" / "gt" / "é1.png")
    assert labels.max() == 1 and labels.sum() == 9 * 2 * 5


def test_given_names_order_the_ids_of_outlines(place: Path) -> None:
    mask = outlines(place, "1", "pore", "carbide")
    labels = place / "out" / "set" / "sup_numf" / "gt" / "é1.png"
    read_in(place, masks=(mask,))
    assert (ids(labels)[8, 5], ids(labels)[8, 18]) == (2, 1)
    read_in(place, "--class_names", "matrix,pore,carbide", masks=(mask,))  # the set is read anew
    assert (ids(labels)[8, 5], ids(labels)[8, 18]) == (1, 2)


def test_a_correction_that_wins_over_a_given_mask_says_so(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = done / "out" / "classes" / "é0.png"
    corrected = ids(path).copy()
    old = int(corrected[5, 5])
    corrected[5, 5] = (old + 1) % 4  # of the image whose mask was given
    Image.fromarray(corrected).save(path)
    assert run(done) == 0
    said = capsys.readouterr().out
    assert "é0.png: wins over the mask of its image in 1 pixel(s); delete it" in said
    others = f"the {SIDE * SIDE - 1} others are learnt, too. Where you did not look, delete"
    assert f"{others} out/corrected/é0.png, and save a map with 255 there\n" in said
    part = np.full_like(corrected, 255)
    part[7, 7] = (corrected[7, 7] + 1) % 4
    Image.fromarray(part).save(path)  # what was labelled before stays
    read_in(done, masks=("é0_mask.png",))
    corrected[7, 7] = part[7, 7]
    for kept in ("corrected", "set/sup_numf/gt"):
        assert (ids(done / "out" / kept / "é0.png") == corrected).all()


def test_a_correction_that_was_saved_during_a_run_is_named_at_its_end(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, compare = done / "out" / "classes" / "é1.png", segmentation.job.Work.compare
    first = ids(path).copy()
    first[:8] = 1
    Image.fromarray(first).save(path)
    second = np.full_like(first, 255)
    second[8:12] = 2

    def while_it_runs(work: Any) -> None:
        compare(work)
        Image.fromarray(second).save(path)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation.job.Work, "compare", while_it_runs)
        assert run(done) == 0
    said = "é1: corrected while this run went on, kept in out/corrected/é1.png; give the same"
    (line,) = (t for t in capsys.readouterr().out.splitlines()[-2:] if t.startswith("é1: "))
    assert line.startswith(said)
    kept = ids(done / "out" / "corrected" / "é1.png")
    assert (kept[8:12] == 2).all() and (kept[:8] == 1).all() and (kept != 255).all()
    assert run(done) == 0  # learnt now, and no more said of it
    assert "while this run went on" not in capsys.readouterr().out
    assert (ids(path) == kept).all()


def test_gray_levels_beside_class_ids_are_no_new_classes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = np.zeros((2, SIDE, SIDE), np.uint8)
    first[:16], first[16:32], second[:16], second[16:32] = 1, 2, 127, 254
    for name, pixels in (("é0", first), ("é1", second)):
        Image.fromarray(pixels).save(place / f"{name}.png")
    assert run(place, masks=("é0.png", "é1.png")) == 2
    err = capsys.readouterr().err
    assert "é1.png: value 127" in err and "é1.png/" not in err and "add it to --palette" in err


def test_unlabelled_in_one_of_two_masks_is_no_class(place: Path) -> None:
    first, second = np.zeros((2, SIDE, SIDE), np.uint8)
    first[:16], first[16:32], second[24:] = 1, 2, 255  # the second has class 0 alone
    for name, pixels in (("é0", first), ("é1", second)):
        Image.fromarray(pixels).save(place / f"{name}.png")
    read_in(place, masks=("é0.png", "é1.png"))
    gt = place / "out" / "set" / "sup_numf" / "gt"
    assert set(np.unique(ids(gt / "é1.png")).tolist()) == {0, 255}
    assert (ids(gt / "é0.png") == first).all()


def test_strokes_on_zero_are_warned_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strokes = np.zeros((SIDE, SIDE, 3), np.uint8)
    for row, value in ((10, RED), (24, BLUE), (38, (255, 255, 0))):
        strokes[row : row + 2, 4:40] = value
    Image.fromarray(strokes).save(place / "é0_mask.png")
    read_in(place, masks=("é0_mask.png",))
    said = capsys.readouterr().out
    assert "Warning: é0_mask.png: 1 mask(s) look like scribbles" in said and "masks-" not in said


def ilastik(place: Path) -> str:
    """Strokes of four classes, ids from 1, on 0: nobody labelled that."""
    strokes = np.zeros((SIDE, SIDE), np.uint8)
    for number, row in enumerate((6, 18, 30, 40), start=1):
        strokes[row : row + 2, 4:40] = number
    Image.fromarray(strokes).save(place / "é1_mask.png")
    return "é1_mask.png"


def test_names_of_strokes_that_are_one_too_few_get_the_palette_that_fits_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, names = ilastik(place), ("--class_names", "a,b,c,d")
    assert run(place, *names, masks=(mask,)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--class_names: found 4 names, the masks have 5 classes")
    palette = "ignore=0 0=1 1=2 2=3 3=4"
    cure = f'é1_mask.png looks like strokes: if nobody labelled class 0, give --palette "{palette}"'
    assert line.endswith(f"; {cure}")
    read_in(place, *names, "--palette", palette, masks=(mask,))
    labels = ids(place / "out" / "set" / "sup_numf" / "gt" / "é1.png")
    assert labels[[0, 6, 18, 30, 40], 8].tolist() == [255, 0, 1, 2, 3]
    assert run(place, "--class_names", "a,b,c", "--out", "o", masks=(mask,)) == 2
    assert "looks like strokes" not in capsys.readouterr().err  # two names more are needed


def test_names_of_an_earlier_run_that_are_too_few_are_told_before_anything_is_timed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = paint(place, "1", [0, 1, 2]), paint(place, "2", [0, 1, 2, 3])
    read_in(place, "--class_names", "a,b,c", masks=(first,))
    before = hashes(place / "out")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(segmentation.job, "make_schedule", None)
        assert run(place, masks=(first, second)) == 2
    said = f"--class_names of an earlier run are 3 (a, b, c), {second} has 4 classes: give 4 names"
    assert capsys.readouterr().err == f"{said}\n"
    assert hashes(place / "out") == before
    read_in(place, "--class_names", "a,b,c,d", masks=(first, second))
    labelled = outlines(place, "0", "pore")
    assert run(place, "--out", "o", masks=(labelled, second)) == 2  # two names of outlines
    said = "--class_names of outlines, or of an earlier run, are 2 (background, pore), "
    assert f"{said}{second} has 4 classes: give 4 names" in capsys.readouterr().err


def lines_drawn(place: Path, name: str, *labels: str, over: str = "") -> str:
    """Strokes in LabelMe JSON, below them a shape over the whole image if ``over`` names it."""
    shapes = [
        {"label": label, "shape_type": "rectangle", "points": [[4, y], [40, y + 2]]}
        for label, y in zip(labels, (6, 18, 30), strict=False)
    ]
    whole = {"label": over, "shape_type": "rectangle", "points": [[0, 0], [SIDE, SIDE]]}
    about = {"imageHeight": SIDE, "imageWidth": SIDE, "imagePath": f"é{name}.png"}
    drawn = [*shapes, *([whole] if over else [])]
    (place / f"é{name}.json").write_text(json.dumps({**about, "shapes": drawn}), encoding="utf-8")
    return f"é{name}.json"


def test_strokes_of_outlines_are_warned_of_with_a_cure_that_works(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = lines_drawn(place, "1", "matrix", "net", "pore")
    read_in(place, masks=(mask,))
    (line,) = (t for t in capsys.readouterr().out.splitlines() if "like scribbles" in t)
    assert 'give --palette "' not in line and "--palette and --ignore have no effect" in line
    assert 'draw a shape called "ignore" over the whole image' in line
    names = line.partition("give them with it first: ")[2].partition(";")[0]
    assert names == '--class_names "matrix,net,pore"'
    for option in ("--palette", "ignore=0 0=1 1=2 2=3"), ("--ignore", "0"):
        assert run(place, *option, masks=(mask,)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{option[0]}: of no effect on é1.json") and "called ignore" in line
    assert run(place, "--tolerance", "9", masks=(mask,)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--tolerance: of no effect on é1.json") and line.endswith("leave it out")
    lines_drawn(place, "1", "matrix", "net", "pore", over="ignore")
    read_in(place, "--class_names", "matrix,net,pore", masks=(mask,))
    labels = ids(place / "out" / "set" / "sup_numf" / "gt" / "é1.png")
    assert labels[[0, 6, 18, 30], 8].tolist() == [255, 0, 1, 2]
    assert "like scribbles" not in capsys.readouterr().out
    plain = paint(place, "2", [10, 200])  # what has values is read by them, beside outlines
    words = ("--palette", "0=10 1=200", "--class_names", "matrix,net,pore")
    read_in(place, *words, masks=(mask, plain))
    assert "of no effect" not in capsys.readouterr().err and learnt(place, "2") == [0, 1]


def test_strokes_on_a_class_that_was_drawn_are_called_ignore(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_in(place, masks=(lines_drawn(place, "1", "a", "b", "c", over="rest"),))
    said = capsys.readouterr().out
    assert 'call the shape of rest round them "ignore"' in said
    (line,) = (t for t in said.splitlines() if "like scribbles" in t)
    given = line.partition("give them with it first: ")[2].partition(";")[0]
    assert given == '--class_names "a,b,c"'  # without the background, which nobody drew
    mask = lines_drawn(place, "1", "a", "b", "c", over="ignore")
    read_in(place, *shlex.split(given), masks=(mask,))
    labels = ids(place / "out" / "set" / "sup_numf" / "gt" / "é1.png")
    assert labels[[0, 6, 18, 30], 8].tolist() == [255, 0, 1, 2]
    record = json.loads((place / "out" / "set" / "record.json").read_text(encoding="utf-8"))
    assert record["class_names"] == ["a", "b", "c"] and record["num_classes"] == 3


def test_a_class_round_strokes_that_another_file_has_keeps_its_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "masks").mkdir()
    lines_drawn(place / "masks", "1", "a", "b", "c", over="rest")
    outlines(place / "masks", "2", "a", "rest")
    read_in(place, masks=("masks",))
    (line,) = (t for t in capsys.readouterr().out.splitlines() if "like scribbles" in t)
    assert "--class_names" not in line.partition("like scribbles")[2]  # every class has pixels


def test_strokes_on_a_shape_called_background_are_told_to_rename_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = lines_drawn(place, "1", "a", "b", "c", over="Background")
    content = json.loads((place / mask).read_text(encoding="utf-8"))
    content["shapes"][-1]["points"] = [[1, 1], [SIDE - 1, SIDE - 1]]
    (place / mask).write_text(json.dumps(content), encoding="utf-8")
    read_in(place, masks=(mask,))
    said = capsys.readouterr().out
    assert 'one of background round them is to be called "ignore", too)' in said
    content["shapes"][-1]["label"] = "ignore"
    whole = {**content["shapes"][-1], "points": [[0, 0], [SIDE, SIDE]]}
    (place / mask).write_text(
        json.dumps({**content, "shapes": [*content["shapes"], whole]}), encoding="utf-8"
    )
    read_in(place, masks=(mask,))
    labels = ids(place / "out" / "set" / "sup_numf" / "gt" / "é1.png")
    assert labels[[0, 3, 6, 18, 30], 8].tolist() == [255, 255, 1, 2, 3]


def test_names_that_number_the_classes_of_outlines_otherwise_are_told_and_spare_corrections(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = outlines(place, "1", "pore", "carbide")
    assert run(place, masks=(mask,)) == 0
    names = ("--class_names", "matrix,pore,carbide")
    corrected = place / "out" / "classes" / "é0.png"
    published = ids(corrected)
    Image.fromarray(np.ones_like(published)).save(corrected)
    assert run(place, *names, masks=(mask,)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--class_names: 1 corrected class map(s), such as out/classes/é0.png")
    assert '--class_names "background,carbide,pore"; keep these ids' in line
    Image.fromarray(published).save(corrected)
    read_in(place, *names, masks=(mask,))
    said = capsys.readouterr().out
    assert 'outlines are read by --class_names "matrix,pore,carbide" now; earlier runs' in said
    assert Answers(place / "out").by == ""  # its ids mean others now


@pytest.mark.parametrize("in_one_folder", [False, True])
def test_names_that_number_outlines_beside_masks_otherwise_spare_corrections(
    place: Path, capsys: pytest.CaptureFixture[str], in_one_folder: bool
) -> None:
    masks: tuple[str, ...] = outlines(place, "1", "pore", "carbide"), paint(place, "2", [0, 1, 2])
    if in_one_folder:
        (place / "masks").mkdir()
        for mask in masks:
            shutil.copy(mask, place / "masks")
        masks = ("masks",)
    assert run(place, "--class_names", "background,carbide,pore", masks=masks) == 0
    corrected = place / "out" / "classes" / "é0.png"
    Image.fromarray(np.ones_like(ids(corrected))).save(corrected)
    capsys.readouterr()
    assert run(place, "--class_names", "matrix,pore,carbide", masks=masks) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--class_names: 1 corrected class map(s), such as out/classes/é0.png")
    assert '--class_names "background,carbide,pore"; keep these ids' in line


def test_a_crop_that_leaves_too_little_says_in_which_order_its_numbers_are(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "--crop", "0,40,0,0") == 2
    for line in capsys.readouterr().err.splitlines():
        assert "48x8 pixels" in line and "--crop 0,40,0,0 (top,bottom,left,right)" in line
    with pytest.raises(SystemExit):
        segment.main(["-h"])
    assert "top,bottom,left,right" in capsys.readouterr().out


def test_of_two_masks_of_an_image_it_is_said_which_is_used(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = np.zeros((2, SIDE, SIDE), np.uint8)
    first[:16], second[:20] = 1, 1
    second[40:] = 2
    for name, pixels in (("é0", first), ("é0_mask", second)):
        Image.fromarray(pixels).save(place / f"{name}.png")
    read_in(place, masks=("é0.png", "é0_mask.png"))
    said = capsys.readouterr().out
    assert (ids(place / "out" / "set" / "sup_numf" / "gt" / "é0.png") == second).all()
    unlike = 4 * SIDE + 8 * SIDE
    assert f"é0_mask.png: used for é0.png, wins over é0.png in {unlike} pixel(s)" in said
    assert (
        'masks: é0_mask.png: values taken as class ids; the same as --palette "0=0 1=1 2=2"' in said
    )


@pytest.mark.parametrize(
    ("option", "expected"),
    [(("--palette", "ignore=0 0=1 1=2 2=3"), [255, 0, 1, 2]), (("--ignore", "0"), [255, 1, 2, 3])],
)
def test_a_palette_given_later_counts_and_says_what_was_read_before(
    place: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str], expected: list[int]
) -> None:
    mask = paint(place, "1", [0, 1, 2, 3])
    assert run(place, masks=(mask,)) == 0
    assert learnt(place, "1") == [0, 1, 2, 3]
    capsys.readouterr()
    assert run(place, *option, masks=(mask,)) == 0
    assert learnt(place, "1") == expected
    said = capsys.readouterr().out
    assert said.count('earlier runs read them by --palette "0=0 1=1 2=2 3=3"') == 1
    read_in(place, masks=(mask,))  # and is known from then on
    assert learnt(place, "1") == expected


def test_a_kind_of_masks_given_later_counts(place: Path) -> None:
    mask = paint(place, "1", [0, 1, 2, 0])
    read_in(place, masks=(mask,))
    read_in(place, "--mask_kind", "particles", masks=(mask,))
    assert learnt(place, "1") == [0, 1]
    levels = paint(place, "1", [10, 10, 200, 200])
    read_in(place, "--out", "levels", masks=(levels,))
    read_in(place, "--mask_kind", "ids", "--out", "levels", masks=(levels,))
    folder = place / "levels" / "set" / "sup_numf" / "gt"
    assert set(np.unique(ids(folder / "é1.png")).tolist()) == {10, 200}


def test_a_palette_that_renumbers_corrected_classes_is_refused(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--palette", "0=0,0,255 1=0,0,0 2=255,0,0 3=255,255,0")  # the first two change places
    labels = done / "out" / "set" / "sup_numf" / "gt" / "é0.png"
    before = ids(labels).copy()
    corrected = ids(done / "out" / "classes" / "é1.png").copy()
    corrected[:4] = 3
    Image.fromarray(corrected).save(done / "out" / "classes" / "é1.png")
    assert run(done, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--palette" in line and "0=0,0,0 1=0,0,255" in line and "another --out" in line
    assert (ids(labels) == before).all()
    assert "out/classes/é1.png" in line
    (done / "out" / "classes" / "é1.png").unlink()
    read_in(done, *words, masks=("é0_mask.png",))
    assert (ids(labels) == np.array([1, 0, 2, 3])[before]).all()
    old = done / "out" / "classes" / "é2.png"  # with the old ids: no label any more
    Image.fromarray(3 - ids(old)).save(old)
    read_in(done, *words, masks=("é0_mask.png",))
    assert not (done / "out" / "corrected").exists()


def test_a_damaged_record_of_answers_is_made_anew(done: Path) -> None:
    (done / "out" / "answer.json").write_text('{"by": "x", "files": []}', encoding="utf-8")
    assert run(done) == 0


@pytest.mark.parametrize("name", ["plan.json", "set/mine.txt", "mine.txt"])
def test_a_folder_with_files_of_the_user_is_left_alone(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = place / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    assert run(place) == 2
    assert "give another --out" in capsys.readouterr().err
    assert [p for p in (place / "out").rglob("*") if p.is_file()] == [path]


def test_beside_strokes_a_network_learns_what_the_pixel_classifier_is_sure_of(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = ids(place / "é0_mask.png").astype(np.int64)
    _, whole = np.unique(colours @ (1, 2, 4), return_inverse=True)
    strokes = np.full((SIDE, SIDE), 255, np.uint8)
    strokes[::8] = whole.reshape(SIDE, SIDE)[::8]
    (place / "strokes").mkdir()
    Image.fromarray(strokes).save(place / "strokes" / "é0.png")
    assert run(place, masks=("strokes",)) == 0
    out = place / "out"
    [stored] = json.loads((out / "rounds.json").read_text(encoding="utf-8"))
    assert sum(stored["shares"]) == pytest.approx(1) and stored["sure"] > 0
    [learnt] = (out / "training" / "round_1_sure").glob("*.png")
    found = ids(learnt)
    assert (found[::8] == strokes[::8]).all()  # no stroke is changed
    assert (found != 255).mean() == pytest.approx(1 / 8 + stored["sure"])
    said = capsys.readouterr().out
    assert "Strokes show rare classes more often" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    summary = (out / "summary.md").read_text(encoding="utf-8")
    for text in (said, page, summary):  # one row of eight is labelled
        assert "on labelled pixels alone, 12 % of the annotated image" in text
        assert "Only 12 % of the annotated image is labelled" in text
    assert (ids(out / "classes" / "é0.png")[::8] == strokes[::8]).all()


def test_grains_are_measured_where_they_are_asked_for(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(done, "--grain_classes", "7") == 2
    assert capsys.readouterr().err == "--grain_classes: found 7; classes are 0 ... 3\n"
    assert run(done, "--grain_classes", "1", "--um_per_px", "0.5") == 0
    with (done / "out" / "measurements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    known = [row for row in rows if row["astm_g"]]
    assert known and {row["class"] for row in known} == {"1"}
    for row in known:  # ASTM E112, of a length in mm
        g = -3.288 - 6.643856 * math.log10(float(row["grain_intercept_um"]) / 1000)
        assert float(row["astm_g"]) == pytest.approx(g, abs=1e-3)
    assert "ASTM G" in (done / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_of_an_older_preset_gets_a_new_round(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its networks learnt otherwise: they are neither taken for this preset's nor refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROBUST, "class_weight", (1.0,))
        assert run(place) == 0
    assert run(place) == 0
    assert "Round 2: labels of 1 image(s)" in capsys.readouterr().out
    assert run(place) == 0
    rounds = json.loads((place / "out" / "rounds.json").read_text(encoding="utf-8"))
    assert [each["number"] for each in rounds] == [1, 2] and all(r["answer"] for r in rounds)


def test_a_folder_by_another_path_or_name_is_not_computed_again(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (done / "out").rename(done / "kept")
    words = ["--images", "raw", "--masks", "é0_mask.png", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(Learning, "finetune", None)  # nothing is trained
    for out in ("kept", str(done / "kept")):
        assert segment.main([*words, "--out", out]) == 0
    assert "Round 2" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("--class_names", "w,x,y,z", "--device", "cuda:999"),
        ("--class_names", "w,,y,z"),
        ("--class_names", "w,x,x,z"),
        ("--class_names", os.fsdecode(b"w,x,\xe4,z")),
        ("--crop", "0,20,0,0", "--threads", "5000"),
        ("--crop", "0,20,0,0", "--grain_classes", "7"),
        ("--crop", "0,20,0,0", "--batch_from", "(nothing)"),
        ("--crop", "0,20,0,0", "--minutes", "1e308"),
        ("--crop", "0,20,0,0", "--scales", "unknown.csv"),
        ("--ignore", "0,0,0", "--class_colours", "112233"),
    ],
)
def test_a_refused_command_is_not_remembered(
    done: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (done / "unknown.csv").write_text("file,um_per_px\né1.png,0.1\né1.png,0.2\n")
    shutil.copy(done / "out" / "classes" / "é1.png", done / "out" / "classes" / "é2.png")
    before = hashes(done / "out")
    assert run(done, *words) == 2
    said = capsys.readouterr()
    lines = 4 if "--batch_from" in words else 1  # of each image
    assert said.err.count("\n") == lines and "Timing" not in said.out
    assert hashes(done / "out") == before


def test_results_of_images_that_are_gone_are_removed_and_that_is_said(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (done / "raw" / "é2.png").unlink()
    assert run(done) == 0
    said = "Warning: 1 image(s) of the last answer are not in the folder any more, and their "
    assert capsys.readouterr().out.count(f"{said}results were removed: é2") == 1
    assert not (done / "out" / "classes" / "é2.png").exists()
    assert run(done) == 0 and said not in capsys.readouterr().out


def test_a_mask_of_class_ids_that_jpeg_packed_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.random.default_rng(0).integers(0, 4, (SIDE // 8, SIDE // 8)).astype(np.uint8)
    big = Image.fromarray(ids).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    big.save(place / "é0.jpg", quality=75)
    assert run(place, masks=("é0.jpg",)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("é0.jpg: packed by JPEG, which changes class ids") and "PNG" in line


def test_names_of_files_may_be_of_another_encoding(place: Path) -> None:
    try:
        (place / "raw" / "é1.png").rename(place / "raw" / os.fsdecode(b"b\xe4d.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    shutil.copy(place / "raw" / "é2.png", place / "raw" / "É2.png")  # nor are these one
    assert run(place) == 0
    assert len(list((place / "out" / "classes").rglob("*.png"))) == 5


def test_a_full_disk_is_one_line(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blocks, "write_png", full)
    assert run(done) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and "free disk space" in line


def test_a_batch_is_that_of_the_image_and_not_of_its_folder(place: Path) -> None:
    (place / "raw" / "sample b").rename(place / "raw" / "heat_30min")
    (place / "raw" / "heat_30min" / "é3.png").rename(place / "raw/heat_30min/30_s7_0_0.png")
    assert run(place) == 0
    with (place / "out" / "measurements.csv").open(encoding="utf-8", newline="") as file:
        batches = {row["image"]: row["batch"] for row in csv.DictReader(file)}
    assert batches == {"heat_30min/30_s7_0_0": "30", "é0": "", "é1": "", "é2": ""}
    assert run(place, "--batch_from", "^(?:heat_(\\w+)/|é)") == 0
    with (place / "out" / "batches.csv").open(encoding="utf-8", newline="") as file:
        fields = {row["batch"]: row["fields"] for row in csv.DictReader(file)}
    assert fields == {"30min": "1", "(no batch)": "3"}


def test_a_batch_that_nobody_tells_is_found_before_anything_is_timed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learning, "finetune", None)
    for words, count in (("(", 1), ("^sample (.)/", 3)):  # of four images one is in that folder
        assert run(place, "--batch_from", words) == 2
        found = capsys.readouterr()
        assert len(found.err.splitlines()) == count and "Timing" not in found.out
        assert found.err.count("--batch_from") == count


def test_networks_that_lost_after_few_slow_steps_are_compared_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(learning: Learning, asked: dict[str, Any]) -> Schedule:
        plan = few_steps(learning, asked)
        own: dict[str, Any] = {"folds": [[0, 1], [2, 3]], "fine_steps": 8, "block_steps": 2}
        return dataclasses.replace(plan, **own, rates={"step of fine-tuning": 100.0})

    monkeypatch.setattr(segmentation.job, "make_schedule", slow)
    assert run(place) == 0
    said = capsys.readouterr().out
    again = "compared again after 12 steps, for a last training of 24"
    assert said.count(again) == 1
    (found,) = json.loads((place / "out" / "rounds.json").read_text())
    assert found["plan"] == {"fine_steps": 24, "block_steps": 12}
    log = place / "out" / "training" / "round_1_without_0_1_longer_sup" / "f" / "log_sup.txt"
    assert "fine_steps = 12" in log.read_text(encoding="utf-8")
    assert again in (place / "out" / "report.html").read_text(encoding="utf-8")
    before = hashes(place / "out" / "training")
    monkeypatch.setattr(Learning, "finetune", None)  # nothing is trained again
    monkeypatch.setattr(Schedule, "early_lines", lambda *_: ["early"])  # of a run of its own alone
    capsys.readouterr()
    assert run(place) == 0 and "early" not in capsys.readouterr().out
    assert hashes(place / "out" / "training") == before


def test_steps_of_which_an_earlier_run_did_some_are_not_timed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(learning: Learning, asked: dict[str, Any]) -> Schedule:
        own: dict[str, Any] = {"folds": [[0, 1], [2, 3]], "fine_steps": 8, "block_steps": 2}
        plan = dataclasses.replace(few_steps(learning, asked), **own)
        return dataclasses.replace(plan, rates={"step of fine-tuning": 100.0})

    for fold in ("0_1", "2_3"):
        (place / "out" / "training" / f"round_1_without_{fold}_sup" / "f").mkdir(parents=True)
    (place / "out" / "answer.json").write_text("{}")  # a folder of this program
    monkeypatch.setattr(segmentation.job, "make_schedule", slow)
    assert run(place) == 0
    assert "compared again" not in capsys.readouterr().out


def test_what_is_transparent_is_not_measured(place: Path) -> None:
    opaque = np.full((SIDE, SIDE), 255, np.uint8)
    opaque[:, : SIDE // 4] = 0
    for number in (0, 1):  # annotated, and not
        path = place / "raw" / f"é{number}.png"
        picture = Image.open(path).convert("RGBA")
        picture.putalpha(Image.fromarray(opaque))
        picture.save(path)
    assert run(place) == 0
    with (place / "out" / "measurements.csv").open(encoding="utf-8", newline="") as file:
        fields = {row["image"]: int(row["field_px"]) for row in csv.DictReader(file)}
    whole = SIDE * SIDE
    expected = {"é0": whole * 3 // 4, "é1": whole * 3 // 4, "é2": whole, "sample b/é3": whole}
    assert fields == expected
    for number in (0, 1):
        assert (ids(place / f"out/classes/é{number}.png")[:, : SIDE // 4] == 255).all()
        doubt = ids(place / f"out/doubt/é{number}.png")
        assert (doubt[:, : SIDE // 4] == 0).all()


def test_data_bars_are_warned_of_by_the_images_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know what was cut off already; the answer's images are cut."""
    monkeypatch.setattr("metallography.folder.find_bars", lambda _: [Bar("bottom", 8)])
    assert run(place) == 0
    told = json.loads((place / "out" / "summary.json").read_text(encoding="utf-8"))
    assert not [line for line in told["warnings"] if "data bar" in line]


def test_another_crop_begins_a_new_round(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(done, "--crop", "0,8,0,0") == 0
    assert "Round 2: labels of 1 image(s)" in capsys.readouterr().out
    assert ids(done / "out" / "classes" / "é0.png").shape == (SIDE - 8, SIDE)


def test_crop_and_pixel_size_are_those_of_the_run_before_unless_given(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cut = place / "out", (SIDE - 8, SIDE)
    assert run(place, "--crop", "0,8,0,0", "--um_per_px", "0.05") == 0
    numbers = (out / "measurements.csv").read_text(encoding="utf-8")
    assert "mean_area_um2" in numbers
    capsys.readouterr()
    assert run(place) == 0
    said = capsys.readouterr().out
    assert "--crop 0,8,0,0, as an earlier run was told; --crop 0,0,0,0 cuts nothing" in said
    assert "Pixel size as an earlier run was told: 0.05 µm (4 image(s), as sample b/é3)" in said
    assert (out / "measurements.csv").read_text(encoding="utf-8") == numbers
    corrected = ids(out / "classes" / "é1.png").copy()
    corrected[:20] = 1
    Image.fromarray(corrected).save(out / "classes" / "é1.png")
    assert run(place, "--um_per_px", "0.1") == 0
    assert ids(out / "classes" / "é1.png").shape == cut
    assert "Pixel size as" not in capsys.readouterr().out
    assert run(place, "--crop", "0,0,0,0") == 0
    assert ids(out / "classes" / "é1.png").shape == (SIDE, SIDE)
    assert "as an earlier run was told: 0.1 µm (4 image(s)" in capsys.readouterr().out
    for words in (("--um_per_px", "0"), ()):
        assert run(place, *words) == 0
        said = capsys.readouterr().out
        assert "run was told" not in said and "earlier run here knew one" not in said
    assert "mean_area_px2" in (out / "measurements.csv").read_text(encoding="utf-8")


def test_what_a_set_knows_of_its_images_holds(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pixel size; its names where the masks are of the set, too: others may mean otherwise."""
    (place / "set").mkdir()
    (place / "raw").rename(place / "set" / "train_numf")
    (place / "set" / "sup_num1_0").mkdir()
    for number in range(2):  # as dataset/prepare.py writes them: ids
        _, mask = draw_micrograph(np.random.default_rng(number), SIDE)
        mask[mask == 1] = 3 if number else 1  # number 1 has no class 1
        Image.fromarray(mask).save(place / "set" / "sup_num1_0" / f"é{number}.png")
    names = ["ferrite", "net", "spheroidite", "coarse"]
    known = {"num_classes": 4, "class_names": names, "um_per_px": 0.1}
    (place / "set" / "set.json").write_text(json.dumps(known))
    words = ("--images", "set/train_numf")
    assert run(place, *words, masks=("set/sup_num1_0/é0.png",)) == 0
    assert f"as set.json of the set says: {', '.join(names)}\n" in capsys.readouterr().out
    table = (place / "out" / "measurements.csv").read_text(encoding="utf-8")
    assert "mean_area_um2" in table and ",ferrite," in table
    read_in(place, *words, masks=("set/sup_num1_0/é0.png", "out/classes"))
    assert "set.json of the set" in capsys.readouterr().out
    for more, given in (
        (("--palette", "0=2 1=1 2=0 3=3"), "set/sup_num1_0/é0.png"),
        (("--mask_kind", "levels"), "set/sup_num1_0/é1.png"),
        ((), "é0_mask.png"),
    ):
        shutil.rmtree(place / "out")
        read_in(place, *words, *more, masks=(given,))
        assert "set.json of the set" not in capsys.readouterr().out


def test_a_correction_stays_at_its_pixels_under_every_crop(place: Path) -> None:
    out = place / "out"
    learnt = out / "set" / "sup_numf" / "gt" / "é1.png"

    def corrected(name: str, rows: slice, value: int) -> None:
        """Correct some rows of a published class map, and nothing else of it."""
        path = out / "classes" / name
        found = np.full_like(ids(path), 255)
        found[rows] = value
        Image.fromarray(found).save(path)

    assert run(place, "--crop", "0,8,0,0") == 0
    corrected("é1.png", slice(0, 20), 1)
    assert run(place, "--crop", "8,0,0,0") == 0  # of the same size, not of the same pixels
    assert (ids(learnt)[:12] == 1).all() and (ids(learnt)[12:] == 255).all()
    corrected("é1.png", slice(30, 40), 2)
    assert run(place, "--crop", "4,4,0,0") == 0  # what was labelled before stays
    assert (ids(learnt)[:16] == 1).all() and (ids(learnt)[16:34] == 255).all()
    assert (ids(learnt)[34:] == 2).all()
    assert run(place, "--crop", "0,0,0,0") == 0
    whole = ids(learnt)
    assert (whole[:20] == 1).all() and (whole[20:38] == 255).all() and (whole[38:] == 2).all()
    assert (ids(out / "corrected" / "é1.png") == whole).all()


def test_the_order_of_options_on_reading_makes_no_other_set(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_in(place, "--crop", "0,8,0,0", "--trim", "2", masks=("é0_mask.png",))
    record = place / "out" / "set" / "record.json"
    before = record.stat().st_mtime_ns
    read_in(place, "--trim", "2", masks=("é0_mask.png",))  # the crop comes last now
    assert record.stat().st_mtime_ns == before
    damaged = json.loads(record.read_text(encoding="utf-8")) | {"crop": "x"}
    record.write_text(json.dumps(damaged), encoding="utf-8")
    read_in(place, "--trim", "2", masks=("é0_mask.png",))
    assert "four numbers" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "scales",
    ["x", [1], None, {"um": 1}, {"um_per_px": -3}, {"rows": None}, {"um_per_px": "n", "rows": {}}],
)
def test_damaged_scales_of_an_earlier_run_are_none(tmp_path: Path, scales: object) -> None:
    record = {"files": {}, "scales": scales}
    (tmp_path / "answer.json").write_text(json.dumps(record), encoding="utf-8")
    assert Answers(tmp_path).scales == NOT_GIVEN


def test_a_twin_of_the_network_says_which_images_to_doubt(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "usable", lambda *_: [])  # nothing is compared: a network answers
    with_twin = partial(dataclasses.replace, twin=True)
    monkeypatch.setattr(segmentation.job, "make_schedule", lambda *a: with_twin(few_steps(*a)))
    assert run(place) == 0
    out = place / "out"
    networks = [out / "training" / f"round_1{kind}_sup" / "f" / "sup.pt" for kind in ("", "_twin")]
    assert networks[0].read_bytes() != networks[1].read_bytes()
    with (out / "doubt.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    twin = out / "training" / "answers" / "twin"
    for name, row in rows.items():
        other = (ids(out / "classes" / f"{name}.png") != ids(twin / f"{name}.png")).mean()
        assert float(row["doubt"]) == float(row["twin_differs"]) == pytest.approx(other, abs=1e-6)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "twin network differs, %" in page and "beyond its own error" not in page
    # Another image in the place of one: the twin is asked anew, and not trained again.
    before = networks[1].stat().st_mtime_ns
    image = ids(place / "raw" / "é1.png")
    Image.fromarray(np.ascontiguousarray(image[::-1])).save(place / "raw" / "é1.png")
    old = ids(twin / "é1.png")
    assert run(place) == 0 and networks[1].stat().st_mtime_ns == before
    assert (ids(twin / "é1.png") != old).any()
    good = (twin / "é1.png").read_bytes()
    (twin / "é1.png").write_bytes(good[:40])  # cut off by a full disk
    assert run(place) == 0 and (twin / "é1.png").read_bytes() == good


def test_the_second_opinion_is_of_the_images_as_they_are(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "usable", lambda *_: [])  # nothing is compared: a network answers
    image = ids(place / "raw" / "é1.png")[:40]
    Image.fromarray(image).save(place / "raw" / "é1.png")
    assert run(place) == 0
    Image.fromarray(np.ascontiguousarray(image.T)).save(place / "raw" / "é1.png")
    assert run(place) == 0
    rounds = json.loads((place / "out" / "rounds.json").read_text(encoding="utf-8"))
    assert [each["by"] for each in rounds] == ["network"]
    first = place / "out" / "training" / "answers" / "first"
    assert ids(first / "classes" / "é1.png").shape == (SIDE, 40)


@pytest.mark.parametrize("views", [1, 8])
def test_the_printed_command_gives_new_images_the_class_maps_of_the_answer(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], views: int
) -> None:
    monkeypatch.setattr(blocks, "usable", lambda *_: [])  # nothing is compared: a network answers
    averaged = partial(dataclasses.replace, views=views, fine_steps=30)
    monkeypatch.setattr(segmentation.job, "make_schedule", lambda *a: averaged(few_steps(*a)))
    assert run(place) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "For new images" in line]
    words = line.partition("python predict.py ")[2].replace("FOLDER", "raw").split()
    place.joinpath("raw", "é0.png").unlink()  # the annotated one, whose labels win in the answer
    for more, others in ([], 0), (["--tta", "false" if views > 1 else "true"], 1):
        out = place / f"new{others}"
        assert predict.main([*words, "--out", str(out), "--device", "cpu", *more]) == 0
        said = capsys.readouterr().out
        assert ("Averages over 8 flips" in said) == (views > 1 and not more)
        names = ("é1", "é2", "sample b/é3")
        pairs = [[ids(at / "classes" / f"{n}.png") for at in (place / "out", out)] for n in names]
        assert bool(others) == any((a != b).any() for a, b in pairs)
        head = json.loads((out / "predicted.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert head["tta"] == ((views > 1) != bool(others))


def test_results_of_folders_img_are_named_by_their_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name / "img").mkdir(parents=True)
    assert segment.default_out(Path("one/img")) == Path("segmented_one_img")
    assert segment.default_out(Path("one")) == Path("segmented_one")


def test_the_options_that_tables_tell_are_as_on_a_command_line(place: Path) -> None:
    base = ["--images", "raw", "--masks", "é0_mask.png", "--out", "out"]
    asked = ["--palette", "0=0 1=255", "--ignore", "128", "--crop", "0,8,0,0", "--minutes", "3"]
    parser = segment.parser()
    told = dict(segment.request_of(parser.parse_args([*base, *asked])).head())
    assert told["Sample"] == told["Folder"] == "raw"
    again = parser.parse_args([*base, *shlex.split(told["Options"])])
    assert again == parser.parse_args([*base, *asked])
    plain = dict(segment.request_of(parser.parse_args(base)).head())["Options"]
    assert "--palette" not in plain and "--ignore" not in plain
