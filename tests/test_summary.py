"""What ``summary.md`` and the CSV files hold, on masks whose numbers are known by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metallography.folder import Folder
from metallography.items import list_images
from metallography.measure import over_fields
from metallography.segmenter import Segmenter
from metallography.summary import (
    about_csv,
    at_most,
    interval,
    phases_csv,
    shown,
    sizes_note,
    warnings,
    words,
    write_tables,
)
from metallography.tiling import UNETS, WIDE
from report.laboratory import by_image, phases
from tests.trained_model import rows_of, write_images, write_weights
from utils.tables import plus_minus_fraction


@pytest.fixture
def segmenter(tmp_path: Path) -> Segmenter:
    settings = {"class_names": ["matrix", "a_b|c", "void"]}
    return Segmenter(write_weights(tmp_path / "fine.pt", settings), device="cpu")


def run(folder: Path, segmenter: Segmenter, monkeypatch, truth: np.ndarray | None) -> Folder:
    """A folder whose only image is predicted as class 1 in its left half."""
    (folder / "img").mkdir()
    (folder / "gt").mkdir()
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "img" / "15_x.png")
    if truth is not None:
        Image.fromarray(truth).save(folder / "gt" / "15_x.png")
    probabilities = np.zeros((3, 20, 30), np.float32)
    probabilities[1, :, :15] = 1
    monkeypatch.setattr(segmenter, "bands", lambda image, *how: iter([(0, probabilities)]))
    items = list_images(folder / "img", folder / "out", folder / "gt")
    measured = Folder(segmenter, items, folder / "out", um_per_px=0.5)
    measured.run()
    write_tables(measured)
    return measured


def table(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a title that begins so."""
    block = text.split(f"## {title}")[1].split("\n\n")[1].strip().split("\n")
    return [line.strip("| \n").replace("\\|", "/").split(" | ") for line in block]


def test_numbers_by_hand(tmp_path, segmenter, monkeypatch) -> None:
    truth = np.zeros((20, 30), np.uint8)
    truth[:, :10] = 1
    run(tmp_path, segmenter, monkeypatch, truth)
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "- Scale: 0.5 µm per pixel" in text and "1 image(s), predicted at their own size" in text
    head, _, matrix, named, void = table(text, "Area fraction")
    assert head[:3] == ["class", "fields", "area fraction, %"]
    assert named == ["a_b/c", "1", "50.00", "-", "-"] and void[2] == "0 (not found)"
    assert matrix[2] == "50.00"
    *_, named, void = table(text, "Over fields")
    # One particle that has two corners of 10 x 15 um.
    assert named[1] == f"{0.5 / (10 * 15 * 1e-6):.0f}"
    *_, named, void = table(text, "Against true masks")
    # The truth lacks class 2, so its pooled Dice is unknown, whatever is predicted.
    assert named[1] == f"{2 * 200 / (200 + 300):.4f}" and void[1] == "-"
    *_, named, _ = table(text, "Particles found / all")
    assert named == ["a_b/c", "-", "-", "1 / 1", "-", "-", "-"]
    head, _, *counts = table(text, "Pixels")
    assert counts == [["matrix", "300", "100", "0"], ["a_b/c", "0", "200", "0"],
                      ["void", "0", "0", "0"]]  # fmt: skip
    (row,) = [r for r in rows_of(tmp_path / "out" / "comparison.csv") if r["class"] == "1"]
    assert float(row["area_fraction_error"]) == pytest.approx(100 / 600)
    assert row["ks_diameter"] == "" and row["class_name"] == "a_b|c"


def test_unlabelled_pixels_of_the_truth_are_not_compared(tmp_path, segmenter, monkeypatch) -> None:
    truth = np.zeros((20, 30), np.uint8)
    truth[:, :10], truth[:5] = 1, 255
    folder = run(tmp_path, segmenter, monkeypatch, truth)
    counts = folder.done[0].counts
    assert folder.bad == [] and counts is not None and counts.sum() == 15 * 30
    row = folder.compared[1]
    assert row["area_fraction_error"] == pytest.approx(15 * 5 / (15 * 30))
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert table(text, "Against true masks")[3][1] == f"{2 * 150 / (150 + 225):.4f}"


def test_the_summary_says_how_grains_are_joined(tmp_path, segmenter) -> None:
    def line(**terms) -> str:
        folder = Folder(segmenter, [], tmp_path / "out", **terms)
        write_tables(folder)
        text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
        return text.split("Pixels of one particle touch ")[1].split("\n")[0]

    sides, corners = "by a side (4-connected)", "by a side or a corner (8-connected)"
    assert line() == corners and line(grain_classes=[1]) == f"{corners}, those of grains {sides}"
    assert line(connectivity=4) == sides and line(grain_classes=[1], connectivity=8) == corners


