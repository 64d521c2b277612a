"""predict.py measures the field alone, at each image's own scale: areas and lengths by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from dataset.set_file import SetFile
from imaging.field import Crop
from predict import main
from tests.test_data_bar import micrograph, strip
from tests.trained_model import expected_mask, picture, rows_of, write_images, write_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "fine.pt", {})


def predict(weights: Path, images: Path, out: Path, *words: object) -> int:
    flags = ["--weights", weights, "--images", images, "--out", out, "--device", "cpu", *words]
    return main([str(word) for word in flags])


def classes(out: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(out / "classes" / f"{name}.png"))


def shares(out: Path, name: str) -> list[float]:
    rows = rows_of(out / "measurements.csv")
    return [float(row["area_fraction"]) for row in rows if row["image"] == name]


def barred(path: Path) -> np.ndarray:
    """An image of 40 x 48 with 12 rows of a bar below it; returns it without the bar."""
    bare = picture(0, 40, 48)
    bar = np.zeros((12, 48), np.uint8)
    bar[3:8, 5:30] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack([bare, bar])).save(path)
    return bare


def test_what_is_cut_off_counts_nowhere(tmp_path: Path, weights: Path, capsys) -> None:
    bare, out = barred(tmp_path / "imgs" / "a.png"), tmp_path / "out"
    words = ("--crop", "0,12,0,0", "--probabilities")
    assert predict(weights, tmp_path / "imgs", out, *words) == 0
    assert "Cut off each image: 12 rows at the bottom" in capsys.readouterr().out
    mask, expected = classes(out, "a"), expected_mask(bare)
    assert mask.shape == (52, 48) and (mask[:40] == expected).all() and (mask[40:] == 255).all()
    assert shares(out, "a") == pytest.approx([(expected == c).mean() for c in range(3)])
    assert {row["field_px"] for row in rows_of(out / "measurements.csv")} == {str(40 * 48)}
    given = np.load(out / "probabilities" / "a.npy")
    assert given.shape == (52, 48, 3) and np.isnan(given[40:]).all()
    assert (given[:40].argmax(2) == expected)[given[:40].max(2) > 0.6].all()
    gray = np.asarray(Image.open(out / "gray" / "a.png"))
    assert (gray[40:] == 64).all()  # as far as can be from 0, 128 and 255
    assert "Cut off each image" in (out / "summary.md").read_text(encoding="utf-8")


def test_all_four_sides_and_a_resized_model(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"image_size": 32})
    inner = picture(3, 32, 32)  # predicted as it is
    Image.fromarray(np.pad(inner, ((1, 2), (3, 4)))).save(tmp_path / "a.png")
    assert predict(weights, tmp_path / "a.png", tmp_path / "out", "--crop", "1,2,3,4") == 0
    mask = classes(tmp_path / "out", "a")
    assert (mask[1:33, 3:35] == expected_mask(inner)).all()
    assert (mask == 255).sum() == mask.size - 32 * 32


def test_another_crop_predicts_again(tmp_path: Path, weights: Path, capsys) -> None:
    barred(tmp_path / "imgs" / "a.png")
    write_images(tmp_path / "imgs", "b.png")
    out, imgs = tmp_path / "out", tmp_path / "imgs"
    for words, done in [
        ((), 0), ((), 2), (("--crop", "0,12,0,0"), 0), (("--crop", "0,12,0,0"), 2), ((), 0),
    ]:  # fmt: skip
        assert predict(weights, imgs, out, *words) == 0
        assert f"{2 - done} image(s) predicted, {done} were done" in capsys.readouterr().out


def test_a_crop_that_is_too_large_spares_the_other_images(tmp_path: Path, weights: Path, capsys):
    imgs = write_images(tmp_path / "imgs", "a.png", shape=(60, 60))
    write_images(imgs, "small.png", shape=(20, 20))
    assert predict(weights, imgs, tmp_path / "out", "--crop", "0,30,0,0") == 1
    assert "small.png: 20x20 pixels, of which --crop 0,30,0,0 leaves" in capsys.readouterr().err
    assert shares(tmp_path / "out", "a") and not shares(tmp_path / "out", "small")
    assert predict(weights, imgs, tmp_path / "o", "--crop", "30") == 2
    assert "--crop '30': give four numbers" in capsys.readouterr().err


def test_the_model_remembers_what_was_cut_in_training(tmp_path: Path, capsys) -> None:
    facts = {"crop": [0, 12, 0, 0], "cropped_sizes": [[40, 48]]}
    weights = write_weights(tmp_path / "run" / "fine.pt", facts)
    barred(tmp_path / "imgs" / "a.png")
    write_images(tmp_path / "imgs", "cut.png")  # 40 x 48: as the training images are after it
    out = tmp_path / "out"
    assert predict(weights, tmp_path / "imgs", out) == 0
    said = (
        "Cut off 1 of 2 images (the others have the size of images that were cut): 12 rows at the "
    )
    assert f"{said}bottom, as the training images were" in capsys.readouterr().out
    (tmp_path / "imgs" / "a.png").rename(tmp_path / "a.png")
    assert predict(weights, tmp_path / "imgs", tmp_path / "none cut") == 0
    assert "Cut off 0 of 1 images (the others" in capsys.readouterr().out
    (tmp_path / "a.png").rename(tmp_path / "imgs" / "a.png")
    assert (classes(out, "a")[40:] == 255).all() and (classes(out, "cut") < 3).all()
    assert predict(weights, tmp_path / "imgs", out, "--crop", "0,0,0,0") == 0
    said = capsys.readouterr().out
    assert "--crop 0,0,0,0 where the training images were cut by 0,12,0,0" in said
    assert (classes(out, "a") < 3).all()


def test_images_of_a_prepared_set_are_not_cut_again(tmp_path: Path, capsys) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"crop": [0, 12, 0, 0]})
    images = write_images(tmp_path / "set" / "test_numf" / "img", "a.png")
    names = ("matrix", "γ'", "void")
    SetFile(3, names, crop=Crop(bottom=12), um_per_px={"a.png": 0.5}).write(tmp_path / "set")
    assert predict(weights, images, tmp_path / "out") == 0
    assert (classes(tmp_path / "out", "a") < 3).all() and "Cut off" not in capsys.readouterr().out
    rows = rows_of(tmp_path / "out" / "measurements.csv")
    assert [row["class_name"] for row in rows] == [*names]
    assert {row["um_per_px"] for row in rows} == {"0.5"}


def test_raw_images_below_a_set_are_none_of_its_own(tmp_path: Path, capsys) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"crop": [0, 12, 0, 0]})
    SetFile(3, ("x", "y", "z"), crop=Crop(bottom=12), um_per_px=0.5).write(tmp_path / "set")
    at(tmp_path / "set" / "raw" / "today" / "a.tif", 4, picture(0, 52, 48))  # 0.25 um per pixel
    for images in (tmp_path / "set" / "raw", tmp_path / "set" / "raw" / "today" / "a.tif"):
        out = tmp_path / images.name
        assert predict(weights, images, out) == 0
        assert "Cut off each image: 12 rows at the bottom" in capsys.readouterr().out
        assert (np.asarray(Image.open(next(out.rglob("classes/**/a.png"))))[40:] == 255).all()
        rows = rows_of(out / "measurements.csv")
        assert {row["um_per_px"] for row in rows} == {"0.25"}
        assert {"x", "y", "z"}.isdisjoint(row["class_name"] for row in rows)


def test_names_of_set_and_model_that_differ_are_one_line(tmp_path: Path, capsys) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"class_names": ["a", "b", "c"]})
    images = write_images(tmp_path / "set" / "test_numf" / "img", "a.png")
    SetFile(3, ("x", "y", "z")).write(tmp_path / "set")
    assert predict(weights, images, tmp_path / "out") == 0
    assert "classes are a,b,c, the images' set.json says x,y,z; x,y,z" in capsys.readouterr().out


def test_a_damaged_memory_is_one_line(tmp_path: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    for facts in ({"crop": [1, 2]}, {"crop": "x"}, {"cropped_sizes": [3]}, {"um_per_px": ["a"]}):
        weights = write_weights(tmp_path / "run" / "fine.pt", facts)
        assert predict(weights, images, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "crop, cropped_sizes or um_per_px" in error and error.count("\n") == 1


# ---------------------------------------------------------------- transparency, region, truth


def test_transparent_pixels_and_what_is_outside_the_region(tmp_path: Path, weights: Path) -> None:
    gray = picture(0, 40, 48)
    alpha = np.full(gray.shape, 255, np.uint8)
    alpha[:, 40:] = 0
    (tmp_path / "imgs").mkdir()
    Image.fromarray(np.dstack([gray] * 3 + [alpha])).save(tmp_path / "imgs" / "a.png")
    region = np.full(gray.shape, 1, np.uint8)
    region[:7] = 0
    (tmp_path / "roi").mkdir()
    Image.fromarray(region).save(tmp_path / "roi" / "a.png")
    out = tmp_path / "out"
    assert predict(weights, tmp_path / "imgs", out, "--roi", tmp_path / "roi") == 0
    mask = classes(out, "a")
    assert (mask[:7] == 255).all() and (mask[:, 40:] == 255).all() and (mask[7:, :40] < 3).all()
    assert sum(shares(out, "a")) == pytest.approx(1)
    assert rows_of(out / "measurements.csv")[0]["field_px"] == str(33 * 40)
    Image.fromarray(gray).save(tmp_path / "imgs" / "b.png")
    assert predict(weights, tmp_path / "imgs", out, "--roi", tmp_path / "roi") == 0
    said = (out / "summary.md").read_text(encoding="utf-8")
    assert "1 image(s) without a mask in --roi (first: b), measured whole" in said


def test_standardised_by_the_field_alone(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"standardize": True})
    image, mask = picture(0, 40, 48), {}
    region = np.full(image.shape, 1, np.uint8)
    region[30:] = 0
    for name in ("imgs", "roi"):
        (tmp_path / name).mkdir()
    Image.fromarray(region).save(tmp_path / "roi" / "a.png")
    for bright in (0, 255):  # whatever is outside
        image[36:] = bright
        Image.fromarray(image).save(tmp_path / "imgs" / "a.png")
        out = tmp_path / str(bright)
        assert predict(weights, tmp_path / "imgs", out, "--roi", tmp_path / "roi") == 0
        mask[bright] = classes(out, "a")[:16]  # beyond the reach of what differs
    assert (mask[0] == mask[255]).mean() > 0.9


def test_only_the_field_is_compared(tmp_path: Path, weights: Path) -> None:
    bare = barred(tmp_path / "imgs" / "a.png")
    barred(tmp_path / "imgs" / "b.png")
    truth = expected_mask(bare).astype(np.uint8)
    (tmp_path / "gt").mkdir()
    whole = np.vstack([truth, np.full((12, 48), 2, np.uint8)])  # the bar is drawn as class 2
    whole[:5] = 255
    Image.fromarray(whole).save(tmp_path / "gt" / "a.png")
    Image.fromarray(truth).save(tmp_path / "gt" / "b.png")  # drawn on the cut image
    out = tmp_path / "out"
    words = ("--crop", "0,12,0,0", "--masks", tmp_path / "gt")
    assert predict(weights, tmp_path / "imgs", out, *words) == 0
    rows = rows_of(out / "comparison.csv")
    assert [row["image"] for row in rows] == ["a"] * 3 + ["b"] * 3
    assert {float(row["area_fraction_error"]) for row in rows} == {0.0}
    tables = json.loads((out / "summary.json").read_text(encoding="utf-8"))["tables"]
    [matrix] = [table for table in tables if table["title"].startswith("Pixels")]
    counted = sum(int(cell) for row in matrix["rows"] for cell in row[1:])
    assert counted == 35 * 48 + 40 * 48


def test_the_ignored_label_of_the_training_is_ignored_in_true_masks(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"ignore_label": 9})
    images = write_images(tmp_path / "imgs", "a.png")
    truth = expected_mask(picture(0, 40, 48)).astype(np.uint8)
    truth[:4] = 9
    (tmp_path / "gt").mkdir()
    Image.fromarray(truth).save(tmp_path / "gt" / "a.png")
    assert predict(weights, images, tmp_path / "out", "--masks", tmp_path / "gt") == 0
    rows = rows_of(tmp_path / "out" / "comparison.csv")
    assert {float(row["area_fraction_error"]) for row in rows} == {0.0}


def test_a_wrong_true_mask_costs_no_measurement(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    (tmp_path / "gt").mkdir()
    Image.fromarray(np.full((40, 48), 77, np.uint8)).save(tmp_path / "gt" / "a.png")
    assert predict(weights, images, tmp_path / "out", "--masks", tmp_path / "gt") == 1
    assert "value 77 where the model has 3 classes" in capsys.readouterr().err
    assert sum(shares(tmp_path / "out", "a")) == pytest.approx(1)


# ---------------------------------------------------------------- data bars


def test_a_bar_that_nobody_cut_is_told_by_file_whenever_asked(tmp_path: Path, weights, capsys):
    (tmp_path / "imgs").mkdir()
    Image.fromarray(np.vstack([micrograph(), strip(26, 300, 255)])).save(tmp_path / "imgs/sem.png")
    Image.fromarray(micrograph(1)).save(tmp_path / "imgs/bare.png")
    for _ in range(2):  # the second time nothing is predicted
        assert predict(weights, tmp_path / "imgs", tmp_path / "out") == 0
        said = capsys.readouterr().out
        line = "1 image(s) with a data bar that is not cut off (26 rows at the bottom): sem.png"
        assert f"{line}; give --crop 0,26,0,0" in said
    assert predict(weights, tmp_path / "imgs", tmp_path / "out", "--crop", "0,26,0,0") == 0
    assert "data bar" not in capsys.readouterr().out


def test_the_crop_that_cures_a_bar_is_that_of_each_image(tmp_path: Path, capsys) -> None:
    facts = {"crop": [0, 12, 0, 0], "cropped_sizes": [[226, 300]]}
    weights = write_weights(tmp_path / "run" / "fine.pt", facts)
    (tmp_path / "imgs").mkdir()
    cut = np.vstack([micrograph(), strip(26, 300, 255)])  # of 226 rows: 12 are taken for cut off
    Image.fromarray(cut).save(tmp_path / "imgs" / "cut.png")
    whole = np.vstack([micrograph(1), strip(26, 300, 255), np.zeros((12, 300), np.uint8)])
    Image.fromarray(whole).save(tmp_path / "imgs" / "whole.png")
    assert predict(weights, tmp_path / "imgs", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "(26 rows at the bottom): cut.png; give --crop 0,26,0,0\n" in said
    assert "(26 rows at the bottom): whole.png; give --crop 0,38,0,0\n" in said


def test_images_too_small_to_use_are_refused_with_a_crop_and_without(
    tmp_path: Path, weights: Path, capsys
) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    for name, shape in (("thin", (40, 1)), ("low", (15, 40)), ("just", (16, 16))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(images / f"{name}.png")
    for words, used in (((), ["a", "just"]), (("--crop", "0,0,0,0"), ["a", "just"]),
                        (("--crop", "1,0,0,0"), ["a"])):  # fmt: skip
        out = tmp_path / "_".join(("out", *words))
        assert predict(weights, images, out, *words) == 1
        said = capsys.readouterr().err
        assert f"{4 - len(used)} file(s) could not be used" in said
        assert "thin.png: 1x40 pixels" in said and "low.png: 40x15 pixels" in said
        assert said.count("at least 16 a side are needed") == 4 - len(used)
        assert sorted({row["image"] for row in rows_of(out / "measurements.csv")}) == used
        assert sorted(path.stem for path in (out / "classes").iterdir()) == used
    assert main(["--weights", str(weights), "--rank", str(images), "--device", "cpu"]) == 1
    assert "2 file(s) could not be used" in capsys.readouterr().err


# ---------------------------------------------------------------- scales


def at(path: Path, per_um: float | None, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"resolution": (per_um, per_um), "metadata": {"unit": "micron"}}
    tifffile.imwrite(path, pixels, imagej=True, **(how if per_um else {}))


def test_each_image_is_measured_at_its_own_scale(tmp_path: Path, weights: Path, capsys) -> None:
    pixels = picture(0, 40, 48)
    at(tmp_path / "imgs" / "1_x500.tif", 10, pixels)
    at(tmp_path / "imgs" / "1_x1000.tif", 20, pixels)
    assert predict(weights, tmp_path / "imgs", tmp_path / "out", "--particles") == 0
    assert capsys.readouterr().out.count("2 magnifications") == 1
    rows = rows_of(tmp_path / "out" / "measurements.csv")
    fine, coarse = (
        {row["class"]: row for row in rows if row["image"] == name}
        for name in ("1_x1000", "1_x500")
    )
    assert {row["um_per_px"] for row in fine.values()} == {"0.05"}
    for c in fine:
        for column in (name for name in rows[0] if name.endswith(("_um", "_um2"))):
            factor = 4 if column.endswith("2") else 2
            if fine[c][column]:
                assert float(coarse[c][column]) == pytest.approx(factor * float(fine[c][column]))
        assert fine[c]["area_fraction"] == coarse[c]["area_fraction"]
    # A particle of each image: the mean over the batch lies between.
    whole = [(float(fine[c]["mean_area_um2"]), float(coarse[c]["mean_area_um2"])) for c in fine
             if fine[c]["mean_area_um2"]]  # fmt: skip
    pooled = {row["class"]: row for row in rows_of(tmp_path / "out" / "batches.csv")}
    for c, (one, four) in zip([c for c in fine if fine[c]["mean_area_um2"]], whole, strict=True):
        assert float(pooled[c]["mean_area_um2"]) == pytest.approx((one + four) / 2)
    sides = {
        row["image"]: float(row["area_um2"]) for row in rows_of(tmp_path / "out" / "particles.csv")
    }
    assert sides["1_x500"] == pytest.approx(4 * sides["1_x1000"])
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "Scale: 0.05 to 0.1 µm per pixel" in summary


def half(path: Path) -> Path:
    """Keep the first half of a file: its header tells a pixel size, its pixels are lost."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("broken", ["cut", "small", "outside"])
