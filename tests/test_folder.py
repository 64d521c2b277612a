"""Folders of images: files counted by hand, predictions against the network, what is resumed."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tifffile import TiffWriter, imwrite

from metallography import measure
from metallography.folder import Folder
from metallography.items import RECORD, Item, list_images, result_names
from metallography.segmenter import Segmenter
from predict import main
from tests.holder import HOLD
from tests.trained_model import expected_mask, picture, rows_of, write_images, write_weights
from utils.commandline import UserError
from utils.files import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "fine.pt", {})


def test_batches_of_sub_folders_and_of_a_table(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "imgs", "heat12/a_1.png", "heat12/b.png", "heat7/a_1.png")
    out = tmp_path / "out"
    options = ["--weights", str(weights), "--images", str(images), "--out", str(out)]
    assert main([*options]) == 0  # by their names: those of an earlier run hold no longer
    assert main([*options, "--batch_from", r"^heat(\d+)/"]) == 0
    rows = rows_of(out / "measurements.csv")
    assert [r["batch"] for r in rows[::3]] == ["7", "12", "12"]  # heat7 comes before heat12
    pooled = rows_of(out / "batches.csv")  # numbers in their order
    assert [(r["batch"], r["fields"]) for r in pooled[::3]] == [("7", "1"), ("12", "2")]
    of_two = [float(r["area_fraction"]) for r in rows[3:] if r["class"] == "1"]
    assert float(pooled[4]["area_fraction"]) == pytest.approx(np.mean(of_two))
    table = tmp_path / "t.csv"
    table.write_text("file,batch\nb,melt A\nheat12/a_1.png,melt A\nheat7/a_1,melt B\nc,x\n")
    assert main([*options, "--batch_from", str(table)]) == 0
    assert "Warning: --batch_from: 1 row(s) without an image, as c" in capsys.readouterr().out
    rows = rows_of(out / "measurements.csv")
    assert [r["batch"] for r in rows[::3]] == ["melt B", "melt A", "melt A"]
    # An image that nothing is known of ends the run before anything is written anew.
    before = (out / "measurements.csv").read_bytes()
    pages = tmp_path / "pages" / "sub"
    pages.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(
        pages / "s.tif", save_all=True, append_images=[Image.fromarray(np.ones((40, 48), np.uint8))]
    )
    (tmp_path / "p.csv").write_text("file,batch\ns.tif,A\n")
    stack = ["--images", str(tmp_path / "pages"), "--out", str(tmp_path / "paged")]
    assert main([*options[:2], *stack, "--batch_from", str(tmp_path / "p.csv")]) == 0
    assert {r["batch"] for r in rows_of(tmp_path / "paged" / "measurements.csv")} == {"A"}
    capsys.readouterr()
    for words, said in ((r"^heat(1\d)/", "does not match this name"), ("x", "no group")):
        assert main([*options, "--batch_from", words]) == 2
        assert said in capsys.readouterr().err
    table.write_text("file,batch\na_1,melt A\nb,melt A\n")  # of which a_1?
    assert main([*options, "--batch_from", str(table)]) == 2
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 2 and all("not in the table of --batch_from" in line for line in found)
    assert (out / "measurements.csv").read_bytes() == before
    assert main(["--weights", str(weights), "--rank", str(images), "--batch_from", "(.).*/"]) == 0
    ranked = rows_of(weights.parent / "ranked_imgs" / "ranking.csv")
    assert {r["batch"] for r in ranked} == {"h"}


def test_a_folder_with_all_outputs(tmp_path: Path, weights: Path) -> None:
    images = write_images(
        tmp_path / "imgs", "15_a_0_0.png", "60_b.tif", "sub/Gefüge-中.jpg", "twin.png", "twin.bmp"
    )
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_text("no image")
    out = tmp_path / "out"
    options = ["--weights", str(weights), "--images", str(images), "--out", str(out)]
    assert main([*options, "--um_per_px", "0.1", "--particles", "--probabilities"]) == 0
    names = ["15_a_0_0", "60_b", "sub/Gefüge-中", "twin.bmp", "twin.png"]
    for name in names:
        for kind in ("classes", "gray", "overlay"):
            assert (out / kind / f"{name}.png").is_file(), (kind, name)
    sources = {
        name: images / f"{name}{suffix}"
        for name, suffix in zip(names, (".png", ".tif", ".jpg", "", ""), strict=True)
    }
    for name, source in sources.items():
        ids = np.asarray(Image.open(out / "classes" / f"{name}.png"))
        np.testing.assert_array_equal(ids, expected_mask(np.asarray(Image.open(source))))
        gray = np.asarray(Image.open(out / "gray" / f"{name}.png"))
        np.testing.assert_array_equal(gray, np.array([0, 128, 255])[ids])
        given = np.load(out / "probabilities" / f"{name}.npy")
        assert given.shape == (40, 48, 3) and given.dtype == np.float16
        np.testing.assert_allclose(given.sum(2, dtype=np.float32), 1, atol=2e-3)
        sure = np.sort(given, axis=2)
        clear = sure[..., 2] - sure[..., 1] > 2e-3
        np.testing.assert_array_equal(given.argmax(2)[clear], ids[clear])
    rows = rows_of(out / "measurements.csv")
    assert [r["image"] for r in rows[::3]] == names and len(rows) == 15
    assert [r["batch"] for r in rows[::3]] == ["15", "60", "Gefüge", "", ""]
    shares = [sum(float(r["area_fraction"]) for r in rows[i : i + 3]) for i in range(0, 15, 3)]
    assert shares == pytest.approx([1] * 5)
    particles = rows_of(out / "particles.csv")
    counted = sum(
        int(r["particles_whole"]) + int(r["particles_cut"]) for r in rows if r["class"] != "0"
    )
    assert len(particles) == counted > 0
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "0.1 µm per pixel" in summary and "By production batch" in summary
    assert Image.open(out / "sheet.png").size[0] > 1000
    nameless = "(no batch)"
    assert f"| {nameless} |" in summary and nameless in (out / "report.html").read_text("utf-8")
    assert {r["batch"] for r in rows_of(out / "batches.csv")} == {"15", "60", "Gefüge", nameless}


def test_what_is_done_is_skipped(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 0
    assert "2 image(s) predicted, 0 were done" in capsys.readouterr().out
    first = (tmp_path / "o" / "measurements.csv").read_text()
    assert main(options) == 0
    assert "0 image(s) predicted, 2 were done" in capsys.readouterr().out
    assert (tmp_path / "o" / "measurements.csv").read_text() == first
    Image.fromarray(picture(9, 30, 30)).save(images / "b.png")  # another image now
    (tmp_path / "o" / "gray" / "a.png").unlink()
    write_images(images, "c.png")
    assert main(options) == 0
    assert "3 image(s) predicted, 0 were done" in capsys.readouterr().out
    assert main([*options, "--tta"]) == 2
    error = capsys.readouterr().err
    assert "tta was False, is True" in error and error.count("\n") == 1
    assert main([*options, "--tta", "--overwrite"]) == 0
    assert "3 image(s) predicted" in capsys.readouterr().out


def test_a_second_run_measures_only_what_changed(
    tmp_path: Path, weights: Path, monkeypatch
) -> None:
    images, out = write_images(tmp_path / "imgs", "a.png", "b.png", "c.png"), tmp_path / "o"
    options = ["--weights", str(weights), "--images", str(images), "--particles", "--out", str(out)]
    measured, real = list[np.ndarray](), measure.measure_mask

    def counted(mask: np.ndarray, *how: Any) -> Any:
        measured.append(mask)
        return real(mask, *how)

    monkeypatch.setattr(measure, "measure_mask", counted)
    assert main(options) == 0
    assert len(measured) == 3
    whole = results(out)
    measured.clear()
    assert main(options) == 0
    assert not measured and results(out) == whole
    # Corrected, damaged, removed: 20 pixels of class 1, all else class 0.
    path = out / "classes" / "a.png"
    mask = np.zeros(np.asarray(Image.open(path)).shape, np.uint8)
    mask[2:6, 3:8] = 1
    Image.fromarray(mask).save(path)
    stored = out / "measured" / "b.npz"
    stored.write_bytes(stored.read_bytes()[:-40])
    (out / "measured" / "c.npz").unlink()
    for now in (3, 0):
        measured.clear()
        assert main(options) == 0
        assert len(measured) == now
        rows = rows_of(out / "measurements.csv")
        (row,) = (row for row in rows if row["image"][0] == "a" and row["class"] == "1")
        assert float(row["area_fraction"]) == 20 / mask.size
        assert row["particles_whole"] == "1" and float(row["max_area_px2"]) == 20
        assert float(row["mean_aspect_ratio"]) == 5 / 4
        others = [row for row in rows if row["image"][0] != "a"]
        assert {tuple(row.values()) for row in others} <= {
            tuple(row.values())
            for row in csv.DictReader(whole["measurements.csv"].decode().splitlines())
        }
    for more in (["--min_px", "30"], ["--um_per_px", "0.5"], ["--grain_classes", "1"]):
        measured.clear()
        assert main([*options, *more]) == 0
        assert len(measured) == 3


def test_another_scale_measures_and_draws_anew_without_predicting(
    tmp_path: Path, weights: Path, monkeypatch
) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main([*options, "--particles"]) == 0
    assert (tmp_path / "o" / "particles.csv").exists()
    before = (tmp_path / "o" / "overlay" / "a.png").read_bytes()
    monkeypatch.setattr(Segmenter, "bands", None)  # predicting would fail
    assert main([*options, "--um_per_px", "0.3"]) == 0
    assert (tmp_path / "o" / "overlay" / "a.png").read_bytes() != before
    assert "number_per_mm2" in rows_of(tmp_path / "o" / "measurements.csv")[0]
    assert not (tmp_path / "o" / "particles.csv").exists()  # its lengths were in pixels


def test_other_names_of_classes_are_drawn_without_predicting(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where names are given later: the legend of an overlay has them, too."""
    images = write_images(tmp_path / "imgs", "a.png")
    overlay = tmp_path / "o/overlay/a.png"
    pictures = []
    for first in ("matrix", "ferrite"):
        segmenter = Segmenter(weights, device="cpu")
        segmenter.class_names = [first, *segmenter.class_names[1:]]
        folder = Folder(segmenter, list_images(images, tmp_path), tmp_path / "o")
        folder.run()
        pictures.append(overlay.read_bytes())
        monkeypatch.setattr(Segmenter, "bands", None)  # predicting again would fail
    assert pictures[0] != pictures[1] and folder.bad == []


