"""Folders of images: files counted by hand, predictions against the network, what is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metallography.folder import RECORD, list_images
from metallography.segmenter import Segmenter
from predict import main
from tests.trained_model import expected_mask, picture, rows_of, write_images, write_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "fine.pt", {})


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
    assert {r["batch"] for r in rows_of(out / "batches.csv")} == {"15", "60", "Gefüge", ""}


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
