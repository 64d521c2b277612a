"""The page of a laboratory, read back with an HTML parser, on masks whose numbers are known."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from imaging.drawing import palette
from imaging.listing import sample_of
from metallography.folder import Folder
from metallography.items import list_images
from metallography.segmenter import Segmenter
from metallography.summary import sections, write_tables
from report import laboratory
from report.figures import size_figure
from report.laboratory import (
    Told,
    all_columns,
    by_image,
    first_two_joined,
    known_columns,
    layer_uri,
    own_name,
    phases,
    place_of,
    write_laboratory,
)
from report.provenance import how_measured
from tests.test_page import Page
from tests.trained_model import write_weights
from utils.log import VERSION
from utils.tables import text_of

NAMES = ["matrix", "γ′ <b>", "void"]


def predicted(
    place: Path, monkeypatch: pytest.MonkeyPatch, *heights: int, um: float = 0.5, name: str = "{}"
) -> Folder:
    """Images of 10 x 20 px whose class 1 fills so many rows of ten; of class 2 there is nothing."""
    monkeypatch.setattr(
        Segmenter, "bands",
        lambda _, image, *how: iter([(0, np.moveaxis(np.eye(3, dtype=np.float32)[image], 2, 0))]),
    )  # fmt: skip
    weights = write_weights(place / "fine.pt", {"class_names": NAMES})
    for number, height in enumerate(heights):
        pixels = np.zeros((10, 20), np.uint8)
        pixels[:height] = 1
        folder = place / "steel & co" / ("b" if number % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name.format(number)}.tif")
    segmenter = Segmenter(weights, device="cpu")
    items = list_images(place / "steel & co", place / "out")
    folder_ = Folder(segmenter, items, place / "out", um_per_px=um or None)
    folder_.run()
    return folder_


def page_of(folder: Folder, **told: object) -> Page:
    given = {"sample": "steel & co", "day": "2031-05-06", **told}
    return Page(write_laboratory(folder, Told(**given)))  # type: ignore[arg-type]


def test_fractions_with_their_interval_by_hand(tmp_path, monkeypatch) -> None:
    matrix, named, void = phases(predicted(tmp_path, monkeypatch, 2, 4))
    # Mean of 20 and 40 %; t(0.975, 1) = 12.706 times 10 is 127.06.
    assert (
        named["text"] == "30 ± 130"
        and matrix["text"] == "70 ± 130"
        and void["text"] == "0 (not found)"
    )
    assert (named["low"], named["high"]) == (0.0, 100.0) and named["fields"] == [20.0, 40.0]
    assert named["mean"] == pytest.approx(30) and named["has_interval"] and not void["has_interval"]


def test_without_any_check_there_is_never_no_warning(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2)
    text = page_of(folder).text
    assert "Not checked: no image has a true mask here" in text and "No warnings" not in text
    assert "Warnings 1, see below" in text
    text = page_of(folder, unchecked="").text  # it was measured otherwise
    assert "No warnings." in text and "Not checked" not in text
    folder.compared.append({})
    folder.done[0] = folder.done[0]._replace(counts=np.eye(3, dtype=np.int64))
    monkeypatch.setattr(laboratory, "sections", lambda folder: {})
    assert "Not checked" not in page_of(folder).text


def test_what_is_warned_of_is_marked_beside_its_fraction_and_said_once(
    tmp_path, monkeypatch
) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    folder.notes = ["Dice .3", "Warning: void is poor", "Scale: none", "cut"]
    told = {"poor": ["void"], "said": ["Dice .3"], "warnings": ["void is poor"], "unchecked": ""}
    text = page_of(folder, **told).text
    assert text.count("do not rely on it, see warnings") == 1
    assert "void do not rely on it" in text and "matrix do not" not in text
    assert text.count("void is poor") == text.count("Dice .3") == 1 and "cut" in text


@pytest.mark.parametrize("name", ["<b>x&{}", "s7;=1+{}", "=1+{}"])
def test_names_of_files_may_be_of_html_or_of_a_spreadsheet(tmp_path, monkeypatch, name) -> None:
    """The page shows each as it is; its tables name it, and are no formula."""
    try:
        folder = predicted(tmp_path, monkeypatch, 2, 4, name=name)
    except OSError:
        pytest.skip("such names are not allowed here")
    page = page_of(folder)
    assert "b" not in page.tags
    shown = [row[0] for row in page.rows if row]
    write_tables(folder)
    assert f"{name.format(0)}.tif" in shown and f"b/{name.format(1)}.tif" in shown
    with (tmp_path / "out" / "measurements.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {text_of(row["image"]) for row in rows} == {name.format(0), f"b/{name.format(1)}"}
    cells = [cell for row in rows for cell in row["image"].split(";")]
    assert not any(cell.startswith("=") for cell in cells)


def test_annotated_images_are_marked_and_said_to_count(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    page = page_of(folder, annotated={"b/1": "annotated"}, place="lab/steel & co")
    assert "2 images; 1 of them annotated: its labels were learnt" in page.text
    assert (
        "numbers here are those of the labels" in page.text and "Folder lab/steel & co" in page.text
    )
    assert ["b/1.tif (annotated)", "0.5", "60.00", "40.00", "0"] in page.rows
    assert "0.tif (annotated)" not in page.text
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<figcaption><strong>b/1.tif (annotated)</strong>: matrix" in text


def test_an_image_s_percentile_at_the_smallest_particle_is_a_bound(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2)
    smallest = 0.5 * np.sqrt(40 / np.pi)  # of 10 pixels of 0.5 µm
    for row in folder.rows:
        row["d10_diameter_um"], row["d50_diameter_um"] = 1.05 * smallest, 1.2 * smallest
    matrix, named, _ = all_columns(folder, {})
    assert not [n for n in matrix["head"] if "diameter" in n or "particles" in n or "number" in n]
    cells = dict(zip(named["head"], named["rows"][0], strict=True))
    assert (cells["d10 diameter, µm"], cells["d50 diameter, µm"]) == ("≤ 1.873", "2.141")


def test_one_field_has_no_interval(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 3)
    assert [phase["text"] for phase in phases(folder)] == ["70.00", "30.00", "0 (not found)"]
    text = page_of(folder).text
    assert "One field has no interval" in text and "±" not in text.partition("Images")[0]


def test_what_a_laboratory_reads_comes_first_and_training_last(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    folder.bad.append("x.tif: damaged")
    page = page_of(folder, said=["Said below"], warnings=["Careful"])
    text = page.text
    order = ["steel & co", "2031-05-06", "2 images; 1 file could not be used", "0.5 µm per pixel",
             "30 ± 130", "Said below", "0.tif", "b/1.tif", "Careful.",
             "void is predicted in none of the 2 images", "x.tif: damaged", "Too few whole",
             "Area fractions of 2 images", "All measurements, matrix", "Smallest particle",
             "What the numbers mean"]  # fmt: skip
    found = [text.find(words, 10 * bool(n)) for n, words in enumerate(order)]
    assert -1 not in found and found[1:] == sorted(found[1:])
    assert "b" not in page.tags and "γ′ <b>" in text
    assert ["image", "µm per px", *NAMES] in page.rows
    assert ["b/1.tif", "0.5", "60.00", "40.00", "0"] in page.rows


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path, monkeypatch) -> None:
    page = page_of(predicted(tmp_path, monkeypatch, 2, 4))
    assert page.links and all(link.startswith(("#", "data:image/")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert not page.tags & {"link", "iframe", "object"}
    assert not any(words in text for words in ("url(", "@import", "fetch(", "http", "XMLHttp"))


def test_phases_can_be_switched_and_are_told_by_a_legend_and_a_scale(tmp_path, monkeypatch) -> None:
    page_of(predicted(tmp_path, monkeypatch, 2, 4))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for number, name in enumerate(("matrix", "γ′ &lt;b&gt;", "void")):
        (box,) = [
            line
            for line in text.split("<label>")
            if f'type="checkbox" data-layer="{number}"' in line
        ]
        assert name in box and (" checked" in box) is (number > 0)
    assert text.count('class="layer off" data-layer="0"') == 2  # the matrix, at first not coloured
    assert text.count('class="layer" data-layer="1"') == 2
    # 10 µm wide: the largest of 1, 2, 5 up to a quarter is 2 µm, a fifth of the width.
    assert text.count('class="bar" style="width: 20.00%"></div><small>2 µm<') == 2


def test_the_bar_of_controls_leaves_with_the_images(tmp_path, monkeypatch) -> None:
    page_of(predicted(tmp_path, monkeypatch, *([2, 3] * 4)))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    # In one column all pictures are as large as they get: nothing is left for the button to do.
    assert "@media (max-width: 57rem) { button[data-all] { display: none; } }" in text
    inside = text.partition("<section>")[2].partition("</section>")[0]
    assert 'class="tools"' in inside and inside.count('class="port"') == 8
    assert 'id="images"' in inside and "<h2" not in inside.partition('id="images"')[2]
    assert text.count('class="tools"') == 1 and "<h2" in text.partition("</section>")[2]


def test_the_scale_bar_stays_in_sight_and_true_when_its_picture_is_enlarged(
    tmp_path, monkeypatch
) -> None:
    page_of(predicted(tmp_path, monkeypatch, 2))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    port = text.partition('<div class="port">')[2].partition('<div class="scale')[0]
    assert port.count("</div>") == port.count("<div") + 1  # closed before the bar
    # 20 px of 0.5 µm; from this the script knows how long the drawn bar of an enlarged one is.
    assert text.count('data-wide="10" data-unit="µm"><div class="bar"></div><small></small>') == 1


def test_what_a_row_is_of_stays_in_sight_beside_its_numbers(tmp_path, monkeypatch) -> None:
    page_of(predicted(tmp_path, monkeypatch, 2))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    rule = text.partition(".wide th:first-child, .wide td:first-child {")[2].partition("}")[0]
    assert "position: sticky; left: 0" in rule and "background: var(--paper)" in rule
    table = {"title": "", "head": ["batch", "class", "n"], "rows": [["7", "void", "1"]]}
    joined = first_two_joined(table)
    assert (joined["head"], joined["rows"]) == (["batch, class", "n"], [["7: void", "1"]])


def test_a_layer_is_its_class_to_the_pixel() -> None:
    where = np.random.default_rng(0).random((7, 11)) < 0.5
    encoded = layer_uri(where, palette(3)[2]).partition("base64,")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))
    assert ((pixels[..., 3] == 255) == where).all() and set(pixels[..., 3].flat) == {0, 255}
    assert (pixels[where][:, :3] == palette(3)[2]).all()


def test_lengths_are_in_pixels_without_a_scale(tmp_path, monkeypatch) -> None:
    page = page_of(predicted(tmp_path, monkeypatch, 2, um=0))
    assert "none known, lengths are in pixels" in page.text and "5 px" in page.text
    assert ["image", *NAMES] in page.rows


def test_every_image_is_listed_and_what_is_left_out_is_said(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, *([2, 3] * 4))
    own = {item.name: own_name(item) for item in folder.items}
    assert len(by_image(folder, own)["rows"]) == 8
    assert all(len(table["rows"]) == 8 for table in all_columns(folder, own))
    monkeypatch.setattr(laboratory, "MOST_PICTURES", 3)
    page = page_of(folder, marks={"4": "odd & strange"})
    assert "3 of 8 images, those in doubt first; the others are in the folder overlay" in page.text
    assert "Look at this one: odd & strange." in page.text and len(page.pictures) >= 3
    monkeypatch.setattr(laboratory, "TABLE_CHARACTERS", 300)
    titles = [table["title"] for table in all_columns(folder, own)]
    assert "images are only in measurements.csv" in titles[0] and titles[0].startswith("matrix: ")
    assert titles[2] == "void: 0 images; 8 images are only in measurements.csv"


def test_places_to_look_at_are_a_layer_of_their_own(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    page_of(folder, marked_places={"0": np.ones((10, 20), bool)})
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert text.count('class="layer" data-layer="place"') == 1 and "far from any label" in text


def test_what_is_folded_is_printed_unless_it_is_wide_or_long(tmp_path, monkeypatch) -> None:
    """Only tables of all columns stay shut on paper, and say where their numbers are."""
    folder = predicted(tmp_path, monkeypatch, *([2, 3] * 4))
    rows = [[str(n), "1.0"] for n in range(8)]
    doubts = {"title": "Doubtful first", "head": ["image", "unsure, %"], "rows": rows}
    for most, shut in ((8, 3), (7, 5)):  # 3 classes; then also doubts and fractions of 8 images
        monkeypatch.setattr(laboratory, "MOST_PRINTED", most)
        page_of(folder, doubts=doubts)
        text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        folds = text.split("<details")[1:]
        assert len(folds) == 7  # and E562, two more images
        on_paper = [fold.partition("</summary>")[0] for fold in folds]
        assert sum(' class="screen"' in fold for fold in on_paper) == shut
        assert all((": not printed, see" in f) == (' class="screen"' in f) for f in on_paper)
        told = '<span class="paper">: not printed, see measurements.csv</span>'
        assert on_paper[-1].endswith(f"All measurements, void{told}")
    style, _, script = text.partition("</head>")
    paper = style.partition("@media print { .tools")[2]
    assert "details.screen > :not(summary)" in paper.partition("}")[0]
    assert "details:not(.screen)::details-content { content-visibility: visible; }" in paper
    assert 'addEventListener("beforeprint"' in script and 'addEventListener("afterprint"' in script


def test_the_printed_legend_follows_the_boxes_and_prints_nothing_to_label(
    tmp_path, monkeypatch
) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    page_of(folder, marked_places={"0": np.ones((10, 20), bool)})
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    boxes = re.findall(r'<input type="checkbox" data-layer="(\w+)"( checked)?>', text)
    items = re.findall(r'<span class="item( off)?" data-layer="(\w+)">', text)
    assert boxes == [("0", ""), *((number, " checked") for number in ("1", "2", "place"))]
    assert [(number, "" if off else " checked") for off, number in items] == boxes
    assert text.count('<span class="uncoloured"> (not coloured)</span>') == len(boxes)
    assert 'all("img.layer, .plain .item")' in text  # what a box switches
    paper = text.partition("@media print { .tools")[2].partition("</style>")[0]
    hidden = (
        '.stack img.layer[data-layer="place"], .plain .item[data-layer="place"] { display: none; }'
    )
    assert hidden in paper


def test_doubts_and_changes_of_a_job_are_shown(tmp_path, monkeypatch) -> None:
    table = {"title": "Doubtful first", "head": ["image", "doubt"], "rows": [["0", "dark"]]}
    page = page_of(predicted(tmp_path, monkeypatch, 2, 4), doubts=table, changed=[table], by="me")
    assert page.rows.count(["0", "dark"]) == 2 and "Segmented by me" in page.text


def test_marked_images_are_shown_and_the_others_fold(tmp_path, monkeypatch) -> None:
    rows = [["0", "dark", "31.0", "-"], ["1", "-", "4.0", "-"], ["2", "-", "3.0", "-"]]
    table = {
        "title": "Doubtful first",
        "head": ["image", "why", "unsure, %", "votes"],
        "rows": rows,
    }
    folder = predicted(tmp_path, monkeypatch, 2, 3, 4)
    page = page_of(folder, doubts=table, marks={"0": "dark"}, doubt_words="Unsure: of it.")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Doubtful first: 1 marked" in page.text and "Unsure: of it." in page.text
    assert "<summary>Doubtful first: 2 not marked</summary>" in text
    assert page.rows.count(["0", "dark", "31.0"]) == 1  # nobody knows votes
    assert page.rows.count(["1", "4.0"]) == page.rows.count(["2", "3.0"]) == 1


def test_a_long_table_of_changes_is_folded_above_the_pictures(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    for count, folded in ((laboratory.FEW_ROWS, 0), (laboratory.FEW_ROWS + 1, 1)):
        rows = [[str(n), "1 → 2"] for n in range(count)]
        changed = [{"title": "What changed", "head": ["image", "x"], "rows": rows}]
        page = page_of(folder, changed=changed)
        text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert text.count(f"<summary>What changed ({count} images)") == folded
        assert page.rows.count([str(count - 1), "1 → 2"]) == 1


def test_marked_images_come_in_the_order_of_their_marks(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 3, 4)
    page_of(folder, marks={"2": "worst", "b/1": "bad", "gone": "not there"})
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    captions = [part.partition("<")[0] for part in text.split("<figcaption><strong>")[1:]]
    assert [Path(name).stem for name in captions] == ["2", "1", "0"]
    assert "matrix: " in text.split("<figcaption><strong>")[1].partition("</figcaption>")[0]


def test_the_page_of_an_experiment_is_left_alone(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2)
    (tmp_path / "out" / "1_0").mkdir()
    (tmp_path / "out" / "1_0" / "log_fine.txt").write_text("Fine-tuning\n")
    assert write_laboratory(folder, Told("x")).name == "laboratory.html"


def test_the_sample_is_called_as_its_folder(tmp_path: Path) -> None:
    assert sample_of(tmp_path / "steel 42") == "steel 42"
    assert sample_of(tmp_path / "run 7" / "img") == "run 7"  # as many sets are laid out
    assert sample_of(tmp_path / "steel" / "test_numf" / "img") == "steel_test_numf"
    assert sample_of(Path("/img")) == "img"
    assert place_of(tmp_path / "set" / "img") == "set/img"


def test_a_histogram_needs_particles(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    folder.diameters[1] = [np.linspace(1.0, 9.0, 12)]
    page = page_of(folder)
    drawn = [name for name, picture in page.pictures if picture.format == "PNG" and name]
    assert drawn == ["Diameters of γ′ <b>: 12 whole particles"]
    assert "Too few whole particles for a histogram: void (0)." in page.text


def test_columns_of_which_nothing_is_known_are_not_shown() -> None:
    table = {
        "title": "t",
        "head": ["class", "G", "mean"],
        "rows": [["a", "-", "1"], ["b", "-", "-"]],
    }
    assert known_columns(table)["head"] == ["class", "mean"]
    assert known_columns(table)["rows"] == [["a", "1"], ["b", "-"]]


def test_how_it_was_measured_is_a_paragraph_and_the_program_is_named(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    page = page_of(folder, how="a pixel classifier trained on 1 annotated field (Dice 0.797)")
    # 20 x 10 px of 0.5 µm; a circle of 10 px of 0.25 µm² is 2 * sqrt(2.5 / pi) = 1.784 µm wide.
    assert (
        "Area fractions were measured on 2 fields of 10 × 5 µm (0.5 µm per pixel) by automatic "
        "image analysis (ASTM E1245); phases were segmented by a pixel classifier trained on 1 "
        "annotated field (Dice 0.797). ± is the half-width of the 95 % confidence interval over "
        "fields (Student's t, as in ASTM E562). Features of fewer than 10 pixels (1.784 µm across) "
        "were left out of counts and sizes; features cut by the frame count one half, at a corner "
        "a quarter, and are left out of sizes."
    ) in page.text
    assert f"of PSCL {VERSION}" in page.text and "E1382" not in how_measured(folder)
    write_tables(folder, how_measured(folder, "me"))
    lines = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8").splitlines()
    assert any("phases were segmented by me. ±" in line for line in lines)


def test_what_was_corrected_by_hand_is_told_where_it_is_pasted(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    assert "by hand" not in how_measured(folder)
    path = tmp_path / "out" / "classes" / "0.png"
    Image.fromarray(np.full((10, 20), 2, np.uint8)).save(path)
    again = Folder(folder.segmenter, folder.items, folder.out, um_per_px=0.5)
    again.run()
    assert "network (UNet); 1 of 2 class maps were corrected by hand." in how_measured(again)


def test_fields_of_which_a_part_counts_are_told_by_their_area(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4)
    for row in folder.rows:
        row["field_px"] = 150  # of 200
    # 300 pixels of 0.25 µm².
    assert "2 fields with a total area of 75.00 µm² (0.5 µm per pixel)" in how_measured(folder)
    folder.rows = [row for row in folder.rows if row["image"] == "0"]
    told = how_measured(folder)
    assert "on 1 field with an area of 37.50 µm²" in told and "has no confidence interval" in told
    folder.rows = []
    assert how_measured(folder) == ""


@pytest.mark.parametrize(("um", "said"), [(0.0, "2 fields of 20 × 10 pixels by")])
def test_fields_without_a_scale_are_told_in_pixels(tmp_path, monkeypatch, um, said) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4, um=um)
    folder.grain_classes = [1]
    told = how_measured(folder)
    assert said in told and "(3.568 px across)" in told and "ASTM E1382" in told


def test_what_was_said_at_the_start_is_no_fact_of_the_answer(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2)
    page_of(folder, notes=["Kept: it"], started=["Fine-tuning has 226 steps"])
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    facts, _, rest = text.partition("<summary>As printed at the start")
    assert "<li>Kept: it</li>" in facts and "226 steps" not in facts
    assert "<li>Fine-tuning has 226 steps</li>" in rest.partition("</details>")[0]


def test_one_batch_that_nobody_gave_is_no_table(tmp_path, monkeypatch) -> None:
    """Images s_0 and s_1: all of a batch called s."""
    folder = predicted(tmp_path, monkeypatch, 2, 4, name="s_{}")
    assert {item.batch for item in folder.items} == {"s"}
    page = page_of(folder)
    assert "By batch" not in page.text and ["image", "µm per px", *NAMES] in page.rows
    folder.items = [item._replace(told_batch="s") for item in folder.items]
    assert "By batch" in page_of(folder).text


def test_phases_that_were_mostly_wrong_are_marked_beside_their_sizes_and_batches(
    tmp_path, monkeypatch
) -> None:
    folder = predicted(tmp_path, monkeypatch, 2, 4, name="s{}_1")
    tables = [table for part in sections(folder).values() for table in part]
    assert not any("where it was checked" in table["head"] for table in tables)
    folder.poor = ["void"]
    marked = [table for part in sections(folder).values() for table in part]
    assert [len(table["rows"]) for table in marked] == [3, 3, 2, 6]  # fractions, sizes, batches
    for table in marked:
        assert table["head"][-1] == "where it was checked"
        wrong = {row[-1] for row in table["rows"] if "void" in row[:2]}
        assert wrong == {"mostly wrong: do not rely on it"}
        assert {row[-1] for row in table["rows"] if "void" not in row[:2]} == {"-"}


def test_a_histogram_has_the_colour_of_its_phase(tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path, monkeypatch, 2)
    folder.diameters[1] = [np.linspace(1, 9, 20)]
    given = list[object]()
    monkeypatch.setattr(laboratory, "size_picture", lambda *how: given.append(how[3:]))
    laboratory._size_pictures(folder)
    red, green, blue = folder.segmenter.colours[1]
    assert given == [(f"#{red:02x}{green:02x}{blue:02x}",)]
    (axes,) = size_figure("", np.linspace(1, 9, 20), "px", "#e69f00").axes
    assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {"#e69f00"}