def test_a_file_that_cannot_be_used_decides_no_unit(
    tmp_path: Path, weights: Path, capsys, broken: str
) -> None:
    for name in "ab":
        at(tmp_path / "imgs" / f"{name}.tif", None, picture(0, 40, 48))
    assert predict(weights, tmp_path / "imgs", tmp_path / "out", "--particles") == 0
    bad = tmp_path / "imgs" / "0.tif"
    at(bad, 4, picture(0, 12 if broken == "small" else 40, 48))
    words: list[object] = ["--particles"]
    if broken == "cut":
        half(bad)
    elif broken == "outside":
        (tmp_path / "roi").mkdir()
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "roi" / "0.png")
        words += ["--roi", tmp_path / "roi"]
    capsys.readouterr()
    assert predict(weights, tmp_path / "imgs", tmp_path / "more", *words) == 1
    said = capsys.readouterr()
    assert "1 file(s) could not be used" in said.err and "without a pixel size" not in said.out
    for table in ("measurements.csv", "particles.csv", "batches.csv"):
        assert (tmp_path / "more" / table).read_text() == (tmp_path / "out" / table).read_text()
    summary = (tmp_path / "more" / "summary.md").read_text(encoding="utf-8")
    assert "Scale: none known, lengths are in pixels" in summary
    if broken != "outside":
        rank = ["--weights", str(weights), "--rank", str(tmp_path / "imgs"), "--device", "cpu"]
        assert main(rank) == 1
        assert "without a pixel size" not in capsys.readouterr().out