def results(out: Path) -> dict[str, bytes]:
    """All files of a folder of results but its page, which has the time."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "report.html")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_reading_ahead_and_writing_behind_change_no_byte(
    tmp_path: Path, weights: Path, monkeypatch
) -> None:
    names = [f"{number}.png" for number in range(5)]
    images = write_images(tmp_path / "imgs", *names)
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    options = ["--weights", str(weights), "--images", str(images), "--particles", "--out"]
    assert main([*options, str(tmp_path / "a")]) == 1
    monkeypatch.setattr("metallography.folder.AHEAD", 0)  # each image has the memory to itself
    assert main([*options, str(tmp_path / "b")]) == 1
    monkeypatch.setattr(
        Folder, "each", lambda folder, items: (item for item in items)
    )  # no thread at all
    assert main([*options, str(tmp_path / "c")]) == 1
    found = results(tmp_path / "a")
    assert found == results(tmp_path / "b") == results(tmp_path / "c")
    assert sum(name.startswith("classes/") for name in found) == 4


def test_an_image_that_changes_after_it_was_read_ahead_is_read_again(
    tmp_path: Path, weights: Path, monkeypatch
) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    plain = Folder.predict

    def predict(folder: Folder, item: Item, image: np.ndarray) -> np.ndarray:
        if item.name == "a":
            assert folder.ahead is None  # it was taken
            Image.fromarray(picture(9, 32, 56)).save(images / "b.png")
        return plain(folder, item, image)

    monkeypatch.setattr(Folder, "predict", predict)
    out = tmp_path / "out"
    assert main(["--weights", str(weights), "--images", str(images), "--out", str(out)]) == 0
    ids = np.asarray(Image.open(out / "classes" / "b.png"))
    np.testing.assert_array_equal(ids, expected_mask(picture(9, 32, 56)))


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, weights: Path, monkeypatch, capsys
) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")

    def full(path: Path, *others: object) -> None:
        raise UserError(f"{path}: no space left")

    monkeypatch.setattr("metallography.folder.save_picture", full)
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("a.png: no space left")
    assert (tmp_path / "o" / RECORD).read_text().count("\n") == 1  # no image is done


def test_a_run_goes_on_after_bad_files(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "z.png")
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    (images / "empty.tif").write_bytes(b"")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 1
    lines = capsys.readouterr().err.strip().splitlines()[-3:]
    assert lines[0] == "2 file(s) could not be used:"
    assert "broken.png" in lines[1] and "empty.tif" in lines[2]
    assert [r["image"] for r in rows_of(tmp_path / "o" / "measurements.csv")[::3]] == ["a", "z"]
    assert "broken.png" in (tmp_path / "o" / "summary.md").read_text(encoding="utf-8")


def test_comparison_with_true_masks(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "sub/b.png", "c.png", "d.png")
    masks = tmp_path / "gt"
    for name in ("a.png", "sub/b.png"):
        truth = expected_mask(np.asarray(Image.open(images / name))).astype(np.uint8)
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "a.png":
            truth[:, :10] = 0
        Image.fromarray(truth).save(masks / name)
    Image.fromarray(np.zeros((40, 47), np.uint8)).save(masks / "d.png")  # not the image's size
    out = tmp_path / "o"
    options = ["--weights", str(weights), "--images", str(images), "--masks", str(masks)]
    assert main([*options, "--out", str(out)]) == 1
    assert "4 image(s) predicted, 0 were done" in capsys.readouterr().out
    assert main([*options, "--out", str(out)]) == 1
    assert "0 image(s) predicted, 4 were done" in capsys.readouterr().out
    rows = rows_of(out / "comparison.csv")
    assert [r["image"] for r in rows] == ["a"] * 3 + ["sub/b"] * 3
    predicted = np.asarray(Image.open(out / "classes" / "a.png"))
    truth = np.asarray(Image.open(masks / "a.png"))
    for c in range(3):
        error = (predicted == c).mean() - (truth == c).mean()
        assert float(rows[c]["area_fraction_error"]) == pytest.approx(error)
        assert float(rows[3 + c]["area_fraction_error"]) == float(rows[3 + c]["number_error"]) == 0
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "1 image(s) without a true mask (first: c)" in summary
    assert "d.png: 47x40, its image is 48x40" in summary
    matrix = summary.split("predicted class")[1].split("##")[0].split("\n| ")[3:6]
    counts = np.array([[int(v) for v in line.rstrip(" |\n").split(" | ")[1:]] for line in matrix])
    both = np.asarray(Image.open(out / "classes" / "sub" / "b.png"))
    for true in range(3):
        for found in range(3):
            by_hand = ((truth == true) & (predicted == found)).sum() + (both == true).sum() * (
                true == found
            )
            assert counts[true, found] == by_hand


def test_outputs_inside_the_folder_are_no_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "o/classes/a.png", "gt/a.png")
    (tmp_path / "imgs" / ".git").mkdir()
    found = list_images(images, images / "o", images / "gt")
    assert [item.name for item in found] == ["a"]
    assert [item.name for item in list_images(images / "a.png", tmp_path)] == ["a"]


def test_a_record_cut_off_by_a_kill_is_taken_up(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 0
    record = tmp_path / "o" / RECORD
    lines = record.read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines[1:]] == ["a", "b"]
    record.write_text("\n".join([*lines[:2], lines[2][:9]]))
    capsys.readouterr()
    assert main(options) == 0
    assert "1 image(s) predicted, 1 were done" in capsys.readouterr().out
    assert main(options) == 0
    assert "0 image(s) predicted, 2 were done" in capsys.readouterr().out


# ---------------------------------------------------------------- damage


def options_of(tmp_path: Path, weights: Path, *names: str) -> list[str]:
    images = write_images(tmp_path / "imgs", *names)
    return ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]


@pytest.mark.parametrize("kind", ["classes", "gray", "overlay"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_result_is_made_anew(tmp_path, weights, capsys, kind, damage) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png")
    assert main(options) == 0
    path = tmp_path / "o" / kind / "a.png"
    good, table = path.read_bytes(), (tmp_path / "o" / "measurements.csv").read_bytes()
    middle = good.index(b"IDAT") + 12
    path.write_bytes({
        "cut": good[:-20],
        "flipped": good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1 :],
        "empty": b"",
        "text": b"hello",
    }[damage])  # fmt: skip
    capsys.readouterr()
    assert main(options) == 0
    told = capsys.readouterr().out
    assert f"{kind}/a.png: damaged; the results of a are made anew" in told
    assert "1 image(s) predicted, 1 were done" in told
    assert path.read_bytes() == good
    assert (tmp_path / "o" / "measurements.csv").read_bytes() == table


def correct(path: Path, label: int) -> None:
    """Save a class map of one class, as somebody might."""
    Image.fromarray(np.full((40, 48), label, np.uint8)).save(path)


def corrected_after(tmp_path: Path, weights: Path, label: int) -> tuple[list[str], Path]:
    """A prediction's options, and its class map, which was corrected to one class since."""
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    path = tmp_path / "o" / "classes" / "a.png"
    correct(path, label)
    return options, path


