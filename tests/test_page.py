"""The page about an experiment, read back with an HTML parser; expected numbers by hand."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config import Config
from report import page as report
from report.page import write_report
from utils.checkpoint import save
from utils.commandline import UserError
from utils.tables import csv_text

NAME = 'Al<b>&"钢 µ'
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Text, cells, pictures and links of a page; fails when its tags are not balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.pictures: list[tuple[str, Image.Image]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        given = {name: value or "" for name, value in attrs}
        self.links += [given[name] for name in ("href", "src") if name in given]
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "img":
            encoded = given["src"].partition("base64,")[2]
            picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
            self.pictures.append((given["alt"], picture))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


def evaluation(epoch: int, acc: float, dice: float) -> dict[str, Any]:
    scores = {"acc": acc, "dice": dice, "dice1": dice - 0.125, "dice2": dice + 0.125, "miou": 0.1}
    return {"epoch": epoch, **scores}


ABOUT = "Fine-tuning on 1 image of <b>steel</b> & iron: 钢.png"


def run(folder: Path, *evaluations: dict[str, Any], finished: bool = True, **settings: Any) -> Path:
    """A run with a state as training leaves it, of these settings, and four epochs of metrics."""
    contents = {"settings": {"seed": 9}, "outputs": [], "finished": finished, "about": [ABOUT]}
    contents |= {"config": Config(**settings).to_dict(), "environment": "program 1.0.0, python 3"}
    save(folder / "state_fine.pt", {**contents, "evaluations": list(evaluations)})
    lines = [{"stage": "fine", "epoch": n, "loss": 1 / (1 + n)} for n in range(4)]
    lines += [{"stage": "fine", "evaluation": e} for e in evaluations]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Two finished runs of one image, one of all images, one that is not finished."""
    folder = tmp_path / NAME
    same = {"data_dir": 'my, "set"', "temperature": 0.25}
    run(folder / "1_0", evaluation(1, 0.75, 0.5), evaluation(3, 0.5, 0.25), **same)
    other = {**same, "seed": 1, "report": True}
    run(folder / "1_1", evaluation(1, 0.5, 0.25), evaluation(3, 0.75, 0.75), **other)
    run(folder / "1_2", evaluation(1, 0.9, 0.9), finished=False, **same)
    run(folder / "f", evaluation(0, 1.0, float("nan")), **same)
    (folder / "notes").mkdir()
    return folder


PICTURES: dict[bytes, Image.Image] = {}


@pytest.fixture(autouse=True)
def equal_curves_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = report.curve_picture

    def remembered(path: Path) -> Image.Image:
        metrics = path.read_bytes() if path.is_file() else b""
        if metrics not in PICTURES:
            PICTURES[metrics] = real(path)
        return PICTURES[metrics]

    monkeypatch.setattr(report, "curve_picture", remembered)