def test_a_file_that_cannot_be_used_is_no_image_of_another_scale(tmp_path: Path, capsys) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"um_per_px": [0.1, 0.1]})
    at(tmp_path / "imgs" / "a.tif", 10, picture(0, 40, 48))
    at(tmp_path / "imgs" / "b.tif", 10, picture(1, 40, 48))
    at(tmp_path / "imgs" / "c.tif", None, picture(2, 40, 48))
    at(tmp_path / "imgs" / "d.tif", 4, picture(3, 40, 48))
    half(tmp_path / "imgs" / "d.tif")
    (tmp_path / "imgs" / "e.tif").write_bytes(b"II*\0")  # nothing is known of it
    assert predict(weights, tmp_path / "imgs", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "1 image(s) without a pixel size" in said and "c" in said
    assert "magnification" not in said
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "Scale: 0.1 µm per pixel, of 2 of 3 images" in summary
    (tmp_path / "imgs" / "c.tif").unlink()  # so that all that can be used have a scale
    assert predict(weights, tmp_path / "imgs", tmp_path / "at", "--resample", 0.2) == 1
    assert len(rows_of(tmp_path / "at" / "measurements.csv")) == 6


def test_an_image_of_unknown_scale_keeps_its_fractions(tmp_path: Path, weights: Path, capsys):
    pixels = picture(0, 40, 48)
    at(tmp_path / "imgs" / "a.tif", 10, pixels)
    at(tmp_path / "imgs" / "b.tif", None, pixels)
    assert predict(weights, tmp_path / "imgs", tmp_path / "out", "--particles") == 0
    told = "1 image(s) without a pixel size beside others"
    assert capsys.readouterr().out.count(told) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert sum(told in line for line in summary["warnings"]) == 1
    assert not any(line.startswith("Warning") for line in summary["about"])
    rows = rows_of(tmp_path / "out" / "measurements.csv")
    known, unknown = rows[:3], rows[3:]
    for one, other in zip(known, unknown, strict=True):
        assert one["area_fraction"] == other["area_fraction"] and other["um_per_px"] == ""
        lengths = [name for name in one if name.endswith(("_um", "_um2", "_mm2"))]
        assert lengths and all(other[name] == "" for name in lengths)
        assert one["particles_whole"] == other["particles_whole"]
    means = rows_of(tmp_path / "out" / "batches.csv")
    shares = [float(row["area_fraction"]) for row in means]
    assert shares == pytest.approx([float(row["area_fraction"]) for row in known])
    (table := tmp_path / "scales.csv").write_text("file,um_per_px\nb.tif,0.1\n")
    assert predict(weights, tmp_path / "imgs", tmp_path / "out", "--scales", table) == 0
    rows = rows_of(tmp_path / "out" / "measurements.csv")
    assert [r["mean_area_um2"] for r in rows[:3]] == [r["mean_area_um2"] for r in rows[3:]]


def test_falling_back_to_pixels_is_told(tmp_path: Path, weights: Path, capsys) -> None:
    images, out = write_images(tmp_path / "imgs", "a.png"), tmp_path / "out"
    assert predict(weights, images, out) == 0
    assert "pixel size" not in capsys.readouterr().out  # nobody ever knew one
    assert predict(weights, images, out, "--um_per_px", 0.1) == 0
    for _ in range(3):  # not the next time alone
        assert predict(weights, images, out) == 0
        said = capsys.readouterr().out
        assert "lengths are in pixels, though an earlier run here knew one" in said
    assert predict(weights, images, out, "--um_per_px", 0.2) == 0
    said = capsys.readouterr().out
    assert "earlier run here knew" not in said and "1 were done already" in said
    write_weights(weights, {"um_per_px": [0.1, 0.1]})
    assert predict(weights, images, tmp_path / "o2") == 0
    assert "though training had 0.1 µm per pixel; give --um_per_px" in capsys.readouterr().out


def test_another_magnification_than_the_trainings_is_told_and_resampled(
    tmp_path: Path, capsys
) -> None:
    weights = write_weights(tmp_path / "run" / "fine.pt", {"um_per_px": [0.1, 0.1]})
    small = picture(0, 40, 48)
    large = np.asarray(Image.fromarray(small).resize((96, 80), Image.Resampling.NEAREST))
    at(tmp_path / "imgs" / "x1000.tif", 20, large)
    at(tmp_path / "imgs" / "x500.tif", 10, small)
    out = tmp_path / "out"
    assert predict(weights, tmp_path / "imgs", out) == 0
    said = capsys.readouterr().out
    assert "1 image(s) at another magnification than the training's 0.1 µm" in said
    assert "x1000; --resample 0.1" in said
    assert predict(weights, tmp_path / "imgs", out, "--resample", 0.1) == 0
    assert "another magnification" not in capsys.readouterr().out
    mask = classes(out, "x1000")
    # Each pixel of the small image became four equal ones, which the area average undoes.
    assert mask.shape == (80, 96) and (classes(out, "x500") == expected_mask(small)).all()
    middle = mask.reshape(40, 2, 48, 2).transpose(0, 2, 1, 3).reshape(40, 48, 4)
    same = (middle == expected_mask(small)[..., None]).any(axis=2)
    assert same.mean() > 0.95  # but for outlines
    rows = rows_of(out / "measurements.csv")
    assert {(row["image"], row["um_per_px"]) for row in rows} == {
        ("x500", "0.1"),
        ("x1000", "0.05"),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scales", "none.csv"], "none.csv: cannot be read"),
        (["--resample", "0"], "--resample: found 0.0; give micrometres per pixel"),
        (["--resample", "0.1"], "--resample: the pixel size of a is not known"),
        (["--resample", "0.1", "--resize", "32"], "--resample: the model sees images at 32x32"),
        (
            ["--um_per_px", "0.1", "--resample", "10"],
            "imgs/a.png would be seen at 1x1 pixels; give a number nearer to its own 0.1 ",
        ),
        (["--um_per_px", "0.1", "--resample", "1e-6"], "would be seen at 4800000x4000000 pixels"),
        (["--resize", "100000"], "--resize: found 100000; give 0 or a number of at least 16 and"),
        (["--threads", "100000"], "--threads: found 100000; give 0 or a number of at least 1 and"),
        (["--crop", "-1,0,0,0"], "--crop '-1,0,0,0': give four numbers"),
        (["--roi", "nowhere"], "--roi: nowhere is no folder"),
        (["--roi", "tests/golden"], "no image has a mask in it (such as a.png); name the masks as"),
        (["--crop", "a"], "--crop 'a': give four numbers"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path: Path, weights: Path, capsys, words, said) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    assert predict(weights, images, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_ranking_looks_at_the_field_alone(tmp_path: Path, weights: Path) -> None:
    bare = picture(0, 48, 48)
    for folder, pixels in (
        ("whole", np.vstack([bare, np.zeros((12, 48), np.uint8)])),
        ("cut", bare),
    ):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    found = {}
    for folder, crop in (("whole", "0,12,0,0"), ("cut", "0,0,0,0")):
        words = [
            "--weights",
            weights,
            "--rank",
            tmp_path / folder,
            "--out",
            tmp_path / f"o{folder}",
        ]
        assert main([*map(str, words), "--crop", crop, "--device", "cpu"]) == 0
        [found[folder]] = rows_of(tmp_path / f"o{folder}" / "ranking.csv")
    assert found["whole"] == found["cut"]