def test_a_corrected_class_map_with_a_class_that_the_model_lacks_is_left(
    tmp_path, weights, capsys
) -> None:
    options, path = corrected_after(tmp_path, weights, 3)
    mine = path.read_bytes()
    assert main(options) == 1 and path.read_bytes() == mine
    said = f"{path}: corrected since it was predicted: it holds class 3, and the model has 0 to 2"
    assert said in capsys.readouterr().err
    assert main([*options, "--overwrite"]) == 0 and path.read_bytes() != mine


def test_a_class_map_that_somebody_corrected_is_measured_and_drawn_as_it_is(
    tmp_path, weights
) -> None:
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    out = tmp_path / "o"
    drawn = (out / "overlay" / "a.png").read_bytes()
    Image.fromarray(np.full((40, 48), 2, np.uint8)).save(out / "classes" / "a.png")
    assert main(options) == 0
    rows = rows_of(out / "measurements.csv")
    assert [float(row["area_fraction"]) for row in rows] == [0, 0, 1]
    assert (np.asarray(Image.open(out / "gray" / "a.png")) == 255).all()
    again = (out / "overlay" / "a.png").read_bytes()
    assert again != drawn
    assert main(options) == 0 and (out / "overlay" / "a.png").read_bytes() == again


def test_a_corrected_class_map_outlives_a_change_of_its_image(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png")
    assert main(options) == 0
    paths = [tmp_path / "o" / "classes" / name for name in ("a.png", "b.png")]
    Image.fromarray(np.full((40, 48), 2, np.uint8)).save(paths[0])
    kept, predicted = (path.read_bytes() for path in paths)
    for name in ("a.png", "b.png"):  # a folder that was copied again
        os.utime(tmp_path / "imgs" / name, ns=(0, 0))
    capsys.readouterr()
    assert main(options) == 0
    assert [path.read_bytes() for path in paths] == [kept, predicted]
    said = capsys.readouterr().out
    image = tmp_path / "imgs" / "a.png"
    assert f"{paths[0]}: corrected since it was predicted, so it is kept, though {image}" in said
    assert "2 image(s) predicted" not in said and f"{paths[1]}:" not in said
    write_images(tmp_path / "imgs", "a.png")
    Image.fromarray(np.zeros((30, 48), np.uint8)).save(image)  # of another size: no map of it
    assert main(options) == 1 and paths[0].read_bytes() == kept
    assert "48x40, and its image is 48x30; move it away" in capsys.readouterr().err


def test_a_map_that_was_being_written_when_the_program_was_killed_is_no_correction(
    tmp_path, weights, monkeypatch, capsys
) -> None:
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    Image.fromarray(255 - np.asarray(Image.open(tmp_path / "imgs" / "a.png"))).save(
        tmp_path / "imgs" / "a.png"
    )
    with monkeypatch.context() as patch:
        patch.setattr("metallography.folder.overlay", lambda *_: exec("raise KeyboardInterrupt"))
        assert main(options) == 130
    write_images(tmp_path / "imgs", "a.png")  # another image again
    capsys.readouterr()
    assert main(options) == 0
    assert "corrected" not in capsys.readouterr().out
    ids = np.asarray(Image.open(tmp_path / "o" / "classes" / "a.png"))
    np.testing.assert_array_equal(
        ids, expected_mask(np.asarray(Image.open(tmp_path / "imgs" / "a.png")))
    )


def test_pictures_outlines_and_page_show_what_was_measured_of_a_corrected_map(
    tmp_path, weights
) -> None:
    """A correction from before the crop looks as one that was made after it, within its field."""
    shown = []
    for place, before in (("early", True), ("late", False)):
        own, cut = tmp_path / place, ["--crop", "0,10,0,0"]
        options = [*options_of(own, weights, "a.png"), "--outlines", "geojson"]
        assert main([*options, *([] if before else cut)]) == 0
        ids = np.full((40, 48), 2, np.uint8)
        ids[30 if not before else 40 :] = 255
        Image.fromarray(ids).save(own / "o" / "classes" / "a.png")
        assert main([*options, *cut]) == 0
        out = own / "o"
        kinds = ("outlines/a.geojson", "sheet.png", "overlay/a.png", "gray/a.png")
        page = (out / "report.html").read_text(encoding="utf-8")
        layers = re.findall(r"data:image/png;base64,[^\"')]+", page)
        shown.append([*((out / kind).read_bytes() for kind in kinds), layers])
        ring = json.loads((out / kinds[0]).read_text())["features"][0]["geometry"]
        assert max(y for x, y in np.reshape(ring["coordinates"], (-1, 2))) == 30  # of 40 rows
        assert "not measured" in page and len(layers) >= 2
    assert shown[0] == shown[1]
    # With another crop, and none asked for, outlines of the one before are gone.
    options = options_of(tmp_path / "early", weights, "a.png")
    assert main([*options, "--crop", "0,20,0,0"]) == 0
    assert not (tmp_path / "early" / "o" / "outlines" / "a.geojson").exists()


def test_a_corrected_map_follows_the_field_and_says_so_every_time(
    tmp_path, weights, capsys
) -> None:
    options, path = corrected_after(tmp_path, weights, 2)
    for _ in range(2):
        capsys.readouterr()
        assert main([*options, "--crop", "0,10,0,0"]) == 0
        assert f"{path}: corrected since it was predicted, so it is kept" in capsys.readouterr().out
        rows = rows_of(tmp_path / "o" / "measurements.csv")
        assert [row["field_px"] for row in rows] == [str(30 * 48)] * 3
    ids = np.full((40, 48), 2, np.uint8)
    ids[30:] = 255  # as the program saves a cut image
    Image.fromarray(ids).save(path)
    assert main(options) == 1
    assert "more of its image counts now; correct it there, too" in capsys.readouterr().err


def test_the_probabilities_of_a_corrected_image_are_the_networks(tmp_path, weights) -> None:
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    path = tmp_path / "o" / "classes" / "a.png"
    predicted = np.asarray(Image.open(path)).copy()
    correct(path, 2)
    assert main([*options, "--probabilities"]) == 0
    given = np.load(tmp_path / "o" / "probabilities" / "a.npy")
    assert (given.argmax(2) == predicted).mean() > 0.99
    assert (np.asarray(Image.open(path)) == 2).all()


def test_damaged_probabilities_are_made_anew(tmp_path, weights, capsys) -> None:
    options = [*options_of(tmp_path, weights, "a.png"), "--probabilities"]
    assert main(options) == 0
    path = tmp_path / "o" / "probabilities" / "a.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    assert main(options) == 0
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "contents",
    [
        b"\x00\xff\xfe",
        b"[1, 2]\n",
        b'{"name": "a"}\n',
        b'{"nothing": 1}\n{"x": 2}\n',
        b"\xef\xbb\xbf",
    ],
)
def test_a_damaged_record_is_made_anew(tmp_path, weights, capsys, contents) -> None:
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    record = tmp_path / "o" / RECORD
    good = record.read_bytes()
    record.write_bytes(contents)
    capsys.readouterr()
    assert main(options) == 2 and record.read_bytes() == contents  # whose are the maps?
    assert main([*options, "--overwrite"]) == 0
    assert "1 image(s) predicted, 0 were" in capsys.readouterr().out
    assert good.splitlines() == [record.read_bytes().splitlines()[n] for n in (0, -1)]
    assert not (tmp_path / "o" / "set_aside").exists()  # the map was as it is predicted again
    shutil.rmtree(tmp_path / "o")
    (tmp_path / "o").mkdir()
    record.write_bytes(contents)
    assert main(options) == 0
    assert f"{RECORD}: damaged; made anew" in capsys.readouterr().out
    assert record.read_bytes() == good