def test_means_over_images_and_batches(tmp_path, segmenter, monkeypatch) -> None:
    """Class 1 fills 20 and 40 % of two images of 10 x 10 px."""
    (tmp_path / "img").mkdir()
    for name, height in (("15_x", 2), ("60_y", 4)):
        pixels = np.zeros((10, 10), np.uint8)
        pixels[:height] = 1
        Image.fromarray(pixels).save(tmp_path / "img" / f"{name}.png")
    one_hot = np.eye(3, dtype=np.float32)
    monkeypatch.setattr(
        segmenter, "bands", lambda image, *how: iter([(0, np.moveaxis(one_hot[image], 2, 0))])
    )
    folder = Folder(segmenter, list_images(tmp_path / "img", tmp_path / "out"), tmp_path / "out")
    folder.run()
    write_tables(folder)
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    # By hand: std 20 / sqrt(2), t(0.975, 1) = 12.706, so 12.706 * 10 = 127.1.
    matrix, named, _ = table(text, "Area fraction")[2:]
    assert matrix == ["matrix", "2", "70 ± 130", "14", "180"]
    assert named == ["a_b/c", "2", "30 ± 130", "14", "420"]
    # One particle at two corners in 100 pixels each, 5000 in a million; no whole one has a size.
    assert table(text, "Over fields")[3][:3] == ["a_b/c", "5000", "-"]
    head, _, *rows = table(text, "By production batch")
    assert table(text, "Area fraction")[4] == ["void", "2", "0 (not found)", "0", "-"]
    assert head[:4] == ["batch", "class", "fields", "area fraction, %"]
    assert [row[:4] for row in rows if row[1] == "a_b/c"] == [
        ["15", "a_b/c", "1", "20.00"], ["60", "a_b/c", "1", "40.00"],
    ]  # fmt: skip
    assert "mean area, px²" in head and "Smallest particle: 10 pixels" in text
    pooled = rows_of(tmp_path / "out" / "batches.csv")
    assert [row["class_name"] for row in pooled] == ["matrix", "a_b|c", "void"] * 2
    phases = list(csv.DictReader(io.StringIO(phases_csv(folder))))
    assert [row["class_name"] for row in phases] == ["matrix", "a_b|c", "void"]
    own = phases[1]
    assert own["fields"] == "2" and float(own["area_fraction"]) == pytest.approx(0.3)
    assert float(own["area_fraction_ci95"]) == pytest.approx(1.2706, abs=1e-4)
    assert "where it was checked" not in own
    folder.poor = ["a_b|c"]
    told = [row["where it was checked"] for row in csv.DictReader(io.StringIO(phases_csv(folder)))]
    assert told == ["", "mostly wrong: do not rely on it", ""]


def test_the_summary_for_programs_holds_the_same(tmp_path, segmenter, monkeypatch) -> None:
    folder = run(tmp_path, segmenter, monkeypatch, np.zeros((20, 30), np.uint8))
    folder.bad.append("y.png: damaged")
    write_tables(folder, "Measured so")
    found = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert len(found["tables"]) == text.count("## ") - 2 == 6
    assert found["method"] == "Measured so"
    assert "## How this was measured\n\nMeasured so\n" in text
    for one in found["tables"]:
        head, _, *rows = table(text, one["title"])
        assert [" ".join(head).split(), len(rows)] == [
            " ".join(one["head"]).replace("|", "/").split(), len(one["rows"]),
        ]  # fmt: skip
        assert rows == [[cell.replace("|", "/") for cell in row] for row in one["rows"]]
    assert found["about"][2] == "Scale: 0.5 µm per pixel" and found["warnings"] == []
    assert found["unusable"] == ["y.png: damaged"]