def noise(path: Path, width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_scores_of_each_run_and_their_mean(experiment: Path) -> None:
    path = write_report(experiment)
    assert path == experiment / "report.html"
    page = Page(path)
    # Best by ACC: Dice 0.5 and 0.75; last: 0.25 and 0.75. Deviations 0.25 and 0.5 / sqrt(2).
    scores = [r for r in page.rows if r[0] in ("run", "1_0", "1_1", "1_2", "f", "mean ± std")]
    assert scores[0] == ["run", "epoch", "Dice", "Dice 1", "Dice 2", "ACC", "mIoU"]
    assert scores[1] == ["1_0", "1", "0.5000", "0.3750", "0.6250", "0.7500", "0.1000"]
    assert scores[2][:3] == ["1_1", "3", "0.7500"]
    assert scores[3][:4] == ["mean ± std", "", "0.6250 ± 0.1768", "0.5000 ± 0.1768"]
    assert scores[5][:3] == ["1_0", "3", "0.2500"]
    assert scores[7][2] == "0.5000 ± 0.3536"
    assert scores[9] == ["f", "0", "-", "-", "-", "1.0000", "0.1000"]
    assert "one annotated image, 2 runs: Dice 0.5000 ± 0.3536 after the last epoch" in page.text
    assert "can be read: 1_2." in page.text and "0.9000" not in page.text
    assert "highest ACC on the test set" in page.text and "nothing chosen" in page.text


def test_the_page_stands_alone_and_names_are_escaped(experiment: Path) -> None:
    noise(experiment / "1_0" / "sheet_fine.png", 50, 40)
    page = Page(write_report(experiment))
    assert NAME in page.text and "<b>steel</b> & iron: 钢.png" in page.text
    assert not page.tags & {"b", "script", "link", "iframe", "object"}
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    text = (experiment / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text


def test_settings_are_those_of_the_state(experiment: Path) -> None:
    text = Page(write_report(experiment)).text
    about, _, lists = text.partition("Fine-tuning, run 1_0")[2].partition("Changed from")
    assert about.split() == f"{ABOUT} Computed with program 1.0.0, python 3.".split()
    changed, _, rest = lists.partition("At their defaults")
    assert changed == ' their defaults data_dir = my, "set" temperature = 0.25 '
    assert "scale_weights = 1.0,1.0,1.0" in rest and "overwrite = False" in rest
    assert rest.endswith("Other settings in Fine-tuning, run 1_1 seed = 1")


def test_a_run_whose_state_is_damaged_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "x" / "1_0").mkdir(parents=True)
    (tmp_path / "x" / "1_0" / "state_fine.pt").write_bytes(b"PK damaged")
    assert "No run has a state that can be read" in Page(write_report(tmp_path / "x")).text


def test_every_run_has_its_curves_and_sheets(experiment: Path) -> None:
    noise(experiment / "1_1" / "sheet_fine.png", 60, 40)
    noise(experiment / "1_1" / "sheet_fine_extremes.png", 60, 50)
    (experiment / "f" / "sheet_fine.png").write_bytes(b"\x89PNG no picture")
    (experiment / "1_2" / "metrics.jsonl").unlink()
    page = Page(write_report(experiment))
    curves = [name for name, picture in page.pictures if picture.format == "PNG"]
    assert curves == [f"Learning curves of run {name}" for name in ("1_0", "1_1", "f")]
    sheets = [picture.size for _, picture in page.pictures if picture.format == "JPEG"]
    assert sheets == [(60, 50), (60, 40)]  # those of few pictures first
    assert "1_2: no curves yet" in page.text and "f/sheet_fine.png: cannot be read" in page.text


def test_a_sheet_that_claims_more_pixels_than_are_read_is_left_out(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(experiment / "1_1" / "sheet_fine.png", 60, 40)
    noise(experiment / "1_1" / "sheet_fine_extremes.png", 60, 50)
    monkeypatch.setattr("imaging.imagefile.MAX_PIXELS", 60 * 40)
    page = Page(write_report(experiment))
    assert "1_1/sheet_fine_extremes.png: cannot be read, left out" in page.text
    assert (60, 40) in [picture.size for _, picture in page.pictures]


def test_the_page_stays_small(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1_0", "1_1", "1_2", "f"):
        noise(experiment / name / "sheet_fine.png", 600, 500)
    full = write_report(experiment).stat().st_size
    assert full < 10_000_000
    monkeypatch.setattr(report, "MAX_BYTES", full // 4)
    path = write_report(experiment)
    assert path.stat().st_size <= full // 4
    sizes = [p.width for _, p in Page(path).pictures if p.format == "JPEG"]
    assert len(sizes) == 4 and max(sizes) < 600
    monkeypatch.setattr(report, "MAX_BYTES", 20_000)
    path = write_report(experiment)
    assert path.stat().st_size <= 20_000
    assert "left out, the page would be too large" in Page(path).text


def measured(folder: Path, *rows: str, name: str = "measurements.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_measurements_are_shown(experiment: Path) -> None:
    head = "image,batch,class_name,area_fraction,number,d10_diameter_um,mean_area_um2"
    lines = [f"a<{n}>,15,1 α,0.123456,{n}.5,0.99,12.3456789" for n in range(70)]
    measured(experiment / "1_0" / "predicted_钢 <i>", head, *lines)
    page = Page(write_report(experiment))
    shown = [row for row in page.rows if row[0].startswith("a<")]
    assert len(shown) == 70  # complete, however many there are
    assert shown[3] == ["a<3>", "15", "1 α", "12.35", "3.5", "12.35"]
    named = ["image", "batch", "class name", "area fraction, %", "number", "mean area, µm²"]
    assert named in page.rows
    assert "all 70 lines" in page.text
    assert "1_0/predicted_钢 <i>" in page.text and "i" not in page.tags


def test_names_that_a_spreadsheet_would_run_are_shown_as_they_are(experiment: Path) -> None:
    head, name = "image,class_name,area_fraction,number", "a;=b.png"
    line = csv_text([[name, "α", 0.5, 2]]).removesuffix("\n")
    assert name not in line
    measured(experiment / "1_0" / "predicted", head, line)
    assert any(row[0] == name for row in Page(write_report(experiment)).rows if row)


def test_islands_of_the_matrix_are_no_particles(experiment: Path) -> None:
    head = "image,class,class_name,area_fraction,number,mean_area_px2,mean_intercept_px"
    head += ",grain_intercept_px"
    lines = [
        "a,0,matrix,0.8,3,40.5,9.5,",
        "a,1,pore,0.2,5,12.5,4.5,",
        "b,0,ferrite,0.8,3,40.5,9.5,9",
    ]
    measured(experiment / "1_0" / "predicted", head, *lines)
    rows = {row[1]: row for row in Page(write_report(experiment)).rows if row[0] in "ab"}
    assert rows["matrix"] == ["a", "matrix", "80.00", "-", "-", "9.500"]
    assert rows["pore"] == ["a", "pore", "20.00", "5", "12.50", "4.500"]
    assert rows["ferrite"] == ["b", "ferrite", "80.00", "3", "40.50", "9.500"]  # grains


def test_the_summary_of_a_predicted_folder_is_shown(experiment: Path) -> None:
    head = "image,batch,class_name,area_fraction,astm_g"
    folder = measured(experiment / "1_0" / "predicted", head, "a,,matrix,0.8,")
    assert "matrix" in Page(write_report(experiment)).text  # made before there were summaries
    summary = {
        "about": ["Scale: 0.25 µm per pixel"],
        "warnings": ["Warning: 1 image(s) without <a> true mask"],
        "tables": [{"title": "Dice & D50", "head": ["class", "D50, µm"], "rows": [["θ", "2.5"]]}],
        "unusable": ["b.png: damaged"],
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = Page(write_report(experiment))
    at = page.rows.index(["class", "D50, µm"])
    assert page.rows[at + 1] == ["θ", "2.5"] and "Dice & D50" in page.text
    assert page.rows[at + 2] == [
        "image",
        "class name",
        "area fraction, %",
    ]  # nothing without values
    assert "Scale: 0.25 µm per pixel Warning: 1 image(s) without <a> true mask" in page.text
    assert "1 file(s) could not be used b.png: damaged" in page.text
    assert "ASTM G" not in page.text and "half-width / mean" in page.text


@pytest.mark.parametrize("damaged", ["", "{", "7", "[1]"])
def test_a_damaged_summary_is_said(experiment: Path, damaged: str) -> None:
    folder = measured(experiment / "predicted", "image,class_name,number", "a,matrix,3")
    (folder / "summary.json").write_text(damaged)
    page = Page(write_report(experiment))
    assert "summary.json: cannot be read" in page.text and ["a", "matrix", "3"] in page.rows


def test_odd_measurements_do_no_harm(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (experiment / "1_0" / "measurements.csv").write_bytes(b"")
    (experiment / "1_1" / "measurements.csv").write_bytes(b"image,area_fraction\nshort\n\xff,1,2\n")
    page = Page(write_report(experiment))
    assert "holds no measurements" in page.text
    assert ["short", ""] in page.rows and ["\ufffd", "1"] in page.rows
    monkeypatch.setattr(report, "TABLE_CHARACTERS", 5)
    assert "Too much for this page: see 1_1" in Page(write_report(experiment)).text


def test_only_pretraining_has_nothing_to_score(tmp_path: Path) -> None:
    (tmp_path / "x" / "1_0").mkdir(parents=True)
    (tmp_path / "x" / "1_0" / "log_self.txt").write_text("Pretraining\n")
    assert "nothing to score yet" in Page(write_report(tmp_path / "x")).text


def test_what_cannot_be_written_is_one_line(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds no run") as error:
        write_report(experiment / "absent")
    assert str(experiment / "absent") in str(error.value)
    write_report(experiment)
    before = (experiment / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left") as error:
        write_report(experiment)
    assert "\n" not in str(error.value)
    assert (experiment / "report.html").read_bytes() == before
    assert not list(experiment.glob(".report*"))