@pytest.mark.parametrize(
    "mine",
    ["classes/a.png", "gray/sub/b.png", "overlay/a.png", "particles.csv", "summary.md",
     "measurements.csv", "sheet.png", "report.html"],
)  # fmt: skip
def test_files_that_may_be_the_users_are_not_replaced(tmp_path, weights, capsys, mine) -> None:
    options = options_of(tmp_path, weights, "a.png", "sub/b.png")
    path = tmp_path / "o" / mine
    path.parent.mkdir(parents=True)
    correct(path.with_suffix(".png"), 1)
    path.with_suffix(".png").rename(path)
    before = results(tmp_path / "o"), path.read_bytes()
    assert main(options) == 2
    error = capsys.readouterr().err
    assert f"{path}: would be replaced" in error and error.count("\n") == 1
    assert "--overwrite" in error and "another --out" in error
    assert (results(tmp_path / "o"), path.read_bytes()) == before
    assert {p.name for p in (tmp_path / "o").rglob("*")} == {*Path(mine).parts}


def test_overwriting_moves_class_maps_of_unknown_origin_and_leaves_other_tables(
    tmp_path, weights, capsys
) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png")
    out = tmp_path / "o"
    (out / "classes").mkdir(parents=True)
    correct(out / "classes" / "a.png", 1)
    mine = (out / "classes" / "a.png").read_bytes()
    (out / "particles.csv").write_text("of mine")
    assert main([*options, "--overwrite"]) == 0
    assert (out / "set_aside" / "a.png").read_bytes() == mine
    assert "1 class map(s)" in (told := capsys.readouterr().out)
    assert f"were moved to {out / 'set_aside'}: a\n" in told
    assert (out / "particles.csv").read_text() == "of mine"  # no record said whose it is
    ids = np.asarray(Image.open(out / "classes" / "a.png"))
    image = np.asarray(Image.open(tmp_path / "imgs" / "a.png"))
    np.testing.assert_array_equal(ids, expected_mask(image))