def test_sizes_stand_in_a_table_and_numbers_in_the_json(tmp_path, segmenter, monkeypatch) -> None:
    squares(tmp_path / "img", 4)
    squares(tmp_path / "img", 8, 8, 8)
    squares(tmp_path / "img")
    folder, _ = measured(tmp_path, segmenter, monkeypatch)
    matrix, named, void = rows_of(folder.out / "sizes.csv")
    assert matrix["mean_area_px2"] == matrix["particles_whole"] == "" != matrix["mean_intercept_px"]
    # Two fields tell a size: 16 and 64 px, of mean 40 and deviation 48 / sqrt(2).
    assert (float(named["mean_area_px2"]), named["mean_area_px2_fields"]) == (40, "2")
    assert float(named["mean_area_px2_std"]) == pytest.approx(48 / math.sqrt(2))
    assert float(named["mean_area_px2_ci95"]) == pytest.approx(12.7062047 * 24)
    assert named["number_per_Mpx_fields"] == named["mean_free_path_px_fields"] == "3"
    # Of all particles: 4.514 and thrice 9.027 px across.
    assert named["particles_whole"] == "4" and void["whole_mean_diameter_px"] == ""
    assert float(named["whole_mean_diameter_px"]) == pytest.approx(7 * 4 / math.sqrt(math.pi) / 2)
    assert float(named["whole_max_diameter_px"]) == pytest.approx(16 / math.sqrt(math.pi))
    found = json.loads((folder.out / "summary.json").read_text(encoding="utf-8"))
    assert found["values"]["sizes"][1]["mean_area_px2"] == 40 and found["images"] == ["0", "1", "2"]
    assert found["values"]["sizes"][0]["mean_area_px2"] is None
    assert found["values"]["phases"][1]["area_fraction"] == pytest.approx(208 / 18_000)
    about = about_csv(folder)
    assert about.startswith("what,words\nProgram,predict.py of PSCL ") and "Definition," in about


def test_missing_true_masks_are_said(tmp_path, segmenter, monkeypatch) -> None:
    folder = run(tmp_path, segmenter, monkeypatch, None)
    (line,) = warnings(folder)
    assert line == "Warning: 1 image(s) without a true mask (first: 15_x), not compared"
    assert f"- {line}\n" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "comparison.csv").read_text() == "image\n"


def test_units_have_one_notation_and_shares_are_percent() -> None:
    columns = {"mean_area_um2": "mean area, µm²", "number_per_mm2": "number, 1/mm²", "um": "µm",
               "number_per_Mpx": "number, 1/Mpx", "d10_diameter_px": "d10 diameter, px",
               "area_fraction": "area fraction, %", "um_per_px": "µm per px", "astm_g": "ASTM G",
               "area_fraction_ci95": "area fraction, 95 % half-width, points", "number": "number",
               "number_per_mm2_ci95": "number, 95 % half-width, 1/mm²",
               "astm_g_ci95": "ASTM G, 95 % half-width"}  # fmt: skip
    assert {column: words(column) for column in columns} == columns
    assert shown("area_fraction", 5e-5) == "0.005" and shown("number", 3) == "3"
    # What was counted or given has no digits of a measurement.
    assert (shown("number", 12.25), shown("um_per_px", 0.05)) == ("12.25", "0.05")
    assert shown("area_fraction_ci95", math.nan) == "-" and shown("image", "1e5") == "1e5"


def test_a_phase_that_is_nowhere_and_an_image_unlike_the_others_are_warned_about(
    tmp_path, segmenter
) -> None:
    folder = Folder(segmenter, [], tmp_path / "out")
    for number, share in enumerate([0.5, 0.51, 0.49, 0.5, 0.002]):
        shares = (1 - share, share, 0.0)
        folder.rows += [
            {"image": str(number), "class": c, "area_fraction": s} for c, s in enumerate(shares)
        ]
    nowhere, other = warnings(folder)
    assert nowhere.startswith("Warning: void is predicted in none of the 5 images; if they show it")
    assert "--class_weight balanced" in nowhere
    assert "1 image(s) with an area fraction far from the others': 4; " in other
    assert "4 has 99.80 % of matrix, where the median is 50.00 %; 0.20 % of a_b|c" in other


def test_what_is_odd_in_the_images_is_warned_of_before_what_may_follow_from_it(
    tmp_path, segmenter, monkeypatch
) -> None:
    folder = Folder(segmenter, [], tmp_path / "out")
    folder.warned = ["Dice below 0.5"]
    monkeypatch.setattr(folder, "bar_lines", lambda: ["a data bar"])
    for number, share in enumerate([0.5, 0.51, 0.49, 0.5, 0.002]):
        shares = (1 - share, share, 0.1)
        folder.rows += [
            {"image": str(number), "class": c, "area_fraction": s} for c, s in enumerate(shares)
        ]
    bar, low, odd = warnings(folder)
    assert (bar, low) == ("Warning: a data bar", "Warning: Dice below 0.5")
    assert "far from the others'" in odd