def test_overwriting_with_other_weights_moves_what_was_corrected(
    tmp_path, weights, monkeypatch, capsys
) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png", "c.png")
    classes, aside = tmp_path / "o" / "classes", tmp_path / "o" / "set_aside"
    assert main(options) == 0
    for name, label in (("a.png", 1), ("c.png", 2)):
        correct(classes / name, label)
    mine = {name: (classes / name).read_bytes() for name in ("a.png", "c.png")}
    assert main(options) == 0  # they are kept, and drawn
    other = torch.load(weights, weights_only=True)
    other["finetune"]["decode.outc.fc1.weight"] *= -1
    torch.save(other, weights)
    assert main(options) == 2  # "give --overwrite or another --out"
    with monkeypatch.context() as patch:  # killed after a was predicted
        patch.setattr(Folder, "measure", lambda *_: exec("raise KeyboardInterrupt"))
        assert main([*options, "--overwrite"]) == 130
    capsys.readouterr()
    assert main([*options, "--overwrite"]) == 0
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == mine
    assert "class map(s) that are not as this program wrote them" in capsys.readouterr().out
    for name, label in (("a.png", 1), ("b.png", 1), ("c.png", 2)):  # all are predicted
        assert (np.asarray(Image.open(classes / name)) != label).any()
    correct(classes / "a.png", 0)
    assert main([*options, "--overwrite"]) == 0
    assert (aside / "a.png").read_bytes() == mine["a.png"]
    assert (np.asarray(Image.open(aside / "a~2.png")) == 0).all()


@pytest.mark.parametrize("flags", [["--overwrite"], []], ids=["again", "without"])
def test_an_interrupted_overwriting_goes_on(
    tmp_path, weights, monkeypatch, capsys, flags: list[str]
) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png", "c.png")
    classes, aside = tmp_path / "o" / "classes", tmp_path / "o" / "set_aside"
    assert main(options) == 0
    for name in ("a.png", "b.png"):
        correct(classes / name, 1)
    mine = {name: (classes / name).read_bytes() for name in ("a.png", "b.png")}
    assert main(options) == 0
    other = torch.load(weights, weights_only=True)
    other["finetune"]["decode.outc.fc1.weight"] *= -1
    torch.save(other, weights)
    with monkeypatch.context() as patch:  # killed after a was predicted
        patch.setattr(Folder, "measure", lambda *_: exec("raise KeyboardInterrupt"))
        patch.setattr(Folder, "read_ahead", lambda *_: None)
        assert main([*options, "--overwrite"]) == 130
    assert "The same command goes on with the images not done yet" in capsys.readouterr().err
    assert [path.name for path in aside.iterdir()] == ["a.png"]
    a = (classes / "a.png").read_bytes()
    head = json.loads((tmp_path / "o" / RECORD).read_text().splitlines()[0])
    assert head["overwrite"] is True
    assert main([*options, *flags]) == 0
    said = capsys.readouterr()
    assert "2 image(s) predicted, 1 were done already" in said.out
    assert "corrected since it was predicted" not in said.out + said.err
    assert (classes / "a.png").read_bytes() == a
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == mine
    assert (np.asarray(Image.open(classes / "b.png")) != 1).any()
    # All is done: what is corrected now is kept, and --overwrite begins anew.
    assert "overwrite" not in json.loads((tmp_path / "o" / RECORD).read_text().splitlines()[0])
    correct(classes / "b.png", 2)
    assert main(options) == 0
    assert "0 image(s) predicted, 3 were done" in capsys.readouterr().out
    assert main([*options, "--overwrite"]) == 0
    assert "3 image(s) predicted, 0 were done" in capsys.readouterr().out
    assert (np.asarray(Image.open(aside / "b~2.png")) == 2).all()