def test_a_class_that_is_in_no_mask_is_not_said_to_be_missed_by_the_prediction(
    tmp_path, segmenter
) -> None:
    folder = Folder(segmenter, [], tmp_path / "out", in_no_mask=[1])
    folder.segmenter.class_names = ["matrix", "1", "void"]
    folder.rows = [
        {"image": image, "class": c, "area_fraction": share}
        for image in "ab"
        for c, share in enumerate((0.5, 0.0, 0.5))
    ]
    (line,) = warnings(folder)
    assert line.startswith("Warning: class 1 is in no mask, so it is predicted nowhere; annotate")
    assert "number the classes of the masks without a gap" in line and "class_weight" not in line


def test_a_phase_that_was_mostly_wrong_is_marked_beside_its_fraction(
    tmp_path, segmenter, monkeypatch
) -> None:
    squares(tmp_path / "img", 8)
    _, text = measured(tmp_path, segmenter, monkeypatch, poor=["void"])
    head, _, *rows = table(text, "Area fraction")
    assert head[-1] == "where it was checked"
    assert [row[-1] for row in rows] == ["-", "-", "mostly wrong: do not rely on it"]
    _, text = measured(tmp_path, segmenter, monkeypatch)
    assert table(text, "Area fraction")[0][-1] == "relative accuracy, %"


def test_an_interval_by_hand() -> None:
    # t(0.975, 1) = 12.706; the deviation of 1 and 3 is the square root of 2.
    assert interval(over_fields([1.0, 3.0, math.nan])) == "2 ± 13"
    assert interval(over_fields([math.nan])) == "-"


def squares(folder: Path, *sides: int) -> None:
    """An image of 60 x 100 px with squares of class 1 on the matrix."""
    pixels = np.zeros((60, 100), np.uint8)
    for number, side in enumerate(sides):
        top, left = 2 + 12 * (number // 8), 2 + 12 * (number % 8)
        pixels[top : top + side, left : left + side] = 1
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{len(list(folder.iterdir()))}.png")


def measured(tmp_path: Path, segmenter: Segmenter, monkeypatch, **terms) -> tuple[Folder, str]:
    one_hot = np.eye(3, dtype=np.float32)
    monkeypatch.setattr(
        segmenter, "bands", lambda image, *how: iter([(0, np.moveaxis(one_hot[image], 2, 0))])
    )
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    folder = Folder(segmenter, list_images(tmp_path / "img", out), out, **terms)
    folder.run()
    write_tables(folder)
    return folder, (out / "summary.md").read_text(encoding="utf-8")


def test_sizes_at_the_smallest_particle_are_bounds(tmp_path, segmenter, monkeypatch) -> None:
    # 3 of 20 have 4 x 4 = 16 px: D10 is theirs, sqrt(4 * 16 / pi) = 4.514 px.
    squares(tmp_path / "img", *[4] * 3, *[8] * 17)
    folder, text = measured(tmp_path, segmenter, monkeypatch, min_px=16)
    assert folder.smallest_diameter == pytest.approx(math.sqrt(64 / math.pi))
    *_, named, _ = table(text, "Diameter of all whole particles")
    assert named[3:5] == ["≤ 4.514", "9.027"]
    assert "Those of fewer than 16 pixels (4.514 px across) do not count (option --min_px)" in text
    # The limit is as far below D10 as 10 px are below 16: more than a tenth in diameter.
    _, text = measured(tmp_path, segmenter, monkeypatch, min_px=10)
    assert table(text, "Diameter of all whole particles")[-2][3] == "4.514" and "≤" not in text


def test_a_bound_is_at_most_a_tenth_above_the_smallest() -> None:
    assert (at_most(11.0, 10.0), at_most(11.1, 10.0)) == ("≤ 11.00", "11.10")
    assert at_most(math.nan, 10.0) == "-"


def test_of_several_scales_the_coarsest_cuts_off(tmp_path, segmenter) -> None:
    (tmp_path / "img").mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "img" / f"{name}.png")
    items = list_images(tmp_path / "img", tmp_path / "out")
    scales = {"a": 0.1, "b": 0.4}
    folder = Folder(segmenter, items, tmp_path / "out", min_px=12, scales=scales)
    assert folder.smallest_diameter == pytest.approx(0.4 * math.sqrt(48 / math.pi))
    note = sizes_note(folder, [["void", "≤ 1.6"]])  # 3.909 px
    assert "Those of fewer than 12 pixels (0.3909 to 1.564 µm across)" in note