def test_overwriting_with_other_settings_than_the_interrupted_one_begins_anew(
    tmp_path, weights, monkeypatch, capsys
) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png")
    assert main(options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "measure", lambda *_: exec("raise KeyboardInterrupt"))
        assert main([*options, "--overwrite"]) == 130
    assert main([*options, "--tta"]) == 2
    capsys.readouterr()
    assert main([*options, "--tta", "--overwrite"]) == 0
    assert "2 image(s) predicted, 0 were done" in capsys.readouterr().out


def test_results_of_an_earlier_run_go_with_it(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png", "c.png")
    out = tmp_path / "o"
    assert main([*options, "--xlsx", "--probabilities", "--outlines", "geojson"]) == 0
    made = [f"probabilities/{name}.npy" for name in "abc"]
    made += [f"outlines/{name}.geojson" for name in "abc"]
    assert all((out / name).is_file() for name in [*made, "measurements.xlsx"])
    (out / "outlines" / "b.geojson").write_text("mine")
    for name in ("a.png", "b.png"):  # other images now
        Image.fromarray(255 - np.asarray(Image.open(tmp_path / "imgs" / name))).save(
            tmp_path / "imgs" / name
        )
    capsys.readouterr()
    assert main(options) == 0
    told = capsys.readouterr().out
    left = {name for name in [*made, "measurements.xlsx"] if (out / name).exists()}
    assert left == {"probabilities/c.npy", "outlines/b.geojson", "outlines/c.geojson"}
    assert (out / "outlines" / "b.geojson").read_text() == "mine"
    assert "1 file(s) of outlines of earlier class maps removed: " in told
    assert main([*options, "--xlsx"]) == 0
    (out / "measurements.xlsx").write_bytes(b"with a chart of mine")
    assert main(options) == 0
    assert (out / "measurements.xlsx").read_bytes() == b"with a chart of mine"
    said = "measurements.xlsx: not as this program wrote it, so it is left"
    assert said in capsys.readouterr().out and said in (out / "summary.md").read_text()
    assert main([*options, "--xlsx", "--overwrite"]) == 0
    assert main([*options, "--overwrite"]) == 0
    assert not (out / "measurements.xlsx").exists()


def test_a_class_map_is_not_moved_out_of_a_folder_that_is_a_link(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png")
    (tmp_path / "mine").mkdir()
    correct(tmp_path / "mine" / "a.png", 1)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "classes").symlink_to(tmp_path / "mine", target_is_directory=True)
    assert main([*options, "--overwrite"]) == 2
    assert "through links; remove the link" in capsys.readouterr().err
    assert (np.asarray(Image.open(tmp_path / "mine" / "a.png")) == 1).all()


def test_what_was_moved_is_no_image(tmp_path, weights) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "run/corrected/a.png", "run/set_aside/a.png")
    (images / "run" / RECORD).write_text("{}")
    assert [item.name for item in list_images(images, tmp_path / "o")] == ["a"]


def test_a_damaged_line_of_the_record_costs_its_image_alone(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png", "c.png")
    assert main(options) == 0
    record = tmp_path / "o" / RECORD
    head, *lines = record.read_text().splitlines()
    record.write_text("\n".join([head, lines[0], '{"name": 3}', "\x00{]", lines[2]]) + "\n")
    capsys.readouterr()
    assert main(options) == 0
    assert "1 image(s) predicted, 2 were done" in capsys.readouterr().out


def test_an_unreadable_sub_folder_or_picture_stops_no_other(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png", "sub/b.jfif")
    (tmp_path / "imgs" / "c.czi").write_bytes(b"ZISRAWFILE")
    os.mkfifo(tmp_path / "imgs" / "pipe.tif")
    assert main(options) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].endswith(
        "c.czi: .czi files are not read; export it as TIFF or PNG"
    )
    assert "left out, a pipe, no file: pipe.tif" in told.out
    summary = (tmp_path / "o" / "summary.md").read_text(encoding="utf-8")
    assert "c.czi" in summary and "pipe.tif" in summary
    assert [row["image"] for row in rows_of(tmp_path / "o" / "measurements.csv")[::3]] == [
        "a", "sub/b",
    ]  # fmt: skip


def test_every_page_is_an_image_of_its_own(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png")
    pages = [picture(k, 30, 30 + k) for k in (0, 0, 5, 0)]
    pages[1], pages[3] = 255 - pages[0], pages[0].T.copy()
    with TiffWriter(tmp_path / "imgs" / "stack.tif") as file:
        for page in pages:
            file.write(page, contiguous=False)
        file.write(pages[0][::2, ::2], subfiletype=1)
    for name, page in (("stack-p1", pages[0]), ("stack-p2", pages[1]), ("stack-p4", pages[3])):
        (tmp_path / "alone").mkdir(exist_ok=True)
        Image.fromarray(page).save(tmp_path / "alone" / f"{name}.png")
    for _ in range(2):  # what is done already is told again
        assert main(options) == 0
        told = capsys.readouterr().out
        assert "every page is an image of its own: stack.tif (3 pages)" in told
        assert "than the others of their file: stack.tif (preview 15x15, page 3 35x30)" in told
    out = tmp_path / "o"
    alone = [*options[:3], str(tmp_path / "alone"), "--out", str(tmp_path / "q")]
    assert main(alone) == 0
    rows = rows_of(out / "measurements.csv")
    for row in rows_of(tmp_path / "q" / "measurements.csv"):
        assert {**row, "batch": ""} in rows  # the file's name has no batch
    names = ["a", "stack-p1", "stack-p2", "stack-p4"]
    assert [row["image"] for row in rows[::3]] == names
    for name in names[1:]:
        found = (out / "classes" / f"{name}.png").read_bytes()
        assert found == (tmp_path / "q" / "classes" / f"{name}.png").read_bytes()


def test_a_page_is_compared_with_the_mask_of_its_name(tmp_path, weights) -> None:
    options = options_of(tmp_path, weights, "a.png")
    first, *more = (Image.fromarray(picture(k, 30, 30)) for k in range(3))
    stack = tmp_path / "imgs" / "stack.tif"
    first.save(stack, save_all=True, append_images=more)
    (tmp_path / "masks").mkdir()
    for name in ("stack", "stack-p3"):  # that of the file is the first page's
        Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    masks = ["--masks", str(tmp_path / "masks")]
    assert main([*options, *masks]) == 0
    compared = {row["image"] for row in rows_of(tmp_path / "o" / "comparison.csv")}
    assert compared == {"stack-p1", "stack-p3"}
    assert main([*options[:3], str(stack), "--out", str(tmp_path / "p"), *masks]) == 0
    assert compared == {row["image"] for row in rows_of(tmp_path / "p" / "comparison.csv")}


def test_true_masks_may_be_stacks_with_a_page_for_each_page(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png")
    pages = [picture(k, 30, 30) for k in range(3)]
    imwrite(tmp_path / "imgs" / "stack.tif", np.stack(pages), photometric="minisblack")
    truths = [expected_mask(page).astype(np.uint8) for page in pages]
    truths[1][:, :15] = 0
    (tmp_path / "masks").mkdir()
    imwrite(tmp_path / "masks" / "stack.tif", np.stack(truths), photometric="minisblack")
    imwrite(tmp_path / "masks" / "a.tiff", np.zeros((40, 48), np.uint8))
    masks = ["--masks", str(tmp_path / "masks")]
    assert main([*options, *masks]) == 0
    rows = rows_of(tmp_path / "o" / "comparison.csv")
    assert [r["image"] for r in rows[::3]] == ["a", "stack-p1", "stack-p2", "stack-p3"]
    for page, number in ((0, 3), (2, 9)):  # what is right on page 1 and 3, and not on page 2
        assert all(float(r["area_fraction_error"]) == 0 for r in rows[number : number + 3]), page
    whole = expected_mask(pages[1])
    for c in range(3):
        error = (whole == c).mean() - (truths[1] == c).mean()
        assert float(rows[6 + c]["area_fraction_error"]) == pytest.approx(error)
    imwrite(tmp_path / "masks" / "stack.tif", np.stack(truths[:2]), photometric="minisblack")
    assert main([*options, *masks]) == 1
    assert "stack.tif: 2 pages, its image has 3; save as many" in capsys.readouterr().err


def test_an_image_that_was_read_otherwise_is_made_anew_once(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png", "b.png", "c.png")
    for name in ("a", "b"):  # c stays as it is
        path = tmp_path / "imgs" / f"{name}.png"
        pixels = np.asarray(Image.open(path))
        if name == "a":
            exif = Image.Exif()
            exif[274] = 3  # half a turn: the map keeps its size
            Image.fromarray(pixels).save(path, exif=exif)
        else:
            imwrite(path.with_suffix(".tif"), pixels, photometric="miniswhite")
            path.unlink()
    assert main(options) == 0
    out, record = tmp_path / "o", tmp_path / "o" / RECORD
    found = {path.name: path.read_bytes() for path in (out / "classes").iterdir()}
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line.pop("reading", None) for line in lines[1:]] == [2, 2, None]
    for line in lines[1:]:
        del line["map"], line["drawn"]
    record.write_text("".join(f"{json.dumps(line)}\n" for line in lines))  # as it was before
    for name in found:
        Image.fromarray(np.full(pixels.shape, 1, np.uint8)).save(out / "classes" / name)
    corrected = (out / "classes" / "c.png").read_bytes()
    capsys.readouterr()
    assert main(options) == 0
    told = capsys.readouterr().out
    assert told.count("predicted when its orientation or tags were read otherwise") == 2
    assert f"{tmp_path / 'imgs' / 'a.png'}: predicted when" in told
    now = {path.name: path.read_bytes() for path in (out / "classes").iterdir()}
    assert now == {**found, "c.png": corrected}
    assert main(options) == 0
    assert "read otherwise" not in capsys.readouterr().out


# ---------------------------------------------------------------- names


def test_no_two_images_have_one_name() -> None:
    def named(*names: str) -> list[str]:
        return result_names([Path(name) for name in names])

    assert named("a.png", "sub/a.png") == ["a", "sub/a"]
    assert named("t.bmp", "t.png") == ["t.bmp", "t.png"]
    # t.png.tif would be called t.png, which the twin has.
    assert named("t.bmp", "t.png", "t.png.tif") == ["t.bmp", "t.png", "t.png.tif"]
    assert named("A.png", "a.png") == ["A.png", "a.png~2"]  # one file on a Mac or a USB stick
    assert named("a\u0301.png", "\u00e1.png") == ["a\u0301.png", "\u00e1.png~2"]
    # The map of a.tif is a.png, which is a folder for the others.
    assert named("a.png/x.tif", "a.tif") == ["a.png/x", "a.tif"]
    long = "x" * 251
    assert named(f"{long}.png") == [long]
    (cut, other) = named(f"{long}.png", f"{long}.bmp")
    assert max(len(cut), len(other)) <= 251 and cut != other


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes, as Linux has them")
def test_names_of_any_bytes_survive(tmp_path, weights, capsys) -> None:
    raw = [b"=1+1.png", b"-x.png", b"@a.png", b"+b.png", b"a\nb.png", b"<b>bold & x.png",
           b"\xff\xfe.png", b"a|b`c[d].png", b" .png", b"\xe2\x80\xae.png", b"%s{0}.png",
           b"x" * 251 + b".png"]  # fmt: skip
    images = tmp_path / "imgs"
    images.mkdir()
    for seed, name in enumerate(raw):
        Image.fromarray(picture(seed, 20, 24)).save(images / "t.png")
        os.rename(images / "t.png", os.path.join(os.fsencode(images), name))
    out = tmp_path / "o"
    options = ["--weights", str(weights), "--images", str(images), "--out", str(out)]
    for done in (0, len(raw)):
        assert main(options) == 0
        said = f"{len(raw) - done} image(s) predicted, {done} were done"
        assert said in capsys.readouterr().out
    assert {os.fsencode(path.name) for path in (out / "classes").iterdir()} == set(raw)
    names = {row["image"] for row in rows_of(out / "measurements.csv")}
    assert {"'=1+1", "'-x", "'@a", "'+b", "a\nb", "<b>bold & x", "\\udcff\\udcfe"} <= names
    assert not [name for name in names if name.startswith(("=", "+", "-", "@"))]
    json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert main([*options[:2], "--rank", str(images), "--out", str(tmp_path / "r")]) == 0
    assert len(rows_of(tmp_path / "r" / "ranking.csv")) == len(raw)


def test_html_in_names_is_text_in_the_summary(tmp_path, weights) -> None:
    options = options_of(tmp_path, weights, "<img src=x onerror=alert(1)>_a.png", "b_a.png")
    (tmp_path / "imgs" / "<script>.png").write_bytes(b"")
    assert main(options) == 1
    summary = (tmp_path / "o" / "summary.md").read_text(encoding="utf-8")
    assert "<img" not in summary and "<script>" not in summary
    assert "&lt;img src=x onerror=alert(1)&gt;" in summary and "&lt;script&gt;" in summary


# ---------------------------------------------------------------- what is no micrograph


def test_masks_beside_the_images_are_compared_and_not_measured(tmp_path, weights) -> None:
    images = write_images(tmp_path / "imgs", "a.tif", "b.tif")
    truth = expected_mask(np.asarray(Image.open(images / "a.tif"))).astype(np.uint8)
    Image.fromarray(truth).save(images / "a.png")
    out = tmp_path / "o"
    options = ["--weights", str(weights), "--images", str(images), "--out", str(out)]
    assert main([*options, "--masks", str(images)]) == 0
    assert {row["image"] for row in rows_of(out / "measurements.csv")} == {"a", "b"}
    rows = rows_of(out / "comparison.csv")
    assert {row["image"] for row in rows} == {"a"}
    assert all(float(row["area_fraction_error"]) == 0 for row in rows)
    assert main(options) == 0  # without --masks its few values tell the mask
    assert {row["image"] for row in rows_of(out / "measurements.csv")} == {"a", "b"}


def test_a_second_run_beside_the_first_measures_the_images_alone(tmp_path, weights, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "gt/a.png", "a_overlay.png")
    for number in range(3):
        out = images / f"run{number}"
        options = ["--weights", str(weights), "--images", str(images), "--out", str(out)]
        assert main(options) == 0
        assert {row["image"] for row in rows_of(out / "measurements.csv")} == {"a"}
    told = capsys.readouterr().out
    assert "run0/classes, run0/gray" in told and "a_overlay.png" in told and "gt/a.png" in told


def test_a_folder_of_results_alone_says_so(tmp_path, weights) -> None:
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    with pytest.raises(DataError, match="no image in it; .*results of this program: classes, gray"):
        list_images(tmp_path / "o", tmp_path / "p")


# ---------------------------------------------------------------- the folder of the results


def test_a_second_process_is_refused(tmp_path, weights, capsys) -> None:
    options = options_of(tmp_path, weights, "a.png")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "o"), str(ROOT)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for task in ("--images", "--rank"):
            words = [task if word == "--images" else word for word in options]
            assert main(words) == 2
            error = capsys.readouterr().err
            assert f"{tmp_path / 'o'}: another process is predicting there" in error
            assert error.count("\n") == 1
        holder.kill()
    assert main(options) == 0
    assert not (tmp_path / "o" / ".lock").exists()


@pytest.mark.parametrize("kind", ["classes", "gray", "overlay", "probabilities"])
def test_nothing_is_written_out_of_the_folder_through_a_link(
    tmp_path, weights, capsys, kind
) -> None:
    options = [*options_of(tmp_path, weights, "a.png"), "--probabilities", "--overwrite"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_text("mine")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / kind).symlink_to(tmp_path / "mine", target_is_directory=True)
    assert main(options) == 2
    error = capsys.readouterr().err
    assert "through links; remove the link" in error and error.count("\n") == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.png"]
    assert (tmp_path / "mine" / "a.png").read_text() == "mine"


def test_tables_that_are_links_are_replaced_and_their_targets_kept(tmp_path, weights) -> None:
    options = [*options_of(tmp_path, weights, "a.png"), "--particles"]
    (tmp_path / "o").mkdir()
    names = (RECORD, "measurements.csv", "particles.csv", "batches.csv", "summary.md",
             "summary.json", "sheet.png")  # fmt: skip
    for name in names:
        (tmp_path / f"mine_{name}").write_text("")
        (tmp_path / "o" / name).symlink_to(tmp_path / f"mine_{name}")
    assert main(options) == 0
    for name in names:
        assert (tmp_path / f"mine_{name}").read_text() == ""
        assert not (tmp_path / "o" / name).is_symlink()


def test_leftovers_of_a_killed_run_are_removed(tmp_path, weights) -> None:
    options = options_of(tmp_path, weights, "a.png")
    assert main(options) == 0
    (tmp_path / "o" / "classes" / ".a.png.4711.tmp").write_text("half")
    assert main(options) == 0
    assert not list((tmp_path / "o").rglob(".*"))