def test_the_matrix_has_no_sizes_unless_it_is_of_grains(tmp_path, segmenter, monkeypatch) -> None:
    squares(tmp_path / "img", 8, 8)
    folder, text = measured(tmp_path, segmenter, monkeypatch)
    assert folder.with_particles == [1, 2]
    matrix, named, _ = table(text, "Over fields")[2:]
    assert matrix[1:6] == ["-"] * 5 and named[3] == "9.027"
    assert matrix[6] != "-" and matrix[7] != "-"  # chord, and path between its islands
    rows = table(text, "Diameter of all whole particles")[2:]
    assert [row[0] for row in rows] == ["a_b/c", "void"]
    assert "Class 0 (matrix) is taken for the matrix" in text
    (row,) = (r for r in rows_of(folder.out / "measurements.csv") if r["class"] == "0")
    assert row["particles_cut"] == "1" and row["number"] == "1.0"  # the files hold them
    folder, text = measured(tmp_path, segmenter, monkeypatch, grain_classes=[0])
    assert table(text, "Over fields")[2][1] != "-" and "is taken for the matrix" not in text
    assert len(table(text, "Diameter of all whole particles")[2:]) == 3


def test_two_means_of_one_size_say_what_they_are_of(tmp_path, segmenter, monkeypatch) -> None:
    squares(tmp_path / "img", 4)
    squares(tmp_path / "img", 8, 8, 8)
    _, text = measured(tmp_path, segmenter, monkeypatch)
    # Of fields (4.514 + 9.027) / 2, of particles (4.514 + 3 * 9.027) / 4.
    assert table(text, "Over fields (mean ± 95 %)")[3][3].startswith("7 ±")
    head, _, named, _ = table(text, "Diameter of all whole particles of all fields together")
    assert (head[2], named[2]) == ("mean of them", "7.899")
    assert "Here each particle counts alike; over fields each field counts by its area" in text


def test_it_is_said_of_how_many_fields_a_size_is(tmp_path, segmenter, monkeypatch) -> None:
    squares(tmp_path / "img", 8)
    squares(tmp_path / "img")
    squares(tmp_path / "img", 8, 8, 8)
    _, text = measured(tmp_path, segmenter, monkeypatch)
    head, _, matrix, named, void = table(text, "Over fields")
    # Two of three fields have a whole square, of 9.027 px in both; all have free path.
    assert named[3].startswith("9.027") and named[3].endswith(" (2 fields)")
    assert head[6] == "mean intercept, px" and named[6].endswith(" (2 fields)")
    assert named[7] != "-" and "(" not in named[7] and "(" not in named[1]
    assert "In brackets: how many fields tell it, where not all do" in text
    (tmp_path / "img" / "1.png").unlink()
    _, text = measured(tmp_path, segmenter, monkeypatch)
    assert "(2 fields)" not in text and "In brackets" not in text


def test_the_fraction_of_a_single_field_is_rounded_alike_everywhere(
    tmp_path, segmenter, monkeypatch
) -> None:
    squares(tmp_path / "img", 8, 8)  # 128 of 6000 px: 2.1333 %
    folder, text = measured(tmp_path, segmenter, monkeypatch)
    shown = (table(text, "Area fraction")[3][2],)
    told = phases(folder)[1]["text"], by_image(folder, {})["rows"][0][2]
    assert {*shown, *told} == {"2.13"}
    fraction = folder.rows[1]["area_fraction"]
    assert plus_minus_fraction(100 * fraction, math.nan) == "2.13"  # as by production batch
    assert phases(folder)[2]["text"] == "0 (not found)"


def test_tiles_that_see_less_than_the_network_are_warned_about(tmp_path) -> None:
    write_images(tmp_path / "img", "a.png", shape=(40, 120))
    write_images(tmp_path / "img", "b.png", shape=(40, 100))
    weights = write_weights(tmp_path / "fine.pt", {})
    segmenter = Segmenter(weights, device="cpu", tile=100, overlap=16)
    items = list_images(tmp_path / "img", tmp_path / "out")
    said = "1 image(s) cut into tiles of 100 pixels, of which this network's encoder sees more: a;"
    for sight, wanted in ((UNETS, 0), (WIDE, 1)):
        segmenter.sight = sight
        folder = Folder(segmenter, items, tmp_path / "out")
        folder.run()
        assert sum(said in line for line in warnings(folder)) == wanted
    half = Folder(segmenter, items, tmp_path / "out", um_per_px=0.5, resample=1.0, overwrite=True)
    half.run()  # the network sees 60 columns
    assert not any("cut into tiles" in line for line in warnings(half))
